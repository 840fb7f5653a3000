"""Every parser of the product under inputs that mean it harm: an error of quantkit's own or an answer, soon, and small.

`fuzz/targets.py` lists the parsers. Here each gets a few hundred damaged inputs; the slow test gives each a hundred
thousand under atheris, which looks for those that reach new lines, with a limit on the time and memory of each.
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
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


def draw_inputs(target: Target) -> st.SearchStrategy[bytes]:
    """Damaged good inputs most of the time, any JSON, any bytes."""

    def damaged(number: int) -> bytes:
        rng = random.Random(number)
        return target.mutate(rng.choice(target.seeds), rng)

    return (
        st.integers(0, 2**32).map(damaged)
        | st.integers(0, 2**32).map(damaged)
        | JSON.map(dump_json)
        | st.binary()
    )


def dump_json(value: object) -> bytes:
    """JSON with all that Python's writer lets through: NaN, half surrogates."""
    return json.dumps(value).encode()


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder in memory where there is one: a test writes hundreds of files."""
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else None))
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", TARGETS)
def test_a_parser_answers_or_refuses(name: str, place: Path, record_property: Record) -> None:
    """No exception but quantkit's, within seconds, in words that a terminal can show."""
    target, tried = TARGETS[name], 0
    prepare_folder(target, place)
    assert all(run_target(target, place, data) is None for data in target.seeds), (
        "a good input is refused"
    )

    @settings(
        max_examples=UNIT_INPUTS,
        deadline=None,
        database=None,
        suppress_health_check=[*HealthCheck],
        derandomize=True,
    )
    @given(draw_inputs(target))
    def harmed(data: bytes) -> None:
        nonlocal tried
        tried += 1
        began = time.monotonic()
        run_target(target, place, data)
        assert time.monotonic() - began < UNIT_SECONDS

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    harmed()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    assert grown < 1_500_000_000  # transformers and pyarrow are imported on the way
    record_property("input", name)
    record_property("tried", tried)
    record_property("tracebacks", 0)


@pytest.mark.slow
@pytest.mark.reliability
@pytest.mark.parametrize("name", TARGETS)
def test_a_parser_under_atheris(name: str, tmp_path: Path, record_property: Record) -> None:
    """100,000 inputs and more: none ends in a traceback, takes half a minute, or 1.5 GB."""
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
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=RUN_SECONDS, errors="replace",
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path), "RUST_BACKTRACE": "0"},
    )  # fmt: skip
    assert result.is_file(), f"it ended before its last input: {done.stderr[-3000:]}"
    told = json.loads(result.read_text())
    record_property("input", name)
    record_property("tried", told["tried"])
    record_property("tracebacks", told["n_tracebacks"])
    assert told["tracebacks"] == []
    assert told["tried"] >= RUN_INPUTS


def test_what_is_wrong_with_a_message_is_noticed() -> None:
    """The check of the checks: a message without words."""
    check_message("recipe.yaml:1: version: missing; this key has no default")
    for message in ("", " \n"):
        with pytest.raises(AssertionError):
            check_message(message)


def test_a_parser_that_breaks_is_noticed(tmp_path: Path) -> None:
    """The harness lets through what is no error of quantkit's."""

    def broken(folder: Path) -> object:
        return {}[(folder / "x").read_bytes()]  # type: ignore[var-annotated]

    target = Target(
        name="x",
        file="x",
        read=broken,
        made=lambda: (b"",),
        mutate=lambda data, _: data,
        beside=dict,
    )
    prepare_folder(target, tmp_path)
    with pytest.raises(KeyError):
        run_target(target, tmp_path, b"")
