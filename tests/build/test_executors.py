"""Executors run pure functions in order; experts are read and calibrated once where nothing is
searched.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.builds import build
from support.checkpoints import make_tiny_config, write_checkpoint

from quantkit.build import loop, moe
from quantkit.build.executors.serial import SerialExecutor
from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.checkpoint.prefetch import ScheduledReads
from quantkit.plan import plan

pytestmark = pytest.mark.usefixtures("quick_builds")

AWQ = "{method: awq, rounding: gptq, bits: 4, group_size: 64}"
GPTQ = "{method: gptq, bits: 4, group_size: 64}"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-MoE in BF16: two blocks with 8 experts each."""
    return write_checkpoint(
        tmp_path_factory.mktemp("moe") / "source", make_tiny_config("qwen3_moe")
    )


def limit_waves(patch: pytest.MonkeyPatch, size: int) -> None:
    """Hold so many experts at once."""
    real = plan.plan_memory

    def plan_limited_waves(*args: Any, **kwargs: Any) -> Any:
        return replace(real(*args, **kwargs), wave_experts=size)

    patch.setattr(plan, real.__name__, plan_limited_waves)


class ThreadExecutor:
    """Runs three tasks at a time in threads, the last one first."""

    workers = 3

    def map(self, function: Callable[..., Any], *arguments: Iterable[Any]) -> Iterator[Any]:
        tasks = list(zip(*arguments, strict=True))
        with ThreadPoolExecutor(self.workers) as pool:
            futures = [pool.submit(function, *task) for task in reversed(tasks)]
            yield from (future.result() for future in reversed(futures))


def test_serial_executor_runs_a_task_when_its_result_is_taken() -> None:
    done: list[int] = []

    def double(task: int) -> int:
        done.append(task)
        return 2 * task

    results = SerialExecutor().map(double, [1, 2, 3])
    assert next(results) == 2 and done == [1]
    assert list(results) == [4, 6] and done == [1, 2, 3]


@pytest.mark.parametrize("quantize", [AWQ, GPTQ])
def test_parallel_workers_and_waves_change_no_tensor(
    source: Path, tmp_path: Path, quantize: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    serial = build(source, tmp_path / "serial", quantize=quantize).path
    with monkeypatch.context() as patch:
        patch.setattr(loop, "SerialExecutor", ThreadExecutor)
        limit_waves(patch, 5)
        threads = build(source, tmp_path / "threads", quantize=quantize).path
    one, two = (load_file(path / "model.safetensors") for path in (serial, threads))
    assert one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)


@pytest.mark.parametrize(("quantize", "passes"), [(GPTQ, 1), (AWQ, 2)])
def test_experts_are_read_and_calibrated_once_without_a_search(
    source: Path, tmp_path: Path, quantize: str, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory holds half of the experts. AWQ sums errors over all of them first, so it needs a
    second pass.
    """
    reads, calibrated = Counter[str](), Counter[int]()
    real_read, real_collect = Checkpoint.read, moe.collect_stats

    def count_reads(
        self: Checkpoint, names: Iterable[str], finite: bool = True
    ) -> dict[str, torch.Tensor]:
        names = list(names)
        reads.update(name for name in names if ".experts." in name)
        return real_read(self, names, finite)

    def count_stats(slices: Any, *args: Any, **kwargs: Any) -> Any:
        calibrated.update(experts.first for experts in slices)
        return real_collect(slices, *args, **kwargs)

    limit_waves(monkeypatch, 4)
    monkeypatch.setattr(Checkpoint, "read", count_reads)
    monkeypatch.setattr(moe, "collect_stats", count_stats)
    build(source, tmp_path / "a", quantize=quantize, fidelity="none")
    assert len(reads) == 2 * 8 * 3 and set(reads.values()) == {passes}
    assert len(calibrated) == 8 and set(calibrated.values()) == {2 * passes}  # of two blocks


def test_reads_follow_the_request_and_not_the_schedule() -> None:
    loaded: list[str] = []

    def load(request: str) -> str:
        loaded.append(request)
        return request.upper()

    with ScheduledReads(load, ["a", "b", "c", "b", "d"]) as reads:
        assert [reads.take(request) for request in "abc"] == ["A", "B", "C"]
        assert reads.take("x") == "X"  # not in the schedule
        assert reads.take("b") == "B"
        assert reads.take("d") == "D"
        assert reads.take("a") == "A"  # once more, after the end of the schedule
    assert Counter(loaded) == Counter("abcbxda") + Counter({"b": loaded.count("b") - 2})
