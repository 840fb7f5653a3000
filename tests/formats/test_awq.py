"""The AWQ format to the bit (golden words of FORMATS.md 1.4), and names that every loader reads alike."""

from __future__ import annotations

import re
from itertools import product

import pytest
import torch
from support.format_examples import SELECTIONS, linear, model_modules

from quantkit import registry
from quantkit.contracts import Config, Contents, Linear, Quantized, Role, Scheme
from quantkit.errors import NumericsError, UsageError
from quantkit.formats import awq, dense
from quantkit.methods import rtn
from quantkit.numerics import affine, bitpack

SCHEME = Scheme(bits=4, group_size=2, symmetric=False, scale_dtype="bfloat16")


def scheme(bits: int = 4, group: int = 128, symmetric: bool = False) -> Scheme:
    return Scheme(bits=bits, group_size=group, symmetric=symmetric, scale_dtype="bfloat16")


# --------------------------------------------------------------------------------------------------- the bits

CODES = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7], [15, 14, 13, 12, 11, 10, 9, 8]])
"""Q [in, out] of FORMATS.md 1.4 a."""


def example() -> Quantized:
    """1.4 a, b and c as one matrix [out = 8, in = 2] with one group."""
    return Quantized(
        codes=CODES.T.to(torch.uint8),
        scale=torch.tensor([[0.5], [1], [1], [1], [1], [1], [1], [0.25]], dtype=torch.bfloat16),
        zero=torch.tensor([[8], [8], [8], [8], [8], [8], [8], [0]], dtype=torch.uint8),
    )


def test_golden_words() -> None:
    found = awq.FORMAT.pack(example(), SCHEME)
    assert found["qweight"].tolist() == [[1966171168], [-1966171169]]
    assert [word & 0xFFFFFFFF for word in found["qweight"].flatten().tolist()] == [
        0x75316420,
        0x8ACE9BDF,
    ]
    assert found["qzeros"].tolist() == [[143165576]]
    assert found["scales"].tolist() == [[0.5, 1, 1, 1, 1, 1, 1, 0.25]]
    assert [found[name].dtype for name in ("qweight", "qzeros", "scales")] == [
        torch.int32,
        torch.int32,
        torch.bfloat16,
    ]


def test_golden_dequantization() -> None:
    back = awq.FORMAT.dequantize(awq.FORMAT.pack(example(), SCHEME), SCHEME)
    assert back.T.tolist() == [[-4, -7, -6, -5, -4, -3, -2, 1.75], [3.5, 6, 5, 4, 3, 2, 1, 2]]
    assert back.dtype == torch.float32


def test_golden_matrix() -> None:
    """1.4 d: M [in, out], rows alternate between two words."""
    matrix = torch.tensor([[(3 * (8 * k + n) + 1) % 16 for n in range(8)] for k in range(8)])
    packed = bitpack.pack(matrix, 4, axis=1, order=bitpack.AWQ_ORDER)
    assert packed.flatten().tolist() == [1621376369, -399723015] * 4


def test_unpacking_as_autoawq_does() -> None:
    """Its reverse order, written down independently: column j is in slot [0, 4, 1, 5, 2, 6, 3, 7][j]."""
    codes = torch.randint(0, 16, (6, 24), generator=torch.Generator().manual_seed(0))
    packed = bitpack.pack(codes, 4, axis=1, order=bitpack.AWQ_ORDER)
    slots = (packed.long().unsqueeze(-1) >> torch.arange(0, 32, 4)) & 15  # [6, 3] -> [6, 3, 8]
    assert torch.equal(slots[..., [0, 4, 1, 5, 2, 6, 3, 7]].flatten(1), codes)


