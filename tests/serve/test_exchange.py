"""Files that are exchanged between verification and the engine's reading stop the engine."""

from __future__ import annotations

import os
import shutil
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from quantkit.artifact.layout import LOADTEST
from quantkit.cli.main import main
from quantkit.errors import UsageError
from quantkit.io.private_copy import make_private_copy
from quantkit.serve.engines import engine_process

ENGINE = """#!{python}
import http.server, os, subprocess, sys, threading
words = sys.argv[1:]
folder = words[1]
subprocess.run(os.environ["PLANT"], shell=True, check=True, cwd=folder)
print("engine reads", folder, flush=True)
with open(os.environ["SEEN"], "w") as seen:
    seen.write(folder + "\\n" + open(os.path.join(folder, "config.json")).read())

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        threading.Timer(1.5, os._exit, [0]).start()

    def log_message(self, *_):
        pass

port = int(words[words.index("--port") + 1])
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
"""A vLLM that runs a command first, then loads, answers /health, and ends by itself."""

SENTENCE = (
    "changed or exchanged while the engine loaded it, which was stopped; find out what writes"
)


@pytest.fixture
def run_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return a function that serves an artifact with an engine that runs a command first."""
    program = tmp_path / "bin/vllm"
    program.parent.mkdir()
    program.write_text(ENGINE.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))

    def run(artifact: Path, plant: str, *words: str) -> Any:
        monkeypatch.setenv("PLANT", plant)
        port = str(engine_process.find_free_port())
        arguments = ["serve", str(artifact), "--engine", "vllm", "--gpu", "h100", "--port", port]
        return CliRunner().invoke(main, [*arguments, "--start-seconds", "60", *words])

    return run


PLANTS = {
    "exchanged": "cp config.json x && echo ' ' >> x && mv x config.json",
    "exchanged for the same bytes": "cp -p config.json x && mv x config.json",
    "written in place, with its old mtime": (
        "cp -p model-00001-of-00003.safetensors ../t && printf '\\001' | dd "
        "of=model-00001-of-00003.safetensors bs=1 seek=9000 conv=notrunc && touch -r ../t "
        "model-00001-of-00003.safetensors"
    ),
    "renamed away and back": "mv tokenizer.json x && cp x tokenizer.json && mv x tokenizer.json",
    "a template that is added": "echo '{{ 1 }}' > chat_template.jinja",
    "weights that are added": "cp model-00001-of-00003.safetensors model.safetensors",
    "a folder that is exchanged": (
        "cp -rp . ../new && mv ../artifact ../old && mv ../new ../artifact"
    ),
    "a folder that is renamed and back": "mv ../artifact ../old && mv ../old ../artifact",
}


@pytest.mark.parametrize("gateway", [False, True], ids=["alone", "gateway"])
@pytest.mark.parametrize("plant", PLANTS)
def test_exchange_before_the_engine_reads_stops_it(
    plant: str, gateway: bool, artifact: Path, run_serve: Callable[..., Any], tmp_path: Path
) -> None:
    if gateway and plant not in {"exchanged", "renamed away and back"}:
        pytest.skip("the same check")
    result = run_serve(artifact, PLANTS[plant], *(["--gateway"] if gateway else []))
    assert (tmp_path / "seen").exists()  # the engine ran and read
    assert result.exit_code == 1, result.output
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"error: {artifact}: expected files that stay as they are, found ")
    assert SENTENCE in last and last.endswith(
        "start again, or serve a copy with --private-copy FOLDER"
    )
    assert "serving" not in result.stderr and "Traceback" not in result.output


def test_engine_gets_a_path_without_links(
    artifact: Path, run_serve: Callable[..., Any], tmp_path: Path
) -> None:
    """A link that leads elsewhere while the engine opens files would leave no trace."""
    other = Path(shutil.copytree(artifact, tmp_path / "other"))
    link = tmp_path / "current"
    link.symlink_to(artifact)
    result = run_serve(link, f"ln -sfn {other} {link}")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "seen").read_text().startswith(f"{artifact}\n")


def test_unchanged_artifact_is_served(artifact: Path, run_serve: Callable[..., Any]) -> None:
    """Also while a load test is stored: no engine reads quantkit/."""
    result = run_serve(artifact, f"echo '{{}}' > {LOADTEST} && cat config.json > /dev/null")
    assert result.exit_code == 0, result.output
    assert "verified: " in result.stderr


def test_exchange_is_not_noticed_without_verification(
    artifact: Path, run_serve: Callable[..., Any]
) -> None:
    """The promise belongs to the verification."""
    assert run_serve(artifact, PLANTS["exchanged"], "--no-verify").exit_code == 0


