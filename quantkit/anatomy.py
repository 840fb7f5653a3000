"""The parts that decoder blocks of most families are made of, so that an architecture file stays a table."""

from __future__ import annotations

from quantkit.contracts import Linear, Role, TensorSpec


def gated_mlp(module: str, hidden: int, intermediate: int, role: Role, bias: bool = False) -> tuple[Linear, ...]:
    """gate, up and down projection of a gated MLP: down(act(gate x) * up x)."""
    return (
        Linear(name=f"{module}.gate_proj", out_features=intermediate, in_features=hidden, role=role, bias=bias),
        Linear(name=f"{module}.up_proj", out_features=intermediate, in_features=hidden, role=role, bias=bias),
        Linear(name=f"{module}.down_proj", out_features=hidden, in_features=intermediate, role=role, bias=bias),
    )


def routed_experts(module: str, count: int, hidden: int, intermediate: int) -> tuple[Linear, ...]:
    """The projections of `count` routed experts, expert by expert, in the hub's naming."""
    return tuple(
        linear
        for expert in range(count)
        for linear in gated_mlp(f"{module}.{expert}", hidden, intermediate, "routed_expert")
    )


def norm(module: str, width: int, dtype: str = "BF16") -> TensorSpec:
    """The weight vector of an RMS norm."""
    return TensorSpec(name=f"{module}.weight", dtype=dtype, shape=(width,))
