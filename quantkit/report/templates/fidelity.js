// Behavior of the pages: plots, sorting, filtering, search, copying, color scheme. No text is parsed as HTML.
"use strict";
(() => {
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const root = document.documentElement;
  const PAGE_SIZE = 12; // changed items

  // Parse a number of the report: "12,345", "-0.33 [-1.45, +0.79]", "<0.001", "1.2e-7"; cells without a number sort last.
  const parseNumber = (text) => {
    const match = text.replace(/,/g, "").match(/[-+]?\d*\.?\d+(?:e[-+]?\d+)?/i);
    return match ? parseFloat(match[0]) : text.trim() === "not finite" ? Infinity : NaN;
  };

  const sortRows = (table, column, numeric, descending) => {
    const value = (row) => row.cells[column].textContent.trim();
    const compare = (a, b) => {
      if (!numeric) return value(a).localeCompare(value(b), "en", { numeric: true });
      const [first, second] = [parseNumber(value(a)), parseNumber(value(b))];
      if (Number.isNaN(first) || Number.isNaN(second)) return (Number.isNaN(first) - Number.isNaN(second)) * (descending ? -1 : 1);
      return first === second ? 0 : first - second;
    };
    const rows = [...table.tBodies[0].rows].sort((a, b) => (descending ? -compare(a, b) : compare(a, b)));
    table.tBodies[0].append(...rows);
  };

  for (const table of all("table")) {
    all("thead th", table).forEach((head, column) => {
      head.querySelector("button").addEventListener("click", () => {
        const numeric = head.classList.contains("n");
        const before = head.getAttribute("aria-sort");
        const descending = before ? before === "ascending" : numeric; // numbers: largest first
        all("thead th", table).forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", descending ? "descending" : "ascending");
        sortRows(table, column, numeric, descending);
      });
    });
  }

  const splitWords = (text) => text.toLowerCase().split(/\s+/).filter(Boolean);
  const containsAll = (element, terms) => {
    const text = element.textContent.toLowerCase();
    return terms.every((word) => text.includes(word));
  };
  const formatCount = (shown, total) => (shown === total ? "" : `${shown} of ${total}`);

  for (const input of all("input[data-filters]")) {
    const rows = [...document.getElementById(input.dataset.filters).tBodies[0].rows];
    const output = input.closest(".tools").querySelector("output");
    input.addEventListener("input", () => {
      const terms = splitWords(input.value);
      rows.forEach((row) => { row.hidden = !containsAll(row, terms); });
      output.textContent = formatCount(rows.filter((row) => !row.hidden).length, rows.length);
    });
  }

  const search = document.getElementById("search");
  if (search) {
    const [task, outcome] = ["task", "outcome"].map((id) => document.getElementById(id));
    const articles = all("#items > article");
    const output = search.closest(".tools").querySelector("output");
    const more = document.getElementById("more");
    let limit = PAGE_SIZE; // articles shown at once; a search covers all
    const update = () => {
      const terms = splitWords(search.value);
      const matches = articles.filter((article) => (!task.value || article.dataset.task === task.value)
        && (!outcome.value || article.dataset.outcome === outcome.value) && containsAll(article, terms));
      const shown = new Set(matches.slice(0, limit));
      articles.forEach((article) => { article.hidden = !shown.has(article); });
      output.textContent = formatCount(matches.length, articles.length);
      document.getElementById("left").textContent = matches.length > limit ? `${matches.length - limit} more items are not printed.` : "";
      more.hidden = matches.length <= limit;
      more.textContent = `Show ${Math.min(PAGE_SIZE, matches.length - limit)} more of ${matches.length - limit}`;
    };
    more.addEventListener("click", () => { limit += PAGE_SIZE; update(); });
    update();
    [search, task, outcome].forEach((control) => control.addEventListener("input", () => { limit = PAGE_SIZE; update(); }));
  }

  for (const button of all("button.copy")) {
    const code = button.parentElement.querySelector("code");
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(code.textContent);
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(code); // pages opened from disk may lack clipboard access: select the text
        button.textContent = "Selected";
      }
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
  }

  const theme = document.getElementById("theme");
  const isDark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const updateLabel = () => { theme.textContent = isDark() ? "Light" : "Dark"; };
  theme.hidden = false;
  theme.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; updateLabel(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", updateLabel);
  updateLabel();

  const links = new Map(all("nav a").map((link) => [link.hash.slice(1), link]));
  const observer = new IntersectionObserver((entries) => {
    for (const entry of entries.filter((item) => item.isIntersecting)) {
      links.forEach((link, id) => link.toggleAttribute("aria-current", id === entry.target.id));
    }
  }, { rootMargin: "-10% 0px -80% 0px" });
  all("main > section").forEach((section) => observer.observe(section));

  const { config, specs } = JSON.parse(document.getElementById("drawings").textContent);
  const draw = (figure) => {
    const spec = { ...specs[figure.dataset.plot], description: figure.querySelector("figcaption b").textContent };
    return vegaEmbed(figure.querySelector(".canvas"), spec, { actions: false, ast: true, config, mode: "vega-lite", renderer: "svg" });
  };
  Promise.all(all("figure[data-plot]").map(draw)).then(() => { root.dataset.drawn = "yes"; });
})();
