"""Sandbox for generated Python programs.

`probe_sandbox` finds a sandbox that works on this machine, `run_programs` runs programs in it and
judges each by its tests. `execution` describes how programs are confined.
"""

from quantkit.evaluate.sandbox.execution import (
    Program,
    ProgramResult,
    Sandbox,
    SandboxKind,
    probe_sandbox,
    run_programs,
)

__all__ = [
    "Program",
    "ProgramResult",
    "Sandbox",
    "SandboxKind",
    "probe_sandbox",
    "run_programs",
]
