"""The shipped mixtures read data sets in the hub's layout, as streams: stand-ins on this disk.

A stand-in has the configurations, splits and columns that the spec names, and a model card with
`configs`, as the data sets of the hub have. `datasets` itself reads it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow as arrow
import pytest
import yaml
from pyarrow import parquet
from support.paths import ROOT

from quantkit.io import package_data
from quantkit.report.make import summarize_text
from quantkit.texts.corpora import load_set, load_tokenizer, sample_sequences
from quantkit.texts.corpus_spec import read_spec
from quantkit.texts.mixture_spec import PartSpec, list_template_columns

SETS = ROOT / "calibration"
WORDS = "the cat sat on a mat and said nothing at all to any of us "
ROWS = 60


def make_rows(part: PartSpec) -> list[dict[str, Any]]:
    """Return rows with the columns of a part, and one column that no spec names."""
    text = f"{part.label} " + WORDS * 20
    if part.messages is not None:
        chat = [{"role": "user", "content": WORDS}, {"role": "assistant", "content": text}]
        return [{part.messages: chat, "id": n} for n in range(ROWS)]
    return [
        {**dict.fromkeys(list_template_columns(part.template), text), "id": n} for n in range(ROWS)
    ]


def write_stand_ins(folder: Path, parts: tuple[PartSpec, ...]) -> None:
    """Write the data sets of the parts: Parquet files and a card with their configurations."""
    configs = dict[str, dict[str, list[dict[str, str]]]]()
    for part in parts:
        if part.hub is None:
            continue
        name = part.hub.name or "default"
        path = folder / part.hub.path / name / f"{part.hub.split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(arrow.Table.from_pylist(make_rows(part)), path)
        files = configs.setdefault(part.hub.path, {}).setdefault(name, [])
        files.append({"split": part.hub.split, "path": f"{name}/{path.name}"})
    for dataset, names in configs.items():
        card = [{"config_name": name, "data_files": files} for name, files in names.items()]
        text = f"---\n{yaml.safe_dump({'configs': card})}---\n"
        (folder / dataset / "README.md").write_text(text, encoding="utf-8")


@pytest.mark.parametrize("name", ["everyday", "everyday-heldout"])
def test_shipped_mixture_is_read_as_a_stream(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = read_spec(name, SETS)
    write_stand_ins(tmp_path, spec.parts)
    calls, load = list[Mapping[str, Any]](), datasets.load_dataset

    def load_stand_in(path: str, name: str | None, **options: Any) -> Any:
        calls.append({"path": path, **options})
        del options["revision"]  # a folder has none
        return load(str(tmp_path / path), name, **options)

    monkeypatch.setattr(datasets, "load_dataset", load_stand_in)
    corpus = load_set(name, SETS)
    assert all(call["streaming"] and len(call["revision"]) == 40 for call in calls)
    assert len(calls) == sum(part.hub is not None for part in spec.parts)

    tokenizer = load_tokenizer(package_data.locate_model("builtin:tiny-v3"))
    tokens = sample_sequences(corpus, tokenizer, 40, 128, 0)
    summary = summarize_text(corpus, tokens, 128, 0, has_template=False)
    assert {part.name for part in summary.parts} == {part.name for part in spec.parts}
    assert set(summary.kinds) == {label for part in spec.parts for label in part.labels}
    shares = Counter({part.name: part.share for part in spec.parts})
    counted = {part.name: part.answers or part.tokens for part in summary.parts}
    total = sum(counted.values())
    assert all(abs(counted[part] / total - share) < 0.04 for part, share in shares.items())
