"""compressed-tensors to the bit, against hand-computed words, and artifacts in transformers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from support.builds import build
from support.checkpoints import make_tiny_config, write_checkpoint
from support.dequantized import Stored
from support.format_examples import SELECTIONS, list_model_modules, make_linear
from support.gptq_examples import M_WORDS, M
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from quantkit.contracts import Contents, Linear, Quantized, Scheme
from quantkit.errors import NumericsError, UsageError
from quantkit.formats import compressed_tensors as ct
from quantkit.formats.common.checks import IntegerCodes, group_by_codes
from quantkit.formats.common.engine_names import FUSED_MODULES
from quantkit.methods import rtn
from quantkit.numerics import affine

pytestmark = pytest.mark.usefixtures("quick_builds")


def make_scheme(
    bits: int = 4, group: int = 128, symmetric: bool = True, kind: str = "int"
) -> Scheme:
    return Scheme(
        bits=bits, group_size=group, symmetric=symmetric, scale_dtype="bfloat16", kind=kind
    )  # type: ignore[arg-type]


def get_codes(scheme: Scheme) -> IntegerCodes:
    ((codes, _),) = group_by_codes({"": scheme})
    return codes


# --- bits


def test_pack_gives_golden_words() -> None:
    """Codes of M along `in`, not transposed; zero points along `out`."""
    zero = torch.tensor([[8], [1], [2], [3], [4], [5], [6], [15]], dtype=torch.uint8)
    scale = torch.ones(8, 1).bfloat16()
    tensors = ct.FORMAT.pack(
        Quantized(codes=M.T, scale=scale, zero=zero), make_scheme(group=-1, symmetric=False)
    )
    assert tensors["weight_packed"].tolist() == [[word] for word in M_WORDS]
    assert tensors["weight_zero_point"].tolist() == [[-162254312]]  # 0xF6543218
    assert (
        tensors["weight_shape"].tolist() == [8, 8] and tensors["weight_shape"].dtype == torch.int64
    )
    symmetric = ct.FORMAT.pack(Quantized(codes=M.T, scale=scale, zero=None), make_scheme(group=-1))
    assert sorted(symmetric) == ["weight_packed", "weight_scale", "weight_shape"]
    assert torch.equal(symmetric["weight_packed"], tensors["weight_packed"])


def test_signed_codes_are_stored_plus_eight() -> None:
    """The library's q = -8, -7, 0, 1, 2, 3, 4, 5 (formats/README.md, compressed-tensors)."""
    codes = torch.tensor([[-8, -7, 0, 1, 2, 3, 4, 5]]) + 8
    quantized = Quantized(codes=codes.byte(), scale=torch.full((1, 1), 0.5).bfloat16(), zero=None)
    tensors = ct.FORMAT.pack(quantized, make_scheme(group=-1))
    assert tensors["weight_packed"].tolist() == [[-591751152]]  # 0xDCBA9810
    assert ct.FORMAT.dequantize(tensors, make_scheme(group=-1)).tolist() == [
        [-4, -3.5, 0, 0.5, 1, 1.5, 2, 2.5]
    ]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group", [32, -1])
def test_compressed_tensors_unpacks_same_weights(bits: int, symmetric: bool, group: int) -> None:
    """The library unpacks in float32, so exactly, with the group of our config.json."""
    scheme, linear = make_scheme(bits, group, symmetric), make_linear(out=96, width=256)
    weight = torch.randn(96, 256, generator=torch.Generator().manual_seed(bits)) * 0.03
    quantized = rtn.METHOD.solve(weight, None, scheme)
    tensors = ct.FORMAT.pack(quantized, scheme)
    dtypes = {torch.int32: "I32", torch.int64: "I64", torch.bfloat16: "BF16"}
    stored = {
        f"{linear.name}.{local}": (dtypes[x.dtype], tuple(x.shape)) for local, x in tensors.items()
    }
    assert stored == {
        spec.name: (spec.dtype, spec.shape) for spec in ct.FORMAT.layout(linear, scheme)
    }
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    expected = affine.dequantize(quantized, scheme)
    assert torch.equal(ct.FORMAT.dequantize(tensors, scheme), expected)
    library = BaseCompressor.get_value_from_registry(CompressionFormat.pack_quantized.value)
    group_0 = QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(**ct.make_weight_args(get_codes(scheme)))
    )
    unpacked = library.decompress(
        {**tensors, "weight_scale": tensors["weight_scale"].float()}, group_0
    )
    assert torch.equal(unpacked["weight"], expected)


