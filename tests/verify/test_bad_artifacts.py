"""Artifacts that were damaged and sealed again, hashes and all, over every format: only their content tells.

Each case is counted: `record_property` puts "reliability" and "fault" into a JUnit report, one per artifact tried.
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
    Stored,
    add,
    bf16,
    config,
    edit_json,
    edit_tensor,
    f32,
    holder,
    i32,
    judged,
    model,
    put,
    read_shard,
    rehash,
    remove,
    rename,
    reseal,
    shards,
    write_shard,
)

from quantkit import pipeline, registry
from quantkit.artifact.layout import INDEX, MANIFEST
from quantkit.cli.main import main
from quantkit.errors import ArtifactError, QuantkitError
from quantkit.formats.bitsandbytes import NF4_VALUES
from quantkit.numerics import nf4
from quantkit.recipe.parse import parse_recipe
from quantkit.verify.shallow import verify_artifact

SYMMETRIC = "{method: rtn, bits: 4, group_size: 64, symmetric: true}"
SEVERAL = '[{match: "*.down_proj", quantize: {bits: 8}}, {match: "*.mlp.*", quantize: default}, {match: "*", keep: source}]'
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


def ignore(_: object) -> None:
    """Progress and plans that nobody reads."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """An artifact of each kind, built when it is first asked for; nobody may change it."""
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
                recipe, text, overwrite=False, evaluate=False, on_plan=ignore, on_progress=ignore
            )
        return output

    return build


@pytest.fixture
def bad(made: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of an artifact, to be damaged."""
    return lambda kind: Path(shutil.copytree(made(kind), tmp_path / "artifact"))


Damage = Callable[[Path], object]


def numbers(name: str, element: int, value: bytes) -> Damage:
    """Overwrite one element of a tensor."""
    return lambda path: put(path, name, element, value)


def entry(**changes: object) -> Damage:
    """Change keys of quantization_config."""
    return lambda path: config(path, lambda values: values.update(changes))


def group(**changes: object) -> Damage:
    """Change keys of the weights of compressed-tensors' first group."""
    return lambda path: config(
        path, lambda v: v["config_groups"]["group_0"]["weights"].update(changes)
    )


def record(path: Path, module: str, **changes: object) -> None:
    """Change the scheme that the manifest tells of a module."""
    edit_json(path / MANIFEST, lambda m: m["modules"][module]["scheme"].update(changes))


def state(path: Path, **changes: object) -> None:
    """Change the state of an NF4 weight, in as many bytes."""

    def change(tensor: Stored) -> None:
        values = {**json.loads(tensor.data), **changes}
        tensor.data = json.dumps(values).encode().ljust(tensor.shape[0])
        tensor.shape = [len(tensor.data)]

    edit_tensor(path, f"{GATE}.weight.quant_state.bitsandbytes__nf4", change)


def reshape(name: str, *shape: int) -> Damage:
    """Give a tensor another shape of as many elements."""
    return lambda path: edit_tensor(
        path, name, lambda tensor: setattr(tensor, "shape", list(shape))
    )


def twice(path: Path) -> None:
    """A tensor in two shards."""
    first, last = shards(path)[0], shards(path)[-1]
    name, tensor = next(iter(read_shard(first).items()))
    write_shard(last, {**read_shard(last), name: tensor})


def unlisted(path: Path) -> None:
    """Take a quantized module out of the manifest's list and out of the report."""
    edit_json(path / MANIFEST, lambda m: m["modules"].pop(EXPERT))