@pytest.mark.parametrize("name", registry.list_names("formats"))
@pytest.mark.parametrize(("out", "width", "group"), [(64, 256, 128), (8, 64, 32), (16, 96, -1)])
def test_layout_is_what_pack_makes(name: str, out: int, width: int, group: int) -> None:
    found, one = registry.get_format(name), linear(out=out, width=width)
    chosen = scheme(group=group)
    if found.accepts(chosen, one) is not None:
        pytest.skip(f"{name} does not store this scheme")
    weight = torch.randn(out, width, generator=torch.Generator().manual_seed(out)) * 0.03
    quantized = rtn.METHOD.solve(weight, None, chosen)
    tensors = found.pack(quantized, chosen)
    names = {
        torch.int32: "I32",
        torch.int64: "I64",
        torch.bfloat16: "BF16",
        torch.float16: "F16",
        torch.uint8: "U8",
        torch.float32: "F32",
    }
    made = {
        f"{one.name}.{local}": (names[tensor.dtype], tuple(tensor.shape))
        for local, tensor in tensors.items()
    }
    assert made == {spec.name: (spec.dtype, spec.shape) for spec in found.layout(one, chosen)}
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    back = found.dequantize(tensors, chosen)
    expected = affine.dequantize(quantized, chosen)
    assert back.shape == (out, width) and torch.allclose(back, expected, rtol=2**-8, atol=0)


@pytest.mark.parametrize(
    "name", [name for name in registry.list_names("formats") if name != "bitsandbytes"]
)
def test_what_pack_cannot_hold_is_not_planned(name: str) -> None:
    """Every width of codes, over rows and columns that end within a word or a run of words."""
    found, packed = registry.get_format(name), 0
    sizes = [(64, size) for size in range(4, 65, 4)] + [(size, 64) for size in range(4, 65, 4)]
    for bits, symmetric, (out, width) in product(range(2, 9), (True, False), sizes):
        chosen, one = scheme(bits, -1, symmetric), linear(out=out, width=width)
        if found.accepts(chosen, one) is None:
            zero = None if symmetric else torch.zeros(out, 1, dtype=torch.uint8)
            codes, scale = (
                torch.zeros(out, width, dtype=torch.uint8),
                torch.ones(out, 1, dtype=torch.bfloat16),
            )
            tensors = found.pack(Quantized(codes=codes, scale=scale, zero=zero), chosen)
            shapes = {
                f"{one.name}.{local}": tuple(tensor.shape) for local, tensor in tensors.items()
            }
            assert shapes == {spec.name: spec.shape for spec in found.layout(one, chosen)}
            packed += 1
    assert packed


def test_awq_keeps_the_codes_exactly() -> None:
    chosen = scheme()
    quantized = rtn.METHOD.solve(
        torch.randn(64, 256, generator=torch.Generator().manual_seed(1)), None, chosen
    )
    back = awq.FORMAT.dequantize(awq.FORMAT.pack(quantized, chosen), chosen)
    assert torch.equal(back, affine.dequantize(quantized, chosen))


def test_what_has_no_word_is_refused_while_packing() -> None:
    codes = example().codes.clone()
    codes[3, 1] = 16
    with pytest.raises(NumericsError, match="do not fit 4 bits"):
        awq.FORMAT.pack(Quantized(codes=codes, scale=example().scale, zero=example().zero), SCHEME)
    with pytest.raises(UsageError, match="symmetric"):
        awq.FORMAT.pack(Quantized(codes=example().codes, scale=example().scale, zero=None), SCHEME)


# ------------------------------------------------------------------------------------------- what is accepted


