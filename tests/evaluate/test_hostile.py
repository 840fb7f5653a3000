"""Hostile programs (hostile.py) are contained by every kind of sandbox that works here."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import time
from pathlib import Path

import pytest
from support import hostile

from quantkit.evaluate.sandbox import Program, probe_sandbox, run_programs

CASES = [
    pytest.param(program, id=program.name, marks=[pytest.mark.slow] * program.slow)
    for program in hostile.PROGRAMS
]


@pytest.mark.parametrize("program", CASES)
def test_hostile_program_is_contained(jail, program, monkeypatch):
    monkeypatch.setenv("QUANTKIT_TEST_SECRET", "leaked")
    tests = hostile.WRONG if program.tests is None else program.tests
    # If another limit must end the program, a slow machine needs time to reach it.
    seconds = 1 if {hostile.CPU, hostile.WALL} & set(program.reason) else 4
    started = time.monotonic()
    (result,) = run_programs([Program(source=program.source, tests=tests)], jail, seconds)
    assert time.monotonic() - started < 20
    assert result.passed == (program.tests is not None), result.reason
    if program.reason:
        # on a busy machine the wall clock can end what would use up its processor time
        reasons = (*program.reason, *[hostile.WALL] * (hostile.CPU in program.reason))
        assert any(reason in result.reason for reason in reasons), result.reason


@pytest.mark.parametrize("name", ["reading inherited files", "no answer"])
def test_descriptors_of_programs_do_not_depend_on_files_open_here(jail, name):
    (program,) = (one for one in hostile.PROGRAMS if one.name == name)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as opened:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
        opened.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        for _ in range(1100):
            opened.enter_context(open(os.devnull, "rb"))
        tests = hostile.WRONG if program.tests is None else program.tests
        (result,) = run_programs([Program(source=program.source, tests=tests)], jail, 4)
    assert result.passed == (program.tests is not None), result.reason
    assert not program.reason or any(reason in result.reason for reason in program.reason)


def test_tests_of_hostile_programs_can_pass(jail):
    (result,) = run_programs([Program(source="def answer(): return 42", tests=hostile.WRONG)], jail)
    assert result.passed, "else the table above would prove nothing"


def find_processes(name: str) -> list[int]:
    """Return the processes with that name."""
    result = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "comm").read_text().strip() == name:
                result.append(int(folder.name))
        except OSError:
            continue
    return result


@pytest.mark.parametrize(
    "ending", ["def answer(): return 42", "import os; os._exit(0)", "os.kill(os.getppid(), 9)"]
)
def test_no_daemon_survives(jail, ending):
    name = f"qk-{os.getpid()}"
    source = hostile.DAEMON.replace("NAME", repr(name.encode())) + ending
    (result,) = run_programs([Program(source=source, tests=hostile.WRONG)], jail, 1)
    assert result.passed == ("answer" in ending), result.reason
    until = time.monotonic() + 5
    while find_processes(name) and time.monotonic() < until:
        time.sleep(0.02)
    assert find_processes(name) == []


def test_program_may_define_sum_but_not_replace_helpers():
    sandbox = probe_sandbox()
    if sandbox.kind == "none":
        pytest.skip(f"no sandbox: {sandbox.reason}")
    source = """
def sum(a, b): return 6
class math:
    isclose = staticmethod(lambda *a: True)
def answer(): return 6
"""
    tests = (
        "assert sum(10, 15) == 6",
        "assert sum([answer(), 1]) == 7",
        "assert math.isclose(answer(), 5)",
    )
    result = run_programs([Program(source=source, tests=text) for text in tests], sandbox)
    assert [outcome.passed for outcome in result] == [True, True, False]


def test_objects_are_copied_between_program_and_tests():
    sandbox = probe_sandbox()
    if sandbox.kind == "none":
        pytest.skip(f"no sandbox: {sandbox.reason}")
    source = """
import collections, decimal, fractions
class Node:
    def __init__(self, value): self.value, self.next = value, None
    def __len__(self): return 1 + (len(self.next) if self.next else 0)
def same(x): return x
def kinds():
    point = collections.namedtuple("Point", "x y")
    values = [point(1, 2), collections.Counter("aab")]
    return [*values, decimal.Decimal("1.5"), fractions.Fraction(1, 3)]
def count(n): yield from range(n)
def fail(): raise LookupError("lost")
"""
    tests = """
node = Node(1)
node.next = Node(2)
assert (len(node), node.next.value) == (2, 2)
assert (same(node) == node, same(node) == Node(1)) == (True, False)
numbers = (1 << 99, -1, True, None, 1.5, float("inf"), 1j)
for value in (*numbers, b"ab", "\\udc80", {1: (2, [3])}, {4}, [[]]):
    assert same(value) == value and type(same(value)) is type(value), value
from decimal import Decimal
from fractions import Fraction
assert kinds() == [(1, 2), {"a": 2, "b": 1}, Decimal("1.5"), Fraction(1, 3)], kinds()
assert list(count(3)) == [0, 1, 2] and same(x=2) == 2
try:
    fail()
except LookupError as error:
    assert str(error) == "lost"
else:
    raise ValueError
"""
    (result,) = run_programs([Program(source=source, tests=tests)], sandbox)
    assert result.reason == "passed"


def test_probe_refuses_a_kernel_without_pidfd_open(monkeypatch):
    def refuse(pid: int) -> int:
        raise OSError

    monkeypatch.setattr(os, "pidfd_open", refuse)
    assert probe_sandbox().reason == "this kernel has no pidfd_open"


def test_probe_refuses_an_unknown_machine(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "vax")
    assert probe_sandbox().reason == "no system-call filter for vax"
