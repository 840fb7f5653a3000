"""Several formats from one build, and a build that measures nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.builds import build, build_all
from support.checkpoints import make_plan, make_recipe_text, make_tiny_config, write_checkpoint

from quantkit import pipeline, registry
from quantkit.artifact.load_model import read_schemes
from quantkit.artifact.read_manifest import read_manifest
from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.errors import NumericsError, RecipeError
from quantkit.formats import compressed_tensors, gptq
from quantkit.plan import plan as plan_module
from quantkit.plan import sources
from quantkit.plan.plan import load_architecture
from quantkit.recipe.parse import parse_recipe
from quantkit.verify.shallow import verify_artifact

pytestmark = pytest.mark.usefixtures("quick_builds")

SYMMETRIC = "{method: awq, rounding: gptq, bits: 4, group_size: 64, symmetric: true}"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-MoE in BF16."""
    return write_checkpoint(
        tmp_path_factory.mktemp("moe") / "source", make_tiny_config("qwen3_moe")
    )


def test_formats_that_hold_the_same_codes_share_a_solve(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has its own folder, config and card; codes and figures equal those of a separate
    build.
    """
    loops = []
    monkeypatch.setattr(
        pipeline,
        "build_blocks",
        lambda *a, build=pipeline.build_blocks: loops.append(a) or build(*a),
    )
    both = build_all(
        source, tmp_path / "x", format="[gptq, compressed_tensors]", quantize=SYMMETRIC
    )
    assert [o.path for o in both] == [tmp_path / "x-gptq", tmp_path / "x-compressed-tensors"]
    assert len(loops) == 1
    alone = build(source, tmp_path / "alone", format="compressed_tensors", quantize=SYMMETRIC)
    one, other = (
        load_file(both[1].path / "model.safetensors"),
        load_file(alone.path / "model.safetensors"),
    )
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    for outcome in both:
        assert verify_artifact(outcome.path).status == "not judged"
        assert outcome.fidelity.artifact.format == outcome.format_name
        assert outcome.fidelity.distribution == alone.fidelity.distribution
        assert outcome.fidelity.modules == alone.fidelity.modules
        assert f"format `{outcome.format_name}`" in (outcome.path / "README.md").read_text(
            encoding="utf-8"
        )
        manifest, checkpoint = read_manifest(outcome.path), Checkpoint.open(outcome.path)
        output = read_schemes(manifest, checkpoint, outcome.path)
        assert manifest["format"] == output[0] == outcome.format_name
        older = {key: value for key, value in manifest.items() if key != "format"}
        assert read_schemes(older, checkpoint, outcome.path) == output
    methods = [
        json.loads((o.path / "config.json").read_text())["quantization_config"]["quant_method"]
        for o in both
    ]
    assert methods == ["gptq", "compressed-tensors"]
    module = both[0].fidelity.modules[0]
    name = module.name
    plan = make_plan(source, format="gptq", quantize=SYMMETRIC)
    scheme = plan.decisions[name].scheme
    first = load_file(both[0].path / "model.safetensors")
    weights = [
        f.FORMAT.dequantize(
            {k.removeprefix(f"{name}."): v for k, v in t.items() if k.startswith(f"{name}.")},
            scheme,
        )
        for f, t in ((gptq, first), (compressed_tensors, one))
    ]
    assert torch.equal(*weights)


def test_format_that_rounds_once_more_has_its_own_build(source: Path, tmp_path: Path) -> None:
    """`dense` stores BF16: its figures are its own, in the order of the recipe."""
    actual = build_all(source, tmp_path / "x", format="[dense, awq]")
    assert [outcome.format_name for outcome in actual] == ["dense", "awq"]
    assert (
        actual[0].fidelity.modules[0].relative_error != actual[1].fidelity.modules[0].relative_error
    )
    assert all(verify_artifact(outcome.path) for outcome in actual)


def test_formats_that_store_different_weights_are_an_error(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A format that wrongly claims to hold the codes fails before anything is sealed."""
    from dataclasses import replace

    lying = replace(registry.get_format("dense"), holds_codes=True)
    monkeypatch.setattr(
        registry,
        "get_format",
        lambda name, real=registry.get_format: lying if name == "dense" else real(name),
    )
    with pytest.raises(NumericsError, match=r"the recipe's formats do not store the same weight"):
        build_all(source, tmp_path / "x", format="[awq, dense]")
    assert not (tmp_path / "x-awq").exists()


def test_faults_common_to_formats_are_listed_once(source: Path, tmp_path: Path) -> None:
    """gptq holds no zero points; a fault of both formats is listed once."""
    text = make_recipe_text(
        source, tmp_path / "x", format="[awq, gptq]", quantize="{bits: 4, group_size: 128}"
    )
    recipe = parse_recipe(text, "r.yaml")
    with pytest.raises(RecipeError) as caught:
        sources.plan_recipe(recipe, sources.resolve_source_facts(recipe))
    assert sum("symmetric: false" in fault for fault in caught.value.faults) == 1
    assert len(caught.value.faults) == len(set(caught.value.faults))


def test_architecture_is_derived_once_for_all_formats(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deriving a family without a table takes seconds."""
    asked = []
    monkeypatch.setattr(
        plan_module,
        "load_architecture",
        lambda config, names: asked.append(config) or load_architecture(config, names),
    )
    recipe = parse_recipe(make_recipe_text(source, tmp_path / "x", format="[awq, dense]"), "r.yaml")
    assert len(sources.plan_recipe(recipe, sources.resolve_source_facts(recipe))) == 2
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("method", "reads", "rules"),
    [("rtn", 0, "experts-only"), ("rtn", 0, "all-linear"), ("awq", 1, "all-linear")],
)
def test_build_without_fidelity_text_measures_nothing(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    reads: int,
    rules: str,
) -> None:
    """RTN then runs no forward pass; the stored tensors are the same."""
    from quantkit.build import open_streams

    started: list[str] = []
    monkeypatch.setattr(
        open_streams,
        "open_stream",
        lambda name, *rest, real=open_streams.open_stream: (
            started.append(name) or real(name, *rest)
        ),
    )
    quantize = f"{{method: {method}, bits: 4, group_size: 64}}"
    actual = build(source, tmp_path / "x", quantize=quantize, rules=rules, fidelity="none")
    assert started == ["calibration"] * reads
    assert (
        actual.fidelity.distribution == ()
        and actual.fidelity.measured_on is None
        and not actual.fidelity.blocks
    )
    assert not (actual.path / "quantkit" / "samples" / "tokens.parquet").exists()
    assert verify_artifact(actual.path).status == "not judged"
    measured = build(source, tmp_path / "y", quantize=quantize, rules=rules)
    mine, theirs = (load_file(o.path / "model.safetensors") for o in (actual, measured))
    assert mine.keys() == theirs.keys() and all(
        torch.equal(mine[name], theirs[name]) for name in mine
    )
    plan = make_plan(source, format="gptq", quantize=SYMMETRIC)
    assert (
        Checkpoint.open(actual.path).config.values["model_type"]
        == plan.source.config.values["model_type"]
    )


def test_plan_warns_that_nothing_will_be_measured(source: Path) -> None:
    plan = make_plan(source, fidelity="none")
    assert any("loss of this artifact against its source" in warning for warning in plan.warnings)


def test_gate_without_fidelity_text_is_refused(tmp_path: Path) -> None:
    text = make_recipe_text(
        "builtin:tiny-v3", tmp_path, fidelity="none", gates="{kl_mean: {max: 0.1}}"
    )
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "r.yaml")
    assert caught.value.faults == (
        "r.yaml:10: gates.kl_mean: needs a fidelity text, found fidelity: none; name a set, or "
        "drop this gate",
    )
