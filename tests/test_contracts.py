"""What every architecture must keep, whoever adds it: found through the registry, run on random TINY checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.builds import build, ignore
from support.checkpoints import recipe_text, tiny_config, write_checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from quantkit import pipeline, registry
from quantkit.artifact.writer import ArtifactWriter
from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.contracts import Config
from quantkit.errors import CheckpointError, NumericsError
from quantkit.evaluate.distribution import Head, scored
from quantkit.models import full_model
from quantkit.models.layers import MetaModel, decoder_layer, meta_model, observing, relative, run
from quantkit.plan.match_checkpoint import expected
from quantkit.recipe.parse import parse
from quantkit.verify import shallow

VARIANTS = [(name, {}) for name in registry.names("architectures")] + [
    ("deepseek_v3", {"q_lora_rank": None, "num_nextn_predict_layers": 0}),
    ("deepseek_v3", {"attention_bias": True, "first_k_dense_replace": 0}),
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
    ("qwen3_moe", {"mlp_only_layers": [0], "use_sliding_window": True, "sliding_window": 16}),
    ("qwen3_moe", {"decoder_sparse_step": 2, "attention_bias": True}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "tie_word_embeddings": True}),
    (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 16,
            "max_window_layers": 1,
            "attention_bias": True,
        },
    ),
    ("qwen3", {"tie_word_embeddings": True}),
    ("mistral", {"sliding_window": 16}),
    ("deepseek_v2", {"q_lora_rank": None, "topk_method": "greedy", "n_group": 1, "topk_group": 1}),
    ("mixtral", {"sliding_window": 16, "head_dim": 64}),
    (
        "qwen2_moe",
        {
            "mlp_only_layers": [1],
            "use_sliding_window": True,
            "sliding_window": 16,
            "qkv_bias": False,
        },
    ),
    ("glm4_moe", {"use_qk_norm": False, "n_group": 2, "num_nextn_predict_layers": 0}),
]
IDS = [
    name + "".join(f"-{key}={value}" for key, value in changes.items())
    for name, changes in VARIANTS
]


def reference(folder: Path) -> torch.nn.Module:
    """The checkpoint as transformers itself loads it, in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize(("name", "changes"), VARIANTS, ids=IDS)
def test_every_tensor_is_claimed_exactly_once(
    name: str, changes: dict[str, object], tmp_path: Path
) -> None:
    """The table names what transformers saves for the same config, no more and no less (MTP blocks apart)."""
    config = tiny_config(name, **changes)
    layout = registry.architecture(name).layout(Config(values=config))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    model.save_pretrained(tmp_path)
    saved = Checkpoint.open(tmp_path).specs
    mtp = tuple(f"{block.name}." for block in layout.blocks if block.kind == "mtp")
    claimed = {
        n: s.shape
        for n, s in expected(layout, Config(values=config)).items()
        if not n.startswith(mtp or ("\0",))
    }
    assert claimed == {n: s.shape for n, s in saved.items()}


@pytest.mark.parametrize(("name", "changes"), VARIANTS, ids=IDS)
def test_block_by_block_logits_equal_transformers(
    name: str, changes: dict[str, object], tmp_path: Path
) -> None:
    """The reference stream, run layer by layer and expert by expert, ends where transformers' own forward ends."""
    folder = write_checkpoint(tmp_path / "source", tiny_config(name, **changes))
    plan, streams = run_streams(
        folder, tmp_path, rules='[{match: "*", keep: source}]', quantize="{method: rtn}"
    )
    stream, source = streams["reference"], Checkpoint.open(folder)
    bones = meta_model(source.config, torch.device("cpu"), torch.float32)
    rows, _ = scored(stream)
    ours = Head(bones, plan.layout, source).logits(stream.hidden.gather(rows))
    model, theirs = reference(folder), []
    with torch.no_grad():
        for i in range(stream.tokens.n_sequences):
            theirs.append(model(stream.tokens.sequence(i).long()[None]).logits[0, :-1])
    assert torch.allclose(ours, torch.cat(theirs), atol=2e-4, rtol=1e-4)
    assert torch.equal(stream.hidden.gather(rows), streams["quantized"].hidden.gather(rows))


