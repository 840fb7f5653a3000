"""The manifest and plan.json of a build. They hold no time and no path of this machine."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from platform import python_version

import torch

from quantkit.artifact.fidelity_schema import Fidelity
from quantkit.artifact.model_files import list_text_prefixes, make_config
from quantkit.artifact.records import BlockRecord, ModuleRecord, list_kept_codes
from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.formats.common.wrapper_names import list_roots
from quantkit.plan import sources
from quantkit.plan.plan import Plan
from quantkit.plan.summary import format_action, summarize_plan

ENVIRONMENT = ("MKL_CBWR", "CUBLAS_WORKSPACE_CONFIG")


def make_manifest(
    plan: Plan, source: Checkpoint, report: Fidelity, blocks: Sequence[BlockRecord]
) -> dict[str, object]:
    """Return the manifest without the hashes of the files, which `seal_artifact` adds."""
    return {
        "status": report.status,
        "format": plan.format_name,
        "plan": plan.hash,
        "recipe": plan.recipe.hash,
        "source": {
            "model": plan.source.model,
            "revision": plan.source.revision,
            "fingerprint": plan.source.fingerprint,
            "files": source.compute_hashes(),
        },
        "quantization_config": make_config(plan).get("quantization_config"),
        "tensors": {
            t.name: [t.dtype, list(t.shape)] for shard in plan.shards for t in shard.tensors
        },
        "modules": {
            record.module: make_module_entry(record)
            for records in (*(block.modules for block in blocks), list_kept_codes(plan))
            for record in records
        },
        "blocks": {block.name: make_block_entry(block) for block in blocks},
        **({"parts": list_part_roots(plan)} if plan.layout.parts else {}),
        "versions": read_versions(plan),
        "environment": read_environment(plan),
        "seeds": report.seeds,
    }


def list_part_roots(plan: Plan) -> list[str]:
    """Return the modules that hold a wrapper's copied parts and nothing else of the model."""
    copied = [name for part in plan.layout.parts for name in part.tensors]
    text = plan.specs.keys() - {*copied}
    return list(list_roots(copied, text, list_text_prefixes(plan)))


def make_module_entry(record: ModuleRecord) -> dict[str, object]:
    """Return a quantized linear's entry: rule, method, scheme, errors, tokens and fallbacks."""
    return {key: value for key, value in asdict(record).items() if key != "module"}


def make_block_entry(block: BlockRecord) -> dict[str, object]:
    """Return the entry of a block: scale choices and checks."""
    return {
        "fold_change": block.fold_change,
        "output_error": block.output_error,
        "router_agreement": block.router_agreement,
        "expert_tokens": block.expert_tokens,
        "scales": [asdict(choice) for choice in block.choices],
    }


def read_environment(plan: Plan) -> dict[str, str]:
    """Return the settings that can change a bit: device, dtype, CPU, and libraries' variables."""
    compute = sources.resolve_compute(plan.recipe)
    environment: dict[str, str] = {
        "device": compute.device,
        "dtype": compute.dtype,
        "calibration_dtype": compute.calibration,
    }
    environment["cpu"] = torch.backends.cpu.get_cpu_capability()
    if compute.device == "cuda":
        environment["gpu"] = torch.cuda.get_device_name()
    return environment | {name: os.environ.get(name, "unset") for name in ENVIRONMENT}


def format_plan(plan: Plan) -> str:
    """Return the text of plan.json: the resolved recipe, and its decision for every linear.

    The name of the recipe's file, the output path, memory and time are left out, because they do
    not decide the artifact, and the keys that repeat the recipe.
    """
    left_out = {"memory", "output", "recipe", "sampled", "time"}
    left_out |= {"streams", "tasks", "gates", "engines"}
    summary = summarize_plan(plan).model_dump(mode="json", exclude=left_out)
    decisions = {name: [format_action(d), d.rule] for name, d in plan.decisions.items()}
    values = {
        "hash": plan.hash,
        "recipe": {
            **plan.recipe.dump(),
            "propagate": plan.propagation,
            "memory": None,
            "output": {"shard_bytes": plan.recipe.output.shard_bytes},
        },
        "summary": summary,
        "decisions": decisions,
        "dropped": [item.name for item in plan.left_out],
    }
    return json.dumps(values, indent=1, ensure_ascii=False) + "\n"


PACKAGES = ("quantkit", "torch", "transformers", "safetensors", "tokenizers", "lm_eval")


def read_versions(plan: Plan) -> dict[str, str]:
    """Return the versions of Python and of the packages that computed the artifact."""
    return {
        "python": python_version(),
        **{name: read_version(name) for name in (*PACKAGES, *plan.format.packages)},
    }


@cache  # parses the package's metadata; a build needs each version three times
def read_version(package: str) -> str:
    """Return the version of an installed package."""
    return version(package)
