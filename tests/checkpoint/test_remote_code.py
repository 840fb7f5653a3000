"""Code that comes with a model is carried over and not run, except a trusted commit's tokenizer.

Every module here writes a file when it is imported, so that each test can detect an import.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.checkpoints import make_recipe_text, make_tiny_config, write_checkpoint
from support.command_line import read_error, run

from quantkit.checkpoint import remote_code
from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.checkpoint.remote_code import list_code_files
from quantkit.errors import CheckpointError
from quantkit.recipe.parse import parse_recipe
from quantkit.verify.shallow import verify_artifact

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = "f" * 40
Record = Callable[[str, object], None]

SPY = """\
from pathlib import Path
Path({sentinel!r}).write_text(__name__)
"""
MODEL = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""
TOKENIZER = """
from transformers import PreTrainedTokenizerFast
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers copies a model's modules before it imports them; keep them out of the user's
    cache. Recipes write into the working folder.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    monkeypatch.setattr("sys.path", [*__import__("sys").path])


@pytest.fixture
def sentinel(tmp_path: Path) -> Path:
    """Return the file that a module writes when it is imported."""
    return tmp_path / "was imported"


@pytest.fixture
def snapshot(tmp_path: Path, sentinel: Path) -> Path:
    """Write a llama in the layout of the Hub's cache, with code for config, model and tokenizer."""
    folder = tmp_path / "models--org--own" / "snapshots" / COMMIT
    write_checkpoint(folder, make_tiny_config("llama"))
    spy = SPY.format(sentinel=str(sentinel))
    (folder / "modeling_own.py").write_text(spy + MODEL)
    (folder / "tokenization_own.py").write_text(spy + TOKENIZER)
    maps = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    edit_json(folder / "config.json", auto_map=maps)
    return folder


def edit_json(path: Path, **values: object) -> None:
    """Change keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def require_tokenizer_code(folder: Path, name: str = "tokenization_own.OwnTokenizer") -> None:
    """Make the tokenizer one that exists only as code."""
    edit_json(
        folder / "tokenizer_config.json",
        tokenizer_class="OwnTokenizer",
        auto_map={"AutoTokenizer": [None, name]},
    )


def write_build_recipe(
    source: Path, tmp_path: Path, allowed: str | None = None
) -> tuple[str, Path]:
    """Write a recipe; return the command that builds it."""
    path = tmp_path / "own.yaml"
    text = make_recipe_text(
        source, tmp_path / "out", rules="all-linear", quantize="{method: rtn}",
        source=f"{{model: {source}{f', trust_remote_code: {allowed}' if allowed else ''}}}",
    )  # fmt: skip
    path.write_text(text)
    return "build", path


@pytest.mark.parametrize("tokenizer", [True, False])
def test_code_is_carried_over_and_never_run(
    tokenizer: bool, snapshot: Path, sentinel: Path, tmp_path: Path, record_property: Record
) -> None:
    """A known architecture with an auto_map is built, verified, loaded and reported without its
    code.
    """
    from quantkit.artifact.load_model import load_model

    names = ["modeling_own.py"]
    if tokenizer:
        maps = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}
        edit_json(snapshot / "tokenizer_config.json", auto_map=maps)
        names.append("tokenization_own.py")
    result = run(*write_build_recipe(snapshot, tmp_path), "--skip-evaluation")
    assert result.exit_code == 0, result.output
    output = tmp_path / "out"
    assert sorted(path.name for path in output.glob("*.py")) == names
    for name in names:
        assert (output / name).read_bytes() == (snapshot / name).read_bytes()
    assert (
        json.loads((output / "config.json").read_text())["auto_map"]["AutoConfig"]
        == "modeling_own.OwnConfig"
    )
    verify_artifact(output)
    load_model(output)
    for command in (("report", output), ("diff", output, output), ("verify", output)):
        assert run(*command).exit_code == 0
    assert not sentinel.exists()
    record_property("input", "code of a known architecture")


def test_tokenizer_of_code_alone_is_rejected(
    snapshot: Path, sentinel: Path, tmp_path: Path, record_property: Record
) -> None:
    """The message names the key that would allow the code."""
    require_tokenizer_code(snapshot)
    message = read_error(run(*write_build_recipe(snapshot, tmp_path)), 1)
    assert (
        "It has code of its own, which never runs unless source.trust_remote_code names" in message
    )
    assert not sentinel.exists() and not (tmp_path / "out").exists()
    record_property("input", "tokenizer of code alone")


def test_tokenizer_of_the_trusted_commit_runs(
    snapshot: Path, sentinel: Path, tmp_path: Path
) -> None:
    """Benchmarks load the tokenizer again; the model's own code does not run with it."""
    require_tokenizer_code(snapshot)
    result = run(*write_build_recipe(snapshot, tmp_path, COMMIT), "--skip-evaluation")
    assert result.exit_code == 0, result.output
    assert sentinel.read_text().endswith("tokenization_own")
    assert (
        json.loads((tmp_path / "out/quantkit/plan.json").read_text())["recipe"]["source"][
            "trust_remote_code"
        ]
        == COMMIT
    )


def test_other_commit_is_rejected(
    snapshot: Path, sentinel: Path, tmp_path: Path, record_property: Record
) -> None:
    """The recipe trusts another commit than that of the files, or the files' commit is unknown."""
    require_tokenizer_code(snapshot)
    message = read_error(run(*write_build_recipe(snapshot, tmp_path, OTHER)), 2)
    assert f"expected the files of commit {OTHER}, found commit {COMMIT}" in message
    plain = Path(shutil.copytree(snapshot, tmp_path / "plain"))
    assert "a folder of no known commit" in read_error(
        run(*write_build_recipe(plain, tmp_path, COMMIT)), 2
    )
    assert not sentinel.exists()
    record_property("input", "tokenizer of another commit")


