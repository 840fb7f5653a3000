"""What headers, config, tokens and this machine tell about a build before it begins.

`quantkit plan` says it, and the build checks it again before it hashes the source.
"""

from __future__ import annotations

from quantkit.plan.plan import Plan, SourceFacts
from quantkit.plan.sources import plan_recipe
from quantkit.recipe.schema import Recipe


def plan_and_check(recipe: Recipe, source: SourceFacts) -> tuple[Plan, ...]:
    """Return one plan per format, with warnings of what a build on this machine would meet.

    A model that is not on this machine is only planned. Raises as `plan_recipe` does, and what the
    build would raise.
    """
    plans = plan_recipe(recipe, source)
    if source.folder is None:
        return plans
    from quantkit.evaluate.local_checks import check_local  # imports transformers: seconds

    return check_local(plans, source.folder)
