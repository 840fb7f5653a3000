"""Families without a table: derived if every check passes, else rejected with the reason."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from support.checkpoints import make_recipe_text, make_tiny_config
from support.underived_models import FAMILIES, REPLAYED, family, write_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from quantkit import pipeline, registry
from quantkit.architectures.components.decoder import TINY_COMMON
from quantkit.artifact import load_model
from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.cli.main import main
from quantkit.contracts import (
    Absorber,
    Architecture,
    Block,
    Config,
    HeadRows,
    Layout,
    LinearGroup,
    Scheme,
)
from quantkit.errors import ArtifactError, CheckpointError, UsageError
from quantkit.models import (
    block_trial,
    derive,
    full_model,
    inspect,
    layout_checks,
    small_instance,
    stored_names,
)
from quantkit.models.layer_calls import LayerCall
from quantkit.models.layers import make_meta_model
from quantkit.models.state_rows import StateForm
from quantkit.plan.plan import Plan
from quantkit.progress import Progress
from quantkit.recipe.parse import parse_recipe
from quantkit.verify import shallow

pytestmark = pytest.mark.usefixtures("quick_builds")

SCALED = {
    "olmo2": {"self_attn.o_proj", "mlp.down_proj"},
    "phi3": {"self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"},
    "starcoder2": {"self_attn.q_proj", "self_attn.o_proj", "mlp.c_fc"},
    "persimmon": {"self_attn.query_key_value", "self_attn.dense", "mlp.dense_h_to_4h"},
    "smollm3": {"self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"},
}
"""The first reader of each input of a block that can be scaled."""


def derive_architecture(config: dict[str, object]) -> Architecture:
    return derive.derive_architecture(Config(values=config))


def layout_of(config: dict[str, object]) -> Layout:
    return derive_architecture(config).layout(Config(values=config))


def reason(config: dict[str, object]) -> str:
    """Return the reason why a config is rejected."""
    with pytest.raises(CheckpointError) as caught:
        derive_architecture(config)
    text = str(caught.value)
    start = (
        f"config.json: model_type {config['model_type']!r} has no table in quantkit, and none can "
        "be derived: "
    )
    assert text.startswith(start) and "\n" not in text and len(text) < 900
    assert "use a model of a family that has one (deepseek_v2, deepseek_v3, " in text
    return text.removeprefix(start).partition("; use a model of a family")[0]


def ignore(_: Progress | Sequence[Plan]) -> None:
    """Ignore progress."""


# ---------------------------------------------------------------------------------- derived layouts


def group_table(block: Block) -> dict[frozenset[str], tuple[str, tuple[int, ...] | None] | None]:
    """Return a block's groups without names and order: readers -> absorber with its rows."""
    widths = {linear.name: linear.in_features for linear in block.linears}
    result: dict[frozenset[str], tuple[str, tuple[int, ...] | None] | None] = {}
    for group in block.groups:
        absorber = group.absorber
        rows = None
        if absorber and absorber.module in widths:
            rows = tuple(
                absorber.rows.index() if absorber.rows else range(widths[group.readers[0]])
            )
        result[frozenset(group.readers)] = (absorber.module, rows) if absorber else None
    return result


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {}),
        (
            "llama",
            {
                "num_key_value_heads": 4,
                "attention_bias": True,
                "mlp_bias": True,
                "tie_word_embeddings": True,
            },
        ),
        ("mistral", {"sliding_window": 16}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16}),
        ("qwen3", {"tie_word_embeddings": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "plain",
)
def test_derived_layout_equals_table(model_type: str, changes: dict[str, object]) -> None:
    """Families with a table, derived: same tensors, readers and absorbers."""
    config = make_tiny_config(model_type, **changes)
    table, result = (
        registry.get_architecture(model_type).layout(Config(values=config)),
        layout_of(config),
    )
    assert [group_table(block) for block in result.blocks] == [
        group_table(block) for block in table.blocks
    ]
    assert {linear.name: linear for linear in result.linears} == {
        linear.name: linear for linear in table.linears
    }
    for derived_block, table_block in zip(result.blocks, table.blocks, strict=True):
        assert {spec.name: spec.shape for spec in derived_block.others} == {
            spec.name: spec.shape for spec in table_block.others
        }
        assert set(derived_block.fused) == set(table_block.fused)
    assert (result.head, result.final_tensors) == (table.head, table.final_tensors)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_scalable_inputs_of_derived_layout(model_type: str) -> None:
    layout = layout_of(family(model_type))
    for block in layout.blocks:
        readers = [reader for group in block.groups for reader in group.readers]
        assert sorted(readers) == sorted(linear.name for linear in block.linears)
        scaled = {
            group.readers[0].removeprefix(f"{block.name}.")
            for group in block.groups
            if group.absorber
        }
        assert scaled == SCALED[model_type]


def trial(model_type: str) -> block_trial.BlockTrial:
    """Make a trial of the first block of a small instance."""
    config = Config(values=family(model_type))
    bones = make_meta_model(
        small_instance.reduce_config(config, skeleton_of(config)),
        torch.device("cpu"),
        torch.float32,
    )
    names, tensors = stored_names.find_stored_names(
        bones, small_instance.make_random_tensors(bones)
    )
    layout = inspect.inspect_layout(config, bones, names)
    rows = torch.randn(
        sum(block_trial.LENGTHS),
        layout.embedding.in_features,
        generator=torch.Generator().manual_seed(5),
    )
    block = layout.blocks[0]
    return block_trial.BlockTrial(
        config=config,
        meta_model=bones,
        block=block,
        tensors=block_trial.select_block_tensors(block, tensors),
        rows=rows,
    )


def skeleton_of(config: Config) -> Any:
    return make_meta_model(config, torch.device("cpu"), torch.float32)


def test_wrong_absorber_fails_the_check() -> None:
    """gate_proj passes through the activation; a missing reader reads a scaled input."""
    case = trial("smollm3")
    readings = layout_checks.find_absorbers(case, case.readings())
    groups = {
        g.readers[0].rpartition(".")[2]: g
        for g in layout_checks.make_groups(case.block, readings, case.meta_model.config)
    }
    assert case.holds(tuple(groups.values()))
    mlp = f"{case.block.name}.mlp"
    assert not case.holds((
        replace(groups["down_proj"], absorber=Absorber(module=f"{mlp}.gate_proj")),
    ))
    assert not case.holds((replace(groups["gate_proj"], readers=(f"{mlp}.gate_proj",)),))
    values = groups["o_proj"].absorber
    assert values is not None and isinstance(values.rows, HeadRows)
    shifted = replace(values, rows=replace(values.rows, stride=0))
    assert not case.holds((replace(groups["o_proj"], absorber=shifted),))


def test_modules_that_a_short_text_does_not_need() -> None:
    """An indexer that selects all of so few tokens: states after the block show no wrong fold."""
    case = trial("axk2")
    indexer, silent = "self_attn.indexer", case.find_silent_modules()
    assert silent == {f"{indexer}.{x}": True for x in ("wk", "k_norm", "weights_proj", "wq_b")}
    own = f"{case.block.name}.{indexer}"
    norm = Absorber(module=f"{own}.k_norm")
    wrong = LinearGroup(name="wrong", readers=(f"{own}.wq_b",), absorber=norm)
    assert case.holds((wrong,)) and not replace(case, silent=silent).holds((wrong,))


def test_silent_module_that_shows_nothing_reads_no_scaled_input() -> None:
    case = trial("smollm3")
    readers = tuple(f"{case.block.name}.self_attn.{x}_proj" for x in "qkv")
    norm = Absorber(module=f"{case.block.name}.input_layernorm")
    group = LinearGroup(name="right", readers=readers, absorber=norm)
    assert case.find_silent_modules() == {} and case.holds((group,))
    assert not replace(case, silent={"self_attn.q_proj": False}).holds((group,))
    # no parameter of its own multiplies its input
    assert replace(case, silent={"self_attn": False}).holds((group,))


def test_absorber_of_another_width_in_the_real_model() -> None:
    """Equal widths of the small instance may differ in the real model."""
    block = trial("axk2").block
    reading = block_trial.InputReaders(
        readers=("mlp.down_proj",), absorber="post_attention_layernorm"
    )
    assert layout_checks.make_absorber(block, reading, None) is None
    fitting = replace(reading, readers=("mlp.gate_proj",))
    assert layout_checks.make_absorber(block, fitting, None) is not None


def test_different_logits_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check can fail: here the layers lack their windows."""
    run = LayerCall.run

    def run_without_mask(
        call: LayerCall, layer: nn.Module, form: StateForm, rows: Tensor
    ) -> Tensor:
        changed = replace(call, keywords={**call.keywords, "attention_mask": None})
        return run(changed, layer, form, rows)

    monkeypatch.setattr(LayerCall, "run", run_without_mask)
    assert "gives other logits than transformers" in reason(family("phi3"))


def test_arguments_that_depend_on_tokens_are_rejected() -> None:
    """Layers of Gemma 4 read an embedding of their own for each token."""
    sizes = {"hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 768}
    config = family("gemma4_text", head_dim=32, num_kv_shared_layers=0, **sizes)
    assert "another argument than states and token ids that depends on the text" in reason(config)


def test_weight_that_is_used_without_a_call_is_kept() -> None:
    """Mamba's scan multiplies by the weight of dt_proj itself."""
    layout = layout_of(family("mamba", state_size=16, time_step_rank=8, pad_token_id=0))
    for block in layout.blocks:
        assert {x.name.rpartition(".")[2] for x in block.linears} == {
            "in_proj",
            "x_proj",
            "out_proj",
        }
        assert f"{block.name}.mixer.dt_proj.weight" in {spec.name for spec in block.others}


def test_stored_names_are_those_of_the_checkpoint() -> None:
    """transformers calls the head of GPT-NeoX lm_head, published checkpoints embed_out."""
    layout = layout_of(family("gpt_neox", pad_token_id=0))
    assert layout.head is not None and layout.head.name == "embed_out"


@pytest.mark.parametrize("model_type", REPLAYED)
def test_family_that_needs_transformers_around_its_layers(model_type: str) -> None:
    layout = layout_of(family(model_type))
    assert layout.blocks and not layout.equal_lengths
    for block in layout.blocks:
        readers = [reader for group in block.groups for reader in group.readers]
        assert sorted(readers) == sorted(linear.name for linear in block.linears)


# ---------------------------------------------------------------------------- from plan to artifact


BUILT = [*FAMILIES, "gemma3_text", "lfm2", "falcon_h1", "phi"]


@pytest.mark.parametrize("model_type", BUILT)
def test_plan_build_verify(model_type: str, tmp_path: Path) -> None:
    """A full build of every linear; plan and model card describe the checks."""
    folder = write_model(tmp_path / "source", family(model_type))
    text = make_recipe_text(folder, tmp_path / "artifact", rules="all-linear")
    outcome = build(text)
    assert shallow.verify_artifact(outcome.path).status == "not judged"
    pooled = outcome.fidelity.distribution[0]
    assert (
        pooled.kl_mean is not None
        and pooled.kl_mean.value is not None
        and 1e-6 < pooled.kl_mean.value < 1
    )
    modules = outcome.fidelity.modules
    assert all(0 < module.relative_error < 0.3 for module in modules)
    summary = json.loads((outcome.path / "quantkit" / "plan.json").read_text())["summary"]
    [warning] = [result for result in summary["warnings"] if result.startswith("generic: ")]
    assert warning.startswith(
        f"generic: model_type {model_type} has no table; found {len(modules)} linears in 2 blocks"
    )
    assert warning in (outcome.path / "README.md").read_text()


def build(text: str) -> pipeline.BuildResult:
    """Build without benchmarks."""
    recipe = parse_recipe(text, "test.yaml")
    [outcome] = pipeline.build_artifacts(
        recipe, text, overwrite=False, evaluate=False, on_plan=ignore, on_progress=ignore
    )
    return outcome


@pytest.mark.parametrize("model_type", ["phi3", "starcoder2", "gemma2", "falcon_h1"])
def test_reported_kl_equals_that_of_two_transformers_models(
    model_type: str, tmp_path: Path
) -> None:
    """The source, and the source with the artifact's weights, run by transformers alone."""
    folder = write_model(tmp_path / "source", family(model_type))
    text = make_recipe_text(
        folder, tmp_path / "artifact", rules="all-linear", quantize="{method: awq, rounding: gptq}"
    )
    outcome = build(text)
    manifest = json.loads((outcome.path / "quantkit" / "manifest.json").read_text())
    assert any(
        choice["candidate"] for block in manifest["blocks"].values() for choice in block["scales"]
    )
    schemes = {module: Scheme(**values["scheme"]) for module, values in manifest["modules"].items()}
    read = full_model.make_reader(Checkpoint.open(outcome.path), "awq", schemes)
    source = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    artifact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for (
        name,
        parameter,
    ) in artifact.named_parameters():  # a tied head is the embedding, and named once
        parameter.data.copy_(read(name))
    tokens, lost = pipeline.tokenize(parse_recipe(text, "test.yaml"), folder).tokens["fidelity"], []
    with torch.no_grad():
        for number in range(tokens.n_sequences):
            ids = tokens.sequence(number).long()[None]
            p, q = (
                model(ids).logits[0, :-1].double().log_softmax(-1) for model in (source, artifact)
            )
            lost.append((p.exp() * (p - q)).sum(-1))
    with torch.no_grad():
        again = load_model.load_model(outcome.path, device="cpu", dtype="float32")(ids).logits
    assert torch.allclose(again, artifact(ids).logits, atol=2e-4, rtol=1e-4)
    reported = outcome.fidelity.distribution[0].kl_mean
    assert reported is not None and reported.value == pytest.approx(
        float(torch.cat(lost).mean()), rel=1e-2
    )


def test_plan_without_headers_describes_derived_layout(tmp_path: Path) -> None:
    """`quantkit plan` of a folder warns about it, and fuses q, k and v as engines do."""
    folder = write_model(tmp_path / "source", family("olmo2"))
    path = tmp_path / "recipe.yaml"
    path.write_text(make_recipe_text(folder, tmp_path / "artifact"))
    done = CliRunner().invoke(main, ["plan", str(path)])
    message = " ".join(done.output.split())
    assert done.exit_code == 0
    assert (
        "olmo2" in message
        and "warning: generic: model_type olmo2 has no table; found 14 linears in 2 blocks"
        in message
    )
    assert (
        "reading 8 inputs, of which 4 can be scaled; proven on a small random instance" in message
    )
    rules = '[{match: "*.q_proj", keep: source}, {match: "*", quantize: default}]'
    path.write_text(make_recipe_text(folder, tmp_path / "artifact", rules=rules))
    done = CliRunner().invoke(main, ["plan", str(path)])
    assert done.exit_code == 2 and "vLLM and SGLang merge these linears when loading" in done.output


# ---------------------------------------------------------------------------------- rejected models


@pytest.mark.parametrize(
    ("model_type", "changes", "words"),
    [
        ("jetmoe", {"num_local_experts": 4}, "are not in an nn.Linear: model.layers.0.mlp."),
        ("gpt2", {}, "transformer.h.0 has no nn.Linear; its matrices are in Conv1D"),
        ("hrm_text", {}, "expected one list of"),
        ("olmo2", {"hidden_act": "no_such"}, "found: KeyError: "),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)  # fmt: skip
def test_failed_check_is_rejected_with_reason(
    model_type: str, changes: dict[str, object], words: str
) -> None:
    assert words in reason(family(model_type, **changes))


def test_linears_that_are_not_called_once_are_rejected() -> None:
    """Experts made of linears get some tokens only; here the layer skips its MLP."""
    case = trial("olmo2")
    layer = case.meta_model.model.get_submodule(case.block.name)
    layer.mlp.forward = lambda hidden: hidden
    uncalled = [x.name for x in case.block.linears if not case.is_called_once(x)]
    assert {name.rpartition(".")[2] for name in uncalled} == {"gate_proj", "up_proj", "down_proj"}
    with pytest.raises(CheckpointError, match="in linears that are not called once with every"):
        inspect.keep_linears(case.config, case.block, uncalled)


@pytest.mark.parametrize(
    "own", [{}, {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}], ids=["", "own code"]
)
def test_type_unknown_to_transformers_is_rejected(own: dict[str, object]) -> None:
    with pytest.raises(UsageError) as caught:
        derive_architecture({**TINY_COMMON, "model_type": "olmo9", **own})
    message = str(caught.value)
    assert message.startswith("no architecture named 'olmo9'. Known: deepseek_v2, ")
    assert "has no language model of that type to derive one from" in message
    assert ("the code of a checkpoint (auto_map) is never run" in message) == bool(own)


def test_unclaimed_tensor_is_rejected(tmp_path: Path) -> None:
    """A derived layout must claim every tensor of the checkpoint too."""
    folder = write_model(tmp_path / "source", family("olmo2", num_hidden_layers=3))
    (folder / "config.json").write_text(json.dumps(family("olmo2")))
    path = tmp_path / "recipe.yaml"
    path.write_text(make_recipe_text(folder, tmp_path / "artifact"))
    done = CliRunner().invoke(main, ["plan", str(path)])
    assert done.exit_code == 1
    assert "not claimed by the architecture: model.layers.2." in done.output


def test_generation_settings_that_transformers_rejects(tmp_path: Path) -> None:
    (tmp_path / "g.json").write_text('{"max_new_tokens": -3}')
    with pytest.raises(
        ArtifactError,
        match=r"g\.json: expected settings that transformers takes, found: .* but is -3",
    ):
        load_model.read_generation_config(tmp_path / "g.json")
