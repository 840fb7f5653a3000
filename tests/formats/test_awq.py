"""The AWQ format to the bit, against hand-computed words, and lists that all loaders read alike."""

from __future__ import annotations

import re
from itertools import product

import pytest
import torch
from support.format_examples import SELECTIONS, list_model_modules, make_linear

from quantkit import registry
from quantkit.contracts import Config, Contents, Linear, Quantized, Role, Scheme
from quantkit.errors import NumericsError, UsageError
from quantkit.formats import awq, dense
from quantkit.methods import rtn
from quantkit.numerics import affine, bitpack

SCHEME = Scheme(bits=4, group_size=2, symmetric=False, scale_dtype="bfloat16")


def make_scheme(bits: int = 4, group: int = 128, symmetric: bool = False) -> Scheme:
    return Scheme(bits=bits, group_size=group, symmetric=symmetric, scale_dtype="bfloat16")


# --- bits

CODES = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7], [15, 14, 13, 12, 11, 10, 9, 8]])
"""Q [in, out]: both directions of the AWQ order."""


def make_example() -> Quantized:
    """Return CODES as a matrix [out = 8, in = 2] with one group."""
    return Quantized(
        codes=CODES.T.to(torch.uint8),
        scale=torch.tensor([[0.5], [1], [1], [1], [1], [1], [1], [0.25]], dtype=torch.bfloat16),
        zero=torch.tensor([[8], [8], [8], [8], [8], [8], [8], [0]], dtype=torch.uint8),
    )


def test_pack_gives_golden_words() -> None:
    tensors = awq.FORMAT.pack(make_example(), SCHEME)
    assert tensors["qweight"].tolist() == [[1966171168], [-1966171169]]
    assert [word & 0xFFFFFFFF for word in tensors["qweight"].flatten().tolist()] == [
        0x75316420,
        0x8ACE9BDF,
    ]
    assert tensors["qzeros"].tolist() == [[143165576]]
    assert tensors["scales"].tolist() == [[0.5, 1, 1, 1, 1, 1, 1, 0.25]]
    assert [tensors[name].dtype for name in ("qweight", "qzeros", "scales")] == [
        torch.int32,
        torch.int32,
        torch.bfloat16,
    ]


def test_dequantize_gives_golden_weights() -> None:
    back = awq.FORMAT.dequantize(awq.FORMAT.pack(make_example(), SCHEME), SCHEME)
    assert back.T.tolist() == [[-4, -7, -6, -5, -4, -3, -2, 1.75], [3.5, 6, 5, 4, 3, 2, 1, 2]]
    assert back.dtype == torch.float32


def test_pack_gives_golden_words_of_page_example() -> None:
    """The rows of M [in, out] alternate between two words (formats/README.md, AWQ gemm)."""
    matrix = torch.tensor([[(3 * (8 * k + n) + 1) % 16 for n in range(8)] for k in range(8)])
    packed = bitpack.pack(matrix, 4, axis=1, order=bitpack.AWQ_ORDER)
    assert packed.flatten().tolist() == [1621376369, -399723015] * 4


def test_words_unpack_in_autoawq_order() -> None:
    """AutoAWQ's reverse order: column j is in slot [0, 4, 1, 5, 2, 6, 3, 7][j]."""
    codes = torch.randint(0, 16, (6, 24), generator=torch.Generator().manual_seed(0))
    packed = bitpack.pack(codes, 4, axis=1, order=bitpack.AWQ_ORDER)
    slots = (packed.long().unsqueeze(-1) >> torch.arange(0, 32, 4)) & 15  # [6, 3] -> [6, 3, 8]
    assert torch.equal(slots[..., [0, 4, 1, 5, 2, 6, 3, 7]].flatten(1), codes)


