"""Generated programs are contained, judged by their tests alone, and not run without a sandbox."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT

from quantkit.errors import EvaluationError
from quantkit.evaluate import task_runner, tasks
from quantkit.evaluate.sandbox import Program, ProgramResult, Sandbox, probe_sandbox, run_programs
from quantkit.evaluate.sandbox.limits import PROCESSES
from quantkit.io import package_data
from quantkit.io.templates import TemplateWorker

DATA = Path(os.environ.get("QUANTKIT_DATA", ROOT.parent / "shared" / "data"))


def run_one(source: str, sandbox: Sandbox, tests: str = "pass", seconds: int = 1) -> ProgramResult:
    return run_programs([Program(source=source, tests=tests)], sandbox, seconds)[0]


def test_correct_program_passes_and_wrong_program_fails(jail):
    tests = "assert double(2) == 4"
    assert run_one("def double(x):\n    return 2 * x", jail, tests) == ProgramResult(
        passed=True, reason="passed"
    )
    assert run_one("def double(x):\n    return x", jail, tests).reason.startswith("AssertionError")
    assert run_one("def double(x) return", jail, tests).reason.startswith("SyntaxError")
    assert run_one("", jail, tests).reason == "NameError: name 'double' is not defined"


def test_probe_reports_the_jails_python(jail):
    assert jail.python.split(".")[0] == "3"
    assert jail.reason == ""


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("import os; os._exit(0)", "ended before its tests finished"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("print('0' * 32)\nimport os; os._exit(0)", "ended before its tests finished"),
        ("print(input())", "EOFError"),
        ("x = bytearray(1 << 31)", "MemoryError"),
        ("open('/tmp/big', 'wb').write(bytes(1 << 22))", "OSError"),
        ("def f(): f()\nf()", "RecursionError"),
    ],
)
def test_program_that_does_not_finish_its_tests_fails(jail, source, reason):
    result = run_one(source, jail)
    assert not result.passed
    assert reason in result.reason


def test_endless_program_is_killed(jail):
    reasons = ("used more than 1 s of processor time", "ran longer than 8 s")  # on a busy machine
    assert run_one("while True: pass", jail).reason in reasons


def test_sleeping_programs_and_fork_bombs_are_killed(jail):
    bomb = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass"
    programs = [
        Program(source=source, tests="pass") for source in (bomb, "import time\ntime.sleep(1000)")
    ]
    forked, slept = run_programs(programs, jail, 1)
    assert forked.reason in ("ran longer than 8 s", "used more than 1 s of processor time")
    assert slept.reason == "ran longer than 8 s"


def test_number_of_processes_is_limited(jail):
    source = """
import os, time
made = 0
for _ in range(200):
    try:
        if os.fork() == 0:
            time.sleep(1000)
    except OSError:
        break
    made += 1
"""
    assert run_one(source, jail, f"assert made < {PROCESSES}, made").passed


def test_program_cannot_write_outside_its_tmp(jail, tmp_path):
    target = tmp_path / "planted"
    for path in (str(target), "/usr/planted", "/etc/planted", "/dev/shm/planted"):
        result = run_one(f"open({path!r}, 'w').write('x')", jail)
        assert not result.passed, path
    assert not target.exists()
    private = f"open('/tmp/quantkit-{os.getpid()}', 'w').write('x')"
    assert run_one(private, jail).passed, "its own /tmp is writable"
    assert not Path(f"/tmp/quantkit-{os.getpid()}").exists()


def test_program_cannot_change_mounts(jail):
    source = """
import subprocess
subprocess.run(['mount', '-o', 'remount,rw', '/usr'], check=True, stderr=-3)
"""
    assert "CalledProcessError" in run_one(source, jail).reason


WRITE_TO_MOUNT = """
import sys
from quantkit.evaluate.sandbox import Program, probe_sandbox, run_programs
sandbox = probe_sandbox(kinds=(sys.argv[1],))
(result,) = run_programs(
    [Program(source="open('/usr/share/doc/planted', 'w').write('x')", tests="pass")], sandbox)
assert "Read-only file system" in result.reason, (sandbox, result)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a file system below /usr")
def test_program_cannot_write_to_a_mount_below_a_bound_folder(jail):
    script = 'mount -t tmpfs -o mode=1777 tmpfs /usr/share/doc && exec "$@"'
    command = ("unshare", "--mount", "sh", "-c", script, "sh", sys.executable, "-c")
    subprocess.run(
        [*command, WRITE_TO_MOUNT, jail.kind],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )


