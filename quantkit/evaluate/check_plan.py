"""Checks before a build: transformers' model, token ids, disk space, benchmarks that cannot run.

`quantkit plan` prints their results, and the build runs them again before it hashes the source.
"""

from __future__ import annotations

from quantkit.plan.plan import Plan, SourceFacts
from quantkit.plan.sources import plan_recipe
from quantkit.recipe.schema import Recipe


def plan_and_check(recipe: Recipe, source: SourceFacts) -> tuple[Plan, ...]:
    """Return one plan per format, with warnings about a build on this machine.

    A model that is not on this machine is only planned. Raises the errors of `plan_recipe`, and
    those that would end the build.
    """
    plans = plan_recipe(recipe, source)
    if source.folder is None:
        return plans
    from quantkit.evaluate.local_checks import check_local  # imports transformers: seconds

    return check_local(plans, source.folder)
