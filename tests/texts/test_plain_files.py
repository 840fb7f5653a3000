"""A text file as a calibration set: chats, text columns, plain text, and errors."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as arrow
import pytest
from pyarrow import parquet
from support.paths import ROOT
from support.word_tokenizer import WordTokenizer

from quantkit.errors import CalibrationError, UsageError
from quantkit.texts.corpora import CorpusSet, describe_left_out, load_set, sample_sequences
from quantkit.texts.text_rows import PROBED_BYTES

SETS = ROOT / "calibration"


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def load(name: Path | str) -> CorpusSet:
    return load_set(str(name), SETS)


def chat(question: str, answer: object) -> list[dict[str, object]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def test_text_column_of_json_lines_is_cut_into_windows(tmp_path: Path) -> None:
    corpus = load(write_rows(tmp_path / "a.jsonl", [{"text": "one two three"}, {"text": ""}] * 9))
    tokens = sample_sequences(corpus, WordTokenizer(), None, 5, 0)
    assert set(tokens.lengths) == {5} and set(tokens.domains) == {"text"}
    assert corpus.license == "not stated" and corpus.origin == "a.jsonl"
    assert describe_left_out(corpus, tokens, WordTokenizer()) == (
        "a.jsonl: part text: 9 rows without text are skipped",
    )


def test_prompts_count_on_request(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"messages": chat("a b c", "d e")}] * 4)
    counts = {}
    for query in ("", "?count=all"):
        tokens = sample_sequences(load(f"{path}{query}"), WordTokenizer(), 1, 8, 0)
        counts[query] = tokens.select([0])[0].n_counted
    assert counts == {"": 2, "?count=all": 5}


def test_named_column_is_read(tmp_path: Path) -> None:
    rows = [{"id": 1, "dialogue": chat("a", "b"), "note": "x y z"}] * 3
    path = write_rows(tmp_path / "a.jsonl", rows)
    assert load(f"{path}?column=dialogue").parts[0].spec.messages == "dialogue"
    assert load(f"{path}?column=note").parts[0].texts == ("x y z",) * 3


def test_parquet_plain_text_and_folders_are_sets(tmp_path: Path) -> None:
    parquet.write_table(arrow.table({"text": ["a b", "c"]}), tmp_path / "a.parquet")
    assert load(tmp_path / "a.parquet").parts[0].texts == ("a b", "c")
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "b.txt").write_text("d e\n\nf")
    assert load(folder / "b.txt").parts[0].texts == ("d e", "f")
    assert load(folder).parts[0].texts == ("d e", "f")


def test_content_in_parts_is_joined(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "d "}, {"type": "text", "text": "e"}]
    path = write_rows(tmp_path / "a.jsonl", [{"messages": chat("a", parts)}])
    assert load(path).parts[0].chats[0].messages[1]["content"] == parts
    tokens = sample_sequences(load(f"{path}?count=all"), WordTokenizer(), 1, 3, 0)
    assert tokens.lengths == (3,)
    image = [{"type": "image_url", "image_url": "x"}]
    path = write_rows(tmp_path / "b.jsonl", [{"messages": chat("a", image)}])
    with pytest.raises(CalibrationError, match="row 1: messages: message 2: expected content"):
        load(path)


@pytest.mark.parametrize(
    ("rows", "query", "message"),
    [
        (
            [{"prompt": "a", "n": 1}],
            "",
            r"expected a column messages, .* found 'prompt', 'n'\. Name",
        ),
        ([{"n": 1}], "?column=n", r"n: expected text or a list of messages, found 1"),
        ([{"text": "a"}, {"text": 3}], "", r"row 2: text: expected text, found 3"),
        ([{"text": None}], "", r"expected a column"),
        ([{"text": "a"}, {"text": chat("a", "b")}], "", r"Use `messages: text` with `packing: ch"),
        ([{"messages": [{"role": "user", "content": "a"}]}], "", r"expected answers, found 1 rows"),
    ],
)
def test_cells_of_another_kind_are_refused(
    rows: list[dict[str, object]], query: str, message: str, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "a.jsonl", rows)
    with pytest.raises(CalibrationError, match=message):
        load(f"{path}{query}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.jsonl", "absent.jsonl: expected a text file, found no such file"),
        (
            "a.jsonl?colum=x",
            r"expected column, count, refused after the question mark, found 'colum'",
        ),
        ("a.jsonl?count=none", r"count: expected answers or all, found 'none'"),
        ("a.jsonl?refused=no", r"refused: expected stop or skip, found 'no'"),
    ],
)
def test_paths_and_queries_that_are_none_are_refused(
    name: str, message: str, tmp_path: Path
) -> None:
    write_rows(tmp_path / "a.jsonl", [{"text": "a"}])
    with pytest.raises(UsageError, match=message):
        load(tmp_path / name)


def test_columns_of_a_large_file_are_found_in_its_first_bytes(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"text": "word " * 1000}] * (PROBED_BYTES // 5000 + 10)
    assert load(write_rows(tmp_path / "a.jsonl", rows)).parts[0].texts


class TwoFront(WordTokenizer):
    """Puts two tokens in front, as ChatGLM's does, and defines no BOS."""

    bos_token_id = None

    def __call__(
        self, text: list[str], *, add_special_tokens: bool, verbose: bool
    ) -> dict[str, list[list[int]]]:
        front = [7, 8] if add_special_tokens else []
        return {"input_ids": [front + encode_words(line) for line in text]}


def encode_words(line: str) -> list[int]:
    """Return 7, 8 for the rendered start of a text, and the length of other words."""
    return [n for word in line.split() for n in ([7, 8] if word == "<sop>" else [len(word) + 10])]


def test_several_tokens_in_front_are_kept_and_not_doubled(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "version: 2\nname: a\nparts:\n  - {name: a, kind: prose, licence: MIT, file: a.jsonl, "
        "packing: documents, end: eos}\n"
    )
    write_rows(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "<sop> a"}])
    tokens = sample_sequences(load(tmp_path / "a.yaml"), TwoFront(), None, 4, 0)
    assert {tuple(row.ids) for row in tokens.select(range(tokens.n_sequences))} == {(7, 8, 11, 2)}


class SilentWords(WordTokenizer):
    adds_bos = False


def test_short_documents_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "version: 2\nname: a\nparts:\n  - {name: a, kind: prose, licence: MIT, file: a.jsonl, "
        "packing: documents}\n"
    )
    write_rows(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "a b"}, {"text": "c d"}])
    corpus = load(tmp_path / "a.yaml")
    tokens = sample_sequences(corpus, SilentWords(), 1, 4, 0)
    assert describe_left_out(corpus, tokens, SilentWords()) == (
        "a: part a: 1 documents of fewer than two tokens are left out: they predict no token",
    )
