"""Rows of a batch are independent, or sequences of one length share it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.underived_models import family
from torch import Tensor

from quantkit.build.hidden_states import (
    Stream,
    StreamShape,
    create_target,
    cut_batches,
    move_stream,
    open_stream,
    run_stream,
)
from quantkit.build.open_streams import needs_equal_lengths
from quantkit.contracts import Config, Layout
from quantkit.models import block_trial, full_model, inspect
from quantkit.models.layers import (
    MetaModel,
    load_outer_model,
    make_decoder_layer,
    make_meta_model,
)
from quantkit.models.small_instance import make_random_tensors
from quantkit.models.stored_names import find_stored_names
from quantkit.texts.tokens import Tokens, TokenSequence, pack_tokens

LENGTHS = (100, 100, 24, 9)
LONGROPE = {
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 16, "long_factor": [4.0] * 16},
    "original_max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def longrope() -> tuple[MetaModel, Layout, dict[str, Tensor]]:
    """A small Phi-3 with other rotary factors for texts of more than 64 tokens."""
    config = Config(values=family("phi3", **LONGROPE))
    meta = make_meta_model(config, torch.device("cpu"), torch.float32)
    names, tensors = find_stored_names(meta, make_random_tensors(meta))
    return meta, inspect.inspect_layout(config, meta, names), tensors


def make_text(lengths: tuple[int, ...]) -> Tokens:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 700, (n,), generator=generator).tolist() for n in lengths]
    return pack_tokens([TokenSequence(domain="text", ids=row) for row in ids])


def run_blocks(
    model: tuple[MetaModel, Layout, dict[str, Tensor]], folder: Path, equal_lengths: bool
) -> Stream:
    """Return the stream after the last block, as in a build."""
    meta, layout, tensors = model
    shape = StreamShape(folder=folder, width=128, expert_width=0, equal_lengths=equal_lengths)
    outer = load_outer_model(meta, tensors)
    stream = open_stream("reference", make_text(LENGTHS), None, outer, 768, shape, "float32")
    for block in layout.blocks:
        own = block_trial.select_block_tensors(block, tensors)
        target = create_target(stream, block.name)
        run_stream(meta, make_decoder_layer(meta, block, own), stream, target, None)
        stream = move_stream(stream, target)
    return stream


def compute_differences(
    model: tuple[MetaModel, Layout, dict[str, Tensor]], stream: Stream
) -> list[float]:
    """Return the relative difference of each sequence's logits from transformers' own."""
    meta, layout, tensors = model
    full = full_model.make_model(meta, layout, tensors.__getitem__)
    outer, differences = load_outer_model(meta, tensors), []
    for start, length in zip(stream.tokens.starts, stream.tokens.lengths, strict=True):
        ids = stream.tokens.ids[start : start + length].long()
        with torch.no_grad():
            expected = full(ids[None], use_cache=False).logits[0]
        ours = outer.compute_logits(stream.hidden.read(start, start + length))
        differences.append(float((ours - expected).norm() / expected.norm()))
    return differences


def test_short_text_next_to_a_long_one_keeps_its_rotary_tables(
    longrope: Any, tmp_path: Path
) -> None:
    """Each text gets the factors of its own length, as alone in transformers."""
    stream = run_blocks(longrope, tmp_path, equal_lengths=True)
    assert [batch.lengths for batch in stream.batches] == [(100, 100), (24,), (9,)]
    assert max(compute_differences(longrope, stream)) < 1e-4


def test_padded_batch_changes_a_short_text(longrope: Any, tmp_path: Path) -> None:
    """The reason for the rule: padded to the longest, short texts get the long factors."""
    stream = run_blocks(longrope, tmp_path, equal_lengths=False)
    differences = compute_differences(longrope, stream)
    assert max(differences[:2]) < 1e-4
    assert min(differences[2:]) > 1e-2


@pytest.mark.parametrize(
    ("lengths", "by_layout", "expected"),
    [
        ((100, 24), False, True),
        ((60, 24), False, False),
        ((60, 24), True, True),
        ((), False, False),
    ],
)
def test_rule_follows_texts_and_layout(
    longrope: Any, lengths: tuple[int, ...], by_layout: bool, expected: bool
) -> None:
    """The limit of 64 tokens matters only if texts are on both sides of it."""
    build: Any = SimpleNamespace(
        model=longrope[0],
        plan=SimpleNamespace(layout=SimpleNamespace(equal_lengths=by_layout)),
    )
    assert needs_equal_lengths(build, [make_text(lengths)] if lengths else [None]) is expected


def test_batches_of_equal_lengths() -> None:
    batches = cut_batches((5, 5, 5, 3, 3), limit=10, equal_lengths=True)
    assert [batch.lengths for batch in batches] == [(5, 5), (5,), (3, 3)]
    assert [(batch.first, batch.stop) for batch in batches] == [(0, 10), (10, 15), (15, 21)]
