"""One time left over all phases of a command, in bars and in lines."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console
from rich.progress import BarColumn
from rich.progress import Progress as RichProgress
from support.plans import plan_checkpoint

from quantkit.cli.rich_output import ProgressBar, describe_left, make_columns
from quantkit.plan.plan_schema import PlanTime
from quantkit.plan.time_estimate import list_phases
from quantkit.progress import Phase, Progress, TimeKeeper, TimeLeft

PHASES = (
    Phase(stage="hashes", seconds=10),
    Phase(stage="blocks", seconds=100),
    Phase(stage="benchmarks", seconds=40),
)


class Clock:
    """A clock that tests set."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def report(stage: str, done: float, total: float = 10, **more: object) -> Progress:
    return Progress(stage=stage, done=done, total=total, **more)  # type: ignore[arg-type]


def test_running_stage_is_measured_and_later_ones_are_expected(clock: Clock) -> None:
    keeper = TimeKeeper(clock)
    keeper.set_phases(PHASES)
    clock.now = 6
    assert keeper.update(report("hashes", 5)) == TimeLeft(seconds=6 + 100 + 40)
    clock.now = 12
    assert keeper.update(report("hashes", 10)) == TimeLeft(seconds=140)
    clock.now = 13  # 1 % of the blocks: their expected time, less what has passed
    assert keeper.update(report("blocks", 0.1)) == TimeLeft(seconds=99 + 40)
    clock.now = 62  # a half in 50 s
    assert keeper.update(report("blocks", 5)) == TimeLeft(seconds=50 + 40)
    clock.now = 112
    keeper.update(report("blocks", 10))
    clock.now = 122
    assert keeper.update(report("benchmarks", 5)) == TimeLeft(seconds=10)
    clock.now = 132
    assert keeper.update(report("benchmarks", 10)) == TimeLeft(seconds=0)


def test_stage_of_unknown_length_is_named(clock: Clock) -> None:
    keeper = TimeKeeper(clock)
    keeper.set_phases([Phase(stage="blocks"), Phase(stage="benchmarks")])
    assert keeper.update(report("blocks", 0)) is None
    clock.now = 30
    left = keeper.update(report("blocks", 5))
    assert left == TimeLeft(seconds=30, unknown=("benchmarks",))
    assert describe_left(left) == "30 s left, then benchmarks"
    keeper.set_phases([
        Phase(stage="hashes", seconds=3),
        Phase(stage="blocks"),
        Phase(stage="distribution", seconds=0),
        Phase(stage="benchmarks, source"),
        Phase(stage="benchmarks, artifact"),
    ])
    left = keeper.update(report("hashes", 0))
    assert left == TimeLeft(seconds=3, unknown=("blocks", "benchmarks"))


def test_resumed_stage_is_measured_from_where_it_began(clock: Clock) -> None:
    keeper = TimeKeeper(clock)
    clock.now = 10
    left = keeper.update(report("blocks", 8, began=6))  # two of ten blocks in 10 s, two are left
    assert left == TimeLeft(seconds=10)


def test_second_quantization_is_the_next_phase_of_its_name(clock: Clock) -> None:
    keeper = TimeKeeper(clock)
    keeper.set_phases([Phase(stage="blocks", seconds=50), Phase(stage="blocks", seconds=80)])
    clock.now = 25
    assert keeper.update(report("blocks", 5)) == TimeLeft(seconds=25 + 80)
    clock.now = 50
    assert keeper.update(report("blocks", 10)) == TimeLeft(seconds=80)
    clock.now = 90
    assert keeper.update(report("blocks", 5)) == TimeLeft(seconds=40)


def test_stage_that_was_not_announced_has_its_own_time(clock: Clock) -> None:
    keeper = TimeKeeper(clock)
    keeper.set_phases(PHASES)
    clock.now = 4
    assert keeper.update(report("sampling", 8)) == TimeLeft(seconds=1 + 150)
    assert TimeKeeper(clock).update(report("pull", 0, 0)) == TimeLeft(seconds=0)


def test_lines_have_error_and_time_left(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    progress_bar = ProgressBar(bars=False, clock=clock)
    progress_bar.set_phases(PHASES)
    for done in range(1, 101):
        clock.now = done
        progress_bar.update(report("blocks", done / 10, note=f"layer {done}\x1b"))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert lines[4] == "blocks: 50 % layer 50\\x1b; 90 s left".replace("90 s", "2 min")
    assert lines[-1] == "blocks: 100 % layer 100\\x1b; 40 s left"


def test_bars_fit_80_columns_and_are_not_red(clock: Clock) -> None:
    text = io.StringIO()
    console = Console(file=text, width=80, force_terminal=True, color_system="standard")
    bars = RichProgress(*make_columns(), console=console, auto_refresh=False)
    with bars:
        stage = bars.add_task("benchmarks, artifact", total=10, note="")
        bars.update(stage, completed=4, note="model.layers.27, error 4.91 %")
        bars.refresh()
    shown = text.getvalue()
    codes = {
        int(code) for codes in re.findall("\x1b\\[([0-9;]+)m", shown) for code in codes.split(";")
    }
    assert not {31, 91} & codes
    plain = re.sub("\x1b\\[[0-9;?]*[a-zA-Z]", "", shown)
    assert "model.layers.27, error 4…" in plain or "model.layers.27, error 4.91 %" in plain
    assert all(len(line) <= 80 for line in plain.replace("\r", "\n").splitlines())
    [bar] = [column for column in make_columns() if isinstance(column, BarColumn)]
    assert (bar.complete_style, bar.finished_style) == ("cyan", "green")


def test_phases_of_a_build_follow_its_recipe() -> None:
    time = PlanTime(
        seconds=100.0,
        steps={"source hashes": 1.0, "quantize": 60.0, "distribution": 9.0, "benchmarks": 30.0},
    )
    plan = plan_checkpoint(evaluation="{tasks: [gsm8k]}")
    phases = list_phases([plan], time, evaluate=True)
    assert [(phase.stage, phase.seconds) for phase in phases] == [
        ("source's sha256", 1.0),
        ("blocks", 60.0),
        ("distribution", 9.0),
        ("benchmarks, source", 15.0),
        ("benchmarks, artifact", 15.0),
    ]
    assert len(list_phases([plan], time, evaluate=False)) == 3
    unknown = list_phases([plan], PlanTime(), evaluate=True)
    assert [phase.seconds for phase in unknown] == [0.0, None, 0.0, None, None]
