"""Figures of a finished block: how far its stored weights lead the streams apart."""

from __future__ import annotations

from collections import Counter

from quantkit.artifact.records import BlockRecord, ModuleRecord
from quantkit.build.context import BlockContext
from quantkit.build.hidden_states import Routing, StreamName, iterate_chunks
from quantkit.build.spool import Spool
from quantkit.errors import NumericsError
from quantkit.numerics.fidelity import compute_router_agreement
from quantkit.plan.summary import format_scheme

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
    channels = context.build.model.outer.form.hidden.width
    record.output_error = relative_error(targets["reference"], targets["quantized"], rows, channels)
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


def relative_error(reference: Spool, quantized: Spool, rows: int, channels: int) -> float:
    """Return ||q - r|| / ||r|| of the first `channels` numbers of the first `rows` rows [tokens,
    width], summed in float64.
    """
    lost, energy = 0.0, 0.0
    for first, stop in iterate_chunks(rows):
        r, q = (x.read(first, stop)[:, :channels].double() for x in (reference, quantized))
        for difference, part in zip(
            (q - r).flatten().split(ONE_THREAD), r.flatten().split(ONE_THREAD), strict=True
        ):
            lost += float(difference.square().sum())
            energy += float(part.square().sum())
    return float((lost / energy) ** 0.5) if energy else 0.0


def format_block(record: BlockRecord) -> str:
    """Return a block's figures in one line: seconds, the worst module, output, routers,
    fallbacks.
    """
    parts = [f"{record.seconds:.1f} s", f"{len(record.modules)} modules quantized"]
    if record.modules:
        worst = max(record.modules, key=lambda module: module.relative_error)
        parts.append(f"weight error at most {100 * worst.relative_error:.2f} % ({worst.module})")
    if record.output_error is not None:
        parts.append(f"hidden states off by {100 * record.output_error:.3f} %")
    if record.router_agreement is not None:
        parts.append(f"router agreement {100 * record.router_agreement:.2f} %")
    counts = Counter(name for module in record.modules for name in module.fallbacks)
    parts += [f"fallback {name} on {count} modules" for name, count in sorted(counts.items())]
    return f"{record.name}: {'; '.join(parts)}"


def format_module(record: ModuleRecord) -> str:
    """Return a module's rule, method, errors and calibration tokens in one line."""
    parts = [
        f"{record.method}, rounding {record.rounding}, {format_scheme(record.scheme)}",
        f"rule {record.rule}",
        f"weight error {100 * record.relative_error:.2f} %",
    ]
    if record.output_relative_error is not None:
        parts.append(f"output error {100 * record.output_relative_error:.3f} %")
    parts.append(f"{record.tokens} calibration tokens")
    parts += [f"fallback {name}" for name in record.fallbacks]
    return f"{record.module}: {'; '.join(parts)}"
