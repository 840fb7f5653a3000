"""An artifact as an ordinary model of unpacked float32 weights: what every reader is compared with."""

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
    """What an artifact says of itself in its manifest: as resolved, with every override of recipe.yaml.

    `read` unpacks a weight by the name it had in the source; `quantized`: modules that are packed.
    """

    checkpoint: Checkpoint
    layout: Layout
    read: full_model.TensorReader
    quantized: frozenset[str]

    @staticmethod
    def open(artifact: Path) -> Stored:
        """Read the artifact's headers and its description."""
        checkpoint = Checkpoint.open(artifact)
        name, schemes = read_schemes(read_manifest(artifact), checkpoint, artifact)
        return Stored(
            checkpoint=checkpoint,
            layout=load_architecture(checkpoint.config).layout(checkpoint.config),
            read=full_model.make_reader(checkpoint, name, schemes),
            quantized=frozenset(schemes),
        )

    def model(self) -> Any:
        """The model of transformers with these weights, in float32."""
        bones = make_meta_model(self.checkpoint.config, torch.device("cpu"), torch.float32)
        return full_model.make_model(bones, self.layout, self.read)
