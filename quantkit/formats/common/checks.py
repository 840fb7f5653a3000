"""Checks of a format's bytes and config entry that need no torch; `quantkit verify` runs them.

Codes packed without gaps need no check: every bit pattern is a valid code. Each format's CHECKS
covers the rest: scales, zero points of symmetric schemes, group indices, shapes, quantization
states, and the lists of modules in quantization_config.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from quantkit.contracts import Linear, Scheme, TensorSpec
from quantkit.errors import ArtifactError


@dataclass(frozen=True, kw_only=True, order=True, slots=True)
class IntegerCodes:
    """The part of a scheme that a config entry states; linears with equal values share an entry.

    kind: that of the scheme, which is not "int" for codes of a source.
    """

    bits: int
    group_size: int
    symmetric: bool
    kind: str = "int"

    def __str__(self) -> str:
        zero = "symmetric" if self.symmetric else "asymmetric"
        if self.kind != "int":
            return f"{self.kind}, group {self.group_size}"
        return f"{self.bits} bits, group {self.group_size}, {zero}"


Treatment = IntegerCodes | Literal["codes", "fp8", "plain"]
"""How an engine reads a linear: as packed codes (of any kind, or of this one), as FP8 blocks, or as
an ordinary weight."""

ValueKind = Literal["finite", "scale", "magnitude", "rising", "repeated", "groups", "whole"]


@dataclass(frozen=True, kw_only=True)
class ValueCheck:
    """The condition on the values of one stored tensor.

    finite: no NaN and no infinity; scale: also normal and above zero; magnitude: finite and at
    least zero; rising: strictly increasing; repeated: `pattern` over and over; groups: element k is
    k // `group`; whole: `find_fault` gets all bytes of a small tensor and returns None, or a
    sentence with the expected and the found value.
    """

    kind: ValueKind
    pattern: bytes = b""
    group: int = 0
    find_fault: Callable[[bytes], str | None] | None = None


FINITE = ValueCheck(kind="finite")
SCALE = ValueCheck(kind="scale")
MAGNITUDE = ValueCheck(kind="magnitude")
RISING = ValueCheck(kind="rising")


def require_bytes(expected: bytes, meaning: str) -> ValueCheck:
    """Return the check that a small tensor has exactly these bytes."""
    return ValueCheck(
        kind="whole",
        find_fault=lambda content: (
            None if content == expected else f"expected {meaning}, found other values"
        ),
    )


@dataclass(frozen=True, kw_only=True)
class Loader:
    """An engine's interpretation of quantization_config.

    classify(entry) parses the entry once and returns a function from module names to treatments.
    With `has_fused_names` that function also gets the names of the modules that engines merge.
    """

    engines: str
    classify: Callable[[Mapping[str, object]], Callable[[str], Treatment]]
    has_fused_names: bool = True


@dataclass(frozen=True, kw_only=True)
class FormatChecks:
    """What `quantkit verify` needs to know about a format besides its layout.

    read_shape: [out, in] of a linear from the specs of its tensors (local names) and a reader of
    small tensors, or None if they do not determine it; value_checks: the checks of a linear's
    tensors by local name, all other tensors may hold any bits; loaders: the engines that read the
    lists of modules in quantization_config; module_lists: the keys of those lists, which are
    compared by meaning and not by spelling.
    """

    read_shape: Callable[
        [Mapping[str, TensorSpec], Scheme, Callable[[str], bytes]], tuple[int, int] | None
    ]
    value_checks: Callable[[Linear, Scheme], Mapping[str, ValueCheck]]
    loaders: Sequence[Loader] = ()
    module_lists: frozenset[str] = frozenset()


# --- lists of modules


_PLAIN = re.compile(
    r"(?:\(\.\*\\\.\)\?)?(?:[\w.\-]|\\[.\-]|\((?:[\w.]+\|)+[\w.]+\)|exp\[e\]rts)*(?:\(\\\.\.\*\)\?)?\$?"
)
"""Names with escapes, alternatives in one group, "any prefix" and "everything below": no nested
repetition."""


def check_pattern(text: str, key: str) -> str:
    """Return a regular expression of the entry.

    Raises ArtifactError for one that could take exponential time; quantkit never writes such.
    """
    if not _PLAIN.fullmatch(text):
        raise ArtifactError(
            f"config.json: quantization_config.{key}: expected plain module names, "
            f"found {text[:60]!r}"
        )
    return text


def group_by_codes(schemes: Mapping[str, Scheme]) -> list[tuple[IntegerCodes, list[str]]]:
    """Group modules by their codes, the most frequent first: configs use it as their default.

    Codes of a source come last.
    """
    groups: dict[IntegerCodes, list[str]] = {}
    for name, scheme in schemes.items():
        kind = IntegerCodes(
            bits=scheme.bits,
            group_size=scheme.group_size,
            symmetric=scheme.symmetric,
            kind="int" if scheme.kind == "nf4" else scheme.kind,
        )
        groups.setdefault(kind, []).append(name)
    return sorted(groups.items(), key=lambda item: (item[0].kind != "int", -len(item[1]), item[0]))


def parse_codes(bits: object, group_size: object, symmetric: object, key: str) -> IntegerCodes:
    """Return the codes of three values of the entry; ArtifactError if their types are wrong."""
    if type(bits) is not int or type(group_size) is not int or type(symmetric) is not bool:
        values = f"{bits!r:.20}, {group_size!r:.20}, {symmetric!r:.20}"
        raise ArtifactError(
            f"config.json: quantization_config.{key}: expected bits, a group size and symmetric "
            f"or not, found {values}"
        )
    return IntegerCodes(bits=bits, group_size=group_size, symmetric=symmetric)


@cache
def compile_any(patterns: tuple[str, ...]) -> re.Pattern[str]:
    """Compile one expression for any of several; nothing matches an empty tuple."""
    return re.compile("|".join(f"(?:{pattern})" for pattern in patterns) if patterns else r"(?!)")


def parse_name_list(value: object, key: str) -> list[str]:
    """Return a list of strings of the entry, empty for None; ArtifactError for anything else."""
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ArtifactError(
            f"config.json: quantization_config.{key}: expected a list of names, found {value!r:.60}"
        )
    return value


def classify_as_transformers(
    key: str,
) -> Callable[[Mapping[str, object]], Callable[[str], Treatment]]:
    """Return transformers' reading of the skip list under `key`.

    An entry is an expression that matches up to a dot or the end, or the end of a name.
    """

    def classify(entry: Mapping[str, object]) -> Callable[[str], Treatment]:
        names = tuple(parse_name_list(entry.get(key), key))
        start = compile_any(
            tuple(rf"(?:{check_pattern(name, key)})(?:(?<=\.)|(?=\.|$))" for name in names)
        )
        return lambda module: "plain" if start.match(module) or module.endswith(names) else "codes"

    return classify


def classify_by_dynamic(entry: Mapping[str, object]) -> Callable[[str], Treatment]:
    """Return the reading of GPTQModel's `dynamic`: "-:pattern" leaves its matches unquantized.

    vLLM and SGLang read it too.
    """
    rules = parse_dynamic(entry)
    if other := [key for key, value in rules.items() if not key.startswith("-:") or value != {}]:
        raise ArtifactError(
            "config.json: quantization_config.dynamic: expected '-:pattern' with {} only, "
            f"found {other[0]!r:.60}"
        )
    kept = compile_any(tuple(check_pattern(key.removeprefix("-:"), "dynamic") for key in rules))
    return lambda module: "plain" if kept.match(module) else "codes"


def parse_dynamic(entry: Mapping[str, object]) -> Mapping[str, object]:
    """Return GPTQModel's rules by their pattern, empty if the entry has none."""
    rules = entry.get("dynamic")
    if rules is not None and not isinstance(rules, Mapping):
        raise ArtifactError(
            f"config.json: quantization_config.dynamic: expected an object, found {rules!r:.60}"
        )
    return {str(key): value for key, value in (rules or {}).items()}
