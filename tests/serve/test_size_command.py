"""`quantkit size` as a user sees it: tables, JSON, errors, and how it starts."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from support.diff_example import make_report

from quantkit.cli.main import main
from quantkit.io.files import write_json
from quantkit.io.package_data import locate_model


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["size", *arguments])


def test_size_reads_deepseek_v3_from_its_config() -> None:
    result = run("deepseek-ai/DeepSeek-V3")
    assert result.exit_code == 0
    for expected in ("671.03 B parameters", "673.15 GB (626.92 "
                                        "GiB)", "70,272 B per token x 32,768 tokens x 10 users",
                 "Cheapest in one node: 8 x", "H100 SXM 80 GB", "TP8 x PP2", "Computed upper "
                                                                             "bounds",
                 "2026-11-23"):  # fmt: skip
        assert expected in result.stdout, expected
    assert max(map(len, result.stdout.splitlines())) <= 100


def test_size_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from quantkit.cli.main import main; main(['size', sys.argv[1], '--json'], "
        "standalone_mode=False); print(sorted({'torch', 'transformers', 'huggingface_hub'} & "
        "set(sys.modules)), file=sys.stderr)"
    )
    for target in ("deepseek-ai/DeepSeek-V3", "v3-awq4"):
        result = subprocess.run(
            [sys.executable, "-c", code, target], capture_output=True, text=True, check=True
        )
        assert result.stderr.strip() == "[]"
        assert json.loads(result.stdout)["model"]["parameters"] == 671_026_404_352


def test_json_matches_the_tables() -> None:
    result = run(
        "v3-gptq4-fp8",
        "--gpu",
        "l40s",
        "--context",
        "4096",
        "--users",
        "3",
        "--kv",
        "fp8",
        "--json",
    )
    values = json.loads(result.stdout)
    assert values["needs"]["kv_bytes"] == 61 * 576 * 4096 * 3
    (card,) = values["cards"]
    assert (card["cards"], card["tensor_parallel"], card["pipeline_parallel"], card["nodes"]) == (
        16,
        8,
        2,
        2,
    )
    assert (card["price_usd"], card["watts"]) == (16 * 7500, 16 * 350)
    assert card["allowed_tensor_parallel"] == [1, 2, 4, 8, 16]
    assert card["refused_tensor_parallel"]["3"] == "attention heads: 128 is not divisible by 3"
    assert (
        card["bounds"]["computed"] is True and card["bounds"]["prefill"]["limit"] == "interconnect"
    )
    step = card["tokens_per_step"]
    assert 0 < step["sglang"]["safe"] < step["vllm"]["safe"] == 3 * 4096  # all there are


def test_cheapest_gpus_are_supported_by_an_engine() -> None:
    result = run("deepseek-ai/DeepSeek-R1-Distill-Qwen-32B")
    said = " ".join(result.stdout.split())
    assert re.search(r"Cheapest in one node: \d x (?!Mac)", said) and "Mac Studio 512 GB **" in said
    assert said.endswith("** not supported by vLLM or SGLang.")
    assert "**" not in run("deepseek-ai/DeepSeek-R1-Distill-Qwen-32B", "--gpu", "h100").stdout


def test_size_prints_the_longest_context_on_one_gpu() -> None:
    """The default needs two GPUs. Nothing is printed if one is enough or cannot hold the model."""
    words = ("--gpu", "rtx4090", "--users", "1")
    result = run("r1-distill-qwen-32b-awq4", *words)
    assert "On one GPU: at most 5,877 tokens for 1 user (--context 5877)." in result.stdout
    assert "On one GPU" not in run("r1-distill-qwen-32b-awq4", *words, "--context", "5877").stdout
    assert "On one GPU" not in run("deepseek-ai/DeepSeek-R1-Distill-Qwen-32B", *words).stdout


def test_tables_explain_the_context_of_speeds() -> None:
    """One user at the first tokens may be faster than all users at the longest context."""
    note = (
        "context: longest for 1 user; users: most at 4,096 tokens; 1 user t/s: one request at its "
        "first tokens; all t/s: "
    )
    for words in (["Qwen/Qwen3-30B-A3B", "--gpu", "h100"], ["--compare", "Qwen/Qwen3-30B-A3B"]):
        result = run(*words, "--users", "1", "--context", "4096")
        said = " ".join(result.stdout.split())
        assert note + "1 user at 4,096 tokens." in said and "1 users" not in said


def test_size_handles_each_format_of_a_recipe() -> None:
    result = run(
        "smollm2-135m-gptq4",
        "--set",
        "format=[gptq, compressed_tensors]",
        "--context",
        "512",
        "--json",
    )
    assert result.exit_code == 0, result.output
    assert [each["model"]["scheme"] for each in json.loads(result.stdout)] == [
        "gptq, 4 bits g64", "compressed_tensors, 4 bits g64",
    ]  # fmt: skip


def test_single_gpu_output_has_sources_and_tokens_per_step() -> None:
    result = run("v3-gptq4-fp8", "--gpu", "H100")
    assert result.exit_code == 0
    for text in ("driver reports", "80 GB = 74.5 GiB", "Tokens per step", "Batches",
                 "Tensor parallelism", "of 256",
                 "The interconnect is not the limit of prefill"):  # fmt: skip
        assert text in result.stdout, text


def test_compare_includes_the_report_of_an_artifact(sealed_folder: Path) -> None:
    result = run(
        "--compare", "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B", str(sealed_folder), "--json"
    )
    assert result.exit_code == 0, result.output
    first, second = json.loads(result.stdout)
    assert first["fidelity"] is None and second["fidelity"]["benchmarks"] is not None
    assert (
        first["needs"]["context"] == second["needs"]["context"] == 512
    )  # the longest that both can
    shown = run("--compare", "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B", str(sealed_folder))
    assert (
        "Fidelity" in shown.stdout
        and "no report" in shown.stdout
        and "On H100 SXM 80 GB" in shown.stdout
    )


@pytest.fixture
def sealed_folder(tmp_path: Path) -> Path:
    """A folder with the built-in model and the smallest sealed report."""
    target = tmp_path / "artifact"
    shutil.copytree(locate_model("builtin:tiny-v3"), target)
    (target / "quantkit").mkdir()
    (target / "quantkit/fidelity.json").write_text(make_report().to_json())
    write_json(target / "quantkit/manifest.json", {"schema_version": 1, "files": {}, "tensors": {}})
    return target


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("nothing-here",), "expected an artifact, a recipe, a config.json or a hub id"),
        (("deepseek-ai/DeepSeek-V3", "--gpu", "h10"), "no GPU named 'h10'. Did you mean 'h100'?"),
        (
            ("deepseek-ai/DeepSeek-V3", "--context", "999999"),
            "expected a context of at most 163,840 tokens, found 999,999",
        ),
        (("v3-awq4", "r1-distill-qwen-32b-awq4"), "expected one model, found 2"),
        (("deepseek-ai/DeepSeek-V3", "--set", "memory=1GB"), "is no recipe; leave the option out"),
        (
            ("builtin:tiny-v3", "--dtype", "int4"),
            "found stored weights with widths of their own; leave the option out",
        ),
        (
            ("r1-distill-qwen-32b-awq4", "--dtype", "bf16"),
            "found planned weights with widths of their own; leave the option out",
        ),
        (("v3-awq4", "--set", "quantize.bits=3"), "4-bit integers only"),
        (("missing.yaml",), "no such recipe file"),
        (("/",), "found no config.json in it"),
    ],
)
def test_invalid_input_prints_one_sentence_and_exits_2(
    arguments: tuple[str, ...], sentence: str
) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert sentence in result.stderr and result.stderr.startswith("error: ")
    assert "Traceback" not in result.output


def test_damaged_config_prints_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for text, sentence in (
        ("{", "expected JSON"),
        ("{}", "model_type: expected a string, found nothing"),
        ('{"model_type": "llama"}', "num_hidden_layers: expected an integer"),
        ('{"model_type": "nobody_knows_this"}', "nobody_knows_this"),
    ):
        path.write_text(text)
        result = run(str(path))
        assert result.exit_code == 2
        assert sentence in result.stderr and len(result.stderr.splitlines()) == 1, result.stderr