def test_transformers_engine_checks_again_before_it_serves(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantkit.serve.engines import decoding

    class Decoder(decoding.Decoder):
        def __init__(self, folder: Path, **options: Any) -> None:
            super().__init__(folder, **options)
            shutil.copy2(folder / "config.json", folder / "x")
            (folder / "x").replace(folder / "config.json")

    monkeypatch.setattr(decoding, "Decoder", Decoder)
    port = str(engine_process.find_free_port())
    result = CliRunner().invoke(
        main, ["serve", str(artifact), "--engine", "transformers", "--port", port]
    )
    assert result.exit_code == 1
    assert SENTENCE in result.stderr.splitlines()[-1]


# --------------------------------------------------------------------------------- a private copy


def test_private_copy_is_served_and_removed(
    artifact: Path, run_serve: Callable[..., Any], tmp_path: Path
) -> None:
    """A change of the original after the copy was made reaches no engine."""
    copies = tmp_path / "copies"
    copies.mkdir(mode=0o700)
    result = run_serve(artifact, f"rm -r {artifact}", "--private-copy", str(copies))
    assert result.exit_code == 0, result.output
    folder, _, config = (tmp_path / "seen").read_text().partition("\n")
    assert Path(folder).parent.parent == copies and Path(folder).name == artifact.name
    assert '"model_type"' in config
    assert list(copies.iterdir()) == []


def test_copy_of_a_damaged_artifact_is_not_served(
    artifact: Path, run_serve: Callable[..., Any], tmp_path: Path
) -> None:
    (artifact / "tokenizer.json").write_text("{}")
    result = run_serve(artifact, "true", "--private-copy", str(tmp_path))
    assert result.exit_code == 1 and "not what its manifest says" in result.stderr
    assert not list(tmp_path.glob("quantkit-serve-*"))


def test_private_copy_needs_a_verified_artifact(
    artifact: Path, run_serve: Callable[..., Any], tmp_path: Path
) -> None:
    words = ("--private-copy", str(tmp_path), "--no-verify")
    result = run_serve(artifact, "true", *words)
    assert result.exit_code == 2
    assert "--private-copy: expected an artifact that is verified" in result.stderr
    result = run_serve(artifact, "true", "--private-copy", str(tmp_path), "--dry-run")
    assert result.exit_code == 2
    assert "--private-copy: expected an artifact to be started; leave it out" in result.stderr


def test_private_copy_is_of_this_user_alone(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "quantkit").mkdir(parents=True)
    (source / "quantkit/x").write_text("x")
    with make_private_copy(source, tmp_path) as copy:
        assert (copy / "quantkit/x").read_text() == "x"
        assert stat.S_IMODE(copy.parent.stat().st_mode) == 0o700
    assert not copy.parent.exists()


def test_private_copy_refuses_places_and_files_that_are_not_private(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, shared = tmp_path / "source", tmp_path / "shared"
    source.mkdir()
    shared.mkdir()
    shared.chmod(0o777)
    with (
        pytest.raises(UsageError, match="expected a folder that only this user may write"),
        make_private_copy(source, shared),
    ):
        pass
    shared.chmod(0o1777)
    with make_private_copy(source, shared):
        pass
    (source / "link").symlink_to("/etc/hostname")
    with (
        pytest.raises(UsageError, match="expected a file, found a link or a device"),
        make_private_copy(source, tmp_path),
    ):
        pass
    (source / "link").unlink()
    (source / "x").write_text("x")
    monkeypatch.setattr("quantkit.io.private_copy.get_free_bytes", lambda _: 0)
    with (
        pytest.raises(UsageError, match="expected free space for a copy"),
        make_private_copy(source, tmp_path),
    ):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shared", "source"]


# ------------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    ("command", "host", "expected"),
    [
        (["vllm"], "127.0.0.1", "127.0.0.1:8000"),
        (["vllm", "--port", "80", "--port=9000"], "0.0.0.0", "127.0.0.1:9000"),
        (["vllm", "--host", "::"], "0.0.0.0", "[::1]:8000"),
        (["vllm", "--port", "x"], "10.0.0.1", "10.0.0.1:8000"),
        (["vllm", "--port"], "localhost", "localhost:8000"),
    ],
)
def test_health_is_read_where_the_engine_listens(
    command: list[str], host: str, expected: str
) -> None:
    assert engine_process.list_health_urls(command, host, 8000) == (
        f"http://{expected}/health",
        f"https://{expected}/health",
    )
