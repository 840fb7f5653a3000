"""Build small artifacts and compare the bytes of their files with the recorded ones.

    python tests/golden/artifacts.py            # compares with the record of this machine kind
    python tests/golden/artifacts.py --record   # writes that record only

tests/golden/artifacts.json holds the records, one per machine kind. A refactoring must not change
them. A change of the stored bytes records them again, and its commit gives the reason. The script
covers ``*.safetensors``, ``model.safetensors.index.json`` and ``config.json``. None of these files
holds a path, a time or a version, so the script hashes them unchanged.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeAlias, TypedDict

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.checkpoints import make_recipe_text, make_tiny_config, write_checkpoint

from quantkit import pipeline
from quantkit.io.host import has_bfloat16_instructions
from quantkit.io.package_data import locate_folder
from quantkit.library_settings import BOUNDED, REPRODUCIBLE
from quantkit.recipe.parse import parse_recipe

HERE = Path(__file__).resolve().parent
RECORDS = HERE / "artifacts.json"
RECORD_COMMAND = "python tests/golden/artifacts.py --record"

Kind: TypeAlias = dict[str, str]
Hashes: TypeAlias = dict[str, dict[str, str]]


class Record(TypedDict):
    """The hashes of one machine kind: artifact -> file -> sha256."""

    kind: Kind
    artifacts: Hashes


UNMEASURED = {"fidelity": "none", "gates": "{}", "compute.device": "cpu"}
FEW = {"calibration.sequences": "24", "calibration.min_expert_tokens": "16"}

RECIPES: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "tiny-v3-awq4": ("tiny-v3-awq4", FEW),
    "tiny-v3-awq4-all-linear-both": (
        "tiny-v3-awq4",
        {**FEW, "rules": "all-linear", "propagate": "both"},
    ),
    "tiny-v3-gptq4": ("tiny-v3-gptq4", FEW),
    "tiny-v3-gptq4-fp8": ("tiny-v3-gptq4-fp8", FEW),
    "tiny-v3-nf4": ("tiny-v3-nf4", {}),
    "tiny-v3-rtn4": ("tiny-v3-rtn4", {}),
}
"""Artifact -> the recipe in recipes/ and the keys that differ from it."""

TINY: Mapping[str, tuple[str, bool, Mapping[str, str]]] = {
    "llama-awq": (
        "llama",
        False,
        {
            "quantize": "{method: awq, rounding: nearest, bits: 4, group_size: 64}",
            "format": "[awq, gptq_v2, compressed_tensors, dense]",
            "shards": "300kB",
        },
    ),
    "qwen2-gptq-once": (
        "qwen2",
        False,
        {
            "quantize": "{method: gptq, rounding: gptq_once, bits: 4, group_size: 32, "
            "symmetric: true}",
            "format": "[gptq, gptq_v2]",
        },
    ),
    "qwen3-moe-awq": (
        "qwen3_moe",
        False,
        {
            "quantize": "{method: awq, rounding: gptq, bits: 4, group_size: 64, symmetric: true}",
            "format": "[gptq, compressed_tensors]",
        },
    ),
    "mixtral-gptq": (
        "mixtral",
        False,
        {
            "quantize": "{method: gptq, bits: 8, group_size: 64, symmetric: true}",
            "format": "[gptq, compressed_tensors, dense]",
        },
    ),
    "glm4-moe-rtn-mse": (
        "glm4_moe",
        False,
        {"quantize": "{method: rtn_mse, bits: 4, group_size: 64}", "format": "[awq, dense]"},
    ),
    "deepseek-v3-fp8-mtp-awq": (
        "deepseek_v3",
        True,
        {
            "quantize": "{method: awq, rounding: nearest, bits: 4, group_size: 64}",
            "format": "awq",
            "mtp": "quantize",
        },
    ),
}
"""Artifact -> the architecture, whether its random checkpoint is stored in FP8, and the keys of
the recipe."""


def find_machine_kind() -> Kind:
    """Find everything that is known to change the bits of a build."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    fields = {
        key.strip(): value.strip()
        for key, _, value in (line.partition(":") for line in reversed(lines))
    }
    return {
        "cpu vendor": fields.get("vendor_id", "unknown"),
        "cpu name": re.sub(
            r"\s*@.*", "", fields.get("model name", platform.processor() or "unknown")
        ),
        "cpu model": f"{fields.get('cpu family', 'unknown')}.{fields.get('model', 'unknown')}",
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "bfloat16 products": str(
            has_bfloat16_instructions()
        ).lower(),  # compute.calibration: auto depends on it
        "machine": platform.machine(),
        "torch": str(torch.__version__),
        "python": ".".join(platform.python_version_tuple()[:2]),
    }


def describe_kind(kind: Mapping[str, str]) -> str:
    """Write a machine kind on one line."""
    return ", ".join(f"{key} {value}" for key, value in kind.items())


def read_records(path: Path = RECORDS) -> list[Record]:
    """Read the records of all machine kinds."""
    if not path.exists():
        return []
    records: list[Record] = json.loads(path.read_text(encoding="utf-8"))["records"]
    return records