@pytest.mark.parametrize(("name", "changes"), VARIANTS, ids=IDS)
def test_what_is_said_to_add_to_the_residual_stream_does(
    name: str, changes: dict[str, object], tmp_path: Path
) -> None:
    """The norm's input and the reader's output make the stream's next state; attention's output is always named."""
    source = Checkpoint.open(write_checkpoint(tmp_path / "source", tiny_config(name, **changes)))
    bones = meta_model(source.config, torch.device("cpu"), torch.float32)
    layout = registry.architecture(name).layout(source.config)
    for block in (found for found in layout.blocks if found.kind == "decoder"):
        adding = {group.readers[0]: group.adds_to for group in block.groups if group.adds_to}
        assert f"{block.name}.self_attn.o_proj" in adding
        routed = f"{block.experts.module}." if block.experts else "\0"
        names = [
            n for n in source.specs if n.startswith(f"{block.name}.") and not n.startswith(routed)
        ]
        layer, _ = decoder_layer(bones, block, source.read(names))
        for reader, norm in adding.items():
            before, made, after = around(
                bones, layer, relative(block, reader), relative(block, norm)
            )
            assert torch.allclose(before + made, after, atol=1e-5)


def around(
    bones: MetaModel, layer: torch.nn.Module, reader: str, norm: str
) -> tuple[torch.Tensor, ...]:
    """The stream before a reader's output, that output, and the stream behind it, for random rows."""
    hidden, made = bones.config.hidden_size, list[torch.Tensor]()
    rows = torch.randn(24, hidden, generator=torch.Generator().manual_seed(0))
    handle = layer.get_submodule(reader).register_forward_hook(lambda _m, _i, out: made.append(out))
    with observing(layer, {"this": norm, "next": "post_attention_layernorm"}) as inputs:
        out, _ = run(bones, layer, rows, (24,))
    handle.remove()
    after = inputs["next"] if norm == "input_layernorm" else out
    return (
        inputs["this"].reshape(-1, hidden),
        made[0].reshape(-1, hidden),
        after.reshape(-1, hidden),
    )


STORED = [(*variant, False) for variant in VARIANTS] + [
    (name, {}, True) for name in registry.names("architectures")
]
"""What is built: every variant from BF16, and every family from FP8, whose reading does not depend on the variant."""
STORED_IDS = [f"{name}-bf16" for name in IDS] + [
    f"{name}-fp8" for name in registry.names("architectures")
]


@pytest.mark.parametrize(("name", "changes", "fp8"), STORED, ids=STORED_IDS)
def test_plan_build_verify(
    name: str, changes: dict[str, object], fp8: bool, tmp_path: Path
) -> None:
    """A whole build of every linear: the artifact verifies and its figures are those of a quantized model."""
    folder = write_checkpoint(tmp_path / "source", tiny_config(name, **changes), fp8=fp8)
    outcome = build(folder, tmp_path / "artifact", rules="all-linear")
    assert shallow.verify(outcome.path).status == "not judged"
    pooled = outcome.fidelity.distribution[0]
    assert pooled.kl_mean is not None and pooled.kl_mean.value is not None
    assert 1e-6 < pooled.kl_mean.value < 1
    assert outcome.fidelity.modules and all(
        0 < m.relative_error < 0.3 for m in outcome.fidelity.modules
    )
    specs = Checkpoint.open(outcome.path).specs
    assert not any(
        name.endswith("_scale_inv") or spec.dtype == "F8_E4M3" for name, spec in specs.items()
    )
    config = json.loads((outcome.path / "config.json").read_text(encoding="utf-8"))
    left = config["quantization_config"]["modules_to_not_convert"]
    for linear in registry.architecture(name).layout(Config(values=config)).linears:
        if (
            linear.role == "router"
        ):  # a linear to vLLM, which asks whether an entry is part of its name
            assert f"{linear.name}.weight" in specs and any(entry in linear.name for entry in left)


@pytest.mark.parametrize("name", registry.names("architectures"))
def test_the_whole_model_answers_as_transformers(name: str, tmp_path: Path) -> None:
    """What benchmarks run, put together from the files, is the model transformers loads."""
    folder = write_checkpoint(tmp_path / "source", tiny_config(name))
    source = Checkpoint.open(folder)
    bones = meta_model(source.config, torch.device("cpu"), torch.float32)
    ours = full_model.model(
        bones, registry.architecture(name).layout(source.config), full_model.reader(source)
    )
    ids = torch.arange(2, 66)[None]  # [1, 64]
    with torch.no_grad():
        assert torch.allclose(ours(ids).logits, reference(folder)(ids).logits, atol=2e-4, rtol=1e-4)


