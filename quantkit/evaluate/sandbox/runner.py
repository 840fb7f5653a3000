"""What runs inside the two jails of one generated program; its text is handed to the jails' own Python.

The program has a jail to itself and answers requests on a socket. Its tests run in a second jail, which alone holds
the random sentinel and reports to the host; what the program hands them arrives as plain data and is built anew
there. So the program never shares a process, a file or a process list with what judges it: patching the checker,
walking its objects or printing what it would print reaches only the program's own jail.

Standard library only, Python 3.8 or later.
"""

from __future__ import annotations

import ast
import builtins
import collections
import decimal
import fractions
import importlib
import json
import operator
import os
import resource
import signal
import sys
import types
from collections.abc import Callable
from typing import Any

PREFIX_BYTES = 10
MOST_BYTES = 1 << 23  # of one message

# tag -> type; the parts of each are an iterable of values
_SEQUENCES: dict[str, Any] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "deque": collections.deque,
}
# tag -> type; each is made from the text that its `str` gives
_TEXTS: dict[str, Any] = {
    "complex": complex,
    "decimal": decimal.Decimal,
    "fraction": fractions.Fraction,
}
# what a test may do with an object that is no plain data
_OPERATIONS: dict[str, Any] = {
    "call": lambda thing, *args, **named: thing(*args, **named),
    "get": getattr, "set": setattr, "iter": iter, "next": next, "len": len, "truth": bool, "item": operator.getitem,
}  # fmt: skip


def send(channel: int, message: dict[str, Any]) -> None:
    """One JSON object: ten decimal digits of length, then that many bytes."""
    text = json.dumps(message).encode()
    left = memoryview(b"%010d" % len(text) + text)
    while left:
        left = left[os.write(channel, left) :]


def receive(channel: int) -> dict[str, Any]:
    """One JSON object; EOFError when the other side has gone, ValueError when it sends something else."""
    size = int(read_exactly(channel, PREFIX_BYTES))
    if not 0 <= size <= MOST_BYTES:
        raise ValueError(f"a message of {size} bytes, at most {MOST_BYTES} are taken")
    message = json.loads(read_exactly(channel, size))
    if not isinstance(message, dict):
        raise ValueError("a message that is no object")  # noqa: TRY004  # bad data, not a bad argument
    return message


def read_exactly(channel: int, size: int) -> bytes:
    """Exactly `size` bytes; fewer mean that the other side has gone."""
    parts = []
    while size:
        part = os.read(channel, min(size, 1 << 20))
        if not part:
            raise EOFError("the other side has gone")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def encode(value: Any, refer: Callable[[Any], Any]) -> Any:
    """Plain data as JSON; subclasses become their base. `refer` makes the parts for anything else."""
    if value is None or isinstance(value, (bool, float, str)):
        return value
    if isinstance(value, int):
        return ["int", hex(value)]  # decimal digits of a huge one take long, and Python limits them
    if isinstance(value, (bytes, bytearray)):
        return ["bytes", value.hex()]
    if isinstance(value, dict):
        return [
            "dict",
            *([[encode(key, refer), encode(item, refer)] for key, item in dict.items(value)]),
        ]
    for tag, kind in _SEQUENCES.items():
        if isinstance(value, kind):
            return [tag, *([encode(item, refer) for item in kind.__iter__(value)])]
    for tag, kind in _TEXTS.items():
        if isinstance(value, kind):
            return [tag, str(value)]
    return refer(value)


def decode(parts: Any, resolve: Callable[[Any], Any]) -> Any:
    """The value behind `encode`; `resolve` takes the parts of what is no plain data."""
    if not isinstance(parts, list):
        return parts
    tag, rest = parts[0], parts[1:]
    if tag == "int":
        return int(rest[0], 16)
    if tag == "bytes":
        return bytes.fromhex(rest[0])
    if tag == "dict":
        return {decode(key, resolve): decode(item, resolve) for key, item in rest}
    if tag in _SEQUENCES:
        return _SEQUENCES[tag](decode(item, resolve) for item in rest)
    if tag in _TEXTS:
        return _TEXTS[tag](rest[0])
    return resolve(parts)


def told(error: BaseException) -> str:
    """ "ValueError: text", short."""
    return ("%s: %s" % (type(error).__name__, error))[:200]  # noqa: UP031  # error may format badly