def find_record(records: Iterable[Record], kind: Kind) -> Record | None:
    """Find the record of a machine kind."""
    return next((record for record in records if record["kind"] == kind), None)


def write_record(kind: Kind, artifacts: Hashes, path: Path = RECORDS) -> None:
    """Write the record of a machine kind, and keep those of the others."""
    others = [record for record in read_records(path) if record["kind"] != kind]
    records = sorted(
        [*others, {"kind": kind, "artifacts": artifacts}],
        key=lambda record: json.dumps(record["kind"]),
    )
    path.write_text(json.dumps({"records": records}, indent=1) + "\n", encoding="utf-8")


def compare_hashes(recorded: Hashes, actual: Hashes) -> list[str]:
    """List every file whose bytes differ, is missing or is new, one sentence each."""
    differences = []
    for artifact in sorted(recorded.keys() | actual.keys()):
        old, new = recorded.get(artifact, {}), actual.get(artifact, {})
        for name in sorted(old.keys() | new.keys()):
            if name not in new:
                differences.append(f"{artifact}: {name} is recorded and was not built")
            elif name not in old:
                differences.append(f"{artifact}: {name} was built and is not recorded")
            elif old[name] != new[name]:
                differences.append(f"{artifact}: {name} has other bytes than recorded")
    return differences


def hash_artifact(path: Path) -> dict[str, str]:
    """Hash the weights, the index and the config of an artifact."""
    files = [
        *path.glob("*.safetensors"),
        *path.glob("model.safetensors.index.json"),
        path / "config.json",
    ]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(files)}


def build_recipe(text: str, name: str, overrides: Mapping[str, str]) -> Hashes:
    """Build the artifacts of a recipe without benchmarks, and hash their files."""
    began = time.monotonic()
    recipe = parse_recipe(text, f"{name}.yaml", {**overrides})
    outcomes = pipeline.build_artifacts(
        recipe,
        text,
        overwrite=False,
        evaluate=False,
        on_plan=lambda _: None,
        on_progress=lambda _: None,
    )
    print(f"{name}: {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
    return {outcome.path.name: hash_artifact(outcome.path) for outcome in outcomes}


def build_artifacts(place: Path) -> Hashes:
    """Build every artifact under `place`, and hash their files."""
    actual: Hashes = {}
    for name, (recipe_name, changes) in RECIPES.items():
        text = (locate_folder("recipes") / f"{recipe_name}.yaml").read_text(encoding="utf-8")
        actual |= build_recipe(
            text, name, {**UNMEASURED, **changes, "output.path": str(place / name)}
        )
    for name, (architecture, fp8, keys) in TINY.items():
        source = write_checkpoint(place / "sources" / name, make_tiny_config(architecture), fp8=fp8)
        written = {key: value for key, value in keys.items() if key != "shards"}
        shards = {"output.shard_bytes": keys["shards"]} if "shards" in keys else {}
        actual |= build_recipe(
            make_recipe_text(source, place / name, **written), name, {**UNMEASURED, **shards}
        )
    return actual


def build_in_subprocess(threads: int = 2) -> Hashes:
    """Build every artifact in a process whose libraries are set to be reproducible before
    they load."""
    fixed = {
        **REPRODUCIBLE,
        **BOUNDED,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
    }
    command = [
        sys.executable,
        str(Path(__file__).resolve()),
        "--print-hashes",
        "--threads",
        str(threads),
    ]
    root = os.pathsep.join(filter(None, [str(HERE.parent.parent), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, **fixed, "PYTHONPATH": root}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    actual: Hashes = json.loads(done.stdout)
    return actual


def main() -> int:
    """Compare or record; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--record", action="store_true", help="write the record of this machine kind"
    )
    parser.add_argument(
        "--threads", type=int, default=2, help="threads of torch; they change no byte"
    )
    parser.add_argument("--print-hashes", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.print_hashes:
        torch.set_num_threads(options.threads)
        with tempfile.TemporaryDirectory() as place:
            print(json.dumps(build_artifacts(Path(place))))
        return 0
    kind = find_machine_kind()
    record = find_record(read_records(), kind)
    if record is None and not options.record:
        print(
            f"no record of this machine kind: {describe_kind(kind)}; to write one: {RECORD_COMMAND}"
        )
        return 1
    began = time.monotonic()
    actual = build_in_subprocess(options.threads)
    differences = compare_hashes(record["artifacts"], actual) if record else []
    for difference in differences:
        print(difference)
    if options.record:
        write_record(kind, actual)
    files, seconds = sum(map(len, actual.values())), time.monotonic() - began
    verb = "recorded" if options.record else "compared"
    print(
        f"{len(actual)} artifacts, {files} files {verb} in {seconds:.0f} s; "
        f"{len(differences)} differ from the record"
    )
    return 1 if differences and not options.record else 0


if __name__ == "__main__":
    sys.exit(main())