def test_pack_rejects_large_codes_and_wrong_zero_points() -> None:
    scale = torch.ones(8, 1).bfloat16()
    with pytest.raises(NumericsError, match="do not fit 4 bits"):
        ct.FORMAT.pack(Quantized(codes=M.T + 1, scale=scale, zero=None), make_scheme(group=-1))
    with pytest.raises(UsageError, match="says symmetric: true, found a matrix with zero points"):
        ct.FORMAT.pack(
            Quantized(codes=M.T, scale=scale, zero=torch.zeros_like(scale).byte()),
            make_scheme(group=-1),
        )
    with pytest.raises(
        UsageError, match="says symmetric: false, found a matrix without zero points"
    ):
        ct.FORMAT.pack(
            Quantized(codes=M.T, scale=scale, zero=None), make_scheme(group=-1, symmetric=False)
        )


# --- accepted linears


@pytest.mark.parametrize(
    ("scheme", "linear", "reason"),
    [
        (
            make_scheme(bits=9),
            make_linear(),
            "read compressed-tensors with 2 to 8 bits, found 9 bits; use format dense",
        ),
        (make_scheme(kind="nf4"), make_linear(), "found nf4; use format bitsandbytes"),
        (
            make_scheme(bits=3, group=-1),
            make_linear(width=208),
            "256 x 208 features do not fill the words of 32 codes",
        ),
        (
            make_scheme(bits=6, group=-1),
            make_linear(width=208),
            "256 x 208 features do not fill the words of 32 codes",
        ),
        (make_scheme(group=16), make_linear(), "support group sizes 32, 64, 128 and -1, found 16"),
        (
            make_scheme(),
            make_linear(width=192),
            "no engine loads compressed-tensors with group_size 128 over 192 input features",
        ),
        (
            make_scheme(symmetric=False),
            make_linear(out=12),
            "12 x 256 features do not fill the words of 8 codes",
        ),
        (
            make_scheme(group=-1),
            make_linear(width=28),
            "256 x 28 features do not fill the words of 8 codes",
        ),
        (
            make_scheme(),
            make_linear(role="router"),
            "build this router without codes and find no weight; keep it",
        ),
        (
            make_scheme(symmetric=False),
            make_linear(role="routed_expert"),
            "transformers cannot load experts with zero points from compressed-tensors",
        ),
        (
            make_scheme(),
            make_linear("model.layers.0.self_attn.kv_b_proj"),
            "SGLang looks for kv_b_proj's plain weight",
        ),
        (
            Scheme(bits=4, group_size=128, symmetric=True, scale_dtype="float32"),
            make_linear(),
            "hold compressed-tensors scales in 16 bits, found float32",
        ),
    ],
)
def test_accepts_names_reason_of_unsupported_linear(
    scheme: Scheme, linear: Linear, reason: str
) -> None:
    assert reason in str(ct.FORMAT.accepts(scheme, linear))


@pytest.mark.parametrize("group", [32, 64, 128, -1])
@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True)])
def test_accepts_supported_linears(bits: int, symmetric: bool, group: int) -> None:
    for role in ("attention", "mlp", "shared_expert"):
        assert (
            ct.FORMAT.accepts(make_scheme(bits, group, symmetric), make_linear(role=role)) is None
        )  # type: ignore[arg-type]
    assert (
        ct.FORMAT.accepts(make_scheme(bits, group), make_linear(out=12, role="routed_expert"))
        is None
    )


@pytest.mark.parametrize(
    ("scheme", "engines"),
    [
        (make_scheme(), {"vLLM", "SGLang", "transformers"}),
        (make_scheme(8), {"vLLM", "SGLang", "transformers"}),
        # transformers: only with CompressedTensorsConfig(dequantize=True)
        (make_scheme(symmetric=False), {"vLLM", "SGLang"}),
        (make_scheme(8, symmetric=False), set()),
        (make_scheme(3), {"transformers"}),
    ],
)
def test_limits_name_engines_without_kernels(scheme: Scheme, engines: set[str]) -> None:
    assert ct.FORMAT.accepts(scheme, make_linear()) is None and ct.FORMAT.limits is not None
    assert (
        set(ct.FORMAT.engines) - set(ct.FORMAT.limits("llama", {make_linear(): scheme}, []))
        == engines
    )


