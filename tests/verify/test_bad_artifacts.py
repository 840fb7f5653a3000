"""Artifacts that were damaged and sealed again, in every format: only their content shows it.

Each case is counted: `record_property` puts "reliability" and "fault" into a JUnit report, one per
artifact.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from click.testing import CliRunner
from support.checkpoints import make_recipe_text, make_tiny_config, write_checkpoint
from support.damage import (
    StoredTensor,
    add_tensor,
    edit_json,
    edit_model_config,
    edit_quantization_config,
    edit_tensor,
    encode_bf16,
    encode_f32,
    encode_i32,
    find_shard,
    list_shards,
    overwrite_element,
    read_shard,
    rehash,
    remove_tensor,
    rename_tensor,
    reseal,
    set_status,
    write_shard,
)

from quantkit import pipeline, registry
from quantkit.artifact.layout import INDEX, MANIFEST
from quantkit.cli.main import main
from quantkit.contracts import Scheme
from quantkit.errors import ArtifactError, QuantkitError
from quantkit.formats.bitsandbytes import NF4_VALUES
from quantkit.numerics import nf4
from quantkit.recipe.parse import parse_recipe
from quantkit.verify.shallow import verify_artifact

pytestmark = pytest.mark.usefixtures("quick_builds")

SYMMETRIC = "{method: rtn, bits: 4, group_size: 64, symmetric: true}"
SEVERAL = (
    '[{match: "*.down_proj", quantize: {bits: 8}}, {match: "*.mlp.*", quantize: default}, {match: '
    '"*", keep: source}]'
)
KINDS: dict[str, tuple[str, dict[str, str]]] = {
    "awq": ("qwen3_moe", {"format": "awq", "quantize": "{method: rtn, bits: 4, group_size: 64}"}),
    "gptq": ("qwen3_moe", {"format": "gptq", "quantize": SYMMETRIC}),
    "gptq-several": ("llama", {"format": "gptq", "quantize": SYMMETRIC, "rules": SEVERAL}),
    "several": ("llama", {"format": "compressed_tensors", "quantize": SYMMETRIC, "rules": SEVERAL}),
    "gptq_v2": (
        "llama",
        {
            "format": "gptq_v2",
            "quantize": "{method: rtn, bits: 3, group_size: 32, symmetric: true}",
        },
    ),
    "eight": (
        "qwen3_moe",
        {"format": "compressed_tensors", "quantize": SYMMETRIC.replace("bits: 4", "bits: 8")},
    ),
    "zeros": (
        "llama",
        {"format": "compressed_tensors", "quantize": "{method: rtn, bits: 4, group_size: 32}"},
    ),
    "fp8": ("deepseek_v3", {"format": "compressed_tensors", "quantize": SYMMETRIC}),
    "nf4": ("llama", {"format": "bitsandbytes", "quantize": "{method: nf4}"}),
    "nf4-plain": (
        "qwen2",
        {"format": "bitsandbytes", "quantize": "{method: nf4, double_quant: false}"},
    ),
    "dense": ("llama", {"format": "dense", "quantize": "{method: rtn, bits: 3, group_size: 32}"}),
}

EXPERT = "model.layers.0.mlp.experts.3.gate_proj"
GATE = "model.layers.0.mlp.gate_proj"
FP8_WEIGHT = "model.layers.0.mlp.up_proj.weight"
FP8_EXPERT = "model.layers.1.mlp.experts.0.up_proj"
NORM = "model.layers.0.input_layernorm.weight"


def ignore_progress(_: object) -> None:
    """Ignore progress and plans."""


@pytest.fixture(scope="module")
def build_artifact(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Build an artifact of each kind on first use; tests must not change it."""
    place = tmp_path_factory.mktemp("bad")

    def build(kind: str) -> Path:
        family, keys = KINDS[kind]
        source, output = place / f"source-{family}", place / kind
        if not source.exists():
            write_checkpoint(source, make_tiny_config(family), fp8=kind == "fp8")
        if not output.exists():
            cut = (
                f"{{path: {output}, shard_bytes: 200KB}}"
                if kind in {"awq", "eight"}
                else f"{{path: {output}}}"
            )
            text = make_recipe_text(source, output, fidelity="none", output=cut, **keys)
            recipe = parse_recipe(text, "bad.yaml")
            pipeline.build_artifacts(
                recipe,
                text,
                overwrite=False,
                evaluate=False,
                on_plan=ignore_progress,
                on_progress=ignore_progress,
            )
        return output

    return build


