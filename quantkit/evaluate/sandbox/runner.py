"""Code that runs inside the two jails of one generated program.

Its text is passed to the jails' own Python.

The program has a jail to itself and answers requests on a socket. Its tests run in a second jail,
which alone holds the random sentinel and reports to the host; the program's values arrive there as
plain data and are rebuilt. So the program never shares a process, a file or a process list with its
judge: patching the checker, walking its objects or printing a forged report affects only the
program's own jail.

Standard library only, Python 3.8 or later.
"""

from __future__ import annotations

import _thread
import ast
import builtins
import collections
import ctypes
import decimal
import errno
import fcntl
import fractions
import importlib
import json
import operator
import os
import resource
import signal
import struct
import sys
import types
from collections.abc import Callable, Container
from typing import Any

PREFIX_BYTES = 10
MAX_REFUSALS = 8  # names of refused calls in a report
MAX_MESSAGE_BYTES = 1 << 23

# tag -> type; the parts of each are an iterable of values
_SEQUENCES: dict[str, Any] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "deque": collections.deque,
}
# tag -> type; each is rebuilt from its `str`
_TEXTS: dict[str, Any] = {
    "complex": complex,
    "decimal": decimal.Decimal,
    "fraction": fractions.Fraction,
}
# operations of a test on an object that is not plain data
_OPERATIONS: dict[str, Any] = {
    "call": lambda thing, *args, **kwargs: thing(*args, **kwargs),
    "get": getattr,
    "set": setattr,
    "iter": iter,
    "next": next,
    "len": len,
    "truth": bool,
    "item": operator.getitem,
}

_PIDFD_OPEN, _PIDFD_GETFD = 434, 438  # on every machine
# SECCOMP_IOCTL_NOTIF_RECV and _SEND with struct seccomp_notif and seccomp_notif_resp
_RECEIVE, _SEND = 0xC0502100, 0xC0182101
_NOTIFICATION, _RESPONSE = struct.Struct("<QIIiI7Q"), struct.Struct("<QqiI")


class SockFprog(ctypes.Structure):
    """struct sock_fprog: instructions and their number."""

    _fields_ = [("length", ctypes.c_ushort), ("rules", ctypes.c_char_p)]


def send_message(channel: int, message: dict[str, Any]) -> None:
    """Send one JSON object: ten decimal digits of length, then that many bytes."""
    text = json.dumps(message).encode()
    unsent = memoryview(b"%010d" % len(text) + text)
    while unsent:
        unsent = unsent[os.write(channel, unsent) :]


def receive_message(channel: int) -> dict[str, Any]:
    """Receive one JSON object.

    Raises EOFError if the other side is gone, ValueError for any other data.
    """
    size = int(read_exactly(channel, PREFIX_BYTES))
    if not 0 <= size <= MAX_MESSAGE_BYTES:
        raise ValueError(f"a message of {size} bytes, at most {MAX_MESSAGE_BYTES} are accepted")
    message = json.loads(read_exactly(channel, size))
    if not isinstance(message, dict):
        # bad data, not a bad argument
        raise ValueError("a message that is not an object")  # noqa: TRY004
    return message


def read_exactly(channel: int, size: int) -> bytes:
    """Read exactly `size` bytes. Raises EOFError if the other side is gone before."""
    parts = []
    while size:
        part = os.read(channel, min(size, 1 << 20))
        if not part:
            raise EOFError("the other side is gone")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def encode_value(value: Any, encode_object: Callable[[Any], Any]) -> Any:
    """Encode plain data as JSON; subclasses become their base.

    `encode_object` encodes anything else.
    """
    if value is None or isinstance(value, (bool, float, str)):
        return value
    if isinstance(value, int):
        return ["int", hex(value)]  # decimal digits of a huge int take long, and Python limits them
    if isinstance(value, (bytes, bytearray)):
        return ["bytes", value.hex()]
    if isinstance(value, dict):
        items = [[encode_value(part, encode_object) for part in pair] for pair in dict.items(value)]
        return ["dict", *items]
    for tag, kind in _SEQUENCES.items():
        if isinstance(value, kind):
            return [tag, *([encode_value(item, encode_object) for item in kind.__iter__(value)])]
    for tag, kind in _TEXTS.items():
        if isinstance(value, kind):
            return [tag, str(value)]
    return encode_object(value)


