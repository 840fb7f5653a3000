"""Templates and patterns of strangers: rendered as jinja2 does, ended by limits, never escaping."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import Environment, StrictUndefined
from lm_eval.filters.extraction import RegexFilter

from quantkit.io import templates
from quantkit.io.templates import TemplateFault, TemplateWorker, WorkerLimits

ROW = {"question": "1 + 1?", "choices": ["1", "2"], "answer": 1, "none": None, "score": 0.5}
ESCAPES = {
    "globals of a class": "{{ cycler.__init__.__globals__.os.system('touch OWNED') }}",
    "attribute by filter": "{{ (cycler|attr('__init__'))|attr('__globals__') }}",
    "attribute by item": "{{ cycler['__init__']['__globals__'] }}",
    "attribute by map": "{{ [cycler]|map(attribute='__init__.__globals__')|list }}",
    "format string": "{{ '{0.__init__.__globals__}'.format(cycler) }}",
    "format through a variable": "{% set f = '{0.__class__}'.format %}{{ f(1) }}",
    "subclasses": "{{ ().__class__.__base__.__subclasses__() }}",
    "frames of a generator": "{{ (joiner|map('upper')).gi_frame.f_globals }}",
    "template reference": "{{ self._TemplateReference__context }}",
    "change of a value": "{{ choices.append(3) }}",
    "file": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
}
BOMBS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "text": "{{ 'a' * 10**10 }}",
    "format width": "{{ '%10000000000d' % 1 }}",
    "number": "{{ 10 ** (10 ** 9) }}",
    "centered": "{{ 'a'|center(10**10) }}",
    "indented": "{{ ('a\\n' * 100000)|indent(100000) }}",
    "joined": "{{ (['a' * 1000000] * 100000)|join }}",
    "many pieces": "{% for a in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "nested brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "pattern": "{{ ('a' * 40 ~ '!')|regex_replace('(a+)+$', '') }}",
    "doubled list": "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}"
    "{% set ns.x = ns.x + ns.x %}{% endfor %}",
}


@pytest.fixture(scope="module")
def worker() -> Iterator[TemplateWorker]:
    with TemplateWorker(WorkerLimits(total_seconds=None)) as made:
        yield made


@pytest.mark.parametrize(
    "template",
    [
        "Question: {{question}}\nAnswer:\n",
        "{{choices[answer]}} {{choices|join(', ')}} {{score}} {{none}}",
        "{% if none is none %}a{% else %}b{% endif %}{% for c in choices %}{{loop.index}}{{c}}\n"
        "{%- endfor %}",
        "{{ question|upper|replace('1', 'é')|trim }} {{ '%05d'|format(7) }}",
        "{{ missing|default(1) }}",
        "{{ {'a': [1, {}]}|tojson }} {{ question.split(' ') }} {{ choices[::-1] }}",
    ],
)
def test_harmless_template_renders_as_in_plain_jinja2(
    worker: TemplateWorker, template: str
) -> None:
    plain = Environment(undefined=StrictUndefined, keep_trailing_newline=True)  # noqa: S701
    assert worker.render(template, ROW) == plain.from_string(template).render(ROW)


@pytest.mark.parametrize("template", ESCAPES.values(), ids=ESCAPES)
def test_template_cannot_reach_python(
    worker: TemplateWorker, template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TemplateFault) as caught:
        worker.render(template, ROW)
    assert not caught.value.is_limit
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("template", BOMBS.values(), ids=BOMBS)
def test_limits_end_a_template(
    worker: TemplateWorker, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(templates, "RENDER_SECONDS", 1)
    with pytest.raises(TemplateFault) as caught:
        worker.render(template, ROW)
    assert str(caught.value).isprintable()
    assert worker.render("{{question}}", ROW) == "1 + 1?"  # the next one is served


def test_process_that_renders_can_open_nothing(worker: TemplateWorker) -> None:
    """Python that escaped from the sandbox would have no file, no socket and no library."""
    worker.render("x", {})
    process = worker._process
    assert process is not None
    limits = Path(f"/proc/{process.pid}/limits").read_text(encoding="ascii")
    assert re.search(r"Max open files +3 +3 ", limits)
    assert re.search(r"Max file size +0 +0 ", limits)
    assert Path(f"/proc/{process.pid}/environ").read_bytes() == b""
    assert len(os.listdir(f"/proc/{process.pid}/fd")) == 3


def test_limits_hold_over_all_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        TemplateWorker(WorkerLimits(total_characters=5000)) as worker,
        pytest.raises(TemplateFault, match="expected at most 5,000 characters of all documents"),
    ):
        for _ in range(9):
            worker.render("{{ 'a' * 1000 }}", {})
    with (
        TemplateWorker(WorkerLimits(total_seconds=0.05)) as worker,
        pytest.raises(TemplateFault, match=r"0 s of processor time for all documents, found more"),
    ):
        for _ in range(9):
            worker.render("{% for a in range(99999) %}{{ a }}{% endfor %}", {})


def test_too_long_document_is_refused(
    worker: TemplateWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(templates, "MAX_REQUEST_BYTES", 1 << 20)
    with pytest.raises(TemplateFault, match="expected a document of at most 1 MiB, found 2 MiB"):
        worker.render("{{a}}", {"a": "x" * (2 << 20)})


def test_fault_is_one_printable_sentence(worker: TemplateWorker) -> None:
    for template, sentence in {
        "{{ missing }}": "'missing' is undefined",
        "{% for a in": "unexpected 'end of template'",
        "{{ 1 / 0 }}": "ZeroDivisionError: division by zero",
        "{{ 'a'|nofilter }}": "No filter named 'nofilter'.",
    }.items():
        with pytest.raises(TemplateFault) as caught:
            worker.render(template, {})
        assert str(caught.value) == sentence
    with pytest.raises(TemplateFault) as caught:
        worker.render("{{ raise_exception(text) }}", {"text": "\x1b[2Jno\n\nroom" * 99}, "chat")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) <= 300


def test_threads_share_a_worker(worker: TemplateWorker) -> None:
    results: dict[int, str] = {}

    def render(number: int) -> None:
        results[number] = worker.render("{{a * 1000}}", {"a": str(number)})

    threads = [threading.Thread(target=render, args=(number,)) for number in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: str(number) * 1000 for number in range(9)}


def test_worker_ends_with_its_owner() -> None:
    worker = TemplateWorker()
    worker.render("x", {})
    assert worker._process is not None
    pid = worker._process.pid
    assert Path(f"/proc/{pid}").exists()
    worker.close()
    assert not Path(f"/proc/{pid}").exists()
    assert worker.render("y", {}) == "y"  # starts again
    assert worker._process is not None and worker._process.stdin is not None
    worker._process.stdin.close()  # as when this process is killed
    deadline = time.monotonic() + 60
    while worker._process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert worker._process.returncode == 0
    worker.close()


def test_dead_process_is_one_fault(worker: TemplateWorker) -> None:
    worker.render("x", {})
    assert worker._process is not None
    worker._process.kill()
    with pytest.raises(TemplateFault, match=r"ended \(exit code -9\)"):
        worker.render("x", {})
    assert worker.render("x", {}) == "x"


def test_values_that_json_cannot_hold_become_text(worker: TemplateWorker) -> None:
    import datetime

    day = datetime.date(2026, 1, 2)
    assert worker.render("{{ day }} {{ nan }}", {"day": day, "nan": float("nan")}) == f"{day} nan"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("['a', \"b\"]", ["a", "b"]),
        ("[1, 2.5, None]", [1, 2.5, None]),
        ("[]", []),
        ("[a, b]", "[a, b]"),
        ("7", "7"),
        ("[__import__('os')]", "[__import__('os')]"),
        ("[b'x']", "[b'x']"),
    ],
)
def test_target_that_writes_a_list_is_one(worker: TemplateWorker, text: str, value: object) -> None:
    assert worker.render_target("{{a}}", {"a": text}) == value


def test_deeply_nested_target_is_text_or_a_fault(worker: TemplateWorker) -> None:
    for text in ("[" * 100_000 + "]" * 100_000, "[" + "-" * 1_000_000 + "1]"):
        try:
            assert worker.render_target("{{a}}", {"a": text}) == text
        except TemplateFault as fault:
            assert fault.is_limit


PATTERNS = (r"#### (\-?[0-9\.\,]+)", r"(-?[$0-9.,]{2,})|(-?[0-9]+)", r"\w+", r"(a)(b)?", r"(x)|y")


@given(
    pattern=st.sampled_from(PATTERNS),
    texts=st.lists(st.text(alphabet="ab# 17.,$-xy\n", max_size=20), min_size=1, max_size=4),
    group=st.sampled_from([0, -1]),
)
def test_find_matches_equals_lm_eval(
    worker: TemplateWorker, pattern: str, texts: list[str], group: int
) -> None:
    reference = RegexFilter(regex_pattern=pattern, group_select=group)
    answers = worker.find_matches(pattern, texts, group=group, fallback="[invalid]")
    assert [answers] == list(reference.apply([texts], []))


def test_patterns_are_limited(worker: TemplateWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "RENDER_SECONDS", 1)
    with pytest.raises(TemplateFault, match="of processor time, found more") as caught:
        worker.find_matches("(a+)+$", ["a" * 40 + "!"], group=0, fallback="")
    assert caught.value.is_limit
    with pytest.raises(TemplateFault, match="of processor time, found more"):
        worker.remove_matches(["(a|aa)+$"], ["a" * 60 + "!"])
    with pytest.raises(TemplateFault, match="unterminated character set"):
        worker.remove_matches(["["], ["a"])
    assert worker.remove_matches([",", r"\$"], ["$1,000", "2"]) == ["1000", "2"]
