"""Python that escaped from jinja2's sandbox: system calls that the template process allows."""

from __future__ import annotations

import os
import platform
from datetime import datetime
from pathlib import Path

import pytest

from quantkit.io import templates
from quantkit.io.seccomp import AUDIT_ARCHES
from quantkit.io.templates import FULL_ISOLATION, TemplateFault, TemplateWorker

pytestmark = pytest.mark.skipif(
    platform.machine() not in AUDIT_ARCHES, reason="there is no list of system calls here"
)

ESCAPES = {
    "a file": "os.open('/etc/passwd', os.O_RDONLY)",
    "a written file": "os.open('{folder}/x', os.O_WRONLY | os.O_CREAT)",
    "a removed file": "os.unlink('{folder}/kept')",
    "a folder": "os.listdir('/')",
    "a socket": "__import__('_socket').socket()",
    "a pair of sockets": "__import__('_socket').socketpair()",
    "a pipe": "os.pipe()",
    "a descriptor": "os.close(2)",
    "a copied descriptor": "os.dup(1)",
    "a process": "os.fork()",
    "a program": "os.execv('/bin/true', ['true'])",
    "a spawned program": "os.posix_spawn('/bin/true', ['true'], {{}})",
    "a signal to the caller": "os.kill({parent}, 15)",
    "a signal to all": "os.kill(-1, 15)",
    "a limit of another process": "resource.prlimit({parent}, resource.RLIMIT_CPU, (0, 0))",
    "a raised limit": "resource.setrlimit(resource.RLIMIT_NOFILE, (99, 99))",
    "a wall clock timer": "signal.setitimer(signal.ITIMER_REAL, 1)",
    "a priority": "os.nice(1)",
    "a folder of its own": "os.chdir('/')",
    "a name of the host": "os.uname()",
}
"""Attempt of an escape -> its Python."""

PAGES = (
    "(lambda libc: libc.mmap(None, 4096, {protection}, 0x22, -1, 0) == 2**64 - 1)"
    "([setattr(libc.mmap, 'restype', ctypes.c_void_p) or libc for libc in [ctypes.CDLL(None)]][0])"
)


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TemplateWorker:
    """Return a worker whose process evaluates templates as Python: an escape."""
    source = templates._SCRIPT.read_text(encoding="utf-8")
    planted = source.replace(
        '"render": Renderer().render,',
        '"render": lambda request: str(eval(request["template"], globals())),',
    ).replace("import sys\n", "import sys, subprocess, _socket\n")
    assert planted.count("eval(request") == 1
    (tmp_path / "escaped.py").write_text(planted, encoding="utf-8")
    monkeypatch.setattr(templates, "_SCRIPT", tmp_path / "escaped.py")
    return TemplateWorker()


@pytest.mark.parametrize("name", ESCAPES)
def test_escape_reaches_nothing(name: str, worker: TemplateWorker, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("x")
    code = ESCAPES[name].format(folder=tmp_path, parent=os.getpid())
    with worker, pytest.raises(TemplateFault) as caught:
        worker.render(code, {})
    sentence = str(caught.value)
    assert "[Errno 1]" in sentence or "ValueError: not allowed to raise" in sentence
    assert (tmp_path / "kept").exists() and not (tmp_path / "x").exists()


def test_escape_makes_no_executable_pages(worker: TemplateWorker) -> None:
    with worker:
        assert worker.render(PAGES.format(protection=3), {}) == "False"  # readable, writable
        assert worker.render(PAGES.format(protection=7), {}) == "True"


def test_filter_is_what_refuses(
    worker: TemplateWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it, an escape closes a descriptor, opens a file and reads it."""
    monkeypatch.setattr(templates, "build_template_filter", lambda: b"")
    with worker:
        code = "[os.close(2), os.read(os.open('/etc/passwd', 0), 5)][1]"
        assert worker.render(code, {}) == "b'root:'"


def test_isolation_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with TemplateWorker() as worker:
        assert worker.describe_isolation() == FULL_ISOLATION
    monkeypatch.setattr(templates, "build_template_filter", lambda: b"")
    with TemplateWorker() as worker:
        assert worker.describe_isolation() == (
            f"limits, no system-call filter: no list of system calls for {platform.machine()}"
        )
    monkeypatch.setattr(templates, "build_template_filter", lambda: b"\xff" * 8)
    with TemplateWorker() as worker:
        assert worker.describe_isolation() == (
            "limits, no system-call filter: the kernel refuses the filter: Invalid argument"
        )


def test_loop_ends_under_the_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "RENDER_SECONDS", 1)
    with TemplateWorker() as worker:
        with pytest.raises(TemplateFault, match="at most 1 s of processor time"):
            worker.render("{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3, {})
        assert worker.render("{{ 1 + 1 }}", {}) == "2"


def test_local_time_is_that_of_this_machine() -> None:
    """strftime looks at /etc/localtime, and would use UTC if it could not."""
    pattern = "%Y-%m-%d %H"
    with TemplateWorker() as worker:
        before = f"{datetime.now():{pattern}}"  # noqa: DTZ005  # local time is compared
        rendered = worker.render(f"{{{{ strftime_now('{pattern}') }}}}", {}, "chat")
        after = f"{datetime.now():{pattern}}"  # noqa: DTZ005
    assert rendered in {before, after}
