"""What several test files share."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.constants import CHROMIUM, FAST

from quantkit.evaluate.sandbox.sandbox import Sandbox, probe
from quantkit.io.package_data import folder

if TYPE_CHECKING:
    from support.places.here import Place

signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # in the background a shell ignores it, for children too


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sealed artifact of tiny-v3 that nobody may change; `artifact` is a copy for those who do."""
    from quantkit import pipeline
    from quantkit.recipe.parse import parse

    path = tmp_path_factory.mktemp("built") / "tiny"
    text = (folder("recipes") / "tiny-v3-awq4.yaml").read_text(encoding="utf-8")
    recipe = parse(text, "tiny-v3-awq4.yaml", {**FAST, "output.path": str(path)})
    pipeline.build_artifacts(
        recipe,
        text,
        overwrite=False,
        evaluate=False,
        on_plan=lambda _: None,
        on_progress=lambda _: None,
    )
    return path


@pytest.fixture
def artifact(built: Path, tmp_path: Path) -> Path:
    """A copy of the built artifact, to be damaged."""
    return Path(shutil.copytree(built, tmp_path / "artifact"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's chromium; who asks for it skips without (CHROMIUM)."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module", params=["bubblewrap", "namespaces"])
def jail(request: pytest.FixtureRequest) -> Sandbox:
    """Each rung of the sandbox's ladder that works on this machine."""
    sandbox = probe(kinds=(request.param,))
    if sandbox.kind == "none":
        pytest.skip(f"{request.param} does not work here: {sandbox.reason}")
    return sandbox


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    """An S3 server."""
    from support.places.using import moto

    with moto() as port:
        yield port


@pytest.fixture
def make(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3_port: int
) -> Iterator[Callable[[str], Place]]:
    """Makes an empty place of a kind to publish to."""
    from support.places.here import place

    with ExitStack() as stack:
        yield lambda kind: stack.enter_context(place(kind, tmp_path, monkeypatch, s3_port))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print at the end why artifacts were not compared with their recorded bytes, so that nobody overlooks it."""
    for report in terminalreporter.getreports("skipped"):
        if "test_golden.py" in report.nodeid:
            reason = (
                report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
            )
            terminalreporter.section("artifacts not compared", sep="=", red=True, bold=True)
            terminalreporter.line(reason)
