"""Does vLLM load an artifact, and does it say what the dequantized model says? Run by `make test-vllm`.

    PYTHONPATH=tests .venv/bin/python -m vllm_cpu.run .venv-vllm/bin/python [--artifact PATH]

Builds the demo's artifact into a temporary folder unless one is given. Exits with 1 when vLLM fails or says something
else.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from vllm_cpu.compare import compare, read_answers, write_answers

RECIPE = "tiny-v3-awq4"
PROMPTS = 20
LOG_LINES = 30
GENERATE = Path(__file__).parent / "generate.py"


def say(line: str) -> None:
    """A line on stdout, at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def quietly(command: Sequence[str]) -> list[str]:
    """Run a command and hand back the lines it printed; on failure the last of them are the message."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    lines = done.stdout.splitlines()
    if done.returncode != 0:
        sys.exit("\n".join([*lines[-LOG_LINES:], f"{' '.join(command)}: exit code {done.returncode}"]))
    return lines


def check(vllm_python: str, artifact: Path | None, folder: Path) -> bool:
    """Build where no artifact is given, ask both models, compare, and print what was found."""
    began = time.monotonic()
    if artifact is None:
        artifact = folder / RECIPE
        target = f"output.path={artifact}"
        quietly([sys.executable, "-m", "quantkit", "build", RECIPE, "--skip-evaluation", "--set", target])
        say(f"built {RECIPE} in {time.monotonic() - began:.0f} s")
    from vllm_cpu import reference  # seconds of torch and transformers, after the build has had the memory

    began = time.monotonic()
    expected, found = folder / "reference.json", folder / "vllm.json"
    write_answers(reference.answers(artifact, PROMPTS), expected)
    say(f"dequantized model, transformers in float32: {PROMPTS} answers in {time.monotonic() - began:.0f} s")
    began = time.monotonic()
    log = quietly([vllm_python, str(GENERATE), str(artifact), str(expected), str(found)])
    told = next((line for line in reversed(log) if line.startswith("vLLM ")), "vLLM: no timing")
    say(f"{told}; {time.monotonic() - began:.0f} s with the start of Python")
    result = compare(read_answers(expected), read_answers(found))
    for line in [*result.lines(), *(f"FAILED: {fault}" for fault in result.faults)]:
        say(line)
    return not result.faults


def main() -> None:
    """Parse the command line and check one artifact."""
    parser = argparse.ArgumentParser(description="Compare an artifact in vLLM with its dequantized weights.")
    parser.add_argument("vllm_python", help="Python of the environment that has vLLM")
    parser.add_argument("--artifact", type=Path, help=f"an artifact; {RECIPE} is built when there is none")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(0 if check(given.vllm_python, given.artifact, Path(folder)) else 1)


if __name__ == "__main__":
    main()
