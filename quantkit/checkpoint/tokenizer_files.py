"""Diagnosis of a tokenizer that transformers cannot load: its own error may name no file."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from quantkit.checkpoint.file_names import CONFIG
from quantkit.contracts import Config
from quantkit.errors import CheckpointError
from quantkit.io.files import is_file, read_json

_FILES = (
    CONFIG,
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


CONVERTERS = (
    ("*.model", ("sentencepiece", "google.protobuf"), "pip install 'quantkit[sentencepiece]'"),
    ("*.tiktoken", ("tiktoken",), "pip install tiktoken"),
)
"""Files from which transformers makes a tokenizer.json, packages that this needs, the command."""


def check_converters(folder: Path) -> None:
    """Check that packages are installed that read a tokenizer stored in another form.

    Raises CheckpointError; nothing is needed next to a tokenizer.json.
    """
    if is_file(folder / "tokenizer.json"):
        return
    for pattern, packages, command in CONVERTERS:
        file = next((path for path in sorted(folder.glob(pattern)) if is_file(path)), None)
        missing = [name for name in packages if file is not None and not is_installed(name)]
        if missing:
            raise CheckpointError(
                f"{file}: expected the package {missing[0].rpartition('.')[2]}, which reads this "
                f"tokenizer, found none; {command}, or copy tokenizer.json of the model there"
            )


def is_installed(name: str) -> bool:
    """Return whether a package can be imported."""
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


def check_tokenizer_files(folder: Path) -> None:
    """Check the packages and the tokenizer's files after transformers failed to load it.

    Raises CheckpointError for the first file that is no JSON object, and for a config.json that
    transformers refuses.
    """
    from transformers import CONFIG_MAPPING

    from quantkit.checkpoint.hf_config import make_hf_config

    check_converters(folder)
    contents = {
        name: read_json(folder / name, infinite=name == CONFIG)
        for name in _FILES
        if is_file(folder / name)
    }
    values = {key: value for key, value in contents.get(CONFIG, {}).items() if key != "auto_map"}
    model_type = values.get("model_type")
    if not values or (isinstance(model_type, str) and model_type not in CONFIG_MAPPING):
        return  # a family that exists as code only, or none
    make_hf_config(Config(values=values, where=str(folder / CONFIG)))