def test_code_of_another_repository_is_rejected(
    snapshot: Path, sentinel: Path, tmp_path: Path, record_property: Record
) -> None:
    """`org/other--file.Class` would be fetched at an unspecified revision."""
    require_tokenizer_code(snapshot, "org/other--tokenization_own.OwnTokenizer")
    message = read_error(run(*write_build_recipe(snapshot, tmp_path, COMMIT)), 1)
    assert "of another repository" in message and not sentinel.exists()
    record_property("input", "tokenizer of another repository")


@pytest.mark.parametrize("allowed", [None, COMMIT])
def test_architecture_of_code_alone_is_rejected(
    allowed: str | None, snapshot: Path, sentinel: Path, tmp_path: Path, record_property: Record
) -> None:
    """quantkit streams transformers' own layers only, whatever the recipe allows."""
    edit_json(snapshot / "config.json", model_type="own")
    for command in ("plan", "build"):
        message = read_error(run(command, write_build_recipe(snapshot, tmp_path, allowed)[1]), 2)
        assert "the code of a checkpoint (auto_map) is never run" in message
    assert not sentinel.exists()
    record_property("input", "architecture of code alone")


@pytest.mark.parametrize(
    "value", ["true", "main", "v1.0", COMMIT[:12], COMMIT.upper(), f"{COMMIT}0", "'yes'"]
)
def test_trust_remote_code_must_be_a_commit(value: str, tmp_path: Path) -> None:
    """A branch, which can move, and "yes" are rejected."""
    command, path = write_build_recipe(tmp_path, tmp_path, value)
    assert "own.yaml:2: source.trust_remote_code: expected" in read_error(run(command, path), 2)


def test_recipe_hash_is_unchanged_without_the_key(tmp_path: Path) -> None:
    """Artifacts of older recipes record their hash."""
    text = make_recipe_text("builtin:tiny-v3", tmp_path / "out")
    plain = parse_recipe(text, "r.yaml")
    trusting = parse_recipe(text, "r.yaml", {"source.trust_remote_code": COMMIT})
    assert (
        parse_recipe(text, "r.yaml", {"source.trust_remote_code": "null"}).hash
        == plain.hash
        != trusting.hash
    )


# ------------------------------------------------------------------------ code that is carried over


PLANTED = (
    "usercustomize.py", "sitecustomize.py", "conftest.py", "setup.py", "__init__.py", "test_own.py",
    "unnamed.py", "json.py",
)  # fmt: skip


def test_only_code_that_an_auto_map_names_is_carried_over(snapshot: Path) -> None:
    """And the modules next to it that it imports relatively, and those that these import."""
    for name in PLANTED:
        (snapshot / name).write_text("raise SystemExit")
    (snapshot / "modeling_own.py").write_text(
        "from .blocks import Block\nimport json\n  from .warnings import (\n    a,\n)\n"
        "from .. import outside\nfrom .absent import a\nfrom .usercustomize import a\n"
        "x = 'from .json import a'\n"
    )
    (snapshot / "blocks.py").write_text("import .norm\nfrom .modeling_own import OwnModel\n")
    for name in ("norm.py", "warnings.py", "image_own.py"):
        (snapshot / name).write_text("")
    (snapshot / "preprocessor_config.json").write_text(
        json.dumps({"auto_map": {"AutoImageProcessor": "image_own.Own"}})
    )
    named = ("blocks.py", "image_own.py", "modeling_own.py", "norm.py", "warnings.py")
    assert list_code_files(snapshot) == named
    carried = [path.name for path in Checkpoint.open(snapshot).sidecars]
    assert tuple(name for name in carried if name.endswith(".py")) == named


@pytest.mark.parametrize("name", PLANTED)
def test_module_that_tools_run_by_its_name_is_never_carried_over(
    name: str, snapshot: Path, record_property: Record
) -> None:
    """Also if an auto_map names it."""
    module = name.removesuffix(".py")
    edit_json(snapshot / "config.json", auto_map={"AutoConfig": f"{module}.Own"})
    (snapshot / name).write_text("raise SystemExit")
    expected = (name,) if module in {"unnamed", "json"} else ()  # names that models may have
    assert list_code_files(snapshot) == expected
    record_property("input", f"an auto_map names {name}")


@pytest.mark.parametrize(
    "value",
    [
        "../own.Own",
        "sub/own.Own",
        "org/other--modeling_own.Own",
        "own",
        ".own.Own",
        "a.b.C",
        7,
        None,
    ],
)
def test_auto_map_of_another_form_names_no_file(value: object, snapshot: Path) -> None:
    edit_json(snapshot / "config.json", auto_map={"AutoConfig": value, "AutoModel": [value]})
    assert list_code_files(snapshot) == ()


def test_number_of_code_files_is_bounded(snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_code, "MAX_CODE_FILES", 3)
    for number in range(4):
        (snapshot / f"m{number}.py").write_text(f"from .m{number + 1} import a\n")
    (snapshot / "modeling_own.py").write_text("from .m0 import a\n")
    with pytest.raises(CheckpointError, match="auto_map: expected at most 3 files of code"):
        list_code_files(snapshot)


def test_plan_lists_the_code(snapshot: Path, tmp_path: Path) -> None:
    (snapshot / "usercustomize.py").write_text("")
    _, path = write_build_recipe(snapshot, tmp_path)
    assert "code carried over, not run: modeling_own.py\n" in run("plan", path).stdout
    assert json.loads(run("plan", path, "--json").stdout)["source"]["code"] == ["modeling_own.py"]
