"""A list of allowed system calls as the kernel takes it (seccomp, classic BPF)."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

AUDIT_ARCHES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""Machine -> the kernel's AUDIT_ARCH_* number. The order is that of the numbers below."""

Numbers = tuple[int | None, int | None]
"""A call's number on x86_64 and on aarch64; None where the machine does not have the call."""

Rule = tuple[int, int, int, int]
"""struct sock_filter: code, instructions to skip if true, if false, operand."""

_EPERM, _ENOSYS = 1, 38
_ALLOW, _KILL, _ERRNO, _REPORT = 0x7FFF0000, 0x80000000, 0x00050000, 0x7FC00000
_LOAD, _AND, _RETURN = 0x20, 0x54, 0x06
_JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_SET = 0x15, 0x35, 0x45
# offsets in struct seccomp_data; both machines are little-endian
_NUMBER_AT, _MACHINE_AT, _ARGUMENTS_AT, _ARGUMENT_BYTES = 0, 4, 16, 8

SECCOMP_CALL = {"x86_64": 317, "aarch64": 277}
_CLONE3 = 435

FIRST_YOUNG_NUMBER = 424
"""From here on, Linux 5.1 and later number calls alike on all machines. x32's are larger."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ArgumentRule:
    """A call that depends on the low 32 bits of one argument, counted from 0.

    values: the argument must be one of them, if there are any. refused_bits: it may have none of
    these bits. refused_together: it may not have all of these bits.
    """

    name: str
    numbers: Numbers
    argument: int
    reason: str
    values: tuple[int, ...] = ()
    refused_bits: int = 0
    refused_together: int = 0


def build_filter(
    machine: str,
    allowed_calls: Iterable[Numbers],
    argument_rules: Iterable[ArgumentRule],
    *,
    report: bool = False,
) -> bytes:
    """Build the filter for a machine of AUDIT_ARCHES, 8 bytes per rule.

    allowed_calls: calls allowed whatever their arguments; argument_rules: at most one per call.
    report: refused calls go to the filter's listener, which answers them and knows their numbers.
    Calls with another machine's numbers (int 0x80 on x86_64) kill the process. clone3, whose flags
    a filter cannot read, fails with ENOSYS like every call from FIRST_YOUNG_NUMBER on that is not
    allowed; the C library then uses clone.
    """
    eperm, enosys = (_REPORT, _REPORT) if report else (_ERRNO | _EPERM, _ERRNO | _ENOSYS)
    column = list(AUDIT_ARCHES).index(machine)
    allowed = [numbers[column] for numbers in allowed_calls]
    rules: list[Rule] = [
        (_LOAD, 0, 0, _MACHINE_AT),
        (_JUMP_EQUAL, 1, 0, AUDIT_ARCHES[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER_AT),
    ]
    for allowed_number in sorted(number for number in allowed if number is not None):
        rules += [(_JUMP_EQUAL, 0, 1, allowed_number), (_RETURN, 0, 0, _ALLOW)]
    for argument_rule in argument_rules:
        number = argument_rule.numbers[column]
        if number is not None:
            checks = list(_check_argument(argument_rule, (_RETURN, 0, 0, eperm)))
            rules += [(_JUMP_EQUAL, 0, len(checks), number), *checks]
    rules += [
        # the C library tries it for each thread: nothing to report
        (_JUMP_EQUAL, 0, 1, _CLONE3),
        (_RETURN, 0, 0, _ERRNO | _ENOSYS),
        (_JUMP_AT_LEAST, 0, 1, FIRST_YOUNG_NUMBER),
        (_RETURN, 0, 0, enosys),
        (_RETURN, 0, 0, eperm),
    ]
    return b"".join(struct.pack("<HBBI", *rule) for rule in rules)


def _check_argument(rule: ArgumentRule, refuse: Rule) -> Iterator[Rule]:
    """Yield rules that allow or refuse a call by its argument; none continues after them."""
    load = (_LOAD, 0, 0, _ARGUMENTS_AT + _ARGUMENT_BYTES * rule.argument)
    yield load
    if rule.refused_bits:
        yield from ((_JUMP_SET, 0, 1, rule.refused_bits), refuse)
    if rule.refused_together:
        yield (_AND, 0, 0, rule.refused_together)
        yield from ((_JUMP_EQUAL, 0, 1, rule.refused_together), refuse)
    for value in rule.values:
        yield from ((_JUMP_EQUAL, 0, 1, value), (_RETURN, 0, 0, _ALLOW))
    yield refuse if rule.values else (_RETURN, 0, 0, _ALLOW)
