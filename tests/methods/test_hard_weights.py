"""Extreme weights and inputs: one recorded outcome for every method.

Rejected: NaN and infinity, in one sentence that names the tensor. Correct: constant groups, values
beyond FP16 under BF16 scales. A named fallback: groups of zeros, scales outside their dtype,
experts without tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.builds import build
from support.checkpoints import make_tiny_config, write_checkpoint
from torch import Tensor

from quantkit.artifact.load_model import load_model
from quantkit.errors import CheckpointError, NumericsError
from quantkit.numerics import gram
from quantkit.verify.shallow import verify_artifact

Record = Callable[[str, object], None]
METHODS: Mapping[str, dict[str, str]] = {
    "awq": {"quantize": "{method: awq, rounding: nearest, group_size: 64}", "format": "awq"},
    "awq+gptq": {"quantize": "{method: awq, rounding: gptq, group_size: 64}", "format": "gptq_v2"},
    "gptq": {"quantize": "{method: gptq, group_size: 64, symmetric: true}", "format": "gptq"},
    "rtn": {
        "quantize": "{method: rtn, group_size: 64, symmetric: true}",
        "format": "compressed_tensors",
    },
    "rtn_mse": {"quantize": "{method: rtn_mse, group_size: 64}", "format": "dense"},
    "nf4": {"quantize": "{method: nf4}", "format": "bitsandbytes"},
}
FEW = "{set: tiny-v3, sequences: 4, length: 32, min_expert_tokens: 4}"
TEXT = "{set: tiny-v3-heldout, windows: 2, length: 32}"
LAYER = "model.layers.0"
ZERO, CONSTANT, TINY, HUGE, EMPTY = (
    f"{LAYER}.self_attn.q_proj", f"{LAYER}.self_attn.k_proj", f"{LAYER}.mlp.gate_proj",
    f"{LAYER}.self_attn.v_proj",
    "model.layers.1.mlp.down_proj",
)  # fmt: skip


def change_checkpoint(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """Change the tensors of a checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors",
    )
    return folder


def harden(tensors: dict[str, Tensor]) -> None:
    """Put one extreme into the first 64 columns of each matrix; one matrix becomes zeros."""
    tensors[f"{ZERO}.weight"][:, :64] = 0
    tensors[f"{CONSTANT}.weight"][:, :64] = 0.5
    tensors[f"{TINY}.weight"][:, :64] = 1e-39  # a subnormal number in BF16 and in float32
    tensors[f"{HUGE}.weight"][0, :64] = 1e6
    tensors[f"{EMPTY}.weight"][:] = 0


@pytest.fixture(scope="module")
def hard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a BF16 llama with extreme weights."""
    return change_checkpoint(
        write_checkpoint(tmp_path_factory.mktemp("hard") / "source", make_tiny_config("llama")),
        harden,
    )


def modules(artifact: Path) -> dict[str, Any]:
    """Return the manifest's modules."""
    return dict(json.loads((artifact / "quantkit/manifest.json").read_text())["modules"])


def weights(artifact: Path) -> dict[str, Tensor]:
    """Return every weight of the artifact, unpacked to float32."""
    model = load_model(artifact)
    tensors_by_name = {}
    for name, module in model.named_modules():
        if (
            hasattr(module, "weight")
            and name.startswith("model.layers")
            and not name.endswith("norm")
        ):
            weight = module.weight
            state = getattr(weight, "quant_state", None)
            if state is not None:
                from bitsandbytes.functional import dequantize_4bit

                weight = dequantize_4bit(weight.data, state)
            tensors_by_name[name] = weight.detach().float()
    return tensors_by_name


@pytest.mark.parametrize("method", METHODS)
def test_extreme_weights_give_finite_artifact_with_named_fallbacks(
    method: str, hard: Path, tmp_path: Path, record_property: Record
) -> None:
    """Finite numbers, fallbacks per module, every extreme group correct to a step."""
    out = build(
        hard,
        tmp_path / "out",
        rules="all-linear",
        calibration=FEW,
        fidelity="none",
        **METHODS[method],
    ).path
    verify_artifact(out)
    for name, tensor in load_file(out / "model.safetensors").items():
        assert not tensor.is_floating_point() or bool(torch.isfinite(tensor).all()), name
    records, stored = modules(out), weights(out)
    assert set(records) == set(stored)
    for name in (ZERO, EMPTY):
        assert "zero-group" in records[name]["fallbacks"]
    assert bool((stored[ZERO][:, :64] == 0).all()) and bool((stored[EMPTY] == 0).all())
    if method in (
        "rtn",
        "rtn_mse",
    ):  # GPTQ gives such columns a part of the others' errors, AWQ a scale
        assert {"zero-group", "scale-clamped"} <= set(records[TINY]["fallbacks"])
        assert bool((stored[TINY][:, :64] == 0).all())
    assert (
        float(stored[TINY][:, :64].abs().max()) < 0.1
    )  # NF4 stores scales in 8 bits over the matrix's range
    if records[CONSTANT]["rescaled"]:  # its group is constant no more: no worse than others
        assert records[CONSTANT]["relative_error"] < 0.2
    elif (
        "gptq" in method
    ):  # a column takes on what those before it have lost: some are a step or two away
        assert abs(float(stored[CONSTANT][:, :64].mean()) - 0.5) < 0.05
    else:
        assert torch.allclose(stored[CONSTANT][:, :64], torch.tensor(0.5), rtol=0.08)
    if method not in ("awq", "awq+gptq"):  # which move a part of it into the next matrix
        assert torch.allclose(stored[HUGE][0, :64], torch.tensor(1e6), rtol=0.08)
    assert all(0 <= module["relative_error"] < 0.5 for module in records.values())
    assert records[EMPTY]["relative_error"] == 0 and records[EMPTY]["sqnr_db"] is None
    record_property("tried", 5)


