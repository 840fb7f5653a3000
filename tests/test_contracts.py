"""The contract of every architecture in the registry, checked on random TINY checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.builds import build, ignore_progress
from support.checkpoints import make_recipe_text, make_tiny_config, write_checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from quantkit import pipeline, registry
from quantkit.artifact.writer import ArtifactWriter
from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.contracts import Config
from quantkit.errors import NumericsError
from quantkit.evaluate.token_fidelity import LMHead, select_scored_rows
from quantkit.models import full_model
from quantkit.models.layers import (
    DecoderLayer,
    MetaModel,
    get_layer_name,
    make_decoder_layer,
    make_meta_model,
    observe_inputs,
    run_layer,
)
from quantkit.plan.match_checkpoint import list_expected_tensors
from quantkit.recipe.parse import parse_recipe
from quantkit.verify import shallow

pytestmark = pytest.mark.usefixtures("quick_builds")

VARIANTS = [(name, {}) for name in registry.list_names("architectures")] + [
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


def load_reference(folder: Path) -> torch.nn.Module:
    """Load the checkpoint with transformers, in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize(("name", "changes"), VARIANTS, ids=IDS)
def test_layout_lists_every_tensor_once(
    name: str, changes: dict[str, object], tmp_path: Path
) -> None:
    """The layout equals the tensors that transformers saves for the config, except MTP blocks."""
    config = make_tiny_config(name, **changes)
    layout = registry.get_architecture(name).layout(Config(values=config))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    model.save_pretrained(tmp_path)
    saved = Checkpoint.open(tmp_path).specs
    mtp = tuple(f"{block.name}." for block in layout.blocks if block.kind == "mtp")
    claimed = {
        n: s.shape
        for n, s in list_expected_tensors(layout, Config(values=config)).items()
        if not n.startswith(mtp or ("\0",))
    }
    assert claimed == {n: s.shape for n, s in saved.items()}


@pytest.mark.parametrize(("name", "changes"), VARIANTS, ids=IDS)
def test_block_by_block_logits_equal_transformers(
    name: str, changes: dict[str, object], tmp_path: Path
) -> None:
    """The reference stream, layer by layer and expert by expert, has transformers' logits."""
    folder = write_checkpoint(tmp_path / "source", make_tiny_config(name, **changes))
    plan, streams = run_streams(
        folder,
        tmp_path,
        rules='[{match: "*", keep: source}]',
        quantize="{method: rtn}",
        fidelity="{set: tiny-v3-heldout, windows: 4, length: 128}",
    )
    stream, source = streams["reference"], Checkpoint.open(folder)
    meta = make_meta_model(source.config, torch.device("cpu"), torch.float32)
    rows, _ = select_scored_rows(stream)
    ours = LMHead(meta, plan.layout, source).logits(stream.hidden.gather(rows))
    model, theirs = load_reference(folder), []
    with torch.no_grad():
        for i in range(stream.tokens.n_sequences):
            theirs.append(model(stream.tokens.sequence(i).long()[None]).logits[0, :-1])
    assert torch.allclose(ours, torch.cat(theirs), atol=2e-4, rtol=1e-4)
    assert torch.equal(stream.hidden.gather(rows), streams["quantized"].hidden.gather(rows))


@pytest.mark.parametrize(("name", "changes"), VARIANTS, ids=IDS)
def test_adds_to_names_residual_additions(
    name: str, changes: dict[str, object], tmp_path: Path
) -> None:
    """The norm's input plus the reader's output is the next residual state; o_proj always adds."""
    source = Checkpoint.open(
        write_checkpoint(tmp_path / "source", make_tiny_config(name, **changes))
    )
    meta = make_meta_model(source.config, torch.device("cpu"), torch.float32)
    layout = registry.get_architecture(name).layout(source.config)
    for block in (block for block in layout.blocks if block.kind == "decoder"):
        adding = {group.readers[0]: group.adds_to for group in block.groups if group.adds_to}
        assert f"{block.name}.self_attn.o_proj" in adding
        routed = f"{block.experts.module}." if block.experts else "\0"
        names = [
            n for n in source.specs if n.startswith(f"{block.name}.") and not n.startswith(routed)
        ]
        layer = make_decoder_layer(meta, block, source.read(names))
        for reader, norm in adding.items():
            before, output, after = run_around(
                meta, layer, get_layer_name(block, reader), get_layer_name(block, norm)
            )
            assert torch.allclose(before + output, after, atol=1e-5)


