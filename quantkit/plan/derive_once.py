"""The derived architecture of the last model: deriving one takes seconds.

One command needs it several times: to choose a recipe, to see whether the model can sample its own
text, to plan, to build.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property, lru_cache

from quantkit.contracts import Architecture, Config


@dataclass(frozen=True, kw_only=True, eq=False)
class DerivationKey:
    """What a derived architecture depends on: config.json with its place, and the names of the
    checkpoint's tensors in their order.
    """

    config: Config
    names: tuple[str, ...]

    @cached_property
    def text(self) -> str:
        """config.json with its place, as one text."""
        values = json.dumps(self.config.values, sort_keys=True, default=repr)
        return f"{self.config.where}\n{values}"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DerivationKey):
            return NotImplemented
        return self.text == other.text and self.names == other.names

    def __hash__(self) -> int:
        return hash((self.text, self.names))


@lru_cache(maxsize=1)  # of one model: a layout of many experts has 100,000 linears
def derive_once(key: DerivationKey) -> Architecture:
    """Derive an architecture; raises as `derive_architecture`, and again when called again."""
    from quantkit.models import derive  # imports transformers: seconds that a table saves

    return derive.derive_architecture(key.config, key.names)
