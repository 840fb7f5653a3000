"""An artifact as an ordinary model of unpacked float32 weights: what every reader is compared with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantkit import registry, whole
from quantkit.contracts import Layout, Scheme
from quantkit.layers import skeleton
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
        manifest = json.loads((artifact / "quantkit" / "manifest.json").read_text(encoding="utf-8"))
        schemes = {module: Scheme(**told["scheme"]) for module, told in manifest["modules"].items()}
        entry = manifest["quantization_config"] or {"quant_method": "dense"}
        checkpoint = Checkpoint.open(artifact)
        return Stored(
            checkpoint=checkpoint,
            layout=registry.architecture(checkpoint.config.text("model_type")).layout(checkpoint.config),
            read=whole.reader(checkpoint, entry["quant_method"].replace("-", "_"), schemes),
            quantized=frozenset(schemes),
        )

    def model(self) -> Any:
        """The model of transformers with these weights, in float32."""
        bones = skeleton(self.checkpoint.config, torch.device("cpu"), torch.float32)
        return whole.model(bones, self.layout, self.read)
