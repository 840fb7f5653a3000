"""Programs that try to leave the sandbox, or to pass tests that they fail.

A program must not pass WRONG, and its result must contain one of `reason` (any if empty). A program
that can report its refusals has `tests` that check the report, and must pass them.
"""

from __future__ import annotations

from dataclasses import dataclass

WRONG = "assert answer() == 42, 'wrong'"  # no program here answers 42

_TRY = """
import os
def is_refused(action, *args):
    try:
        action(*args)
    except (OSError, MemoryError):
        return True
    return False
"""
_CALL = (
    _TRY
    + """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *args):
    return libc.syscall(number, *args) < 0
"""
)


@dataclass(frozen=True, kw_only=True)
class Hostile:
    """One program; without `tests` it must fail WRONG. `slow`: the wall clock ends it."""

    name: str
    source: str
    reason: tuple[str, ...] = ()
    tests: str | None = None
    slow: bool = False


def fails(name: str, source: str, *reason: str, slow: bool = False) -> Hostile:
    """Return a program that must be killed, or fail its tests, for one of these reasons."""
    return Hostile(name=name, source=source, reason=reason, slow=slow)


def make_refusal(name: str, source: str, tests: str) -> Hostile:
    """Return a program that reports its refusals."""
    return Hostile(name=name, source=source, tests=tests)


CPU, WALL, ENDED = (
    "used more than 1 s of processor time",
    "ran longer than 8 s",
    "ended before its tests finished",
)
MEMORY = "used more than 1024 MiB of memory"

RESOURCES = (
    fails("fork bomb", "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass", CPU,
          WALL,
          slow=True),
    fails("thread bomb",
          "from threading import Thread\nfrom time import sleep\n"
          "while True: Thread(target=sleep, args=(99,)).start()",
          "can't start new thread"),
    fails("memory bomb of one process", "x = []\nwhile True: x.append(bytearray(1 << 26))",
          "MemoryError"),
    fails("memory bomb of many processes", """
import os, time
for _ in range(12):
    if os.fork() == 0:
        x = [bytearray(b"x") * (1 << 20) for _ in range(500)]
        time.sleep(99)
time.sleep(99)""", MEMORY),
    fails("memory bomb of shared pages", """
import mmap, os, time
for _ in range(12):
    if os.fork() == 0:
        held = mmap.mmap(-1, 500 << 20)
        for page in range(0, 500 << 20, 4096): held[page] = 1
        time.sleep(99)
time.sleep(99)""", "Operation not permitted"),
    make_refusal("memory outside any process", _CALL + """
memory_file = call(319, b"x", 0) if os.uname().machine == "x86_64" else call(279, b"x", 0)
try:
    segment = libc.shmget(0, 1 << 30, 0o1600) < 0
    queue = libc.msgget(0, 0o1600) < 0
except AttributeError:
    segment = queue = True""", "assert memory_file and segment and queue"),
    fails("flood of standard output", "while True: print('x' * 65536)", CPU, WALL, slow=True),
    fails("flood of standard error", "import sys\nwhile True: sys.stderr.write('x' * 65536)", CPU,
          WALL, slow=True),
    fails("flood of every descriptor", """
import os
for fd in range(1024):
    try: os.set_blocking(fd, False)
    except OSError: pass
while True:
    for fd in range(1024):
        try: os.write(fd, b"x" * 65536)
        except OSError: pass""", "answered with no message", CPU),
    fails("flood of a result", "def answer(): return 'x' * (200 << 20)", "answered with no message",
          "MemoryError"),
    fails("endless result", "def answer():\n    while True: yield 1\n",  "wrong"),
    fails("nested result",
          "def answer():\n    x = []\n    for _ in range(100000): x = [x]\n    return x",
          "Recursion"),
    fails("doubling result",
          "def answer():\n    x = [1]\n    for _ in range(60): x = [x, x]\n    return x",
          CPU, "MemoryError", slow=True),
    fails("huge integer", "x = 10 ** 10 ** 10", CPU, "MemoryError", slow=True),
    fails("huge integer as a result", "def answer(): return 1 << (1 << 28)", "no message",
          "MemoryError"),
    fails("endless recursion", "def f(): f()\nf()", "RecursionError"),
    fails("recursion without a limit",
          "import sys\nsys.setrecursionlimit(1 << 30)\ndef f(x): return [f([x])]\nf(1)",
          "killed by SIGSEGV", "MemoryError", "RecursionError", CPU, slow=True),
    fails("endless loop", "while True: pass", CPU, slow=True),
    fails("endless loop in C", "import re\nre.match('(a+)+b', 'a' * 99)", CPU, slow=True),
    fails("sleep", "import time\ntime.sleep(999)", WALL, slow=True),
    fails("large file", "open('/tmp/big', 'wb').write(bytes(1 << 22))", "OSError"),
    fails("full disk", "for n in range(99): open('/tmp/%d' % n, 'wb').write(bytes(1 << 20))",
          "No space left"),
    fails("many empty files", """
import os
for n in range(1 << 22): os.close(os.open('/tmp/%d' % n, os.O_CREAT))""",
          "made more than 4096 files", "No space left"),
    fails("many descriptors", "held = [open('/dev/null') for _ in range(999)]",
          "Too many open files"),
    fails("many pipes", "import os\nheld = [os.pipe() for _ in range(999)]", "Too many open files"),
)  # fmt: skip