def limit(limits: dict[str, Any]) -> None:
    """Bound what this process and its children may use; the hard limits cannot be raised again."""
    cpu = limits["cpu_seconds"]
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))
    for name in ("AS", "NPROC", "FSIZE", "NOFILE", "CORE", "MSGQUEUE", "MEMLOCK", "SIGPENDING"):
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (limits[name], limits[name]))


def refuse(rules: bytes) -> None:
    """Install a system-call filter (struct sock_filter[]) for this process and its children."""
    import ctypes

    class Code(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("rules", ctypes.c_char_p)]

    libc = ctypes.CDLL(None, use_errno=True)
    code = Code(len(rules) // 8, rules)
    # PR_SET_NO_NEW_PRIVS, then PR_SET_SECCOMP with SECCOMP_MODE_FILTER
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, ctypes.byref(code), 0, 0):
        raise OSError(ctypes.get_errno(), "no system-call filter")


def serve(channel: int) -> None:
    """Load the program when asked to, then do with its objects what its tests ask for."""
    things: list[Any] = []
    numbers: dict[int, int] = {}
    module = types.ModuleType("program")
    sys.modules["program"] = module  # dataclasses and pickle look their module up by name

    def refer(thing: Any) -> list[Any]:
        if isinstance(thing, types.ModuleType):
            return ["module", thing.__name__]
        if id(thing) not in numbers:  # all are kept, so that ids stay unique
            numbers[id(thing)] = len(things)
            things.append(thing)
        return ["remote", numbers[id(thing)]]

    def resolve(parts: Any) -> Any:
        return things[parts[1]]

    while True:
        wanted = receive(channel)
        try:
            if "source" in wanted:
                exec(compile(wanted["source"], "program.py", "exec"), module.__dict__)
                names = [name for name in wanted["names"] if name in module.__dict__]
                value: Any = [[name, encode(module.__dict__[name], refer)] for name in names]
            else:
                args = [decode(part, resolve) for part in wanted["args"]]
                named = {name: decode(part, resolve) for name, part in wanted["named"].items()}
                value = encode(_OPERATIONS[wanted["do"]](*args, **named), refer)
            answer = {"value": value}
        except BaseException as error:  # noqa: BLE001  # SystemExit is an answer here, not a fault
            answer = {"error": [type(error).__name__, str(error)[:200]]}
        send(channel, answer)


def program(channel: int, job: dict[str, Any], report: int) -> None:
    """Serve in a process of its own, so that the first process of the jail outlives every limit."""
    child = os.fork()
    if child == 0:
        try:
            os.close(report)
            limit(job)
            refuse(bytes.fromhex(job["filter"]))
            serve(channel)
        except BaseException as error:  # noqa: BLE001  # nothing may return into the first process's code
            send(channel, {"error": [type(error).__name__, str(error)[:200]]})
        finally:
            os._exit(0)
    os.close(channel)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        os.write(
            report,
            json.dumps({"error": "killed by " + signal.Signals(os.WTERMSIG(status)).name}).encode(),
        )


class Gone(Exception):
    """The program no longer answers, or answers with what is no message."""


class Remote:
    """Something of the program's that is no plain data; it equals itself alone, whatever its own class says."""

    def __init__(self, channel: int, number: int) -> None:
        self.__dict__.update(_channel=channel, _number=number)

    def _do(
        self, what: str, args: tuple[Any, ...] = (), named: dict[str, Any] | None = None
    ) -> Any:
        given = {name: encode(arg, referred) for name, arg in (named or {}).items()}
        return ask(
            self._channel,
            {"do": what, "args": [encode(arg, referred) for arg in (self, *args)], "named": given},
        )

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self._do("call", args, named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._do("get", (name,))

    def __setattr__(self, name: str, value: Any) -> None:
        self._do("set", (name, value))

    def __iter__(self) -> Any:
        made = self._do("iter")
        return made if isinstance(made, Remote) else iter(made)

    def __next__(self) -> Any:
        try:
            return self._do("next")
        except Ended:
            raise StopIteration from None

    def __len__(self) -> int:
        return int(self._do("len"))

    def __bool__(self) -> bool:
        return bool(self._do("truth"))

    def __getitem__(self, key: Any) -> Any:
        return self._do("item", (key,))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remote) and other._number == self._number

    def __hash__(self) -> int:
        return hash(self._number)


