"""Figures of a finished block: how far its stored weights lead the streams apart."""

from __future__ import annotations

from quantkit.build.context import BlockContext
from quantkit.build.hidden_states import Routing, StreamName, iterate_chunks
from quantkit.build.spool import Spool
from quantkit.errors import NumericsError
from quantkit.numerics.fidelity import compute_router_agreement

ONE_THREAD = 1 << 14
"""Values that torch sums on one thread: it cuts larger sums by the number of threads, which changes
the last digit.
"""


def measure_block(
    context: BlockContext, reference: Routing | None, quantized: Routing | None
) -> None:
    """Record the error of the block's output and the agreement of its routers on the fidelity
    text.
    """
    record, targets = context.state.record, context.state.targets
    rows = context.streams["reference"].text_rows
    record.output_error = relative_error(targets["reference"], targets["quantized"], rows)
    if reference and quantized:
        agreement = compute_router_agreement(reference.index[:rows], quantized.index[:rows])
        record.router_agreement = float(agreement.mean())


def check_finite(block: str, stream: StreamName, states: Spool) -> None:
    """Check the hidden states after a block. Raises NumericsError for NaN or infinity, which would
    spoil every figure.
    """
    if not states.finite:
        raise NumericsError(
            f"{block}: expected finite hidden states after it, found NaN or infinity in the "
            f"{stream} stream; look for huge values among its weights and those before it, and at "
            "rms_norm_eps, rope_theta and rope_scaling in config.json"
        )


def relative_error(reference: Spool, quantized: Spool, rows: int) -> float:
    """Return ||q - r|| / ||r|| of the first `rows` hidden states [tokens, hidden], summed in
    float64.
    """
    lost, energy = 0.0, 0.0
    for first, stop in iterate_chunks(rows):
        r, q = reference.read(first, stop).double(), quantized.read(first, stop).double()
        for difference, part in zip(
            (q - r).flatten().split(ONE_THREAD), r.flatten().split(ONE_THREAD), strict=True
        ):
            lost += float(difference.square().sum())
            energy += float(part.square().sum())
    return float((lost / energy) ** 0.5) if energy else 0.0