def test_program_cannot_see_the_host(jail, monkeypatch):
    monkeypatch.setenv("QUANTKIT_TEST_SECRET", "leaked")
    source = (
        "import os\nseen = os.environ.get('QUANTKIT_TEST_SECRET')\nplaces = set(os.listdir('/'))"
    )
    assert run_one(source, jail, "assert seen is None").passed
    assert run_one(
        source, jail, "assert not places & {'home', 'root', 'etc', 'proc', 'var', 'sys'}, places"
    ).passed
    assert not run_one("open('/proc/1/environ').read()", jail).passed


def test_program_has_no_network(jail):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        result = run_one(
            f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=1)", jail
        )
    assert not result.passed
    assert "Error" in result.reason


def test_programs_are_isolated_from_each_other(jail):
    leave = Program(source="open('/tmp/left', 'w').write('x')", tests="pass")
    look = Program(source="import os\nleft = os.path.exists('/tmp/left')", tests="assert not left")
    assert all(result.passed for result in run_programs([leave, look, leave, look], jail, 2))


def test_results_keep_the_order_of_the_programs(jail):
    programs = [Program(source=f"x = {n}", tests=f"assert x % 2 == 0, {n}") for n in range(12)]
    assert [result.passed for result in run_programs(programs, jail, 2)] == [
        n % 2 == 0 for n in range(12)
    ]


def test_run_programs_refuses_without_a_sandbox(tmp_path):
    sandbox = probe_sandbox(search=str(tmp_path))
    assert sandbox.kind == "none"
    assert "bwrap is not installed" in sandbox.reason
    assert "unshare" in sandbox.reason
    with pytest.raises(EvaluationError, match="cannot be run safely on this machine"):
        run_programs([Program(source="pass", tests="pass")], sandbox)


def test_probe_skips_a_sandbox_that_fails(tmp_path):
    for name in ("unshare", "mount", "chroot", "setpriv", "sh"):
        tool = tmp_path / name
        tool.write_text("#!/bin/sh\necho refused by policy >&2\nexit 1\n")
        tool.chmod(0o755)
    tmp_path.chmod(0o755)
    assert probe_sandbox(search=str(tmp_path)).kind == "none"


# ------------------------------------------------------------------------------------------------
# positive control


def run_reference_solutions(
    task: str, solution: str, sandbox: Sandbox
) -> tuple[list[ProgramResult], list[ProgramResult]]:
    """Run every reference solution of a task, and 20 empty bodies."""
    (loaded,) = tasks.load_tasks([task], DATA)
    assert loaded.code is not None
    file = loaded.files["test"]
    lines = file.path.read_text(encoding="utf-8").splitlines()
    docs = [json.loads(line) for line in (lines[slice(*file.rows)] if file.rows else lines)]
    with TemplateWorker() as worker:
        right, empty = (
            [
                task_runner.build_program(worker, task, loaded.code, doc, completion)
                for doc, completion in answers
            ]
            for answers in (
                [(doc, doc[solution]) for doc in docs],
                [(doc, "    pass\n" if "prompt" in doc else "pass") for doc in docs[:20]],
            )
        )
    return run_programs(right, sandbox, loaded.code.seconds), run_programs(empty, sandbox, 2)


def require_sandbox() -> Sandbox:
    sandbox = probe_sandbox()
    if sandbox.kind == "none":
        pytest.skip(f"no sandbox: {sandbox.reason}")
    return sandbox


def test_reference_solutions_of_tiny_v3_pass():
    right, empty = run_reference_solutions("tiny-v3-code", "canonical_solution", require_sandbox())
    assert {result.reason for result in right} == {"passed"}
    assert len(right) == 100
    assert not any(result.passed for result in empty)


@pytest.mark.skipif(not (DATA / "humaneval").is_dir(), reason="HumanEval is not on this machine")
def test_reference_solutions_of_humaneval_pass():
    right, empty = run_reference_solutions("humaneval", "canonical_solution", require_sandbox())
    assert [result.reason for result in right if not result.passed] == []
    assert len(right) == 164
    assert not any(result.passed for result in empty)


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "mbpp").is_dir(), reason="MBPP is not on this machine")
def test_reference_solutions_of_mbpp_pass():
    right, empty = run_reference_solutions("mbpp", "code", require_sandbox())
    assert [result.reason for result in right if not result.passed] == []
    assert len(right) == 500
    assert not any(result.passed for result in empty)


def test_shipped_data_has_all_items():
    counts = {
        path.name: len(path.read_text().splitlines())
        for path in (package_data.locate_folder("evals") / "data").iterdir()
    }
    assert counts == {"tiny-v3-math.jsonl": 300, "tiny-v3-code.jsonl": 100}
