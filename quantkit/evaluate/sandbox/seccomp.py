"""The filter of the system calls that a jailed program may make."""

from __future__ import annotations

from quantkit.evaluate.sandbox.syscalls import ALLOWED_GROUPS, ARGUMENT_RULES
from quantkit.io import seccomp


def build_filter(machine: str, report: bool = False) -> bytes:
    """Build the filter for a machine of AUDIT_ARCHES, as io.seccomp.build_filter does."""
    allowed = [numbers for group in ALLOWED_GROUPS for numbers in group.numbers.values()]
    return seccomp.build_filter(machine, allowed, ARGUMENT_RULES, report=report)
