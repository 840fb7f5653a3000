"""`build`, `plan` and `init` with a model in place of a recipe, in an empty folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.command_line import read_error, run
from support.constants import FAST

from quantkit.artifact.read_manifest import read_manifest
from quantkit.recipe.parse import parse_recipe

MODEL = "builtin:tiny-v3"
QUICK = {
    key: value
    for key, value in FAST.items()
    if key.partition(".")[0] in {"fidelity", "compute", "output"}
}
SETTINGS = [part for key, value in QUICK.items() for part in ("--set", f"{key}={value}")]
BUILD = ("build", MODEL, "--method", "rtn", "--skip-evaluation", *SETTINGS)


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_overridden_values_are_shown_with_the_override_as_reason() -> None:
    changes = ("quantize.bits=8", "fidelity=none", "gates={}")
    done = run("plan", MODEL, *(part for change in changes for part in ("--set", change)))
    assert done.exit_code == 0, done.output
    rows = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
    assert ["quantize.bits", "8", "set by an override"] in [[x.strip() for x in r] for r in rows]
    assert "fidelity.set " not in done.stdout


def test_build_of_a_model_writes_a_recipe_that_builds_the_same_bytes() -> None:
    first = run(*BUILD)
    assert first.exit_code == 0, first.output
    assert "Chosen for this model" in first.stdout and "routed experts are" in first.stdout
    assert "recipe: recipe.yaml (written)" in first.stderr
    artifact = Path("artifacts/tiny-v3-rtn4")
    manifest = read_manifest(artifact)
    assert (artifact / "recipe.yaml").read_bytes() == Path("recipe.yaml").read_bytes()
    second = run("build", "recipe.yaml", "--skip-evaluation", "--overwrite")
    assert second.exit_code == 0, second.output
    again = read_manifest(artifact)
    assert again["recipe"] == manifest["recipe"] and again["files"] == manifest["files"]


def test_the_same_command_keeps_the_recipe_and_another_one_is_refused() -> None:
    Path("recipe.yaml").write_text(run("init", MODEL, "--method", "rtn", *SETTINGS).stdout)
    Path("artifacts/tiny-v3-rtn4").mkdir(parents=True)
    same = run(*BUILD)
    assert "recipe: recipe.yaml (unchanged)" in same.stderr
    assert same.exit_code == 2 and "artifacts/tiny-v3-rtn4" in read_error(same, 2)
    written = Path("recipe.yaml").read_text()
    message = read_error(run(*BUILD, "--bits", "3"), 2)
    assert message.startswith("recipe.yaml: expected no file, or the recipe of this command")
    assert Path("recipe.yaml").read_text() == written
    assert "--recipe FILE" in message


def test_plan_of_a_model_writes_nothing_but_the_file_it_is_told() -> None:
    planned = run("plan", MODEL, "--bits", "8")
    assert planned.exit_code == 0, planned.output
    assert "compressed_tensors" in planned.stdout and list(Path().iterdir()) == []
    assert run("plan", MODEL, "--json", "--recipe", "r.yaml").exit_code == 0
    assert parse_recipe(Path("r.yaml").read_text(), "r.yaml").quantize.bits == 4


def test_json_of_a_plan_is_the_plan_alone() -> None:
    assert json.loads(run("plan", MODEL, "--json").stdout)["totals"]["modules_quantized"] == 144


def test_overrides_are_in_the_written_recipe() -> None:
    text = run("init", MODEL, "--set", "memory=3GB", "--output", "elsewhere/x").stdout
    recipe = parse_recipe(text, "x.yaml")
    assert (recipe.memory, recipe.output.path) == (3 * 10**9, "elsewhere/x")


@pytest.mark.parametrize(
    ("options", "path"),
    [
        (["--set", "quantize.bits=8"], "artifacts/tiny-v3-gptq8"),
        (["--set", "quantize={method: gptq, bits: 3}"], "artifacts/tiny-v3-gptq3"),
        (["--set", "quantize.bits=8", "--set", "output.path=mine"], "mine"),
        (["--set", "quantize.bits=8", "--output", "tiny-awq4"], "tiny-awq4"),
    ],
)
def test_folder_is_named_after_the_overridden_scheme(options: list[str], path: str) -> None:
    text = run("init", MODEL, *options).stdout
    assert parse_recipe(text, "x.yaml").output.path == path


def test_init_for_gpus_states_the_numbers_of_size() -> None:
    text = run("init", MODEL, "--for", "H100 80GB x2", "--context", "512", "--users", "4").stdout
    assert parse_recipe(text, "x.yaml").quantize.bits == 8
    sized = json.loads(
        run(
            "size", "builtin:tiny-v3", "--gpu", "h100", "--context", "512", "--users", "4", "--json"
        ).stdout
    )
    cache = sized["needs"]["kv_bytes"] / 1e9
    assert f"KV cache {cache:.2f} GB" in text.replace("\n#     ", " ").replace("\n#   ", " ")
    assert "4 users at up to 512 tokens" in text and "fits" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("build", "tiny-v3-awq4", "--bits", "8"), "bits: expected a model"),
        (("plan", "no-such-thing"), "no-such-thing: no such recipe file, and no folder or hub id"),
        (("plan", "empty"), "config.json"),
        (("init", "tiny-v3-awq4"), "tiny-v3-awq4: expected a model"),
        (("init", MODEL, "--for", "H1000"), "--for: no GPU named 'H1000'"),
        (("init", MODEL, "--for", "h100 x0"), "--for: expected one GPU or more"),
        (("init", MODEL, "--users", "3"), "expected --for GPUS with them"),
        (("init", MODEL, "--for", "h100", "--context", "99999"), "max_position_embeddings"),
        (
            ("init", MODEL, "--for", "rtx-4090", "--context", "512", "--users", "1000000"),
            "--for: expected a scheme of builtin:tiny-v3 that fits 1 x RTX 4090",
        ),
    ],
)
def test_wrong_targets_and_options_are_one_sentence(
    arguments: tuple[str, ...], message: str
) -> None:
    Path("empty").mkdir()
    result = run(*arguments)
    assert result.exit_code in {1, 2}
    assert message in read_error(result, result.exit_code)


def test_a_model_in_a_folder_is_built_by_its_path() -> None:
    from quantkit.io.package_data import locate_model

    Path("my-model").symlink_to(locate_model(MODEL), target_is_directory=True)
    planned = run("plan", "./my-model", "--json")
    assert planned.exit_code == 0, planned.output
    assert json.loads(planned.stdout)["output"] == "artifacts/tiny-v3-awq4" or json.loads(
        planned.stdout
    )["output"].startswith("artifacts/")
