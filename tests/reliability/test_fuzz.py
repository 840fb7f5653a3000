"""Fuzz tests of every parser: each input yields a result or a QuantkitError, within time and memory
limits.

`fuzz/targets.py` lists the parsers. The fast test runs a few hundred damage_seed inputs per parser.
The slow test runs a hundred thousand with atheris, which searches for inputs that reach new lines.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reliability.fuzz.mutate import HOSTILE
from reliability.fuzz.targets import TARGETS, Target, check_message, prepare_folder, run_target

RUN_INPUTS = int(os.environ.get("QUANTKIT_FUZZ_INPUTS", "100000"))
RUN_SECONDS = 3600
UNIT_SECONDS = 5
UNIT_INPUTS = 200
Record = Callable[[str, object], None]

JSON = st.recursive(
    st.sampled_from(HOSTILE) | st.text(max_size=8) | st.integers() | st.floats(),
    lambda children: (
        st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=8), children, max_size=4)
    ),
    max_leaves=12,
)


def draw_inputs(target: Target) -> st.SearchStrategy[bytes]:
    """Return a strategy: mostly damage_seed valid inputs, also arbitrary JSON and arbitrary
    bytes.
    """

    def damage_seed(number: int) -> bytes:
        rng = random.Random(number)
        return target.mutate(rng.choice(target.seeds), rng)

    return (
        st.integers(0, 2**32).map(damage_seed)
        | st.integers(0, 2**32).map(damage_seed)
        | JSON.map(dump_json)
        | st.binary()
    )


def dump_json(value: object) -> bytes:
    """Encode JSON including values that Python's encoder accepts: NaN, lone surrogates."""
    return json.dumps(value).encode()


@pytest.fixture
def place() -> Iterator[Path]:
    """Create a temporary folder, in memory if possible: a test writes hundreds of files."""
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else None))
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", TARGETS)
def test_parser_returns_or_raises_quantkit_error(
    name: str, place: Path, record_property: Record
) -> None:
    """Only quantkit's exceptions, within seconds, with printable messages."""
    target, tried = TARGETS[name], 0
    prepare_folder(target, place)
    assert all(run_target(target, place, data) is None for data in target.seeds), (
        "a valid input is rejected"
    )

    @settings(
        max_examples=UNIT_INPUTS,
        deadline=None,
        database=None,
        suppress_health_check=[*HealthCheck],
        derandomize=True,
    )
    @given(draw_inputs(target))
    def check_input(data: bytes) -> None:
        nonlocal tried
        tried += 1
        start = time.monotonic()
        run_target(target, place, data)
        assert time.monotonic() - start < UNIT_SECONDS

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    check_input()
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    assert growth < 1_500_000_000  # includes the imports of transformers and pyarrow
    record_property("input", name)
    record_property("tried", tried)
    record_property("tracebacks", 0)


@pytest.mark.slow
@pytest.mark.reliability
@pytest.mark.parametrize("name", TARGETS)
def test_parser_withstands_atheris(name: str, tmp_path: Path, record_property: Record) -> None:
    """At least 100,000 inputs: none raises a traceback, takes half a minute or uses 1.5 GB."""
    pytest.importorskip("atheris", reason="atheris has wheels for Linux only")
    result = tmp_path / "result.json"
    command = [
        sys.executable,
        "-m",
        "reliability.fuzz.run",
        name,
        str(RUN_INPUTS),
        "1",
        str(result),
    ]
    process = subprocess.run(
        command,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS,
        errors="replace",
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path), "RUST_BACKTRACE": "0"},
    )
    assert result.is_file(), f"the fuzzer ended before its last input: {process.stderr[-3000:]}"
    counts = json.loads(result.read_text())
    record_property("input", name)
    record_property("tried", counts["tried"])
    record_property("tracebacks", counts["n_tracebacks"])
    assert counts["tracebacks"] == []
    assert counts["tried"] >= RUN_INPUTS


def test_check_message_rejects_empty_messages() -> None:
    """A valid message passes; empty messages fail."""
    check_message("recipe.yaml:1: version: missing; this key has no default")
    for message in ("", " \n"):
        with pytest.raises(AssertionError):
            check_message(message)


def test_harness_propagates_other_exceptions(tmp_path: Path) -> None:
    """The harness catches only QuantkitError."""

    def raise_key_error(folder: Path) -> object:
        return {}[(folder / "x").read_bytes()]  # type: ignore[var-annotated]

    target = Target(
        name="x",
        file="x",
        read=raise_key_error,
        make_seeds=lambda: (b"",),
        mutate=lambda data, _: data,
        make_companions=dict,
    )
    prepare_folder(target, tmp_path)
    with pytest.raises(KeyError):
        run_target(target, tmp_path, b"")
