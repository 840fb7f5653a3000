"""How long a build takes, from builds that were measured on this machine.

Each complete build records the work and the seconds of its steps in the user's cache. An estimate
scales the seconds of the recorded build with the nearest amount of work by the ratio of both.
Builds are comparable on one host, device and number of threads; quantization also needs the same
methods, benchmarks the same tasks. Without a build of similar size there is no estimate.
"""

from __future__ import annotations

import datetime
import logging
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from math import log
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from quantkit.contracts import Block
from quantkit.errors import QuantkitError
from quantkit.io import user_cache
from quantkit.io.files import make_folder, read_json, write_json
from quantkit.plan.decisions import Decision
from quantkit.plan.measurements import count_text_tokens
from quantkit.plan.memory import iterate_solves
from quantkit.plan.plan import Plan, TextUse
from quantkit.plan.plan_schema import PlanTime
from quantkit.plan.sources import resolve_compute
from quantkit.progress import Phase

LOG = logging.getLogger(__name__)

LARGEST_RATIO = 30.0
"""Ratio of the work of two builds above which none is estimated from the other: the time of a
small model is that of starting its operations."""
SIDES = ("source", "artifact")
TEXT_USES: tuple[TextUse, ...] = ("calibration", "fidelity")
MOST_RECORDS = 200
"""Builds that are kept, the newest."""
STEPS = ("source hashes", "quantize", "distribution", "benchmarks")
"""Steps of a build whose seconds are recorded; the others take less than a few seconds."""


class BuildRate(BaseModel):
    """Work and seconds per step of a build; work is in multiplications, or bytes of hashes."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    date: str
    host: str
    device: str
    threads: int
    methods: tuple[str, ...]
    tasks: tuple[str, ...]
    work: dict[str, float]
    seconds: dict[str, float]


class BuildRates(BaseModel):
    """The file of recorded builds, the newest last."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    builds: tuple[BuildRate, ...] = Field(default=(), max_length=10 * MOST_RECORDS)


# ------------------------------------------------------------------------------------------- work


def compute_work(plan: Plan) -> dict[str, float]:
    """Return the work of each step of a build of this plan; 0 for a step that it does not have.

    A forward pass multiplies every weight that a token uses by each token: the streams of the
    fidelity text, three with a yardstick, and the calibration text with original and with stored
    weights. Statistics and rounding of a matrix take tokens x in^2 and in^2 x (in + out)
    multiplications. Gold solutions are left out: their number of tokens is not known before a
    tokenizer has read them.
    """
    calibration, fidelity = (count_text_tokens(plan, use) for use in TEXT_USES)
    has_yardstick = plan.recipe.fidelity is not None and plan.recipe.fidelity.yardstick is not None
    streams = 3 if has_yardstick else 2
    passes = (2 if plan.needs_calibration else 0) * calibration + streams * fidelity
    quantize = 0.0
    for block in plan.layout.blocks:
        if block.kind == "mtp":
            continue
        share = compute_expert_share(block)
        quantize += passes * count_active_weights(block, share)
        for linears in iterate_solves(block, plan.decisions):
            width = linears[0].in_features
            used = share if is_expert(block, linears[0].name) else 1.0
            rows = sum(linear.out_features for linear in linears)
            quantize += width**2 * (used * calibration + width + rows)
    head = plan.layout.head or plan.layout.embedding
    active = sum(
        count_active_weights(block, compute_expert_share(block)) for block in plan.layout.blocks
    )
    return {
        "source hashes": float(plan.source_bytes()),
        "quantize": quantize,
        "distribution": float(streams * fidelity * head.n_parameters),
        "benchmarks": active + head.n_parameters if plan.recipe.evaluation.tasks else 0.0,
    }


def is_expert(block: Block, name: str) -> bool:
    """Return whether a linear belongs to a routed expert of the block."""
    return block.experts is not None and name.startswith(f"{block.experts.module}.")


def compute_expert_share(block: Block) -> float:
    """Return the share of a block's routed experts that a token uses."""
    experts = block.experts
    return 1.0 if experts is None else min(1.0, (experts.top_k or experts.count) / experts.count)


def count_active_weights(block: Block, share: float) -> float:
    """Return the weights of a block that a token uses, `share` of the routed experts."""
    return sum(
        linear.n_parameters * (share if is_expert(block, linear.name) else 1.0)
        for linear in block.linears
    )


# -------------------------------------------------------------------------------------- estimates


def describe_build(plan: Plan, device: str, threads: int) -> BuildRate:
    """Return the record of a build of this plan on this machine, without its seconds."""
    evaluation = plan.recipe.evaluation
    methods = {format_method(decision) for decision in plan.decisions.values() if decision.scheme}
    return BuildRate(
        name=Path(plan.path).name,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        host=f"{platform.node()}, {os.cpu_count()} CPUs",
        device=device,
        threads=threads,
        methods=tuple(sorted(methods)),
        tasks=(*evaluation.tasks, f"limit {evaluation.limit}") if evaluation.tasks else (),
        work=compute_work(plan),
        seconds={},
    )


