"""Texts of the real-model benchmarks: wikitext-2 as a calibration and a fidelity set of quantkit.

Calibration: 32 passages of 512 tokens, evenly spaced in the valid text. Fidelity: the first 40
windows of 512 tokens of the test text, not overlapping, no BOS. Both use the tokenized form ("@-@",
"<unk>") of pytorch/examples, word_language_model/data/wikitext-2 (CC BY-SA 3.0; not part of this
project). If a machine has the test text only in its raw form, that form is used and reported:
figures of the two forms are not comparable.
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
"""Extra tokens at the end of a passage: the last tokens may differ from those of the whole text."""

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


class OffsetTokenizer(Protocol):
    """The interface used of a transformers tokenizer."""

    def __call__(
        self, text: str, *, add_special_tokens: bool, return_offsets_mapping: bool, verbose: bool
    ) -> dict[str, list[tuple[int, int]]]: ...


@dataclass(frozen=True, kw_only=True)
class Sets:
    """Paths of the two set files, and the form of the test text."""

    calibration: Path
    fidelity: Path
    form: str


def find_wikitext() -> Path | None:
    """Return the folder of wikitext-2 in QUANTKIT_DATA or next to the checkout, or None."""
    folders = [Path(__file__).parents[4] / "shared" / "data" / "wikitext-2"]
    if data := os.environ.get("QUANTKIT_DATA"):
        folders.insert(0, Path(data) / "wikitext-2")
    files = [name for name, _ in TEST.values()]
    return next(
        (
            p
            for p in folders
            if (p / VALID[0]).is_file() and any((p / name).is_file() for name in files)
        ),
        None,
    )


def write_sets(data: Path, tokenizer: OffsetTokenizer, place: Path) -> Sets:
    """Cut both texts and write the two sets, spec and rows, to `place`."""
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
    """Read a text and check its hash. Raises SystemExit if it differs."""
    data = (folder / file).read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != sha256:
        raise SystemExit(
            f"{folder / file}: expected sha256 {sha256}, found {digest}. Restore the file"
        )
    return data.decode("utf-8")


def cut_passages(text: str, tokenizer: OffsetTokenizer, count: int, length: int) -> list[str]:
    """Cut `count` passages of slightly more than `length` tokens, starting at evenly spaced
    lines.
    """
    passages = []
    for index in range(count):
        target = index * len(text) // count
        begin = 0 if target == 0 else text.index("\n", target) + 1
        passages.append(cut_windows(text[begin:], tokenizer, 1, length))
    return passages


def cut_windows(text: str, tokenizer: OffsetTokenizer, windows: int, length: int) -> str:
    """Return the start of a text that holds exactly `windows` windows of `length` tokens."""
    needed = windows * length + MARGIN
    head = text[: 16 * needed]
    offsets = tokenizer(head, add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
        "offset_mapping"
    ]
    if len(offsets) <= needed:
        raise SystemExit(
            f"expected a text of more than {needed} tokens, found {len(offsets)}. Use all of "
            "wikitext-2"
        )
    return head[: offsets[needed][0]]


def write_set(place: Path, name: str, file: str, packing: str, texts: list[str]) -> Path:
    """Write rows and spec of a set. Return the spec's path."""
    rows = "".join(json.dumps({"domain": "prose", "text": text}) + "\n" for text in texts).encode()
    (place / f"{name}.jsonl").write_bytes(rows)
    spec = SPEC.format(
        name=name, file=file, sha256=hashlib.sha256(rows).hexdigest(), packing=packing
    )
    (place / f"{name}.yaml").write_text(spec, encoding="utf-8")
    return place / f"{name}.yaml"
