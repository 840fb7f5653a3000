"""A derived architecture is derived once for one model."""

from __future__ import annotations

from collections.abc import Collection

import pytest

from quantkit.contracts import Architecture, Config
from quantkit.errors import CheckpointError
from quantkit.models import derive
from quantkit.plan.derive_once import derive_once
from quantkit.plan.plan import load_architecture

VALUES: dict[str, object] = {"model_type": "olmo9", "sizes": [1, 2]}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Config, tuple[str, ...]]]:
    """Record the derivations; one of a config with `bad` fails."""
    found: list[tuple[Config, tuple[str, ...]]] = []

    def record(config: Config, names: Collection[str] = ()) -> Architecture:
        found.append((config, tuple(names)))
        if config.has("bad"):
            raise CheckpointError("bad")
        return Architecture(layout=lambda _: None, tiny={})  # type: ignore[arg-type, return-value]

    monkeypatch.setattr(derive, "derive_architecture", record)
    derive_once.cache_clear()
    return found


def test_equal_models_are_derived_once(calls: list[object]) -> None:
    first = load_architecture(Config(values=dict(VALUES)), ["b", "a"])
    assert load_architecture(Config(values=dict(reversed(VALUES.items()))), ["b", "a"]) is first
    assert calls == [(Config(values=VALUES), ("b", "a"))]


@pytest.mark.parametrize(
    ("values", "where", "names"),
    [
        ({**VALUES, "sizes": [1]}, "config.json", ["b", "a"]),
        (VALUES, "other", ["b", "a"]),
        (VALUES, "config.json", ["a", "b"]),  # the order of tensors decides that of an artifact's
    ],
)
def test_other_models_are_derived_again(
    values: dict[str, object], where: str, names: list[str], calls: list[object]
) -> None:
    load_architecture(Config(values=VALUES), ["b", "a"])
    load_architecture(Config(values=values, where=where), names)
    assert len(calls) == 2


def test_refusal_is_raised_every_time(calls: list[object]) -> None:
    for _ in range(2):
        with pytest.raises(CheckpointError, match="bad"):
            load_architecture(Config(values={**VALUES, "bad": 1}))
    assert len(calls) == 2
