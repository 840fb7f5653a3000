"""The ML-BOM is valid by CycloneDX's schema, says what the report says, and is sealed."""

from __future__ import annotations

import json
from pathlib import Path

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from support.report_example import FIDELITY
from support.report_variants import make_empty_report, make_example

from quantkit.artifact.layout import BOM
from quantkit.artifact.read_manifest import read_manifest
from quantkit.checkpoint.tensors import WrittenFile
from quantkit.report import bom

WEIGHTS = {"model.safetensors": WrittenFile(sha256="ab" * 32, n_bytes=5)}


def find_schema_fault(text: str) -> str | None:
    """Return the first fault of a BOM by the schema of CycloneDX 1.6."""
    fault = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    return None if fault is None else str(fault.data)


def test_bom_is_valid_and_has_the_figures_of_the_report() -> None:
    source = {**dict(FIDELITY["source"]), "model": "org/base", "revision": "1" * 40}  # type: ignore[call-overload]
    report = make_example({"source": source})
    text = bom.render_bom(report, WEIGHTS)
    assert find_schema_fault(text) is None
    assert bom.render_bom(report, WEIGHTS) == text
    model = json.loads(text)["metadata"]["component"]
    (ancestor,) = model["pedigree"]["ancestors"]
    assert (ancestor["name"], ancestor["version"]) == ("org/base", "1" * 40)
    assert ancestor["externalReferences"][0]["url"].endswith(f"org/base/tree/{'1' * 40}")
    assert model["components"][0]["hashes"] == [{"alg": "SHA-256", "content": "ab" * 32}]
    metrics = {
        (row["type"], row["slice"]): row
        for row in model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    }
    kl = metrics["kl_mean", "all"]
    assert float(kl["value"]) == 0.000361
    bounds = [float(kl["confidenceInterval"][name]) for name in ("lowerBound", "upperBound")]
    assert bounds == [0.000319, 0.000403]
    assert metrics["delta_pp", "tiny-v3-math"]["confidenceInterval"]["lowerBound"] == "-1.45"
    assert ("kl_max", "math") not in metrics  # not finite
    data = {entry["bom-ref"]: entry for entry in json.loads(text)["components"]}
    assert data["data:calibration"]["licenses"] == [{"license": {"name": "Apache-2.0"}}]
    assert {x["ref"] for x in model["modelCard"]["modelParameters"]["datasets"]} == data.keys()


def test_bom_of_an_empty_report_is_valid_and_a_wrong_one_is_not() -> None:
    text = bom.render_bom(make_empty_report(), {})
    assert find_schema_fault(text) is None
    assert find_schema_fault(text.replace("machine-learning-model", "model")) is not None


def test_bom_of_an_artifact_is_valid_and_in_its_manifest(built: Path) -> None:
    text = (built / BOM).read_text()
    assert find_schema_fault(text) is None
    files = read_manifest(built)["files"]
    assert isinstance(files, dict) and BOM in files
    named = {
        x["name"]: x["hashes"][0] for x in json.loads(text)["metadata"]["component"]["components"]
    }
    weights = {name for name in files if name.endswith(".safetensors")}
    assert named.keys() == weights
    assert all(named[name]["content"] == files[name]["sha256"] for name in weights)