def describe_here(plan: Plan) -> BuildRate:
    """Return the record of a build on the recipe's device with the threads of this process."""
    return describe_build(plan, resolve_compute(plan.recipe).device, torch.get_num_threads())


def format_method(decision: Decision) -> str:
    """Return method and rounding: "awq+gptq", "gptq"."""
    if decision.rounding in (None, "nearest", decision.method):
        return str(decision.method)
    return f"{decision.method}+{decision.rounding}"


def estimate_plan(plan: Plan) -> PlanTime:
    """Return the estimated time of a build of this plan on this machine."""
    return estimate_time(describe_here(plan), read_rates())


def estimate_time(build: BuildRate, rates: Sequence[BuildRate]) -> PlanTime:
    """Return the seconds of a build by the nearest ones that were measured, per step, or the reason
    why there is no estimate.
    """
    steps = dict[str, float]()
    used = dict[str, str]()
    unknown = list[str]()
    for step, work in build.work.items():
        if work <= 0:
            continue
        nearest = find_nearest(build, step, rates)
        if nearest is None:
            unknown.append(step)
            continue
        steps[step] = nearest.seconds[step] * work / nearest.work[step]
        used.setdefault(nearest.name, nearest.date)
    if "quantize" not in steps:
        methods = ", ".join(build.methods) or "no method"
        threads = f"{build.threads} thread{'' if build.threads == 1 else 's'}"
        return PlanTime(
            reason=f"no complete build of a similar size with {methods} was measured on this "
            f"machine ({build.device}, {threads})",
        )
    names = ", ".join(f"{name} ({date})" for name, date in used.items())
    missing = f"; without {', '.join(unknown)}, not measured here" if unknown else ""
    return PlanTime(
        seconds=sum(steps.values()),
        steps=steps,
        reason=f"scaled from builds on this machine: {names}{missing}",
    )


def find_nearest(build: BuildRate, step: str, rates: Iterable[BuildRate]) -> BuildRate | None:
    """Return the newest of the comparable builds whose work of a step is nearest; None without any
    within LARGEST_RATIO.
    """
    best, least = None, log(LARGEST_RATIO)
    for rate in rates:
        is_comparable = (rate.host, rate.device, rate.threads) == (
            *(build.host, build.device, build.threads),
        )
        if step == "quantize":
            is_comparable = is_comparable and rate.methods == build.methods
        if step == "benchmarks":
            is_comparable = is_comparable and rate.tasks == build.tasks
        work = rate.work.get(step, 0.0)
        if not is_comparable or work <= 0 or rate.seconds.get(step, 0.0) <= 0:
            continue
        distance = abs(log(build.work[step] / work))
        if distance <= least:
            best, least = rate, distance
    return best


def list_phases(plans: Sequence[Plan], time: PlanTime, *, evaluate: bool) -> list[Phase]:
    """Return the stages that a build of these plans reports, with their expected seconds.

    Plans with one set of codes share a quantization; formats that store other weights have one of
    their own.
    """
    steps = time.steps
    phases = [Phase(stage="source's sha256", seconds=steps.get("source hashes", 0.0))]
    holding = [plan.format.holds_codes for plan in plans]
    for _ in range(any(holding) + holding.count(False)):
        phases.append(Phase(stage="blocks", seconds=steps.get("quantize")))
        phases.append(Phase(stage="distribution", seconds=steps.get("distribution", 0.0)))
        if evaluate and plans[0].recipe.evaluation.tasks:
            seconds = steps.get("benchmarks")
            half = None if seconds is None else seconds / 2
            phases += [Phase(stage=f"benchmarks, {side}", seconds=half) for side in SIDES]
    return phases


# ------------------------------------------------------------------------------------------ record


def locate_rates() -> Path:
    """Return the file of recorded builds in the user's cache."""
    return user_cache.locate_folder("builds") / "rates.json"


def read_rates() -> tuple[BuildRate, ...]:
    """Return the recorded builds; none from a file that is absent or damaged."""
    try:
        return BuildRates.model_validate(read_json(locate_rates())).builds
    except (QuantkitError, ValidationError):
        return ()


def record_build(
    plan: Plan, seconds: Mapping[str, float], blocks: Iterable[float], *, is_scored: bool
) -> None:
    """Add a measured build to the record; a folder that cannot be written keeps none.

    seconds: of each step; blocks: of each block, which together are the step "quantize";
    is_scored: every benchmark ran.
    """
    known = {**seconds, "quantize": sum(blocks)}
    steps = STEPS if is_scored else [step for step in STEPS if step != "benchmarks"]
    measured = {step: known[step] for step in steps if known.get(step, 0.0) > 0}
    build = describe_here(plan).model_copy(update={"seconds": measured})
    path, builds = locate_rates(), (*read_rates(), build)[-MOST_RECORDS:]
    try:
        make_folder(path.parent)
        write_json(path, BuildRates(builds=builds).model_dump(mode="json"))
    except QuantkitError as error:
        LOG.info("the seconds of this build are not recorded: %s", error)