@pytest.mark.parametrize("name", registry.list_names("formats"))
@pytest.mark.parametrize(("out", "width", "group"), [(64, 256, 128), (8, 64, 32), (16, 96, -1)])
def test_layout_lists_tensors_of_pack(name: str, out: int, width: int, group: int) -> None:
    output, linear = registry.get_format(name), make_linear(out=out, width=width)
    scheme = make_scheme(group=group)
    if output.accepts(scheme, linear) is not None:
        pytest.skip(f"{name} does not store this scheme")
    weight = torch.randn(out, width, generator=torch.Generator().manual_seed(out)) * 0.03
    quantized = rtn.METHOD.solve(weight, None, scheme)
    tensors = output.pack(quantized, scheme)
    names = {
        torch.int32: "I32",
        torch.int64: "I64",
        torch.bfloat16: "BF16",
        torch.float16: "F16",
        torch.uint8: "U8",
        torch.float32: "F32",
    }
    stored = {
        f"{linear.name}.{local}": (names[tensor.dtype], tuple(tensor.shape))
        for local, tensor in tensors.items()
    }
    assert stored == {spec.name: (spec.dtype, spec.shape) for spec in output.layout(linear, scheme)}
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    back = output.dequantize(tensors, scheme)
    expected = affine.dequantize(quantized, scheme)
    assert back.shape == (out, width) and torch.allclose(back, expected, rtol=2**-8, atol=0)


@pytest.mark.parametrize(
    "name", [name for name in registry.list_names("formats") if name != "bitsandbytes"]
)
def test_accepts_only_what_pack_can_store(name: str) -> None:
    """All code widths, with rows and columns that end within a word or a run of words."""
    output, n_packed = registry.get_format(name), 0
    sizes = [(64, size) for size in range(4, 65, 4)] + [(size, 64) for size in range(4, 65, 4)]
    for bits, symmetric, (out, width) in product(range(2, 9), (True, False), sizes):
        scheme, linear = make_scheme(bits, -1, symmetric), make_linear(out=out, width=width)
        if output.accepts(scheme, linear) is None:
            zero = None if symmetric else torch.zeros(out, 1, dtype=torch.uint8)
            codes, scale = (
                torch.zeros(out, width, dtype=torch.uint8),
                torch.ones(out, 1, dtype=torch.bfloat16),
            )
            tensors = output.pack(Quantized(codes=codes, scale=scale, zero=zero), scheme)
            shapes = {
                f"{linear.name}.{local}": tuple(tensor.shape) for local, tensor in tensors.items()
            }
            assert shapes == {spec.name: spec.shape for spec in output.layout(linear, scheme)}
            n_packed += 1
    assert n_packed


def test_dequantize_inverts_pack_exactly() -> None:
    scheme = make_scheme()
    quantized = rtn.METHOD.solve(
        torch.randn(64, 256, generator=torch.Generator().manual_seed(1)), None, scheme
    )
    back = awq.FORMAT.dequantize(awq.FORMAT.pack(quantized, scheme), scheme)
    assert torch.equal(back, affine.dequantize(quantized, scheme))


def test_pack_rejects_large_codes_and_symmetric_matrices() -> None:
    codes = make_example().codes.clone()
    codes[3, 1] = 16
    with pytest.raises(NumericsError, match="do not fit 4 bits"):
        awq.FORMAT.pack(
            Quantized(codes=codes, scale=make_example().scale, zero=make_example().zero), SCHEME
        )
    with pytest.raises(UsageError, match="expected zero points, found a symmetric matrix"):
        awq.FORMAT.pack(
            Quantized(codes=make_example().codes, scale=make_example().scale, zero=None), SCHEME
        )


# --- accepted linears