CONTENT: dict[str, tuple[str, Damage, str]] = {
    # ------------------------------------------------------------------------------------------- numbers, by format
    "awq: NaN scale": (
        "awq",
        numbers(f"{EXPERT}.scales", 5, bf16("nan")),
        "above 0, found nan at [0, 5]",
    ),
    "awq: infinite scale": (
        "awq",
        numbers(f"{EXPERT}.scales", -1, bf16("inf")),
        "above 0, found inf at [1, 127]",
    ),
    "awq: scale of zero": (
        "awq",
        numbers(f"{EXPERT}.scales", 0, bf16("0")),
        "above 0, found 0 at [0, 0]",
    ),
    "awq: negative scale": (
        "awq",
        numbers(f"{EXPERT}.scales", 0, bf16("-1")),
        "above 0, found -1 at [0, 0]",
    ),
    "awq: subnormal scale": (
        "awq",
        numbers(f"{EXPERT}.scales", 7, bf16("subnormal")),
        "a normal number above 0",
    ),
    "awq: NaN in a norm": (
        "awq",
        numbers(NORM, 3, bf16("nan")),
        f"tensor {NORM}: expected a finite number, found nan",
    ),
    "awq: infinity in the head": (
        "awq",
        numbers("lm_head.weight", -1, bf16("-inf")),
        "found -inf at [767, 127]",
    ),
    "gptq: NaN scale": (
        "gptq",
        numbers(f"{EXPERT}.scales", 5, bf16("nan")),
        f"tensor {EXPERT}.scales: expected a ",
    ),
    "gptq: zero points not less one": (
        "gptq",
        numbers(f"{EXPERT}.qzeros", 2, i32(0x88888888)),
        f"tensor {EXPERT}.qzeros: expected the symmetric scheme's zero point, found another at [0, 2]",
    ),
    "gptq: one zero point moved": (
        "gptq",
        numbers(f"{EXPERT}.qzeros", -1, i32(0x77777577)),
        "expected the symmetric scheme's zero point, found another at [1, 15]",
    ),
    "gptq: group out of range": (
        "gptq",
        numbers(f"{EXPERT}.g_idx", 127, i32(2)),
        "expected group 1, found 2 at [127]",
    ),
    "gptq: negative group": (
        "gptq",
        numbers(f"{EXPERT}.g_idx", 0, i32(-1)),
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
        numbers(f"{GATE}.scales", 1, bf16("inf")),
        "above 0, found inf at [0, 1]",
    ),
    "gptq_v2: zero points of three bits": (
        "gptq_v2",
        numbers(f"{GATE}.qzeros", 1, i32(0x24924924)),
        f"tensor {GATE}.qzeros: expected the symmetric scheme's zero point, found another at [0, 1]",
    ),
    "compressed_tensors: NaN scale": (
        "eight",
        numbers(f"{EXPERT}.weight_scale", 9, bf16("nan")),
        "found nan at [4, 1]",
    ),
    "compressed_tensors: scale of minus zero": (
        "zeros",
        numbers(f"{GATE}.weight_scale", 0, bf16("-0")),
        "above 0, found -0 at [0, 0]",
    ),
    "compressed_tensors: weight_shape of another matrix": (
        "eight",
        numbers(f"{EXPERT}.weight_shape", 0, struct.pack("<q", 64)),
        "weight_shape: expected [128, 128]",
    ),
    "compressed_tensors: negative weight_shape": (
        "zeros",
        numbers(f"{GATE}.weight_shape", 1, struct.pack("<q", -128)),
        "weight_shape: expected [256, 128]",
    ),
    "fp8: NaN code": (
        "fp8",
        numbers(FP8_WEIGHT, 200, b"\x7f"),
        f"tensor {FP8_WEIGHT}: expected a finite number, found nan",
    ),
    "fp8: NaN code with a sign": (
        "fp8",
        numbers(FP8_WEIGHT, -1, b"\xff"),
        "expected a finite number, found nan at [255,",
    ),
    "fp8: NaN block scale": (
        "fp8",
        numbers(f"{FP8_WEIGHT}_scale", 0, f32(float("nan"))),
        "of 0 or more, found nan at [0, 0]",
    ),
    "fp8: negative block scale": (
        "fp8",
        numbers(f"{FP8_WEIGHT}_scale", 1, f32(-1)),
        "of 0 or more, found -1 at [1, 0]",
    ),
    "fp8: infinite scale of codes": (
        "fp8",
        numbers(f"{FP8_EXPERT}.weight_scale", 0, bf16("inf")),
        "found inf at [0, 0]",
    ),
    "fp8: block scales of another shape": (
        "fp8",
        reshape(f"{FP8_WEIGHT}_scale", 1, 2),
        "expected F32 [2, 1] for the FP8 blocks of",
    ),
    "fp8: no block scales": (
        "fp8",
        lambda path: remove(path, f"{FP8_WEIGHT}_scale"),
        "expected F32 [2, 1] for the FP8 blocks of",
    ),
    "nf4: NaN absmax of absmax": (
        "nf4",
        numbers(f"{GATE}.weight.nested_absmax", 0, f32(float("nan"))),
        "found nan at [0]",
    ),
    "nf4: infinite absmax": (
        "nf4-plain",
        numbers(f"{GATE}.weight.absmax", 3, f32(float("inf"))),
        "found inf at [3]",
    ),
    "nf4: negative absmax": (
        "nf4-plain",
        numbers(f"{GATE}.weight.absmax", 3, f32(-2)),
        "of 0 or more, found -2 at [3]",
    ),
    "nf4: another codebook": (
        "nf4",
        numbers(f"{GATE}.weight.quant_map", 8, f32(0.5)),
        "expected the 16 values of NF4",
    ),
    "nf4: a table of scales out of order": (
        "nf4",
        numbers(f"{GATE}.weight.nested_quant_map", 0, f32(2)),
        "expected numbers that rise",
    ),
    "nf4: a table of scales with NaN": (
        "nf4",
        numbers(f"{GATE}.weight.nested_quant_map", 5, f32(float("nan"))),
        "expected numbers that rise",
    ),
    "nf4: a state of another block size": (
        "nf4",
        lambda path: state(path, blocksize=128),
        "in blocks of 64, found",
    ),
    "nf4: a state of another shape": (
        "nf4",
        lambda path: state(path, shape=[128, 256]),
        "expected shape [256, 128]",
    ),
    "nf4: a state without offset": (
        "nf4",
        lambda path: state(path, nested_offset=None),
        "expected the state of NF4",
    ),
    "nf4: an infinite offset": (
        "nf4",
        lambda path: state(path, nested_offset=1e999),
        "expected the state of NF4",
    ),
    "nf4: a state that is no JSON": (
        "nf4-plain",
        numbers(f"{GATE}.weight.quant_state.bitsandbytes__nf4", 0, b"["),
        "expected the tensors of 4-bit",
    ),
    "dense: NaN weight": (
        "dense",
        numbers(f"{GATE}.weight", 128, bf16("nan")),
        "found nan at [1, 0]",
    ),
    # ------------------------------------------------------------------------------------------ config against tensors
    "awq: wrong group size": (
        "awq",
        entry(group_size=32),
        "quantization_config.group_size: the tensors ask for 64, found 32",
    ),
    "awq: wrong bits": (
        "awq",
        entry(bits=8),
        "quantization_config.bits: the tensors ask for 4, found 8",
    ),
    "awq: bits as text": (
        "awq",
        entry(bits="4"),
        "quantization_config.bits: the tensors ask for 4, found '4'",
    ),
    "awq: no zero points": (
        "awq",
        entry(zero_point=False),
        "zero_point: the tensors ask for True, found False",
    ),
    "awq: a kept module not named": (
        "awq",
        lambda path: config(
            path, lambda v: v["modules_to_not_convert"].remove("model.layers.1.self_attn")
        ),
        "are not quantized in the tensors, but quantized to AutoAWQ, vLLM and SGLang",
    ),
    "awq: a quantized module named": (
        "awq",
        lambda path: config(
            path, lambda v: v["modules_to_not_convert"].append("model.layers.0.mlp.experts.3")
        ),
        "are quantized in the tensors, but not quantized to AutoAWQ, vLLM and SGLang",
    ),
    "awq: a layer's name that is in another's": (
        "awq",
        lambda path: config(path, lambda v: v["modules_to_not_convert"].append("gate")),
        "are quantized in the tensors, but not quantized to AutoAWQ, vLLM and SGLang",
    ),
    "awq: no list": (
        "awq",
        entry(modules_to_not_convert=None),
        "quantized to AutoAWQ, vLLM and SGLang",
    ),
    "awq: a list that is a text": (
        "awq",
        entry(modules_to_not_convert="lm_head"),
        "expected a list of names",
    ),
    "awq: an expression that takes forever": (
        "awq",
        entry(modules_to_not_convert=["(a+)+b"]),
        "expected plain module names, found '(a+)+b'",
    ),
    "awq: another list for GPTQModel": ("awq", entry(dynamic={}), "quantized to GPTQModel"),
    "awq: another method": (
        "awq",
        entry(quant_method="gptq"),
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
        entry(desc_act=True),
        "desc_act: the tensors ask for False, found True",
    ),
    "gptq: asymmetric": (
        "gptq",
        entry(sym=False),
        "quantization_config.sym: the tensors ask for True, found False",
    ),
    "gptq: version 2": (
        "gptq",
        entry(checkpoint_format="gptq_v2"),
        "checkpoint_format: the tensors ask for 'gptq', found",
    ),
    "gptq: dynamic leaves experts out": (
        "gptq",
        lambda path: config(
            path, lambda v: v["dynamic"].update({"-:model\\.layers\\.0(\\..*)?$": {}})
        ),
        "are quantized in the tensors, but not quantized to SGLang and GPTQModel",
    ),
    "gptq: other bits for some": (
        "gptq",
        lambda path: config(path, lambda v: v["dynamic"].update({"+:model": {"bits": 8}})),
        "expected '-:pattern'",
    ),
    "gptq: a suffix too few": (
        "gptq_v2",
        lambda path: config(
            path, lambda v: v["modules_in_block_to_quantize"][0].remove("mlp.up_proj")
        ),
        "are quantized in the tensors, but not quantized to transformers",
    ),
    "gptq: a suffix too many": (
        "gptq",
        lambda path: config(path, lambda v: v["modules_in_block_to_quantize"][0].append("q_proj")),
        "are not quantized in the tensors, but quantized to transformers",
    ),
    "gptq: other bits forgotten": (
        "gptq-several",
        lambda path: config(path, lambda v: v["dynamic"].popitem()),
        "model.layers.0.mlp.down_proj, model.layers.1.mlp.down_proj are of 8 bits, group 64, symmetric in the tensors, "
        "but of 4 bits, group 64, symmetric to SGLang and GPTQModel",
    ),
    "compressed_tensors: a module in the other group": (
        "several",
        lambda path: config(path, lambda v: v["config_groups"]["group_1"].update(targets=[GATE])),
        f"{GATE} is of 4 bits, group 64, symmetric in the tensors, but of 8 bits, group 64, symmetric to vLLM, SGLang",
    ),
    "compressed_tensors: ignore names a quantized module": (
        "eight",
        lambda path: config(path, lambda v: v["ignore"].append(EXPERT)),
        f"{EXPERT} is quantized in the tensors, but not quantized to vLLM, SGLang and transformers",
    ),
    "compressed_tensors: ignore forgets the router": (
        "eight",
        lambda path: config(path, lambda v: v["ignore"].pop(2)),
        "model.layers.0.mlp.gate, model.layers.1.mlp.gate are not quantized in the tensors, but quantized to",
    ),
    "compressed_tensors: no ignore": (
        "zeros",
        entry(ignore=[]),
        "are not quantized in the tensors, but quantized to vLLM",
    ),
    "compressed_tensors: wrong group size": (
        "eight",
        group(group_size=128),
        "the tensors ask for 64, found 128",
    ),
    "compressed_tensors: wrong bits": (
        "eight",
        group(num_bits=4),
        "num_bits: the tensors ask for 8, found 4",
    ),
    "compressed_tensors: symmetric with zero points": (
        "zeros",
        group(symmetric=True),
        "symmetric: the tensors ask for F",
    ),
    "compressed_tensors: a key that readers refuse": (
        "zeros",
        group(observer="mse"),
        "ask for nothing, found 'mse'",
    ),
    "compressed_tensors: not compressed": (
        "zeros",
        entry(quantization_status="frozen"),
        "ask for 'compressed', found",
    ),
    "fp8: FP8 layers ignored": (
        "fp8",
        lambda path: config(path, lambda v: v["ignore"].append("re:model\\.layers\\.0(\\..*)?$")),
        "are in FP8 blocks in the tensors, but not quantized to vLLM, SGLang and transformers",
    ),
    "fp8: the groups' targets swapped": (
        "fp8",
        lambda path: config(
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
        lambda path: config(
            path,
            lambda v: v["config_groups"]["group_1"]["weights"].update(block_structure=[64, 64]),
        ),
        "block_structure: the tensors ask for [128, 128], found [64, 64]",
    ),
    "nf4: a kept module not named": (
        "nf4",
        entry(llm_int8_skip_modules=["lm_head"]),
        "model.embed_tokens is not quantized",
    ),
    "nf4: a quantized module named": (
        "nf4",
        entry(llm_int8_skip_modules=["model.embed_tokens", "lm_head", "up_proj"]),
        "are quantized in the tensors, but",
    ),
    "nf4: without double quantization": (
        "nf4",
        entry(bnb_4bit_use_double_quant=False),
        "the tensors ask for True, found",
    ),
    "nf4: as FP4": (
        "nf4",
        entry(bnb_4bit_quant_type="fp4"),
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
    # ------------------------------------------------------------------------------------------- tensors and the model
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
        lambda path: remove(path, f"{EXPERT}.scales"),
        "expected the tensors of 4-bit codes, found qweight",
    ),
    "no zero points": (
        "zeros",
        lambda path: remove(path, f"{GATE}.weight_zero_point"),
        "asks for I32 [32, 4], found none",
    ),
    "zero points of a symmetric scheme": (
        "eight",
        lambda path: add(path, f"{EXPERT}.weight_zero_point", Stored("I32", [32, 2], bytes(256))),
        "weight_zero_point: its scheme (8 bits, group_size 64) asks for none",
    ),
    "a weight beside its codes": (
        "awq",
        lambda path: add(
            path, f"{EXPERT}.weight", Stored("BF16", [128, 128], bytes(2 * 128 * 128))
        ),
        f"tensor {EXPERT}.weight: its scheme (4 bits, group_size 64) asks for none",
    ),
    "a tensor of nobody": (
        "awq",
        lambda path: add(path, "model.evil", Stored("BF16", [4], bytes(8))),
        "not claimed by the arch",
    ),
    "a missing norm": ("awq", lambda path: remove(path, NORM), f"missing: {NORM}"),
    "a renamed norm": (
        "nf4",
        lambda path: rename(path, NORM, "model.layers.0.norm.weight"),
        f"missing: {NORM}",
    ),
    "a norm of another length": (
        "awq",
        reshape(NORM, 2, 64),
        f"{NORM}: expected shape [128], found [2, 64]",
    ),
    "codes of a module that is not listed": (
        "awq",
        unlisted,
        f"tensor {EXPERT}.qweight: I32 outside the modules",
    ),
    "a tensor in two shards": ("awq", twice, "expected in one file, found in model-00001-of-"),
    "more layers in config.json": (
        "awq",
        lambda path: model(path, num_hidden_layers=3),
        "missing: model.layers.2.",
    ),
    "a wider model in config.json": (
        "nf4",
        lambda path: model(path, hidden_size=256),
        "expected shape",
    ),
    "a million layers": (
        "awq",
        lambda path: model(path, num_hidden_layers=10**6),
        "num_hidden_layers: expected at most",
    ),
    "many layers of many experts": (
        "awq",
        lambda path: model(path, num_hidden_layers=60, num_experts=60),
        "experts in all",
    ),
    "no heads": ("nf4", lambda path: model(path, num_attention_heads=0), "config.json: "),
    "another family": (
        "awq",
        lambda path: model(path, model_type="llama"),
        "the tensors do not fit model_type llama",
    ),
    "an MTP block that is not stored": (
        "fp8",
        lambda path: model(path, num_nextn_predict_layers=2),
        "config.json: announces 1 MTP block",
    ),
    # --------------------------------------------------------------------------------------------------- the manifest
    "a scheme of other bits": ("zeros", lambda path: record(path, GATE, bits=8), "asks for"),
    "a scheme of another group": (
        "awq",
        lambda path: record(path, EXPERT, group_size=32),
        "asks for",
    ),
    "a scheme of a group of zero": (
        "awq",
        lambda path: record(path, EXPERT, group_size=0),
        "expected a scheme, found",
    ),
    "a scheme of no bits": (
        "awq",
        lambda path: record(path, EXPERT, bits=None),
        "expected a scheme, found",
    ),
    "a scheme with a key too many": (
        "awq",
        lambda path: record(path, EXPERT, order="x"),
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
        lambda p: judged(p, "accepted", []),
        "status: expected 'not judged' by its gates, found 'accepted'",
    ),
    "accepted with a gate missed": (
        "awq",
        lambda p: judged(
            p, "accepted", [{"figure": "kl_mean", "bound": "<= 1e-07", "value": 0.001, "ok": False}]
        ),
        "status: expected 'rejected' by its gates, found 'accepted'",
    ),
    "a gate that is not kept": (
        "awq",
        lambda p: judged(
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
"""What is wrong -> the kind of artifact, how it came about, and part of the sentence that refuses it."""


def refused(path: Path) -> str:
    """What verify says."""
    with pytest.raises(ArtifactError) as caught:
        verify_artifact(path)
    return str(caught.value)


@pytest.mark.parametrize("fault", CONTENT)
def test_a_fault_of_content_is_refused(
    fault: str, bad: Callable[[str], Path], record_property: Callable[[str, object], None]
) -> None:
    """The manifest's hashes are those of the damaged files, so nothing but the content can tell."""
    record_property("reliability", "bad artifact")
    record_property("fault", fault)
    kind, damage, sentence = CONTENT[fault]
    path = bad(kind)
    damage(path)
    reseal(path)
    message = refused(path)
    assert sentence in message
    assert "sha256" not in message and "bytes, found" not in message


STRANGE: list[object] = [
    None, True, False, 0, -1, 1, 10**30, 2**63, 0.5, 1e308, float("nan"), "", "x", "../..", "\0", "\ud800",
    [], [None], [[]], [1, 2, 3], {}, {"a": 1},
]  # fmt: skip


def places(value: object, at: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Every place in a JSON value, but for the many that are alike."""
    inner = (
        list(value.items())[:60]
        if isinstance(value, dict)
        else list(enumerate(value))[:6]
        if isinstance(value, list)
        else []
    )
    return [at, *(place for key, below in inner for place in places(below, (*at, key)))]


def disturbed(values: dict[str, Any], random: Random) -> dict[str, Any]:
    """A copy with something strange, or nothing, in one place."""
    values = copy.deepcopy(values)
    place = random.choice(places(values)[1:])
    holder: Any = values
    for key in place[:-1]:
        holder = holder[key]
    if random.random() < 0.2 and isinstance(holder, dict):
        del holder[place[-1]]
    else:
        holder[place[-1]] = copy.deepcopy(random.choice(STRANGE))
    return values


def fuzz(path: Path, count: int, seed: int) -> tuple[int, int]:
    """Disturb the JSON files of an artifact, each sealed again; how many were tried and how many refused."""
    random, refused, names = (
        Random(seed),
        0,
        ("config.json", MANIFEST, "quantkit/fidelity.json", "quantkit/plan.json"),
    )
    files = {name: (path / name).read_bytes() for name in names}
    for _ in range(count):
        name = random.choice([MANIFEST, *names])
        changed = disturbed(json.loads(files[name]), random)
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
def test_strange_values_are_refused_or_without_meaning(
    kind: str, bad: Callable[[str], Path]
) -> None:
    """Nothing but quantkit's own errors leaves verify."""
    tried, refused = fuzz(bad(kind), 40, seed=0)
    assert tried // 6 < refused < tried  # what nobody reads may hold anything


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_strange_values_are_refused_or_without_meaning(
    kind: str, bad: Callable[[str], Path]
) -> None:
    tried, refused = fuzz(bad(kind), 3000, seed=1)
    assert tried // 6 < refused < tried


def absent(path: Path) -> None:
    """An index that names a tensor which no shard holds."""
    edit_json(
        path / INDEX,
        lambda index: index["weight_map"].update({"model.gone.weight": shards(path)[0].name}),
    )


def lead(path: Path, where: str) -> None:
    """An index that leads to another place."""
    edit_json(path / INDEX, lambda index: index["weight_map"].update({"lm_head.weight": where}))


def swap(path: Path) -> None:
    """Two shards under each other's name."""
    one, other = shards(path)[:2]
    one.rename(path / "x")
    other.rename(one)
    (path / "x").rename(other)


def linked(path: Path) -> None:
    """A shard that is a link to a file with the right bytes."""
    shard = shards(path)[0]
    shard.rename(path.parent / "outside")
    shard.symlink_to(path.parent / "outside")


def pipe(path: Path) -> None:
    """A pipe in place of a file: reading it would never end."""
    (path / "generation.json").unlink(missing_ok=True)
    os.mkfifo(path / "generation.json")
    edit_json(
        path / MANIFEST,
        lambda m: m["files"].update({"generation.json": {"bytes": 0, "sha256": ""}}),
    )


FILES: dict[str, tuple[Damage, str]] = {
    "index: a tensor that is nowhere": (
        absent,
        "model.gone.weight: expected no entry, found model-00001-of-",
    ),
    "index: an absolute path": (
        lambda path: lead(path, "/etc/passwd"),
        "lm_head.weight: expected model-",
    ),
    "index: a path that climbs": (
        lambda path: lead(path, "../../x.safetensors"),
        "found ../../x.safetensors",
    ),
    "index: no entry": (
        lambda p: edit_json(p / INDEX, lambda i: i["weight_map"].pop("lm_head.weight")),
        "found no entry",
    ),
    "a shard that is a link": (linked, "model-00001-of-"),
    "a pipe": (pipe, "generation.json: no file, expected a file"),
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
"""What no hash of a file tells: names, links and the index, sealed with hashes that are right."""


@pytest.mark.parametrize("fault", FILES)
def test_a_fault_of_names_is_refused(
    fault: str, bad: Callable[[str], Path], record_property: Callable[[str, object], None]
) -> None:
    record_property("reliability", "bad artifact")
    record_property("fault", fault)
    damage, sentence = FILES[fault]
    path = bad("awq")
    damage(path)
    if fault.startswith("index"):
        rehash(path)
    assert sentence in refused(path)


def test_swapped_shards_are_refused(
    bad: Callable[[str], Path], record_property: Callable[[str, object], None]
) -> None:
    record_property("reliability", "bad artifact")
    record_property("fault", "swapped shards")
    path = bad("awq")
    swap(path)
    assert "model-00001-of-00007.safetensors: expected" in refused(path)


@pytest.mark.parametrize("kind", KINDS)
def test_an_artifact_that_is_only_sealed_again_is_accepted(
    kind: str, bad: Callable[[str], Path]
) -> None:
    """The control: what `reseal` does is no fault, also where the bytes of a shard are cut otherwise."""
    path = bad(kind)
    for shard in shards(path):
        write_shard(shard, read_shard(shard))
    reseal(path)
    found = verify_artifact(path)
    assert found.notes == () and found.modules == len(
        json.loads((path / MANIFEST).read_text())["modules"]
    )
    assert holder(path, NORM).is_file()


def test_the_command_line_refuses_with_one_message(bad: Callable[[str], Path]) -> None:
    path = bad("awq")
    put(path, f"{EXPERT}.scales", 5, bf16("nan"))
    reseal(path)
    result = CliRunner().invoke(main, ["verify", str(path)])
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.splitlines() == [
        f"error: {path}: not what its manifest says; pull or build it again:",
        f"tensor {EXPERT}.scales: expected a normal number above 0, found nan at [0, 5]",
    ]


@pytest.mark.parametrize("name", registry.list_names("formats"))
def test_every_format_says_what_its_numbers_must_be(name: str) -> None:
    assert registry.get_checks(name).shape({}, None, lambda _: b"") is None  # type: ignore[arg-type]  # nothing to look at


def test_the_codebook_without_torch_is_that_of_the_numerics() -> None:
    assert NF4_VALUES == nf4.CODEBOOK
