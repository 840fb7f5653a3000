"""Tests import the standard library alone, and of a program's modules those that it imports."""

from __future__ import annotations

import subprocess
import sys

import pytest

from quantkit.evaluate.sandbox import Program, Sandbox, run_programs

# a module of the standard library that nothing else in a jail imports
UNUSED = "colorsys"
TESTS = f"""
import sys
assert answer() == 42
if answer() == 0: {UNUSED}.rgb_to_hsv
assert "{UNUSED}" not in sys.modules, "imported"
"""


def judge(jail: Sandbox, source: str, tests: str) -> str:
    (result,) = run_programs([Program(source=source, tests=tests)], jail, 5)
    return result.reason


@pytest.mark.parametrize(
    "source",
    [
        f"import types\n{UNUSED} = types.ModuleType('{UNUSED}')",
        f"{UNUSED} = __import__('{UNUSED}')",
        f"""
import __main__
send = __main__.send_message
def forge(channel, message):
    if isinstance(message.get("value"), list) and message["value"][:1] != ["int"]:
        message["value"].append(["{UNUSED}", ["module", "{UNUSED}"]])
    send(channel, message)
__main__.send_message = forge""",
    ],
    ids=["made", "imported by a call", "claimed in a message"],
)
def test_tests_import_no_module_that_the_source_does_not_import(jail, source, record_property):
    record_property("fault", "module")
    reason = judge(jail, source + "\ndef answer(): return 42", TESTS)
    assert reason == "passed"


def test_tests_use_modules_that_the_source_imports(jail):
    source = f"""
import math, os.path
import {UNUSED} as {UNUSED}
import collections.abc as kinds
def answer(): return 42"""
    tests = f"""
assert math.isclose(answer(), 42) and os.path.join("a", "b") == "a/b"
assert {UNUSED}.rgb_to_hsv(0, 0, 0) == (0, 0, 0)
try: kinds
except NameError: pass
else: raise ValueError"""
    assert judge(jail, source, tests) == "passed"


def test_files_of_a_program_are_no_modules_of_its_tests(jail, record_property):
    names = ("math", "colorsys", "sitecustomize", "usercustomize", "json", "__main__")
    record_property("tried", len(names))
    source = f"""
import os, sys
os.environ.update(PYTHONPATH="/tmp", PYTHONSTARTUP="/tmp/math.py", PYTHONUSERBASE="/tmp")
sys.path.insert(0, "/tmp")
for name in {names!r}:
    with open("/tmp/" + name + ".py", "w") as file:
        file.write("planted = 1\\ndef isclose(*_): return True\\n")
import {", ".join(name for name in names if name != "__main__")}
def answer(): return 41"""
    tests = f"""
import os, sys
for name in {names!r}:
    try: module = __import__(name)
    except ImportError: continue
    assert not hasattr(module, "planted"), name
assert os.listdir("/tmp") == [] and "/tmp" not in sys.path
assert math.isclose(answer(), 42)"""
    assert judge(jail, source, tests).startswith("AssertionError")
    assert judge(jail, source, tests.replace("42", "41")) == "passed"


def test_no_jail_sees_the_hosts_packages(jail, record_property):
    record_property("fault", "packages")
    look = """
import glob, os, sys
folders = [folder for prefix in ("/usr", "/usr/local", sys.prefix, sys.base_prefix)
           for folder in glob.glob(prefix + "/lib*/python3*/*-packages")]
sys.path += folders
held = [name for folder in folders for name in os.listdir(folder)]
held += glob.glob("/usr/local/*")
"""
    assert judge(jail, look, "assert folders and not held, held") == "passed"
    assert judge(jail, "", f"{look}\nassert folders and not held, held") == "passed"
    for package in ("pip", "setuptools", "numpy", "quantkit"):
        assert judge(jail, look + f"import {package}", "pass").startswith("ModuleNotFoundError")


def test_isolated_interpreter_has_no_site():
    """The sandbox relies on it: -I and -S leave the standard library on the path."""
    command = [sys.executable, "-I", "-S", "-c", "import sys; print(*sys.path, sep='\\n')"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert lines
    assert not any("-packages" in line for line in lines)
