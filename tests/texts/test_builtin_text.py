"""Built-in text: the interpreter's library and generated mathematics; draws, sizes and faults."""

from __future__ import annotations

import hashlib
import json
import platform
import random
import re
import sys
from itertools import islice
from pathlib import Path
from typing import get_args

import pytest
from support.paths import ROOT

from quantkit.errors import CalibrationError, UsageError
from quantkit.report.make import summarize_text
from quantkit.texts import builtin_text, interpreter_text
from quantkit.texts.builtin_text import CHARACTERS, BuiltinName, iterate_problems, read_builtin
from quantkit.texts.corpora import load_set, load_tokenizer, sample_sequences
from quantkit.texts.corpus_files import bound_sequences
from quantkit.texts.corpus_spec import read_spec
from quantkit.texts.exercises import EXERCISES
from quantkit.texts.interpreter_text import (
    NOTICE,
    REMEDY,
    describe_interpreter,
    find_standard_library,
    read_documentation,
    read_sources,
)
from quantkit.texts.word_problems import WORD_PROBLEMS

SETS = ROOT / "calibration"
TINY = ROOT / "quantkit/data/models/tiny_v3/checkpoint"
GENERAL = ("general-math-code", "general-heldout")
NAMES: tuple[BuiltinName, ...] = get_args(BuiltinName)
MATH: tuple[BuiltinName, ...] = ("exercises", "word-problems")
CHARACTERS_PER_TOKEN = 3.5  # of English and code with a vocabulary of 50,000
SIDE_EFFECT = "raise SystemExit('this module was imported')\n"
PARAGRAPH = "Return the number of things that are in this folder, however deep they are.\n"


def write_library(root: Path, n_modules: int = 60) -> Path:
    """Write a standard library of modules that end the process when they are imported."""
    (root / "pydoc_data").mkdir()
    topics = {f"topic {n}": f"{n} {PARAGRAPH}" * 20 for n in range(20)}
    (root / "pydoc_data/topics.py").write_text(f"{SIDE_EFFECT}topics = {topics!r}\n", "utf-8")
    for n in range(n_modules):
        docstring = "\n\n".join(f"{n} {k} {PARAGRAPH}" for k in range(20))
        (root / f"module_{n}.py").write_text(f'"""{docstring}"""\n{SIDE_EFFECT}', "utf-8")
    return root


def read_both(name: BuiltinName) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return read_builtin(name, "calibration", "x"), read_builtin(name, "heldout", "x")


@pytest.mark.parametrize("name", NAMES)
def test_draws_share_no_document_and_no_paragraph(name: BuiltinName) -> None:
    calibration, held_out = (
        {" ".join(piece.split()) for text in texts for piece in (text, *split(text, name))}
        for texts in read_both(name)
    )
    assert len(calibration) > len(held_out) > 8
    assert not calibration & held_out


def split(text: str, name: BuiltinName) -> list[str]:
    """Return the long paragraphs of documentation; the halves of code may well be equal."""
    parts = text.split("\n\n") if name == "python-topics" else []
    return [part for part in parts if len(" ".join(part.split())) >= 60]


@pytest.mark.parametrize("name", MATH)
def test_a_problem_is_in_one_draw_in_whatever_layout(name: BuiltinName) -> None:
    def strip_layout(text: str) -> str:
        words = r"Question: |Solution: |Problem\. |Q: |A: |## Exercise|## Solution"
        return " ".join(re.sub(words, "", text).split())

    calibration = {
        strip_layout(text) for text in islice(iterate_problems(name, "calibration"), 1_500)
    }
    held_out = {strip_layout(text) for text in islice(iterate_problems(name, "heldout"), 300)}
    assert len(calibration) == 1_500 and len(held_out) == 300
    assert not calibration & held_out


def test_modules_and_documentation_come_from_other_files() -> None:
    root = find_standard_library()
    files = [
        set(interpreter_text.list_source_files(root, use, draw))
        for use in get_args(interpreter_text.Use)
        for draw in interpreter_text.DRAWS
    ]
    assert all(len(some) > 10 for some in files)
    assert len(set().union(*files)) == sum(map(len, files))


@pytest.mark.parametrize("name", NAMES)
def test_text_is_the_same_on_every_read(name: BuiltinName) -> None:
    _, first = read_both(name)
    builtin_text._read_builtin.cache_clear()
    assert read_builtin(name, "heldout", "x") == first


