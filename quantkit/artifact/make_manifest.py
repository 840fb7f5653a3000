"""The durable description of an artifact: manifest and resolved plan. No time, no path of this machine is in them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from platform import python_version

import torch

from quantkit.artifact.fidelity_schema import Fidelity
from quantkit.artifact.model_files import make_config
from quantkit.artifact.records import BlockRecord, ModuleRecord
from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.plan import sources
from quantkit.plan.plan import Plan
from quantkit.plan.summary import format_action, summarize_plan

ENVIRONMENT = ("MKL_CBWR", "CUBLAS_WORKSPACE_CONFIG")


def make_manifest(
    plan: Plan, source: Checkpoint, report: Fidelity, blocks: Sequence[BlockRecord]
) -> dict[str, object]:
    """What `verify` checks and a reviewer traces: `seal` adds the hashes of the files."""
    return {
        "status": report.status,
        "format": plan.format_name,
        "plan": plan.hash,
        "recipe": plan.recipe.hash,
        "source": {
            "model": plan.source.model,
            "revision": plan.source.revision,
            "fingerprint": plan.source.fingerprint,
            "files": source.hashes(),
        },
        "quantization_config": make_config(plan).get("quantization_config"),
        "tensors": {
            t.name: [t.dtype, list(t.shape)] for shard in plan.shards for t in shard.tensors
        },
        "modules": {
            record.module: make_module_entry(record) for block in blocks for record in block.modules
        },
        "blocks": {block.name: make_block_entry(block) for block in blocks},
        "versions": read_versions(plan),
        "environment": read_environment(plan),
        "seeds": report.seeds,
    }


def make_module_entry(record: ModuleRecord) -> dict[str, object]:
    """A quantized linear: rule, method, scheme, errors, tokens and fallbacks."""
    return {key: value for key, value in asdict(record).items() if key != "module"}


def make_block_entry(block: BlockRecord) -> dict[str, object]:
    """What was chosen and checked for a block as a whole."""
    return {
        "fold_change": block.fold_change,
        "output_error": block.output_error,
        "router_agreement": block.router_agreement,
        "expert_tokens": block.expert_tokens,
        "scales": [asdict(choice) for choice in block.choices],
    }


def read_environment(plan: Plan) -> dict[str, str]:
    """What could change a bit: device, dtype, and how the linear algebra libraries were told to sum."""
    compute = sources.resolve_compute(plan.recipe)
    found: dict[str, str] = {
        "device": compute.device,
        "dtype": compute.dtype,
        "calibration_dtype": compute.calibration,
    }
    found["cpu"] = torch.backends.cpu.get_cpu_capability()
    if compute.device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found | {name: os.environ.get(name, "unset") for name in ENVIRONMENT}


def format_plan(plan: Plan) -> str:
    """Return the text of plan.json: the recipe as resolved, and what it decided over every linear."""
    summary = summarize_plan(plan).model_dump(mode="json", exclude={"memory", "output"})
    decisions = {name: [format_action(d), d.rule] for name, d in plan.decisions.items()}
    values = {
        "hash": plan.hash,
        "recipe": {
            **plan.recipe.dump(),
            "memory": None,
            "output": {"shard_bytes": plan.recipe.output.shard_bytes},
        },
        "summary": summary,
        "decisions": decisions,
        "dropped": list(plan.dropped),
    }
    return json.dumps(values, indent=1, ensure_ascii=False) + "\n"


PACKAGES = ("quantkit", "torch", "transformers", "safetensors", "tokenizers", "lm_eval")


def read_versions(plan: Plan) -> dict[str, str]:
    """What computed the artifact."""
    return {
        "python": python_version(),
        **{name: version(name) for name in (*PACKAGES, *plan.format.packages)},
    }
