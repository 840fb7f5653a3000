"""Changes values in a YAML text and keeps comments, order and layout.

ruamel.yaml keeps the layout. yaml_document.parse_scalar alone decides the meaning of a scalar, so
that both read the same values.
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


def rewrite_yaml(text: str, changes: Sequence[tuple[KeyPath, object]]) -> str:
    """Return `text` with the values at some paths (keys only) changed, one after the other.

    Without changes it is `text` to the byte. A layout that ruamel cannot keep is replaced by the
    values alone.
    """
    if not changes:
        return text
    expected = parse_document(text, "")
    for path, value in changes:
        expected = expected.with_value(path, value)
    try:
        layout = make_yaml_writer().load(text)
        for path, value in changes:
            set_value(layout, path, to_yaml_value(value))
        rewritten = dump_yaml(layout)
        if parse_document(rewritten, "").values == expected.values:
            return rewritten
    except (RecipeError, YAMLError, *PARSER_FAULTS):
        pass  # e.g. an invalid date: text in yaml_document, an error in ruamel
    return dump_yaml(to_yaml_value(expected.values))


def set_value(layout: CommentedMap, path: KeyPath, value: object) -> None:
    """Change a value, or add its key as the first of its section or the last of the document."""
    for key in path[:-1]:
        if not isinstance(layout.get(key), CommentedMap):
            layout[key] = CommentedMap()
        layout = layout[key]
    if path[-1] in layout or len(path) == 1:
        layout[path[-1]] = value
    else:
        layout.insert(0, path[-1], value)


def to_yaml_value(value: object) -> object:
    """Return a value whose scalars are text that parse_scalar reads as the same."""
    if isinstance(value, dict):
        return CommentedMap((key, to_yaml_value(inner)) for key, inner in value.items())
    if isinstance(value, list):
        return [to_yaml_value(inner) for inner in value]
    if isinstance(value, str):
        # YAML also folds Unicode line breaks, so text with unprintable characters is quoted
        is_plain = parse_scalar(value) == value and value.isprintable()
        return value if is_plain else DoubleQuotedScalarString(value)
    return "null" if value is None else str(value).lower()


class PlainTextResolver(VersionedResolver):
    """Resolver that reads every plain scalar as text."""

    @property
    def versioned_resolver(self) -> dict[str, object]:
        """No implicit types such as numbers or dates."""
        return {}


def make_yaml_writer() -> YAML:
    """Return a ruamel.yaml writer that keeps quotes, long lines and the indentation of lists."""
    yaml = YAML()
    yaml.Resolver = PlainTextResolver
    yaml.preserve_quotes = True
    yaml.width = MAX_CHARACTERS
    yaml.indent(mapping=2, sequence=4, offset=2)
    return yaml


def dump_yaml(layout: object) -> str:
    """Return the YAML text of a layout."""
    stream = io.StringIO()
    make_yaml_writer().dump(layout, stream)
    return stream.getvalue()
