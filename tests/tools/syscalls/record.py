"""Record the system calls that honest programs make in the sandbox.

    PYTHONPATH=tests python -m tools.syscalls.record --data DIR [--only SET] [--out FILE]

Runs the reference solutions of HumanEval, MBPP and tiny-v3-code, and the programs of `honest.py`,
each in the jails of quantkit.evaluate.sandbox under strace, and counts the calls that the program
and its tests make once the system-call filter is installed. DIR holds `humaneval/` and `mbpp/`.
For calls whose arguments the filter reads, the argument is part of the name. The exit code is 1 if
a program does not pass.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from tools.syscalls.honest import SOURCES

from quantkit.evaluate import task_runner, tasks
from quantkit.evaluate.sandbox import Program, Sandbox, execution, probe_sandbox

RECORDED = Path(__file__).with_name("recorded.json")
SOLUTIONS = {
    "humaneval": "canonical_solution",
    "mbpp": "code",
    "tiny-v3-code": "canonical_solution",
}
SECONDS = 120  # strace slows a program down

# name -> position of the argument that the filter reads
_ARGUMENTS = {"mmap": 3, "madvise": 2, "fcntl": 1, "ioctl": 1, "prctl": 0, "socketpair": 0}
_CALL = re.compile(r"^(\d+) +(\w+)\((.*)$")
_STRACE = 'exec strace -f -qq -o "$0/$$" "$@"'  # a file for each of the two jails


def list_programs(task: str, data: Path) -> list[Program]:
    """Return the reference solutions of a task with their tests."""
    (loaded,) = tasks.load_tasks([task], data)
    assert loaded.code is not None
    file = loaded.files["test"]
    lines = file.path.read_text(encoding="utf-8").splitlines()
    docs = [json.loads(line) for line in (lines[slice(*file.rows)] if file.rows else lines)]
    return [task_runner.build_program(task, loaded.code, doc, doc[SOLUTIONS[task]]) for doc in docs]


def read_trace(lines: Iterable[str]) -> set[str]:
    """Return the calls that filtered processes made, as NAME or NAME:ARGUMENT.

    A process is filtered if it installed the filter, or appeared afterwards, except for the thread
    that answers refused calls.
    """
    unfiltered: set[str] = set()
    is_installed = False
    calls: dict[str, set[str]] = defaultdict(set)
    for line in lines:
        match = _CALL.match(line)
        if match is None:
            continue
        pid, name, rest = match.groups()
        if not is_installed:
            unfiltered.add(pid)
        if pid not in unfiltered:
            arguments = rest.split(", ")
            position = _ARGUMENTS.get(name)
            is_known = position is not None and position < len(arguments)
            calls[pid].add(f"{name}:{_clean(arguments[position])}" if is_known else name)
        elif name == "seccomp" or "PR_SET_SECCOMP" in rest:
            unfiltered.discard(pid)
            is_installed = True
    own = (each for each in calls.values() if not any("SECCOMP_IOCTL" in call for call in each))
    return set[str]().union(*own)


def _clean(argument: str) -> str:
    """Return an argument without the end of the line that strace adds after the last one."""
    return re.split(r"[) <]", argument)[0]


def record_program(program: Program, sandbox: Sandbox) -> tuple[set[str], str]:
    """Run one program under strace; return its calls, and its verdict."""
    with tempfile.TemporaryDirectory() as folder:
        traced = replace(sandbox, command=("sh", "-c", _STRACE, folder, *sandbox.command))
        (result,) = execution.run_programs([program], traced, SECONDS)
        calls = [
            read_trace(log.read_text(errors="replace").splitlines())
            for log in Path(folder).iterdir()
        ]
    return set[str]().union(*calls), result.reason


def record(programs: list[Program], sandbox: Sandbox) -> tuple[Counter[str], list[str]]:
    """Count, for each call, the programs that make it; return the verdicts that are no pass too."""
    counts: Counter[str] = Counter()
    failed = []
    with ThreadPoolExecutor(max_workers=2) as pool:
        for calls, reason in pool.map(lambda program: record_program(program, sandbox), programs):
            counts.update(calls)
            failed += [reason] * (reason != "passed")
    return counts, failed


def main() -> None:
    """Record, print a table, and write the counts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of humaneval/ and mbpp/")
    parser.add_argument("--only", choices=[*SOLUTIONS, "honest"], help="record this set again")
    parser.add_argument("--out", type=Path, default=RECORDED, help="file for the counts")
    options = parser.parse_args()
    sandbox = probe_sandbox()
    if sandbox.kind == "none" or shutil.which("strace") is None:
        sys.exit(f"record: expected a sandbox and strace, found neither or one ({sandbox.reason})")
    sets = {task: list_programs(task, options.data) for task in SOLUTIONS}
    sets["honest"] = [Program(source=text, tests="assert answer") for text in SOURCES.values()]
    has_failed = False
    recorded = json.loads(options.out.read_text()) if options.only else {}
    for name, programs in sets.items():
        if options.only not in (None, name):
            continue
        counts, failed = record(programs, sandbox)
        sys.stdout.write(f"{name}: {len(programs)} programs, {len(counts)} calls, {failed}\n")
        recorded[name] = {"programs": len(programs), "calls": dict(sorted(counts.items()))}
        has_failed = has_failed or bool(failed)
    options.out.write_text(json.dumps(recorded, indent=1) + "\n")
    sys.exit(has_failed)


if __name__ == "__main__":
    main()
