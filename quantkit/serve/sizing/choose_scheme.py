"""Choice of the scheme that fits given GPUs, by the arithmetic of `quantkit size`. Pure.

Schemes are tried from the one that loses least: 8 bits, 4 bits, and for mixtures of experts 4 bits
of every linear. Engines have fast kernels for 4 and 8 bits only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from quantkit.errors import RecipeError, UsageError
from quantkit.plan.choose_recipe import ChosenRecipe, add_notes, choose_recipe
from quantkit.plan.match_checkpoint import MatchedLayout
from quantkit.plan.plan import SourceFacts
from quantkit.plan.recipe_draft import RecipeRequest
from quantkit.serve.sizing.fit import Fit, fit_model
from quantkit.serve.sizing.gpus import Gpu, GpuCatalog
from quantkit.serve.sizing.memory import estimate_memory, format_users
from quantkit.serve.sizing.read import plan_source_models

BITS = (8, 4)
_GPUS = re.compile(r"(?:(\d{1,4})\s*[x×]\s*)?(\S.*?)(?:\s*[x×]\s*(\d{1,4}))?", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class GpuTarget:
    """The GPUs that must hold the model, and its load."""

    gpu: Gpu
    count: int
    context: int | None
    users: int


@dataclass(frozen=True, kw_only=True)
class SizedScheme:
    """A scheme and its fit on the target's kind of GPU."""

    chosen: ChosenRecipe
    fit: Fit

    def fits(self, target: GpuTarget) -> bool:
        """Return whether the target's GPUs hold it."""
        return self.fit.placement is not None and self.fit.placement.gpus <= target.count


def parse_gpus(text: str, catalog: GpuCatalog) -> tuple[Gpu, int]:
    """Return kind and number of GPUs of "H100 80GB x8", "8 x h100" or "h100".

    Raises UsageError for an unknown name or number.
    """
    match = _GPUS.fullmatch(text.strip())
    if match is None or (match[1] and match[3]):
        raise UsageError(f"--for: expected a GPU such as 'H100 80GB x8', found {text!r}")
    count = int(match[1] or match[3] or 1)
    if count < 1:
        raise UsageError(f"--for: expected one GPU or more, found {text!r}")
    try:
        return catalog.get_gpu(match[2]), count
    except UsageError as error:
        raise UsageError(str(error).replace("--gpu:", "--for:", 1)) from None


def choose_scheme(
    request: RecipeRequest, source: SourceFacts, matched: MatchedLayout, target: GpuTarget
) -> ChosenRecipe:
    """Choose the recipe of the first scheme that fits, with the numbers in its comment.

    Raises UsageError if none fits, with the smallest and the number of GPUs that it needs.
    """
    tried = list[SizedScheme]()
    for each in list_requests(request, matched):
        try:
            chosen = choose_recipe(each, source, matched)
        except RecipeError:
            if each == request:
                raise
            continue  # no format holds the model at this width: the others are tried
        [model] = plan_source_models(chosen.recipe, source, matched)
        estimate = estimate_memory(model, target.context, target.users)
        tried.append(SizedScheme(chosen=chosen, fit=fit_model(estimate, target.gpu)))
        if tried[-1].fits(target):
            return add_notes(chosen, (format_sizes(tried, target),))
    if not tried:
        raise UsageError(
            f"{request.model}: expected a format that holds 8 or 4 bits, found none; "
            "`quantkit plan MODEL` names the reason"
        )
    raise UsageError(format_no_fit(request, tried, target))


def list_requests(request: RecipeRequest, matched: MatchedLayout) -> list[RecipeRequest]:
    """Return the request with every scheme that it leaves open, the one that loses least first."""
    if request.method == "nf4":
        return [request]
    widths = BITS if request.bits is None else (request.bits,)
    reasons = {} if request.bits else {"bits": "the most of 8 and 4 bits that fit the GPUs"}
    requests = [replace(request, bits=bits, reasons=reasons) for bits in widths]
    if request.rules is None and any(block.experts for block in matched.layout.blocks):
        why = {**reasons, "rules": "with the experts alone quantized it does not fit the GPUs"}
        requests.append(replace(requests[-1], rules="all-linear", reasons=why))
    return requests


def format_target(target: GpuTarget, fit: Fit) -> str:
    """Format GPUs and load: "8 x H100 SXM 80 GB, 10 users at up to 32,768 tokens"."""
    users = format_users(target.users)
    return f"{target.count} x {target.gpu.short}, {users} at up to {fit.memory.context:,} tokens"


def format_scheme_name(scheme: SizedScheme) -> str:
    """Format a scheme: "awq, 4 bits g128; experts-only"."""
    rules = next(value for key, value, _ in scheme.chosen.choices if key == "rules")
    return f"{scheme.fit.memory.model.scheme}; {rules}"


def format_sizes(tried: Sequence[SizedScheme], target: GpuTarget) -> str:
    """Return the numbers of every scheme that was tried, as lines of a comment."""
    fit = tried[-1].fit
    lines = [
        f"Chosen for {format_target(target, fit)},",
        "by the arithmetic of `quantkit size`; nothing is measured:",
    ]
    for scheme in tried:
        memory, placement = scheme.fit.memory, scheme.fit.placement
        gpus = (
            f"needs {placement.gpus} (TP{placement.tp} x PP{placement.pp})"
            if placement
            else f"needs more than {scheme.fit.min_gpus}"
        )
        verdict = "fits" if scheme.fits(target) else "does not fit"
        lines.append(
            f"  {format_scheme_name(scheme)}: weights {memory.weights_bytes / 1e9:.2f} GB + KV "
            f"cache {memory.kv_bytes / 1e9:.2f} GB"
        )
        lines.append(
            f"    + margin {memory.margin_bytes / 1e9:.2f} GB = {memory.total_bytes / 1e9:.2f} GB; "
            f"{gpus}: {verdict}"
        )
    if fit.max_users is not None:
        lines.append(
            f"  On its GPUs at most {format_users(fit.max_users)} at this context, or "
            f"{fit.max_context or 0:,} tokens for these users."
        )
    return "\n".join(lines)


def format_no_fit(request: RecipeRequest, tried: Sequence[SizedScheme], target: GpuTarget) -> str:
    """Return the message if no scheme fits, with the smallest one's numbers."""
    smallest = min(tried, key=lambda scheme: scheme.fit.memory.weights_bytes)
    memory, placement = smallest.fit.memory, smallest.fit.placement
    needed = f"{placement.gpus}" if placement else f"more than {smallest.fit.min_gpus}"
    return (
        f"--for: expected a scheme of {request.model} that fits "
        f"{format_target(target, smallest.fit)}, found none: the smallest "
        f"({format_scheme_name(smallest)}) needs {memory.total_bytes / 1e9:.2f} GB on {needed} "
        f"{target.gpu.short}; use more GPUs, or a smaller --context or --users"
    )