def run_around(
    meta: MetaModel, layer: DecoderLayer, reader: str, norm: str
) -> tuple[torch.Tensor, ...]:
    """Return the stream before a reader's output, that output, and the stream after it."""
    hidden, outputs = meta.config.hidden_size, list[torch.Tensor]()
    rows = torch.randn(24, hidden, generator=torch.Generator().manual_seed(0))
    handle = layer.module.get_submodule(reader).register_forward_hook(
        lambda _m, _i, out: outputs.append(out)
    )
    with observe_inputs(layer.module, {"this": norm, "next": "post_attention_layernorm"}) as inputs:
        out, _ = run_layer(meta, layer, rows, (24,))
    handle.remove()
    after = inputs["next"] if norm == "input_layernorm" else out
    return (
        inputs["this"].reshape(-1, hidden),
        outputs[0].reshape(-1, hidden),
        after.reshape(-1, hidden),
    )


STORED = [(*variant, False) for variant in VARIANTS] + [
    (name, {}, True) for name in registry.list_names("architectures")
]
"""The builds: every variant from BF16, every family from FP8, which does not depend on variants."""

EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")
FEW_TOKENS = {
    "calibration": "{set: tiny-v3, sequences: 16, length: 64, min_expert_tokens: 8}",
    "fidelity": "{set: tiny-v3-heldout, windows: 4, length: 64}",
}
"""A build of every linear needs no more tokens."""
STORED_IDS = [f"{name}-bf16" for name in IDS] + [
    f"{name}-fp8" for name in registry.list_names("architectures")
]


@pytest.mark.parametrize(("name", "changes", "fp8"), STORED, ids=STORED_IDS)
def test_artifact_of_all_linears_verifies(
    name: str, changes: dict[str, object], fp8: bool, tmp_path: Path
) -> None:
    """A build of every linear: the artifact verifies, its figures are those of quantization."""
    config = make_tiny_config(name, **changes)
    # the searches of the experts take most of the time; a routing group needs two
    few = max(4, 2 * int(str(config.get("n_group", 1))))
    config |= {key: few for key in EXPERT_KEYS if key in config}
    folder = write_checkpoint(tmp_path / "source", config, fp8=fp8)
    result = build(folder, tmp_path / "artifact", rules="all-linear", **FEW_TOKENS)
    assert shallow.verify_artifact(result.path).status == "not judged"
    pooled = result.fidelity.distribution[0]
    assert pooled.kl_mean is not None and pooled.kl_mean.value is not None
    assert 1e-6 < pooled.kl_mean.value < 1
    assert result.fidelity.modules and all(
        0 < m.relative_error < 0.3 for m in result.fidelity.modules
    )
    specs = Checkpoint.open(result.path).specs
    assert not any(
        name.endswith("_scale_inv") or spec.dtype == "F8_E4M3" for name, spec in specs.items()
    )
    config = json.loads((result.path / "config.json").read_text(encoding="utf-8"))
    left = config["quantization_config"]["modules_to_not_convert"]
    for linear in registry.get_architecture(name).layout(Config(values=config)).linears:
        if linear.role == "router":  # a linear in vLLM, which matches substrings
            assert f"{linear.name}.weight" in specs and any(entry in linear.name for entry in left)


