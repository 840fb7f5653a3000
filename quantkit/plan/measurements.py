"""Texts, benchmarks, gates and engines of a plan, for its summary. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from quantkit import registry
from quantkit.figures import is_size
from quantkit.formats.common.engine_names import TRIED
from quantkit.plan.engine_limits import find_unsupported_engines
from quantkit.plan.plan import Plan, TextUse
from quantkit.plan.plan_schema import PlanEngine, PlanStream, PlanTasks
from quantkit.plan.select_texts import select_texts
from quantkit.recipe.schema import Gate

QUANTKIT = "quantkit.load"
GATE_BOUNDS: Mapping[str, str] = {
    "max": "{figure} <= {bound}",
    "min": "{figure} >= {bound}",
    "min_recovery": "{figure}.recovery >= {bound}",
    "margin_pp": "{figure}.delta_pp.low > {bound}",
    "max_lost": "{figure}.lost <= {bound}",
    "min_score": "{figure}.score >= {bound}",
    "max_truncated_pp": "{figure}.truncated_pp <= {bound}",
    "max_unparsed_pp": "{figure}.unparsed_pp <= {bound}",
}
"""Key of a gate -> its bound, as in the report."""


def summarize_streams(plan: Plan) -> tuple[PlanStream, ...]:
    """Return calibration and fidelity text with their tokens: counted where a tokenizer has read
    them, else at most sequences times length.
    """
    return tuple(
        PlanStream(
            use=use,
            set=name,
            sequences=sequences,
            length=length,
            tokens=count_text_tokens(plan, use),
            is_counted=use in plan.text_tokens,
        )
        for use, name, sequences, length, _ in select_texts(plan.recipe)
    )


def count_text_tokens(plan: Plan, use: TextUse) -> int:
    """Return the tokens of a text without gold solutions: counted, else at most this number."""
    if use in plan.text_tokens:
        return plan.text_tokens[use]
    return max(0, plan.tokens.get(use, 0) - count_solutions(plan, use))


def count_solutions(plan: Plan, use: TextUse) -> int:
    """Return the most tokens of gold solutions, which follow the fidelity text."""
    fidelity, evaluation = plan.recipe.fidelity, plan.recipe.evaluation
    if use != "fidelity" or fidelity is None:
        return 0
    return evaluation.likelihood * len(evaluation.tasks) * fidelity.length


def summarize_tasks(plan: Plan) -> PlanTasks:
    """Return the benchmarks with their number of items."""
    evaluation = plan.recipe.evaluation
    solutions = evaluation.likelihood if plan.recipe.fidelity else 0
    return PlanTasks(names=evaluation.tasks, limit=evaluation.limit, gold_solutions=solutions)


def list_gates(gates: Mapping[str, Gate]) -> tuple[str, ...]:
    """Return each bound of a recipe's gates: "kl_worst_kind <= 0.4"."""
    return tuple(
        template.format(figure=figure, bound=format_bound(figure, key, value))
        + (", proven" if gate.proven else "")
        for figure, gate in gates.items()
        for key, template in GATE_BOUNDS.items()
        if (value := getattr(gate, key)) is not None
    )


def format_bound(figure: str, key: str, value: float) -> str:
    """Return a bound as text; a size in GB."""
    if key == "margin_pp":
        return f"{-value:g}" if value else "0"
    return f"{value / 1e9:.2f} GB" if key in ("max", "min") and is_size(figure) else f"{value:g}"


def summarize_engines(plan: Plan) -> tuple[PlanEngine, ...]:
    """Return the engines of the format: whether they load the artifact, the version that tests
    run, or the reason why they do not.
    """
    output = registry.get_format(plan.format_name)
    refused = find_unsupported_engines(output, plan.source.config, plan.layout, plan.decisions)
    rows = [
        PlanEngine(
            engine=engine,
            is_supported=engine not in refused,
            tried=find_trial(engine, plan.format_name),
            reason=refused.get(engine, ""),
        )
        for engine in output.engines
    ]
    own = PlanEngine(
        engine=QUANTKIT, is_supported=True, tried=find_trial(QUANTKIT, plan.format_name)
    )
    return (*rows, own) if QUANTKIT not in output.engines else tuple(rows)


def find_trial(engine: str, format_name: str) -> str:
    """Return the version of an engine with which tests load a format; "" for none."""
    version, formats = TRIED.get(engine, ("", frozenset[str]()))
    return version if format_name in formats else ""


def explain_scratch(plan: Plan) -> str:
    """Return the contents of the scratch disk."""
    if not plan.memory.scratch_bytes:
        return ""
    counts = " and ".join(f"{n:,} {use} tokens" for use, n in plan.tokens.items() if n)
    return f"hidden states of at most {counts}, before and after a block"
