"""Code that comes with a model: carried over, and not run, unless it is a tokenizer's of the commit the recipe names.

Every module here writes a file when it is imported, so that each test can tell whether it was.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.checkpoints import make_recipe_text, make_tiny_config, write_checkpoint
from support.command_line import read_error, run

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
    """transformers copies a model's modules before it imports them; not into this user's cache."""
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    monkeypatch.setattr("sys.path", [*__import__("sys").path])


@pytest.fixture
def sentinel(tmp_path: Path) -> Path:
    """What a module writes when it is imported."""
    return tmp_path / "was imported"


@pytest.fixture
def snapshot(tmp_path: Path, sentinel: Path) -> Path:
    """A llama in the layout of the Hub's cache, with code of its own for config, model and tokenizer."""
    folder = tmp_path / "models--org--own" / "snapshots" / COMMIT
    write_checkpoint(folder, make_tiny_config("llama"))
    spy = SPY.format(sentinel=str(sentinel))
    (folder / "modeling_own.py").write_text(spy + MODEL)
    (folder / "tokenization_own.py").write_text(spy + TOKENIZER)
    maps = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    change(folder / "config.json", auto_map=maps)
    return folder


def change(path: Path, **values: object) -> None:
    """Change keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def only_code(folder: Path, name: str = "tokenization_own.OwnTokenizer") -> None:
    """Make the tokenizer one that exists as code alone."""
    change(
        folder / "tokenizer_config.json",
        tokenizer_class="OwnTokenizer",
        auto_map={"AutoTokenizer": [None, name]},
    )


def recipe(source: Path, tmp_path: Path, allowed: str | None = None) -> tuple[str, Path]:
    """A build of it."""
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
    """A known architecture with an auto_map: built, verified, loaded, reported from transformers' own code."""
    from quantkit.artifact.load_model import load_model

    if tokenizer:
        maps = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}
        change(snapshot / "tokenizer_config.json", auto_map=maps)
    result = run(*recipe(snapshot, tmp_path), "--skip-evaluation")
    assert result.exit_code == 0, result.output
    made = tmp_path / "out"
    for name in ("modeling_own.py", "tokenization_own.py"):
        assert (made / name).read_bytes() == (snapshot / name).read_bytes()
    assert (
        json.loads((made / "config.json").read_text())["auto_map"]["AutoConfig"]
        == "modeling_own.OwnConfig"
    )
    verify_artifact(made)
    load_model(made)
    for command in (("report", made), ("diff", made, made), ("verify", made)):
        assert run(*command).exit_code == 0
    assert not sentinel.exists()
    record_property("input", "code of a known architecture")


def test_a_tokenizer_of_code_alone_is_refused(
    snapshot: Path, sentinel: Path, tmp_path: Path, record_property: Record
) -> None:
    """The sentence says which key would allow it."""
    only_code(snapshot)
    told = read_error(run(*recipe(snapshot, tmp_path)), 1)
    assert "It has code of its own, which never runs unless source.trust_remote_code names" in told
    assert not sentinel.exists() and not (tmp_path / "out").exists()
    record_property("input", "tokenizer of code alone")


def test_a_tokenizer_of_the_commit_that_was_read_runs(
    snapshot: Path, sentinel: Path, tmp_path: Path
) -> None:
    """Benchmarks load it again; the model's own code does not run with it."""
    only_code(snapshot)
    result = run(*recipe(snapshot, tmp_path, COMMIT), "--skip-evaluation")
    assert result.exit_code == 0, result.output
    assert sentinel.read_text().endswith("tokenization_own")
    assert (
        json.loads((tmp_path / "out/quantkit/plan.json").read_text())["recipe"]["source"][
            "trust_remote_code"
        ]
        == COMMIT
    )


def test_another_commit_is_refused(
    snapshot: Path, sentinel: Path, tmp_path: Path, record_property: Record
) -> None:
    """The files are of one commit, the recipe trusts another; or they are of none that is known."""
    only_code(snapshot)
    told = read_error(run(*recipe(snapshot, tmp_path, OTHER)), 2)
    assert f"expected the files of commit {OTHER}, found commit {COMMIT}" in told
    plain = Path(shutil.copytree(snapshot, tmp_path / "plain"))
    assert "a folder of no known commit" in read_error(run(*recipe(plain, tmp_path, COMMIT)), 2)
    assert not sentinel.exists()
    record_property("input", "tokenizer of another commit")


def test_code_of_another_repository_is_refused(
    snapshot: Path, sentinel: Path, tmp_path: Path, record_property: Record
) -> None:
    """`org/other--file.Class` would be fetched at a revision that nobody names."""
    only_code(snapshot, "org/other--tokenization_own.OwnTokenizer")
    told = read_error(run(*recipe(snapshot, tmp_path, COMMIT)), 1)
    assert "of another repository" in told and not sentinel.exists()
    record_property("input", "tokenizer of another repository")


@pytest.mark.parametrize("allowed", [None, COMMIT])
def test_an_architecture_of_code_alone_is_refused(
    allowed: str | None, snapshot: Path, sentinel: Path, tmp_path: Path, record_property: Record
) -> None:
    """Whatever the recipe allows: quantkit streams transformers' own layers and nothing else."""
    change(snapshot / "config.json", model_type="own")
    for command in ("plan", "build"):
        told = read_error(run(command, recipe(snapshot, tmp_path, allowed)[1]), 2)
        assert "the code of a checkpoint (auto_map) is never run" in told
    assert not sentinel.exists()
    record_property("input", "architecture of code alone")


@pytest.mark.parametrize(
    "value", ["true", "main", "v1.0", COMMIT[:12], COMMIT.upper(), f"{COMMIT}0", "'yes'"]
)
def test_trust_is_a_commit(value: str, tmp_path: Path) -> None:
    """Not a branch, which somebody may move, nor a yes."""
    command, path = recipe(tmp_path, tmp_path, value)
    assert "own.yaml:2: source.trust_remote_code: expected" in read_error(run(command, path), 2)


def test_a_recipe_without_the_key_has_the_hash_that_it_had(tmp_path: Path) -> None:
    """Artifacts of older recipes name theirs."""
    text = make_recipe_text("builtin:tiny-v3", tmp_path / "out")
    plain = parse_recipe(text, "r.yaml")
    trusting = parse_recipe(text, "r.yaml", {"source.trust_remote_code": COMMIT})
    assert (
        parse_recipe(text, "r.yaml", {"source.trust_remote_code": "null"}).hash
        == plain.hash
        != trusting.hash
    )
