"""Full, read-only or closed disks, unusual names, and sources that change during a build."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.checkpoints import make_recipe_text, make_tiny_config, write_checkpoint
from support.command_line import read_error, run
from support.mortal import End, Order, Server, server

from quantkit import pipeline
from quantkit.errors import CheckpointError
from quantkit.progress import Progress
from quantkit.recipe.parse import parse_recipe
from quantkit.verify.shallow import verify_artifact

Record = Callable[[str, object], None]
ODD = ("a b  c", "模型 文件夹", "ünïcödé", "quote'\"s", "-dash", "#hash %20 &", "🦆")


def small(folder: Path) -> Path:
    """Write a source of one block."""
    return write_checkpoint(folder, make_tiny_config("llama", num_hidden_layers=1))


def recipe(source: Path, output: Path, place: Path, name: str = "r.yaml") -> Path:
    """Write a recipe that needs no text."""
    text = make_recipe_text(
        json.dumps(str(source), ensure_ascii=False),
        output,
        rules="all-linear",
        quantize="{method: rtn}",
        fidelity="none",
        output=json.dumps({"path": str(output)}, ensure_ascii=False),
    )
    (place / name).write_text(text, encoding="utf-8")
    return place / name


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes write into the working folder."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ODD)
def test_commands_accept_unusual_names(name: str, tmp_path: Path, record_property: Record) -> None:
    """Build, verify, report, compare and list with such names of source, output and recipe."""
    source = small(tmp_path / f"{name} source")
    output = tmp_path / f"{name} out"
    path = recipe(source, output, tmp_path, f"{name}.yaml")
    for command in (
        ("plan", path),
        ("build", path),
        ("verify", output),
        ("report", output),
        ("report", output, "--html", "--output", tmp_path / f"{name}.html"),
        ("diff", output, output),
        ("diff", output, output, "--html", "--output", tmp_path / f"{name} diff.html"),
        ("runs", tmp_path),
    ):
        result = run(*command)
        assert result.exit_code == 0, (command, result.output)
    assert (tmp_path / f"{name}.html").stat().st_size > 1000
    record_property("fault", f"name: {name}")


def check_refused(end: End, output: Path, *words: str) -> None:
    """Check for one message with one of the words, exit code 1, and no artifact."""
    assert end.code == 1, end.stderr
    message = end.stderr.partition("error: ")[2]
    assert message and "Traceback" not in end.stderr, end.stderr
    assert any(word in message for word in words), message
    assert not (output / "config.json").exists()


def runs(*command: str) -> bool:
    """Return whether a command is installed and succeeds."""
    return (
        bool(shutil.which(command[0]))
        and not subprocess.run(command, capture_output=True).returncode
    )


@pytest.fixture(scope="module")
def mounting() -> Iterator[Server]:
    """A server of builds in its own mount namespace; skips where there can be none."""
    if os.geteuid() or not runs("unshare", "-m", "true") or not shutil.which("nsenter"):
        pytest.skip("needs to be root, and mounts of its own")
    with server(("unshare", "-m")) as builds:
        yield builds


def mount(builds: Server, *arguments: str | Path) -> None:
    """Mount in the namespace of a server."""
    enter = ("nsenter", "--target", str(builds.pid), "--mount")
    subprocess.run([*enter, "mount", *map(str, arguments)], check=True)


@pytest.fixture(scope="module")
def unprivileged_server() -> Iterator[Server]:
    """A server of builds that respect permission bits, which root does not."""
    wrapper: tuple[str, ...] = ()
    if not os.geteuid():
        drop = "-dac_override,-dac_read_search"
        wrapper = ("setpriv", f"--bounding-set={drop}", f"--inh-caps={drop}")
        if not runs(*wrapper, "true"):
            pytest.skip("needs setpriv: root reads everything")
    with server(wrapper) as builds:
        yield builds


def order(path: Path, file_bytes: int = 0) -> Order:
    """Return the order of a build."""
    return Order(place=str(path.parent), arguments=("build", str(path)), file_bytes=file_bytes)


def test_full_disk_is_one_message(
    mounting: Server, tmp_path: Path, record_property: Record
) -> None:
    """A file system of 400 kB is too small for one shard: the plan finds out."""
    place = tmp_path / "full"
    place.mkdir()
    path = recipe(small(tmp_path / "source"), place / "out", tmp_path)
    mount(mounting, "-t", "tmpfs", "-o", "size=400k", "tmpfs", place)
    check_refused(mounting.run(order(path)), place / "out", "found 0.0004")
    record_property("fault", "disk full")


def test_file_size_limit_is_one_message(
    unprivileged_server: Server, tmp_path: Path, record_property: Record
) -> None:
    """`ulimit -f`, as batch systems set it."""
    path = recipe(small(tmp_path / "source"), tmp_path / "out", tmp_path)
    end = unprivileged_server.run(order(path, file_bytes=100_000))
    check_refused(end, tmp_path / "out", "file too large")
    record_property("fault", "file size limited")


def test_read_only_output_is_one_message(
    mounting: Server, tmp_path: Path, record_property: Record
) -> None:
    """A mount that takes no writes."""
    place = tmp_path / "fixed"
    place.mkdir()
    path = recipe(small(tmp_path / "source"), place / "out", tmp_path)
    mount(mounting, "--bind", place, place)
    mount(mounting, "-o", "remount,ro,bind", place)
    check_refused(mounting.run(order(path)), place / "out", "read-only file system")
    record_property("fault", "output read-only")


@pytest.mark.parametrize("what", ["output", "weights", "config.json", "source folder"])
def test_missing_permission_is_one_message(
    what: str, unprivileged_server: Server, tmp_path: Path, record_property: Record
) -> None:
    """Files without permission bits, read by a user without capabilities."""
    source, place = small(tmp_path / "source"), tmp_path / "closed"
    place.mkdir()
    path = recipe(source, place / "out", tmp_path)
    closed = {
        "output": place,
        "weights": source / "model.safetensors",
        "config.json": source / "config.json",
        "source folder": source,
    }[what]
    closed.chmod(0o000 if what != "output" else 0o500)
    try:
        end = unprivileged_server.run(order(path))
    finally:
        closed.chmod(0o700)
    check_refused(end, place / "out", "permission denied", "no file", "found none", "found neither")
    record_property("fault", f"no permission: {what}")


@pytest.mark.parametrize("output", ["a" * 300, "b/" * 2500])
def test_too_long_path_is_one_message(output: str, tmp_path: Path, record_property: Record) -> None:
    """Longer than the limits of a name and of a path."""
    path = recipe(small(tmp_path / "source"), tmp_path / "out", tmp_path)
    result = run("build", path, "--set", f"output.path={tmp_path / output}")
    assert "error: " in result.stderr and result.exit_code in (1, 2), result.output
    record_property("fault", "path too long")


# ------------------------------------------------------------------ a source that changes meanwhile


def flip(source: Path) -> None:
    """Change one byte of the weights, and restore the modification time."""
    path = source / "model.safetensors"
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        byte = file.read(1)
        file.seek(-5, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace_shard(source: Path) -> None:
    """Replace the shard by another with the same tensors."""
    other = write_checkpoint(
        source.parent / "other", make_tiny_config("llama", num_hidden_layers=1), seed=1
    )
    os.replace(other / "model.safetensors", source / "model.safetensors")


def tokenizer(source: Path) -> None:
    """Change a file that a build only copies."""
    with (source / "tokenizer_config.json").open("a") as file:
        file.write("\n")


CHANGES = {"a byte": flip, "a shard": replace_shard, "a file next to it": tokenizer}
CHANGED = {
    "source": "expected files that stay as they are while they are hashed, found changed ones",
    "blocks": "expected the files that the build began with, found changed ones",
}


@pytest.mark.parametrize("stage", CHANGED)
@pytest.mark.parametrize("name", CHANGES)
def test_changed_source_is_detected(
    name: str, stage: str, tmp_path: Path, record_property: Record
) -> None:
    """While its bytes are hashed, or after the last block: detected before the final rename."""
    source, output = small(tmp_path / "source"), tmp_path / "out"
    text = recipe(source, output, tmp_path).read_text(encoding="utf-8")
    changed: list[bool] = []

    def report(progress: Progress) -> None:
        if progress.stage.startswith(stage) and progress.done == progress.total and not changed:
            changed.append(True)
            CHANGES[name](source)

    with pytest.raises(CheckpointError, match=CHANGED[stage]):
        pipeline.build_artifacts(
            parse_recipe(text, "r.yaml"),
            text,
            overwrite=False,
            evaluate=False,
            on_plan=lambda _: None,
            on_progress=report,
        )
    assert changed and not output.exists()
    record_property("fault", f"source changed, {name}, at {stage}")


def test_touched_source_with_equal_bytes_is_accepted(tmp_path: Path) -> None:
    """A new modification time with the same bytes: read again, and accepted."""
    source, output = small(tmp_path / "source"), tmp_path / "out"
    text = recipe(source, output, tmp_path).read_text(encoding="utf-8")

    def report(progress: Progress) -> None:
        if progress.stage == "blocks":
            os.utime(source / "model.safetensors")

    pipeline.build_artifacts(
        parse_recipe(text, "r.yaml"),
        text,
        overwrite=False,
        evaluate=False,
        on_plan=lambda _: None,
        on_progress=report,
    )
    assert verify_artifact(output).tensors > 0


def test_unexpected_os_error_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unexpected error of the operating system is one message, too."""

    def raise_error(*_: object) -> None:
        raise OSError(5, "Input/output error", "/somewhere/file")

    monkeypatch.setattr("quantkit.artifact.read_report.read_report", raise_error)
    output = read_error(run("report", tmp_path), 1)
    assert output.startswith(
        "/somewhere/file: the operating system refused: input/output error; check"
    )


def test_ctrl_c_during_import_is_quiet(tmp_path):
    """An interrupted import prints no traceback."""
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
