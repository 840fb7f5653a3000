"""Errors on a terminal are wrapped between words and colored; elsewhere they keep their lines."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

import click
import pytest
from support.paths import ROOT

from quantkit.cli.console import color_label, echo, wrap_lines

MESSAGE = "error: " + "a/very/long/path/of/a/folder/" * 3 + "x: exists already; choose another one"


def test_words_stay_whole_and_lines_are_indented() -> None:
    lines = wrap_lines(f"{MESSAGE}\n  a second line of the message", 40).split("\n")
    assert " ".join(line.strip() for line in lines[:-1]).split() == MESSAGE.split()
    assert lines[1].startswith("  a/very/long") and lines[-1] == "  a second line of the message"
    assert all(len(line) <= 40 for line in lines if "/" not in line)


def test_color_follows_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert color_label("error: x") == click.style("error:", fg="red", bold=True) + " x"
    assert color_label("interrupted") == "interrupted"
    monkeypatch.setenv("NO_COLOR", "1")
    assert color_label("error: x") == "error: x"


def run_on_terminal(columns: int, *arguments: str) -> str:
    """Return what a command prints to a terminal of so many columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    process = subprocess.Popen(
        [sys.executable, "-m", "quantkit", *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=ROOT,
        env={**environment, "TERM": "xterm-256color"},
    )
    os.close(theirs)
    content = b""
    try:
        while part := os.read(ours, 65_536):
            content += part
    except OSError:  # the terminal's other side is closed
        pass
    os.close(ours)
    assert process.wait(timeout=60) == 2
    return content.decode()


def test_error_fits_the_terminal() -> None:
    shown = run_on_terminal(60, "plan", "no-such-recipe")
    assert shown.startswith("\x1b[31m\x1b[1merror:\x1b[0m no-such-recipe: ")
    lines = shown.replace("\r", "").splitlines()
    assert len(lines) > 3 and all(len(click.unstyle(line)) <= 60 for line in lines)


def test_text_on_a_terminal_is_wrapped_and_elsewhere_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "artifact: accepted: " + "words that follow " * 5 + "\x1b[2J"
    echo(text)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith("\\x1b[2J")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    echo(text)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 2 and max(map(len, lines)) <= 40
    assert " ".join(part.strip() for part in lines) == line


def test_error_elsewhere_is_one_plain_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "quantkit", "plan", "no-such-recipe"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "60"},
    )
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: no-such-recipe: ") and len(line) > 200