WORLD = (
    make_refusal("network", _TRY + """
import socket
def reach(family, kind, address):
    socket.socket(family, kind).connect(address)
inet = is_refused(reach, socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 22))
inet6 = is_refused(reach, socket.AF_INET6, socket.SOCK_STREAM, ("::1", 22))
datagram = is_refused(reach, socket.AF_INET, socket.SOCK_DGRAM, ("192.0.2.1", 53))
abstract = is_refused(reach, socket.AF_UNIX, socket.SOCK_STREAM, "\\0/tmp/.X11-unix/X0")
netlink = is_refused(socket.socket, socket.AF_NETLINK, socket.SOCK_RAW)
raw = is_refused(socket.socket, socket.AF_PACKET, socket.SOCK_RAW)""",
            "assert inet and inet6 and datagram and abstract and netlink and raw"),
    make_refusal("environment and home", """
import os
seen = {**os.environ}
roots = ("/home", "/root", "/var", "/etc", "/opt", "/srv", "/mnt")
homes = [path for path in roots if os.path.exists(path)]
home = os.path.expanduser("~")""",
            "assert 'QUANTKIT_TEST_SECRET' not in seen and not homes and home == '/tmp', "
            "(seen, homes)"),
    make_refusal("/proc and /sys", """
import os
paths = ("/proc", "/sys", "/dev/shm", "/dev/mem", "/dev/kvm", "/dev/fuse")
existing = [path for path in paths if os.path.exists(path)]
""", "assert not existing, existing"),
    make_refusal("other processes", _TRY + """
import signal
def signals(pid): os.kill(pid, 0)
own = (os.getpid(), os.getppid(), 1)
others = [pid for pid in range(1, 5000) if pid not in own and not is_refused(signals, pid)]
""", "assert len(others) <= 1, others"),
    make_refusal("writing outside", _TRY + """
places = ["/usr/x", "/usr/lib/x", "/bin/x", "/lib/x", "/../x", "/usr/bin/env"]
places += ["/dev/sda", "/dev/mem"]
written = [place for place in places if not is_refused(open, place, "w")]
written = [place for place in written if os.path.realpath(place).startswith("/usr")]
removed = not is_refused(os.remove, "/usr/bin/env")
mode = not is_refused(os.chmod, "/usr/bin/env", 0o777)
""", "assert not written and not removed and not mode, written"),
    make_refusal("links", _TRY + """
os.symlink("/usr/bin", "/tmp/bin")
through = not is_refused(open, "/tmp/bin/x", "w")
os.symlink("/../../../../home", "/tmp/up")
up = os.path.exists("/tmp/up")
hard = not is_refused(os.link, "/usr/bin/env", "/tmp/env")
""", "assert not through and not up and not hard"),
    make_refusal("path traversal through /tmp", """
import os
os.chdir("/tmp")
seen = set(os.listdir("../" * 40)) | set(os.listdir("/tmp/../.."))
""", "assert not seen & {'home', 'root', 'etc', 'proc', 'var', 'sys', 'work'}, seen"),
    make_refusal("leaving a changed root", _TRY + """
os.makedirs("/tmp/inner", exist_ok=True)
changed = not is_refused(os.chroot, "/tmp/inner")""", "assert not changed"),
    make_refusal("device files", _TRY + """
import stat
made = not is_refused(os.mknod, "/tmp/disk", stat.S_IFBLK | 0o666, os.makedev(254, 0))""",
            "assert not made"),
    make_refusal("set-user-id", _TRY + """
import subprocess
became = [not is_refused(os.setuid, 12345), not is_refused(os.setgroups, [0])]
ran = []
for tool in ("/usr/bin/su", "/usr/bin/mount", "/usr/bin/passwd"):
    if os.path.exists(tool):
        ran.append(subprocess.run([tool, "x"], stdin=-3, stdout=-3, stderr=-3).returncode)
""", "assert not any(became) and 0 not in ran, (became, ran)"),
    make_refusal("system calls", _CALL + """
numbers = {
    "x86_64": dict(mount=165, umount=166, unshare=272, setns=308, keyctl=250, bpf=321,
                   userfaultfd=323, perf=298,
                   ptrace=101, readv=310, open_tree=428, io_uring=425, personality=135),
    "aarch64": dict(mount=40, umount=39, unshare=97, setns=268, keyctl=219, bpf=280,
                    userfaultfd=282, perf=241,
                    ptrace=117, readv=270, open_tree=428, io_uring=425, personality=92),
}[os.uname().machine]
passed = [name for name, number in numbers.items() if not call(number, 0, 0, 0, 0, 0)]
namespace = not call(56 if os.uname().machine == "x86_64" else 220, 0x10000000 | 17, 0, 0, 0, 0)
new_clone = not call(435, 0, 0)
""", "assert not passed and not namespace and not new_clone, passed"),
    make_refusal("mounts", """
import shutil, subprocess
ran = [subprocess.run([tool, *rest], stdin=-3, stdout=-3, stderr=-3).returncode
       for tool, *rest in (["mount", "-o", "remount,rw", "/usr"], ["umount", "/usr"],
                           ["unshare", "-rm", "true"])
       if shutil.which(tool)]
""", "assert 0 not in ran, ran"),
    make_refusal("ptrace of the parent", _CALL + """
number = 101 if os.uname().machine == "x86_64" else 117
attached = [pid for pid in (1, os.getppid()) if not call(number, 16, pid, 0, 0)]
""", "assert not attached"),
    fails("killing the parent",
          "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nimport time; time.sleep(99)",
          ENDED, WALL, slow=True),
    fails("killing everything",
          "import os, signal\nos.kill(-1, signal.SIGKILL)\nos.kill(os.getpid(), 9)",
          ENDED, "killed by SIGKILL", "ProcessLookupError"),
    fails("stopping everything",
          "import os, signal\nos.kill(os.getppid(), 19)\nos.kill(os.getpid(), 19)",
          WALL, slow=True),
    fails("ignoring every signal", """
import signal
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: pass""", "killed by SIGKILL", CPU),
    fails("an alarm that restarts", """
import signal
def again(*_): signal.alarm(1)
signal.signal(signal.SIGALRM, again)
signal.signal(signal.SIGXCPU, again)
again()
while True: pass""", "killed by SIGKILL", CPU, slow=True),
)  # fmt: skip

