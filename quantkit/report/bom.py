"""quantkit/bom.cdx.json: the artifact as a CycloneDX 1.6 ML-BOM. Pure.

It names the weight files with hashes, the source as ancestor, the data sets, the licenses, and the
figures with their 95 % intervals as performance metrics of the model card. The file is written as
plain JSON, because cyclonedx-python-lib has no model card; a test validates it by CycloneDX's
schema. The same artifact gives the same bytes: the serial number follows from the content, and
there is no timestamp.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping

from quantkit.artifact.fidelity_schema import Fidelity, Figure, TextPart, TextSet
from quantkit.checkpoint.tensors import WrittenFile
from quantkit.figure_readers import make_normal_interval
from quantkit.report import card_data
from quantkit.report.verdict import format_verdict

MODEL_REF = "model"


def render_bom(fidelity: Fidelity, weights: Mapping[str, WrittenFile]) -> str:
    """Return the text of the BOM; weights: the weight files with their hashes."""
    data = list(list_data_sets(fidelity))
    version = fidelity.versions.get("quantkit")
    values: dict[str, object] = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "tools": {
                "components": [{"type": "application", "name": "quantkit", "version": version}]
                if version is not None
                else []
            },
            "component": make_model(fidelity, weights, data),
        },
        "components": data,
        "dependencies": [
            {"ref": MODEL_REF, "dependsOn": [str(entry["bom-ref"]) for entry in data]}
        ],
    }
    content = json.dumps(values, sort_keys=True)
    serial = uuid.uuid5(uuid.NAMESPACE_URL, content)
    return json.dumps({**values, "serialNumber": f"urn:uuid:{serial}"}, indent=1) + "\n"


def make_model(
    fidelity: Fidelity, weights: Mapping[str, WrittenFile], data: list[dict[str, object]]
) -> dict[str, object]:
    """Return the component of the artifact with its pedigree and model card."""
    artifact, source = fidelity.artifact, fidelity.source
    return {
        "type": "machine-learning-model",
        "bom-ref": MODEL_REF,
        "name": card_data.make_title(fidelity),
        "description": f"{artifact.scheme}, format {artifact.format}",
        "licenses": make_licenses(source.license.name or source.license.id)
        if source.license
        else [],
        "components": [
            {
                "type": "file",
                "bom-ref": f"file:{name}",
                "name": name,
                "hashes": [make_hash(file.sha256)],
            }
            for name, file in sorted(weights.items())
        ],
        "pedigree": {
            "ancestors": [make_source(fidelity)],
            "notes": f"Quantized by {artifact.quantized_by}: {fidelity.command}".rstrip(": "),
        },
        "modelCard": {
            "modelParameters": {
                "task": source.pipeline_tag,
                "architectureFamily": source.architecture,
                "datasets": [{"ref": entry["bom-ref"]} for entry in data],
                "inputs": [{"format": "text"}],
                "outputs": [{"format": "text"}],
            },
            "quantitativeAnalysis": {"performanceMetrics": list(list_metrics(fidelity))},
        },
        "properties": [
            {"name": f"quantkit:{name}", "value": str(value)}
            for name, value in (
                ("status", fidelity.status),
                ("verdict", format_verdict(fidelity)),
                ("bits_overall", artifact.bits_overall),
                ("bytes_source", artifact.bytes_source),
                ("bytes_artifact", artifact.bytes_artifact),
                *((f"{key}_sha256", value) for key, value in fidelity.hashes.items()),
            )
        ],
    }


def make_source(fidelity: Fidelity) -> dict[str, object]:
    """Return the component of the source model, at its commit."""
    source = fidelity.source
    component: dict[str, object] = {
        "type": "machine-learning-model",
        "bom-ref": "source",
        "name": source.model,
        **({"version": source.revision} if source.revision else {}),
        **({"hashes": [make_hash(source.hash)]} if source.hash else {}),
    }
    if source.license:
        component["licenses"] = make_licenses(source.license.name or source.license.id)
    if base := card_data.find_base_model(fidelity):
        url = f"https://huggingface.co/{base}/tree/{source.revision}"
        component["externalReferences"] = [{"type": "distribution", "url": url}]
    return component


def list_data_sets(fidelity: Fidelity) -> Iterator[dict[str, object]]:
    """Yield a component for each text set, and for each part of a mixture."""
    for use, text in (("calibration", fidelity.calibration), ("fidelity", fidelity.measured_on)):
        if text is None:
            continue
        yield make_data_set(f"data:{use}", f"{use} text", text.set, text)
        for part in text.parts:
            yield make_data_set(f"data:{use}:{part.name}", f"{use} text", part.name, part)
    for row in fidelity.benchmarks:
        if row.data_sha256:
            yield {
                "type": "data",
                "bom-ref": f"data:benchmark:{row.task}",
                "name": row.task,
                "description": "benchmark",
                "hashes": [make_hash(row.data_sha256)],
            }


def make_data_set(ref: str, use: str, name: str, text: TextSet | TextPart) -> dict[str, object]:
    """Return the component of a text; its hash is that of the whole set or part."""
    size = f"{use}, {text.sequences:,} sequences, {text.tokens:,} tokens"
    return {
        "type": "data",
        "bom-ref": ref,
        "name": name,
        "description": f"{size}; {text.description}" if text.description else size,
        "licenses": make_licenses(text.license),
        **({"hashes": [make_hash(text.sha256)]} if text.sha256 else {}),
    }


def list_metrics(fidelity: Fidelity) -> Iterator[dict[str, object]]:
    """Yield the figures per kind of text, the scores, and their difference from the source's."""
    for row in fidelity.distribution:
        for key, figure in row.figures.items():
            if figure is not None and figure.value is not None:
                yield make_metric(key, row.domain, figure)
    for result in fidelity.benchmarks:
        if result.artifact is None:
            continue
        yield make_metric(result.metric or "score", result.task, Figure(value=result.artifact))
        for key, figure in (("delta_pp", result.delta_pp), ("recovery", result.recovery)):
            if figure is not None and figure.value is not None:
                yield make_metric(key, result.task, figure)


def make_metric(key: str, part: str, figure: Figure) -> dict[str, object]:
    """Return a metric with its 95 % interval, by the standard error if that is all it has."""
    low, high = figure.ci or (None, None)
    if figure.ci is None and figure.value is not None and figure.se is not None:
        low, high = make_normal_interval(figure.value, figure.se)
    interval = {
        name: repr(bound)
        for name, bound in (("lowerBound", low), ("upperBound", high))
        if bound is not None
    }
    return {
        "type": key,
        "slice": part,
        "value": repr(figure.value),
        **({"confidenceInterval": interval} if interval else {}),
    }


def make_licenses(text: str) -> list[dict[str, object]]:
    """Return a license by its name: licenses of models are often in no list."""
    return [{"license": {"name": text}}] if text else []


def make_hash(sha256: str) -> dict[str, str]:
    """Return a sha256 as CycloneDX writes it."""
    return {"alg": "SHA-256", "content": sha256}