@pytest.mark.parametrize("method", ["awq", "awq+gptq", "gptq", "rtn", "rtn_mse"])
def test_values_beyond_fp16_clamp_fp16_scales(
    method: str, hard: Path, tmp_path: Path, record_property: Record
) -> None:
    """The scale is the largest of its dtype, with the fallback named."""
    keys = {
        **METHODS[method],
        "quantize": METHODS[method]["quantize"].replace("}", ", scale_dtype: float16}"),
    }
    out = build(
        hard, tmp_path / "out", rules="all-linear", calibration=FEW, fidelity="none", **keys
    ).path
    verify_artifact(out)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights(out).values())
    if method not in ("awq", "awq+gptq"):  # which move it into the next matrix
        assert "scale-clamped" in modules(out)[HUGE]["fallbacks"]
    record_property("input", f"values beyond FP16, FP16 scales: {method}")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("method", METHODS)
def test_weight_that_is_not_finite_is_rejected(
    method: str, value: float, tmp_path: Path, record_property: Record
) -> None:
    """The error names the tensor, and no artifact is left."""
    folder = write_checkpoint(tmp_path / "source", make_tiny_config("llama", num_hidden_layers=1))
    change_checkpoint(
        folder, lambda tensors: tensors[f"{LAYER}.mlp.up_proj.weight"][3, 5].fill_(value)
    )
    with pytest.raises(
        CheckpointError,
        match=r"model\.layers\.0\.mlp\.up_proj\.weight.*expected finite values, found",
    ):
        build(
            folder,
            tmp_path / "out",
            rules="all-linear",
            calibration=FEW,
            fidelity="none",
            **METHODS[method],
        )
    assert not (tmp_path / "out").exists()
    record_property("input", f"weight that is {value}: {method}")


NORM_OF, DOWN = f"{LAYER}.post_attention_layernorm.weight", f"{LAYER}.mlp.down_proj.weight"
BEYOND: Mapping[str, Callable[[dict[str, Tensor]], object]] = {
    "one weight": lambda t: t[f"{LAYER}.mlp.gate_proj.weight"][3, 5].fill_(3e38),
    "a matrix": lambda t: t[DOWN].mul_(1e38),
    "a norm": lambda t: t[NORM_OF].fill_(1e30),
    "the last norm": lambda t: t["model.norm.weight"].fill_(3e38),
}


@pytest.mark.parametrize("method", ["rtn", "awq", "awq+gptq", "gptq"])
@pytest.mark.parametrize("name", BEYOND)
def test_overflowing_weights_are_rejected(
    name: str, method: str, tmp_path: Path, record_property: Record
) -> None:
    """Hidden states become NaN or infinite: one sentence with the place, and no artifact."""
    folder = change_checkpoint(
        write_checkpoint(tmp_path / "source", make_tiny_config("llama")), BEYOND[name]
    )
    with pytest.raises(NumericsError, match=r"^(model\.layers\.0|final norm)\S*.*: .*(NaN|infin)"):
        build(
            folder,
            tmp_path / "out",
            rules="all-linear",
            calibration=FEW,
            fidelity=TEXT,
            **METHODS[method],
        )
    assert not (tmp_path / "out").exists()
    record_property("input", f"overflow by {name}: {method}")


@pytest.mark.parametrize("values", [{"rms_norm_eps": -1.0}, {"rope_theta": 0.0}], ids=str)
def test_overflowing_config_is_rejected(values: dict[str, object], tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "source", make_tiny_config("llama", **values))
    with pytest.raises(
        NumericsError, match=r"model\.layers\.0: expected finite hidden states.*reference stream"
    ):
        build(folder, tmp_path / "out", rules="all-linear", fidelity=TEXT, **METHODS["rtn"])


