"""`make bench-verify`: time of `quantkit verify` relative to `sha256sum`, on codes and on BF16.

All commands read from the page cache, alternating, and the fastest round counts, so the disk has no
influence. verify hashes the same bytes, checks every number in the same pass, and starts Python.
`openssl sha256` uses the CPU's SHA-256 instructions, as Python does; many `sha256sum` do not.

    PYTHONPATH=tests .venv/bin/python -m bench.verify [--bytes 1GB] [--rounds 3] [--folder DIR]
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
from support.damage import rehash

from quantkit import registry
from quantkit.artifact.layout import MANIFEST
from quantkit.checkpoint.header import build_header, parse_header
from quantkit.contracts import Config, Contents, Scheme, TensorSpec
from quantkit.plan.match_checkpoint import list_expected_tensors

SCHEME = Scheme(bits=4, group_size=128, symmetric=False, scale_dtype="bfloat16")
PIECE = 16 << 20
HASHERS = {"sha256sum": ["sha256sum"], "openssl sha256": ["openssl", "dgst", "-sha256"]}

VERIFY = """
import sys
from quantkit.cli.main import main
main(["verify", sys.argv[1]], standalone_mode=False)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
"""Run the command and print its peak resident memory in kB."""


def make_config(layers: int) -> dict[str, object]:
    """Return the config of a Llama with matrices of 4096 x 14336."""
    tiny = dict(registry.get_architecture("llama").tiny)
    return tiny | {
        "num_hidden_layers": layers,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 8192,
    }


def write_artifact(folder: Path, format_name: str, n_bytes: int) -> None:
    """Write a sealed artifact of random codes or weights with at least n_bytes."""
    output, layers = registry.get_format(format_name), 0
    specs: list[TensorSpec] = []
    while sum(spec.n_bytes for spec in specs) < n_bytes:
        layers += 1
        values = make_config(layers)
        layout = registry.get_architecture("llama").layout(Config(values=values))
        codes = [x for x in layout.linears if x.role in {"attention", "mlp"}]
        quantized = {f"{x.name}.weight" for x in codes}
        expected = list_expected_tensors(layout, Config(values=values)).values()
        specs = [spec for spec in expected if spec.name not in quantized]
        specs += [spec for linear in codes for spec in output.layout(linear, SCHEME)]
    names = {x.name for x in codes}
    kept = [x.name for x in layout.linears if x.name not in names]
    entry = output.quantization_config(Contents(schemes=dict.fromkeys(names, SCHEME), kept=kept))
    (folder / "quantkit").mkdir(parents=True)
    (folder / "config.json").write_text(
        json.dumps(values | ({"quantization_config": entry} if entry else {}))
    )
    write_shard(folder / "model.safetensors", specs)
    manifest = {
        "schema_version": 1,
        "status": "not judged",
        "format": format_name,
        "quantization_config": entry,
        "tensors": {spec.name: [spec.dtype, list(spec.shape)] for spec in specs},
        "modules": {name: {"scheme": asdict(SCHEME)} for name in names},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest))
    rehash(folder)


def write_shard(path: Path, specs: list[TensorSpec]) -> None:
    """Write a safetensors file of random tensors."""
    text = build_header(specs)
    header, random = (
        parse_header(text[8:], path.name, sum(spec.n_bytes for spec in specs)),
        np.random.default_rng(0),
    )
    with path.open("wb") as file:
        file.write(text)
        for name in sorted(header.offsets, key=lambda name: header.offsets[name]):
            for piece in iterate_numbers(header.specs[name], random):
                file.write(piece)


def iterate_numbers(spec: TensorSpec, random: np.random.Generator) -> Iterator[bytes]:
    """Yield random words; for floating-point tensors, positive numbers below 2."""
    for first in range(0, spec.n_bytes, PIECE):
        words = random.integers(0, 1 << 16, min(PIECE, spec.n_bytes - first) // 2, dtype=np.uint16)
        yield ((words & 0x3FFF | 0x0100) if spec.dtype == "BF16" else words).tobytes()


def time_command(command: list[str]) -> tuple[float, str]:
    """Return the wall time of a command and the last line that it printed."""
    start = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return time.perf_counter() - start, done.stdout.splitlines()[-1]


def parse_options(description: str | None) -> argparse.Namespace:
    """Parse the options that the file benchmarks share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bytes", type=float, default=1e9)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    return parser.parse_args()


def main() -> None:
    """Write the artifacts, time the commands, and print the ratios."""
    options = parse_options(__doc__)
    place = Path(tempfile.mkdtemp(prefix="bench-verify-", dir=options.folder))
    try:
        for format_name, label in (("awq", "4-bit codes (awq)"), ("dense", "BF16 weights (dense)")):
            folder = place / format_name
            write_artifact(folder, format_name, int(options.bytes))
            file = folder / "model.safetensors"
            verify = [sys.executable, "-c", VERIFY, str(folder)]
            others = {
                name: command for name, command in HASHERS.items() if shutil.which(command[0])
            }
            rounds = [
                {name: time_command([*command, str(file)]) for name, command in others.items()}
                | {"verify": time_command(verify)}
                for _ in range(options.rounds)
            ]
            best = {name: min(times[name][0] for times in rounds) for name in rounds[0]}
            peak = max(int(times["verify"][1]) for times in rounds) / 1e3
            size = file.stat().st_size / 1e9
            print(
                f"{label}, {size:.2f} GB: verify {best['verify']:.2f} s, at most {peak:.0f} MB of "
                "memory"
            )
            for name in others:
                print(f"    {name} {best[name]:.2f} s: ratio {best['verify'] / best[name]:.2f}")
            shutil.rmtree(folder)
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
