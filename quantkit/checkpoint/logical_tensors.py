"""Logical tensors of a checkpoint: those that the model computes with, from stored tensors.

Names, dtypes and shapes only, no torch.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

from quantkit.checkpoint import encodings
from quantkit.checkpoint.encoding import (
    FP8,
    EncodedWeight,
    Encoding,
    EncodingFault,
    SourceQuantization,
    StoredCodes,
)
from quantkit.checkpoint.stacked import ExpertPart
from quantkit.contracts import Config, TensorSpec
from quantkit.errors import CheckpointError
from quantkit.io.files import join_faults, shorten_repr

CODE_DTYPES = frozenset({FP8, "F8_E5M2", "I32", "I16", "I8", "U8"})
"""Dtypes that codes may have."""

_UNUSED = (
    *("input_scale", "input_scale_inv", "activation_scale", "input_scale_ub", "input_global_scale"),
    *("input_zero_point", "output_scale", "output_zero_point", "output_global_scale"),
    *("k_scale", "v_scale", "q_scale", "k_zero_point", "v_zero_point", "kv_scale", "prob_scale"),
    *("prob_output_scale", "qkv_output_scale", "weight_format"),
)
"""Last components of tensors for activations and the KV cache: no weight depends on them."""
_CODE_ENDINGS = (".weight", ".qweight", ".q_weight", ".W_q", ".codes", "_packed", "_blocks")
_SCALE_ENDINGS = ("_scale_inv", ".weight_scale")


@dataclass(frozen=True, kw_only=True)
class LogicalTensors:
    """The tensors that a model computes with, and how some of them are stored.

    encoded: those that are stored in codes; experts: those that are parts of a stored tensor with
    all experts; unused: stored tensors that no weight depends on; notes: one sentence for each
    statement of config.json that the weights contradict.
    """

    specs: Mapping[str, TensorSpec]
    encoded: Mapping[str, EncodedWeight] = field(default_factory=dict)
    experts: Mapping[str, ExpertPart] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def describe(self) -> tuple[str, ...]:
        """Return one sentence each: unused tensors, and statements that the weights contradict."""
        if not self.unused:
            return self.notes
        count, first = len(self.unused), self.unused[0]
        return (
            f"{count} tensors for activations and the KV cache are left out, e.g. "
            f"{shorten_repr(first)}: the source is compared with unrounded activations",
            *self.notes,
        )


def find_logical_tensors(
    config: Config,
    stored: Mapping[str, TensorSpec],
    where: str,
    *,
    decode: bool = True,
    read_bytes: Callable[[str], bytes] | None = None,
) -> LogicalTensors:
    """Return the logical tensors of stored ones.

    decode: claim the codes of every encoding; otherwise only those that an artifact holds next to
    those of its format. read_bytes: reads a small tensor, where files are at hand. Raises one
    CheckpointError with all faults; codes with the same fault are one sentence.
    """
    quantization = SourceQuantization(config=config)
    claimed, faults = claim_codes(stored, quantization, decode, read_bytes)
    parts = {part.name for weight in claimed.values() for part in weight.parts.values()}
    unused = find_unused(stored, parts, claimed, quantization) if decode else ()
    hidden = parts | {name for name, _ in faults} | set(unused)
    rest = [spec for name, spec in stored.items() if name not in hidden]
    for spec in rest:
        if reason := find_leftover_fault(spec, stored, quantization, decode):
            faults.append((spec.name, reason))
    logical = {weight.spec.name for weight in claimed.values()}
    for spec in rest:
        if spec.name in logical:
            reason = "expected the weight once, found it plain and in codes; remove one of them"
            faults.append((spec.name, reason))
    if faults:
        raise CheckpointError(join_faults(format_faults(faults, where)))
    specs = list_specs(stored, claimed, hidden)
    notes = find_notes(quantization, stored, claimed) if decode else ()
    return LogicalTensors(
        specs=specs,
        encoded={weight.spec.name: weight for weight in claimed.values()},
        unused=tuple(unused),
        notes=notes,
    )


@cache
def load_encodings() -> Mapping[str, Encoding]:
    """Return every encoding by name: the files of checkpoint/encodings/."""
    names = sorted(module.name for module in pkgutil.iter_modules(encodings.__path__))
    modules = {name: importlib.import_module(f"{encodings.__name__}.{name}") for name in names}
    return {name: module.ENCODING for name, module in modules.items()}


def claim_codes(
    stored: Mapping[str, TensorSpec],
    quantization: SourceQuantization,
    decode: bool,
    read_bytes: Callable[[str], bytes] | None,
) -> tuple[dict[str, EncodedWeight], list[tuple[str, str]]]:
    """Return the weights of all codes by the codes' name, and (name, reason) of malformed ones."""
    known = load_encodings().values()
    tried = [claim for x in known if (claim := x.claim if decode else x.claim_kept)]
    claimed, faults = dict[str, EncodedWeight](), list[tuple[str, str]]()
    for name, spec in stored.items():
        if spec.dtype not in CODE_DTYPES:
            continue
        codes = StoredCodes(
            spec=spec, stored=stored, quantization=quantization, read_bytes=read_bytes
        )
        try:
            for claim in tried:
                if weight := claim(codes):
                    claimed[name] = weight
                    break
        except EncodingFault as fault:
            faults.append((name, str(fault)))
    return keep_one_block_size(claimed), faults