def decode_value(parts: Any, decode_object: Callable[[Any], Any]) -> Any:
    """Decode the result of `encode_value`; `decode_object` decodes other than plain data."""
    if not isinstance(parts, list):
        return parts
    tag, rest = parts[0], parts[1:]
    if tag == "int":
        return int(rest[0], 16)
    if tag == "bytes":
        return bytes.fromhex(rest[0])
    if tag == "dict":
        return {
            decode_value(key, decode_object): decode_value(item, decode_object)
            for key, item in rest
        }
    if tag in _SEQUENCES:
        return _SEQUENCES[tag](decode_value(item, decode_object) for item in rest)
    if tag in _TEXTS:
        return _TEXTS[tag](rest[0])
    return decode_object(parts)


def format_exception(error: BaseException) -> str:
    """Return "ValueError: text", at most 200 characters."""
    return ("%s: %s" % (type(error).__name__, error))[:200]  # noqa: UP031  # error may format badly


def set_limits(limits: dict[str, Any]) -> None:
    """Limit the resources of this process and its children; hard limits cannot be raised again."""
    cpu = limits["cpu_seconds"]
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))
    for name in ("AS", "NPROC", "FSIZE", "NOFILE", "CORE", "MSGQUEUE", "MEMLOCK", "SIGPENDING"):
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (limits[name], limits[name]))


def install_seccomp_filter(rules: bytes) -> None:
    """Install a system-call filter (struct sock_filter[]) for this process and its children."""
    libc = ctypes.CDLL(None, use_errno=True)
    program = SockFprog(len(rules) // 8, rules)
    # PR_SET_NO_NEW_PRIVS, then PR_SET_SECCOMP with SECCOMP_MODE_FILTER
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, ctypes.byref(program), 0, 0):
        raise OSError(ctypes.get_errno(), "no system-call filter")


