"""Facts of the source that the artifact's card carries over: its front matter, chat template."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from quantkit.artifact.layout import MODEL_CARD
from quantkit.errors import ArtifactError
from quantkit.io import safe_yaml
from quantkit.io.files import is_file, read_json

CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"
_LIMIT_BYTES = 1_000_000
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*")


def read_front_matter(folder: Path) -> Mapping[str, str]:
    """Return the values of the source's card that are text."""
    return {key: x for key, x in read_card_values(folder).items() if isinstance(x, str)}


def read_languages(folder: Path) -> tuple[str, ...]:
    """Return the languages that the source's card states, as the hub's codes; () for none."""
    value = read_card_values(folder).get("language")
    listed = value if isinstance(value, list) else [value]
    return tuple(x for x in listed if isinstance(x, str) and _LANGUAGE.fullmatch(x))


def has_chat_template(folder: Path) -> bool:
    """Return whether a checkpoint has a chat template, in a file or in tokenizer_config.json.

    Raises ArtifactError for an unreadable tokenizer_config.json.
    """
    if is_file(folder / CHAT_TEMPLATE):
        return True
    path = folder / TOKENIZER_CONFIG
    return is_file(path) and bool(read_json(path, ArtifactError).get("chat_template"))


def read_card_values(folder: Path) -> Mapping[str, object]:
    """Return the values between the `---` lines of README.md, in the folder or its parent.

    The parent holds the card of a built-in model. The card is not part of the checkpoint: a missing
    or unreadable one gives no values and no error.
    """
    for path in (folder / MODEL_CARD, folder.parent / MODEL_CARD):
        if path.is_file() and not path.is_symlink() and path.stat().st_size <= _LIMIT_BYTES:
            break
    else:
        return {}
    parts = path.read_text(encoding="utf-8", errors="replace").split("---", 2)
    if len(parts) != 3 or parts[0].strip():
        return {}
    try:
        values = safe_yaml.load_any(parts[1])
    except safe_yaml.UnreadableYaml:
        return {}
    return {str(k): v for k, v in values.items()} if isinstance(values, Mapping) else {}
