"""The start of a build: the embedding is stored, and the streams begin with it or continue from
their files.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch

from quantkit.build.block_plan import embedding_read
from quantkit.build.context import BuildContext
from quantkit.build.hidden_states import (
    Stream,
    StreamName,
    open_stream,
    reopen_stream,
    spool_dtype,
)
from quantkit.build.spool import SpoolDtype
from quantkit.texts.tokens import Tokens

Streams = dict[StreamName, Stream]
StreamTexts = Mapping[Literal["calibration", "fidelity", "solutions"], Tokens]


def open_streams(build: BuildContext, texts: StreamTexts, folder: Path) -> Streams:
    """Store the embedding and start the streams with it; or reopen those of an interrupted build.

    A stream runs only for a text that the plan needs.
    """
    has_experts = any(block.experts for block in build.plan.layout.blocks)
    stream_texts = select_texts(build, texts)
    dtypes = stored_dtypes(build, stream_texts, has_experts)
    after: dict[StreamName, Tokens] = dict.fromkeys(("reference", "quantized"), texts["solutions"])
    if build.progress.done:
        width, states = build.plan.layout.embedding.in_features, build.progress.states
        return {
            name: reopen_stream(
                name,
                text,
                after.get(name),
                folder / states[name],
                width,
                has_experts,
                dtypes[name],
            )
            for name, text in stream_texts.items()
        }
    ((name, weight),) = build.reads.take(embedding_read(build.plan)).items()
    build.write_kept(name, weight)
    streams = {
        name: open_stream(name, text, after.get(name), weight, folder, has_experts, dtypes[name])
        for name, text in stream_texts.items()
    }
    build.progress.commit_step(build.writers, {}, streams, folder)
    return streams


def select_texts(build: BuildContext, texts: StreamTexts) -> dict[StreamName, Tokens]:
    """Return the text of each stream that runs."""
    plan, selected = build.plan, dict[StreamName, Tokens]()
    if plan.needs_calibration:
        selected["calibration"] = texts["calibration"]
    if plan.needs_calibration and plan.propagation == "both":
        selected["original"] = texts["calibration"]
    if plan.recipe.fidelity:
        selected |= {"reference": texts["fidelity"], "quantized": texts["fidelity"]}
    return selected


def stored_dtypes(
    build: BuildContext, texts: Mapping[StreamName, Tokens], has_experts: bool
) -> dict[StreamName, SpoolDtype]:
    """Return how each stream's states are stored.

    In float32 with routed experts: slice after slice is added to the states, and rounding in
    between would make them depend on how many slices share a pass.
    """
    if has_experts:
        return dict.fromkeys(texts, "float32")
    calibration, figures = build.calibration_model.dtype, build.model.dtype
    dtypes: dict[StreamName, torch.dtype] = {"calibration": calibration, "original": calibration}
    return {name: spool_dtype(dtypes.get(name, figures)) for name in texts}