@pytest.mark.parametrize("method", ["rtn", "rtn_mse"])
def test_weights_too_small_to_store_have_recorded_error(method: str, tmp_path: Path) -> None:
    """Their squares are 0 in float32; the recorded error must not be 0."""
    folder = write_checkpoint(tmp_path / "source", make_tiny_config("llama", num_hidden_layers=1))
    change_checkpoint(folder, lambda tensors: tensors[f"{LAYER}.mlp.up_proj.weight"].fill_(1e-40))
    change_checkpoint(folder, lambda tensors: tensors[f"{LAYER}.mlp.gate_proj.weight"].mul_(1e-38))
    out = build(
        folder,
        tmp_path / "out",
        rules="all-linear",
        calibration=FEW,
        fidelity="none",
        **METHODS[method],
    ).path
    records, stored, source = modules(out), weights(out), load_file(folder / "model.safetensors")
    for name in (f"{LAYER}.mlp.up_proj", f"{LAYER}.mlp.gate_proj"):
        weight, back = source[f"{name}.weight"].double(), stored[name].double()
        assert records[name]["relative_error"] == pytest.approx(
            float((weight - back).norm() / weight.norm()), rel=1e-5
        )
        assert records[name]["relative_error"] > 0.4


def test_errors_do_not_depend_on_magnitude() -> None:
    """A power of two as a factor of all weights changes no figure."""
    weight = torch.randn(3, 8, 128, generator=torch.Generator().manual_seed(0))
    near, inputs = (weight * 8).round() / 8, torch.eye(128)
    sqnr, lost = (
        gram.compute_sqnr_db(weight, near),
        gram.compute_relative_error(weight, near, inputs),
    )
    for exponent in (-100, 100):
        factor = 2.0**exponent
        assert torch.equal(
            gram.compute_relative_error(weight * factor, near * factor, inputs), lost
        )
        assert torch.allclose(gram.compute_sqnr_db(weight * factor, near * factor), sqnr)
    tiny = torch.full((8, 128), 1e-40)
    assert (
        float(gram.compute_sqnr_db(tiny, tiny * 0)) == 0.0
        and float(gram.compute_relative_error(tiny, tiny * 0, inputs)) == 1.0
    )
    assert float(gram.compute_relative_error(tiny * 0, tiny * 0, inputs)) == 0.0


@pytest.mark.parametrize("method", ["awq", "awq+gptq", "gptq"])
@pytest.mark.parametrize("kind", ["one token", "rank 1"])
def test_minimal_calibration_input_gives_valid_artifact(
    method: str, kind: str, tmp_path: Path, record_property: Record
) -> None:
    """Two tokens, the shortest sequence; and one repeated token, whose gram has rank 1."""
    folder = write_checkpoint(tmp_path / "source", make_tiny_config("llama"))
    text = "{set: tiny-v3, sequences: 1, length: 2}"
    if (
        kind == "rank 1"
    ):  # every token has the same vector, and attention makes the same of all of them
        change_checkpoint(
            folder,
            lambda t: t["model.embed_tokens.weight"].copy_(
                t["model.embed_tokens.weight"][:1].expand(768, -1)
            ),
        )
        text = FEW
    out = build(
        folder,
        tmp_path / "out",
        rules="all-linear",
        calibration=text,
        fidelity="none",
        **METHODS[method],
    ).path
    verify_artifact(out)
    records = modules(out)
    for name, module in records.items():
        assert 0 < module["relative_error"] < 1 and 0 <= module["output_relative_error"] < 0.71, (
            name,
            module,
        )
    assert {module["tokens"] for module in records.values()} == (
        {2} if kind == "one token" else {128}
    )
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights(out).values())
    record_property("input", f"calibration of {kind}: {method}")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["never routed to", "all tokens to one"])
def test_experts_without_tokens_use_the_shared_gram(
    method: str, kind: str, tmp_path: Path, record_property: Record
) -> None:
    """Experts without tokens use the layer's statistics; manifest and report name it."""
    folder = write_checkpoint(
        tmp_path / "source", make_tiny_config("deepseek_v3", num_nextn_predict_layers=0)
    )
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"

    def route(tensors: dict[str, Tensor]) -> None:
        if kind == "never routed to":
            tensors[bias][5] = -1e4
        else:  # the top 2 of 8 are always the same
            tensors[bias][:] = -1e4
            tensors[bias][2:4] = 1e4

    change_checkpoint(folder, route)
    keys = dict(METHODS[method])
    learns = method in ("awq", "awq+gptq", "gptq")
    outcome = build(
        folder, tmp_path / "out", rules="experts-only", calibration=FEW, fidelity=TEXT, **keys
    )
    verify_artifact(outcome.path)
    records = modules(outcome.path)
    without_tokens = {5} if kind == "never routed to" else {0, 1, 4, 5, 6, 7}
    for name, module in records.items():
        expert = int(name.split(".experts.")[1].split(".")[0])
        assert ("shared-gram" in module["fallbacks"]) == (
            learns and expert in without_tokens
        ) or expert not in without_tokens, name
        assert 0 < module["relative_error"] < 0.5
    layers = outcome.fidelity.experts
    if learns:
        assert layers is not None
        counts = layers.layers[0].tokens
        assert {expert for expert, tokens in enumerate(counts) if tokens == 0} >= without_tokens
    record_property("input", f"router: {kind}: {method}")
