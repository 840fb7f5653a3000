"""Sets of documents: the shipped sets, checks of specs and rows, and token sequences."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from support.paths import ROOT
from support.word_tokenizer import (
    WordTokenizer,
    WordTokenizerWithoutBos,
    WordTokenizerWithUnusedBos,
)
from tools.calibration_sets import __main__ as tool

from quantkit.errors import CalibrationError, CheckpointError, UsageError
from quantkit.texts.corpora import (
    CorpusSet,
    load_set,
    load_tokenizer,
    sample_sequences,
)
from quantkit.texts.corpus_files import TextDocument
from quantkit.texts.corpus_spec import DATA_VARIABLE
from quantkit.texts.proportions import split_proportionally

SETS = ROOT / "calibration"
CHECKPOINT = ROOT / "quantkit/data/models/tiny_v3/checkpoint"
WIKITEXT = ROOT.parent / "shared/data"
SHIPPED = ("tiny-v3", "tiny-v3-heldout")

SPEC = """\
version: 1
name: mine
licence: MIT
origin: written for a test
file: mine.jsonl
sha256: {sha256}
domains: [prose, math]
packing: documents
end: eos
"""
ROWS = b'{"domain": "prose", "text": "one two"}\n{"domain": "math", "text": "1 + 1 = 2"}\n'


def write_set(folder: Path, rows: bytes = ROWS, spec: str = SPEC) -> Path:
    (folder / "mine.jsonl").write_bytes(rows)
    path = folder / "mine.yaml"
    path.write_text(spec.format(sha256=hashlib.sha256(rows).hexdigest()), encoding="utf-8")
    return path


def make_corpus(
    texts: dict[str, list[str]], packing: str = "documents", end: bool = True
) -> CorpusSet:
    return CorpusSet(
        name="made",
        where="made.yaml",
        license="MIT",
        origin="",
        domains=tuple(texts),
        packing=packing,  # type: ignore[arg-type]
        end_of_document=end,
        sha256="",
        documents=tuple(
            TextDocument(domain=domain, text=text)
            for domain, rows in texts.items()
            for text in rows
        ),
    )


# --- shipped sets


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_set_matches_readme_line(name: str) -> None:
    corpus = load_set(name, SETS)
    counts = Counter(document.domain for document in corpus.documents)
    assert corpus.domains == ("prose", "math", "code")
    size = (SETS / f"{name}.jsonl").stat().st_size
    line = next(
        line
        for line in (SETS / "README.md").read_text("utf-8").splitlines()
        if line.startswith(f"| `{name}`")
    )
    assert f"{counts['prose']}, {counts['math']}, {counts['code']}" in line
    assert f"{size:,}" in line
    assert corpus.license.split(" AND ")[0] in line


def test_shipped_sets_stay_small() -> None:
    assert sum(path.stat().st_size for path in SETS.iterdir()) < 250_000


@pytest.mark.parametrize("name", ["tiny-v3", "tiny-v3-heldout"])
def test_tiny_v3_sets_regenerate_byte_for_byte(name: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(tool.main, ["--out", str(tmp_path), "--only", name])
    assert result.exit_code == 0, result.output
    for suffix in ("jsonl", "yaml"):
        assert (tmp_path / f"{name}.{suffix}").read_bytes() == (
            SETS / f"{name}.{suffix}"
        ).read_bytes()


def test_fidelity_text_is_disjoint_from_calibration_text() -> None:
    def collect_pieces(name: str) -> set[str]:
        documents = load_set(name, SETS).documents
        texts = [document.text for document in documents]
        prose = [document.text for document in documents if document.domain == "prose"]
        paragraphs = [part for text in prose for part in text.split("\n\n")]
        return {" ".join(text.split()) for text in (*texts, *paragraphs) if len(text) > 80}

    assert not collect_pieces("tiny-v3") & collect_pieces("tiny-v3-heldout")


def test_tiny_v3_calibration_has_no_benchmark_prompt() -> None:
    prompts = [
        json.loads(line)["prompt"]
        for domain in ("math", "code")
        for line in (ROOT / f"evals/data/tiny-v3-{domain}.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()
    ]
    assert len(prompts) == 400
    texts = [document.text for document in load_set("tiny-v3", SETS).documents]
    assert not [prompt for prompt in prompts if any(text.startswith(prompt) for text in texts)]


# --- tokens


def test_tiny_v3_documents_have_one_bos_and_end_with_eos() -> None:
    tokenizer = load_tokenizer(CHECKPOINT)
    tokens = sample_sequences(load_set("tiny-v3", SETS), tokenizer, None, 512, 0)
    assert (tokens.n_sequences, tokens.n_tokens) == (900, 49_697)
    for index in range(tokens.n_sequences):
        ids = tokens.sequence(index).tolist()
        assert (ids[0], ids[-1], ids.count(0), ids.count(1)) == (0, 1, 1, 1)
    held_out = sample_sequences(load_set("tiny-v3-heldout", SETS), tokenizer, None, 512, 0)
    assert (held_out.n_sequences, held_out.n_tokens) == (250, 13_150)
    assert Counter(held_out.domains) == {"prose": 72, "math": 108, "code": 70}


def test_tokens_are_flat_ragged_and_hashed() -> None:
    corpus = make_corpus({"prose": ["aa b", "ccc"], "math": ["d e f g"]})
    tokens = sample_sequences(corpus, WordTokenizer(), None, 5, 0)
    assert tokens.ids.tolist() == [
        1,
        12,
        11,
        2,
        1,
        13,
        2,
        1,
        11,
        11,
        11,
        11,
    ]  # the last sequence is cut before its EOS
    assert str(tokens.ids.dtype) == "torch.int32"
    assert (tokens.starts, tokens.lengths) == ((0, 4, 7), (4, 3, 5))
    assert tokens.domains == ("prose", "prose", "math")
    raw = struct.pack("<12i", *tokens.ids.tolist()) + struct.pack("<3q", *tokens.starts)
    assert tokens.hash == hashlib.sha256(raw).hexdigest()


def test_sequences_omit_absent_eos_and_bos() -> None:
    corpus = make_corpus({"prose": ["aa b"]}, end=False)
    assert sample_sequences(corpus, WordTokenizer(), None, 9, 0).ids.tolist() == [1, 12, 11]
    assert sample_sequences(corpus, WordTokenizerWithoutBos(), None, 9, 0).ids.tolist() == [12, 11]
    assert sample_sequences(corpus, WordTokenizerWithUnusedBos(), None, 9, 0).ids.tolist() == [
        12,
        11,
    ]


def test_windows_are_full_disjoint_and_start_with_bos() -> None:
    corpus = make_corpus(
        {"prose": ["a bb", "ccc dddd eeeee", "ffffff ggggggg"]}, packing="windows", end=False
    )
    tokens = sample_sequences(corpus, WordTokenizer(), None, 4, 0)
    assert tokens.ids.tolist() == [
        1,
        11,
        12,
        13,
        1,
        14,
        15,
        16,
    ]  # the seventh word does not fill a window
    assert sample_sequences(corpus, WordTokenizerWithoutBos(), None, 3, 0).ids.tolist() == [
        11,
        12,
        13,
        14,
        15,
        16,
    ]


def test_sampling_follows_seed_and_proportions() -> None:
    texts = {
        "prose": [f"p{'x' * n}" for n in range(60)],
        "math": [f"m{'x' * n}" for n in range(30)],
        "code": ["c"],
    }
    corpus = make_corpus(texts)
    first = sample_sequences(corpus, WordTokenizer(), 30, 8, seed=1)
    assert Counter(first.domains) == {"prose": 19, "math": 10, "code": 1}
    assert first.hash == sample_sequences(corpus, WordTokenizer(), 30, 8, seed=1).hash
    assert first.hash != sample_sequences(corpus, WordTokenizer(), 30, 8, seed=2).hash
    assert len(set(first.domains[:10])) > 1  # mixed, not domain by domain


@given(st.dictionaries(st.sampled_from("abc"), st.integers(0, 50), min_size=1), st.data())
def test_proportional_shares_sum_to_total(available: dict[str, int], data: st.DataObject) -> None:
    total = data.draw(st.integers(0, sum(available.values())))
    if sum(available.values()) == 0:
        return
    shares = split_proportionally(available, total)
    assert sum(shares.values()) == total
    assert all(0 <= shares[name] <= count for name, count in available.items())
    if total >= len(available):
        assert all(shares[name] >= min(count, 1) for name, count in available.items())


@pytest.mark.parametrize(
    ("packing", "sequences", "length", "message"),
    [
        (
            "documents",
            4,
            8,
            r"^made.yaml: expected 4 sequences, found 3 documents \(prose 2, math 1\). Ask for 3",
        ),
        (
            "windows",
            2,
            3,
            r"^made.yaml: expected 2 sequences, found 1 windows of 3 tokens \(prose 1, math 0\). "
            r"Ask for 1",
        ),
        (
            "windows",
            None,
            9,
            r"^made.yaml: expected 1 sequences, found 0 windows of 9 tokens .* Lower `length`",
        ),
        (
            "documents",
            0,
            8,
            r"^made.yaml: expected at least 1 sequence of at least 2 tokens, found 0 of 8",
        ),
        (
            "documents",
            None,
            1,
            r"^made.yaml: expected at least 1 sequence of at least 2 tokens, found None of 1",
        ),
    ],
)
def test_too_few_sequences_raise(
    packing: str, sequences: int | None, length: int, message: str
) -> None:
    corpus = make_corpus({"prose": ["a b", "c"], "math": ["d"]}, packing=packing, end=False)
    with pytest.raises(UsageError, match=message):
        sample_sequences(corpus, WordTokenizer(), sequences, length, 0)


def test_unloadable_tokenizer_raises(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path}: expected a tokenizer")):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast"}', encoding="utf-8"
    )
    with pytest.raises(CheckpointError, match=r"/tokenizer\.json: expected JSON, found an error"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"found: .*Copy tokenizer\.json"):
        load_tokenizer(tmp_path)


# --- specs


def test_set_loads_by_path(tmp_path: Path) -> None:
    corpus = load_set(str(write_set(tmp_path)), SETS)
    assert (corpus.name, corpus.license, corpus.end_of_document) == ("mine", "MIT", True)
    assert [document.text for document in corpus.documents] == ["one two", "1 + 1 = 2"]
    assert corpus.sha256 == hashlib.sha256(ROWS).hexdigest()


def test_unknown_set_names_raise(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"no set of documents named 'tiny-v4'\. Did you mean 'tiny-v3'\?"
    ):
        load_set("tiny-v4", SETS)
    with pytest.raises(UsageError, match=r"no set of documents named '\.\./absent'"):
        load_set("../absent", SETS)
    with pytest.raises(
        UsageError, match=r"absent\.yaml: expected the spec of a set, found no such file"
    ):
        load_set(str(tmp_path / "absent.yaml"), SETS)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "licence: MIT",
            "license: MIT",
            "mine.yaml:3: license: unknown key. Did you mean 'licence'?",
        ),
        ("licence: MIT\n", "", "mine.yaml:1: licence: missing; this key has no default"),
        (
            "version: 1",
            "version: 3",
            "mine.yaml:1: version: expected 1, or 2 for a mixture, found 3",
        ),
        (
            "[prose, math]",
            "[prose, poetry]",
            "mine.yaml:7: domains[1]: expected prose, math or code, found 'poetry'",
        ),
        ("[prose, math]", "prose", "mine.yaml:7: domains: expected a list, found 'prose'"),
        ("documents", "rows", "mine.yaml:8: packing: expected documents or windows, found 'rows'"),
        (
            "documents",
            "windows",
            "mine.yaml:9: end: expected none with `packing: windows`, found eos",
        ),
        ("{sha256}", "abc", "mine.yaml:6: sha256: expected 64 hexadecimal digits, found 'abc'"),
        ("file: mine.jsonl", "file: other.jsonl", "other.jsonl, found no such file"),
        (
            "end: eos",
            "local: {{file: x, sha256: {sha256}}}",
            "mine.yaml:9: local: expected a `datasets` entry",
        ),
        ("[prose, math]", "[prose, prose]", "mine.yaml:7: domains: prose: listed twice"),
        ("[prose, math]", "[]", "mine.yaml:7: domains: expected one entry or more, found an empty"),
        (
            "end: eos",
            "local: {{file: x, sha256: y}}",
            "local.sha256: expected 64 hexadecimal digits",
        ),
        ("file: mine.jsonl\n", "", "mine.yaml:1: file: expected either `file` or `datasets`"),
        ("sha256: {sha256}\n", "", "mine.yaml:1: sha256: expected the sha256 of `file`"),
        ("origin: written", "origin: " + "x" * 2000, "origin: expected text of at most 2,000"),
        (
            "end: eos",
            "datasets: {{path: a/b, name: b, split: c, revision: d, column: e, domain: code}}",
            "mine.yaml:5: file: expected either `file` or `datasets`, found both",
        ),
        (
            "file: mine.jsonl\nsha256: {sha256}",
            "datasets: {{path: a/b, name: b, split: c, revision: d, column: e, domain: code}}",
            "mine.yaml:5: datasets.domain: expected the one domain of the set, found 'code'",
        ),
        (
            "file: mine.jsonl\nsha256: {sha256}",
            "datasets: {{path: json, name: b, split: c, revision: d, column: e, domain: prose}}",
            "mine.yaml:5: datasets.path: expected OWNER/NAME of a dataset on the hub",
        ),
        ("file: mine.jsonl", "file: /etc/passwd", "file: expected a path below the folder"),
        ("file: mine.jsonl", "file: ../mine.jsonl", "file: expected a path below the folder"),
        ("end: eos", "datasets: 3", "mine.yaml:9: datasets: expected the keys path, name"),
        ("[prose, math]", "[prose, math, code]", "found none of code"),
        ("[prose, math]", "[prose", "mine.yaml:8: not valid YAML: "),
        (
            "version: 1\n",
            "version: 1\nversion: 1\n",
            "mine.yaml:2: version: written twice, first in line 1",
        ),
    ],
)
def test_spec_faults_name_line_and_key(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(CalibrationError, match=re.escape(message)):
        load_set(str(write_set(tmp_path, spec=SPEC.replace(old, new))), SETS)


def test_all_spec_faults_are_reported(tmp_path: Path) -> None:
    spec = SPEC.replace("licence", "license").replace("version: 1", "version: 0")
    with pytest.raises(CalibrationError) as caught:
        load_set(str(write_set(tmp_path, spec=spec)), SETS)
    assert len(str(caught.value).splitlines()) == 3  # unknown key, missing key, version


def test_spec_must_be_utf8_mapping(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"- 1\n")
    with pytest.raises(
        CalibrationError,
        match=r"mine\.yaml:1: expected a mapping of keys \(version: 1, \.\.\.\), found a list",
    ):
        load_set(str(path), SETS)
    path.write_bytes(b"name: \xff\n")
    with pytest.raises(CalibrationError, match=r"mine\.yaml: expected UTF-8, found byte 0xff"):
        load_set(str(path), SETS)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (b"\xef\xbb\xbf" + ROWS, "mine.jsonl:1: expected UTF-8 without a byte order mark"),
        (
            ROWS.replace(b"\n", b"\r\n"),
            "mine.jsonl:1: expected the line to end with LF, found CRLF",
        ),
        (
            ROWS.replace(b"two", b"tw\xff"),
            "mine.jsonl:1: expected UTF-8, found byte 0xff at column 36",
        ),
        (ROWS + b"{\n", "mine.jsonl:3: expected one JSON object, found: "),
        (ROWS + b"\n" + ROWS, "mine.jsonl:3: expected one JSON object, found: "),
        (ROWS + b"3\n", "mine.jsonl:3: expected the keys domain and text and no other, found int"),
        (
            b"[" * 100_000 + b"\n" + ROWS,
            "mine.jsonl:1: expected one JSON object, found deeply nested brackets",
        ),
        (
            ROWS.replace(b'"text"', b'"txt"', 1),
            "expected the keys domain and text and no other, found 'domain', 'txt'",
        ),
        (
            ROWS.replace(b"math", b"code"),
            "mine.jsonl:2: domain: expected prose or math, found 'code'",
        ),
        (ROWS.replace(b'"one two"', b'" "'), "mine.jsonl:1: text: expected text, found ' '"),
        (b"", "mine.jsonl:1: expected at least one row, found an empty file"),
    ],
)
def test_row_faults_name_line(tmp_path: Path, rows: bytes, message: str) -> None:
    with pytest.raises(CalibrationError, match=re.escape(message)):
        load_set(str(write_set(tmp_path, rows)), SETS)


def test_fault_list_is_truncated(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError) as caught:
        load_set(str(write_set(tmp_path, b"{\n" * 50)), SETS)
    lines = str(caught.value).splitlines()
    assert (len(lines), lines[-1]) == (9, "and 42 more faults")


def test_wrong_sha256_raises(tmp_path: Path) -> None:
    path = write_set(tmp_path)
    (tmp_path / "mine.jsonl").write_bytes(ROWS.replace(b"one", b"two"))
    with pytest.raises(
        CalibrationError, match=r"mine\.jsonl: expected sha256 [0-9a-f]{64} .*Restore the file"
    ):
        load_set(str(path), SETS)


# --- hub


def test_local_file_equals_hub_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    raw = " \n = Title = \n \n Some text . \n"
    rows = ["", " = Title = \n", "", " Some text . \n"]
    calls: list[tuple[object, ...]] = []

    def load_dataset(path: str, name: str, split: str, revision: str) -> dict[str, list[str]]:
        calls.append((path, name, split, revision))
        return {"text": rows}

    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    spec = (SETS / "wikitext.yaml").read_text(encoding="utf-8")
    spec = re.sub(r"sha256: \w+", f"sha256: {hashlib.sha256(raw.encode()).hexdigest()}", spec)
    (tmp_path / "mine.yaml").write_text(spec, encoding="utf-8")
    from_hub = load_set(str(tmp_path / "mine.yaml"), SETS)
    (tmp_path / "wikitext-2").mkdir()
    (tmp_path / "wikitext-2/wiki.test.raw").write_bytes(raw.encode())
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    local = load_set(str(tmp_path / "mine.yaml"), SETS)
    assert calls == [
        (
            "Salesforce/wikitext",
            "wikitext-2-raw-v1",
            "test",
            "b08601e04326c79dfdd32d625aee71d232d685c3",
        )
    ]
    assert from_hub == local
    assert local.packing == "windows"
    (tmp_path / "wikitext-2/wiki.test.raw").write_bytes(b"changed")
    with pytest.raises(CalibrationError, match=r"wiki\.test\.raw: expected sha256"):
        load_set(str(tmp_path / "mine.yaml"), SETS)


@pytest.mark.parametrize(
    "fault",
    [ConnectionError("Couldn't reach it\nmore"), ValueError("unknown split"), KeyError("t")],
)
def test_unreachable_hub_names_alternatives(
    monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    import datasets

    def load_dataset(path: str, name: str, split: str, revision: str) -> object:
        raise fault

    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(CalibrationError) as caught:
        load_set("wikitext", SETS)
    message = str(caught.value)
    assert "\n" not in message
    assert (
        "expected Salesforce/wikitext wikitext-2-raw-v1 test at b08601e04326 from the hub, found: "
        in message
    )
    assert "set QUANTKIT_DATA to a folder that holds wikitext-2/wiki.test.raw" in message


@pytest.mark.skipif(
    not (WIKITEXT / "wikitext-2").is_dir(), reason="WikiText is not on this machine"
)
def test_wikitext_loads_from_local_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DATA_VARIABLE, str(WIKITEXT))
    corpus = load_set("wikitext", SETS)
    assert len(corpus.documents) == 4358
    assert corpus.license == "CC-BY-SA-3.0"


def test_hub_dataset_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(path: str, name: str, split: str, revision: str) -> object:
        return {"text": iter(["a" * 100] * 1000)}

    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("quantkit.texts.corpus_files.MAX_BYTES", 1000)
    with pytest.raises(
        CalibrationError, match="expected at most 1,000 characters of text in Sales"
    ):
        load_set("wikitext", SETS)


def test_folder_without_tokenizer_files_is_refused(tmp_path: Path) -> None:
    """transformers makes an empty tokenizer of config.json alone."""
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(CheckpointError, match=r"found: it has no tokens\. Copy tokenizer\.json"):
        load_tokenizer(tmp_path)