def test_the_config_of_the_source_stays_as_it_was_read() -> None:
    """transformers adds keys to rope_scaling where it finds it; the artifact's config.json is the source's."""
    scaling = {"type": "yarn", "factor": 2, "original_max_position_embeddings": 128}
    config = tiny_config("deepseek_v3", rope_scaling=scaling)
    meta_model(Config(values=config), torch.device("cpu"), torch.float32)
    assert config["rope_scaling"] == {
        "type": "yarn",
        "factor": 2,
        "original_max_position_embeddings": 128,
    }


def test_an_attention_pattern_without_a_mask_is_an_error() -> None:
    """A layer that attends in chunks would be run as if it saw everything."""
    config = tiny_config("qwen2", layer_types=["full_attention", "chunked_attention"])
    with pytest.raises(
        CheckpointError, match=r"config\.json: layer_types\[1\]: expected full_attention or sliding"
    ):
        meta_model(Config(values=config), torch.device("cpu"), torch.float32)


def run_streams(folder: Path, place: Path, **keys: str):  # type: ignore[no-untyped-def]  # streams are internal
    """The plan and the streams behind the last block, kept on disk."""
    from quantkit.build.loop import BuildPrecision
    from quantkit.build.loop import build_blocks as build_loop
    from quantkit.plan import sources

    recipe = parse(recipe_text(folder, place / "unused", **keys), "test.yaml")
    source = Checkpoint.open(folder)
    texts = pipeline.tokenize(recipe, folder)
    (plan,) = sources.plan_recipe(recipe, sources.facts_of(recipe, source, None), texts.counts())
    (place / "out").mkdir()
    (place / "scratch").mkdir()
    sink = ArtifactWriter(place / "out", plan.shards)
    device, dtype = torch.device("cpu"), torch.float32
    precision = BuildPrecision(device=device, dtype=dtype, calibration=dtype)
    built = build_loop(
        [plan], source, texts.stream_texts(), [sink], place / "scratch", precision, ignore
    )
    sink.close()
    return plan, built.streams


def test_a_router_that_is_not_rescaled_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bug that broke published AWQ artifacts: the table forgets that the router reads the rescaled input."""
    from dataclasses import replace

    from quantkit.architectures import deepseek_v3

    folder = write_checkpoint(tmp_path / "source", tiny_config("deepseek_v3"))
    correct = deepseek_v3.expert_mlp

    def forgetful(config: Config, name: str):  # type: ignore[no-untyped-def]  # as the function it stands for
        part = correct(config, name)
        shared = tuple(
            reader for reader in part.groups[0].readers if not reader.endswith("mlp.gate")
        )
        return replace(part, groups=(replace(part.groups[0], readers=shared), *part.groups[1:]))

    build(folder, tmp_path / "correct")
    monkeypatch.setattr(deepseek_v3, "expert_mlp", forgetful)
    with pytest.raises(
        NumericsError, match=r"model\.layers\.1: folding the scales changed the router's decisions"
    ):
        build(folder, tmp_path / "broken")
    assert not (tmp_path / "broken").exists()


def test_a_forgotten_shared_expert_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same for a dense reader: the block's output changes."""
    from dataclasses import replace

    from quantkit.architectures import deepseek_v3

    folder = write_checkpoint(tmp_path / "source", tiny_config("deepseek_v3"))
    correct = deepseek_v3.expert_mlp

    def forgetful(config: Config, name: str):  # type: ignore[no-untyped-def]  # as the function it stands for
        part = correct(config, name)
        readers = tuple(
            r for r in part.groups[0].readers if not r.endswith("shared_experts.up_proj")
        )
        return replace(part, groups=(replace(part.groups[0], readers=readers), *part.groups[1:]))

    monkeypatch.setattr(deepseek_v3, "expert_mlp", forgetful)
    with pytest.raises(NumericsError, match="the block's output without its experts"):
        build(folder, tmp_path / "broken")
