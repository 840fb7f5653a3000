"""Programs that use the standard library as honest solutions of other tasks might."""

from __future__ import annotations

SOURCES = {
    "files": """
import os, shutil, tempfile, pathlib
with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder, "a.txt")
    path.write_text("text")
    shutil.copy2(path, path.with_name("b.txt"))
    shutil.copytree(folder, "/tmp/copy")
    os.rename(path, path.with_name("c.txt"))
    os.utime(path.with_name("c.txt"), (1, 1))
    os.symlink("c.txt", path.with_name("link"))
    os.link(path.with_name("c.txt"), path.with_name("hard"))
    os.chmod(path.with_name("c.txt"), 0o600)
    os.truncate(path.with_name("c.txt"), 2)
    listed = sorted(os.listdir(folder))
    walked = [names for _, _, names in os.walk(folder)]
    with open(path, "w+b", buffering=0) as file:
        file.write(b"1234")
        os.fsync(file.fileno())
        file.seek(0)
    usage = shutil.disk_usage(folder)
shutil.rmtree("/tmp/copy")
answer = listed""",
    "mapped file": """
import mmap
with open("/tmp/mapped", "w+b") as file:
    file.write(bytes(8192))
    file.flush()
    with mmap.mmap(file.fileno(), 0) as mapped:
        mapped[:4] = b"text"
        mapped.flush()
        answer = mapped[:4].decode()
with mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as mapped:
    mapped[:4] = b"text"
    if hasattr(mmap, "MADV_DONTNEED"): mapped.madvise(mmap.MADV_DONTNEED)""",
    "threads": """
import queue, threading
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(4) as pool:
    answer = list(pool.map(lambda x: x * x, range(99)))
lock, items = threading.Lock(), queue.Queue()
timer = threading.Timer(0.01, lambda: items.put(1))
timer.start()
items.get(timeout=5)
event = threading.Event()
event.wait(0.01)""",
    "multiprocessing": """
import multiprocessing
left, right = multiprocessing.Pipe()
target = lambda end, number: end.send(number * number)
process = multiprocessing.get_context("fork").Process(target=target, args=(right, 7))
process.start()
answer = left.recv()
process.join(5)
assert process.exitcode == 0""",
    "asyncio": """
import asyncio
async def add(a, b):
    await asyncio.sleep(0.001)
    return a + b
async def work():
    echo = await asyncio.create_subprocess_exec("/bin/echo", "x", stdout=-1)
    text, _ = await echo.communicate()
    return await asyncio.gather(*(add(n, 1) for n in range(9))), text
answer = asyncio.run(work())""",
    "processes": """
import os, subprocess, sys
command = [sys.executable, "-c", "print(6 * 7)"]
answer = subprocess.run(command, capture_output=True, text=True).stdout
shell = subprocess.check_output("echo $((1 + 1)) | cat", shell=True)
old = os.system("true")
if os.fork() == 0:
    os._exit(0)
os.wait()
read, write = os.pipe()
os.write(write, b"x")
session = subprocess.run(["true"], start_new_session=True).returncode""",
    "signals": """
import signal, time
seen = []
signal.signal(signal.SIGALRM, lambda *_: seen.append(1))
signal.setitimer(signal.ITIMER_REAL, 0.01)
time.sleep(0.05)
signal.alarm(0)
signal.raise_signal(signal.SIGALRM)
answer = len(seen)""",
    "sockets": """
import selectors, socket
left, right = socket.socketpair()
left.sendall(b"text")
chooser = selectors.DefaultSelector()
chooser.register(right, selectors.EVENT_READ)
chooser.select(1)
answer = right.recv(9)
right.settimeout(1)
left.shutdown(socket.SHUT_RDWR)
left.close()""",
    "system": """
import getpass, locale, os, platform, random, resource, secrets, sys, time, uuid
answer = [os.getpid(), os.getuid(), os.cpu_count(), platform.machine(), os.uname().sysname]
answer += [time.time(), time.monotonic(), time.process_time(), time.localtime().tm_year]
answer += [random.random(), secrets.token_hex(4), str(uuid.uuid4()), os.getloadavg is not None]
answer += [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]
answer += [resource.getrlimit(resource.RLIMIT_AS), os.sched_getaffinity(0), os.getcwd()]
answer += [sys.getsizeof([]), locale.getlocale(), os.isatty(0)]
try: answer.append(os.get_terminal_size())
except OSError: pass
os.umask(0o22)
time.tzset()""",
    "libraries": """
import bz2, calendar, csv, ctypes, datetime, decimal, gzip, hashlib, heapq, io, itertools, json
import logging, lzma, pickle, re, sqlite3, statistics, string, struct, tarfile, zipfile, zlib
import http.client, unittest, doctest, inspect, typing, xml.etree.ElementTree, zoneinfo
base = sqlite3.connect(":memory:")
base.execute("create table t (x)")
base.execute("insert into t values (1)")
answer = base.execute("select x from t").fetchall()
with zipfile.ZipFile("/tmp/a.zip", "w") as archive: archive.writestr("a", "text")
with tarfile.open("/tmp/a.tgz", "w:gz") as archive: archive.add("/tmp/a.zip")
with tarfile.open("/tmp/a.tgz") as archive: archive.extractall("/tmp/out")
digest = hashlib.scrypt(b"x", salt=b"y", n=2, r=8, p=1)""",
    "memory": """
held = [bytes(1 << 20) for _ in range(200)]
text = "x" * (64 << 20)
parts = [bytearray(n) for n in range(1, 100000, 100)]
del held, text
answer = len(parts)""",
}
"""Name -> program. Each sets `answer` to something true, and must work in the sandbox."""
