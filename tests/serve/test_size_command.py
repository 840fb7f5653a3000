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
from support.diff_example import report

from quantkit.cli.main import main
from quantkit.io.files import write_json
from quantkit.io.package_data import locate_model


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["size", *arguments])


def test_the_flagship_from_config_alone() -> None:
    found = run("deepseek-ai/DeepSeek-V3")
    assert found.exit_code == 0
    for told in ("671.03 B parameters", "673.15 GB (626.92 GiB)", "70,272 B per token x 32,768 tokens x 10 users",
                 "Cheapest in one node: 8 x", "H100 SXM 80 GB", "TP8 x PP2", "Computed upper bounds",
                 "2026-11-23"):  # fmt: skip
        assert told in found.stdout, told
    assert max(map(len, found.stdout.splitlines())) <= 100


def test_the_flagship_is_sized_without_torch_and_transformers_which_take_seconds_to_import() -> (
    None
):
    code = (
        "import sys; from quantkit.cli.main import main; "
        "main(['size', sys.argv[1], '--json'], standalone_mode=False); "
        "print(sorted({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)), file=sys.stderr)"
    )
    for target in ("deepseek-ai/DeepSeek-V3", "v3-awq4"):
        found = subprocess.run(
            [sys.executable, "-c", code, target], capture_output=True, text=True, check=True
        )
        assert found.stderr.strip() == "[]"
        assert json.loads(found.stdout)["model"]["parameters"] == 671_026_404_352


