"""What transformers' own forward gives its layers, recorded without weights, and what follows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.checkpoints import make_tiny_config
from support.underived_models import REPLAYED, STREAMS, family
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from quantkit import registry
from quantkit.contracts import Config
from quantkit.errors import CheckpointError
from quantkit.models import outer_model
from quantkit.models.layer_calls import count_bytes, name_tensors
from quantkit.models.layers import (
    MetaModel,
    cast_meta_model,
    embed_tokens,
    load_outer_model,
    make_meta_model,
)
from quantkit.models.outer_model import make_embedding

CPU = torch.device("cpu")
MORE = {
    "gpt2": {},  # learned positions, added before the first layer
    "bloom": {"n_head": 4},  # ALiBi, a norm after the embedding; layers return tuples
    "qwen3_5_text": {  # linear attention
        "head_dim": 32,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
    },
}
CASES = [
    *(make_tiny_config(name) for name in registry.list_names("architectures")),
    *(family(name) for name in REPLAYED),
    *(family(name, **changes) for name, changes in MORE.items()),
    *(family(name) for name in STREAMS),
]


def make_model(config: dict[str, object]) -> Any:
    """Make transformers' model with random weights in float32."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.copy_(torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5)
    return model.eval()


def make_meta(config: dict[str, object]) -> MetaModel:
    return make_meta_model(Config(values=config), CPU, torch.float32)


def run_layers(meta: MetaModel, model: Any, ids: Tensor) -> Tensor:
    """Run the layers of `model` with recorded arguments: ids [n, t] -> rows [n, t, width]."""
    outer = load_outer_model(meta, model.state_dict())
    rows = embed_tokens(outer, ids.flatten(), [ids.shape[1]] * len(ids)).unflatten(0, ids.shape)
    for name, call in meta.outer.record(*ids.shape).items():
        with torch.no_grad():
            rows = call.run(model.get_submodule(name), outer.form, rows)
    return rows


@pytest.mark.parametrize("config", CASES, ids=lambda config: config["model_type"])
def test_layers_with_recorded_arguments_equal_transformers(config: dict[str, object]) -> None:
    """Bit for bit, for texts shorter and longer than the window; logits to rounding."""
    model, meta = make_model(config), make_meta(config)
    name, layers = outer_model.find_layers(model)
    for tokens in (5, 40):
        ids = torch.randint(3, 700, (2, tokens), generator=torch.Generator().manual_seed(tokens))
        last, expected = run_transformers(model, layers[-1], ids)
        ours = run_layers(meta, model, ids)
        assert torch.equal(meta.outer.form.unpack(ours)[0], last), name
        logits = load_outer_model(meta, model.state_dict()).compute_logits(ours.flatten(0, 1))
        assert torch.allclose(logits, expected.flatten(0, 1), atol=2e-4, rtol=1e-4)


def run_transformers(model: Any, layer: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output of a layer and the logits in transformers' own forward."""
    outputs = list[Any]()
    handle = layer.register_forward_hook(lambda _m, _i, out: outputs.append(out))
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
    handle.remove()
    [output] = [out[0] if isinstance(out, tuple) else out for out in outputs]
    return output, logits


def test_states_have_the_width_that_layers_are_given() -> None:
    """Two streams of 128 channels, and the token ids where some layer reads them."""
    forms = {name: make_meta(family(name)).outer.form for name in (*STREAMS, "gemma2")}
    assert forms["deepseek_v4"].hidden.shape == (2, 128) and forms["deepseek_v4"].width == 257
    assert forms["qwen4_exp_text"].hidden.shape == (256,) and forms["qwen4_exp_text"].has_ids
    assert forms["gemma2"].hidden.shape == (128,) and forms["gemma2"].width == 128


def test_values_that_layers_return_besides_their_states_are_named() -> None:
    """HY 4 shares the tokens that one layer selects with the next ones."""
    outer = make_meta(family("hy_v4", hc_mult=2, qk_rope_head_dim=16, pad_token_id=0)).outer
    assert outer.find_exchange() == (
        "model.layers.1 is given prev_topk_indices, which model.layers.0 returns besides its states"
    )
    assert make_meta(family("deepseek_v4")).outer.find_exchange() is None


def test_head_and_norm_matter() -> None:
    """The comparison of logits can fail."""
    config = family("gemma2")
    model, meta = make_model(config), make_meta(config)
    ids = torch.arange(3, 23)[None]
    hidden = run_layers(meta, model, ids)[0]
    state = {**model.state_dict(), "model.norm.weight": torch.ones(128)}
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[0]
    changed = load_outer_model(meta, state).compute_logits(hidden)
    assert not torch.allclose(changed, expected, atol=1e-2)


LONGROPE = {
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0] * 16,
        "long_factor": [4.0] * 16,
    },
    "original_max_position_embeddings": 64,
    "pad_token_id": 0,
}
DYNAMIC = {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 64}


