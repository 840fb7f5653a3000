"""The command line: exit codes, streams, and one message per fault."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.command_line import RECIPE, build, overrides, read_error, run

from quantkit import pipeline, registry
from quantkit.artifact.fidelity_schema import Fidelity
from quantkit.artifact.read_manifest import read_manifest
from quantkit.cli import build_log
from quantkit.cli.main import main
from quantkit.errors import ArtifactError
from quantkit.io.package_data import locate_folder, locate_model
from quantkit.plan.plan_schema import PlanSummary
from quantkit.verify.shallow import verify_artifact

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
COMMANDS = ("plan", "build", "report", "verify")


@pytest.fixture
def checkpoint_copy(tmp_path: Path) -> Path:
    """Return a copy of the checkpoint of tiny-v3, to be damaged."""
    return Path(shutil.copytree(locate_model("builtin:tiny-v3"), tmp_path / "source"))


def split(folder: Path) -> None:
    """Cut the checkpoint into two shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = dict(zip(SHARDS, (names[: len(names) // 2], names[len(names) // 2 :])))
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, folder / file)
    weight_map = {name: file for file, held in parts.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    (folder / "model.safetensors").unlink()


def change_config(folder: Path, **values: Any) -> None:
    """Change keys of config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


SIX = ("verdict", "size", "KL", "benchmarks", "page", "next")


def list_labels(output: str) -> list[str]:
    """Return the labels of the lines at the end of a report, from the verdict on."""
    lines = output.splitlines()
    first = max(n for n, line in enumerate(lines) if line.startswith("verdict "))
    return [line.split()[0] for line in lines[first:] if line[:1].strip()]


# --------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command: str) -> None:
    for flag in ("--help", "-h"):
        result = run(command, flag)
        assert result.exit_code == 0
        assert f"Example: quantkit {command} " in result.stdout


def test_group_help_lists_commands_and_an_example() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert "Example: quantkit build" in result.stdout
    context = click.Context(main)
    names = main.list_commands(context)
    assert set(names) >= set(COMMANDS)
    for name in names:
        command = main.get_command(context, name)
        assert command and "Example: quantkit " in (command.help or ""), name


def test_usage_errors_exit_with_2() -> None:
    for arguments in (["plan"], ["nonsense"], ["build", RECIPE, "--fast"], ["verify"]):
        assert run(*arguments).exit_code == 2


@pytest.mark.parametrize("arguments", [["--help"], ["build", "--help"], ["--version"]])
def test_help_does_not_start_torch(arguments: list[str]) -> None:
    program = (
        "import sys; from quantkit.cli.main import main\n"
        f"main({arguments!r}, standalone_mode=False)\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'pydantic', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


# ------------------------------------------------------------------------------------------ recipes


def test_unknown_recipe_is_a_usage_error() -> None:
    shipped = ", ".join(sorted(path.stem for path in locate_folder("recipes").glob("*.yaml")))
    assert "v3-awq4" in shipped
    assert read_error(run("plan", "tiny-v3-awq5"), 2) == (
        "tiny-v3-awq5: no such recipe file, and no folder or hub id (owner/name) of a model; "
        f"recipes that ship with quantkit: {shipped}"
    )


def test_recipe_faults_are_reported_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "version: 1\n"
        "source: {model: builtin:tiny-v3}\n"
        "quantise: {bits: 4}\n"
        "fidelity: {set: tiny-v3-heldout}\n"
        "output: {path: x, shard_byte: 3}\n"
        "memory: much\n"
    )
    lines = read_error(run("build", path), 2).splitlines()
    assert len(lines) == 3
    assert lines[0].startswith(
        f"{path}:3: quantise: unknown key. Did you mean 'quantize'? Known: version, source"
    )
    assert lines[1].startswith(
        f"{path}:5: output.shard_byte: unknown key. Did you mean 'shard_bytes'?"
    )
    assert lines[2].startswith(f"{path}:6: memory: expected a size such as 64GB, ")


def test_binary_recipe_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe")
    assert read_error(run("plan", tmp_path / "mine.yaml"), 2).startswith(
        f"{tmp_path / 'mine.yaml'}: expected a UTF-8 text file, found: "
    )


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("memory", "--set: expected KEY=VALUE, e.g. --set output.path=artifacts/other"),
        (
            "quantize.bitz=4",
            "override quantize.bitz: quantize.bitz: unknown key. Did you mean 'bits'?",
        ),
        (
            "quantize.group_size=100",
            "override quantize.group_size: quantize.group_size: expected 16, 32, 64, 128 or ",
        ),
        ("memory=1MB", "override memory: memory: the smallest wave (2 experts) needs "),
        (
            "evaluation.tasks=[tiny-v3-math, tiny-v3-code, gsm9k]",
            "no benchmark named 'gsm9k'. Did you mean 'gsm8k'?",
        ),
        (
            "rules=[{match: '*.nothing', keep: source}]",
            "rules[0]: '*.nothing' matches no linear of this model; ",
        ),
    ],
)
def test_plan_and_build_refuse_an_invalid_recipe(
    override: str, sentence: str, tmp_path: Path
) -> None:
    """The plan refuses it, and the build does before it writes anything."""
    assert sentence in read_error(run("plan", RECIPE, "--set", override), 2)
    output = tmp_path / "artifact"
    refused = run(
        "build", RECIPE, "--skip-evaluation", "--set", f"output.path={output}", "--set", override
    )
    assert sentence in read_error(refused, 2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["calibration.set", "fidelity.set"])
def test_unknown_text_set_is_refused(key: str, tmp_path: Path) -> None:
    sentence = "no set of documents named 'tiny-v4'. Did you mean 'tiny-v3'?"
    assert sentence in read_error(run("plan", RECIPE, "--set", f"{key}=tiny-v4"), 2)
    assert sentence in read_error(
        build(
            tmp_path / "artifact", **{key.replace(".", "__"): "tiny-v4", "quantize__method": "awq"}
        ),
        2,
    )


# --------------------------------------------------------------------------------------------- plan


def test_plan_prints_tables_or_json() -> None:
    shown = run("plan", RECIPE)
    assert shown.exit_code == 0 and shown.stderr == ""
    assert "builtin:tiny-v3 -> artifacts/tiny-v3-awq4" in shown.stdout
    assert "experts-only[0]" in shown.stdout and "int4" in shown.stdout
    output = run("plan", RECIPE, "--json")
    summary = PlanSummary.model_validate(json.loads(output.stdout))
    assert output.exit_code == 0 and output.stderr == ""
    assert summary.totals.modules_quantized == 3 * 3 * 16
    assert summary.source.read_from == "headers"


def test_plan_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("plan", RECIPE).exit_code == 0
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------------- build


def test_build_prints_plan_progress_and_six_lines(tmp_path: Path) -> None:
    result = build(tmp_path / "artifact")
    assert result.exit_code == 0
    assert "Rules" in result.stdout and "Gates" not in result.stdout
    labels = list_labels(result.stdout)
    assert [label for label in labels if label != "warning"] == list(SIX)
    assert labels[-2:] == ["page", "next"]
    assert f"page        {tmp_path / 'artifact' / 'quantkit/fidelity.html'}" in result.stdout
    assert "plan " in result.stderr and "peak memory" in result.stderr
    assert (
        "blocks: 100 % model.layers.3" in result.stderr
        and "blocks" not in result.stdout.partition("Rules")[0]
    )
    # staging and scratch are gone
    assert sorted(path.name for path in tmp_path.iterdir()) == ["artifact", "artifact.build.log"]


def test_log_lists_steps_blocks_modules_and_how_a_build_ended(tmp_path: Path) -> None:
    output, log = tmp_path / "artifact", tmp_path / "artifact.build.log"
    assert build(output, "--verbose").exit_code == 0
    lines = log.read_text().splitlines()
    assert "quantkit 0" in lines[0] and "accepted" not in lines[0]
    [block] = [line for line in lines if " model.layers.3: " in line]
    assert re.search(r"INFO .* s; 48 modules quantized; weight error at most \d+\.\d\d %", block)
    assert "hidden states off by" in block and "router agreement" in block
    [module] = [line for line in lines if " model.layers.3.mlp.experts.7.up_proj: " in line]
    assert "DEBUG" in module and "rtn, rounding nearest, int4 g128 asymmetric" in module
    assert any("quantize: " in line for line in lines) and lines[-1].endswith(": not judged")

    again = build(output, "--verbose")  # refused by the plan: the file stays as it is
    assert again.exit_code == 2 and log.read_text().splitlines() == lines
    assert "ERROR   error: " in again.stderr


def test_failure_and_interruption_are_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ArtifactError("model.layers.1: a planted fault \x1b[31m")

    monkeypatch.setattr(pipeline, "write_model_files", fail)
    assert build(tmp_path / "artifact").exit_code == 1
    text = (tmp_path / "artifact.build.log").read_text()
    assert "ERROR   error: model.layers.1: a planted fault \\x1b[31m" in text
    assert "Traceback" not in text


def test_full_disk_ends_the_log_and_not_the_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build_log, "open_to_append", lambda _: os.open("/dev/full", os.O_WRONLY))
    with build_log.log_build(verbose=False) as log:
        log.open_file(tmp_path / "artifact")
        for _ in range(2):
            logging.getLogger("quantkit.build").info("a block")
    assert capsys.readouterr().err.count("the log ends: [Errno 28]") == 1


def test_log_file_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "artifact.build.log").symlink_to(tmp_path / "mine")
    result = build(tmp_path / "artifact")
    assert result.exit_code == 0 and "no log file: " in result.stderr
    assert (tmp_path / "mine").read_text() == "mine"


def test_build_json_is_the_only_stdout(tmp_path: Path) -> None:
    """Runs in a subprocess, because libraries print, too."""
    arguments = [
        "build",
        RECIPE,
        "--json",
        "--skip-evaluation",
        *overrides(output__path=tmp_path / "artifact"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "quantkit", *arguments],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert Fidelity.model_validate(json.loads(done.stdout)).status == "not judged"
    assert "Traceback" not in done.stderr
    assert json.loads(done.stdout) == json.loads(
        (tmp_path / "artifact/quantkit/fidelity.json").read_text()
    )


def test_recipe_of_an_artifact_rebuilds_it(built: Path, tmp_path: Path) -> None:
    """It contains every --set of its build, and nothing else."""
    again = tmp_path / "again"
    done = run("build", built / "recipe.yaml", "--skip-evaluation", "--set", f"output.path={again}")
    assert done.exit_code == 0, done.output
    shards = [path.name for path in built.glob("*.safetensors")]
    assert len(shards) == 3
    for name in (*shards, "config.json", "recipe.yaml", "quantkit/samples/tokens.parquet"):
        assert (again / name).read_bytes() == (built / name).read_bytes(), name
    manifests = [read_manifest(path) for path in (built, again)]
    assert (
        manifests[0]["plan"] == manifests[1]["plan"]
        and manifests[0]["modules"] == manifests[1]["modules"]
    )


def test_report_prints_six_lines_or_every_table(built: Path) -> None:
    short, full = run("report", built), run("report", built, "--full")
    assert short.exit_code == full.exit_code == 0 and short.stderr == full.stderr == ""
    for words in ("Next-token distributions", "Gates", "Quantized layers"):
        assert words in full.stdout and words not in short.stdout
    assert list_labels(full.stdout) == list(SIX)  # the tables have the warnings
    output = run("report", built, "--json")
    assert json.loads(output.stdout) == json.loads((built / "quantkit/fidelity.json").read_text())


def test_verify_prints_its_counts(built: Path) -> None:
    actual = verify_artifact(built)
    shown = run("verify", built)
    assert shown.exit_code == 0 and shown.stderr == ""
    assert shown.stdout == (
        f"{built}: ok ({actual.files} files, {actual.tensors} tensors, {actual.n_bytes / 1e6:.1f} "
        "MB, not judged)\n"
        "  consistent: it is what its own manifest says; its origin was not checked (--deep "
        "compares with the source, --public-key names a signer)\n"
    )
    assert json.loads(run("verify", built, "--json").stdout) == {
        "artifact": str(built),
        "ok": True,
        "status": "not judged",
        "files": actual.files,
        "tensors": actual.tensors,
        "bytes": actual.n_bytes,
        "modules": 144,
        "notes": [],
        "unsealed": [],
        "signed_by": None,
        "origin_checked": False,
    }


def test_damaged_artifact_exits_with_1(artifact: Path) -> None:
    (artifact / "README.md").write_text("other")
    for options in ([], ["--json"]):
        result = run("verify", artifact, *options)
        assert "README.md: expected " in read_error(result, 1)
        assert result.stdout == ""


def test_report_and_verify_refuse_other_folders(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        assert "not an artifact of quantkit, or its build did not finish" in read_error(
            run("report", path), 1
        )
        assert read_error(run("verify", path), 1).startswith(f"{path}: ")


def test_missed_gate_exits_with_3_and_keeps_the_artifact(tmp_path: Path) -> None:
    output = tmp_path / "artifact"
    result = build(output, gates="{kl_mean: {max: 1.0e-9}, top1: {min: 0.5}}")
    assert read_error(result, 3).startswith("gate kl_mean <= 1e-09: found 0.000")
    assert "Rejected: it fails" in result.stdout
    assert verify_artifact(output).status == "rejected"
    assert json.loads((output / "quantkit/manifest.json").read_text())["status"] == "rejected"
    report = Fidelity.model_validate_json((output / "quantkit/fidelity.json").read_bytes())
    assert {gate.figure: gate.ok for gate in report.gates} == {"kl_mean": False, "top1": True}
    printed = build(output, "--overwrite", "--json", gates="{kl_mean: {max: 1.0e-9}}")
    assert printed.exit_code == 3 and json.loads(printed.stdout)["status"] == "rejected"


def test_kept_gates_accept_the_artifact(tmp_path: Path) -> None:
    assert build(tmp_path / "artifact", gates="{kl_mean: {max: 1}}").exit_code == 0
    assert verify_artifact(tmp_path / "artifact").status == "accepted"


def test_interrupted_build_exits_with_130(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("quantkit.pipeline.quantize_and_measure", interrupt)
    result = build(tmp_path / "artifact")
    first, last = result.stderr.splitlines()
    assert first.startswith("source's sha256: 100 %") and last == "interrupted"
    assert result.exit_code == 130
    assert not (tmp_path / "artifact").exists()


def test_help_on_a_full_device_is_one_message() -> None:
    with open("/dev/full", "w") as full:
        output = subprocess.run(
            [sys.executable, "-m", "quantkit", "--help"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert output.returncode == 1
    assert output.stderr.startswith(
        "error: the operating system refused: no space left on device; check "
    )
    assert "Traceback" not in output.stderr


# ---------------------------------------------------------------------------- existing artifacts


def test_existing_output_is_not_changed(tmp_path: Path) -> None:
    output = tmp_path / "artifact"
    output.mkdir()
    (output / "thesis.txt").write_text("years of work")
    assert (
        read_error(build(output), 2)
        == f"{output}: exists already; choose another output.path or pass --overwrite"
    )
    assert read_error(build(output, "--overwrite"), 2) == (
        f"{output}: exists and is not an artifact of quantkit; --overwrite replaces artifacts only"
    )
    assert (output / "thesis.txt").read_text() == "years of work"
    assert list(tmp_path.iterdir()) == [output]


def test_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert "file: exists already; " in read_error(build(tmp_path / "file"), 2)
    assert "file: exists and is not an artifact" in read_error(
        build(tmp_path / "file", "--overwrite"), 2
    )
    assert "below.building: cannot be written: not a directory" in read_error(
        build(tmp_path / "file" / "below"), 1
    )
    assert (tmp_path / "file").read_text() == "x"


def test_overwrite_replaces_an_artifact_after_the_new_one_is_complete(
    artifact: Path, checkpoint_copy: Path
) -> None:
    before = (artifact / "quantkit/manifest.json").read_bytes()
    (checkpoint_copy / "model.safetensors").unlink()
    assert build(artifact, "--overwrite", source__model=checkpoint_copy).exit_code == 1
    poison(checkpoint_copy, "model.layers.3.input_layernorm.weight")  # after three blocks
    assert build(artifact, "--overwrite", source__model=checkpoint_copy).exit_code == 1
    assert (artifact / "quantkit/manifest.json").read_bytes() == before
    verify_artifact(artifact)
    other = {"quantize__group_size": 64}
    refused = read_error(build(artifact, "--overwrite", **other), 2)
    assert (
        "recipe.quantize.group_size was 128, is 64" in refused
        and "source.files.model.safetensors chan" in refused
    )
    assert refused.endswith("start over with --restart")
    assert build(artifact, "--overwrite", "--restart", **other).exit_code == 0
    assert (
        json.loads((artifact / "config.json").read_text())["quantization_config"]["group_size"]
        == 64
    )
    verify_artifact(artifact)
    left = {"artifact", "artifact.build.log", "source"}
    assert {path.name for path in artifact.parent.iterdir()} == left


# ------------------------------------------------------------------------------ damaged checkpoints


def poison(folder: Path, name: str) -> None:
    """Write the checkpoint with one value of a tensor not a number."""
    tensors = load_file(locate_model("builtin:tiny-v3") / "model.safetensors")
    if tensors[name].dtype == torch.float8_e4m3fn:
        tensors[name].view(torch.uint8)[0, 0] = 0x7F
    else:
        tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, folder / "model.safetensors")


def no_shard(folder: Path) -> None:
    split(folder)
    (folder / SHARDS[1]).unlink()


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def without(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors")


EXPERT = "model.layers.2.mlp.experts.3.up_proj.weight"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (
        no_shard,
        f"{SHARDS[1]}: expected a file named by the checkpoint, found none; fetch the",
    ),
    "truncated shard": (
        cut,
        "model.safetensors: expected 7734632 bytes of tensor data, found 7733632; the file is",
    ),
    "missing tensor": (
        lambda f: without(f, "model.norm.weight"),
        "missing: model.norm.weight [256]",
    ),
    "missing scale": (lambda f: without(f, f"{EXPERT}_scale_inv"), f"{EXPERT}_scale_inv"),
    "NaN in a norm": (
        lambda f: poison(f, "model.norm.weight"),
        "tensor 'model.norm.weight': expected finite values",
    ),
    "NaN in an expert": (
        lambda f: poison(f, EXPERT),
        f"tensor '{EXPERT}': expected finite values, found nan at elem",
    ),
    "NaN in a scale": (
        lambda f: poison(f, f"{EXPERT}_scale_inv"),
        f"tensor '{EXPERT}_scale_inv': expected finite",
    ),
    "no config": (
        lambda f: (f / "config.json").unlink(),
        "config.json: expected the model's configuration, found",
    ),
    "broken config": (
        lambda f: (f / "config.json").write_text("{"),
        "config.json: expected JSON, found an error (",
    ),
    "no tokenizer": (
        lambda f: (f / "tokenizer.json").unlink(),
        "expected a tokenizer that transformers loads without",
    ),
    "unknown activation": (
        lambda f: change_config(f, hidden_act="silly"),
        "found: KeyError: 'silly'; repair",
    ),
    "mistyped value": (
        lambda f: change_config(f, rope_theta="much"),
        "expected a configuration that transformers mak",
    ),
    "mistyped size": (
        lambda f: change_config(f, hidden_size="big"),
        "config.json: expected a configuration that tran",
    ),
    "unknown dtype": (
        lambda f: change_config(f, dtype="float99"),
        "config.json: expected a configuration that transf",
    ),
    "broken tokenizer": (
        lambda f: (f / "tokenizer.json").write_text("{"),
        "tokenizer.json: expected JSON, found an e",
    ),
    "list of settings": (
        lambda f: (f / "tokenizer_config.json").write_text("[]"),
        "expected a JSON object, found lis",
    ),
    "too many experts": (
        lambda f: change_config(f, num_experts_per_tok=17),
        "found 17 of 16 experts, 2 of 4 groups;",
    ),
    "uneven groups": (
        lambda f: change_config(f, n_group=5),
        "found 2 of 16 experts, 2 of 5 groups; repair it",
    ),
    "other shapes": (
        lambda f: change_config(f, hidden_size=512),
        "model.norm.weight: expected shape [512], found",
    ),
}


@pytest.mark.parametrize(("damage", "sentence"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_checkpoint_is_one_message(
    damage: Callable[[Path], object], sentence: str, checkpoint_copy: Path, tmp_path: Path
) -> None:
    """One message, exit 1, and nothing under the final name.

    Followed by how to resume, if a block was done.
    """
    damage(checkpoint_copy)
    message, *note = read_error(
        build(tmp_path / "artifact", source__model=checkpoint_copy), 1
    ).split("\n")
    assert sentence in message
    assert not note or (len(note) == 1 and "of 4 blocks are done and kept" in note[0])
    left = {"source", "artifact.building", "artifact.build.log"}
    left |= {"artifact.building.scratch"} if note else set()
    assert {path.name for path in tmp_path.iterdir()} <= left


def test_unknown_family_exits_with_2(checkpoint_copy: Path, tmp_path: Path) -> None:
    change_config(checkpoint_copy, model_type="gpt17")
    message = read_error(build(tmp_path / "artifact", source__model=checkpoint_copy), 2)
    assert "'gpt17'" in message and ", ".join(registry.list_names("architectures")) in message


def test_family_that_cannot_be_derived_is_reported_with_the_reason(
    checkpoint_copy: Path, tmp_path: Path
) -> None:
    change_config(checkpoint_copy, model_type="gpt2")
    message = read_error(build(tmp_path / "artifact", source__model=checkpoint_copy), 1)
    assert (
        "model_type 'gpt2' has no table in quantkit, and none can be derived: transformer.h.0 has "
        "no nn.Linear; its matrices are in Conv1D" in message
    )


def test_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    from support.checkpoints import make_tiny_config, write_checkpoint

    source = write_checkpoint(tmp_path / "source", make_tiny_config("llama", vocab_size=512))
    message = read_error(build(tmp_path / "artifact", source__model=source, rules="all-linear"), 1)
    assert f"{source}: tokenizer: expected token ids below 512, the rows of" in message
    assert not (tmp_path / "artifact").exists()


def test_missing_model_is_refused(tmp_path: Path) -> None:
    absent = (
        "source.model: expected a folder, builtin:<name> or a Hub id like org/name, "
        "found './absent'"
    )
    for model, sentence, code in (("builtin:tiny-v4", "tiny-v3", 2), ("./absent", absent, 1)):
        assert sentence in read_error(run("plan", RECIPE, "--set", f"source.model={model}"), code)
        assert sentence in read_error(build(tmp_path / "artifact", source__model=model), code)