@pytest.mark.parametrize(
    ("scheme", "linear", "reason"),
    [
        (
            make_scheme(bits=3),
            make_linear(),
            "4-bit integers only, found 3 bits; use format compressed_tensors",
        ),
        (
            make_scheme(symmetric=True),
            make_linear(),
            "with zero points, found symmetric: true; use symmetric: false",
        ),
        (
            make_scheme(group=16),
            make_linear(),
            "the AWQ kernels of vLLM and SGLang support group sizes 32, 64, 128 and -1, found 16",
        ),
        (
            make_scheme(),
            make_linear(width=192),
            "no engine loads AWQ with group_size 128 over 192 input features",
        ),
        (
            make_scheme(),
            make_linear(out=12),
            "12 output features do not fill AWQ's words of 8 codes",
        ),
        (make_scheme(), make_linear(role="router"), "vLLM and SGLang build a router without AWQ"),
        (
            make_scheme(),
            make_linear(role="embedding"),
            "vLLM and SGLang build a embedding without AWQ",
        ),
        (make_scheme(), make_linear(role="head"), "vLLM and SGLang build a head without AWQ"),
        (
            make_scheme(),
            make_linear(role="mtp_projection"),
            "vLLM and SGLang build a mtp projection without AWQ",
        ),
        (
            make_scheme(group=-1),
            make_linear(role="routed_expert"),
            "vLLM divides experts by the AWQ group size and fails on -1",
        ),
        (
            Scheme(bits=4, group_size=128, symmetric=False, scale_dtype="float32"),
            make_linear(),
            "vLLM and SGLang hold AWQ scales in 16 bits, found float32; use bfloat16 or float16",
        ),
        (
            Scheme(bits=4, group_size=64, symmetric=False, scale_dtype="float16", kind="nf4"),
            make_linear(),
            "4-bit integers only, found nf4",
        ),
    ],
)
def test_accepts_names_reason_of_unsupported_linear(
    scheme: Scheme, linear: Linear, reason: str
) -> None:
    assert reason in str(awq.FORMAT.accepts(scheme, linear))


@pytest.mark.parametrize("role", ["attention", "mlp", "shared_expert", "routed_expert"])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_accepts_supported_linears(role: Role, group: int) -> None:
    assert awq.FORMAT.accepts(make_scheme(group=group), make_linear(role=role)) is None
    assert awq.FORMAT.accepts(make_scheme(group=-1), make_linear()) is None


def test_dense_stores_any_integer_scheme() -> None:
    assert (
        dense.FORMAT.accepts(make_scheme(bits=3, group=96, symmetric=True), make_linear(width=192))
        is None
    )
    assert "does not divide" in str(dense.FORMAT.accepts(make_scheme(), make_linear(width=192)))
    assert "found nf4" in str(
        dense.FORMAT.accepts(
            Scheme(bits=4, group_size=64, symmetric=False, scale_dtype="float16", kind="nf4"),
            make_linear(),
        )
    )
    assert dense.FORMAT.quantization_config(Contents(schemes={"a": make_scheme()}, kept=[])) is None


# --- modules_to_not_convert


def autoawq(entries: list[str], module: str) -> bool:
    """AutoAWQ's rule, a substring (formats/README.md, AWQ gemm); True: unquantized."""
    return any(entry in module for entry in entries)


def vllm(entries: list[str], module: str) -> bool:
    """A substring of vLLM's name: a fused module's own, or of all its members; a mixture fails."""
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
    """A substring of SGLang's name; fused modules only have their fused name."""
    return autoawq(entries, module)


def transformers(entries: list[str], module: str) -> bool:
    """should_convert_module of transformers 5.23."""
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    return any(
        re.match(rf"(?:{entry}){boundary}", module) or module.endswith(entry) for entry in entries
    )


def gptqmodel(dynamic: object, module: str) -> bool:
    """GPTQModel reads only `dynamic`, for AWQ too: "-:" and a pattern, matched from the start."""
    assert isinstance(dynamic, dict) and all(pattern.startswith("-:") for pattern in dynamic)
    return any(re.match(pattern.removeprefix("-:"), module) for pattern in dynamic)


