"""Names of stored tensors as transformers expects them, and ties that a file states.

Training tools leave prefixes in front of names, a model saved without its head has none of the
prefix `model.`, and of a tied pair only one may be stored. Names and headers only: values are not
read. Every change is described in a note, which the plan prints.
"""

from __future__ import annotations

import importlib
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

from quantkit.checkpoint.header import Header
from quantkit.contracts import Config
from quantkit.errors import CheckpointError
from quantkit.io.files import shorten_repr

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Modules that torch.compile, FSDP and activation checkpointing put into a name."""
DATA_PARALLEL = "module."
HEADS = ("lm_head.", "embed_out.", "score.", "classifier.", "qa_outputs.", "v_head.")
"""Prefixes of tensors next to the base model, which never have its prefix."""

_BLOCK = re.compile(r"(decoder\.)?(layers|h|blocks?)\.\d+\.", re.ASCII)
"""Start of a block's tensor in a checkpoint without the base model's prefix."""
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings|embeddings?)\.weight$")


@dataclass(frozen=True, kw_only=True)
class NamedHeaders:
    """Headers under the names that transformers expects, and a note per kind of change."""

    headers: Mapping[str, Header]
    files: Mapping[str, str]  # tensor -> file, in index order
    notes: tuple[str, ...] = ()


def name_tensors(
    headers: Mapping[str, Header], files: Mapping[str, str], config: Config
) -> NamedHeaders:
    """Return the headers with canonical names and stated ties.

    Raises CheckpointError if two stored names become one.
    """
    renames, notes = find_renames(config, list(files))
    named, owner = headers, files
    if renames:
        named = {file: rename_header(header, renames) for file, header in headers.items()}
        owner = {renames.get(name, name): file for name, file in files.items()}
    aliases = find_aliases(config, headers, renames, owner)
    for head, embedding in list_tied_pairs(config) if aliases else ():
        if aliases.get(embedding) == head:  # config.json ties them: the model has one of them
            del aliases[embedding]
            own = {head: embedding}
            named = {file: rename_header(header, own) for file, header in named.items()}
            owner = {own.get(name, name): file for name, file in owner.items()}
            notes = (*notes, f"{embedding} is stored as {head}, to which config.json ties it")
        elif aliases.get(head) == embedding:
            del aliases[head]
    if aliases:
        named = {file: add_aliases(header, aliases) for file, header in named.items()}
        owner = {**owner, **{alias: owner[name] for alias, name in aliases.items()}}
        notes = (*notes, *(f"{x} is not stored: it is tied to {y}" for x, y in aliases.items()))
    return NamedHeaders(headers=named, files=owner, notes=notes)


def find_renames(config: Config, names: Collection[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return stored name -> expected name for names that differ, and a note per kind."""
    current, notes = {name: name for name in names}, list[str]()

    def apply(changed: Mapping[str, str], note: str) -> None:
        count = sum(current[name] != new for name, new in changed.items())
        if count:
            notes.append(f"{count} tensors renamed: {note}")
            current.update(changed)

    apply(
        {name: strip_wrappers(new) for name, new in current.items()},
        f"a wrapper of training tools removed from their names ({', '.join(WRAPPERS)})",
    )
    if current and all(new.startswith(DATA_PARALLEL) for new in current.values()):
        apply(
            {name: new.removeprefix(DATA_PARALLEL) for name, new in current.items()},
            f"the prefix {DATA_PARALLEL} of data parallel training removed",
        )
    if prefix := find_missing_prefix(config, current.values()):
        apply(
            {
                name: new if new.startswith(HEADS) else f"{prefix}.{new}"
                for name, new in current.items()
            },
            f"the prefix {prefix}. added, which transformers expects",
        )
    check_distinct(config, current)
    return {name: new for name, new in current.items() if name != new}, tuple(notes)


def strip_wrappers(name: str) -> str:
    """Return a name without the modules that training tools put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def find_missing_prefix(config: Config, names: Collection[str]) -> str | None:
    """Return the base model's prefix if the blocks are stored without it; None otherwise."""
    if not any(_BLOCK.match(name) for name in names):
        return None
    model_class = find_model_class(config)
    prefix = str(getattr(model_class, "base_model_prefix", "") or "")
    return None if not prefix or any(name.startswith(f"{prefix}.") for name in names) else prefix


def find_model_class(config: Config) -> type | None:
    """Return transformers' causal language model of a model type; None if it has none."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_type = config.values.get("model_type")
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(model_type))
    if not isinstance(name, str):
        return None
    module = importlib.import_module("transformers")
    model_class = getattr(module, name, None)
    return model_class if isinstance(model_class, type) else None


def check_distinct(config: Config, renames: Mapping[str, str]) -> None:
    """Raise CheckpointError if two stored tensors get one name."""
    twice = [name for name, count in Counter(renames.values()).items() if count > 1]
    if twice:
        stored = sorted(name for name, new in renames.items() if new == twice[0])
        raise CheckpointError(
            f"{config.where}: tensor {shorten_repr(twice[0])}: expected one stored tensor, found "
            f"{' and '.join(map(shorten_repr, stored[:2]))}; remove one of them"
        )


def find_aliases(
    config: Config,
    headers: Mapping[str, Header],
    renames: Mapping[str, str],
    names: Collection[str],
) -> dict[str, str]:
    """Return absent tensor -> the stored tensor that it is tied to.

    Ties are stated by a file's metadata (safetensors' `save_model` writes removed -> kept name), or
    by transformers for a tied head that is stored in place of the embedding.
    """
    aliases = {}
    for header in headers.values():
        for removed, kept in header.metadata.items():
            alias, name = canonical_name(removed, renames), canonical_name(kept, renames)
            if name in names and alias not in names:
                aliases[alias] = name
    present = {*names, *aliases}
    if not any(_EMBEDDING.search(name) for name in present):
        aliases |= {
            embedding: head
            for head, embedding in list_tied_pairs(config)
            if head in present and embedding not in present
        }
    return aliases


def canonical_name(name: str, renames: Mapping[str, str]) -> str:
    """Return the expected name of a tensor that a file's metadata names."""
    return renames.get(name, strip_wrappers(name))


def list_tied_pairs(config: Config) -> Iterator[tuple[str, str]]:
    """Yield (head, embedding) of a model type whose config ties them; names of transformers."""
    from transformers import CONFIG_MAPPING

    model_class, model_type = find_model_class(config), config.values.get("model_type")
    keys = getattr(model_class, "_tied_weights_keys", None)
    if not isinstance(keys, Mapping):
        return
    default = getattr(CONFIG_MAPPING[str(model_type)], "tie_word_embeddings", False)
    if config.values.get("tie_word_embeddings", default) is True:
        yield from keys.items()


def rename_header(header: Header, renames: Mapping[str, str]) -> Header:
    """Return a header with other names of its tensors; offsets are unchanged."""
    return replace(
        header,
        specs={
            renames.get(name, name): replace(spec, name=renames.get(name, name))
            for name, spec in header.specs.items()
        },
        offsets={renames.get(name, name): span for name, span in header.offsets.items()},
    )


def add_aliases(header: Header, aliases: Mapping[str, str]) -> Header:
    """Return a header in which tied tensors share the bytes of the stored one."""
    mine = {alias: name for alias, name in aliases.items() if name in header.specs}
    if not mine:
        return header
    return replace(
        header,
        specs={
            **header.specs,
            **{alias: replace(header.specs[name], name=alias) for alias, name in mine.items()},
        },
        offsets={
            **header.offsets,
            **{alias: header.offsets[name] for alias, name in mine.items()},
        },
    )
