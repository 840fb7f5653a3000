"""Fixtures that tests of several packages share."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.constants import CHROMIUM, FAST

from quantkit.evaluate.sandbox import Sandbox, probe_sandbox
from quantkit.io.package_data import locate_folder
from quantkit.library_settings import apply_settings

if TYPE_CHECKING:
    from support.places.here import RemoteFixture
    from support.places.raw_server import Answer, RawServer, Serve

# Builds in the process of the tests give the bytes of the command; before torch is imported.
apply_settings()

# Times and texts of the tests' models do not enter the user's cache, which plans read.
os.environ.setdefault("QUANTKIT_CACHE", str(Path(__file__).parents[1] / "artifacts" / "test-cache"))

# The workers of xdist have the width of its terminal, and commands print for it.
os.environ.pop("COLUMNS", None)

# A shell ignores SIGINT in background jobs, and child processes inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Workers share the processors: torch would start a thread per processor in each of them, and the
# threads that wait for each other spin. Read when torch is imported, here and in child processes.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))


MEDIUM_FILES = frozenset({
    "bench/test_gpu.py",
    "build/test_block_coverage.py",
    "build/test_build.py",
    "build/test_determinism.py",
    "build/test_equal_lengths.py",
    "build/test_interrupted.py",
    "build/test_propagate_both.py",
    "build/test_resume.py",
    "build/test_several_formats.py",
    "build/test_source_encodings.py",
    "build/test_tensors_in_the_wild.py",
    "build/test_tied_heads.py",
    "checkpoint/test_encodings.py",
    "build/test_wrapper_build.py",
    "checkpoint/test_hostile_hub.py",
    "checkpoint/test_side_files.py",
    "checkpoint/test_tensors.py",
    "cli/test_cli.py",
    "cli/test_environment.py",
    "cli/test_key.py",
    "cli/test_lazy_group.py",
    "cli/test_model_target.py",
    "diff/test_diff_command.py",
    "diff/test_diff_page.py",
    "evaluate/test_check_plan.py",
    "evaluate/test_evaluation.py",
    "evaluate/test_fidelity_independent.py",
    "evaluate/test_hostile.py",
    "evaluate/test_hostile_tasks.py",
    "evaluate/test_openai_backend.py",
    "evaluate/test_sandbox.py",
    "evaluate/test_sandbox_memory.py",
    "evaluate/test_sandbox_modules.py",
    "evaluate/test_sandbox_syscalls.py",
    "evaluate/test_self_sampler.py",
    "evaluate/test_solution_likelihood.py",
    "evaluate/test_task_runner.py",
    "formats/test_bitsandbytes.py",
    "formats/test_fp8_kept.py",
    "io/test_template_filter.py",
    "io/test_templates.py",
    "io/test_user_cache.py",
    "methods/test_hard_weights.py",
    "methods/test_methods.py",
    "models/test_text_part.py",
    "models/test_derive.py",
    "models/test_outer_model.py",
    "plan/test_check_model.py",
    "plan/test_context_length.py",
    "plan/test_plan.py",
    "publish/test_signing.py",
    "publish/test_transfer.py",
    "publish/test_transfer_faults.py",
    "publish/test_transfer_kinds.py",
    "publish/test_transfer_secrets.py",
    "publish/test_transfer_trust.py",
    "recipe/test_recipes.py",
    "reliability/test_fuzz.py",
    "reliability/test_hostile_input.py",
    "report/test_bom.py",
    "report/test_gates.py",
    "report/test_html.py",
    "report/test_html_browser.py",
    "report/test_runs_browser.py",
    "report/test_narrow_calibration.py",
    "report/test_reproduce.py",
    "serve/test_connections.py",
    "serve/test_cost.py",
    "serve/test_exchange.py",
    "serve/test_gateway.py",
    "serve/test_gateway_bodies.py",
    "serve/test_gateway_trust.py",
    "serve/test_loadtest.py",
    "serve/test_serve.py",
    "serve/test_size_command.py",
    "serve/test_sizing.py",
    "test_api.py",
    "test_contracts.py",
    "test_golden.py",
    "texts/test_builtin_text.py",
    "texts/test_corpora.py",
    "texts/test_self_text.py",
    "texts/test_hostile_hub_data.py",
    "tools/test_tiny_v3.py",
    "verify/test_bad_artifacts.py",
    "verify/test_deep.py",
    "verify/test_source_account.py",
    "verify/test_verify.py",
    "verify/test_what_engines_load.py",
})
"""Files whose tests build artifacts, start processes or read many files; not in `make fast`."""

LONGEST_FILES = (
    "test_golden.py",
    "build/test_resume.py",
    "test_contracts.py",
    "build/test_determinism.py",
    "cli/test_cli.py",
    "serve/test_serve.py",
    "evaluate/test_evaluation.py",
    "evaluate/test_sandbox.py",
    "publish/test_transfer.py",
    "diff/test_diff_command.py",
    "models/test_derive.py",
    "reliability/test_fuzz.py",
    "build/test_build.py",
    "build/test_interrupted.py",
    "evaluate/test_openai_backend.py",
    "evaluate/test_hostile_tasks.py",
    "evaluate/test_self_sampler.py",
    "methods/test_hard_weights.py",
    "evaluate/test_solution_likelihood.py",
    "test_api.py",
    "cli/test_environment.py",
)
"""Files that begin first, the longest first, so that parallel workers end together."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of MEDIUM_FILES and order the files by their duration.

    Raises pytest.UsageError for a name without a file.
    """
    folder = Path(__file__).parent
    named = {*MEDIUM_FILES, *LONGEST_FILES}
    missing = sorted(name for name in named if not (folder / name).is_file())
    if missing:
        raise pytest.UsageError(f"tests/conftest.py: no such file: {missing}")
    order = {name: place for place, name in enumerate(LONGEST_FILES)}

    def get_place(item: pytest.Item) -> int:
        name = item.path.relative_to(folder).as_posix()
        return order.get(name, len(order) + (name not in MEDIUM_FILES))

    for item in items:
        if item.path.relative_to(folder).as_posix() in MEDIUM_FILES:
            item.add_marker(pytest.mark.medium)
    items.sort(key=get_place)  # stable: the tests of a file stay together


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sealed artifact of tiny-v3, read-only; tests that change it use `artifact`."""
    from quantkit import pipeline
    from quantkit.recipe.parse import parse_recipe

    path = tmp_path_factory.mktemp("built") / "tiny"
    text = (locate_folder("recipes") / "tiny-v3-awq4.yaml").read_text(encoding="utf-8")
    recipe = parse_recipe(text, "tiny-v3-awq4.yaml", {**FAST, "output.path": str(path)})
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
    """A copy of the built artifact that a test may change."""
    return Path(shutil.copytree(built, tmp_path / "artifact"))