@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS.keys())
def test_every_loader_excludes_exactly_the_kept_modules(selection: str) -> None:
    modules = list_model_modules()
    quantized = [name for name in modules if re.search(selection, name)]
    kept = [name for name in modules if name not in quantized]
    assert quantized and kept
    entries = awq.list_not_converted(quantized, kept)
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
            (name, member, fused_name)
            for name in modules
            for fused_name, member in names.items()
            if ".experts." not in name
        ]
        for name, member, fused_name in fused:
            if name.endswith(f".{member}"):
                module = f"{name.removesuffix(member)}{fused_name}"
                assert loader(entries, module) == (name in kept), f"{loader.__name__}: {module}"
    for layer in range(3, 24):
        fused_name = f"model.layers.{layer}.mlp.experts"
        assert vllm(entries, fused_name) == (f"{fused_name}.0.up_proj" in kept)
    dynamic = awq.make_quantization_config(
        Contents(schemes=dict.fromkeys(quantized, make_scheme()), kept=kept)
    )["dynamic"]
    for name in modules:
        assert gptqmodel(dynamic, name) == (name in kept), f"GPTQModel: {name}"


def test_entries_are_highest_possible_parents() -> None:
    modules = list_model_modules(layers=5, dense_layers=2)
    quantized = [name for name in modules if ".experts." in name]
    entries = awq.list_not_converted(quantized, [name for name in modules if name not in quantized])
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


def test_layer_1_is_not_named_if_transformers_would_match_layer_10() -> None:
    """The last dot of the regular expression "model.layers.1." matches the 0 of layer 10."""
    modules = list_model_modules(layers=12, dense_layers=12)
    kept = [name for name in modules if name.startswith("model.layers.1.")]
    entries = awq.list_not_converted(
        [name for name in modules if name not in kept and "layers" in name], kept
    )
    assert entries == ["model.layers.1.self_attn", "model.layers.1.mlp"]


def test_kept_name_contained_in_quantized_name_raises() -> None:
    with pytest.raises(UsageError, match="model.layers.1.mlp.gate is kept, but some engine"):
        awq.list_not_converted(["model.layers.1.mlp.gate_proj"], ["model.layers.1.mlp.gate"])


def test_config_entry_is_complete() -> None:
    entry = awq.FORMAT.quantization_config(
        Contents(schemes={"model.layers.0.mlp.up_proj": make_scheme()}, kept=["lm_head"])
    )
    assert entry == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
        "dynamic": {r"-:lm_head$": {}},
    }
    with pytest.raises(UsageError, match="has one group size, found \\[64, 128\\]"):
        awq.FORMAT.quantization_config(
            Contents(schemes={"a": make_scheme(), "b": make_scheme(group=64)}, kept=[])
        )


def test_deepseek_v3_names_fit_in_few_entries() -> None:
    """61 layers of 256 experts: 45,000 quantized names and 600 kept ones, in seconds."""
    architecture = registry.get_architecture("deepseek_v3")
    values = {
        **architecture.tiny,
        "num_hidden_layers": 61,
        "n_routed_experts": 256,
        "first_k_dense_replace": 3,
    }
    layout = architecture.layout(Config(values=values))
    names = [linear.name for block in layout.blocks for linear in block.linears]
    quantized = [name for name in names if ".experts." in name]
    entries = awq.list_not_converted(quantized, [name for name in names if ".experts." not in name])
    assert (
        len(quantized) > 44_000
        and "model.layers.60.mlp.shared_experts" in entries
        and len(entries) < 200
    )


def test_transformers_does_not_load_families_with_activation_scales() -> None:
    """It leaves the absent scales uninitialized, without a warning (its integrations/awq.py)."""
    assert awq.FORMAT.limits is not None
    assert (
        "starcoder2's activations"
        in awq.FORMAT.limits("starcoder2", {make_linear(): make_scheme()}, [])["transformers"]
    )
    assert awq.FORMAT.limits("llama", {make_linear(): make_scheme()}, []) == {}