def install_reporting_filter(job: dict[str, Any], ready: int, go: int) -> None:
    """Install a filter whose refused calls the parent answers, or else the one without reports.

    The parent takes the listener out of this process (see `take_listener`), which then closes its
    own copy. Calls that reach no listener fail with ENOSYS.
    """
    rules, libc = bytes.fromhex(job["reporting_filter"]), ctypes.CDLL(None, use_errno=True)
    program = SockFprog(len(rules) // 8, rules)
    libc.prctl(38, 1, 0, 0, 0)
    # SECCOMP_SET_MODE_FILTER with SECCOMP_FILTER_FLAG_NEW_LISTENER
    listener = libc.syscall(ctypes.c_long(job["seccomp_call"]), 1, 8, ctypes.byref(program))
    if listener < 0:  # an old kernel, or there is a listener outside the jail
        install_seccomp_filter(bytes.fromhex(job["filter"]))
        return
    os.write(ready, b"%010d" % listener)
    os.read(go, 1)
    os.close(listener)


def take_listener(child: int, ready: int, go: int) -> int:
    """Take the listener of the child's filter; -1 if there is none, or the kernel refuses."""
    try:
        number = int(read_exactly(ready, PREFIX_BYTES))
    except EOFError:
        return -1
    libc = ctypes.CDLL(None)
    process = libc.syscall(ctypes.c_long(_PIDFD_OPEN), child, 0)
    listener = int(libc.syscall(ctypes.c_long(_PIDFD_GETFD), process, number, 0))
    os.write(go, b"1")
    return listener


def report_refusals(listener: int, job: dict[str, Any], report_fd: int) -> None:
    """Refuse each call that reaches the listener, and report its name once."""
    names: set[str] = set()
    while True:
        notification = bytearray(_NOTIFICATION.size)
        try:
            fcntl.ioctl(listener, _RECEIVE, notification)
            call, _, _, number, *_ = _NOTIFICATION.unpack(notification)
            name = job["names"].get(str(number), "system call %d" % number)  # noqa: UP031
            if name not in names and len(names) < MAX_REFUSALS:
                names.add(name)
                write_report(report_fd, {"refused": ", ".join(sorted(names))})
            error = errno.EPERM if 0 <= number < job["first_young"] else errno.ENOSYS
            fcntl.ioctl(listener, _SEND, _RESPONSE.pack(call, 0, -error, 0))
        except (InterruptedError, FileNotFoundError):  # a signal ended the call, or the caller
            continue
        except OSError:  # without a listener, calls fail instead of waiting for it
            os.close(listener)
            return


def write_report(report_fd: int, report: dict[str, Any]) -> None:
    """Write a line of the report to the host; later lines add to earlier ones."""
    os.write(report_fd, json.dumps(report).encode() + b"\n")


def serve_program(channel: int) -> None:
    """Serve requests of the tests: load the program, then operate on its objects."""
    objects: list[Any] = []
    numbers: dict[int, int] = {}
    module = types.ModuleType("program")
    sys.modules["program"] = module  # dataclasses and pickle look their module up by name

    def encode_object(thing: Any) -> list[Any]:
        if isinstance(thing, types.ModuleType):
            return ["module", thing.__name__]
        if id(thing) not in numbers:  # all objects are kept, so that ids stay unique
            numbers[id(thing)] = len(objects)
            objects.append(thing)
        return ["remote", numbers[id(thing)]]

    def decode_object(parts: Any) -> Any:
        return objects[parts[1]]

    while True:
        request = receive_message(channel)
        try:
            if "source" in request:
                exec(compile(request["source"], "program.py", "exec"), module.__dict__)
                names = [name for name in request["names"] if name in module.__dict__]
                value: Any = [
                    [name, encode_value(module.__dict__[name], encode_object)] for name in names
                ]
            else:
                args = [decode_value(part, decode_object) for part in request["args"]]
                kwargs = {
                    name: decode_value(part, decode_object)
                    for name, part in request["kwargs"].items()
                }
                value = encode_value(_OPERATIONS[request["do"]](*args, **kwargs), encode_object)
            response = {"value": value}
        except BaseException as error:  # noqa: BLE001  # SystemExit is a response here, not a fault
            response = {"error": [type(error).__name__, str(error)[:200]]}
        send_message(channel, response)


def run_program(channel: int, job: dict[str, Any], report_fd: int) -> None:
    """Serve in a child process, so that the first process of the jail outlives every limit.

    It also answers the calls that the filter refuses, and reports them by name.
    """
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(report_fd)
            set_limits(job)
            install_reporting_filter(job, ready[1], go[0])
            for end in (*ready, *go):
                os.close(end)
            serve_program(channel)
        # nothing may return into the first process's code
        except BaseException as error:  # noqa: BLE001
            send_message(channel, {"error": [type(error).__name__, str(error)[:200]]})
        finally:
            os._exit(0)
    for end in (channel, ready[1], go[0]):
        os.close(end)
    listener = take_listener(child, ready[0], go[1])
    if listener >= 0:
        _thread.start_new_thread(report_refusals, (listener, job, report_fd))
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        write_report(report_fd, {"error": "killed by " + signal.Signals(os.WTERMSIG(status)).name})


class ProgramGone(Exception):
    """The program no longer responds, or responds with something that is not a message."""


class RemoteObject:
    """An object of the program that is not plain data.

    It equals only itself, whatever its class says.
    """

    def __init__(self, channel: int, number: int) -> None:
        self.__dict__.update(_channel=channel, _number=number)

    def _do(
        self,
        operation: str,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        request = {
            "do": operation,
            "args": [encode_value(arg, encode_reference) for arg in (self, *args)],
            "kwargs": {
                name: encode_value(arg, encode_reference) for name, arg in (kwargs or {}).items()
            },
        }
        return send_request(self._channel, request)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._do("call", args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._do("get", (name,))

    def __setattr__(self, name: str, value: Any) -> None:
        self._do("set", (name, value))

    def __iter__(self) -> Any:
        iterator = self._do("iter")
        return iterator if isinstance(iterator, RemoteObject) else iter(iterator)

    def __next__(self) -> Any:
        try:
            return self._do("next")
        except IterationEnded:
            raise StopIteration from None

    def __len__(self) -> int:
        return int(self._do("len"))

    def __bool__(self) -> bool:
        return bool(self._do("truth"))

    def __getitem__(self, key: Any) -> Any:
        return self._do("item", (key,))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemoteObject) and other._number == self._number

    def __hash__(self) -> int:
        return hash(self._number)


class IterationEnded(RuntimeError):
    """The program's StopIteration, which would silently end a loop of the tests."""


def encode_reference(thing: Any) -> list[Any]:
    """Encode an argument that is not plain data."""
    if isinstance(thing, RemoteObject):
        return ["remote", thing._number]
    raise TypeError(f"a test cannot pass a {type(thing).__name__} to the program")


def send_request(
    channel: int, message: dict[str, Any], decode: Callable[[Any, Any], Any] = decode_value
) -> Any:
    """Send a request to the program and return its response as a value.

    The program's exception is raised here, as the built-in class of its name or as a new class.
    """
    try:
        send_message(channel, message)
        response = receive_message(channel)
        if "error" not in response:
            return decode(response["value"], lambda parts: RemoteObject(channel, int(parts[1])))
        name, text = (str(part)[:200] for part in response["error"])
    except (OSError, EOFError) as error:
        raise ProgramGone("ended before its tests finished") from error
    except (ValueError, TypeError, LookupError) as error:
        raise ProgramGone("answered with no message: " + format_exception(error)) from error
    if name in ("StopIteration", "StopAsyncIteration", "GeneratorExit"):
        raise IterationEnded(text)
    kind = getattr(builtins, name, None)
    if not (isinstance(kind, type) and issubclass(kind, BaseException) and "Unicode" not in name):
        kind = type(name or "Exception", (Exception,), {})
    raise kind(text) if text else kind()


def find_imports(source: str) -> set[str]:
    """Return the modules that a source binds to their own top-level names (`import os.path`)."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # its own jail reports it
        return set()
    aliases = [
        alias for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    ]
    return {alias.name.split(".")[0] for alias in aliases if alias.asname in (None, alias.name)}


def decode_namespace(
    items: Any, decode_object: Callable[[Any], Any], imports: Container[str]
) -> dict[str, Any]:
    """Decode names of the program's module.

    A module is imported here, if it is one of `imports` under its own name.
    """
    namespace = {}
    for name, parts in items:
        if parts == ["module", name]:
            if name in imports:
                namespace[name] = importlib.import_module(name)
        elif not (isinstance(parts, list) and parts[0] == "module"):
            namespace[name] = decode_value(parts, decode_object)
    return namespace


def select_names(tests: ast.Module, namespace: dict[str, Any]) -> dict[str, Any]:
    """Return the names of the program that the tests get.

    Names that Python itself defines (built-in names, and standard modules whose attributes the
    tests use) are the program's only if the tests use no other name of the program: a program
    called `sum` is judged, one that also makes `abs` return 0 gains nothing.
    """
    names = {node.id for node in ast.walk(tests) if isinstance(node, ast.Name)}
    owners = [node.value for node in ast.walk(tests) if isinstance(node, ast.Attribute)]
    standard = {node.id for node in owners if isinstance(node, ast.Name)}
    standard &= set(getattr(sys, "stdlib_module_names", sys.builtin_module_names))
    standard |= set(dir(builtins))
    used = {name: thing for name, thing in namespace.items() if name in names}
    modules = {name: thing for name, thing in used.items() if isinstance(thing, types.ModuleType)}
    own = {
        name: thing for name, thing in used.items() if name not in standard and name not in modules
    }
    return {**modules, **(own or used)}


def run_tests(channel: int, job: dict[str, Any]) -> dict[str, Any]:
    """Run the tests on the program; return the sentinel, or what went wrong."""
    try:
        tests = ast.parse(job["tests"], "tests.py")
        names = sorted({node.id for node in ast.walk(tests) if isinstance(node, ast.Name)})
        request = {"source": job["source"], "names": names}
        imports = find_imports(job["source"]).intersection(names)
        namespace = send_request(
            channel,
            request,
            lambda items, decode_object: decode_namespace(items, decode_object, imports),
        )
        test_globals = {"__name__": "program", **select_names(tests, namespace)}
        exec(compile(tests, "tests.py", "exec"), test_globals)
    except ProgramGone as error:
        return {"gone": str(error)}
    # SystemExit and MemoryError are verdicts here, not faults
    except BaseException as error:  # noqa: BLE001
        return {"error": format_exception(error)}
    return {"sentinel": job["sentinel"], "python": sys.version.split()[0]}


def main() -> None:
    """Run a role: job as JSON from standard input, report to standard output."""
    role, inherited = sys.argv[1], int(sys.argv[2])
    job = json.loads(sys.stdin.buffer.read())
    report_fd = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.close(null)
    channel = os.dup(inherited)  # a low number: the parent may have thousands of open files
    os.close(inherited)
    if role == "program":
        run_program(channel, job, report_fd)
    else:
        set_limits(job)
        install_seccomp_filter(bytes.fromhex(job["filter"]))
        write_report(report_fd, run_tests(channel, job))


if __name__ == "__main__":
    main()
