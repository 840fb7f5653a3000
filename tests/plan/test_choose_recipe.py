"""Recipes that are chosen for a model: keys that model and engines need, each with a reason."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.checkpoints import make_tiny_config
from support.plans import make_specs

from quantkit import registry
from quantkit.contracts import Config
from quantkit.errors import RecipeError, UsageError
from quantkit.plan.choose_recipe import ChosenRecipe, choose_recipe
from quantkit.plan.plan import SourceFacts, make_plan, match_source, resolve_propagation
from quantkit.plan.recipe_draft import RecipeRequest
from quantkit.recipe.parse import parse_recipe
from quantkit.recipe.write_recipe import Choice, Section, write_recipe

MODEL_TYPES = registry.list_names("architectures")


def make_facts(model_type: str, revision: str | None = None, **changes: object) -> SourceFacts:
    """Return the facts of a model with a TINY config, from the hub at `revision`."""
    values = make_tiny_config(model_type, **changes)
    return SourceFacts(
        model="org/name",
        revision=revision,
        config=Config(values=values),
        specs=make_specs(values),
        fingerprint=None,
        where="org/name",
    )


def choose(model_type: str, /, revision: str | None = None, **request: object) -> ChosenRecipe:
    """Choose a recipe for a TINY model."""
    facts = make_facts(model_type, revision)
    asked = RecipeRequest(model="org/name")
    return choose_recipe(replace(asked, **request), facts, match_source(facts))  # type: ignore[arg-type]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_chosen_recipe_is_planned_and_loaded_by_vllm(model_type: str) -> None:
    facts, chosen = make_facts(model_type), choose(model_type)
    plan = make_plan(
        chosen.recipe,
        facts,
        match_source(facts),
        chosen.recipe.format[0],
        budget_bytes=8 * 10**9,
        tokens={"calibration": 1024, "fidelity": 1024},
        hidden_bytes=4,
    )
    assert plan.schemes and "vLLM" in chosen.engines
    assert chosen.recipe.quantize.rounding == "gptq"
    assert chosen.recipe.calibration and chosen.recipe.calibration.shrinkage == 0.05


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_propagation_is_written_as_auto_resolves_it(model_type: str) -> None:
    facts, recipe = make_facts(model_type), choose(model_type).recipe
    layout = match_source(facts).layout
    automatic = recipe.model_copy(update={"propagate": "auto"})
    assert recipe.propagate == resolve_propagation(automatic, layout)
    has_experts = any(block.experts for block in layout.blocks)
    assert recipe.propagate == ("quantized" if has_experts else "both")


def test_text_parses_to_the_chosen_recipe_and_gives_each_choice_a_reason() -> None:
    chosen = choose("llama")
    assert parse_recipe(chosen.text, "x.yaml").hash == chosen.recipe.hash
    comments = " ".join(
        line.partition("#")[2].strip() for line in chosen.text.splitlines() if "#" in line
    )
    assert len(chosen.choices) > 8
    for key, _, reason in chosen.choices:
        assert reason in comments, key
    assert max(map(len, chosen.text.splitlines())) <= 100


@pytest.mark.parametrize(("width", "expected"), [(256, 128), (192, 64), (160, 32), (144, -1)])
def test_group_size_is_the_largest_that_divides_every_width(width: int, expected: int) -> None:
    facts = make_facts("llama", hidden_size=256, intermediate_size=width)
    chosen = choose_recipe(RecipeRequest(model="org/name"), facts, match_source(facts))
    assert chosen.recipe.quantize.group_size == expected


@pytest.mark.parametrize(
    ("model_type", "request_", "format_name", "symmetric"),
    [
        ("llama", {}, "awq", False),
        ("llama", {"bits": 8}, "compressed_tensors", True),
        ("llama", {"format": "compressed_tensors"}, "compressed_tensors", False),
        ("llama", {"method": "gptq"}, "compressed_tensors", True),
        ("llama", {"method": "gptq", "format": "gptq"}, "gptq", True),
        ("qwen3_moe", {"format": "compressed_tensors"}, "compressed_tensors", True),
        ("qwen3_moe", {"method": "gptq"}, "compressed_tensors", True),
    ],
)
def test_zero_points_are_what_the_engines_of_the_format_load(
    model_type: str, request_: dict[str, object], format_name: str, symmetric: bool
) -> None:
    recipe = choose(model_type, **request_).recipe
    assert (recipe.format, recipe.quantize.symmetric) == ((format_name,), symmetric)


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}
WIDE = {"hidden_size": 256, "q_lora_rank": 128, "kv_lora_rank": 128, "moe_intermediate_size": 128}


def choose_for_fp8(model_type: str, **request: object) -> ChosenRecipe:
    """Choose a recipe for a TINY model in FP8 blocks, whose sides are multiples of a block."""
    facts = make_facts(model_type, quantization_config=FP8, **WIDE)
    return choose_recipe(
        replace(RecipeRequest(model="org/name"), **request),  # type: ignore[arg-type]
        facts,
        match_source(facts),
    )


def test_mixture_in_fp8_blocks_keeps_them() -> None:
    chosen = choose_for_fp8("deepseek_v3")
    assert (chosen.recipe.format, chosen.recipe.quantize.method) == (
        ("compressed_tensors",),
        "gptq",
    )
    reasons = {key: reason for key, _, reason in chosen.choices}
    assert reasons["format"].startswith(
        "keeps the source's codes of the other linears, bit for bit"
    )
    assert "loaded by vLLM, SGLang" in reasons["format"]
    assert reasons["quantize.method"].endswith("whose scaling stops at kept codes")


def test_fp8_source_without_kept_blocks_is_chosen_like_another() -> None:
    assert choose_for_fp8("llama").recipe.format == ("awq",)


def test_requested_method_or_format_stays_for_an_fp8_source() -> None:
    assert choose_for_fp8("deepseek_v3", method="awq").recipe.format == ("awq",)
    awq = choose_for_fp8("deepseek_v3", format="awq").recipe
    assert (awq.format, awq.quantize.method) == (("awq",), "awq")


def test_methods_without_calibration_get_no_calibration_text() -> None:
    recipe = choose("llama", method="nf4").recipe
    assert recipe.calibration is None and recipe.format == ("bitsandbytes",)
    assert recipe.fidelity is not None and "propagate" not in choose("llama", method="rtn").text
    assert choose("llama", method="rtn").recipe.quantize.rounding == "nearest"


def test_sequences_are_not_longer_than_the_context() -> None:
    facts = make_facts("llama", max_position_embeddings=100)
    recipe = choose_recipe(RecipeRequest(model="a/b"), facts, match_source(facts)).recipe
    assert recipe.calibration is not None and recipe.fidelity is not None
    assert recipe.calibration.length == recipe.fidelity.length == 100


def test_hub_model_is_pinned_to_the_commit_whose_headers_were_read() -> None:
    assert choose("llama", revision="a" * 40).recipe.source.revision == "a" * 40


@pytest.mark.parametrize(
    ("model", "path"),
    [
        ("org/Name-1.5B", "artifacts/Name-1.5B-awq4"),
        ("/data/my model/", "artifacts/my-model-awq4"),
        ("/", "artifacts/model-awq4"),
        ("models/.hidden", "artifacts/hidden-awq4"),
        ("builtin:tiny-v3", "artifacts/tiny-v3-awq4"),
        ("/data/名前", "artifacts/model-awq4"),
    ],
)
def test_output_is_a_plain_folder_below_the_working_folder(model: str, path: str) -> None:
    assert choose("llama", model=model).recipe.output.path == path


@pytest.mark.parametrize(
    "model", ["null", "1e5", "a: b", "it's # odd", '"quoted"', "[list]", "~/models/x", "-", "名前"]
)
def test_names_that_yaml_would_read_as_something_else_are_quoted(model: str) -> None:
    section = Section(name="source", choices=(Choice(key="model", value=model, is_text=True),))
    rest = Section(
        name="",
        choices=(Choice(key="fidelity", value="none"), Choice(key="output", value="{path: x}")),
    )
    text = write_recipe(f"a title of {model}\nversion: 2", (section, rest))
    assert parse_recipe(text, "x.yaml").source.model == model


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"method": "agq"}, "--method: no method named 'agq'. Did you mean"),
        ({"format": "ggml"}, "--format: no format named 'ggml'"),
        ({"rules": "experts"}, "--rules: no rules named 'experts'"),
        ({"method": "nf4", "bits": 8}, "--bits: expected 4 with method nf4, found 8"),
        ({"scheme": "nvfp"}, "--scheme: no scheme named 'nvfp'. Did you mean"),
        ({"scheme": "nvfp4", "bits": 8}, "--bits: expected 4 with scheme nvfp4, found 8"),
        ({"scheme": "mxfp4", "method": "nf4"}, "--method: expected gptq, awq, rtn or rtn_mse with"),
    ],
)
def test_unknown_names_are_usage_errors(request_: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message.replace("?", r"\?")):
        choose("llama", **request_)


def test_a_format_that_cannot_hold_the_request_is_refused_with_its_reason() -> None:
    with pytest.raises(RecipeError, match="read AWQ with 4-bit integers only, found 8 bits"):
        choose("llama", format="awq", bits=8)


@pytest.mark.parametrize(("scheme", "group_size"), [("nvfp4", 16), ("mxfp4", 32)])
@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_fp4_is_chosen_on_request(model_type: str, scheme: str, group_size: int) -> None:
    chosen = choose(model_type, scheme=scheme)
    quantize = chosen.recipe.quantize
    assert (quantize.scheme, quantize.method, quantize.rounding) == (scheme, "gptq", "gptq")
    assert quantize.group_size == group_size and chosen.recipe.format == ("compressed_tensors",)
    assert "vLLM" in chosen.engines and "SGLang" not in chosen.engines
    assert ("transformers" in chosen.engines) == (model_type == "llama")
    assert chosen.recipe.output.path == f"artifacts/name-gptq-{scheme}"
    assert f"gptq, {scheme}, format compressed_tensors" in chosen.title
    with pytest.raises(RecipeError, match="found .*fp4; use format compressed_tensors"):
        choose("llama", scheme=scheme, format="awq")
