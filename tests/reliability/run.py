"""`make reliability`: run everything that tries to break quantkit and count it for tests/README.md.

    PYTHONPATH=tests .venv/bin/python -m reliability.run [--only WORD ...] [--quick] [--write]

Each row of the table is a pytest run over the listed tests, slow ones included. A test reports the
number of faults it injects with `record_property`: "fault" names one, "tried" or "faults" is a
number; a test without a property counts as one. Faults of a failed test count as not held.
`--quick` skips the tests marked `reliability`; `--write` writes the table, with command and date,
into tests/README.md. The exit code is 1 if anything did not hold.
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- reliability -->\n", "<!-- /reliability -->\n"


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A row of the table: the kind of fault, what its tests assert, and their files."""

    name: str
    asserts: str
    tests: Sequence[str]


SUITES = (
    Suite(
        name="builds killed, without power, out of disk",
        asserts="the same bytes in the end: nothing lost, nothing different",
        tests=("tests/build/test_interrupted.py", "tests/build/test_resume.py"),
    ),
    Suite(
        name="publish and pull: connections cut, bytes changed, files lost, disk full",
        asserts="continues, or one sentence; nothing unverified under the final name",
        tests=tuple(
            f"tests/publish/test_transfer{part}.py"
            for part in ("", "_faults", "_trust", "_secrets", "_kinds")
        ),
    ),
    Suite(
        name="bad artifacts and signatures",
        asserts="refused: none accepted",
        tests=(
            "tests/verify/test_bad_artifacts.py",
            "tests/publish/test_signing.py",
            "tests/verify/test_deep.py",
            "tests/verify/test_what_engines_load.py",
            "tests/checkpoint/test_folder_rules.py",
        ),
    ),
    Suite(
        name="hostile programs in the sandbox: shared memory, system calls, modules",
        asserts="contained, and none passes its test",
        tests=(
            "tests/evaluate/test_hostile.py",
            "tests/evaluate/test_sandbox_memory.py",
            "tests/evaluate/test_sandbox_modules.py",
            "tests/evaluate/test_sandbox_syscalls.py",
        ),
    ),
    Suite(
        name="hostile task files and templates",
        asserts="no code runs, no time and memory beyond the limits, one sentence",
        tests=(
            "tests/evaluate/test_hostile_tasks.py",
            "tests/io/test_template_filter.py",
            "tests/io/test_templates.py",
            "tests/texts/test_chat_templates.py",
        ),
    ),
    Suite(
        name="hostile clients of the gateway: heads, bodies, connections, hosts",
        asserts="refused or cut within bounds, the other requests are served",
        tests=tuple(
            f"tests/serve/test_{part}.py"
            for part in ("connections", "gateway_bodies", "gateway_trust", "json_scan")
        ),
    ),
    Suite(
        name="hostile servers: endless, compressed, slow and paged answers, other addresses",
        asserts="cut at a bound of bytes, pages or seconds; no login leaves the registry's domain",
        tests=(
            "tests/io/test_bounded_http.py",
            "tests/publish/test_hostile_registry.py",
            "tests/checkpoint/test_hostile_hub.py",
            "tests/texts/test_hostile_hub_data.py",
            "tests/evaluate/test_openai_answers.py",
            "tests/serve/test_loadtest_answers.py",
        ),
    ),
    Suite(
        name="folders and links planted where a build or a pull writes, files exchanged in use",
        asserts="kept and named in one sentence; an engine with other files is stopped",
        tests=(
            "tests/build/test_ownership.py",
            "tests/io/test_owned_dirs.py",
            "tests/recipe/test_output_path.py",
            "tests/serve/test_exchange.py",
        ),
    ),
    Suite(
        name="damaged inputs to 30 parsers",
        asserts="an answer or one sentence: no traceback, no hang, no memory beyond the budget",
        tests=("tests/reliability/test_fuzz.py",),
    ),
    Suite(
        name="hostile files, code of models, hard weights, odd names, closed disks, changing "
        "sources",
        asserts="one sentence and exit code 1 or 2, or a recorded fallback; nothing imported, "
        "nothing mixed",
        tests=tuple(
            f"tests/{part}.py"
            for part in (
                "reliability/test_hostile_input",
                "checkpoint/test_remote_code",
                "methods/test_hard_weights",
                "cli/test_environment",
            )
        ),
    ),
)


@dataclass(frozen=True, kw_only=True)
class SuiteResult:
    """Faults injected, faults that held, skipped tests, seconds."""

    tried: int
    held: int
    skipped: int
    seconds: float


def run_suite(suite: Suite, marked: str) -> SuiteResult:
    """Run a suite in a subprocess."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "junit.xml"
        subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "-m",
                marked,
                *suite.tests,
                f"--junitxml={junit}",
                "-o",
                "junit_family=xunit1",
            ],
            cwd=ROOT,
            stdout=sys.stderr,
        )
        if not junit.is_file():
            sys.exit(f"{suite.name}: pytest wrote no {junit.name}")
        cases = list(ElementTree.parse(junit).iter("testcase"))
    tried = held = skipped = 0
    for case in cases:
        if case.find("skipped") is not None:
            skipped += 1
            continue
        failed = case.find("failure") is not None or case.find("error") is not None
        tried += count_faults(case)
        held += 0 if failed else count_faults(case)
    return SuiteResult(tried=tried, held=held, skipped=skipped, seconds=time.monotonic() - start)


def count_faults(case: ElementTree.Element) -> int:
    """Return the number of faults that a test reports."""
    properties = [(item.get("name"), item.get("value") or "") for item in case.iter("property")]
    numbers = [int(value) for name, value in properties if name in {"tried", "faults"}]
    return sum(numbers) + sum(name == "fault" for name, _ in properties) or 1


def format_table(rows: Sequence[tuple[Suite, SuiteResult]]) -> str:
    """Format the results as a Markdown table."""
    lines = [
        "| fault | times | held | not held | what holding means | minutes |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *(format_row(suite, result) for suite, result in rows)]) + "\n"


def format_row(suite: Suite, result: SuiteResult) -> str:
    """Format one row."""
    skipped = f" ({result.skipped} tests skipped)" if result.skipped else ""
    cells = (
        suite.name + skipped,
        f"{result.tried:,}",
        f"{result.held:,}",
        f"{result.tried - result.held}",
        suite.asserts,
        f"{result.seconds / 60:.0f}",
    )
    return f"| {' | '.join(cells)} |"


def describe_commit() -> str:
    """Return the commit under test."""
    process = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    return process.stdout.strip() or "no commit"


def main() -> None:
    """Run the suites, print the table, and write it if requested."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", metavar="WORD", help="rows whose name contains one of these words"
    )
    parser.add_argument("--quick", action="store_true", help="skip the tests marked reliability")
    parser.add_argument("--write", action="store_true", help="write the table into tests/README.md")
    options = parser.parse_args()
    suites = [
        suite
        for suite in SUITES
        if not options.only or any(word in suite.name for word in options.only)
    ]
    rows = list[tuple[Suite, SuiteResult]]()
    for suite in suites:
        rows.append((suite, run_suite(suite, "not reliability" if options.quick else "")))
        print(format_row(*rows[-1]), flush=True)
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    command = f"make reliability{' ARGS=--quick' if options.quick else ''}"
    title = f"`{command}`, {date}, commit {describe_commit()}, {os.cpu_count()} cores:"
    text = f"{title}\n\n{format_table(rows)}"
    print(text)
    if options.write:
        page = ROOT / "tests" / "README.md"
        before, rest = page.read_text(encoding="utf-8").split(BEGIN)
        page.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")
    if any(result.held < result.tried for _, result in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