@pytest.mark.parametrize("name", MATH)
def test_generated_mathematics_keeps_its_bytes(name: BuiltinName) -> None:
    """A change of a generator changes what every artifact is calibrated on."""
    recorded = {
        "exercises": "5ec3b4fa1fe98225",
        "word-problems": "109f91a6cd242973",
    }
    text = "\0".join("\0".join(texts) for texts in read_both(name))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == recorded[name]


def test_files_with_a_notice_are_excluded(tmp_path: Path) -> None:
    assert not any(NOTICE.search(text) for text in read_both("python-modules")[0])
    root = write_library(tmp_path)
    kept = "".join(read_sources(root, "calibration"))
    for path in root.glob("module_*.py"):
        path.write_text(f"# Copyright (c) Some Body\n{path.read_text('utf-8')}", "utf-8")
    assert kept and not list(read_sources(root, "calibration"))


def test_no_module_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules that end the process are read; none of the library's own becomes imported."""
    root = write_library(tmp_path)
    monkeypatch.syspath_prepend(str(root))
    assert list(read_sources(root, "calibration"))
    texts = list(read_documentation(root, "calibration"))
    assert any(re.match(r"\d+ Return", text) for text in texts)  # a topic
    assert any(re.match(r"\d+ 0 Return", text) for text in texts)  # a docstring
    before = set(sys.modules)
    for name in ("python-modules", "python-topics"):
        builtin_text._read_builtin.__wrapped__(name, "heldout", find_standard_library())
    assert set(sys.modules) == before


@pytest.mark.parametrize(
    ("missing", "name", "message"),
    [
        ("pydoc_data/topics.py", "python-topics", "the topics of {python} in {root}/pydoc_data/"),
        ("module_*.py", "python-topics", "modules of {python}'s standard library as .py files"),
        ("module_*.py", "python-modules", "modules of {python}'s standard library as .py files"),
    ],
)
def test_missing_library_gives_one_sentence_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str, name: BuiltinName, message: str
) -> None:
    root = write_library(tmp_path)
    for path in root.glob(missing):
        path.unlink()
    monkeypatch.setattr(builtin_text, "find_standard_library", lambda: root)
    with pytest.raises(CalibrationError) as caught:
        read_builtin(name, "calibration", "mine.yaml: part a")
    expected = message.format(python=describe_interpreter(), root=root)
    assert str(caught.value).startswith(f"mine.yaml: part a: builtin: expected {expected}")
    assert str(caught.value).endswith(REMEDY) and "\n" not in str(caught.value)


def test_zipped_library_gives_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embeddable Python of Windows has python311.zip in place of a folder."""
    monkeypatch.setattr(builtin_text, "find_standard_library", lambda: Path("/absent/python.zip"))
    with pytest.raises(CalibrationError, match=r"/absent/python\.zip, found none\. Use a Python"):
        read_builtin("python-modules", "heldout", "x")


@pytest.mark.parametrize("damage", ["topics = {}\n", "topics = {", "\xff"])
def test_damaged_topics_give_one_sentence(tmp_path: Path, damage: str) -> None:
    root = write_library(tmp_path)
    (root / "pydoc_data/topics.py").write_text(damage, encoding="latin-1")
    with pytest.raises(CalibrationError, match="found no dictionary of text"):
        list(read_documentation(root, "calibration"))


def test_unreadable_modules_are_left_out(tmp_path: Path) -> None:
    root = write_library(tmp_path)
    for path in root.glob("module_*.py"):
        path.write_bytes(b"\xff" + path.read_bytes() if "_1" in path.name else path.read_bytes())
        if "_2" in path.name:
            path.write_text(f"def (\n{path.read_text('utf-8')}", "utf-8")
    texts = "".join(read_documentation(root, "calibration"))
    numbers = set(re.findall(r"(\d+) 0 Return", texts))
    assert numbers and not any(number.startswith(("1", "2")) for number in numbers)


def test_windows_line_ends_become_line_feeds(tmp_path: Path) -> None:
    root = write_library(tmp_path)
    texts = list(read_sources(root, "calibration"))
    for path in root.glob("module_*.py"):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert list(read_sources(root, "calibration")) == texts


# --- sets


@pytest.mark.parametrize("name", GENERAL)
def test_general_set_records_kinds_licenses_and_version_of_python(name: str) -> None:
    corpus = load_set(name, SETS)
    tokens = sample_sequences(corpus, load_tokenizer(TINY), 32, 128, 0)
    summary = summarize_text(corpus, tokens, 128, 0)
    others = [part for part in corpus.parts if part.spec.texts]
    assert len(others) == (name == "general-heldout")
    expected = {"docs", "math", "code", *(label for part in others for label in part.labels)}
    assert set(summary.kinds) == expected
    assert summary.license == "PSF-2.0 AND Apache-2.0"
    origin = f"CPython {platform.python_version()}, standard library: pydoc topics and docstrings"
    if platform.python_implementation() == "CPython":
        assert summary.parts[0].description.startswith(origin)
    assert len({part.sha256 for part in summary.parts}) == 4
    assert {part.license for part in summary.parts} == {"PSF-2.0", "Apache-2.0"}


@pytest.mark.parametrize(("name", "sequences"), [(GENERAL[0], 256), (GENERAL[1], 32)])
def test_general_sets_suffice_for_the_shipped_recipes(name: str, sequences: int) -> None:
    """Each part has its share of the sequences of 2048 tokens."""
    for part in load_set(name, SETS).parts:
        if part.spec.texts:  # of other languages: test_heldout_text.py
            continue
        n_characters = sum(map(len, part.texts))
        expected = part.spec.share * sequences * 2048 * CHARACTERS_PER_TOKEN
        assert n_characters > 1.1 * expected, part.spec.name
        if part.spec.builtin in MATH:
            assert part.spec.draw is not None
            assert n_characters >= CHARACTERS[part.spec.builtin][part.spec.draw]


def test_general_set_has_its_measured_tokens() -> None:
    """tiny-v3's tokenizer has 1.7 characters per token: twice the sequences of a real model."""
    tokens = sample_sequences(load_set(GENERAL[0], SETS), load_tokenizer(TINY), None, 2048, 0)
    assert 720 <= tokens.n_sequences <= 900
    counts = {kind: tokens.domains.count(kind) / tokens.n_sequences for kind in tokens.domains}
    assert counts == pytest.approx({"docs": 0.24, "math": 0.32, "code": 0.44}, abs=0.005)