@pytest.mark.parametrize("name", registry.list_names("architectures"))
def test_full_model_has_logits_of_transformers(name: str, tmp_path: Path) -> None:
    """The model that benchmarks run, assembled from files, equals the one transformers loads."""
    folder = write_checkpoint(tmp_path / "source", make_tiny_config(name))
    source = Checkpoint.open(folder)
    meta = make_meta_model(source.config, torch.device("cpu"), torch.float32)
    ours = full_model.make_model(
        meta, registry.get_architecture(name).layout(source.config), full_model.make_reader(source)
    )
    ids = torch.arange(2, 66)[None]  # [1, 64]
    with torch.no_grad():
        assert torch.allclose(
            ours(ids).logits, load_reference(folder)(ids).logits, atol=2e-4, rtol=1e-4
        )


def test_meta_model_does_not_change_config() -> None:
    """transformers adds keys to rope_scaling; the artifact's config.json equals the source's."""
    scaling = {"type": "yarn", "factor": 2, "original_max_position_embeddings": 128}
    config = make_tiny_config("deepseek_v3", rope_scaling=scaling)
    make_meta_model(Config(values=config), torch.device("cpu"), torch.float32)
    assert config["rope_scaling"] == {
        "type": "yarn",
        "factor": 2,
        "original_max_position_embeddings": 128,
    }


def run_streams(folder: Path, place: Path, **keys: str):  # type: ignore[no-untyped-def]  # streams are internal
    """Return the plan and the streams after the last block."""
    from quantkit.build.loop import BuildPrecision
    from quantkit.build.loop import build_blocks as build_loop
    from quantkit.plan import sources

    recipe = parse_recipe(make_recipe_text(folder, place / "unused", **keys), "test.yaml")
    source = Checkpoint.open(folder)
    texts = pipeline.tokenize(recipe, folder)
    (plan,) = sources.plan_recipe(
        recipe, sources.make_source_facts(recipe, source, None), texts.counts()
    )
    (place / "out").mkdir()
    (place / "scratch").mkdir()
    sink = ArtifactWriter(place / "out", plan.shards)
    device, dtype = torch.device("cpu"), torch.float32
    precision = BuildPrecision(device=device, dtype=dtype, calibration=dtype)
    built = build_loop(
        [plan], source, texts.stream_texts(), [sink], place / "scratch", precision, ignore_progress
    )
    sink.close()
    return plan, built.streams


def test_router_missing_from_readers_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bug of published AWQ artifacts: the router reads the scaled input unnoticed."""
    from dataclasses import replace

    from quantkit.architectures import deepseek_v3

    folder = write_checkpoint(tmp_path / "source", make_tiny_config("deepseek_v3"))
    correct = deepseek_v3.make_moe_mlp

    def drop_reader(config: Config, name: str):  # type: ignore[no-untyped-def]  # as the function it stands for
        part = correct(config, name)
        shared = tuple(
            reader for reader in part.groups[0].readers if not reader.endswith("mlp.gate")
        )
        return replace(part, groups=(replace(part.groups[0], readers=shared), *part.groups[1:]))

    build(folder, tmp_path / "correct")
    monkeypatch.setattr(deepseek_v3, "make_moe_mlp", drop_reader)
    with pytest.raises(
        NumericsError, match=r"model\.layers\.1: folding the scales changed the router's decisions"
    ):
        build(folder, tmp_path / "broken")
    assert not (tmp_path / "broken").exists()


def test_shared_expert_missing_from_readers_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a dense reader the block's output changes."""
    from dataclasses import replace

    from quantkit.architectures import deepseek_v3

    folder = write_checkpoint(tmp_path / "source", make_tiny_config("deepseek_v3"))
    correct = deepseek_v3.make_moe_mlp

    def drop_reader(config: Config, name: str):  # type: ignore[no-untyped-def]  # as the function it stands for
        part = correct(config, name)
        readers = tuple(
            r for r in part.groups[0].readers if not r.endswith("shared_experts.up_proj")
        )
        return replace(part, groups=(replace(part.groups[0], readers=readers), *part.groups[1:]))

    monkeypatch.setattr(deepseek_v3, "make_moe_mlp", drop_reader)
    with pytest.raises(NumericsError, match="the block's output without its experts"):
        build(folder, tmp_path / "broken")
