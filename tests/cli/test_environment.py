"""What a machine can have: full, read-only or closed disks, odd names, and sources that change under a build."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.checkpoints import make_recipe_text, make_tiny_config, write_checkpoint
from support.command_line import read_error, run

from quantkit import pipeline
from quantkit.errors import CheckpointError
from quantkit.progress import Progress
from quantkit.recipe.parse import parse_recipe
from quantkit.verify.shallow import verify_artifact

Record = Callable[[str, object], None]
ODD = ("a b  c", "模型 文件夹", "ünïcödé", "quote'\"s", "-dash", "#hash %20 &", "🦆")
CLI = (
    "from quantkit.cli.main import main; import sys; sys.argv = ['quantkit', *sys.argv[1:]]; main()"
)


def small(folder: Path) -> Path:
    """A source of one block."""
    return write_checkpoint(folder, make_tiny_config("llama", num_hidden_layers=1))


def recipe(source: Path, output: Path, place: Path, name: str = "r.yaml") -> Path:
    """A build that needs no text."""
    text = make_recipe_text(
        json.dumps(str(source), ensure_ascii=False), output, rules="all-linear", quantize="{method: rtn}",
        fidelity="none", output=json.dumps({"path": str(output)}, ensure_ascii=False),
    )  # fmt: skip
    (place / name).write_text(text, encoding="utf-8")
    return place / name


@pytest.mark.parametrize("name", ODD)
def test_odd_names(name: str, tmp_path: Path, record_property: Record) -> None:
    """Source, output and recipe are called so: built, verified, reported, compared, listed."""
    source = small(tmp_path / f"{name} source")
    output = tmp_path / f"{name} out"
    path = recipe(source, output, tmp_path, f"{name}.yaml")
    for command in (
        ("plan", path), ("build", path), ("verify", output), ("report", output),
        ("report", output, "--html", "--output", tmp_path / f"{name}.html"), ("diff", output, output),
        ("diff", output, output, "--html", "--output", tmp_path / f"{name} diff.html"), ("runs", tmp_path),
    ):  # fmt: skip
        result = run(*command)
        assert result.exit_code == 0, (command, result.output)
    assert (tmp_path / f"{name}.html").stat().st_size > 1000
    record_property("fault", f"name: {name}")


def process(
    path: Path, wrapped: tuple[str, ...] = (), limit: int | None = None
) -> subprocess.CompletedProcess[str]:
    """`quantkit build` in a process of its own."""

    def limited() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.run(
        [*wrapped, sys.executable, "-c", CLI, "build", str(path)], capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, preexec_fn=limited,
    )  # fmt: skip


def refused(done: subprocess.CompletedProcess[str], output: Path, *words: str) -> None:
    """One sentence with one of the words, exit 1, nothing under the final name."""
    assert done.returncode == 1, done.stderr
    message = done.stderr.partition("error: ")[2]
    assert message and "Traceback" not in done.stderr, done.stderr
    assert any(word in message for word in words), message
    assert not (output / "config.json").exists()


def privileged(*command: str) -> tuple[str, ...]:
    """A shell of a mount namespace of its own that runs these lines and then its arguments; skips where it cannot."""
    if not shutil.which("unshare"):
        pytest.skip("needs unshare")
    wrapped = ("unshare", "-m", "sh", "-c", " && ".join([*command, 'exec "$@"']), "sh")
    if os.geteuid() or subprocess.run([*wrapped, "true"], capture_output=True).returncode:
        pytest.skip("needs to be root, and mounts of its own")
    return wrapped


def test_a_disk_that_is_full(tmp_path: Path, record_property: Record) -> None:
    """A file system of 400 kB, which one shard does not fit into."""
    place = tmp_path / "full"
    place.mkdir()
    path = recipe(small(tmp_path / "source"), place / "out", tmp_path)
    wrapped = privileged(f"mount -t tmpfs -o size=400k tmpfs '{place}'")
    refused(process(path, wrapped), place / "out", "no space left on device")
    record_property("fault", "disk full")


def test_a_file_that_may_not_grow(tmp_path: Path, record_property: Record) -> None:
    """`ulimit -f`, as batch systems set it."""
    path = recipe(small(tmp_path / "source"), tmp_path / "out", tmp_path)
    refused(process(path, limit=100_000), tmp_path / "out", "file too large")
    record_property("fault", "file size limited")


def test_an_output_that_is_read_only(tmp_path: Path, record_property: Record) -> None:
    """A mount that takes no writes."""
    place = tmp_path / "fixed"
    place.mkdir()
    path = recipe(small(tmp_path / "source"), place / "out", tmp_path)
    wrapped = privileged(f"mount --bind '{place}' '{place}'", f"mount -o remount,ro,bind '{place}'")
    refused(process(path, wrapped), place / "out", "read-only file system")
    record_property("fault", "output read-only")


@pytest.mark.parametrize("what", ["output", "weights", "config.json", "source folder"])
def test_what_may_not_be_touched(what: str, tmp_path: Path, record_property: Record) -> None:
    """Files without a permission bit, read by somebody who obeys them."""
    source, place = small(tmp_path / "source"), tmp_path / "closed"
    place.mkdir()
    path = recipe(source, place / "out", tmp_path)
    closed = {
        "output": place, "weights": source / "model.safetensors", "config.json": source / "config.json",
        "source folder": source,
    }[what]  # fmt: skip
    closed.chmod(0o000 if what != "output" else 0o500)
    wrapped: tuple[str, ...] = ()
    if not os.geteuid():
        drop = "-dac_override,-dac_read_search"
        wrapped = ("setpriv", f"--bounding-set={drop}", f"--inh-caps={drop}")
        if (
            not shutil.which("setpriv")
            or subprocess.run([*wrapped, "true"], capture_output=True).returncode
        ):
            pytest.skip("needs setpriv: root reads everything")
    try:
        done = process(path, wrapped)
    finally:
        closed.chmod(0o700)
    refused(done, place / "out", "permission denied", "no file", "found none", "found neither")
    record_property("fault", f"no permission: {what}")


@pytest.mark.parametrize("output", ["a" * 300, "b/" * 2500])
def test_a_path_that_is_too_long(output: str, tmp_path: Path, record_property: Record) -> None:
    """Longer than a name, and than a path, may be."""
    path = recipe(small(tmp_path / "source"), tmp_path / "out", tmp_path)
    result = run("build", path, "--set", f"output.path={tmp_path / output}")
    assert "error: " in result.stderr and result.exit_code in (1, 2), result.output
    record_property("fault", "path too long")


# --------------------------------------------------------------------------------- a source that changes meanwhile


def flip(source: Path) -> None:
    """One byte of the weights; whoever did it puts the time of change back."""
    path = source / "model.safetensors"
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        byte = file.read(1)
        file.seek(-5, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replaced(source: Path) -> None:
    """The shard is replaced by another of the same tensors."""
    other = write_checkpoint(
        source.parent / "other", make_tiny_config("llama", num_hidden_layers=1), seed=1
    )
    os.replace(other / "model.safetensors", source / "model.safetensors")


def tokenizer(source: Path) -> None:
    """A file that is only carried over."""
    with (source / "tokenizer_config.json").open("a") as file:
        file.write("\n")


CHANGES = {"a byte": flip, "a shard": replaced, "a file beside": tokenizer}


@pytest.mark.parametrize("stage", ["source", "blocks"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_source_that_changes(
    name: str, stage: str, tmp_path: Path, record_property: Record
) -> None:
    """While its bytes are hashed, or behind the last block: found before the artifact has its name."""
    source, output = small(tmp_path / "source"), tmp_path / "out"
    text = recipe(source, output, tmp_path).read_text(encoding="utf-8")
    changed: list[bool] = []

    def tell(progress: Progress) -> None:
        if progress.stage.startswith(stage) and progress.done == progress.total and not changed:
            changed.append(True)
            CHANGES[name](source)

    with pytest.raises(CheckpointError, match="expected files that stay as they are"):
        pipeline.build_artifacts(
            parse_recipe(text, "r.yaml"), text, overwrite=False, evaluate=False, on_plan=lambda _: None, on_progress=tell
        )  # fmt: skip
    assert changed and not output.exists()
    record_property("fault", f"source changed, {name}, at {stage}")


def test_a_source_that_was_only_touched(tmp_path: Path) -> None:
    """Another time of change and the same bytes: read again, and good."""
    source, output = small(tmp_path / "source"), tmp_path / "out"
    text = recipe(source, output, tmp_path).read_text(encoding="utf-8")

    def tell(progress: Progress) -> None:
        if progress.stage == "blocks":
            os.utime(source / "model.safetensors")

    pipeline.build_artifacts(
        parse_recipe(text, "r.yaml"),
        text,
        overwrite=False,
        evaluate=False,
        on_plan=lambda _: None,
        on_progress=tell,
    )
    assert verify_artifact(output).tensors > 0


def test_the_message_of_a_faulty_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the operating system where nobody expected one is a sentence too."""

    def broken(*_: object) -> None:
        raise OSError(5, "Input/output error", "/somewhere/file")

    monkeypatch.setattr("quantkit.artifact.read_report.read_report", broken)
    told = read_error(run("report", tmp_path), 1)
    assert told.startswith(
        "/somewhere/file: the operating system refused: input/output error; check"
    )


def test_ctrl_c_while_it_is_being_imported(tmp_path):
    """No traceback of an import that was cut off."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Cut:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'quantkit.cli.main':\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Cut())\n"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "quantkit"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")