# --- config.json


def library(entries: list[str], module: str) -> bool:
    """Exact names, or expressions from the start; vLLM's rule too, for unfused modules."""
    return any(re.match(x[3:], module) if x.startswith("re:") else x == module for x in entries)


def sglang(entries: list[str], module: str) -> bool:
    """Plain names are dotted suffixes in SGLang."""
    return any(
        re.match(x[3:], module) if x.startswith("re:") else f".{module}".endswith(f".{x}")
        for x in entries
    )


@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS.keys())
def test_every_loader_ignores_exactly_the_kept_modules(selection: str) -> None:
    modules = list_model_modules()
    quantized = [name for name in modules if re.search(selection, name)]
    kept = [name for name in modules if name not in quantized]
    entries = ct.list_ignored(quantized, kept)
    for loader in (library, sglang):
        wrong = [name for name in modules if loader(entries, name) != (name in kept)]
        assert not wrong, f"{loader.__name__}: {wrong[:5]}"
    for name in (name for name in modules if ".experts." not in name):
        parent, _, last = name.rpartition(".")
        for fused in (fused for fused, members in FUSED_MODULES.items() if last in members):
            assert sglang(entries, f"{parent}.{fused}") == (name in kept), f"{parent}.{fused}"


def test_config_entry_is_complete() -> None:
    modules = list_model_modules(layers=3, dense_layers=1)
    quantized = [name for name in modules if ".experts." in name]
    kept = [name for name in modules if name not in quantized]
    entry = ct.FORMAT.quantization_config(
        Contents(schemes=dict.fromkeys(quantized, make_scheme()), kept=kept)
    )
    assert entry == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "ignore": [
            "model.embed_tokens",
            r"re:model\.layers\.0(\..*)?$",
            r"re:model\.layers\.(1|2)\.self_attn(\..*)?$",
            r"re:model\.layers\.(1|2)\.mlp\.gate$",
            r"re:model\.layers\.(1|2)\.mlp\.shared_experts(\..*)?$",
            "lm_head",
        ],
        "config_groups": {
            "group_0": {
                "format": "pack-quantized",
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group",
                    "group_size": 128,
                    "dynamic": False,
                },
                "input_activations": None,
                "output_activations": None,
            }
        },
    }
    channel = {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "channel",
        "dynamic": False,
    }
    assert ct.make_weight_args(get_codes(make_scheme(8, -1))) == channel


def test_config_has_group_per_scheme() -> None:
    """The most frequent targets "Linear"; others match names, without the text "experts"."""
    modules = list_model_modules(layers=3, dense_layers=1)
    schemes = {
        n: make_scheme(8, -1) if "shared" in n else make_scheme()
        for n in modules
        if "_proj" in n and "_attn" not in n
    }
    schemes["model.layers.0.mlp.down_proj"] = make_scheme(group=32)
    kept = [name for name in modules if name not in schemes]
    entry = ct.FORMAT.quantization_config(Contents(schemes=schemes, kept=kept))
    assert entry is not None
    groups = entry["config_groups"]
    assert {tuple(g["targets"]): g["weights"]["num_bits"] for g in groups.values()} == {  # type: ignore[attr-defined]
        ("Linear",): 4,
        (r"re:model\.layers\.(1|2)\.mlp\.shared_exp[e]rts(\..*)?$",): 8,
        (r"re:model\.layers\.0\.mlp\.down_proj$",): 4,
    }
    classify = ct.classify_by_targets(entry)
    assert all(classify(name) == get_codes(scheme) for name, scheme in schemes.items())
    assert classify("model.layers.1.mlp.shared_experts.gate_up_proj") == get_codes(
        make_scheme(8, -1)
    )


