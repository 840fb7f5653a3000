"""The text of the real model's figures: wikitext-2, cut as every tool gets it, as two sets that quantkit reads.

Calibration: 32 passages of 512 tokens, spread evenly over the valid text. Fidelity: the first 40 windows of 512 tokens
of the test text, none overlapping, no BOS. Both in the tokenized form ("@-@", "<unk>"), as pytorch/examples carries it
in word_language_model/data/wikitext-2 (CC BY-SA 3.0; not part of this project). Where a machine has the test text in
its raw form alone, that is taken and said: figures of the two forms are not comparable.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

SEQUENCES, WINDOWS, LENGTH = 32, 40, 512
MARGIN = 64
"""Tokens that a passage has beyond what is used of it: those at its end may be cut otherwise than in the whole text."""

VALID = ("valid.tokenized.txt", "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8")
TEST = {
    "tokenized": (
        "test.tokenized.txt",
        "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
    ),
    "raw": ("wiki.test.raw", "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"),
}
SPEC = """version: 1
name: {name}
licence: CC-BY-SA-3.0
origin: wikitext-2, {file}
file: {name}.jsonl
sha256: {sha256}
domains: [prose]
packing: {packing}
"""


class Offsets(Protocol):
    """What is used of a transformers tokenizer."""

    def __call__(
        self, text: str, *, add_special_tokens: bool, return_offsets_mapping: bool, verbose: bool
    ) -> dict[str, list[tuple[int, int]]]: ...


@dataclass(frozen=True, kw_only=True)
class Sets:
    """Paths of the two specs, and the form of the test text."""

    calibration: Path
    fidelity: Path
    form: str


def find_wikitext() -> Path | None:
    """The folder with wikitext-2, if this machine has one: in QUANTKIT_DATA, or in data shared beside the checkout."""
    places = [Path(__file__).parents[4] / "shared" / "data" / "wikitext-2"]
    if named := os.environ.get("QUANTKIT_DATA"):
        places.insert(0, Path(named) / "wikitext-2")
    files = [name for name, _ in TEST.values()]
    return next(
        (
            p
            for p in places
            if (p / VALID[0]).is_file() and any((p / name).is_file() for name in files)
        ),
        None,
    )


def write_sets(data: Path, tokenizer: Offsets, place: Path) -> Sets:
    """Cut both texts and write two sets, spec and rows, into `place`."""
    form = next(name for name, (file, _) in TEST.items() if (data / file).is_file())
    valid, test = read_text(data, *VALID), read_text(data, *TEST[form])
    passages = cut_passages(valid, tokenizer, SEQUENCES, LENGTH)
    return Sets(
        calibration=write_set(place, "wikitext-valid", VALID[0], "documents", passages),
        fidelity=write_set(
            place,
            "wikitext-test",
            TEST[form][0],
            "windows",
            [cut_windows(test, tokenizer, WINDOWS, LENGTH)],
        ),
        form=form,
    )


def read_text(folder: Path, file: str, sha256: str) -> str:
    """A text whose bytes are the expected ones."""
    data = (folder / file).read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise SystemExit(
            f"{folder / file}: expected sha256 {sha256}, found {found}. Restore the file"
        )
    return data.decode("utf-8")


def cut_passages(text: str, tokenizer: Offsets, count: int, length: int) -> list[str]:
    """`count` passages of a little more than `length` tokens, each from the line at its even share of the text."""
    passages = []
    for index in range(count):
        place = index * len(text) // count
        begin = 0 if place == 0 else text.index("\n", place) + 1
        passages.append(cut_windows(text[begin:], tokenizer, 1, length))
    return passages


def cut_windows(text: str, tokenizer: Offsets, windows: int, length: int) -> str:
    """The beginning of a text that holds so many windows of `length` tokens, and not one more."""
    needed = windows * length + MARGIN
    head = text[: 16 * needed]
    offsets = tokenizer(head, add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
        "offset_mapping"
    ]
    if len(offsets) <= needed:
        raise SystemExit(
            f"expected a text of more than {needed} tokens, found {len(offsets)}. Use the whole of wikitext-2"
        )
    return head[: offsets[needed][0]]


def write_set(place: Path, name: str, file: str, packing: str, texts: list[str]) -> Path:
    """Rows and spec of a set; the spec's path."""
    rows = "".join(json.dumps({"domain": "prose", "text": text}) + "\n" for text in texts).encode()
    (place / f"{name}.jsonl").write_bytes(rows)
    spec = SPEC.format(
        name=name, file=file, sha256=hashlib.sha256(rows).hexdigest(), packing=packing
    )
    (place / f"{name}.yaml").write_text(spec, encoding="utf-8")
    return place / f"{name}.yaml"