@pytest.mark.parametrize(
    ("chosen", "one", "reason"),
    [
        (
            scheme(bits=3),
            linear(),
            "4-bit integers only, found 3 bits; use format compressed_tensors",
        ),
        (
            scheme(symmetric=True),
            linear(),
            "with zero points, found symmetric: true; use symmetric: false",
        ),
        (
            scheme(group=16),
            linear(),
            "the AWQ kernels of vLLM and SGLang know group sizes 32, 64, 128 and -1, found 16",
        ),
        (
            scheme(),
            linear(width=192),
            "no engine loads AWQ with group_size 128 over 192 input features",
        ),
        (scheme(), linear(out=12), "12 output features do not fill AWQ's words of 8 codes"),
        (scheme(), linear(role="router"), "vLLM and SGLang build a router without AWQ"),
        (scheme(), linear(role="embedding"), "vLLM and SGLang build a embedding without AWQ"),
        (scheme(), linear(role="head"), "vLLM and SGLang build a head without AWQ"),
        (
            scheme(),
            linear(role="mtp_projection"),
            "vLLM and SGLang build a mtp projection without AWQ",
        ),
        (
            scheme(group=-1),
            linear(role="routed_expert"),
            "vLLM divides experts by the AWQ group size and fails on -1",
        ),
        (
            Scheme(bits=4, group_size=128, symmetric=False, scale_dtype="float32"),
            linear(),
            "vLLM and SGLang hold AWQ scales in 16 bits, found float32; use bfloat16 or float16",
        ),
        (
            Scheme(bits=4, group_size=64, symmetric=False, scale_dtype="float16", kind="nf4"),
            linear(),
            "4-bit integers only, found nf4",
        ),
    ],
)
def test_what_engines_cannot_load_is_refused(chosen: Scheme, one: Linear, reason: str) -> None:
    assert reason in str(awq.FORMAT.accepts(chosen, one))


@pytest.mark.parametrize("role", ["attention", "mlp", "shared_expert", "routed_expert"])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_what_engines_load_is_accepted(role: Role, group: int) -> None:
    assert awq.FORMAT.accepts(scheme(group=group), linear(role=role)) is None
    assert awq.FORMAT.accepts(scheme(group=-1), linear()) is None


def test_dense_stores_any_integer_scheme() -> None:
    assert dense.FORMAT.accepts(scheme(bits=3, group=96, symmetric=True), linear(width=192)) is None
    assert "does not divide" in str(dense.FORMAT.accepts(scheme(), linear(width=192)))
    assert "found nf4" in str(
        dense.FORMAT.accepts(
            Scheme(bits=4, group_size=64, symmetric=False, scale_dtype="float16", kind="nf4"),
            linear(),
        )
    )
    assert dense.FORMAT.quantization_config(Contents(schemes={"a": scheme()}, kept=[])) is None


# ------------------------------------------------------------------------------------ modules_to_not_convert


def autoawq(entries: list[str], module: str) -> bool:
    """AutoAWQ's rule (FORMATS.md 1.7), as are the next three; each says whether the module is left alone."""
    return any(entry in module for entry in entries)


def vllm(entries: list[str], module: str) -> bool:
    """Substring of the prefix; a fused module's own name first, then each of its members: a mix is an error there."""
    parent, _, last = module.rpartition(".")
    mapping = {
        "gate_up_proj": ("gate_proj", "up_proj"),
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    }
    if last not in mapping or autoawq(entries, module):
        return autoawq(entries, module)
    members = {autoawq(entries, f"{parent}.{member}") for member in mapping[last]}
    assert len(members) == 1, f"some but not all shards of {module}"
    return members.pop()


def sglang(entries: list[str], module: str) -> bool:
    """Substring of the prefix; fused modules have a name of their own only."""
    return autoawq(entries, module)


def transformers(entries: list[str], module: str) -> bool:
    """should_convert_module of transformers 5.23."""
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    return any(
        re.match(rf"(?:{entry}){boundary}", module) or module.endswith(entry) for entry in entries
    )


def gptqmodel(dynamic: object, module: str) -> bool:
    """GPTQModel's loader reads `dynamic` alone, for AWQ too: "-:" and a pattern, matched from the name's start."""
    assert isinstance(dynamic, dict) and all(pattern.startswith("-:") for pattern in dynamic)
    return any(re.match(pattern.removeprefix("-:"), module) for pattern in dynamic)


