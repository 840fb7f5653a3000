"""The memory of a whole jail is limited by the kernel where it can be, and polled elsewhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from quantkit.evaluate.sandbox import Program, cgroup, limits, run_programs

MEMORY_BOMB = """
import os, time
for _ in range(12):
    if os.fork() == 0:
        held = [bytearray(b"x") * (1 << 20) for _ in range(500)]
        time.sleep(99)
time.sleep(99)"""


@pytest.fixture
def mount(tmp_path, monkeypatch) -> Path:
    """A folder that looks like a mounted cgroup v2, with this process in /user/app/own."""
    monkeypatch.setattr(cgroup, "REMOVE_SECONDS", 0.0)  # files of such a folder do not vanish
    group = tmp_path / "mount"
    for name, controllers in (
        ("", "cpu memory"),
        ("user", "memory pids"),
        ("app", ""),
        ("own", ""),
    ):
        group = group / name
        group.mkdir()
        (group / "cgroup.controllers").touch()
        (group / "cgroup.subtree_control").write_text(controllers)
    (tmp_path / "own").write_text("4:memory:/v1/is/ignored\n0::/user/app/own\n")
    return tmp_path / "mount"


def test_parent_is_the_nearest_group_with_a_memory_controller(mount):
    assert cgroup.find_parent(mount, mount.parent / "own") == mount / "user"
    (mount / "user" / "cgroup.subtree_control").write_text("cpu")
    assert cgroup.find_parent(mount, mount.parent / "own") == mount


def test_no_parent_without_a_memory_controller(mount):
    for group in (mount, mount / "user"):
        (group / "cgroup.subtree_control").write_text("cpu pids")
    assert "no group above" in str(cgroup.find_parent(mount, mount.parent / "own"))
    (mount / "cgroup.controllers").unlink()
    assert cgroup.find_parent(mount, mount.parent / "own") == "cgroup v2 is not mounted"


def test_no_parent_where_processes_cannot_be_moved(mount, monkeypatch):
    monkeypatch.setattr(cgroup, "_ENTER", "exit 1")
    assert "no group above" in str(cgroup.find_parent(mount, mount.parent / "own"))


def test_group_outside_the_mount_is_not_used(mount):
    (mount.parent / "own").write_text("0::/../../elsewhere\n")
    assert isinstance(cgroup.find_parent(mount, mount.parent / "own"), str)


def test_group_has_the_limits_of_a_jail(mount):
    with cgroup.make_group(mount) as group:
        written = {path.name: path.read_text() for path in group.iterdir()}
    assert written == {
        "memory.max": str(1 << 30),
        "memory.swap.max": "0",
        "memory.oom.group": "1",
        "pids.max": "24",
    }
    assert (group / "cgroup.kill").read_text() == "1"


def test_stale_groups_are_removed_and_others_stay(mount):
    stale, running = mount / "user" / "quantkit-4194305-ab", mount / "user" / "quantkit-1-ab"
    stale.mkdir()
    running.mkdir()
    cgroup.find_parent(mount, mount.parent / "own")
    assert (stale.exists(), running.exists()) == (False, True)


def test_exceeded_memory_is_read_from_the_groups_events(tmp_path):
    events = tmp_path / "memory.events"
    assert not cgroup.was_exceeded(tmp_path)
    events.write_text("low 0\nmax 12\noom 0\noom_kill 0\n")
    assert not cgroup.was_exceeded(tmp_path)
    events.write_text("low 0\nmax 12\noom 3\noom_kill 1\noom_group_kill 1\n")
    assert cgroup.was_exceeded(tmp_path)


def test_jail_in_a_group_is_judged_by_its_events(jail, mount, monkeypatch):
    grouped = replace(jail, memory="cgroup v2", group_parent=mount)
    monkeypatch.setattr(limits, "measure_memory", lambda pids: pytest.fail("memory is polled"))
    programs = [
        Program(source="import time\ntime.sleep(0.3)", tests="pass"),
        Program(source="import os\nos.kill(os.getpid(), 9)", tests="pass"),
    ]
    passed, killed = run_programs(programs, grouped, 2)
    assert (passed.reason, killed.reason) == ("passed", "killed by SIGKILL")
    monkeypatch.setattr(cgroup, "was_exceeded", lambda group: True)
    (killed,) = run_programs(programs[1:], grouped, 2)
    assert killed.reason == "used more than 1024 MiB of memory"


def test_probe_says_what_limits_memory(jail, record_property):
    record_property("fault", "memory of many processes")
    assert jail.memory == "cgroup v2" if jail.group_parent else jail.memory.startswith("polled: ")
    (result,) = run_programs([Program(source=MEMORY_BOMB, tests="pass")], jail, 5)
    assert result.reason == "used more than 1024 MiB of memory"


def test_page_tables_and_swap_count_as_memory(tmp_path, monkeypatch):
    status = "VmRSS:\t     100 kB\nVmPTE:\t      20 kB\nVmSwap:\t       3 kB\nVmData:\t 999 kB\n"
    read = Path.read_text
    monkeypatch.setattr(
        Path, "read_text", lambda path: status if path.name == "status" else read(path)
    )
    assert limits.measure_memory([1, 2]) == 2 * 123 << 10
