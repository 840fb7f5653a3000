"""An artifact as an ordinary model of unpacked float32 weights: what every reader is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantkit.contracts import Layout
from quantkit.handover.verify import read_manifest
from quantkit.loading import stored_as
from quantkit.models import whole
from quantkit.models.layers import skeleton
from quantkit.planning.plan import architecture_of
from quantkit.storage.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True)
class Stored:
    """What an artifact says of itself in its manifest: as resolved, with every override of recipe.yaml.

    `read` unpacks a weight by the name it had in the source; `quantized`: modules that are packed.
    """

    checkpoint: Checkpoint
    layout: Layout
    read: whole.Read
    quantized: frozenset[str]

    @staticmethod
    def open(artifact: Path) -> Stored:
        """Read the artifact's headers and its description."""
        checkpoint = Checkpoint.open(artifact)
        name, schemes = stored_as(read_manifest(artifact), checkpoint, artifact)
        return Stored(
            checkpoint=checkpoint,
            layout=architecture_of(checkpoint.config).layout(checkpoint.config),
            read=whole.reader(checkpoint, name, schemes),
            quantized=frozenset(schemes),
        )

    def model(self) -> Any:
        """The model of transformers with these weights, in float32."""
        bones = skeleton(self.checkpoint.config, torch.device("cpu"), torch.float32)
        return whole.model(bones, self.layout, self.read)
