"""`make reliability`: everything that tries to break quantkit, counted, as the table of the README.

    PYTHONPATH=tests .venv/bin/python -m reliability.run [--only WORD ...] [--quick] [--write]

Each row is a pytest run of its own over the tests named here, slow ones included. A test says what it tried with
`record_property`: "fault" names one thing, "tried" or "faults" is a number of them; a test that says nothing tried one.
What a failed test tried counts as not held. `--quick` leaves out the tests marked `reliability`, `--write` puts the
table into README.md, with the command and the date.
Exits with 1 when anything was not held.
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
    """A row of the table: what is tried, what every test of it asserts, and where the tests are."""

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
        asserts="goes on, or one sentence; nothing unverified under the final name",
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
        ),
    ),
    Suite(
        name="hostile programs in the sandbox",
        asserts="contained, and none passes its test",
        tests=("tests/evaluate/test_hostile.py",),
    ),
    Suite(
        name="damaged inputs to 21 parsers",
        asserts="an answer or one sentence: no traceback, no hang, no memory beyond the budget",
        tests=("tests/reliability/test_fuzz.py",),
    ),
    Suite(
        name="hostile files, code of models, hard weights, odd names, closed disks, changing sources",
        asserts="one sentence and exit code 1 or 2, or a recorded fallback; nothing imported, nothing mixed",
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
class Counted:
    """What a suite tried, what of it held, the tests that were skipped, and seconds."""

    tried: int
    held: int
    skipped: int
    seconds: float


def run(suite: Suite, marked: str) -> Counted:
    """Run a suite in a process of its own."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        told = Path(place) / "told.xml"
        subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "-m",
                marked,
                *suite.tests,
                f"--junitxml={told}",
                "-o",
                "junit_family=xunit1",
            ],
            cwd=ROOT,
            stdout=sys.stderr,
        )
        if not told.is_file():
            sys.exit(f"{suite.name}: pytest left no {told.name}")
        cases = list(ElementTree.parse(told).iter("testcase"))
    tried = held = skipped = 0
    for case in cases:
        if case.find("skipped") is not None:
            skipped += 1
            continue
        failed = case.find("failure") is not None or case.find("error") is not None
        tried += counted(case)
        held += 0 if failed else counted(case)
    return Counted(tried=tried, held=held, skipped=skipped, seconds=time.monotonic() - began)


def counted(case: ElementTree.Element) -> int:
    """How many things a test says that it tried."""
    properties = [(each.get("name"), each.get("value") or "") for each in case.iter("property")]
    numbers = [int(value) for name, value in properties if name in {"tried", "faults"}]
    return sum(numbers) + sum(name == "fault" for name, _ in properties) or 1


def table(rows: Sequence[tuple[Suite, Counted]]) -> str:
    """Markdown."""
    lines = [
        "| what was tried | times | held | not held | what holding means | minutes |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *(line(suite, found) for suite, found in rows)]) + "\n"


def line(suite: Suite, found: Counted) -> str:
    """One row."""
    skipped = f" ({found.skipped} tests skipped)" if found.skipped else ""
    cells = (
        suite.name + skipped, f"{found.tried:,}", f"{found.held:,}", f"{found.tried - found.held}", suite.asserts,
        f"{found.seconds / 60:.0f}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def commit() -> str:
    """The commit that was tried."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    return done.stdout.strip() or "no commit"


def main() -> None:
    """Run, print, and on request write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", metavar="WORD", help="rows that have one of these words in their name"
    )
    parser.add_argument("--quick", action="store_true", help="without the tests of many minutes")
    parser.add_argument("--write", action="store_true", help="put the table into README.md")
    wanted = parser.parse_args()
    chosen = [
        suite
        for suite in SUITES
        if not wanted.only or any(word in suite.name for word in wanted.only)
    ]
    rows = list[tuple[Suite, Counted]]()
    for suite in chosen:
        rows.append((suite, run(suite, "not reliability" if wanted.quick else "")))
        print(line(*rows[-1]), flush=True)
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    command = f"make reliability{' ARGS=--quick' if wanted.quick else ''}"
    text = f"`{command}`, {date}, commit {commit()}, {os.cpu_count()} cores:\n\n{table(rows)}"
    print(text)
    if wanted.write:
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        before, rest = readme.split(BEGIN)
        (ROOT / "README.md").write_text(
            f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8"
        )
    if any(found.held < found.tried for _, found in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