def test_json_has_what_the_tables_show() -> None:
    found = run(
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
    told = json.loads(found.stdout)
    assert told["needs"]["kv_bytes"] == 61 * 576 * 4096 * 3
    (card,) = told["cards"]
    assert (card["cards"], card["tensor_parallel"], card["pipeline_parallel"], card["nodes"]) == (
        16,
        8,
        2,
        2,
    )
    assert (card["price_usd"], card["watts"]) == (16 * 7500, 16 * 350)
    assert card["allowed_tensor_parallel"] == [1, 2, 4, 8, 16]
    assert card["refused_tensor_parallel"]["3"] == "attention heads 128 / 3 is no whole number"
    assert (
        card["bounds"]["computed"] is True and card["bounds"]["prefill"]["limit"] == "interconnect"
    )
    step = card["tokens_per_step"]
    assert 0 < step["sglang"]["safe"] < step["vllm"]["safe"] == 3 * 4096  # all there are


def test_the_cheapest_cards_are_some_that_an_engine_runs_on() -> None:
    found = run("deepseek-ai/DeepSeek-R1-Distill-Qwen-32B")
    said = " ".join(found.stdout.split())
    assert re.search(r"Cheapest in one node: \d x (?!Mac)", said) and "Mac Studio 512 GB **" in said
    assert said.endswith("** neither vLLM nor SGLang runs there.")
    assert "**" not in run("deepseek-ai/DeepSeek-R1-Distill-Qwen-32B", "--gpu", "h100").stdout


def test_what_context_fits_on_one_card_of_24_gb() -> None:
    """Asked for as much as possible it takes two; the one is answered too, and no card is where none holds it."""
    words = ("--gpu", "rtx4090", "--users", "1")
    found = run("r1-distill-qwen-32b-awq4", *words)
    assert "On one card: at most 5,877 tokens for 1 user (--context 5877)." in found.stdout
    assert "On one card" not in run("r1-distill-qwen-32b-awq4", *words, "--context", "5877").stdout
    assert "On one card" not in run("deepseek-ai/DeepSeek-R1-Distill-Qwen-32B", *words).stdout


def test_speeds_say_at_which_context_they_are() -> None:
    """One user at the first tokens may be faster than everybody at the longest context."""
    told = "context: longest for 1 user; users: most at 4,096 tokens; 1 user t/s: alone, at the first tokens; all t/s: "
    for words in (["Qwen/Qwen3-30B-A3B", "--gpu", "h100"], ["--compare", "Qwen/Qwen3-30B-A3B"]):
        found = run(*words, "--users", "1", "--context", "4096")
        said = " ".join(found.stdout.split())
        assert told + "1 user at 4,096 tokens." in said and "1 users" not in said


def test_each_format_of_a_recipe_is_sized() -> None:
    found = run(
        "smollm2-135m-gptq4",
        "--set",
        "format=[gptq, compressed_tensors]",
        "--context",
        "512",
        "--json",
    )
    assert found.exit_code == 0, found.output
    assert [each["model"]["scheme"] for each in json.loads(found.stdout)] == [
        "gptq, 4 bits g64", "compressed_tensors, 4 bits g64",
    ]  # fmt: skip


def test_one_card_in_full_names_sources_and_advice() -> None:
    found = run("v3-gptq4-fp8", "--gpu", "H100")
    assert found.exit_code == 0
    for told in ("driver reports", "80 GB = 74.5 GiB", "Tokens per step", "Batches", "Tensor parallelism", "of 256",
                 "The interconnect is not the limit of prefill"):  # fmt: skip
        assert told in found.stdout, told


def test_models_side_by_side_with_the_report_of_an_artifact(sealed: Path) -> None:
    found = run("--compare", "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B", str(sealed), "--json")
    assert found.exit_code == 0, found.output
    first, second = json.loads(found.stdout)
    assert first["fidelity"] is None and second["fidelity"]["benchmarks"] is not None
    assert (
        first["needs"]["context"] == second["needs"]["context"] == 512
    )  # the longest that both can
    shown = run("--compare", "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B", str(sealed))
    assert (
        "Fidelity" in shown.stdout
        and "no report" in shown.stdout
        and "On H100 SXM 80 GB" in shown.stdout
    )


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    """A folder with the built-in model and the smallest report that is sealed beside it."""
    target = tmp_path / "artifact"
    shutil.copytree(locate_model("builtin:tiny-v3"), target)
    (target / "quantkit").mkdir()
    (target / "quantkit/fidelity.json").write_text(report().to_json())
    write_json(target / "quantkit/manifest.json", {"schema_version": 1, "files": {}, "tensors": {}})
    return target


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("nothing-here",), "expected an artifact, a recipe, a config.json or a hub id"),
        (("deepseek-ai/DeepSeek-V3", "--gpu", "h10"), "no card named 'h10'. Did you mean 'h100'?"),
        (
            ("deepseek-ai/DeepSeek-V3", "--context", "999999"),
            "made for 163,840 tokens, found a context of 999,999",
        ),
        (("v3-awq4", "r1-distill-qwen-32b-awq4"), "expected one model, found 2"),
        (("deepseek-ai/DeepSeek-V3", "--set", "memory=1GB"), "is no recipe; leave the option out"),
        (
            ("builtin:tiny-v3", "--dtype", "int4"),
            "are here, with widths of their own; leave the option out",
        ),
        (
            ("r1-distill-qwen-32b-awq4", "--dtype", "bf16"),
            "are planned, with widths of their own; leave the option out",
        ),
        (("v3-awq4", "--set", "quantize.bits=3"), "4-bit integers only"),
        (("missing.yaml",), "no such recipe file"),
        (("/",), "found no config.json in it"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(arguments: tuple[str, ...], sentence: str) -> None:
    found = run(*arguments)
    assert found.exit_code == 2
    assert sentence in found.stderr and found.stderr.startswith("error: ")
    assert "Traceback" not in found.output


def test_a_damaged_config_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for text, sentence in (
        ("{", "expected JSON"),
        ("{}", "model_type: expected a string, found nothing"),
        ('{"model_type": "llama"}', "num_hidden_layers: expected an integer"),
        ('{"model_type": "nobody_knows_this"}', "nobody_knows_this"),
    ):
        path.write_text(text)
        found = run(str(path))
        assert found.exit_code == 2
        assert sentence in found.stderr and len(found.stderr.splitlines()) == 1, found.stderr
