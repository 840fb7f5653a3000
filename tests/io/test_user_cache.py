"""The user's cache: texts are reused, made again if damaged, not cached if that is impossible."""

from __future__ import annotations

import subprocess
import sys

import pytest

from quantkit.io import user_cache


@pytest.fixture
def calls():
    return []


@pytest.fixture
def make(calls):
    def text() -> str:
        calls.append(1)
        return "drawn: ä\n\n</script"

    return text


def test_text_is_made_once(tmp_path, calls, make):
    path = tmp_path / "charts" / "vega.js"
    assert (
        user_cache.load_or_make_text(path, make)
        == user_cache.load_or_make_text(path, make)
        == "drawn: ä\n\n</script"
    )
    assert calls == [1]
    assert [file.name for file in path.parent.iterdir()] == ["vega.js"]


@pytest.mark.parametrize("damage", [b"", b"drawn", b"\xff\xfe", b"0" * 64 + b"\nalert(1)"])
def test_damaged_text_is_made_again(tmp_path, calls, make, damage):
    path = tmp_path / "vega.js"
    path.write_bytes(damage)
    assert user_cache.load_or_make_text(path, make) == "drawn: ä\n\n</script"
    assert user_cache.load_or_make_text(path, make) == "drawn: ä\n\n</script"
    assert calls == [1]


def test_one_changed_byte_is_detected(tmp_path, calls, make):
    path = tmp_path / "vega.js"
    user_cache.load_or_make_text(path, make)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert user_cache.load_or_make_text(path, make) == "drawn: ä\n\n</script"
    assert calls == [1, 1]


def test_unwritable_folder_costs_time_only(tmp_path, calls, make):
    (tmp_path / "file").write_text("in the way")
    path = tmp_path / "file" / "vega.js"
    assert (
        user_cache.load_or_make_text(path, make)
        == user_cache.load_or_make_text(path, make)
        == "drawn: ä\n\n</script"
    )
    assert calls == [1, 1]


def test_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "own"))
    assert user_cache.locate_folder("charts") == tmp_path / "own" / "charts"
    monkeypatch.delenv("QUANTKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache.locate_folder("charts") == tmp_path / "quantkit" / "charts"


def test_second_process_uses_the_cached_bundle(tmp_path, monkeypatch):
    """vl-convert takes a second and 100 MB; the second process reuses its output."""
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path))
    code = (
        "import hashlib, sys; from quantkit.report import html_page as html; text = "
        "html.load_vega_bundle();print(hashlib.sha256(text.encode()).hexdigest(), 'vl_convert' in "
        "sys.modules)"
    )
    outputs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    first, second = (output.stdout.split() for output in outputs)
    assert first[0] == second[0]
    assert (first[1], second[1]) == ("True", "False")
