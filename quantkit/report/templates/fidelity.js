// What the page does beyond showing: plots, sorting, filtering, search, copying, dark and light. No text becomes HTML.
"use strict";
(() => {
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const root = document.documentElement;
  const PAGE = 12; // changed items

  // A number as the report writes it: "12,345", "-0.33 [-1.45, +0.79]", "<0.001", "1.2e-7"; what has none sorts last.
  const number = (text) => {
    const found = text.replace(/,/g, "").match(/[-+]?\d*\.?\d+(?:e[-+]?\d+)?/i);
    return found ? parseFloat(found[0]) : text.trim() === "not finite" ? Infinity : NaN;
  };

  const sort = (table, column, numeric, downwards) => {
    const value = (row) => row.cells[column].textContent.trim();
    const compare = (a, b) => {
      if (!numeric) return value(a).localeCompare(value(b), "en", { numeric: true });
      const [first, second] = [number(value(a)), number(value(b))];
      if (Number.isNaN(first) || Number.isNaN(second)) return (Number.isNaN(first) - Number.isNaN(second)) * (downwards ? -1 : 1);
      return first === second ? 0 : first - second;
    };
    const rows = [...table.tBodies[0].rows].sort((a, b) => (downwards ? -compare(a, b) : compare(a, b)));
    table.tBodies[0].append(...rows);
  };

  for (const table of all("table")) {
    all("thead th", table).forEach((head, column) => {
      head.querySelector("button").addEventListener("click", () => {
        const numeric = head.classList.contains("n");
        const before = head.getAttribute("aria-sort");
        const downwards = before ? before === "ascending" : numeric; // numbers: the largest first
        all("thead th", table).forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", downwards ? "descending" : "ascending");
        sort(table, column, numeric, downwards);
      });
    });
  }

  const words = (text) => text.toLowerCase().split(/\s+/).filter(Boolean);
  const holds = (element, wanted) => {
    const text = element.textContent.toLowerCase();
    return wanted.every((word) => text.includes(word));
  };
  const told = (shown, every) => (shown === every ? "" : `${shown} of ${every}`);

  for (const input of all("input[data-filters]")) {
    const rows = [...document.getElementById(input.dataset.filters).tBodies[0].rows];
    const output = input.closest(".tools").querySelector("output");
    input.addEventListener("input", () => {
      const wanted = words(input.value);
      rows.forEach((row) => { row.hidden = !holds(row, wanted); });
      output.textContent = told(rows.filter((row) => !row.hidden).length, rows.length);
    });
  }

  const search = document.getElementById("search");
  if (search) {
    const [task, outcome] = ["task", "outcome"].map((id) => document.getElementById(id));
    const articles = all("#items > article");
    const output = search.closest(".tools").querySelector("output");
    const more = document.getElementById("more");
    let room = PAGE; // articles shown at once; a search goes through all of them
    const choose = () => {
      const wanted = words(search.value);
      const found = articles.filter((article) => (!task.value || article.dataset.task === task.value)
        && (!outcome.value || article.dataset.outcome === outcome.value) && holds(article, wanted));
      const shown = new Set(found.slice(0, room));
      articles.forEach((article) => { article.hidden = !shown.has(article); });
      output.textContent = told(found.length, articles.length);
      document.getElementById("left").textContent = found.length > room ? `${found.length - room} more items are not on paper.` : "";
      more.hidden = found.length <= room;
      more.textContent = `Show ${Math.min(PAGE, found.length - room)} more of ${found.length - room}`;
    };
    more.addEventListener("click", () => { room += PAGE; choose(); });
    choose();
    [search, task, outcome].forEach((control) => control.addEventListener("input", () => { room = PAGE; choose(); }));
  }

  for (const button of all("button.copy")) {
    const code = button.parentElement.querySelector("code");
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(code.textContent);
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(code); // a page from disk may not be allowed to: then it is selected
        button.textContent = "Selected";
      }
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
  }

  const theme = document.getElementById("theme");
  const dark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const name = () => { theme.textContent = dark() ? "Light" : "Dark"; };
  theme.hidden = false;
  theme.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; name(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", name);
  name();

  const links = new Map(all("nav a").map((link) => [link.hash.slice(1), link]));
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries.filter((each) => each.isIntersecting)) {
      links.forEach((link, id) => link.toggleAttribute("aria-current", id === entry.target.id));
    }
  }, { rootMargin: "-10% 0px -80% 0px" });
  all("main > section").forEach((section) => seen.observe(section));

  const { config, specs } = JSON.parse(document.getElementById("drawings").textContent);
  const draw = (figure) => {
    const spec = { ...specs[figure.dataset.plot], description: figure.querySelector("figcaption b").textContent };
    return vegaEmbed(figure.querySelector(".canvas"), spec, { actions: false, ast: true, config, mode: "vega-lite", renderer: "svg" });
  };
  Promise.all(all("figure[data-plot]").map(draw)).then(() => { root.dataset.drawn = "yes"; });
})();
