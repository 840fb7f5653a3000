"""A document's text with some of its values changed: comments, order and all else stay as they were written.

ruamel.yaml keeps the layout; what a scalar means is left to `document.scalar`, so that both read the same.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import YAMLError
from ruamel.yaml.resolver import VersionedResolver
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from quantkit.errors import RecipeError
from quantkit.io.yaml_document import (
    MAX_CHARACTERS,
    PARSER_FAULTS,
    KeyPath,
    parse_document,
    parse_scalar,
)


def rewritten(text: str, changes: Sequence[tuple[KeyPath, object]]) -> str:
    """`text`, which `document.read` takes, with values put at paths (keys only) one after the other.

    In a layout that ruamel would change it is the values alone; without changes it is `text` to the byte.
    """
    if not changes:
        return text
    wanted = parse_document(text, "")
    for path, value in changes:
        wanted = wanted.with_value(path, value)
    try:
        layout = writer().load(text)
        for path, value in changes:
            put(layout, path, spelled(value))
        found = dumped(layout)
        if parse_document(found, "").values == wanted.values:
            return found
    except (RecipeError, YAMLError, *PARSER_FAULTS):
        pass  # a date that no calendar has, say: text to `document`, an error to ruamel
    return dumped(spelled(wanted.values))


def put(layout: CommentedMap, path: KeyPath, value: object) -> None:
    """Change a value, or add its key: first in its section, last in the document."""
    for key in path[:-1]:
        if not isinstance(layout.get(key), CommentedMap):
            layout[key] = CommentedMap()
        layout = layout[key]
    if path[-1] in layout or len(path) == 1:
        layout[path[-1]] = value
    else:
        layout.insert(0, path[-1], value)


def spelled(value: object) -> object:
    """A value in texts that `scalar` reads as the same, quoted where plain text would be something else."""
    if isinstance(value, dict):
        return CommentedMap((key, spelled(inner)) for key, inner in value.items())
    if isinstance(value, list):
        return [spelled(inner) for inner in value]
    if isinstance(value, str):
        plain = (
            parse_scalar(value) == value and value.isprintable()
        )  # YAML folds line breaks that Unicode knows, too
        return value if plain else DoubleQuotedScalarString(value)
    return "null" if value is None else str(value).lower()


class PlainText(VersionedResolver):
    """Every scalar without quotes is text to ruamel."""

    @property
    def versioned_resolver(self) -> dict[str, object]:
        """No text that stands for a number, a date or anything else."""
        return {}


def writer() -> YAML:
    """ruamel as it keeps quotes, long lines and the indentation of lists."""
    yaml = YAML()
    yaml.Resolver = PlainText
    yaml.preserve_quotes = True
    yaml.width = MAX_CHARACTERS
    yaml.indent(mapping=2, sequence=4, offset=2)
    return yaml


def dumped(layout: object) -> str:
    """The text of a layout."""
    stream = io.StringIO()
    writer().dump(layout, stream)
    return stream.getvalue()