def test_transformers_does_not_load_experts_of_two_schemes() -> None:
    experts = [
        make_linear(f"model.layers.{layer}.mlp.experts.0.up_proj", role="routed_expert")
        for layer in range(2)
    ]
    limits = ct.find_engine_limits(
        "llama", {experts[0]: make_scheme(), experts[1]: make_scheme(8)}, []
    )
    assert limits == {
        "transformers": "reads all routed experts of compressed-tensors by one scheme"
    }
    assert not ct.find_engine_limits(
        "llama", {experts[0]: make_scheme(), make_linear(): make_scheme(8)}, []
    )


# --- artifacts in transformers

LATENT = (
    r'[{match: "*.kv_b_proj", keep: source}, {match: '
    r'"re:.*\\.(self_attn|mlp)\\.(?!gate$).*", '
    r"quantize: {}}, "
)
CASES = {
    "llama": ("llama", "all-linear", "bits: 4, group_size: 64, symmetric: true"),
    "llama-channel-8": ("llama", "all-linear", "bits: 8, group_size: -1, symmetric: true"),
    "llama-asymmetric": ("llama", "all-linear", "bits: 4, group_size: 32, symmetric: false"),
    "llama-3": ("llama", "all-linear", "bits: 3, group_size: 64, symmetric: true"),
    "deepseek_v3-experts-6": (
        "deepseek_v3",
        "experts-only",
        "bits: 6, group_size: 32, symmetric: true",
    ),
    "deepseek_v3-experts": (
        "deepseek_v3",
        "experts-only",
        "bits: 4, group_size: 64, symmetric: true",
    ),
    "llama-several": (
        "llama",
        '[{match: "*.down_proj", quantize: {bits: 8, group_size: -1}}, {match: "*.self_attn.*", '
        "quantize: "
        '{group_size: 32}}, {match: "*.mlp.*", quantize: default}, {match: "*", keep: source}]',
        "bits: 4, group_size: 64, symmetric: true",
    ),
    "qwen2_moe-several": (
        "qwen2_moe",
        '[{match: "*.mlp.experts.*", quantize: default}, {match: "*.shared_expert.*", quantize: '
        "{bits: 8}}, "
        '{match: "*.o_proj", quantize: {bits: 3}}, {match: "*", keep: source}]',
        "bits: 4, group_size: 64, symmetric: true",
    ),
    "deepseek_v3-all": (
        "deepseek_v3",
        LATENT + '{match: "*", keep: source}]',
        "bits: 4, group_size: 64, symmetric: true",
    ),
}


@pytest.mark.parametrize(("name", "rules", "quantize_keys"), CASES.values(), ids=CASES.keys())
def test_transformers_loads_stored_weights(
    name: str, rules: str, quantize_keys: str, tmp_path: Path
) -> None:
    """Every weight equals ours in bfloat16, the dtype of the scales; the logits equal ours."""
    folder = write_checkpoint(
        tmp_path / "source", make_tiny_config(name, num_nextn_predict_layers=0)
    )
    quantize = f"{{method: rtn, {quantize_keys}}}"
    result = build(
        folder, tmp_path / "artifact", rules=rules, quantize=quantize, format="compressed_tensors"
    )
    ours = Stored.open(result.path).model()
    # compressed-tensors 0.20 expects another shape of zero points if it unpacks them after loading
    at_once = (
        {"quantization_config": CompressedTensorsConfig(dequantize=True)}
        if "symmetric: false" in quantize_keys
        else {}
    )
    model, loading_info = AutoModelForCausalLM.from_pretrained(
        result.path, dtype=torch.float32, output_loading_info=True, **at_once
    )
    assert not any(loading_info.values()), loading_info
    tokens = torch.randint(0, 700, (2, 40), generator=torch.Generator().manual_seed(0))
    # experts stay in the scales' bfloat16 and would compute in it
    for weight in model.parameters():
        weight.data = weight.data.float() if weight.dtype == torch.bfloat16 else weight.data
    with torch.no_grad():
        logits = model(tokens).logits  # the first forward unpacks the remaining weights
        loaded, stored = model.state_dict(), ours.state_dict()
        different = [
            key for key in stored if not torch.equal(loaded[key].bfloat16(), stored[key].bfloat16())
        ]
        assert not different
        ours.load_state_dict({key: loaded[key] for key in stored})
        assert torch.allclose(logits, ours(tokens).logits, atol=1e-4, rtol=1e-4)
