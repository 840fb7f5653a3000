"""The texts of a recipe in its plan: parts, kinds, tokens, licenses, and gaps in coverage.

Specs are read, and built-in texts for their hash; tokens are the requested number.
"""

from __future__ import annotations

from quantkit.io import package_data
from quantkit.plan.plan_schema import PlanText
from quantkit.recipe.schema import Recipe
from quantkit.texts.corpus_files import find_part_sha256
from quantkit.texts.corpus_spec import CorpusSpec, read_spec
from quantkit.texts.exposure import (
    describe_exposure,
    describe_narrowness,
    pick_label,
    raise_unseen_share,
)
from quantkit.texts.mixture_spec import PartSpec
from quantkit.texts.self_prompts import PROMPTS_VERSION


def plan_texts(recipe: Recipe) -> tuple[PlanText, ...]:
    """Return the parts of the calibration and the fidelity text; a set without parts is one part.

    The parts of a fidelity mixture have the shares with which it is sampled.
    """
    calibration = recipe.calibration if recipe.needs_calibration else None
    rows, labels = list[PlanText](), set[str]()
    if calibration:
        spec = read_set_spec(calibration.set)
        labels = set(spec.domains)
        tokens = calibration.sequences and calibration.sequences * calibration.length
        rows += list_parts("calibration", spec, tokens, set())
    if text := recipe.fidelity:
        tokens = text.windows and text.windows * text.length
        rows += list_parts("fidelity", read_set_spec(text.set), tokens, labels)
    return tuple(rows)


def read_set_spec(name: str) -> CorpusSpec:
    """Read the spec of a set of calibration/ or of a path."""
    return read_spec(name, package_data.locate_folder("calibration"))


def list_parts(
    use: str, spec: CorpusSpec, tokens: int | None, calibrated: set[str]
) -> list[PlanText]:
    """Return a row per part of a set."""
    if not spec.parts:
        return [
            PlanText(
                use=use, set=spec.name, part="", kinds=spec.domains, share=1.0, tokens=tokens,
                license=spec.license, version=spec.sha256[:12] or describe_hub_set(spec),
            )
        ]  # fmt: skip
    shares = raise_unseen_share(
        {part.name: part.share for part in spec.parts},
        {part.name: pick_label(part.labels, calibrated) for part in spec.parts},
        calibrated,
    )
    return [
        PlanText(
            use=use, set=spec.name, part=part.name, kinds=part.labels, share=shares[part.name],
            tokens=None if tokens is None else round(tokens * shares[part.name]),
            license=part.license, version=describe_version(spec, part),
        )
        for part in spec.parts
    ]  # fmt: skip


def describe_hub_set(spec: CorpusSpec) -> str:
    """Return data set and revision of a set of the hub."""
    return f"{spec.hub.path} at {spec.hub.revision[:12]}" if spec.hub else ""


def describe_version(spec: CorpusSpec, part: PartSpec) -> str:
    """Return the version of a part's text: hash, or data set and revision.

    The hash of built-in text belongs to one version of Python, which its origin names.
    """
    if part.builtin is not None:
        return f"{(find_part_sha256(spec, part) or '')[:12]}, {part.origin}"
    if part.sampled is not None:
        return f"seed prompts {PROMPTS_VERSION}"
    if part.hub is not None and (part.local_path is None or not part.local_path.exists()):
        return f"{part.hub.path} at {part.hub.revision[:12]}"
    return part.sha256[:12] if part.sha256 else part.set or ""


def describe_set_choices(recipe: Recipe) -> tuple[str, ...]:
    """Return a sentence per text whose set is a fallback of `auto`."""
    return tuple(
        f"{use}.set: auto stands for {name}: {reason}"
        for use, (name, reason) in recipe.chosen_texts.items()
        if reason
    )


def find_text_warnings(texts: tuple[PlanText, ...]) -> tuple[str, ...]:
    """Return sentences on a narrow calibration, and on fidelity text of calibrated kinds alone."""
    calibrated = {label for row in texts if row.use == "calibration" for label in row.kinds}
    measured = dict[str, float]()
    for row in texts:
        if row.use == "fidelity":
            for label in row.kinds:
                measured[label] = measured.get(label, 0.0) + row.share / len(row.kinds)
    sentences = (describe_narrowness(calibrated), describe_exposure(measured, calibrated))
    return tuple(sentence for sentence in sentences if sentence)
