"""Mixtures: parts from files, sets and the hub; shares of tokens; faults of specs and rows."""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections import Counter
from pathlib import Path

import pyarrow as arrow
import pytest
from pyarrow import parquet
from support.paths import ROOT
from support.word_tokenizer import WordTokenizer

from quantkit.errors import CalibrationError, UsageError
from quantkit.report.make import summarize_text
from quantkit.texts.corpora import CorpusSet, load_set, sample_sequences
from quantkit.texts.corpus_spec import DATA_VARIABLE, read_spec
from quantkit.texts.mixture_spec import list_template_columns
from quantkit.texts.text_rows import RowReader, read_text_rows

SETS = ROOT / "calibration"
LICENSE = "licence:"
REVISION = "b08601e04326c79dfdd32d625aee71d232d685c3"


def write_mixture(folder: Path, *parts: str) -> Path:
    """Write a mixture with parts as flow mappings; a part without a license gets MIT's."""
    path = folder / "mixed.yaml"
    lines = [part if LICENSE in part else f"{part}, {LICENSE} MIT" for part in parts]
    path.write_text("version: 2\nname: mixed\nparts:\n" + "".join(f"  - {{{p}}}\n" for p in lines))
    return path


def write_words(path: Path, word: str, count: int) -> None:
    """Write `count` words to a text file, ten to a paragraph."""
    lines = [" ".join([word] * 10)] * (count // 10)
    path.write_text("\n\n".join(lines), encoding="utf-8")


@pytest.fixture
def mixture(tmp_path: Path) -> CorpusSet:
    write_words(tmp_path / "a.txt", "a", 4000)
    write_words(tmp_path / "bb.txt", "bb", 4000)
    rows = [{"q": "ccc " * 5, "a": "ccc"}, {"q": "", "a": "ccc"}, {"q": None, "a": "ccc"}] * 200
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path = write_mixture(
        tmp_path,
        "name: a, kind: prose, share: 2, file: a.txt",
        "name: b, kind: web, language: zh, licence: CC0-1.0, file: bb.txt",
        'name: c, kind: math, file: c.jsonl, template: "{q}{a}", packing: documents',
    )
    return load_set(str(path), SETS)


def test_parts_have_their_share_of_the_tokens(mixture: CorpusSet) -> None:
    tokens = sample_sequences(mixture, WordTokenizer(), 40, 50, 0)
    summary = summarize_text(mixture, tokens, 50, 0)
    assert summary.kinds["prose"] == 1000 and summary.kinds["web-zh"] == 500
    assert 500 <= summary.kinds["math"] < 500 + 50  # the last document may exceed the share
    assert [part.tokens for part in summary.parts] == [1000, 500, summary.kinds["math"]]
    assert [part.skipped for part in summary.parts] == [0, 0, 400]
    assert summary.license == "MIT AND CC0-1.0"
    words = {"prose": 11, "web-zh": 12, "math": 13}
    for index, label in enumerate(tokens.domains):
        assert set(tokens.sequence(index)[1:].tolist()) == {words[label]}


def test_any_prefix_of_a_mixture_has_every_part(mixture: CorpusSet) -> None:
    tokens = sample_sequences(mixture, WordTokenizer(), 80, 50, 0)
    assert set(tokens.domains[:40]) == {"prose", "web-zh", "math"}


def test_same_seed_gives_same_tokens_and_other_seed_others(mixture: CorpusSet) -> None:
    first, same, other = (sample_sequences(mixture, WordTokenizer(), 40, 50, s) for s in (0, 0, 1))
    assert first.hash == same.hash != other.hash


def test_null_takes_what_every_share_allows(mixture: CorpusSet) -> None:
    """The math part is the smallest: 200 documents of 6 words and BOS, a quarter of the tokens."""
    tokens = sample_sequences(mixture, WordTokenizer(), None, 50, 0)
    counts = Counter(tokens.domains)
    assert tokens.n_tokens <= 4 * 200 * 7
    assert counts["prose"] == 2 * counts["web-zh"] > 0


def test_null_rounds_no_share_beyond_a_part(tmp_path: Path) -> None:
    """A third of 8 sequences is 3 or 2; the first part has tokens for 2.94."""
    (tmp_path / "a.jsonl").write_text('{"text": "a b c d e f"}\n' * 21)
    write_words(tmp_path / "b.txt", "b", 4000)
    parts = [f"name: {name}, kind: web, file: b.txt" for name in ("b", "c")]
    path = write_mixture(tmp_path, "name: a, kind: web, file: a.jsonl, packing: documents", *parts)
    tokens = sample_sequences(load_set(str(path), SETS), WordTokenizer(), None, 50, 0)
    assert tokens.parts.count("b") == tokens.parts.count("c") == 2
    assert 100 <= 7 * tokens.parts.count("a") < 107


def test_part_without_enough_text_raises(mixture: CorpusSet) -> None:
    with pytest.raises(UsageError, match=r"part c: expected 2,000 tokens, its share of 160 .* 1,4"):
        sample_sequences(mixture, WordTokenizer(), 160, 50, 0)


def test_fewer_sequences_than_parts_raise(mixture: CorpusSet) -> None:
    with pytest.raises(UsageError, match="expected at least 3 sequences, one of each part"):
        sample_sequences(mixture, WordTokenizer(), 2, 50, 0)


def test_part_can_be_a_domain_of_another_set(tmp_path: Path) -> None:
    path = write_mixture(
        tmp_path, "name: m, kind: math, licence: Apache-2.0, set: tiny-v3, domain: math"
    )
    [part] = load_set(str(path), SETS).parts
    whole = load_set("tiny-v3", SETS)
    assert part.texts == tuple(row.text for row in whole.documents if row.domain == "math")


def test_folder_and_parquet_and_bom_are_read(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("\ufeffone\r\n\r\ntwo", encoding="utf-8")
    parquet.write_table(arrow.table({"text": ["three", None, " "]}), tmp_path / "sub/b.parquet")
    (tmp_path / "ignored.html").write_text("no")
    rows = read_text_rows(tmp_path, RowReader(), 100)
    assert rows.texts == ("one", "two", "three") and rows.skipped == 2
    assert read_text_rows(tmp_path, RowReader(), 2).texts == ("one", "two")


def test_line_separator_inside_json_is_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one\u2028two"}\n', encoding="utf-8")
    assert read_text_rows(tmp_path / "a.jsonl", RowReader(), 9).texts == ("one\u2028two",)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"text": ["x"]}', r"row 1: text: expected text, found \['x'\]"),
        ('{"text": 3}', r"row 1: text: expected text, found 3"),
        ('{"other": "x"}', r"row 1: expected the column 'text' of `template`, found 'other'"),
        ("[1]", r"a\.jsonl:1: expected a JSON object per line, found \[1\]"),
        ("{", r"a\.jsonl:1: expected a JSON object per line, found: "),
        ('{"text": "\\ud800"}', r"row 1: expected text, found half a surrogate pair"),
    ],
)
def test_row_faults_name_file_and_row(tmp_path: Path, row: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(row)
    with pytest.raises(CalibrationError, match=message):
        read_text_rows(tmp_path / "a.jsonl", RowReader(), 9)


@pytest.mark.parametrize("name", ["a.bin", "missing.txt", "."])
def test_unreadable_paths_raise(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.bin").write_text("x")
    with pytest.raises(CalibrationError, match="expected"):
        read_text_rows(tmp_path / name, RowReader(), 9)


def test_hub_rows_are_streamed_and_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only `rows` rows are read of a stream that never ends."""
    import datasets

    calls: list[dict[str, object]] = []

    def load_dataset(path: str, name: str | None, **options: object) -> object:
        calls.append({"path": path, "name": name, **options})
        return ({"question": f"q{n}", "answer": "a"} for n in iter(int, 1))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    hub = f"datasets: {{path: o/d, split: train, revision: {REVISION}}}"
    path = write_mixture(
        tmp_path,
        f'name: a, kind: chat, rows: 5, template: "{{question}} {{answer}}", {hub}',
    )
    [part] = load_set(str(path), SETS).parts
    assert part.texts == ("q0 a",) * 5
    assert calls == [
        {"path": "o/d", "name": None, "split": "train", "revision": REVISION, "streaming": True}
    ]


def test_local_file_replaces_hub_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n')
    digest = hashlib.sha256(b'{"text": "one"}\n').hexdigest()
    hub = f"datasets: {{path: o/d, split: train, revision: {REVISION}}}"
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    for sha256 in (digest, "0" * 64):
        path = write_mixture(
            tmp_path,
            f"name: a, kind: web, {hub}, local: {{file: rows.jsonl, sha256: '{sha256}'}}",
        )
        if sha256 == digest:
            assert load_set(str(path), SETS).parts[0].texts == ("one",)
        else:
            with pytest.raises(CalibrationError, match=r"rows\.jsonl: expected sha256 0000"):
                load_set(str(path), SETS)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (
            "name: a, kind: web",
            "one of `set`, `file`, `datasets`, `local`, `builtin`, `self`, `texts`, found none",
        ),
        ("name: a, kind: web, builtin: exercises", "`builtin` with `draw: calibration` or"),
        ("name: a, kind: web, builtin: exercises, draw: all", "calibration or heldout"),
        ("name: a, kind: web, builtin: essays, draw: heldout", "exercises, python-modules"),
        ("name: a, kind: web, file: x.txt, draw: heldout", "`draw` belongs to `builtin`"),
        ("name: a, kind: web, builtin: exercises, draw: heldout, origin: x", "without `origin`"),
        ("name: a, kind: web, file: x.txt, set: y", "found set and file"),
        ("name: a, kind: web, file: x.txt, domain: y", "`domain` belongs to `set`"),
        ("name: a, kind: Web, file: x.txt", "a name of lower-case letters"),
        ("name: a, kind: web, file: x.txt, language: Chinese", "a language tag"),
        ("name: a, kind: web, file: x.txt, share: 0", "expected more than 0"),
        ("name: a, kind: web, file: x.txt, shares: 1", "Did you mean 'share'"),
        ("name: a, kind: web, file: x.txt # licence:\n    ", r"parts\[0\]\.licence: missing"),
        (
            'name: a, kind: web, file: x.txt, template: "{a.__class__}"',
            "names of columns in braces",
        ),
        (
            'name: a, kind: web, file: x.txt, template: "{a:>9999999999}"',
            "names of columns in braces",
        ),
        ("name: a, kind: web, file: x.txt, end: eos", "expected none with `packing"),
    ],
)
def test_spec_faults_name_line_and_key(tmp_path: Path, part: str, message: str) -> None:
    path = write_mixture(tmp_path, part)
    with pytest.raises(CalibrationError, match=message) as caught:
        read_spec(str(path), SETS)
    assert f"{path}:4" in str(caught.value)
    assert "parts: expected one entry" not in str(caught.value)


def test_two_parts_of_one_name_raise(tmp_path: Path) -> None:
    part = "name: a, kind: web, file: x.txt"
    with pytest.raises(CalibrationError, match="a: two parts of one name"):
        read_spec(str(write_mixture(tmp_path, part, part)), SETS)


def test_part_of_a_mixture_is_no_mixture(tmp_path: Path) -> None:
    write_words(tmp_path / "a.txt", "a", 10)
    inner = write_mixture(tmp_path, "name: a, kind: web, file: a.txt")
    inner.rename(tmp_path / "inner.yaml")
    path = write_mixture(tmp_path, f"name: b, kind: web, set: {tmp_path / 'inner.yaml'}")
    with pytest.raises(CalibrationError, match="expected a set without parts"):
        load_set(str(path), SETS)


def test_doubled_braces_are_braces() -> None:
    assert list_template_columns("{{}} {a} {b}") == ("a", "b")


def test_documented_mixture_is_valid(tmp_path: Path) -> None:
    page = (SETS / "README.md").read_text(encoding="utf-8")
    example = page.split("A spec of version 2 mixes parts:\n\n")[1].split("\n\n| key")[0]
    (tmp_path / "everyday.yaml").write_text(textwrap.dedent(example), encoding="utf-8")
    spec = read_spec(str(tmp_path / "everyday.yaml"), SETS)
    assert spec.domains == ("docs", "math", "web-zh", "prose")
    assert [round(part.share, 3) for part in spec.parts] == [0.286, 0.143, 0.286, 0.286]
