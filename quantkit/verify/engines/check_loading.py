"""Which engines load an artifact: names and shapes of its files as each engine maps them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from quantkit.checkpoint.checkpoint import read_config
from quantkit.checkpoint.scan import read_small_tensor
from quantkit.checkpoint.shards import open_shards
from quantkit.contracts import Config, TensorSpec
from quantkit.errors import CheckpointError
from quantkit.verify.classify_tensors import TensorContents, classify_tensors
from quantkit.verify.engines import sglang, vllm
from quantkit.verify.engines.compare import EngineCheck, check_with_map
from quantkit.verify.engines.model_map import EngineMaps

MAPS: Mapping[str, EngineMaps] = {maps.engine: maps for maps in (vllm.MAPS, sglang.MAPS)}
TRANSFORMERS = "transformers"


def check_engines(
    folder: Path,
    format_name: object,
    modules: Mapping[str, object],
    parts: Sequence[str],
    serving: Collection[str],
) -> tuple[EngineCheck, ...]:
    """Check an artifact's names and shapes as transformers, vLLM and SGLang map them.

    format_name, modules: the manifest's format, and its entries of quantized modules; parts: names
    of copied parts; serving: engines that the artifact has a command for; the others are not
    checked. Raises CheckpointError for a folder without readable headers.
    """
    config = read_config(folder)
    shards = open_shards(folder)
    specs = shards.specs

    def read_small(name: str) -> bytes:
        path, header = shards.locate(name)
        return read_small_tensor(path, header, name)

    contents = classify_tensors(format_name, modules, specs, read_small, parts)
    return tuple(
        check_engine(engine, config, specs, contents, serving) for engine in (TRANSFORMERS, *MAPS)
    )


def check_engine(
    engine: str,
    config: Config,
    specs: Mapping[str, TensorSpec],
    contents: TensorContents,
    serving: Collection[str],
) -> EngineCheck:
    """Check one engine: transformers by its own loader, the others by their published maps."""
    if engine not in serving:
        reason = "the artifact has no command for it"
        return EngineCheck(engine=engine, how="not checked", reason=reason)
    if contents.faults:
        version = MAPS[engine].version if engine in MAPS else ""
        return EngineCheck(engine=engine, version=version, how="names", faults=contents.faults)
    try:
        if engine == TRANSFORMERS:
            from quantkit.verify.engines import transformers_load  # torch and transformers: seconds

            packed = transformers_load.is_loaded_packed(config)
            tensors = specs if packed else contents.logical
            return transformers_load.check_with_transformers(config, tensors)
        return check_with_map(MAPS[engine], config, contents.logical, list_forms(contents))
    except CheckpointError as fault:
        return EngineCheck(engine=engine, how="not checked", reason=str(fault))


def list_forms(contents: TensorContents) -> dict[str, object]:
    """Return module -> how its weight is stored, in words that tell two forms apart."""
    plain = dict.fromkeys(contents.kept, "plain weights")
    blocks = dict.fromkeys(contents.fp8, "FP8 blocks")
    codes = {
        module: f"{scheme.kind} codes of {scheme.bits} bits, group size {scheme.group_size}"
        for module, scheme in contents.schemes.items()
    }
    return {**plain, **blocks, **codes}