def test_too_many_sequences_name_the_most() -> None:
    """The error names the number of sequences for which the first short part suffices."""
    tokenizer, corpus = load_tokenizer(TINY), load_set(GENERAL[1], SETS)
    most = sample_sequences(corpus, tokenizer, None, 2048, 0).n_tokens // 2048
    with pytest.raises(UsageError, match=r"expected [\d,]+ tokens.*, enough for (\d+)\.") as caught:
        sample_sequences(corpus, tokenizer, 2 * most, 2048, 0)
    assert most <= int(re.findall(r"enough for (\d+)", str(caught.value))[0]) < 2 * most
    assert sample_sequences(corpus, tokenizer, most, 2048, 0).n_tokens >= most * 2048


def test_bound_of_a_mixture_is_never_below_what_a_tokenizer_gives(tmp_path: Path) -> None:
    for packing in ("windows", "documents"):
        part = f"builtin: exercises, draw: heldout, licence: Apache-2.0, packing: {packing}"
        path = tmp_path / "mixed.yaml"
        path.write_text(
            "version: 2\nname: mixed\nparts:\n"
            f"  - {{name: a, kind: math, {part}}}\n"
            f"  - {{name: b, kind: math, share: 3, {part}}}\n"
        )
        bound = bound_sequences(read_spec(str(path), SETS), 64)
        tokens = sample_sequences(load_set(str(path), SETS), load_tokenizer(TINY), None, 64, 0)
        assert bound is not None
        assert tokens.n_tokens // 64 <= bound < 8 * tokens.n_sequences


def test_rows_and_template_apply_to_built_in_text(tmp_path: Path) -> None:
    path = tmp_path / "mixed.yaml"
    part = 'builtin: exercises, draw: heldout, rows: 3, template: "<{text}>"'
    path.write_text(
        f"version: 2\nname: m\nparts:\n  - {{name: a, kind: math, licence: Apache-2.0, {part}}}\n"
    )
    [mixed] = load_set(str(path), SETS).parts
    assert mixed.texts == tuple(f"<{t}>" for t in read_builtin("exercises", "heldout", "x")[:3])


def test_repository_holds_no_foreign_text() -> None:
    rows = [
        json.loads(line)
        for path in SETS.glob("*.jsonl")
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    assert {path.name for path in SETS.glob("*.jsonl")} == {
        "tiny-v3.jsonl",
        "tiny-v3-heldout.jsonl",
    }
    assert not any("Python Software Foundation" in row["text"] for row in rows)


def test_products_in_math_solutions_are_correct() -> None:
    rng = random.Random(0)
    for problem in WORD_PROBLEMS + EXERCISES:
        for _ in range(200):
            _, solution = problem(rng)
            for left, right, result in re.findall(
                r"(?<![\d.$(/-])(?<!× )(\d+) × (\d+) = (\d+)(?![.\d])", solution
            ):
                assert int(left) * int(right) == int(result), solution
