"""Names of modules in a wrapper, such as a vision-language model, as engines know them.

The text model of one checkpoint lies at `language_model.model`, `model.language_model` or `model`,
in transformers under another of these names, and in vLLM and SGLang under `language_model.model`.
Entries of quantization_config therefore name modules of the text model from its layers on, after
any prefix. Each other part ("visual", "vision_tower", "multi_modal_projector", "mtp") keeps its
name in transformers, vLLM and SGLang, after one prefix or another, and is named by it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from quantkit.contracts import Contents
from quantkit.errors import UsageError
from quantkit.formats.common.engine_names import LM_HEAD, list_parents, make_patterns

ANY_PREFIX = r"(.*\.)?"
"""In front of an expression: it matches a name, or the end of a name after a dot."""
ENGINE_PREFIX = "language_model.model"
"""Where vLLM and SGLang have the text model of a wrapper."""


def is_wrapper(contents: Contents) -> bool:
    """Return whether an artifact holds parts that text does not run through."""
    return bool(contents.parts)


def get_prefix(contents: Contents) -> str:
    """Return what precedes expressions of module names: nothing in a language model."""
    return ANY_PREFIX if is_wrapper(contents) else ""


def make_relative(contents: Contents) -> Contents:
    """Return the contents of a wrapper with names of the text model from its layers on.

    A module has one name, or the checkpoint's and transformers'.
    """
    if not is_wrapper(contents):
        return contents
    return replace(
        contents,
        schemes={
            name: scheme
            for module, scheme in contents.schemes.items()
            for name in list_relative_names(module, contents)
        },
        kept=list(
            dict.fromkeys(y for x in contents.kept for y in list_relative_names(x, contents))
        ),
        fp8=[y for x in list_text_fp8(contents) for y in list_relative_names(x, contents)],
    )


def list_text_fp8(contents: Contents) -> list[str]:
    """Return the modules of the text model in FP8 blocks."""
    copied = {name for modules in contents.parts.values() for name in modules}
    return [name for name in contents.fp8 if name not in copied]


def list_relative_names(module: str, contents: Contents) -> list[str]:
    """Return the names of a module of the text model from its layers on."""
    names = (module, contents.aliases.get(module, module))
    return list(dict.fromkeys(strip_prefix(name, contents) for name in names))


def strip_prefix(name: str, contents: Contents) -> str:
    """Return a module's name from the layers on; a head is "lm_head" wherever it lies."""
    if name.rpartition(".")[2] == LM_HEAD:
        return LM_HEAD
    prefixes = (x for x in contents.text_prefixes if x and name.startswith(f"{x}."))
    prefix = next(prefixes, "")
    return name.removeprefix(f"{prefix}.") if prefix else name


def list_part_names(contents: Contents) -> list[str]:
    """Return the names of a wrapper's parts, none of which is in the name of a quantized module.

    Each is the last component of a highest module that holds nothing of the text model, or its
    whole path where that component is a number or is in such a name. Raises UsageError for a part
    that lies in a quantized module.
    """
    text = [*contents.schemes, *contents.kept]
    relative = {y for name in contents.schemes for y in list_relative_names(name, contents)}
    quantized = {*contents.schemes, *(y for x in relative for y in list_full_names(x, contents))}
    paths = [f".{name}." for name in quantized]
    names: dict[str, None] = {}
    for part, modules in contents.parts.items():
        for root in (*list_roots(modules, text, contents.text_prefixes), part):
            last = root.rpartition(".")[2]
            candidates = ([] if last.isdigit() else [last], [strip_prefix(root, contents)])
            free = (
                x for group in candidates for x in group if not any(f".{x}." in y for y in paths)
            )
            name = next(free, None)
            if name is None:
                raise UsageError(
                    f"{root} is copied, but engines would take its name for a quantized module's; "
                    "keep that module"
                )
            names[name] = None
    return list(names)


def list_roots(
    modules: Iterable[str], text: Iterable[str], prefixes: Sequence[str]
) -> dict[str, None]:
    """Return the highest modules around these that hold nothing of the text model, in order.

    text: modules of the text model; prefixes: where it lies in the checkpoint and elsewhere.
    """
    outside = [*text, *(f"{prefix}." for prefix in (*prefixes, ENGINE_PREFIX) if prefix)]
    busy = {parent for name in outside for parent in list_parents(name)}
    return dict.fromkeys(
        next((x for x in (*list_parents(name), name) if x not in busy), name) for name in modules
    )


def list_part_patterns(contents: Contents) -> list[str]:
    """Return expressions that match the modules of a wrapper's parts, and none of its text; without
    those in FP8 blocks.
    """
    blocks, plain = split_part_modules(contents)
    mixed = {name for name in list_part_names(contents) if any(is_in(x, name) for x in blocks)}
    whole = [x for x in list_part_names(contents) if x not in mixed]
    rest = [x for x in plain if any(is_in(x, name) for name in mixed)]
    return [
        *(f"{ANY_PREFIX}{re.escape(name)}(\\..*)?$" for name in whole),
        *(f"{ANY_PREFIX}{pattern}" for pattern in make_patterns(blocks, rest)),
    ]


def list_fp8_part_patterns(contents: Contents) -> list[str]:
    """Return expressions that match the modules of parts in FP8 blocks, and no others."""
    blocks, plain = split_part_modules(contents)
    text = [*contents.schemes, *contents.kept]
    return [f"{ANY_PREFIX}{pattern}" for pattern in make_patterns([*plain, *text], blocks)]


def split_part_modules(contents: Contents) -> tuple[list[str], list[str]]:
    """Return the modules of a wrapper's parts, from the name of their part on: those in FP8 blocks,
    and the others.
    """
    names, fp8 = list_part_names(contents), {*contents.fp8}
    blocks, plain = list[str](), list[str]()
    for module in (module for modules in contents.parts.values() for module in modules):
        name = next((x for x in names if is_in(module, x)), module)
        start = f".{module}.".index(f".{name}.")
        (blocks if module in fp8 else plain).append(module[start:])
    return blocks, plain


def is_in(module: str, name: str) -> bool:
    """Return whether the path of a module contains the components of `name` in a row."""
    return f".{name}." in f".{module}."


def add_prefixes(entries: Iterable[str], contents: Contents) -> list[str]:
    """Return entries that engines search in a name, and that transformers matches from its start.

    Those of a wrapper's parts are added. Entries of a language model stay as they are.
    """
    if not is_wrapper(contents):
        return list(entries)
    names = [*entries, *list_part_names(contents)]
    return list(dict.fromkeys([*names, *(f"{ANY_PREFIX}{name}" for name in names)]))


def list_full_names(name: str, contents: Contents) -> Sequence[str]:
    """Return the full names of a module of the text model, given from its layers on."""
    prefixes = dict.fromkeys((*contents.text_prefixes, ENGINE_PREFIX))
    return [f"{prefix}.{name}" if prefix else name for prefix in prefixes]
