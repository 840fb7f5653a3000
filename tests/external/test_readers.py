"""Tests of AWQ and GPTQ artifacts in GPTQModel: bit-identical weights, module names, kernel logits.

GPTQModel has its own environment (`make readers`): it pins an older numpy, and replaces parts of
transformers when imported. QUANTKIT_READERS names its Python. Without it these tests are skipped,
or fail if QUANTKIT_REQUIRE_READERS is set, as in CI.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.builds import build
from support.checkpoints import make_tiny_config, write_checkpoint
from support.dequantized import Stored

pytestmark = pytest.mark.slow

READER = Path(__file__).parent / "readers" / "gptqmodel_cpu.py"
KERNEL_TOLERANCE = 0.03
"""Median relative error of a token's logits: the kernels compute in 16 bits. Measured: 0.003 to
0.011 if the rest of the model computes in float32; weights with other codes differ by 0.1.
"""
MLP_ONLY = '[{match: "*.mlp.*", quantize: {}}, {match: "*", keep: source}]'
MIXED_RULES = (
    '[{match: "*.o_proj", quantize: {bits: 8, group_size: -1}}, {match: "*.self_attn.*", '
    "quantize: {group_size: 32}}, "
    '{match: "re:.*_proj$", quantize: default}, {match: "*", keep: source}]'
)
ALL_EXPERTS_ACTIVE = {
    "num_experts_per_tok": 8,
    "num_nextn_predict_layers": 0,
    "n_group": 1,
    "topk_group": 1,
}
"""Every expert processes every token, so that rounding cannot change the routing."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """An artifact and its loader: transformers, GPTQModel's own, or None (only unpack the
    weights).
    """

    family: str
    format: str
    quantize: str
    loader: str | None
    rules: str = "all-linear"
    changes: dict[str, object] = field(default_factory=dict)
    dtype: str = "float32"


AWQ, GPTQ = (
    "method: awq, bits: 4, group_size: 64",
    "method: gptq, bits: 4, group_size: 64, symmetric: true",
)
CASES = {
    "llama-awq": Case(family="llama", format="awq", quantize=AWQ, loader="transformers"),
    "llama-gptq": Case(family="llama", format="gptq", quantize=GPTQ, loader="transformers"),
    **{
        f"llama-{name}-tied": Case(
            family="llama",
            format=name,
            quantize=quantize,
            loader="transformers",
            changes={"tie_word_embeddings": True},
        )
        for name, quantize in (("awq", AWQ), ("gptq", GPTQ))
    },
    "qwen2-awq-32": Case(
        family="qwen2",
        format="awq",
        quantize="method: rtn, bits: 4, group_size: 32",
        loader="transformers",
    ),
    "qwen2-gptq-8": Case(
        family="qwen2",
        format="gptq",
        quantize="method: rtn, bits: 8, group_size: 128, symmetric: true",
        loader="transformers",
    ),
    "qwen3-awq-mlp": Case(
        family="qwen3",
        format="awq",
        quantize="method: rtn, bits: 4, group_size: -1",
        loader="transformers",
        rules=MLP_ONLY,
    ),
    "qwen3-gptq-mlp": Case(
        family="qwen3",
        format="gptq",
        quantize="method: rtn, bits: 4, group_size: -1, symmetric: true",
        loader="transformers",
        rules=MLP_ONLY,
    ),
    # From the top-level 4 bits, GPTQModel 7.6 selects a CPU kernel that supports no other width.
    "llama-gptq-several": Case(
        family="llama", format="gptq", quantize=GPTQ, loader=None, rules=MIXED_RULES
    ),
    "qwen3_moe-gptq-several": Case(
        family="qwen3_moe", format="gptq", quantize=GPTQ, loader=None, rules=MIXED_RULES
    ),
    "llama-gptq_v2-3": Case(
        family="llama",
        format="gptq_v2",
        quantize="method: rtn, bits: 3, group_size: 64",
        loader="transformers",
    ),
    "qwen3_moe-gptq_v2": Case(
        family="qwen3_moe",
        format="gptq_v2",
        quantize="method: rtn, bits: 4, group_size: 32",
        loader="gptqmodel",
        changes=ALL_EXPERTS_ACTIVE,
        # in float32 GPTQModel 7.6 selects TorchFusedLinear, which drops zero points on a CPU
        dtype="bfloat16",
    ),
    **{
        f"{family}-{name}": Case(
            family=family,
            format=name,
            quantize=quantize,
            loader="gptqmodel",
            rules=rules,
            changes=ALL_EXPERTS_ACTIVE,
        )
        for family, rules in (("qwen3_moe", "all-linear"), ("deepseek_v3", "experts-only"))
        for name, quantize in (("awq", AWQ), ("gptq", GPTQ))
    },
    # GPTQModel 7.6 expects names for Mixtral's experts other than the checkpoint's w1, w2, w3.
    "mixtral-awq": Case(family="mixtral", format="awq", quantize=AWQ, loader=None),
    "mixtral-gptq": Case(family="mixtral", format="gptq", quantize=GPTQ, loader=None),
}


def find_reader_python() -> str:
    """Return the Python that has GPTQModel; skip or fail the test if none is configured."""
    path = os.environ.get("QUANTKIT_READERS")
    if path:
        return path
    if os.environ.get("QUANTKIT_REQUIRE_READERS"):
        pytest.fail(
            "QUANTKIT_READERS: expected a Python with gptqmodel because QUANTKIT_REQUIRE_READERS "
            "is set, found none"
        )
    pytest.skip(
        "QUANTKIT_READERS is not set to a Python with gptqmodel; `make readers` installs one"
    )


@dataclass(frozen=True, kw_only=True)
class ReaderResult:
    """GPTQModel's view of an artifact: weights [out, in] float32, logits, the kernel of each
    module.
    """

    artifact: Path
    tokens: torch.Tensor
    weights: dict[str, torch.Tensor]
    logits: torch.Tensor | None
    kernels: dict[str, str]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ReaderResult]:
    """Build every case and read all in one process: starting GPTQModel takes longer than
    reading.
    """
    reader, place = find_reader_python(), tmp_path_factory.mktemp("readers")
    tokens = torch.randint(3, 700, (2, 48), generator=torch.Generator().manual_seed(0))
    save_file({"tokens": tokens}, place / "tokens")
    jobs = []
    for name, case in CASES.items():
        base = make_tiny_config(case.family)
        config = {**base, **{key: value for key, value in case.changes.items() if key in base}}
        source = write_checkpoint(place / f"{name}-source", config)
        keys = {"format": case.format, "quantize": f"{{{case.quantize}}}", "rules": case.rules}
        artifact = build(source, place / name, **keys).path
        paths = {
            "artifact": artifact,
            "tokens": place / "tokens",
            "output": place / f"{name}-output",
        }
        jobs.append({
            "loader": case.loader,
            "dtype": case.dtype,
            **{key: str(path) for key, path in paths.items()},
        })
    (place / "jobs.json").write_text(json.dumps(jobs))
    process = subprocess.run([reader, READER, place / "jobs.json"], capture_output=True, text=True)
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-4000:]
    return {name: load_result(place / name, place / f"{name}-output", tokens) for name in CASES}


def load_result(artifact: Path, file: Path, tokens: torch.Tensor) -> ReaderResult:
    """Load the file that the reader wrote."""
    weights = load_file(file)
    with safe_open(file, "pt") as opened:
        kernels = json.loads(opened.metadata()["kernels"])
    logits = weights.pop("logits", None)
    return ReaderResult(
        artifact=artifact, tokens=tokens, weights=weights, logits=logits, kernels=kernels
    )


@pytest.mark.parametrize("name", CASES)
def test_gptqmodel_unpacks_identical_weights(name: str, results: dict[str, ReaderResult]) -> None:
    """Bit-identical in float32, and for exactly the modules that the manifest lists as
    quantized.
    """
    theirs, ours = results[name].weights, Stored.open(results[name].artifact)
    assert theirs.keys() == ours.quantized
    assert not [
        module
        for module, weight in theirs.items()
        if not torch.equal(weight, ours.read(f"{module}.weight"))
    ]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.loader])
def test_loaded_model_matches_dequantized_logits(
    name: str, results: dict[str, ReaderResult]
) -> None:
    """The loaded model has kernels exactly at the manifest's modules, and logits as with plain
    weights.
    """
    result, ours = results[name], Stored.open(results[name].artifact)
    assert result.logits is not None and result.kernels.keys() == ours.quantized
    with torch.no_grad():
        expected = ours.model()(result.tokens).logits  # [sequences, tokens, vocabulary]
    error = (result.logits - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.median() < KERNEL_TOLERANCE, set(result.kernels.values())
    assert error.max() < 10 * KERNEL_TOLERANCE