@pytest.fixture(scope="module")
def quick_builds() -> Iterator[None]:
    """Builds of this module search little (support/quick_builds.py)."""
    from support.quick_builds import shorten_searches

    with pytest.MonkeyPatch.context() as patch:
        shorten_searches(patch.setattr)
        yield


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium; tests that use it are skipped where CHROMIUM is None."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        instance = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield instance
        instance.close()


@pytest.fixture(scope="module", params=["bubblewrap", "namespaces"])
def jail(request: pytest.FixtureRequest) -> Sandbox:
    """Each kind of sandbox that works on this machine."""
    sandbox = probe_sandbox(kinds=(request.param,))
    if sandbox.kind == "none":
        pytest.skip(f"{request.param} does not work here: {sandbox.reason}")
    return sandbox


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    """An S3 server."""
    from support.places.using import run_moto

    with run_moto() as port:
        yield port


@pytest.fixture
def make(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3_port: int
) -> Iterator[Callable[[str], RemoteFixture]]:
    """Return a function that creates an empty remote of a kind."""
    from support.places.here import open_remote_fixture

    with ExitStack() as stack:
        yield lambda kind: stack.enter_context(
            open_remote_fixture(kind, tmp_path, monkeypatch, s3_port)
        )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print at the end why artifacts were not compared with their recorded bytes."""
    for report in terminalreporter.getreports("skipped"):
        if "test_golden.py" in report.nodeid:
            reason = (
                report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
            )
            terminalreporter.section("artifacts not compared", sep="=", red=True, bold=True)
            terminalreporter.line(reason)


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start servers of raw bytes, which end with the test."""
    from support.places.raw_server import RawServer

    with ExitStack() as servers:

        def start(answer: Answer) -> RawServer:
            server = RawServer(answer)
            servers.callback(server.close)
            return server

        yield start