@pytest.fixture
def copy_artifact(build_artifact: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that copies an artifact, to be damaged."""
    return lambda kind: Path(shutil.copytree(build_artifact(kind), tmp_path / "artifact"))


Damage = Callable[[Path], object]


def damage_value(name: str, element: int, value: bytes) -> Damage:
    """Overwrite one element of a tensor."""
    return lambda path: overwrite_element(path, name, element, value)


def damage_config(**changes: object) -> Damage:
    """Change keys of quantization_config."""
    return lambda path: edit_quantization_config(path, lambda values: values.update(changes))


def damage_group(**changes: object) -> Damage:
    """Change keys of the weights of compressed-tensors' first group."""
    return lambda path: edit_quantization_config(
        path, lambda v: v["config_groups"]["group_0"]["weights"].update(changes)
    )


def damage_scheme(path: Path, module: str, **changes: object) -> None:
    """Change a module's scheme in the manifest."""
    edit_json(path / MANIFEST, lambda m: m["modules"][module]["scheme"].update(changes))


def damage_nf4_state(path: Path, **changes: object) -> None:
    """Change the state of an NF4 weight, in the same number of bytes."""

    def change(tensor: StoredTensor) -> None:
        values = {**json.loads(tensor.data), **changes}
        tensor.data = json.dumps(values).encode().ljust(tensor.shape[0])
        tensor.shape = [len(tensor.data)]

    edit_tensor(path, f"{GATE}.weight.quant_state.bitsandbytes__nf4", change)


def reshape(name: str, *shape: int) -> Damage:
    """Give a tensor another shape with the same number of elements."""
    return lambda path: edit_tensor(
        path, name, lambda tensor: setattr(tensor, "shape", list(shape))
    )


def duplicate_tensor(path: Path) -> None:
    """Store a tensor in two shards."""
    first, last = list_shards(path)[0], list_shards(path)[-1]
    name, tensor = next(iter(read_shard(first).items()))
    write_shard(last, {**read_shard(last), name: tensor})


def unlist_module(path: Path) -> None:
    """Remove a quantized module from the manifest's list and from the report."""
    edit_json(path / MANIFEST, lambda m: m["modules"].pop(EXPERT))


CONTENT: dict[str, tuple[str, Damage, str]] = {
    # --------------------------------------------------------------------------- numbers, by format
    "awq: NaN scale": (
        "awq",
        damage_value(f"{EXPERT}.scales", 5, encode_bf16("nan")),
        "above 0, found nan at [0, 5]",
    ),
    "awq: infinite scale": (
        "awq",
        damage_value(f"{EXPERT}.scales", -1, encode_bf16("inf")),
        "above 0, found inf at [1, 127]",
    ),
    "awq: scale of zero": (
        "awq",
        damage_value(f"{EXPERT}.scales", 0, encode_bf16("0")),
        "above 0, found 0 at [0, 0]",
    ),
    "awq: negative scale": (
        "awq",
        damage_value(f"{EXPERT}.scales", 0, encode_bf16("-1")),
        "above 0, found -1 at [0, 0]",
    ),
    "awq: subnormal scale": (
        "awq",
        damage_value(f"{EXPERT}.scales", 7, encode_bf16("subnormal")),
        "a normal number above 0",
    ),
    "awq: NaN in a norm": (
        "awq",
        damage_value(NORM, 3, encode_bf16("nan")),
        f"tensor {NORM}: expected a finite number, found nan",
    ),
    "awq: infinity in the head": (
        "awq",
        damage_value("lm_head.weight", -1, encode_bf16("-inf")),
        "found -inf at [767, 127]",
    ),
    "gptq: NaN scale": (
        "gptq",
        damage_value(f"{EXPERT}.scales", 5, encode_bf16("nan")),
        f"tensor {EXPERT}.scales: expected a ",
    ),
    "gptq: zero points not less one": (
        "gptq",
        damage_value(f"{EXPERT}.qzeros", 2, encode_i32(0x88888888)),
        f"tensor {EXPERT}.qzeros: expected the symmetric scheme's zero point, found another at [0, "
        "2]",
    ),
    "gptq: one zero point moved": (
        "gptq",
        damage_value(f"{EXPERT}.qzeros", -1, encode_i32(0x77777577)),
        "expected the symmetric scheme's zero point, found another at [1, 15]",
    ),
    "gptq: group out of range": (
        "gptq",
        damage_value(f"{EXPERT}.g_idx", 127, encode_i32(2)),
        "expected group 1, found 2 at [127]",
    ),
    "gptq: negative group": (
        "gptq",
        damage_value(f"{EXPERT}.g_idx", 0, encode_i32(-1)),
        "expected group 0, found -1 at [0]",
    ),
    "gptq: groups in activation order": (
        "gptq",
        lambda path: edit_tensor(
            path, f"{EXPERT}.g_idx", lambda t: setattr(t, "data", t.data[::-1])
        ),
        "expected group 0, found ",
    ),
    "gptq_v2: infinite scale": (
        "gptq_v2",
        damage_value(f"{GATE}.scales", 1, encode_bf16("inf")),
        "above 0, found inf at [0, 1]",
    ),
    "gptq_v2: zero points of three bits": (
        "gptq_v2",
        damage_value(f"{GATE}.qzeros", 1, encode_i32(0x24924924)),
        f"tensor {GATE}.qzeros: expected the symmetric scheme's zero point, found another at [0, "
        "1]",
    ),
    "compressed_tensors: NaN scale": (
        "eight",
        damage_value(f"{EXPERT}.weight_scale", 9, encode_bf16("nan")),
        "found nan at [4, 1]",
    ),
    "compressed_tensors: scale of minus zero": (
        "zeros",
        damage_value(f"{GATE}.weight_scale", 0, encode_bf16("-0")),
        "above 0, found -0 at [0, 0]",
    ),
    "compressed_tensors: weight_shape of another matrix": (
        "eight",
        damage_value(f"{EXPERT}.weight_shape", 0, struct.pack("<q", 64)),
        "weight_shape: expected [128, 128]",
    ),
    "compressed_tensors: negative weight_shape": (
        "zeros",
        damage_value(f"{GATE}.weight_shape", 1, struct.pack("<q", -128)),
        "weight_shape: expected [256, 128]",
    ),
    "fp8: NaN code": (
        "fp8",
        damage_value(FP8_WEIGHT, 200, b"\x7f"),
        f"tensor {FP8_WEIGHT}: expected a finite number, found nan",
    ),
    "fp8: NaN code with a sign": (
        "fp8",
        damage_value(FP8_WEIGHT, -1, b"\xff"),
        "expected a finite number, found nan at [255,",
    ),
    "fp8: NaN block scale": (
        "fp8",
        damage_value(f"{FP8_WEIGHT}_scale", 0, encode_f32(float("nan"))),
        "of 0 or more, found nan at [0, 0]",
    ),
    "fp8: negative block scale": (
        "fp8",
        damage_value(f"{FP8_WEIGHT}_scale", 1, encode_f32(-1)),
        "of 0 or more, found -1 at [1, 0]",
    ),
    "fp8: infinite scale of codes": (
        "fp8",
        damage_value(f"{FP8_EXPERT}.weight_scale", 0, encode_bf16("inf")),
        "found inf at [0, 0]",
    ),
    "fp8: block scales of another shape": (
        "fp8",
        reshape(f"{FP8_WEIGHT}_scale", 1, 2),
        "expected F32 [2, 1] for the FP8 blocks of",
    ),
    "fp8: no block scales": (
        "fp8",
        lambda path: remove_tensor(path, f"{FP8_WEIGHT}_scale"),
        "expected F32 [2, 1] for the FP8 blocks of",
    ),
    "nf4: NaN absmax of absmax": (
        "nf4",
        damage_value(f"{GATE}.weight.nested_absmax", 0, encode_f32(float("nan"))),
        "found nan at [0]",
    ),
    "nf4: infinite absmax": (
        "nf4-plain",
        damage_value(f"{GATE}.weight.absmax", 3, encode_f32(float("inf"))),
        "found inf at [3]",
    ),
    "nf4: negative absmax": (
        "nf4-plain",
        damage_value(f"{GATE}.weight.absmax", 3, encode_f32(-2)),
        "of 0 or more, found -2 at [3]",
    ),
    "nf4: another codebook": (
        "nf4",
        damage_value(f"{GATE}.weight.quant_map", 8, encode_f32(0.5)),
        "expected the 16 values of NF4",
    ),
    "nf4: a table of scales out of order": (
        "nf4",
        damage_value(f"{GATE}.weight.nested_quant_map", 0, encode_f32(2)),
        "expected numbers that rise",
    ),
    "nf4: a table of scales with NaN": (
        "nf4",
        damage_value(f"{GATE}.weight.nested_quant_map", 5, encode_f32(float("nan"))),
        "expected numbers that rise",
    ),
    "nf4: a state of another block size": (
        "nf4",
        lambda path: damage_nf4_state(path, blocksize=128),
        "in blocks of 64, found",
    ),
    "nf4: a state of another shape": (
        "nf4",
        lambda path: damage_nf4_state(path, shape=[128, 256]),
        "expected shape [256, 128]",
    ),
    "nf4: a state without offset": (
        "nf4",
        lambda path: damage_nf4_state(path, nested_offset=None),
        "expected the state of NF4",
    ),
    "nf4: an infinite offset": (
        "nf4",
        lambda path: damage_nf4_state(path, nested_offset=1e999),
        "expected the state of NF4",
    ),
    "nf4: a state that is no JSON": (
        "nf4-plain",
        damage_value(f"{GATE}.weight.quant_state.bitsandbytes__nf4", 0, b"["),
        "expected the tensors of 4-bit",
    ),
    "dense: NaN weight": (
        "dense",
        damage_value(f"{GATE}.weight", 128, encode_bf16("nan")),
        "found nan at [1, 0]",
    ),
    # ----------------------------------------------------------------------- config against tensors
    "awq: wrong group size": (
        "awq",
        damage_config(group_size=32),
        "quantization_config.group_size: the tensors ask for 64, found 32",
    ),
    "awq: wrong bits": (
        "awq",
        damage_config(bits=8),
        "quantization_config.bits: the tensors ask for 4, found 8",
    ),
    "awq: bits as text": (
        "awq",
        damage_config(bits="4"),
        "quantization_config.bits: the tensors ask for 4, found '4'",
    ),
    "awq: no zero points": (
        "awq",
        damage_config(zero_point=False),
        "zero_point: the tensors ask for True, found False",
    ),
    "awq: a kept module not named": (
        "awq",
        lambda path: edit_quantization_config(
            path, lambda v: v["modules_to_not_convert"].remove("model.layers.1.self_attn")
        ),
        "are not quantized in the tensors, but quantized to AutoAWQ, vLLM and SGLang",
    ),
    "awq: a quantized module named": (
        "awq",
        lambda path: edit_quantization_config(
            path, lambda v: v["modules_to_not_convert"].append("model.layers.0.mlp.experts.3")
        ),
        "are quantized in the tensors, but not quantized to AutoAWQ, vLLM and SGLang",
    ),
    "awq: a layer's name that is in another's": (
        "awq",
        lambda path: edit_quantization_config(
            path, lambda v: v["modules_to_not_convert"].append("gate")
        ),
        "are quantized in the tensors, but not quantized to AutoAWQ, vLLM and SGLang",
    ),
    "awq: no list": (
        "awq",
        damage_config(modules_to_not_convert=None),
        "quantized to AutoAWQ, vLLM and SGLang",
    ),
    "awq: a list that is a text": (
        "awq",
        damage_config(modules_to_not_convert="lm_head"),
        "expected a list of names",
    ),
    "awq: an expression that takes forever": (
        "awq",
        damage_config(modules_to_not_convert=["(a+)+b"]),
        "expected plain module names, found '(a+)+b'",
    ),
    "awq: another list for GPTQModel": ("awq", damage_config(dynamic={}), "quantized to GPTQModel"),
    "awq: another method": (
        "awq",
        damage_config(quant_method="gptq"),
        "quant_method: the tensors ask for 'awq', found 'gptq'",
    ),
    "awq: no entry": (
        "awq",
        lambda path: [
            edit_json(path / f, lambda v: v.update(quantization_config=None))
            for f in ("config.json", MANIFEST)
        ],
        "quantization_config: expected that of format awq, found None",
    ),
    "gptq: activation order": (
        "gptq",
        damage_config(desc_act=True),
        "desc_act: the tensors ask for False, found True",
    ),
    "gptq: asymmetric": (
        "gptq",
        damage_config(sym=False),
        "quantization_config.sym: the tensors ask for True, found False",
    ),
    "gptq: version 2": (
        "gptq",
        damage_config(checkpoint_format="gptq_v2"),
        "checkpoint_format: the tensors ask for 'gptq', found",
    ),
    "gptq: dynamic leaves experts out": (
        "gptq",
        lambda path: edit_quantization_config(
            path, lambda v: v["dynamic"].update({"-:model\\.layers\\.0(\\..*)?$": {}})
        ),
        "are quantized in the tensors, but not quantized to SGLang and GPTQModel",
    ),
    "gptq: other bits for some": (
        "gptq",
        lambda path: edit_quantization_config(
            path, lambda v: v["dynamic"].update({"+:model": {"bits": 8}})
        ),
        "expected '-:pattern'",
    ),
    "gptq: a suffix too few": (
        "gptq_v2",
        lambda path: edit_quantization_config(
            path, lambda v: v["modules_in_block_to_quantize"][0].remove("mlp.up_proj")
        ),
        "are quantized in the tensors, but not quantized to transformers",
    ),
    "gptq: a suffix too many": (
        "gptq",
        lambda path: edit_quantization_config(
            path, lambda v: v["modules_in_block_to_quantize"][0].append("q_proj")
        ),
        "are not quantized in the tensors, but quantized to transformers",
    ),
    "gptq: other bits forgotten": (
        "gptq-several",
        lambda path: edit_quantization_config(path, lambda v: v["dynamic"].popitem()),
        "model.layers.0.mlp.down_proj, model.layers.1.mlp.down_proj are of 8 bits, group 64, "
        "symmetric in the tensors, but of 4 bits, group 64, symmetric to SGLang and GPTQModel",
    ),
    "compressed_tensors: a module in the other group": (
        "several",
        lambda path: edit_quantization_config(
            path, lambda v: v["config_groups"]["group_1"].update(targets=[GATE])
        ),
        f"{GATE} is of 4 bits, group 64, symmetric in the tensors, but of 8 bits, group 64, "
        "symmetric to vLLM, SGLang",
    ),
    "compressed_tensors: ignore names a quantized module": (
        "eight",
        lambda path: edit_quantization_config(path, lambda v: v["ignore"].append(EXPERT)),
        f"{EXPERT} is quantized in the tensors, but not quantized to vLLM, SGLang and transformers",
    ),
    "compressed_tensors: ignore forgets the router": (
        "eight",
        lambda path: edit_quantization_config(path, lambda v: v["ignore"].pop(2)),
        "model.layers.0.mlp.gate, model.layers.1.mlp.gate are not quantized in the tensors, but "
        "quantized to",
    ),
    "compressed_tensors: no ignore": (
        "zeros",
        damage_config(ignore=[]),
        "are not quantized in the tensors, but quantized to vLLM",
    ),
    "compressed_tensors: wrong group size": (
        "eight",
        damage_group(group_size=128),
        "the tensors ask for 64, found 128",
    ),
    "compressed_tensors: wrong bits": (
        "eight",
        damage_group(num_bits=4),
        "num_bits: the tensors ask for 8, found 4",
    ),
    "compressed_tensors: symmetric with zero points": (
        "zeros",
        damage_group(symmetric=True),
        "symmetric: the tensors ask for F",
    ),
    "compressed_tensors: a key that readers refuse": (
        "zeros",
        damage_group(observer="mse"),
        "ask for nothing, found 'mse'",
    ),
    "compressed_tensors: not compressed": (
        "zeros",
        damage_config(quantization_status="frozen"),
        "ask for 'compressed', found",
    ),
    "fp8: FP8 layers ignored": (
        "fp8",
        lambda path: edit_quantization_config(
            path, lambda v: v["ignore"].append("re:model\\.layers\\.0(\\..*)?$")
        ),
        "are in FP8 blocks in the tensors, but not quantized to vLLM, SGLang and transformers",
    ),
    "fp8: the groups' targets swapped": (
        "fp8",
        lambda path: edit_quantization_config(
            path,
            lambda v: v["config_groups"].update(
                group_0={**v["config_groups"]["group_0"], "targets": ["Linear"]},
                group_1={
                    **v["config_groups"]["group_1"],
                    "targets": v["config_groups"]["group_0"]["targets"],
                },
            ),
        ),
        "are quantized in the tensors, but in FP8 blocks to",
    ),
    "fp8: blocks of another size": (
        "fp8",
        lambda path: edit_quantization_config(
            path,
            lambda v: v["config_groups"]["group_1"]["weights"].update(block_structure=[64, 64]),
        ),
        "block_structure: the tensors ask for [128, 128], found [64, 64]",
    ),
    "nf4: a kept module not named": (
        "nf4",
        damage_config(llm_int8_skip_modules=["lm_head"]),
        "model.embed_tokens is not quantized",
    ),
    "nf4: a quantized module named": (
        "nf4",
        damage_config(llm_int8_skip_modules=["model.embed_tokens", "lm_head", "up_proj"]),
        "are quantized in the tensors, but",
    ),
    "nf4: without double quantization": (
        "nf4",
        damage_config(bnb_4bit_use_double_quant=False),
        "the tensors ask for True, found",
    ),
    "nf4: as FP4": (
        "nf4",
        damage_config(bnb_4bit_quant_type="fp4"),
        "the tensors ask for 'nf4', found 'fp4'",
    ),
    "dense: an entry where there are no codes": (
        "dense",
        lambda path: [
            edit_json(path / f, lambda v: v.update(quantization_config={"quant_method": "awq"}))
            for f in ("config.json", MANIFEST)
        ],
        "quantization_config: expected none, found {'quant_method': 'awq'}",
    ),
    # ------------------------------------------------------------------------ tensors and the model
    "wrong shape of codes": (
        "awq",
        reshape(f"{EXPERT}.qweight", 64, 32),
        "its scheme (4 bits, group_size 64) asks for",
    ),
    "wrong dtype of scales": (
        "awq",
        lambda p: edit_tensor(p, f"{EXPERT}.scales", lambda t: setattr(t, "dtype", "F16")),
        "asks for BF16 [2, 128]",
    ),
    "no scales": (
        "awq",
        lambda path: remove_tensor(path, f"{EXPERT}.scales"),
        "expected the tensors of 4-bit codes, found qweight",
    ),
    "no zero points": (
        "zeros",
        lambda path: remove_tensor(path, f"{GATE}.weight_zero_point"),
        "asks for I32 [32, 4], found none",
    ),
    "zero points of a symmetric scheme": (
        "eight",
        lambda path: add_tensor(
            path, f"{EXPERT}.weight_zero_point", StoredTensor("I32", [32, 2], bytes(256))
        ),
        "weight_zero_point: its scheme (8 bits, group_size 64) asks for none",
    ),
    "a weight next to its codes": (
        "awq",
        lambda path: add_tensor(
            path, f"{EXPERT}.weight", StoredTensor("BF16", [128, 128], bytes(2 * 128 * 128))
        ),
        f"tensor {EXPERT}.weight: its scheme (4 bits, group_size 64) asks for none",
    ),
    "a tensor of no module": (
        "awq",
        lambda path: add_tensor(path, "model.evil", StoredTensor("BF16", [4], bytes(8))),
        "not claimed by the arch",
    ),
    "a missing norm": ("awq", lambda path: remove_tensor(path, NORM), f"missing: {NORM}"),
    "a renamed norm": (
        "nf4",
        lambda path: rename_tensor(path, NORM, "model.layers.0.norm.weight"),
        f"missing: {NORM}",
    ),
    "a norm of another length": (
        "awq",
        reshape(NORM, 2, 64),
        f"{NORM}: expected shape [128], found [2, 64]",
    ),
    "codes of a module that is not listed": (
        "awq",
        unlist_module,
        f"tensor {EXPERT}.qweight: I32 outside the modules",
    ),
    "a tensor in two shards": (
        "awq",
        duplicate_tensor,
        "expected in one file, found in model-00001-of-",
    ),
    "more layers in config.json": (
        "awq",
        lambda path: edit_model_config(path, num_hidden_layers=3),
        "missing: model.layers.2.",
    ),
    "a wider model in config.json": (
        "nf4",
        lambda path: edit_model_config(path, hidden_size=256),
        "expected shape",
    ),
    "a million layers": (
        "awq",
        lambda path: edit_model_config(path, num_hidden_layers=10**6),
        "num_hidden_layers: expected at most",
    ),
    "many layers of many experts": (
        "awq",
        lambda path: edit_model_config(path, num_hidden_layers=60, num_experts=60),
        "experts in all",
    ),
    "no heads": (
        "nf4",
        lambda path: edit_model_config(path, num_attention_heads=0),
        "config.json: ",
    ),
    "another family": (
        "awq",
        lambda path: edit_model_config(path, model_type="llama"),
        "the tensors do not fit model_type llama",
    ),
    "an MTP block that is not stored": (
        "fp8",
        lambda path: edit_model_config(path, num_nextn_predict_layers=2),
        "config.json: announces 1 MTP block",
    ),
    # --------------------------------------------------------------------------------- the manifest
    "a scheme of other bits": ("zeros", lambda path: damage_scheme(path, GATE, bits=8), "asks for"),
    "a scheme of another group": (
        "awq",
        lambda path: damage_scheme(path, EXPERT, group_size=32),
        "asks for",
    ),
    "a scheme of a group of zero": (
        "awq",
        lambda path: damage_scheme(path, EXPERT, group_size=0),
        "expected a scheme, found",
    ),
    "a scheme of no bits": (
        "awq",
        lambda path: damage_scheme(path, EXPERT, bits=None),
        "expected a scheme, found",
    ),
    "a scheme with a key too many": (
        "awq",
        lambda path: damage_scheme(path, EXPERT, order="x"),
        "expected a scheme, found",
    ),
    "no format": (
        "awq",
        lambda p: edit_json(p / MANIFEST, lambda m: m.update(format="exl2")),
        "format: expected one of awq",
    ),
    "an accepted report that was rejected": (
        "awq",
        lambda p: edit_json(p / MANIFEST, lambda m: m.update(status="accepted")),
        "status: expected 'accepted' as in",
    ),
    "a status of its own": (
        "awq",
        lambda p: edit_json(p / MANIFEST, lambda m: m.update(status="fine")),
        "expected one of",
    ),
    "a status that its gates do not give": (
        "awq",
        lambda p: set_status(p, "accepted", []),
        "status: expected 'not judged' by its gates, found 'accepted'",
    ),
    "accepted with a gate missed": (
        "awq",
        lambda p: set_status(
            p, "accepted", [{"figure": "kl_mean", "bound": "<= 1e-07", "value": 0.001, "ok": False}]
        ),
        "status: expected 'rejected' by its gates, found 'accepted'",
    ),
    "a gate that is not kept": (
        "awq",
        lambda p: set_status(
            p, "accepted", [{"figure": "kl_mean", "bound": "<= 1e-07", "value": 0.001, "ok": True}]
        ),
        "gates: 'kl_mean' '<= 1e-07': kept, it says, with the figure 0.001",
    ),
    "a report with a smaller error": (
        "awq",
        lambda p: edit_json(
            p / "quantkit/fidelity.json", lambda r: r["modules"][0].update(relative_error=1e-9)
        ),
        "relative_error: expected 0.",
    ),
    "a report without a module": (
        "awq",
        lambda p: edit_json(p / "quantkit/fidelity.json", lambda r: r["modules"].pop()),
        "found in one of them",
    ),
    "a report that is none": (
        "awq",
        lambda p: (p / "quantkit/fidelity.json").write_text("none"),
        "quantkit/fidelity.json: expected JSON, found an error",
    ),
    "a plan that is a list": (
        "awq",
        lambda p: (p / "quantkit/plan.json").write_text("[]"),
        "quantkit/plan.json: expected a JSON object, found list",
    ),
    "another plan": (
        "awq",
        lambda p: edit_json(p / "quantkit/plan.json", lambda r: r.update(hash="0" * 64)),
        "not the plan",
    ),
    "a file without a hash": (
        "awq",
        lambda p: [
            edit_json(p / MANIFEST, lambda m: m["unhashed"].append("x.py")),
            (p / "x.py").write_text("import os"),
        ],
        "unhashed: expected quantkit/timings.json at most, found x.py",
    ),
    "a pickle": (
        "awq",
        lambda path: (path / "pytorch_model.bin").write_bytes(b"\x80\x04."),
        "a pickle, which runs code",
    ),
}
"""Fault -> kind of artifact, damage, and part of the message."""


def get_error(path: Path) -> str:
    """Return verify's message."""
    with pytest.raises(ArtifactError) as caught:
        verify_artifact(path)
    return str(caught.value)


@pytest.mark.parametrize("fault", CONTENT)
def test_verify_rejects_wrong_content(
    fault: str, copy_artifact: Callable[[str], Path], record_property: Callable[[str, object], None]
) -> None:
    """The manifest's hashes are those of the damaged files: only the content shows the damage."""
    record_property("reliability", "bad artifact")
    record_property("fault", fault)
    kind, damage, sentence = CONTENT[fault]
    path = copy_artifact(kind)
    damage(path)
    reseal(path)
    message = get_error(path)
    assert sentence in message
    assert "sha256" not in message and "bytes, found" not in message


STRANGE: list[object] = [
    None, True, False, 0, -1, 1, 10**30, 2**63, 0.5, 1e308, float("nan"),
    "", "x", "../..", "\0", "\ud800", [], [None], [[]], [1, 2, 3], {}, {"a": 1},
]  # fmt: skip


def iterate_paths(value: object, at: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Yield every path in a JSON value, a few of many equal ones."""
    inner = (
        list(value.items())[:60]
        if isinstance(value, dict)
        else list(enumerate(value))[:6]
        if isinstance(value, list)
        else []
    )
    return [at, *(place for key, below in inner for place in iterate_paths(below, (*at, key)))]


def disturb(values: dict[str, Any], random: Random) -> dict[str, Any]:
    """Return a copy with a strange value, or none, in one place."""
    values = copy.deepcopy(values)
    place = random.choice(iterate_paths(values)[1:])
    holder: Any = values
    for key in place[:-1]:
        holder = holder[key]
    if random.random() < 0.2 and isinstance(holder, dict):
        del holder[place[-1]]
    else:
        holder[place[-1]] = copy.deepcopy(random.choice(STRANGE))
    return values


def fuzz(path: Path, count: int, seed: int) -> tuple[int, int]:
    """Disturb an artifact's JSON files, each sealed again.

    Return how many were tried and rejected.
    """
    random, refused, names = (
        Random(seed),
        0,
        ("config.json", MANIFEST, "quantkit/fidelity.json", "quantkit/plan.json"),
    )
    files = {name: (path / name).read_bytes() for name in names}
    for _ in range(count):
        name = random.choice([MANIFEST, *names])
        changed = disturb(json.loads(files[name]), random)
        (path / name).write_text(json.dumps(changed))
        if name != MANIFEST:
            if name == "config.json":
                entry = changed.get("quantization_config")
                edit_json(
                    path / MANIFEST,
                    lambda manifest, entry=entry: manifest.update(quantization_config=entry),
                )
            rehash(path)
        try:
            verify_artifact(path)
        except QuantkitError:
            refused += 1
        for file, content in files.items():
            (path / file).write_bytes(content)
    return count, refused


@pytest.mark.parametrize("kind", ["awq", "gptq", "fp8", "nf4"])
def test_fuzzed_values_are_rejected_or_meaningless(
    kind: str, copy_artifact: Callable[[str], Path]
) -> None:
    """verify raises only quantkit's own errors."""
    tried, refused = fuzz(copy_artifact(kind), 40, seed=0)
    assert tried // 6 < refused < tried  # values that are not read may be anything


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_fuzzed_values_are_rejected_or_meaningless(
    kind: str, copy_artifact: Callable[[str], Path]
) -> None:
    tried, refused = fuzz(copy_artifact(kind), 3000, seed=1)
    assert tried // 6 < refused < tried


def index_absent_tensor(path: Path) -> None:
    """Add a tensor to the index that no shard holds."""
    edit_json(
        path / INDEX,
        lambda index: index["weight_map"].update({"model.gone.weight": list_shards(path)[0].name}),
    )


def lead_elsewhere(path: Path, where: str) -> None:
    """Let the index lead to another path."""
    edit_json(path / INDEX, lambda index: index["weight_map"].update({"lm_head.weight": where}))


def swap_shards(path: Path) -> None:
    """Swap two shards' names."""
    one, other = list_shards(path)[:2]
    one.rename(path / "x")
    other.rename(one)
    (path / "x").rename(other)


def link_shard(path: Path) -> None:
    """Replace a shard by a link to a file with the right bytes."""
    shard = list_shards(path)[0]
    shard.rename(path.parent / "outside")
    shard.symlink_to(path.parent / "outside")


def replace_by_pipe(path: Path) -> None:
    """Replace a file by a pipe: reading it would never end."""
    (path / "generation.json").unlink(missing_ok=True)
    os.mkfifo(path / "generation.json")
    edit_json(
        path / MANIFEST,
        lambda m: m["files"].update({"generation.json": {"bytes": 0, "sha256": ""}}),
    )


FILES: dict[str, tuple[Damage, str]] = {
    "index: a tensor that is nowhere": (
        index_absent_tensor,
        "model.gone.weight: expected no entry, found model-00001-of-",
    ),
    "index: an absolute path": (
        lambda path: lead_elsewhere(path, "/etc/passwd"),
        "lm_head.weight: expected model-",
    ),
    "index: a path that climbs": (
        lambda path: lead_elsewhere(path, "../../x.safetensors"),
        "found ../../x.safetensors",
    ),
    "index: no entry": (
        lambda p: edit_json(p / INDEX, lambda i: i["weight_map"].pop("lm_head.weight")),
        "found no entry",
    ),
    "a shard that is a link": (link_shard, "model-00001-of-"),
    "a pipe": (replace_by_pipe, "generation.json: no file, expected a file"),
    "a link in place of the timings": (
        lambda p: [
            (p / "quantkit/timings.json").unlink(),
            (p / "quantkit/timings.json").symlink_to("/etc/hostname"),
        ],
        "quantkit/timings.json: a link, expected a file",
    ),
    "a link in place of the manifest": (
        lambda p: [
            shutil.move(p / MANIFEST, p.parent / "m.json"),
            (p / MANIFEST).symlink_to(p.parent / "m.json"),
        ],
        f"{MANIFEST}: a link, expected a file",
    ),
    "an extra file": (
        lambda path: (path / "modeling_x.py").write_text("import os"),
        "modeling_x.py: not in the manifest",
    ),
    "a name that a terminal obeys": (
        lambda path: (path / "\x1b[2J").write_text(""),
        "\\x1b[2J: not in the manifest",
    ),
}
"""Faults that no file's hash shows: names, links and the index, sealed with correct hashes."""


@pytest.mark.parametrize("fault", FILES)
def test_verify_rejects_wrong_names(
    fault: str, copy_artifact: Callable[[str], Path], record_property: Callable[[str, object], None]
) -> None:
    record_property("reliability", "bad artifact")
    record_property("fault", fault)
    damage, sentence = FILES[fault]
    path = copy_artifact("awq")
    damage(path)
    if fault.startswith("index"):
        rehash(path)
    assert sentence in get_error(path)


def test_verify_rejects_swapped_shards(
    copy_artifact: Callable[[str], Path], record_property: Callable[[str, object], None]
) -> None:
    record_property("reliability", "bad artifact")
    record_property("fault", "swapped shards")
    path = copy_artifact("awq")
    swap_shards(path)
    assert "model-00001-of-00007.safetensors: expected" in get_error(path)


@pytest.mark.parametrize("kind", KINDS)
def test_verify_accepts_a_resealed_artifact(
    kind: str, copy_artifact: Callable[[str], Path]
) -> None:
    """The control: `reseal` makes no fault, also if the shards are cut differently."""
    path = copy_artifact(kind)
    for shard in list_shards(path):
        write_shard(shard, read_shard(shard))
    reseal(path)
    report = verify_artifact(path)
    assert all(note.startswith("not for ") for note in report.notes) and report.modules == len(
        json.loads((path / MANIFEST).read_text())["modules"]
    )
    assert find_shard(path, NORM).is_file()


def test_command_line_reports_one_message(copy_artifact: Callable[[str], Path]) -> None:
    path = copy_artifact("awq")
    overwrite_element(path, f"{EXPERT}.scales", 5, encode_bf16("nan"))
    reseal(path)
    result = CliRunner().invoke(main, ["verify", str(path)])
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.splitlines() == [
        f"error: {path}: not what its manifest says; pull or build it again:",
        f"tensor {EXPERT}.scales: expected a normal number above 0, found nan at [0, 5]",
    ]


SCHEME = Scheme(bits=4, group_size=32, symmetric=True, scale_dtype="bfloat16")


@pytest.mark.parametrize("name", registry.list_names("formats"))
def test_every_format_declares_its_value_checks(name: str) -> None:
    assert registry.get_checks(name).read_shape({}, SCHEME, lambda _: b"") is None  # no tensors


def test_codebook_without_torch_equals_numerics() -> None:
    assert NF4_VALUES == nf4.CODEBOOK
