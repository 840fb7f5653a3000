"""What the bytes and the config of a format must be, told without torch: each format's CHECKS, `quantkit verify` asks.

Codes packed without a gap need no check, as every pattern of bits is a code in range. What can be wrong is said here:
scales, zero points of symmetric schemes, groups of channels, shapes and states, and lists that name modules.
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
    """Packed codes as a config tells them: two linears that differ in none of these share an entry."""

    bits: int
    group_size: int
    symmetric: bool

    def __str__(self) -> str:
        zero = "symmetric" if self.symmetric else "asymmetric"
        return f"{self.bits} bits, group {self.group_size}, {zero}"


Treatment = IntegerCodes | Literal["codes", "fp8", "plain"]
"""How an engine reads a linear: packed codes, whatever they are or just these; FP8 blocks; or an ordinary weight."""

Kind = Literal["finite", "scale", "magnitude", "rising", "repeated", "groups", "whole"]


@dataclass(frozen=True, kw_only=True)
class ValueCheck:
    """What the numbers of one stored tensor must be.

    finite: no NaN, no infinity; scale: also normal and above zero; magnitude: finite and not below zero; rising: each
    above the one before; repeated: `pattern` over and over; groups: element k is k // `group`; whole: `fault` is asked
    about all bytes of a small tensor and answers None or what was expected and found.
    """

    kind: Kind
    pattern: bytes = b""
    group: int = 0
    fault: Callable[[bytes], str | None] | None = None


FINITE = ValueCheck(kind="finite")
SCALE = ValueCheck(kind="scale")
MAGNITUDE = ValueCheck(kind="magnitude")
RISING = ValueCheck(kind="rising")


def exactly(expected: bytes, meaning: str) -> ValueCheck:
    """A small tensor of these bytes."""
    return ValueCheck(
        kind="whole",
        fault=lambda found: (
            None if found == expected else f"expected {meaning}, found other values"
        ),
    )


@dataclass(frozen=True, kw_only=True)
class Loader:
    """An engine's own reading of quantization_config: what it takes a module for.

    `told(entry)` reads the entry once and answers for module names; with `fused` it is also asked about the names of
    modules that engines merge.
    """

    engines: str
    told: Callable[[Mapping[str, object]], Callable[[str], Treatment]]
    fused: bool = True


@dataclass(frozen=True, kw_only=True)
class FormatChecks:
    """What `quantkit verify` must know of a format beside its layout.

    shape: [out, in] of a linear by the specs of its tensors (local names) and a reader of small ones, None when they do
    not tell; numbers: what its tensors must hold, by local name, all others any bits; loaders: who reads the lists of
    modules in quantization_config; lists: the keys of those lists, whose spelling is free.
    """

    shape: Callable[
        [Mapping[str, TensorSpec], Scheme, Callable[[str], bytes]], tuple[int, int] | None
    ]
    numbers: Callable[[Linear, Scheme], Mapping[str, ValueCheck]]
    loaders: Sequence[Loader] = ()
    lists: frozenset[str] = frozenset()


# ------------------------------------------------------------------------------------------------ lists of modules


_PLAIN = re.compile(
    r"(?:[\w.\-]|\\[.\-]|\((?:[\w.]+\|)+[\w.]+\)|exp\[e\]rts)*(?:\(\\\.\.\*\)\?)?\$?"
)
"""Names with escapes, one choice of several, "and what is below": no repetition within a repetition."""


def pattern(text: str, key: str) -> str:
    """A regular expression of an entry; ArtifactError for one that could take forever, which quantkit never writes."""
    if not _PLAIN.fullmatch(text):
        raise ArtifactError(
            f"config.json: quantization_config.{key}: expected plain module names, found {text[:60]!r}"
        )
    return text


def group_by_codes(schemes: Mapping[str, Scheme]) -> list[tuple[IntegerCodes, list[str]]]:
    """The modules of each kind of codes, the commonest first: a config tells that one of all it does not name."""
    found: dict[IntegerCodes, list[str]] = {}
    for name, scheme in schemes.items():
        kind = IntegerCodes(
            bits=scheme.bits, group_size=scheme.group_size, symmetric=scheme.symmetric
        )
        found.setdefault(kind, []).append(name)
    return sorted(found.items(), key=lambda item: (-len(item[1]), item[0]))


def codes_told(bits: object, group_size: object, symmetric: object, key: str) -> IntegerCodes:
    """Codes by three values of the entry; ArtifactError when they are none."""
    if type(bits) is not int or type(group_size) is not int or type(symmetric) is not bool:
        told = f"{bits!r:.20}, {group_size!r:.20}, {symmetric!r:.20}"
        raise ArtifactError(
            f"config.json: quantization_config.{key}: expected bits, a group size and symmetric or not, found {told}"
        )
    return IntegerCodes(bits=bits, group_size=group_size, symmetric=symmetric)


@cache
def matcher(patterns: tuple[str, ...]) -> re.Pattern[str]:
    """One expression for any of several; nothing matches an empty list."""
    return re.compile("|".join(f"(?:{each})" for each in patterns) if patterns else r"(?!)")


def texts(value: object, key: str) -> list[str]:
    """A list of strings of the entry; ArtifactError for anything else, an empty list for none."""
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise ArtifactError(
            f"config.json: quantization_config.{key}: expected a list of names, found {value!r:.60}"
        )
    return value


def left_out(key: str) -> Callable[[Mapping[str, object]], Callable[[str], Treatment]]:
    """transformers' reading of a list of modules: an entry is an expression up to a dot, or the end of a name."""

    def told(entry: Mapping[str, object]) -> Callable[[str], Treatment]:
        names = tuple(texts(entry.get(key), key))
        start = matcher(tuple(rf"(?:{pattern(name, key)})(?:(?<=\.)|(?=\.|$))" for name in names))
        return lambda module: "plain" if start.match(module) or module.endswith(names) else "codes"

    return told


def switched_off(entry: Mapping[str, object]) -> Callable[[str], Treatment]:
    """GPTQModel's `dynamic`, which vLLM and SGLang read too: "-:pattern" leaves what it matches alone."""
    found = dynamic(entry)
    if other := [key for key, value in found.items() if not key.startswith("-:") or value != {}]:
        raise ArtifactError(
            f"config.json: quantization_config.dynamic: expected '-:pattern' with {{}} alone, found {other[0]!r:.60}"
        )
    kept = matcher(tuple(pattern(key.removeprefix("-:"), "dynamic") for key in found))
    return lambda module: "plain" if kept.match(module) else "codes"


def dynamic(entry: Mapping[str, object]) -> Mapping[str, object]:
    """GPTQModel's rules over modules by their patterns; none when there are none."""
    found = entry.get("dynamic")
    if found is not None and not isinstance(found, Mapping):
        raise ArtifactError(
            f"config.json: quantization_config.dynamic: expected an object, found {found!r:.60}"
        )
    return {str(key): value for key, value in (found or {}).items()}