_FORGED = '{"sentinel": "%s", "python": "3.11.2"}'

CHECKER = (
    fails("exit with success", "import sys\nsys.exit(0)", "SystemExit: 0"),
    fails("exit in the answer", "import sys\ndef answer(): sys.exit(0)", "SystemExit: 0"),
    fails("exit without clean-up", "import os\nos._exit(0)", ENDED),
    fails("exit in a thread", """
import os, threading, time
threading.Thread(target=lambda: (time.sleep(0.05), os._exit(0))).start()
def answer(): time.sleep(2)""", ENDED),
    fails("exit by signal", "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)",
          "killed by SIGTERM"),
    fails("printing passed", "print('passed')\nprint('ok')\nimport os\nos._exit(0)", ENDED),
    fails("printing a forged report",
          f"print({_FORGED!r} % ('0' * 32), flush=True)\nimport os\nos._exit(0)", ENDED),
    fails("a forged report on every descriptor", f"""
import os
for fd in range(1024):
    try: os.write(fd, ({_FORGED!r} % ("0" * 32)).encode())
    except OSError: pass
os._exit(0)""", "answered with no message"),
    fails("a forged message", """
import os
text = b'{"sentinel": "00", "python": "3", "value": []}'
for fd in range(1024):
    try: os.write(fd, b"%010d" % len(text) + text)
    except OSError: pass
os._exit(0)""", "NameError", ENDED),
    fails("an object equal to everything", """
class Any:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return hash(42)
def answer(): return Any()""", "wrong"),
    fails("an integer equal to everything", """
class Any(int):
    def __eq__(self, other): return True
    __hash__ = int.__hash__
def answer(): return Any(7)""", "wrong"),
    fails("a string of another class", """
class Text(str):
    def __eq__(self, other): return True
    __hash__ = str.__hash__
def answer(): return Text("x")""", "wrong"),
    fails("patched builtins", """
import builtins
builtins.AssertionError = builtins.print
builtins.compile = lambda *_: compile("pass", "x", "exec")
builtins.exec = builtins.eval = lambda *_: None
def answer(): return 0""", "wrong", "no message"),
    fails("patched json", """
import json
json.loads = lambda *_: {"value": ["int", "0x2a"]}
json.dumps = lambda *_: '{"sentinel": "00", "python": "3"}'
def answer(): return 0""", "no message", "wrong"),
    fails("patched sys.modules", """
import sys
for name in list(sys.modules): sys.modules[name] = None
def answer(): return 0""", "wrong", "no message", ENDED),
    fails("names of the tests", """
def abs(x): return 42
def all(x): return True
def check(*_): pass
class AssertionError(Exception): pass
def answer(): return 0""", "wrong"),
    fails("a trace function", """
import sys
def trace(frame, event, arg):
    frame.f_locals.update(tests="pass")
    return trace
sys.settrace(trace)
sys.setprofile(lambda *_: None)
def answer(): return 0""", "wrong"),
    fails("at exit", f"""
import atexit, os
atexit.register(lambda: os.write(1, ({_FORGED!r} % "0").encode()))
raise SystemExit""", "SystemExit"),
    fails("the caller's frames", """
import sys
frame = sys._getframe()
while frame:
    for name in set(frame.f_locals) - {"forged", "frame", "name"}:
        forged = lambda *_, **__: {"value": ["int", "0x2a"]}
        try: frame.f_locals[name] = frame.f_globals[name] = forged
        except Exception: pass
    frame = frame.f_back
def answer(): return 0""", CPU, "no message", "wrong", ENDED),
    make_refusal("looking for the secret", """
import gc, os, re, sys
texts = []
frame = sys._getframe()
while frame:
    texts += [str(frame.f_locals), str(frame.f_globals)]
    frame = frame.f_back
texts += [str(thing) for thing in gc.get_objects() if isinstance(thing, (dict, list, tuple))]
texts += [str(sys.argv), str(dict(os.environ))]
for fd in range(1024):
    try:
        os.set_blocking(fd, False)
        texts.append(str(os.pread(fd, 1 << 20, 0)))
    except OSError:
        pass
    try:
        os.set_blocking(fd, True)
    except OSError:
        pass
secret = "(?<![0-9a-f])(?=[0-9]*[a-f])[0-9a-f]{32}(?![0-9a-f])"
leaks = [text for text in texts if re.search(secret, text)]
canary = "-".join(("quantkit", "canary"))
seen = [canary in text for text in texts]
""", "'quantkit-canary'\nassert not leaks and not any(seen), leaks"),
    make_refusal("reading inherited files", """
import os, stat
kinds = []
for fd in range(1024):
    try: kinds.append(stat.S_IFMT(os.fstat(fd).st_mode))
    except OSError: pass
files = sum(kind == stat.S_IFREG for kind in kinds)
sockets = sum(kind == stat.S_IFSOCK for kind in kinds)
devices = sum(kind == stat.S_IFCHR for kind in kinds)
""", "assert (files, sockets, devices) == (0, 1, 3), (files, sockets, devices)"),
    fails("a patched runner", """
import __main__
__main__.encode_value = lambda *_: True
__main__.run_tests = __main__.select_names = lambda *_: {"sentinel": "0"}
def answer(): return 0""", "is not callable"),
    fails("an exception with a hostile text", """
class Loud(Exception):
    def __str__(self): raise SystemExit(0)
def answer(): raise Loud""", ENDED, "SystemExit"),
    fails("an exception that ends loops", "def answer(): raise StopIteration", "IterationEnded"),
    fails("no answer", "import os\nos.closerange(3, 1024)\ndef answer(): return 42", ENDED,
          "Bad file"),
)  # fmt: skip

DAEMON = """
import ctypes, os, signal, time
ctypes.CDLL(None).prctl(15, NAME, 0, 0, 0)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        time.sleep(99)
    os._exit(0)
os.wait()
"""
"""Starts a daemon with the process name NAME (at most 15 bytes)."""

PROGRAMS = (*RESOURCES, *WORLD, *CHECKER)
