"""The front matter of a model card: what the hub reads of it. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping

from quantkit.artifact.fidelity_schema import Fidelity
from quantkit.report import markdown

LIBRARIES: Mapping[str, str] = {
    "transformers": "transformers",
    "vLLM": "vllm",
    "SGLang": "sglang",
    "GPTQModel": "gptqmodel",
}
"""Engine -> the hub's `library_name`; the first that loads the artifact is named."""

_MOST_RESULTS = 40
_MOST_LANGUAGES = 200
_HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")


def format_front_matter(fidelity: Fidelity, limit: int = markdown.CELL) -> str:
    """Return the front matter: license, base model, library, languages, tags and scores.

    A model of this machine is no base model: only a Hub id with a commit is one.
    """
    source, artifact = fidelity.source, fidelity.artifact
    base, license = find_base_model(fidelity), source.license
    return markdown.format_front_matter({
        "language": [language[:limit] for language in source.languages[:_MOST_LANGUAGES]],
        "license": license.id[:limit] if license else None,
        "license_name": license.name[:limit] if license and license.name else None,
        "license_link": license.link[:limit] if license and license.link else None,
        "base_model": base,
        "base_model_relation": "quantized" if base else None,
        "quantized_by": artifact.quantized_by[:limit],
        "library_name": find_library(fidelity),
        "pipeline_tag": source.pipeline_tag[:limit],
        "tags": [tag[:limit] for tag in (*artifact.tags, "quantkit")][-40:],
        "model-index": build_model_index(fidelity, limit),
    })


def find_base_model(fidelity: Fidelity) -> str | None:
    """Return the source's Hub id; None for a model of this machine."""
    source = fidelity.source
    return source.model if source.revision and _HUB_ID.fullmatch(source.model) else None


def find_library(fidelity: Fidelity) -> str | None:
    """Return the hub's name of the first library that loads the artifact; None for none."""
    engines = {command.engine for command in fidelity.artifact.serving}
    return next((name for engine, name in LIBRARIES.items() if engine in engines), None)


def make_title(fidelity: Fidelity) -> str:
    """Return the model's name with its format and widths: "DeepSeek-V3 (awq, 4-bit)"."""
    name = fidelity.source.model.removeprefix("builtin:").rstrip("/").rpartition("/")[2]
    tags = ", ".join(fidelity.artifact.tags if fidelity.modules else ())
    return f"{name or fidelity.artifact.name} ({tags})" if tags else name or fidelity.artifact.name


def build_model_index(
    fidelity: Fidelity, limit: int = markdown.CELL
) -> list[dict[str, object]] | None:
    """Return the benchmarks in the hub's format, scores from 0 to 1; None without scores."""
    results = [
        {
            "task": {"type": fidelity.source.pipeline_tag[:limit]},
            "dataset": {"type": row.task[:limit], "name": row.task[:limit]},
            "metrics": [
                {
                    "type": (row.metric or "score")[:limit],
                    "value": row.artifact,
                    "name": f"{row.metric[:limit] or 'score'}, {row.n} items",
                }
            ],
        }
        for row in fidelity.benchmarks
        if row.status == "ok" and row.artifact is not None
    ]
    if not results:
        return None
    return [{"name": make_title(fidelity)[:limit], "results": results[:_MOST_RESULTS]}]
