"""Plans: made from shapes alone, complete, and with all faults reported at once."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support.paths import ROOT
from support.plans import make_specs, plan_checkpoint
from tools.calibration_sets.specs import TINY_HELD_OUT, format_spec

from quantkit import registry
from quantkit.artifact.model_files import make_config
from quantkit.contracts import Config, TensorSpec
from quantkit.errors import CheckpointError, RecipeError, UsageError
from quantkit.plan import sources
from quantkit.plan.output_tensors import split_into_shards
from quantkit.plan.plan import Plan, SourceFacts, match_source
from quantkit.plan.plan_schema import PlanSummary
from quantkit.plan.summary import summarize_plan
from quantkit.recipe.parse import parse_recipe
from quantkit.texts.corpus_files import bound_sequences
from quantkit.texts.corpus_spec import read_spec

FLAGSHIP = ROOT / "recipes" / "v3-awq4.yaml"

DEEPSEEK_V3 = 671_026_419_200
"""Parameters without the MTP layer, from the shapes in the published config.

The hub's card says 671 B.
"""

EXPERTS = 58 * 256 * 3

PLAN_PROGRAM = """
import sys, time
began = time.process_time()
from quantkit.cli.main import main
main(["plan", sys.argv[1], "--json"], standalone_mode=False)
from quantkit.io.host import get_peak_memory
used = get_peak_memory()
print(f"{time.process_time() - began} {used}", file=sys.stderr)
"""


# -------------------------------------------------------------------------------------- small plans


def faults_of(**keys: Any) -> tuple[str, ...]:
    """Return every fault of a recipe that the plan refuses."""
    with pytest.raises(RecipeError) as caught:
        plan_checkpoint(**keys)
    return caught.value.faults


def list_quantized(plan: Plan) -> list[str]:
    """Return the names of the quantized linears."""
    return [name for name, decision in plan.decisions.items() if decision.action == "quantize"]


def outputs(plan: Plan) -> dict[str, TensorSpec]:
    """Return every output tensor by name."""
    return {spec.name: spec for shard in plan.shards for spec in shard.tensors}


# ------------------------------------------------------------------------------------- the flagship


@pytest.fixture(scope="module")
def flagship() -> Plan:
    """Return the plan of recipes/v3-awq4.yaml from the published config, without a network."""
    overrides = {  # as `auto` has them where the hub is reachable
        "calibration.set": "everyday",
        "fidelity.set": "everyday-heldout",
        "compute.device": "cpu",
    }
    recipe = parse_recipe(FLAGSHIP.read_text(encoding="utf-8"), "recipes/v3-awq4.yaml", overrides)
    actual = sources.find_published_config(recipe.source.model)
    assert actual is not None
    facts = SourceFacts(
        model=recipe.source.model,
        revision=None,
        config=actual[1],
        specs=None,
        fingerprint=None,
        where=actual[0],
    )
    (plan,) = sources.plan_recipe(recipe, facts)
    return plan


@pytest.fixture(scope="module")
def flagship_summary(flagship: Plan) -> PlanSummary:
    return summarize_plan(flagship)


def test_flagship_has_671_billion_parameters(flagship: Plan, flagship_summary: PlanSummary) -> None:
    source = flagship_summary.source
    assert source.parameters_without_mtp == DEEPSEEK_V3
    assert (
        source.parameters
        == sum(spec.n_elements for spec in flagship.specs.values())
        == 684_489_845_504
    )
    assert source.dtype == "FP8 128x128"
    assert source.read_from == "the published config; sizes are computed, no header was read"


def test_flagship_quantizes_routed_experts_only(flagship: Plan) -> None:
    pattern = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(gate|up|down)_proj")
    actual = Counter()
    for name in list_quantized(flagship):
        match = pattern.fullmatch(name)
        assert match, name
        actual[int(match[1])] += 1
    assert actual == dict.fromkeys(range(3, 61), 256 * 3)
    assert sum(actual.values()) == EXPERTS == 44_544
    kept = Counter(
        d.linear.role
        for d in flagship.decisions.values()
        if d.action == "keep" and d.rule != "mtp: keep"
    )
    assert kept == {
        "attention": 61 * 5,
        "mlp": 9,
        "shared_expert": 174,
        "router": 58,
        "embedding": 1,
        "head": 1,
    }


def test_flagship_bytes(flagship: Plan, flagship_summary: PlanSummary) -> None:
    experts, others, mtp = flagship_summary.rules
    weights = EXPERTS * 2048 * 7168
    assert (experts.label, experts.action, experts.modules) == (
        "rules[0]",
        "awq+gptq int4 g128 asymmetric",
        EXPERTS,
    )
    assert experts.parameters == weights
    assert (
        experts.bytes_before == weights + EXPERTS * 4 * 16 * 56
    )  # FP8, and a float32 scale per 128x128 block
    groups = weights // 128
    assert (
        experts.bytes_after == weights // 2 + groups * 2 + groups // 2
    )  # four bits, bf16 scales, 4-bit zero points
    assert experts.bits_per_weight == 8 * experts.bytes_after / weights == 4.15625
    assert (others.label, others.action, others.bits_per_weight) == ("rules[1]", "keep", 16.0)
    assert others.bytes_after == 2 * others.parameters
    assert (mtp.label, mtp.modules, mtp.bits_per_weight) == ("mtp: keep", 780, 16.0)
    linears = sum(linear.n_parameters for linear in flagship.layout.linears)
    assert experts.parameters + others.parameters + mtp.parameters == linears
    assert flagship_summary.totals.bytes_after == sum(
        spec.n_bytes for spec in outputs(flagship).values()
    )


def test_flagship_tensors_have_the_layout_of_awq(flagship: Plan) -> None:
    """[out, in] in AWQ's layout: eight codes of neighbouring rows in one word, one scale per 128
    inputs.
    """
    held, name = outputs(flagship), "model.layers.30.mlp.experts.255"
    for projection, (out, into) in {"gate_proj": (2048, 7168), "down_proj": (7168, 2048)}.items():
        assert (
            held[f"{name}.{projection}.qweight"].dtype,
            held[f"{name}.{projection}.qweight"].shape,
        ) == (
            "I32",
            (into, out // 8),
        )
        assert held[f"{name}.{projection}.scales"].dtype == "BF16"
        assert held[f"{name}.{projection}.scales"].shape == (into // 128, out)
        assert held[f"{name}.{projection}.qzeros"].shape == (into // 128, out // 8)
        assert f"{name}.{projection}.weight" not in held
    assert not any(
        key.endswith("_scale_inv") or spec.dtype.startswith("F8") for key, spec in held.items()
    )
    assert held["model.layers.3.mlp.gate.e_score_correction_bias"].dtype == "F32"


def test_flagship_shards_and_memory_keep_their_limits(flagship: Plan) -> None:
    limit = flagship.recipe.output.shard_bytes
    assert all(shard.n_bytes <= limit or len(shard.tensors) == 1 for shard in flagship.shards)
    assert len(flagship.shards) == 81
    assert [s.file for s in flagship.shards] == [
        f"model-{i:05d}-of-00081.safetensors" for i in range(1, 82)
    ]
    memory = flagship.memory
    assert memory.needed_bytes <= memory.peak_bytes <= memory.budget_bytes == 64 * 10**9
    assert 1 < memory.wave_experts < 256
    assert memory.slice_experts == 16 and memory.wave_experts % 16 == 0
    assert memory.peak_bytes + 16 * memory.expert_bytes > memory.budget_bytes  # not one more slice
    assert flagship.warnings == (
        "format awq cannot hold FP8 blocks: kept weights are stored as BF16",
    )


@pytest.mark.parametrize(
    "environment",
    [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}],
    ids=["offline", "unreachable"],
)
def test_flagship_is_planned_without_a_network(environment: dict[str, str], tmp_path: Path) -> None:
    """10 s of CPU time and 1 GiB are promised; a busy machine may take three times as long."""
    done = subprocess.run(
        [sys.executable, "-c", PLAN_PROGRAM, str(FLAGSHIP)],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(tmp_path / "hub"), "OMP_NUM_THREADS": "1", **environment},
    )
    seconds, n_bytes = map(float, done.stderr.splitlines()[-1].split())
    assert seconds < 30
    assert n_bytes < 2**30
    summary = PlanSummary.model_validate(json.loads(done.stdout))
    assert summary.source.parameters_without_mtp == DEEPSEEK_V3
    assert summary.rules[0].modules == EXPERTS
    assert summary.memory.peak <= summary.memory.budget


def test_hub_model_without_a_published_config_needs_the_hub(tmp_path: Path) -> None:
    program = (
        f"from quantkit.cli.main import main; main(['plan', {str(FLAGSHIP)!r}, '--set', "
        "'source.model=org/other'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: org/other: expected to reach ")
    assert "offline mode (HF_HUB_OFFLINE)" in done.stderr and "Traceback" not in done.stderr


# ------------------------------------------------------------------------------------------- shards


def test_shards_keep_order_and_size_limit() -> None:
    tensors = [
        TensorSpec(name=f"t{i}", dtype="U8", shape=(size,))
        for i, size in enumerate((4, 4, 3, 9, 1, 6))
    ]
    cut = split_into_shards(tensors, 8)
    assert [[spec.name for spec in shard.tensors] for shard in cut] == [
        ["t0", "t1"],
        ["t2"],
        ["t3"],
        ["t4", "t5"],
    ]
    assert [shard.n_bytes for shard in cut] == [
        8,
        3,
        9,
        7,
    ]  # a tensor larger than the limit stands alone
    assert [shard.file for shard in cut] == [
        f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)
    ]
    assert [shard.file for shard in split_into_shards(tensors, 100)] == ["model.safetensors"]


# ------------------------------------------------------------------------------------- rules decide


def test_default_preset_follows_the_family() -> None:
    """Without rules: routed experts where there are some, else every linear.

    Protected ones never.
    """
    deepseek, llama = plan_checkpoint(), plan_checkpoint("llama")
    assert {deepseek.decisions[name].linear.role for name in list_quantized(deepseek)} == {
        "routed_expert"
    }
    assert {llama.decisions[name].linear.role for name in list_quantized(llama)} == {
        "attention",
        "mlp",
    }
    assert [rule.label for rule in deepseek.rules] == ["experts-only[0]", "experts-only[1]"]
    assert (
        llama.decisions["lm_head"].action == llama.decisions["model.embed_tokens"].action == "keep"
    )


@pytest.mark.parametrize(
    ("preset", "roles"),
    [
        ("experts-only", {"routed_expert"}),
        ("all-linear", {"attention", "mlp", "shared_expert", "routed_expert"}),
        ("attention-source", {"mlp", "shared_expert", "routed_expert"}),
    ],
)
def test_named_preset_selects_roles(preset: str, roles: set[str]) -> None:
    plan = plan_checkpoint(rules=preset)
    assert {plan.decisions[name].linear.role for name in list_quantized(plan)} == roles


def test_first_matching_rule_applies() -> None:
    rules = '[{match: "*.layers.0.*", keep: source}, {match: "*.mlp.*", quantize: default}]'
    plan = plan_checkpoint("llama", rules=rules)
    assert list_quantized(plan) == [
        f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")
    ]
    assert plan.decisions["model.layers.0.mlp.up_proj"].rule == "rules[0]"
    assert plan.decisions["model.layers.1.self_attn.q_proj"].rule == "no rule"


def test_router_embedding_and_head_are_matched_by_name_only() -> None:
    """`*` passes them by; a rule that spells them out reaches them, and the format has the last
    word.
    """
    wide = '{match: "*", quantize: default}'
    assert not {"model.embed_tokens", "lm_head"} & set(
        list_quantized(plan_checkpoint("llama", rules=f"[{wide}]"))
    )
    for module, role in {
        "model.layers.1.mlp.gate": "router",
        "lm_head": "head",
        "model.embed_tokens": "embed",
    }.items():
        named = f'[{{match: "*{module.rpartition(".")[2]}", quantize: default}}, {wide}]'
        [fault] = faults_of(rules=named)
        assert fault.startswith("r.yaml: rules[0]: ") and role in fault and f"({module})" in fault
        if role != "router":  # no format changes that the build stores them as they are
            [fault] = faults_of(rules=named, format="dense")
            assert "the build quantizes inside blocks only" in fault


def test_rule_that_applies_to_no_linear_is_a_warning() -> None:
    """It is no fault: earlier rules may cover a preset at the end of a list."""
    shadowed = plan_checkpoint(
        "llama", rules='[{match: "*", quantize: default}, {match: "*.q_proj", keep: source}]'
    )
    assert shadowed.warnings[-1].startswith("rules[1]: '*.q_proj' applies to no linear: ")
    unnamed = plan_checkpoint(
        "llama", rules='[{match: "re:lm_.*", quantize: default}, {match: "*", keep: source}]'
    )
    assert unnamed.decisions["lm_head"].action == "keep"
    assert any(
        warning.startswith("rules[0]: 're:lm_.*' applies to no linear: ")
        for warning in unnamed.warnings
    )
    assert not any(
        "applies to no linear" in warning for warning in plan_checkpoint("llama").warnings
    )


def test_keeping_everything_is_a_warning() -> None:
    plan = plan_checkpoint(rules='[{match: "*", keep: source}]', quantize="{method: rtn}")
    assert "no linear is quantized: the artifact is a copy of the source" in plan.warnings
    assert "quantization_config" not in make_config(plan)
    assert not plan.needs_calibration
    assert {n: (s.dtype, s.shape) for n, s in outputs(plan).items()} == {
        n: (s.dtype, s.shape) for n, s in plan.specs.items()
    }


# ------------------------------------------------------------------------------ faults, all at once


def test_rule_that_matches_nothing_is_a_fault() -> None:
    text = '\n  - {match: "*.mlp.exprts.*", quantize: default}\n  - {match: "*", keep: source}'
    assert faults_of(rules=text) == (
        "r.yaml:9: rules[0]: '*.mlp.exprts.*' matches no linear of this model; expected a glob or "
        "re:regex over names like 'model.layers.0.self_attn.q_a_proj'",
    )


def test_written_preset_that_matches_nothing_is_a_fault() -> None:
    """experts-only on a dense model is refused if written, and never a default."""
    [fault] = faults_of(model_type="llama", rules="experts-only")
    assert fault.startswith(
        r"r.yaml:8: experts-only[0]: 're:.*\\.experts\\.\\d+\\.[^.]+' matches no linear of"
    )


def test_group_size_that_does_not_divide_is_a_fault() -> None:
    [fault] = faults_of(quantize="{group_size: 128}", config={"moe_intermediate_size": 192})
    assert fault == (
        "r.yaml: experts-only[0]: group_size 128 does not divide 192 input features; use 64 or 32 "
        "(model.layers.1.mlp.experts.0.down_proj and 7 more)"
    )


def test_fused_linears_with_two_decisions_are_a_fault() -> None:
    rules = '[{match: "*.q_proj", keep: source}, {match: "*", quantize: default}]'
    faults = faults_of(model_type="llama", rules=rules)
    assert faults == tuple(
        f"r.yaml: model.layers.{layer}: vLLM and SGLang merge these linears when loading, so they "
        f"need one decision, found 2: model.layers.{layer}.self_attn.q_proj (rules[0]: keep), "
        f"model.layers.{layer}.self_attn.k_proj (rules[1]: quantize)"
        for layer in range(2)
    )


def test_experts_of_one_layer_are_one_fused_group() -> None:
    rules = (
        '[{match: "*.experts.3.down_proj", keep: source}, {match: "*.experts.*", quantize: '
        "default}]"
    )
    [fault] = faults_of(rules=rules)
    assert fault.startswith(
        "r.yaml: model.layers.1: vLLM and SGLang merge these linears when loading"
    )


def test_two_schemes_in_a_format_for_one_are_a_fault() -> None:
    rules = '[{match: "*.down_proj", quantize: {group_size: 32}}, {match: "*", quantize: default}]'
    [fault] = faults_of(model_type="llama", rules=rules)
    assert fault == (
        "r.yaml: format awq holds one scheme per artifact, found 2: "
        "model.layers.0.self_attn.q_proj (group_size: 64), model.layers.0.mlp.down_proj "
        "(group_size: 32); use one for all rules, or format compressed_tensors or gptq"
    )


def test_only_merging_engines_require_one_decision() -> None:
    """Not where codes are for others, nor in plain weights.

    The routed experts of a block are solved as one.
    """
    rules = '[{match: "*.q_proj", keep: source}, {match: "*", quantize: default}]'
    for quantize, name in (
        ("{method: rtn, group_size: 64}", "dense"),
        ("{method: nf4}", "bitsandbytes"),
        ("{method: rtn, bits: 3, group_size: 64}", "gptq_v2"),
    ):
        assert plan_checkpoint(model_type="llama", rules=rules, quantize=quantize, format=name)
    experts = '[{match: "*.down_proj", keep: source}, {match: "*.experts.*", quantize: default}]'
    [fault] = faults_of(rules=experts, quantize="{method: nf4}", format="bitsandbytes")
    assert fault.startswith(
        "r.yaml: model.layers.1: quantkit quantizes and loads the routed experts of a block "
        "together"
    )


def test_message_names_the_keys_in_which_schemes_differ() -> None:
    rules = (
        '[{match: "*.down_proj", quantize: {double_quant: false}}, {match: "*", quantize: default}]'
    )
    [fault] = faults_of(
        model_type="llama", rules=rules, quantize="{method: nf4}", format="bitsandbytes"
    )
    assert (
        "self_attn.q_proj (double_quant: true)" in fault
        and "down_proj (double_quant: false)" in fault
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            "symmetric: true",
            "read AWQ with zero points, found symmetric: true; use symmetric: false",
        ),
        ("bits: 3", "read AWQ with 4-bit integers only, found 3 bits; "),
        ("bits: 8", "read AWQ with 4-bit integers only, found 8 bits; "),
        ("group_size: -1", "fails on -1; use 128, 64 or 32"),
    ],
)
def test_scheme_that_awq_cannot_hold_is_a_fault(change: str, words: str) -> None:
    [fault] = faults_of(quantize=f"{{{change}}}")
    assert fault.startswith("r.yaml: experts-only[0]: ") and words in fault
    assert fault.endswith(
        " (model.layers.1.mlp.experts.0.gate_proj and 23 more)"
    )  # one sentence for all of them


def test_memory_that_is_too_small_is_a_fault() -> None:
    needed = plan_checkpoint().memory.needed_bytes
    [fault] = faults_of(budget=needed - 1, memory="1GB")
    assert re.fullmatch(
        r"r\.yaml:8: memory: the smallest wave \(one expert\) needs \d\.\d\d GB \(base 0\.90, "
        r"block without experts "
        r"0\.\d\d, one batch 0\.\d\d, one expert 0\.\d\d, head 0\.\d\d\), found \d\.\d\d GB; raise "
        r"memory or free some",
        fault,
    )
    output = float(fault.partition("needs ")[2].partition(" GB")[0])
    assert (
        plan_checkpoint(budget=int(output * 1e9)).memory.peak_bytes <= output * 1e9
    )  # the printed text suffices
    assert "the largest block needs" in faults_of(model_type="llama", budget=10**6)[0]


def test_missing_calibration_is_a_fault() -> None:
    assert faults_of(calibration="null") == (
        "r.yaml:4: calibration: method awq needs a set, found none",
    )
    assert not plan_checkpoint(
        calibration="null", quantize="{method: rtn, group_size: 64}"
    ).needs_calibration


def test_all_faults_are_reported_at_once() -> None:
    rules = """
  - {match: "*.nothing", keep: source}
  - {match: "*.q_proj", keep: source}
  - {match: "*.down_proj", quantize: {symmetric: true}}
  - {match: "*", quantize: {group_size: 128}}"""
    faults = faults_of(
        model_type="llama",
        rules=rules,
        calibration="null",
        budget=10**6,
        config={"intermediate_size": 320},
    )
    for part in (
        "rules[0]: '*.nothing' matches no linear",
        "rules[2]: ",
        "format awq holds one scheme per artifact, found 2",
        "model.layers.0: vLLM and SGLang merge",
        "model.layers.1: vLLM and SGLang merge",
        "needs a set, found none",
        "the largest block needs",
    ):
        assert sum(part in fault for fault in faults) == 1, part
    assert all("\n" not in fault for fault in faults)


# ---------------------------------------------------------------------------------------------- MTP


@pytest.mark.parametrize("mtp", ["keep", "quantize", "drop"])
def test_mtp_key_without_an_mtp_layer_is_a_warning(mtp: str) -> None:
    output = [
        warning
        for warning in plan_checkpoint("llama", rules="all-linear", mtp=mtp).warnings
        if "mtp" in warning
    ]
    missing = f"mtp: {mtp}: the model has no multi-token-prediction layer; the key has no effect"
    assert output == ([] if mtp == "keep" else [missing])


@pytest.mark.parametrize("mtp", ["keep", "quantize", "drop"])
def test_mtp_layer_is_dropped_only_if_the_recipe_says_so(mtp: str) -> None:
    plan = plan_checkpoint(mtp=mtp)
    inside = {
        name: spec for name, spec in outputs(plan).items() if name.startswith("model.layers.2.")
    }
    experts = [
        name for name in list_quantized(plan) if name.startswith("model.layers.2.mlp.experts.")
    ]
    assert bool(inside) == (mtp != "drop")
    assert len(experts) == (8 * 3 if mtp == "quantize" else 0)
    assert make_config(plan)["num_nextn_predict_layers"] == (0 if mtp == "drop" else 1)
    assert plan.source.config.integer("num_nextn_predict_layers") == 1
    assert any("mtp-rtn" in warning for warning in plan.warnings) == (mtp == "quantize")
    if mtp != "drop":
        assert (
            "model.layers.2.eh_proj.weight" in inside
            and "model.layers.2.embed_tokens.weight" in inside
        )
        assert ("model.layers.2.mlp.experts.0.up_proj.weight" in inside) == (mtp == "keep")
    source = summarize_plan(plan).source
    assert source.parameters_without_mtp == sum(
        spec.n_elements
        for name, spec in plan.specs.items()
        if not name.startswith("model.layers.2.")
    )


def test_announced_mtp_layer_without_tensors_is_left_out() -> None:
    """Common in re-uploads: the block is left out with a warning, and removed from the config."""
    stored = {
        n: s
        for n, s in make_specs(registry.get_architecture("deepseek_v3").tiny).items()
        if ".layers.2." not in n
    }
    plan = plan_checkpoint(specs=stored)
    assert plan.warnings[0] == (
        "config.json announces the MTP block model.layers.2, the checkpoint has none of its "
        "tensors: left out"
    )
    assert [block.name for block in plan.layout.blocks] == ["model.layers.0", "model.layers.1"]
    assert make_config(plan)["num_nextn_predict_layers"] == 0
    assert summarize_plan(plan).source.parameters_without_mtp is None


def test_model_without_mtp_keeps_its_config() -> None:
    plan = plan_checkpoint(config={"num_nextn_predict_layers": 0})
    assert make_config(plan)["num_nextn_predict_layers"] == 0
    assert "num_nextn_predict_layers" not in make_config(plan_checkpoint("llama"))


# ---------------------------------------------------------------------- checkpoints that do not fit


def test_tied_embeddings_have_no_head() -> None:
    plan = plan_checkpoint("llama", config={"tie_word_embeddings": True})
    assert plan.layout.head is None and "lm_head" not in plan.decisions
    assert "lm_head.weight" not in outputs(plan)
    assert len(outputs(plan_checkpoint("llama"))) == len(outputs(plan)) + 1


def test_missing_unexpected_and_misshaped_tensors_are_reported_together() -> None:
    specs = make_specs(registry.get_architecture("llama").tiny)
    del specs["model.norm.weight"]
    specs["model.layers.9.extra"] = TensorSpec(
        name="model.layers.9.extra", dtype="BF16", shape=(3,)
    )
    specs["lm_head.weight"] = TensorSpec(name="lm_head.weight", dtype="BF16", shape=(700, 128))
    with pytest.raises(CheckpointError) as caught:
        plan_checkpoint("llama", specs=specs)
    assert str(caught.value) == (
        "org/name: the tensors do not fit model_type llama with this config.json: missing: "
        "model.norm.weight [128]; not claimed by the architecture: model.layers.9.extra "
        "(block 9; config.json announces 2 blocks, from 0 on); lm_head.weight: expected "
        "shape [768, 128], found [700, 128]; check that config.json and weights belong together"
    )


def test_many_faults_of_a_checkpoint_are_counted() -> None:
    with pytest.raises(
        CheckpointError,
        match=r"; and \d+ more; check that config\.json and weights belong together",
    ):
        plan_checkpoint("llama", specs={})


def test_unused_tensors_are_dropped_with_a_warning() -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    specs = {
        **make_specs(registry.get_architecture("llama").tiny),
        name: TensorSpec(name=name, dtype="F32", shape=(16,)),
    }
    plan = plan_checkpoint("llama", specs=specs)
    assert [item.name for item in plan.left_out] == [name] and name not in outputs(plan)
    assert plan.warnings[0] == (
        f"{name} left out: a table of rotary embeddings, which engines compute"
    )


@pytest.mark.parametrize(
    "entry",
    [
        {"quant_method": "gptq"},
        {"quant_method": "fp8"},
        {"quant_method": "fp8", "weight_block_size": [128, 64]},
        "int4",
    ],
)
def test_packed_sizes_are_not_assumed_without_headers(entry: object) -> None:
    values = {**registry.get_architecture("llama").tiny, "quantization_config": entry}
    facts = SourceFacts(
        model="org/name",
        revision=None,
        config=Config(values=values),
        specs=None,
        fingerprint=None,
        where="org/name",
    )
    with pytest.raises(CheckpointError) as caught:
        match_source(facts)
    assert "expected none or FP8 in square blocks, as no header is at hand" in str(caught.value)


def test_unknown_family_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"no architecture named 'lama'\. Did you mean 'llama'\?"):
        plan_checkpoint("llama", specs={}, config={"model_type": "lama"})


# ----------------------------------------------------------------------------------------- the rest


def test_scales_follow_the_dtype_of_the_source() -> None:
    for dtype, scales in {"bfloat16": "BF16", "float16": "F16"}.items():
        held = outputs(plan_checkpoint("llama", config={"torch_dtype": dtype}))
        assert held["model.layers.0.mlp.up_proj.scales"].dtype == scales
        assert held["model.norm.weight"].dtype == scales
    forced = outputs(plan_checkpoint("llama", quantize="{group_size: 64, scale_dtype: float16}"))
    assert forced["model.layers.0.mlp.up_proj.scales"].dtype == "F16"


def test_budget_changes_only_waves() -> None:
    large, small = plan_checkpoint(), plan_checkpoint(budget=plan_checkpoint().memory.needed_bytes)
    assert (large.memory.wave_experts, small.memory.wave_experts) == (8, 1)
    assert (large.shards, large.decisions, large.hash) == (
        small.shards,
        small.decisions,
        small.hash,
    )


def test_hash_follows_the_content() -> None:
    base = plan_checkpoint("llama").hash
    assert plan_checkpoint("llama").hash == base
    assert plan_checkpoint("llama", output="{path: elsewhere}").hash == base
    others = {
        "quantize": "{group_size: 32}",
        "rules": "attention-source",
        "output": "{path: out, shard_bytes: 1MB}",
    }
    assert all(
        plan_checkpoint("llama", **{key: value}).hash != base for key, value in others.items()
    )


# -------------------------------------------------------------------------- more text than there is


@pytest.mark.parametrize(
    ("key", "most"),
    [("calibration.sequences", 900), ("fidelity.windows", 250)],
    ids=["calibration", "fidelity"],
)
def test_more_sequences_than_a_set_has_are_refused(key: str, most: int) -> None:
    text = (ROOT / "recipes" / "tiny-v3-awq4.yaml").read_text(encoding="utf-8")

    def make_plans(count: int) -> None:
        recipe = parse_recipe(text, "tiny-v3-awq4.yaml", {key: str(count)})
        sources.plan_recipe(recipe, sources.resolve_source_facts(recipe))

    make_plans(most)
    with pytest.raises(
        RecipeError, match=rf"{key}: expected at most {most}, .* found {most + 1}; use fewer"
    ):
        make_plans(most + 1)


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        (3, "fidelity.windows: expected at least 4, one for each part of the set general-heldout"),
        (10_000, r"fidelity.windows: expected at most \d+, the size of the set general-heldout"),
    ],
)
def test_windows_that_a_built_in_mixture_does_not_have_are_refused(
    windows: int, message: str
) -> None:
    text = (ROOT / "recipes" / "tiny-v3-awq4.yaml").read_text(encoding="utf-8")
    changes = {"fidelity.set": "general-heldout", "fidelity.windows": str(windows)}
    recipe = parse_recipe(text, "tiny-v3-awq4.yaml", changes)
    with pytest.raises(RecipeError, match=message):
        sources.plan_recipe(recipe, sources.resolve_source_facts(recipe))


def test_plan_names_hash_and_python_of_built_in_text() -> None:
    text = (ROOT / "recipes" / "tiny-v3-awq4.yaml").read_text(encoding="utf-8")
    changes = {"fidelity.set": "general-heldout", "fidelity.windows": "8"}
    recipe = parse_recipe(text, "tiny-v3-awq4.yaml", changes)
    (plan,) = sources.plan_recipe(recipe, sources.resolve_source_facts(recipe))
    rows = {row.part: row for row in plan.texts if row.use == "fidelity"}
    assert re.match(rf"[0-9a-f]{{12}}, \w+ {platform.python_version()}, ", rows["manuals"].version)
    assert re.match(r"[0-9a-f]{12}, generated exercises", rows["exercises"].version)
    assert rows["modules"].license == "PSF-2.0"


def test_windows_are_bounded_by_the_bytes_of_their_text(tmp_path: Path) -> None:
    """Each token has at least one byte; a window may begin with a BOS outside of the text."""
    rows = json.dumps({"domain": "prose", "text": "x" * 70}) + "\n"
    (tmp_path / "some.jsonl").write_text(rows)
    spec = dataclasses.replace(TINY_HELD_OUT, name="some", end="none", packing="windows")
    set_file = tmp_path / "some.yaml"
    set_file.write_text(format_spec(spec, hashlib.sha256(rows.encode()).hexdigest(), {"prose"}))
    assert bound_sequences(read_spec(str(set_file), tmp_path), 11) == len(rows) // 10
    (tmp_path / "some.jsonl").unlink()
    assert bound_sequences(read_spec(str(set_file), tmp_path), 11) is None