@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS.keys())
def test_every_loader_leaves_exactly_the_kept_modules(selection: str) -> None:
    modules = model_modules()
    quantized = [name for name in modules if re.search(selection, name)]
    kept = [name for name in modules if name not in quantized]
    assert quantized and kept
    entries = awq.not_converted(quantized, kept)
    for loader in (autoawq, vllm, sglang, transformers):
        wrong = [name for name in quantized if loader(entries, name)] + [
            n for n in kept if not loader(entries, n)
        ]
        assert not wrong, f"{loader.__name__}: {wrong[:5]}"
    gate_up = {"gate_up_proj": "gate_proj", "fused_qkv_a_proj": "q_a_proj"}
    for names, loader in (
        (gate_up, vllm),
        ({"gate_up_proj": "gate_proj", "fused_qkv_a_proj_with_mqa": "q_a_proj"}, sglang),
    ):
        fused = [
            (name, member, whole)
            for name in modules
            for whole, member in names.items()
            if ".experts." not in name
        ]
        for name, member, whole in fused:
            if name.endswith(f".{member}"):
                module = f"{name.removesuffix(member)}{whole}"
                assert loader(entries, module) == (name in kept), f"{loader.__name__}: {module}"
    for layer in range(3, 24):
        whole = f"model.layers.{layer}.mlp.experts"
        assert vllm(entries, whole) == (f"{whole}.0.up_proj" in kept)
    dynamic = awq.quantization_config(
        Contents(schemes=dict.fromkeys(quantized, scheme()), kept=kept)
    )["dynamic"]
    for name in modules:
        assert gptqmodel(dynamic, name) == (name in kept), f"GPTQModel: {name}"


def test_names_are_as_high_as_they_can_be() -> None:
    modules = model_modules(layers=5, dense_layers=2)
    quantized = [name for name in modules if ".experts." in name]
    entries = awq.not_converted(quantized, [name for name in modules if name not in quantized])
    assert entries == [
        "model.embed_tokens",
        "model.layers.0.",
        "model.layers.1.",
        *(
            f"model.layers.{i}.{x}"
            for i in (2, 3, 4)
            for x in ("self_attn", "mlp.gate", "mlp.shared_experts")
        ),
        "lm_head",
    ]


def test_a_layer_is_never_named_so_that_transformers_takes_ten_more() -> None:
    """ "model.layers.1." is a regular expression there, and its last dot is the 0 of layer 10."""
    modules = model_modules(layers=12, dense_layers=12)
    kept = [name for name in modules if name.startswith("model.layers.1.")]
    entries = awq.not_converted(
        [name for name in modules if name not in kept and "layers" in name], kept
    )
    assert entries == ["model.layers.1.self_attn", "model.layers.1.mlp"]


def test_a_name_that_hits_a_quantized_module_is_refused() -> None:
    with pytest.raises(UsageError, match="model.layers.1.mlp.gate is kept, but some engine"):
        awq.not_converted(["model.layers.1.mlp.gate_proj"], ["model.layers.1.mlp.gate"])


def test_config_entry() -> None:
    found = awq.FORMAT.quantization_config(
        Contents(schemes={"model.layers.0.mlp.up_proj": scheme()}, kept=["lm_head"])
    )
    assert found == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
        "dynamic": {r"-:lm_head$": {}},
    }
    with pytest.raises(UsageError, match="room for one group size, found \\[64, 128\\]"):
        awq.FORMAT.quantization_config(
            Contents(schemes={"a": scheme(), "b": scheme(group=64)}, kept=[])
        )


def test_the_whole_of_deepseek_v3_takes_seconds() -> None:
    """61 layers of 256 experts: 45,000 names against 600."""
    found = registry.get_architecture("deepseek_v3")
    values = {
        **found.tiny,
        "num_hidden_layers": 61,
        "n_routed_experts": 256,
        "first_k_dense_replace": 3,
    }
    layout = found.layout(Config(values=values))
    names = [one.name for block in layout.blocks for one in block.linears]
    quantized = [name for name in names if ".experts." in name]
    entries = awq.not_converted(quantized, [name for name in names if ".experts." not in name])
    assert (
        len(quantized) > 44_000
        and "model.layers.60.mlp.shared_experts" in entries
        and len(entries) < 200
    )


def test_transformers_waits_for_scales_of_some_activations() -> None:
    """What it does not find it leaves uninitialized, without a word (its integrations/awq.py)."""
    assert awq.FORMAT.limits is not None
    assert (
        "starcoder2's activations"
        in awq.FORMAT.limits("starcoder2", {linear(): scheme()}, [])["transformers"]
    )
    assert awq.FORMAT.limits("llama", {linear(): scheme()}, []) == {}
