"""An artifact as an ordinary model of float32 weights: the reference for every reader."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantkit.artifact.load_model import read_schemes
from quantkit.artifact.read_manifest import read_manifest
from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.contracts import Layout
from quantkit.models import full_model
from quantkit.models.layers import make_meta_model
from quantkit.plan.plan import load_architecture


@dataclass(frozen=True, kw_only=True)
class Stored:
    """An artifact opened by its manifest.

    `read` unpacks a weight by its name in the source; `quantized`: the packed modules.
    """

    checkpoint: Checkpoint
    layout: Layout
    read: full_model.TensorReader
    quantized: frozenset[str]

    @staticmethod
    def open(artifact: Path) -> Stored:
        """Read the artifact's headers and its manifest."""
        checkpoint = Checkpoint.open(artifact)
        name, schemes = read_schemes(read_manifest(artifact), checkpoint, artifact)
        return Stored(
            checkpoint=checkpoint,
            layout=load_architecture(checkpoint.config).layout(checkpoint.config),
            read=full_model.make_reader(checkpoint, name, schemes),
            quantized=frozenset(schemes),
        )

    def model(self) -> Any:
        """Return the transformers model with these weights, in float32."""
        meta = make_meta_model(self.checkpoint.config, torch.device("cpu"), torch.float32)
        return full_model.make_model(meta, self.layout, self.read)
