"""transformers' own loader on the names and shapes of an artifact, without its values.

transformers makes the model on the meta device, with the modules of its quantizer, and loads a
state of meta tensors: key renaming, conversions of experts, tied weights and the comparison of
shapes are its own code. No weight is read and no memory is used for one.
"""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
import transformers

from quantkit.checkpoint.hf_config import get_auto_class, hide_warnings, make_hf_config
from quantkit.checkpoint.tensors import TORCH_DTYPES
from quantkit.contracts import Config, TensorSpec
from quantkit.verify.engines.compare import EngineCheck, is_skipped

ENGINE = "transformers"
READS_PACKED = frozenset({"compressed-tensors"})
"""Values of quant_method whose quantizer loads meta tensors. The others read values, or need a
package with kernels: their weights are decoded and given to unquantized linears."""
COLORS = re.compile(r"\x1b\[[0-9;]*m")


def is_loaded_packed(config: Config) -> bool:
    """Return whether the check gives transformers the tensors as they are stored."""
    entry = config.values.get("quantization_config")
    return isinstance(entry, Mapping) and entry.get("quant_method") in READS_PACKED


def check_with_transformers(config: Config, tensors: Mapping[str, TensorSpec]) -> EngineCheck:
    """Load names and shapes with transformers.

    tensors: as stored if `is_loaded_packed`, else with weights in place of their codes. Raises
    CheckpointError for a config.json that transformers does not accept.
    """
    hf_config = make_hf_config(config)
    if is_loaded_packed(config):
        hf_config.quantization_config = dict(config.values["quantization_config"])  # type: ignore[call-overload]
    state = {
        name: torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtype], device="meta")
        for name, spec in tensors.items()
    }
    try:
        info, faults = load_state(hf_config, state)
    except (ImportError, ValueError, RuntimeError, TypeError, AttributeError, KeyError) as fault:
        # transformers raises whatever a name or shape that it does not expect causes
        info, faults = {}, [" ".join(COLORS.sub("", str(fault)).split())[:300]]
    faults += list(find_faults(info, tensors))
    unread = {str(name) for name in info.get("unexpected_keys", ())}
    skipped = sum(is_skipped(name, config) for name in unread)
    faults += [
        f"tensor {name}: the model has no parameter for it"
        for name in sorted(unread)
        if not is_skipped(name, config)
    ]
    return EngineCheck(
        engine=ENGINE,
        version=transformers.__version__,
        how="run",
        tensors=len(tensors) - len(unread),
        skipped=skipped,
        faults=tuple(faults),
    )


def load_state(
    hf_config: Any, state: Mapping[str, torch.Tensor]
) -> tuple[Mapping[str, Any], list[str]]:
    """Return transformers' record of a load, and its reports of conversions that failed."""
    factory = get_auto_class(hf_config)
    model_class = factory._model_mapping[type(hf_config)]
    if isinstance(model_class, tuple):
        model_class = model_class[0]
    with hide_warnings(), redirect_stderr(io.StringIO()), collect_conversions() as faults:
        try:
            _, info = model_class.from_pretrained(
                None,
                config=hf_config,
                state_dict=dict(state),
                device_map={"": "meta"},
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        except RuntimeError:
            if not faults:
                raise
            info = {}
    return info, faults


@contextmanager
def collect_conversions() -> Iterator[list[str]]:
    """Collect what transformers logs about conversions that failed: it raises without the names."""
    lines: list[str] = []

    def collect(record: logging.LogRecord) -> bool:
        shown = COLORS.sub("", record.getMessage()).splitlines()
        lines.extend(" ".join(line.split()) for line in shown if "CONVERSION" in line)
        return False

    logger = logging.getLogger("transformers.modeling_utils")
    level = logger.level
    logger.addFilter(collect)
    logger.setLevel(logging.WARNING)
    try:
        yield lines
    finally:
        logger.removeFilter(collect)
        logger.setLevel(level)


def find_faults(info: Mapping[str, Any], tensors: Mapping[str, TensorSpec]) -> Iterator[str]:
    """Yield parameters without a tensor, and tensors of another shape."""
    for name in sorted(info.get("missing_keys", ())):
        yield f"{name}: expected a tensor for it, found none, so that it is random"
    for name, found, expected in sorted(info.get("mismatched_keys", ())):
        word = f"tensor {name}" if name in tensors else name
        yield f"{word}: expected {list(expected)}, found {list(found)}"