class Ended(RuntimeError):
    """The program's StopIteration: as such it would end a loop of the tests unseen."""


def referred(thing: Any) -> list[Any]:
    """Parts of an argument that is no plain data."""
    if isinstance(thing, Remote):
        return ["remote", thing._number]
    raise TypeError(f"a test cannot hand a {type(thing).__name__} to the program")


def ask(channel: int, message: dict[str, Any], values: Callable[[Any, Any], Any] = decode) -> Any:
    """The program's answer as a value; its exception is raised here, by the name of a built-in one or a new one."""
    try:
        send(channel, message)
        answer = receive(channel)
        if "error" not in answer:
            return values(answer["value"], lambda parts: Remote(channel, int(parts[1])))
        name, text = (str(part)[:200] for part in answer["error"])
    except (OSError, EOFError) as error:
        raise Gone("ended before its tests finished") from error
    except (ValueError, TypeError, LookupError) as error:
        raise Gone("answered with no message: " + told(error)) from error
    if name in ("StopIteration", "StopAsyncIteration", "GeneratorExit"):
        raise Ended(text)
    kind = getattr(builtins, name, None)
    if not (isinstance(kind, type) and issubclass(kind, BaseException) and "Unicode" not in name):
        kind = type(name or "Exception", (Exception,), {})
    raise kind(text) if text else kind()


def ported(found: Any, resolve: Callable[[Any], Any]) -> dict[str, Any]:
    """Names of the program's module and what they stand for; a module only under its own name, and made here."""
    known = {}
    for name, parts in found:
        if parts == ["module", name]:
            known[name] = importlib.import_module(name)
        elif not (isinstance(parts, list) and parts[0] == "module"):
            known[name] = decode(parts, resolve)
    return known


def wanted(tests: ast.Module, known: dict[str, Any]) -> dict[str, Any]:
    """What tests find under the program's names.

    Names that Python itself gives a meaning (built-in ones, and standard modules that the tests look into) are the
    program's only where the tests use no other of its names: a program called `sum` is judged, one that makes `abs`
    return 0 beside its answer gains nothing.
    """
    names = {node.id for node in ast.walk(tests) if isinstance(node, ast.Name)}
    inner = [node.value for node in ast.walk(tests) if isinstance(node, ast.Attribute)]
    standard = {node.id for node in inner if isinstance(node, ast.Name)}
    standard &= set(getattr(sys, "stdlib_module_names", sys.builtin_module_names))
    standard |= set(dir(builtins))
    found = {name: thing for name, thing in known.items() if name in names}
    modules = {name: thing for name, thing in found.items() if isinstance(thing, types.ModuleType)}
    own = {
        name: thing for name, thing in found.items() if name not in standard and name not in modules
    }
    return {**modules, **(own or found)}


def judge(channel: int, job: dict[str, Any]) -> dict[str, Any]:
    """Run the tests on the program; the sentinel, or what went wrong."""
    try:
        tests = ast.parse(job["tests"], "tests.py")
        names = sorted({node.id for node in ast.walk(tests) if isinstance(node, ast.Name)})
        known = ask(channel, {"source": job["source"], "names": names}, ported)
        exec(compile(tests, "tests.py", "exec"), {"__name__": "program", **wanted(tests, known)})
    except Gone as error:
        return {"gone": str(error)}
    except BaseException as error:  # noqa: BLE001  # SystemExit and MemoryError are verdicts here, not faults
        return {"error": told(error)}
    return {"sentinel": job["sentinel"], "python": sys.version.split()[0]}


def main() -> None:
    """python -c TEXT program|tests FD, with the job as JSON on standard input; the report goes to standard output."""
    role, channel = sys.argv[1], int(sys.argv[2])
    with os.fdopen(os.dup(0), "rb") as given:
        job = json.loads(given.read())
    report = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.close(null)
    if role == "program":
        program(channel, job, report)
    else:
        limit(job)
        refuse(bytes.fromhex(job["filter"]))
        os.write(report, json.dumps(judge(channel, job)).encode())


if __name__ == "__main__":
    main()
