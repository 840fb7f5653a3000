"""Does vLLM load our artifacts, and does it say what the dequantized models say? Run by `make test-vllm`.

    PYTHONPATH=tests .venv/bin/python -m external.vllm_cpu.run .venv-vllm/bin/python [--only TEXT] [--artifact PATH ...]

Builds the artifacts of cases.py into a temporary folder, or takes those that are given; asks vLLM and the dequantized
model the same prompts, and prints one table. Exits with 1 when vLLM fails or says something else.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from external.vllm_cpu.cases import NOT_RUN, REAL, Case, list_cases
from external.vllm_cpu.compare import Comparison, compare_answers, read_answers, write_answers

PROMPTS = {REAL: 10}
"""Prompts per model; others are asked 20."""
LOG_LINES = 30
GENERATE = Path(__file__).parent / "generate.py"
STUDENT_FOLDER, REAL_FOLDER = Path("artifacts/vllm"), Path("artifacts/real")


def print_line(line: str) -> None:
    """A line on stdout, at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def run_command(command: Sequence[str]) -> list[str]:
    """Run a command and hand back the lines it printed; RuntimeError with the last of them when it fails."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    lines = done.stdout.splitlines()
    if done.returncode != 0:
        raise RuntimeError(
            "\n".join([*lines[-LOG_LINES:], f"{' '.join(command)}: exit code {done.returncode}"])
        )
    return lines


def build_case(case: Case, folder: Path) -> Path:
    """The artifact of a case, made by the command line as users make it."""
    began, recipe = time.monotonic(), folder / f"{case.name}.yaml"
    place = REAL_FOLDER if case.model == REAL else STUDENT_FOLDER
    place.mkdir(parents=True, exist_ok=True)
    recipe.write_text(case.recipe(place.resolve(), folder / case.name), encoding="utf-8")
    run_command([sys.executable, "-m", "quantkit", "build", str(recipe), "--skip-evaluation"])
    print_line(f"{case.name}: built in {time.monotonic() - began:.0f} s")
    return folder / case.name


def check_artifact(vllm_python: str, artifact: Path, prompts: int, folder: Path) -> Comparison:
    """Ask both models, compare, and print what was found."""
    from external.vllm_cpu import (
        reference,
    )  # seconds of torch and transformers, after the build has had the memory

    began = time.monotonic()
    expected, found = folder / "reference.json", folder / "vllm.json"
    answers, rounding = reference.generate_answers(artifact, prompts)
    write_answers(answers, expected)
    seconds = time.monotonic() - began
    print_line(
        f"dequantized model, transformers in float32: {prompts} answers in {seconds:.0f} s; bfloat16 alone moves 95 % "
        f"of its undecided margins by less than {rounding:.3f} nats"
    )
    began = time.monotonic()
    log = run_command([vllm_python, str(GENERATE), str(artifact), str(expected), str(found)])
    told = next((line for line in reversed(log) if line.startswith("vLLM ")), "vLLM: no timing")
    print_line(f"{told}; {time.monotonic() - began:.0f} s with the start of Python")
    result = compare_answers(read_answers(expected), read_answers(found), rounding)
    for line in [*result.lines(), *(f"FAILED: {fault}" for fault in result.faults)]:
        print_line(line)
    return result


def iterate_artifacts(
    given: Sequence[Path], only: str, folder: Path
) -> Iterator[tuple[str, int, Path | Case]]:
    """Name, number of prompts, and what is to be read: the artifacts given, else the cases that contain `only`."""
    for path in given:
        yield path.name, 20, path
    for case in list_cases((REAL_FOLDER / REAL).exists()):
        if not given and only in case.name:
            yield case.name, PROMPTS.get(case.model, 20), case


def format_row(name: str, result: Comparison | None, fault: str = "") -> str:
    """A line of the table."""
    if result is None:
        return f"{name:<40}  not read: {fault}"
    ties = sum(d.near_tie for d in result.differences)
    equal = f"{result.answers - len(result.differences)} of {result.answers}"
    verdict = "FAILED" if result.faults else "passed"
    return (
        f"{name:<40}  loaded  {equal:>9} equal  {ties:>2} near-ties  {result.moved:>6}  {verdict}"
    )


def main() -> None:
    """Parse the command line, check every artifact, print the table."""
    parser = argparse.ArgumentParser(
        description="Compare artifacts in vLLM with their dequantized weights."
    )
    parser.add_argument("vllm_python", help="Python of the environment that has vLLM")
    parser.add_argument(
        "--artifact", type=Path, nargs="+", default=[], help="artifacts; without, those of cases.py"
    )
    parser.add_argument("--only", default="", help="cases whose name contains this")
    given = parser.parse_args()
    rows, failed = [], False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for name, prompts, what in iterate_artifacts(given.artifact, given.only, folder):
            result, fault = None, ""
            try:
                path = build_case(what, folder) if isinstance(what, Case) else what
                result = check_artifact(given.vllm_python, path, prompts, folder)
            except RuntimeError as error:
                print_line(str(error))
                fault = str(error).splitlines()[-2:][0]
            failed |= result is None or bool(result.faults)
            rows.append(format_row(name, result, fault))
    rows += [f"{name:<40}  not run: {reason}" for name, reason in NOT_RUN.items()]
    if not (REAL_FOLDER / REAL).exists():
        rows.append(f"{REAL:<40}  not run: no {REAL_FOLDER / REAL}; `make real-model` makes it")
    for line in ["", *rows]:
        print_line(line)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
