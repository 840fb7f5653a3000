"""Tokenizers that transformers cannot load: the package or the file that is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantkit.checkpoint import tokenizer_files
from quantkit.checkpoint.tokenizer_files import check_converters, check_tokenizer_files
from quantkit.errors import CheckpointError


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_files, "is_installed", lambda name: False)


@pytest.mark.usefixtures("nothing_installed")
@pytest.mark.parametrize(
    ("file", "message"),
    [
        (
            "tokenizer.model",
            r"sentencepiece, which reads .*; pip install 'quantkit\[sentencepiece\]'",
        ),
        (
            "qwen.tiktoken",
            r"tiktoken, which reads this tokenizer, found none; pip install tiktoken",
        ),
    ],
)
def test_missing_package_is_named(file: str, message: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(b"\x0a")
    with pytest.raises(CheckpointError, match=rf"{file}: expected the package {message}"):
        check_tokenizer_files(tmp_path)


@pytest.mark.usefixtures("nothing_installed")
def test_nothing_is_missing_next_to_tokenizer_json(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a")
    (tmp_path / "tokenizer.json").write_text("{}")
    check_converters(tmp_path)


def test_installed_packages_are_not_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a")
    monkeypatch.setattr(tokenizer_files, "is_installed", lambda name: True)
    check_converters(tmp_path)
