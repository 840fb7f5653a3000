"""Reading ahead, and hidden states on disk against a plain tensor."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantkit.build import spool as spool_module
from quantkit.build.spool import Spool
from quantkit.checkpoint.prefetch import ReadAhead
from quantkit.errors import CheckpointError, QuantkitError
from quantkit.io.host import get_available_memory, get_peak_memory

# ------------------------------------------------------------------------------------ reading ahead


def test_the_announced_request_is_loaded_in_the_background_once() -> None:
    loaded: list[tuple[str, str]] = []
    started, release = threading.Event(), threading.Event()

    def load(request: str) -> str:
        loaded.append((request, threading.current_thread().name))
        if request == "b":
            started.set()
            assert release.wait(10)
        return request * 2

    with ReadAhead(load) as ahead:
        assert ahead.take("a", "b") == "aa"
        assert started.wait(10)  # "b" is being read in the background
        release.set()
        assert ahead.take("b", None) == "bb"
        assert ahead.take("c") == "cc"
    assert [request for request, _ in loaded] == ["a", "b", "c"]
    assert {name for _, name in loaded} != {threading.current_thread().name}


def test_another_request_than_the_announced_one_is_answered() -> None:
    with ReadAhead(lambda request: request + 1) as ahead:
        assert ahead.take(1, 2) == 2
        assert ahead.take(10, 11) == 11
        assert ahead.take(11) == 12


def test_an_error_surfaces_at_the_take_that_asks_for_it() -> None:
    def load(request: int) -> int:
        if request == 2:
            raise CheckpointError("two")
        return request

    with ReadAhead(load) as ahead:
        assert ahead.take(1, 2) == 1
        with pytest.raises(CheckpointError, match="two"):
            ahead.take(2, 3)
        assert ahead.take(3, 2) == 3
        assert ahead.take(4) == 4  # the failed read was not taken
    with pytest.raises(RuntimeError):
        ahead.take(1)
    assert not any(thread.name.startswith("read-ahead") for thread in threading.enumerate())


def test_leaving_by_an_error_ends_the_thread() -> None:
    with pytest.raises(KeyError), ReadAhead(str) as ahead:
        ahead.take(1, 2)
        raise KeyError
    assert not any(thread.name.startswith("read-ahead") for thread in threading.enumerate())


# -------------------------------------------------------------------------------------------- spool


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), dtype=st.sampled_from(["float32", "bfloat16"]))
def test_a_spool_is_a_tensor_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: st.DataObject, dtype: str
) -> None:
    rows, width = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 5))
    row_bytes = width * (4 if dtype == "float32" else 2)
    monkeypatch.setattr(spool_module, "_SLICE_BYTES", row_bytes * data.draw(st.integers(1, 8)))
    monkeypatch.setattr(spool_module, "_GAP_BYTES", row_bytes * data.draw(st.integers(0, 4)))
    plain = torch.zeros(rows, width, dtype=getattr(torch, dtype))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    with Spool.create(tmp_path / "h", rows, width, dtype) as spool:
        for _ in range(4):
            start = data.draw(st.integers(0, rows))
            stop = data.draw(st.integers(start, rows))
            values = torch.randn(stop - start, width, generator=generator)
            spool.write(start, values)
            plain[start:stop] = values.to(plain.dtype)
            indices = torch.tensor(
                data.draw(st.lists(st.integers(0, rows - 1), max_size=30)), dtype=torch.int64
            )
            added = torch.randn(len(indices), width, generator=generator)
            spool.add(indices, added)
            plain = plain.float().index_add(0, indices, added).to(plain.dtype)
            assert torch.allclose(
                spool.gather(indices).float(), plain[indices].float(), rtol=1e-2, atol=1e-6
            )
        read = spool.read(0, rows)
        assert read.dtype == plain.dtype
        assert torch.allclose(
            read.float(), plain.float(), rtol=1e-2 if dtype == "bfloat16" else 1e-5, atol=1e-6
        )
        shuffled = torch.randperm(rows, generator=generator)
        assert torch.equal(spool.gather(shuffled), read[shuffled])


def test_a_spool_is_opened_again_and_deleted(tmp_path: Path) -> None:
    path = tmp_path / "h"
    with Spool.create(path, 3, 2, "bfloat16") as spool:
        spool.write(1, torch.ones(2, 2))
        spool.flush()
    with Spool.open(path, 3, 2, "bfloat16") as spool:
        assert spool.read(0, 3).tolist() == [[0, 0], [1, 1], [1, 1]]
    with pytest.raises(QuantkitError) as caught:
        Spool.open(path, 3, 2, "float32")
    assert str(caught.value) == (
        f"{path}: expected 24 bytes of hidden states [3, 2] float32, found 12; start over with "
        f"--restart"
    )
    spool.delete()
    assert not path.exists()
    with pytest.raises(
        QuantkitError, match="expected hidden states of an earlier run, found: no such file"
    ):
        Spool.open(path, 3, 2, "float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_a_spool_notices_what_is_not_finite(dtype: str, value: float, tmp_path: Path) -> None:
    """As stored, by either way of writing; 3e38 is a number in both dtypes, and twice that in
    neither.
    """
    for how in ("write", "add"):
        with Spool.create(tmp_path / how, 4, 3, dtype) as spool:  # type: ignore[arg-type]
            spool.write(0, torch.ones(4, 3))
            spool.write(2, torch.ones(0, 3))
            assert spool.finite
            rows = torch.tensor([[0.0, value, 0.0]])
            spool.write(1, rows) if how == "write" else spool.add(torch.tensor([1]), rows)
            assert spool.finite == (value == 3e38)
            spool.add(torch.tensor([1, 1]), rows.repeat(2, 1))
            assert not spool.finite
            spool.write(0, torch.ones(4, 3))
            assert not spool.finite


def test_a_spool_without_an_owner_is_closed(tmp_path: Path) -> None:
    """A build that fails raises past its spools; a process that goes on keeps no file open."""
    path = tmp_path / "h"
    spools = [Spool.create(path, 3, 2, "float32"), Spool.open(path, 3, 2, "float32")]
    links = {os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")}
    assert str(path) in links
    spools[0].close()
    spools[0].close()
    del spools
    gc.collect()
    links = {os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")}
    assert str(path) not in links


def test_rows_that_are_not_there(tmp_path: Path) -> None:
    with Spool.create(tmp_path / "h", 3, 2, "float32") as spool:
        for action in (
            lambda: spool.read(2, 4),
            lambda: spool.write(2, torch.zeros(2, 2)),
            lambda: spool.gather(torch.tensor([0, 3])),
            lambda: spool.add(torch.tensor([-1]), torch.zeros(1, 2)),
        ):
            with pytest.raises(ValueError, match="expected rows within 0:3"):
                action()
        with pytest.raises(ValueError, match=r"expected \[n, 2\], found \[1, 3\]"):
            spool.write(0, torch.zeros(1, 3))
        with pytest.raises(ValueError, match=r"expected \[2, 2\], found \[1, 2\]"):
            spool.add(torch.tensor([0, 1]), torch.zeros(1, 2))


def resident_bytes() -> int:
    """Resident memory of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_large_spool_needs_little_memory(tmp_path: Path) -> None:
    """64 MB of rows on disk, every 40th row changed: memory rises by slices, not by the file."""
    rows, width = 16_384, 1024
    with Spool.create(tmp_path / "h", rows, width, "float32") as spool:
        indices = torch.arange(0, rows, 40)
        values = torch.ones(len(indices), width)
        spool.add(indices[:100], values[:100])
        spool.gather(indices[:100])
        before = resident_bytes()
        high = before
        for _ in range(3):
            spool.add(indices, values)
            high = max(high, resident_bytes())
        assert high - before < 16_000_000
        assert spool.gather(torch.tensor([40, 41, 16_360]))[:, 0].tolist() == [4.0, 0.0, 3.0]


def test_the_machine_knows_its_memory() -> None:
    assert 0 < get_available_memory() < 2**50
    assert 0 < resident_bytes() <= get_peak_memory() + 2**24  # the kernel updates the peak lazily