@pytest.mark.parametrize(
    "config",
    [family("phi3", **LONGROPE), make_tiny_config("llama", **DYNAMIC)],
    ids=["longrope", "dynamic"],
)
def test_rotary_tables_depend_on_length(config: dict[str, object]) -> None:
    """Only where the shortest and the longest text are on two sides of the limit."""
    outer = make_meta(config).outer
    assert outer.depends_on_length(20, 100)
    assert not outer.depends_on_length(20, 60)


def test_rotary_tables_of_other_families_do_not_depend_on_length() -> None:
    outer = make_meta(family("gemma3_text")).outer
    assert not outer.depends_on_length(5, 40)
    assert not make_meta(make_tiny_config("llama")).outer.depends_on_length(5, 200)


def test_long_text_does_not_change_tables_of_a_later_text() -> None:
    """Dynamic rotary embeddings keep the tables of the longest text that they have met."""
    fresh, used = (make_meta(make_tiny_config("llama", **DYNAMIC)).outer for _ in range(2))
    used.record(1, 200)
    for (name, x), (_, y) in zip(
        name_tensors(fresh.record(1, 80)), name_tensors(used.record(1, 80)), strict=True
    ):
        assert torch.equal(x, y), name


def test_kept_arguments_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of many lengths do not fill the memory; arguments are recorded again."""
    monkeypatch.setattr(outer_model, "MAX_KEPT_BYTES", 200_000)
    outer = make_meta(family("gemma2")).outer
    first = outer.record(2, 40)
    for tokens in range(2, 60):
        outer.record(1, tokens)
        assert count_bytes(outer._kept) <= 200_000
    again = outer.record(2, 40)
    assert again is not first
    for (name, x), (_, y) in zip(name_tensors(first), name_tensors(again), strict=True):
        assert torch.equal(x, y), name


def test_outer_model_of_another_dtype() -> None:
    """Calibration may run in bfloat16: tables and masks are then made for it."""
    meta = cast_meta_model(make_meta(family("gemma3_text")), torch.bfloat16)
    tensors = dict(name_tensors(meta.outer.record(1, 8)))
    floating = {x.dtype for x in tensors.values() if x.is_floating_point()}
    assert floating == {torch.bfloat16}


def test_computed_buffers_have_the_dtype_that_transformers_chooses() -> None:
    """xglm adds sinusoids to bfloat16 embeddings; in float32 its norms refuse the sum."""
    sizes = {"d_model": 64, "ffn_dim": 128, "num_layers": 2, "attention_heads": 2}
    config = {"model_type": "xglm", "vocab_size": 96, "max_position_embeddings": 64, **sizes}
    meta = cast_meta_model(make_meta(config), torch.bfloat16)
    assert {x.dtype for _, x in meta.model.named_buffers() if not x.is_meta} == {torch.bfloat16}
    assert meta.outer.form.dtype == torch.bfloat16


def test_norm_inside_the_embedding_has_its_weights() -> None:
    """inkling_text normalizes embedded rows there."""
    with torch.device("meta"):
        embedding = nn.Embedding(8, 4)
        embedding.norm = nn.LayerNorm(4)
        model = nn.ModuleDict({"embed": embedding})
    generator = torch.Generator().manual_seed(0)
    weight, scale = (torch.randn(*x, generator=generator) for x in ((8, 4), (4,)))
    tensors = {"embed.weight": weight, "embed.norm.weight": scale}
    tensors["embed.norm.bias"] = torch.ones(4)
    made = make_embedding(model, embedding, CPU, torch.float32, tensors)
    assert torch.equal(made(torch.tensor([[3, 1, 3]])), weight[[3, 1, 3]][None])
    assert torch.equal(made.original.norm.weight, scale)
    assert torch.equal(made.original.norm.bias, torch.ones(4))


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        ("hrm_text", {}, "expected one list of"),
        ("qwen2", {"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
    ],
)
def test_model_whose_layers_cannot_be_replaced(
    model_type: str, changes: dict[str, object], reason: str
) -> None:
    with pytest.raises(CheckpointError, match=reason):
        make_meta(family(model_type, **changes))
