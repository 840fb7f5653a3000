"""`quantkit key`: calls at the same time, modes, links."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from quantkit.cli.commands.key import command
from quantkit.serve.gateway.api_keys import authenticate, parse_keys

PROCESSES = 20


def run_key(name: str, file: Path) -> str:
    """Create a key in this process and return it."""
    result = CliRunner().invoke(command, [name, "--keys", str(file)])
    assert result.exit_code == 0, result.output
    return result.output.strip()


def read_mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_keys_created_at_the_same_time_are_all_in_the_file(tmp_path: Path) -> None:
    """All processes are started before the first one is waited for."""
    file = tmp_path / "keys.json"
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "quantkit", "key", f"team-{n}", "--keys", str(file)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in range(PROCESSES)
    ]
    outputs = [process.communicate(timeout=300) for process in started]
    assert [(process.returncode, error) for process, (_, error) in zip(started, outputs)] == (
        [(0, "")] * PROCESSES
    )
    keys = parse_keys(json.loads(file.read_text()), "keys.json")
    known = [authenticate(keys, f"Bearer {text.strip()}") for text, _ in outputs]
    assert [key and key.name for key in known] == [f"team-{n}" for n in range(PROCESSES)]
    assert [path.name for path in tmp_path.iterdir()] == ["keys.json"]


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
def test_key_file_is_private_under_every_umask(umask: int, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    before = os.umask(umask)
    try:
        run_key("a", file)
        assert read_mode(file) == 0o600
        file.chmod(0o666)
        run_key("b", file)  # rewritten
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert read_mode(file) == 0o600
    assert len(json.loads(file.read_text())["keys"]) == 2


def test_no_file_is_ever_readable_by_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new file is private before its first byte, and when it gets its name."""
    modes: list[int] = []
    replace = os.replace

    def record_mode(source: Path, target: Path) -> None:
        modes.extend(read_mode(path) for path in tmp_path.iterdir())
        replace(source, target)

    monkeypatch.setattr(os, "replace", record_mode)
    before = os.umask(0)
    try:
        run_key("a", tmp_path / "keys.json")
    finally:
        os.umask(before)
    assert modes and set(modes) == {0o600}


def test_linked_key_file_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "keys.json"
    link.symlink_to(tmp_path / "real" / "keys.json")
    run_key("a", link)
    assert link.is_symlink() and read_mode(tmp_path / "real" / "keys.json") == 0o600


def test_second_key_of_a_name_is_refused_and_the_file_kept(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    run_key("a", file)
    content = file.read_bytes()
    result = CliRunner().invoke(command, ["a", "--keys", str(file)])
    assert result.exit_code == 2 and "a: expected once, found twice" in result.output
    assert file.read_bytes() == content and len([*tmp_path.iterdir()]) == 1
