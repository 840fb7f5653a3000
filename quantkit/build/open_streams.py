"""The start of a build: the embedding is stored, and the streams begin with it or continue from
their files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import torch

from quantkit.build.block_plan import embedding_read
from quantkit.build.context import BuildContext
from quantkit.build.hidden_states import (
    Stream,
    StreamName,
    StreamShape,
    open_stream,
    reopen_stream,
    spool_dtype,
)
from quantkit.build.spool import SpoolDtype
from quantkit.models.layers import load_outer_model
from quantkit.texts.tokens import Tokens

Streams = dict[StreamName, Stream]
StreamTexts = Mapping[Literal["calibration", "fidelity", "solutions"], Tokens]


def open_streams(build: BuildContext, texts: StreamTexts, folder: Path) -> Streams:
    """Store the embedding and start the streams with it; or reopen those of an interrupted build.

    A stream runs only for a text that the plan needs.
    """
    stream_texts, layout = select_texts(build, texts), build.plan.layout
    shape = StreamShape(
        folder=folder,
        width=build.model.outer.form.width,
        expert_width=max((x.experts.hidden for x in layout.blocks if x.experts), default=0),
        equal_lengths=needs_equal_lengths(build, (*stream_texts.values(), texts["solutions"])),
    )
    dtypes = stored_dtypes(build, stream_texts, bool(shape.expert_width))
    after: dict[StreamName, Tokens] = dict.fromkeys(("reference", "quantized"), texts["solutions"])
    if build.progress.done:
        states = build.progress.states
        return {
            name: reopen_stream(
                name, text, after.get(name), folder / states[name], shape, dtypes[name]
            )
            for name, text in stream_texts.items()
        }
    tensors = build.reads.take(embedding_read(build.plan))
    weight = f"{layout.embedding.name}.weight"
    build.write_kept(weight, tensors[weight])
    streams: Streams = {}
    if stream_texts:
        named = {layout.get_path(name): tensor for name, tensor in tensors.items()}
        outer = load_outer_model(build.model, named)
        for name, text in stream_texts.items():
            size = len(tensors[weight])
            streams[name] = open_stream(
                name, text, after.get(name), outer, size, shape, dtypes[name]
            )
    build.progress.commit_step(build.writers, {}, streams, folder)
    return streams


def needs_equal_lengths(build: BuildContext, texts: Iterable[Tokens | None]) -> bool:
    """Return whether a batch must hold sequences of one length.

    So it is where the layout says so, and where the shortest sequence would get other rotary
    tables next to the longest one.
    """
    lengths = [length for text in texts if text for length in text.lengths]
    return build.plan.layout.equal_lengths or (
        bool(lengths) and build.model.outer.depends_on_length(min(lengths), max(lengths))
    )


def select_texts(build: BuildContext, texts: StreamTexts) -> dict[StreamName, Tokens]:
    """Return the text of each stream that runs."""
    plan, selected = build.plan, dict[StreamName, Tokens]()
    if plan.needs_calibration:
        selected["calibration"] = texts["calibration"]
    if plan.needs_calibration and plan.propagation == "both":
        selected["original"] = texts["calibration"]
    if plan.recipe.fidelity:
        selected |= {"reference": texts["fidelity"], "quantized": texts["fidelity"]}
    if plan.recipe.fidelity and plan.recipe.fidelity.yardstick:
        selected["yardstick"] = texts["fidelity"]
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
    calibration, figures = build.calibration_model.outer.form.dtype, build.model.outer.form.dtype
    dtypes: dict[StreamName, torch.dtype] = {"calibration": calibration, "original": calibration}
    return {name: spool_dtype(dtypes.get(name, figures)) for name in texts}