def keep_one_block_size(claimed: Mapping[str, EncodedWeight]) -> dict[str, EncodedWeight]:
    """Return the weights with at most one size of FP8 blocks that an artifact may keep."""
    first = next((weight.block for weight in claimed.values() if weight.block), None)
    return {
        name: weight
        if weight.block in (None, first)
        else replace(weight, block=None, spec=replace(weight.spec, dtype="BF16"))
        for name, weight in claimed.items()
    }


def find_copied_codes(specs: Mapping[str, TensorSpec]) -> frozenset[str]:
    """Return the tensors of an artifact that hold codes of its source, but for FP8."""
    rest = {name: spec for name, spec in specs.items() if not spec.dtype.startswith("F8")}
    empty = SourceQuantization(config=Config(values={}))
    claimed, _ = claim_codes(rest, empty, decode=False, read_bytes=None)
    return frozenset(x.name for weight in claimed.values() for x in weight.parts.values())


def find_unused(
    stored: Mapping[str, TensorSpec],
    parts: set[str],
    claimed: Mapping[str, EncodedWeight],
    quantization: SourceQuantization,
) -> dict[str, None]:
    """Return the tensors of a quantized checkpoint that no weight depends on, in order."""
    if not claimed and not quantization.method:
        return {}
    return dict.fromkeys(
        name
        for name in stored
        if name not in parts and name.rpartition(".")[2].removesuffix("_inv") in _UNUSED
    )


def find_leftover_fault(
    spec: TensorSpec,
    stored: Mapping[str, TensorSpec],
    quantization: SourceQuantization,
    decode: bool,
) -> str | None:
    """Return why a tensor that no encoding claims is a fault; None for an ordinary tensor."""
    for ending in _SCALE_ENDINGS:
        base = spec.name.removesuffix(ending)
        if base == spec.name:
            continue
        weight = base if ending == "_scale_inv" else f"{base}.weight"
        if weight in stored and stored[weight].dtype in (FP8, "I8"):
            continue  # the weight has the fault
        if weight in stored:
            return (
                f"expected {shorten_repr(weight)} of this scale as {FP8}, found "
                f"{stored[weight].dtype}; fetch the checkpoint again"
            )
        if ending == "_scale_inv":
            return (
                f"expected the weight {shorten_repr(weight)} of this scale, found none in any "
                "file; fetch the checkpoint again"
            )
    if decode and spec.dtype in CODE_DTYPES and spec.name.endswith(_CODE_ENDINGS):
        titles = ", ".join(encoding.title for encoding in load_encodings().values())
        method = quantization.method or "none"
        return (
            f"expected floating point numbers or an encoding that quantkit reads ({titles}), found "
            f"{spec.dtype} {list(spec.shape)} and quantization_config.quant_method {method}; start "
            "from the original weights"
        )
    return None


def format_faults(faults: Sequence[tuple[str, str]], where: str) -> list[str]:
    """Return one sentence per kind of fault, with its first tensor and the number of others.

    faults: (tensor, reason). Reasons are of one kind if they differ in the module's name only.
    """
    kinds = dict[str, list[tuple[str, str]]]()
    for name, reason in faults:
        module = name.rpartition(".")[0]
        kind = reason.replace(f"{module}.", "*.") if module else reason
        kinds.setdefault(kind, []).append((name, reason))
    return [
        f"{where}: tensor {shorten_repr(members[0][0])}"
        + (f" and {len(members) - 1} more" if len(members) > 1 else "")
        + f": {members[0][1]}"
        for members in kinds.values()
    ]


def list_specs(
    stored: Mapping[str, TensorSpec], claimed: Mapping[str, EncodedWeight], hidden: Iterable[str]
) -> dict[str, TensorSpec]:
    """Return the logical specs in the order of the stored tensors."""
    skipped = frozenset(hidden) - set(claimed)
    specs = (
        claimed[name].spec if name in claimed else spec
        for name, spec in stored.items()
        if name not in skipped
    )
    return {spec.name: spec for spec in specs}


def find_notes(
    quantization: SourceQuantization,
    stored: Mapping[str, TensorSpec],
    claimed: Mapping[str, EncodedWeight],
) -> tuple[str, ...]:
    """Return a sentence if config.json states a quantization, but every weight is plain."""
    if not quantization.method or claimed:
        return ()
    dtypes = ", ".join(sorted({spec.dtype for spec in stored.values()}))
    return (
        f"config.json: quantization_config states {quantization.method}, but no weight is stored "
        f"in codes (all are {dtypes}): the entry is stale and ignored, the weights are used as "
        "they are",
    )


def describe_encodings(encoded: Mapping[str, EncodedWeight]) -> Iterator[tuple[str, int]]:
    """Yield each label and the number of weights that are stored so, the most frequent first."""
    counts = dict[str, int]()
    for weight in encoded.values():
        counts[weight.label] = counts.get(weight.label, 0) + 1
    yield from sorted(counts.items(), key=lambda item: (-item[1], item[0]))
