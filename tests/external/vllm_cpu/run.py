"""`make test-vllm`: load artifacts in vLLM and compare its answers with the dequantized models.

    PYTHONPATH=tests .venv/bin/python -m external.vllm_cpu.run .venv-vllm/bin/python \\
        [--only TEXT] [--artifact PATH ...]

Builds the artifacts of cases.py in a temporary folder, or uses those on the command line; sends the
same prompts to vLLM and to the dequantized model, and prints one table. The exit code is 1 if vLLM
fails or its answers do not match.
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
"""Prompts per model; the default is 20."""
LOG_LINES = 30
GENERATE = Path(__file__).parent / "generate.py"
STUDENT_FOLDER, REAL_FOLDER = Path("artifacts/vllm"), Path("artifacts/real")


def print_line(line: str) -> None:
    """Print a line to stdout and flush it."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def run_command(command: Sequence[str]) -> list[str]:
    """Run a command and return its output lines.

    Raises RuntimeError with the last lines on failure.
    """
    process = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    lines = process.stdout.splitlines()
    if process.returncode != 0:
        raise RuntimeError(
            "\n".join([*lines[-LOG_LINES:], f"{' '.join(command)}: exit code {process.returncode}"])
        )
    return lines


def build_case(case: Case, folder: Path) -> Path:
    """Build the artifact of a case with the command line, as users do."""
    start, recipe = time.monotonic(), folder / f"{case.name}.yaml"
    place = REAL_FOLDER if case.model == REAL else STUDENT_FOLDER
    place.mkdir(parents=True, exist_ok=True)
    recipe.write_text(case.make_recipe(place.resolve(), folder / case.name), encoding="utf-8")
    quantkit, output = [sys.executable, "-m", "quantkit"], str(folder / case.name)
    run_command([*quantkit, "build", str(recipe), "--output", output, "--skip-evaluation"])
    print_line(f"{case.name}: built in {time.monotonic() - start:.0f} s")
    return folder / case.name


def check_artifact(vllm_python: str, artifact: Path, prompts: int, folder: Path) -> Comparison:
    """Run both models on the same prompts, compare the answers and print the result."""
    from external.vllm_cpu import (
        reference,
    )  # slow to import; after the build, which needs the memory

    start = time.monotonic()
    reference_file, vllm_file = folder / "reference.json", folder / "vllm.json"
    answers, rounding = reference.generate_answers(artifact, prompts)
    write_answers(answers, reference_file)
    seconds = time.monotonic() - start
    print_line(
        f"dequantized model, transformers in float32: {prompts} answers in {seconds:.0f} s; "
        f"bfloat16 alone moves 95 % of its undecided margins by less than {rounding:.3f} nats"
    )
    start = time.monotonic()
    log = run_command([
        vllm_python,
        str(GENERATE),
        str(artifact),
        str(reference_file),
        str(vllm_file),
    ])
    timing = next((line for line in reversed(log) if line.startswith("vLLM ")), "vLLM: no timing")
    print_line(f"{timing}; {time.monotonic() - start:.0f} s including the start of Python")
    result = compare_answers(read_answers(reference_file), read_answers(vllm_file), rounding)
    for line in [*result.format_lines(), *(f"FAILED: {fault}" for fault in result.faults)]:
        print_line(line)
    return result


def iterate_artifacts(paths: Sequence[Path], only: str) -> Iterator[tuple[str, int, Path | Case]]:
    """Yield name, number of prompts, and artifact: `paths`, or the cases whose name contains
    `only`.
    """
    for path in paths:
        yield path.name, 20, path
    for case in list_cases((REAL_FOLDER / REAL).exists()):
        if not paths and only in case.name:
            yield case.name, PROMPTS.get(case.model, 20), case


def format_row(name: str, result: Comparison | None, fault: str = "") -> str:
    """Format a row of the table."""
    if result is None:
        return f"{name:<40}  not loaded: {fault}"
    ties = sum(d.is_near_tie for d in result.differences)
    equal = f"{result.answers - len(result.differences)} of {result.answers}"
    verdict = "FAILED" if result.faults else "passed"
    change = result.median_change
    return f"{name:<40}  loaded  {equal:>9} equal  {ties:>2} near-ties  {change:>6}  {verdict}"


def main() -> None:
    """Parse the command line, check every artifact, print the table."""
    parser = argparse.ArgumentParser(
        description="Compare artifacts in vLLM with their dequantized weights."
    )
    parser.add_argument("vllm_python", help="Python of the environment that has vLLM")
    parser.add_argument(
        "--artifact",
        type=Path,
        nargs="+",
        default=[],
        help="artifacts (default: those of cases.py)",
    )
    parser.add_argument("--only", default="", help="run only cases whose name contains this")
    options = parser.parse_args()
    rows, failed = [], False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for name, prompts, source in iterate_artifacts(options.artifact, options.only):
            result, fault = None, ""
            try:
                path = build_case(source, folder) if isinstance(source, Case) else source
                result = check_artifact(options.vllm_python, path, prompts, folder)
            except RuntimeError as error:
                print_line(str(error))
                fault = str(error).splitlines()[-2:][0]
            failed |= result is None or bool(result.faults)
            rows.append(format_row(name, result, fault))
    rows += [f"{name:<40}  not run: {reason}" for name, reason in NOT_RUN.items()]
    if not (REAL_FOLDER / REAL).exists():
        rows.append(
            f"{REAL:<40}  not run: no {REAL_FOLDER / REAL}; create it with `make real-model`"
        )
    for line in ["", *rows]:
        print_line(line)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
