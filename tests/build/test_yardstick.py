"""The yardstick of a build equals a build of its own that rounds to nearest."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.builds import build
from support.checkpoints import make_tiny_config, write_checkpoint

from quantkit.artifact.fidelity_schema import Fidelity
from quantkit.plan import plan as plan_module
from quantkit.plan.memory import MemoryPlan
from quantkit.recipe.schema import Gate
from quantkit.report import format_numbers, gates, tables

pytestmark = pytest.mark.usefixtures("quick_builds")

QUANTIZE = "{{method: {}, rounding: {}, bits: 4, group_size: 64, symmetric: true}}"
TEXT = "{{set: tiny-v3-heldout, windows: 6, length: 64{}}}"
CALIBRATION = "{set: tiny-v3, sequences: 12, length: 64, min_expert_tokens: 8}"


def build_one(source: Path, output: Path, method: str, rounding: str, extra: str = "") -> Fidelity:
    return build(
        source,
        output,
        quantize=QUANTIZE.format(method, rounding),
        calibration=CALIBRATION,
        fidelity=TEXT.format(extra),
        rules="all-linear",
        format="compressed_tensors",
    ).fidelity


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    return write_checkpoint(folder / "moe", make_tiny_config("qwen3_moe"))


@pytest.mark.parametrize(
    ("model", "method"), [("qwen3_moe", "awq"), ("llama", "awq"), ("mixtral", "gptq")]
)
def test_yardstick_equals_a_build_that_rounds_to_nearest(
    tmp_path: Path, model: str, method: str
) -> None:
    """Experts, dense layers and kept tensors alike: the KL of every figure is the same number."""
    source = write_checkpoint(tmp_path / "source", make_tiny_config(model))
    own = build_one(source, tmp_path / "own", method, "gptq", ", yardstick: rtn")
    rounded = build_one(source, tmp_path / "rtn", "rtn", "nearest")
    assert own.yardstick is not None and rounded.yardstick is None
    for row in own.yardstick.rows:
        (expected,) = (x for x in rounded.distribution if x.domain == row.domain)
        measured = expected.figures["kl_mean"]
        assert measured is not None and measured.value == row.kl_mean.value
        (mine,) = (x for x in own.distribution if x.domain == row.domain)
        kl = mine.figures["kl_mean"]
        assert kl is not None and kl.value is not None and measured.value
        assert row.ratio.value == pytest.approx(kl.value / measured.value)
    assert own.yardstick.ratio.value != pytest.approx(1.0, abs=0.01)
    top1 = rounded.distribution[0].figures["top1"]
    assert top1 is not None and own.yardstick.top1.value == top1.value


@pytest.mark.parametrize("scheme", ["mxfp4", "nvfp4"])
def test_yardstick_of_fp4_equals_a_build_that_rounds_to_nearest(
    source: Path, tmp_path: Path, scheme: str
) -> None:
    """The yardstick has the codes of the recipe, whatever method chose them."""
    means = []
    for name, method, extra in (("own", "rtn_mse", ", yardstick: rtn"), ("rtn", "rtn", "")):
        report = build(
            source,
            tmp_path / name,
            quantize=f"{{scheme: {scheme}, method: {method}}}",
            calibration=CALIBRATION,
            fidelity=TEXT.format(extra),
            rules="all-linear",
            format="compressed_tensors",
        ).fidelity
        kl = report.distribution[0].figures["kl_mean"]
        means.append(report.yardstick.kl_mean.value if report.yardstick else kl and kl.value)
    assert means[0] == means[1] is not None


def test_yardstick_changes_no_weight(source: Path, tmp_path: Path) -> None:
    for name, extra in (("with", ", yardstick: rtn"), ("without", "")):
        build_one(source, tmp_path / name, "awq", "gptq", extra)
    both = [sorted((tmp_path / name).glob("*.safetensors")) for name in ("with", "without")]
    assert [path.read_bytes() for path in both[0]] == [path.read_bytes() for path in both[1]]


def test_report_shows_yardstick_noise_and_headroom(source: Path, tmp_path: Path) -> None:
    report = build_one(source, tmp_path / "a", "awq", "gptq", ", yardstick: rtn")
    assert report.yardstick is not None and report.noise_floor is not None
    noise, kl = report.noise_floor.kl_mean.value, report.distribution[0].figures["kl_mean"]
    assert noise is not None and kl is not None and kl.value is not None
    assert 0 < noise < kl.value
    shown = {
        row[0].partition(" [")[0]: row[1] for row in tables.make_distribution_table(report).rows
    }
    assert shown["KL mean / that of RTN"] == format_numbers.format_factors(report.yardstick.ratio)
    assert {"KL mean, RTN", "KL mean, noise floor"} <= shown.keys()
    bound = 2 * kl.value
    judged = gates.apply_gates({"kl_mean": Gate(max=bound), "yardstick": Gate(max=9)}, report)
    first, second = judged.gates
    assert first.headroom == pytest.approx(bound - kl.value)
    assert first.headroom_share == pytest.approx(0.5) and second.ok
    assert tables.make_gate_table(judged).rows[0][3] == "50 %"


def test_gate_on_an_absent_yardstick_is_not_judged(source: Path, tmp_path: Path) -> None:
    report = build_one(source, tmp_path / "a", "rtn", "nearest")
    (result,) = gates.judge_gates({"yardstick": Gate(max=1)}, report)
    assert result.ok is None and result.reason == "not measured"


def test_yardstick_costs_memory_and_scratch(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A further float32 copy of a block's weights, and a third stream of the fidelity text."""
    planned = list[MemoryPlan]()
    real = plan_module.plan_memory

    def record(*args, **kwargs):  # type: ignore[no-untyped-def]  # stands for `plan_memory`
        planned.append(real(*args, **kwargs))
        return planned[-1]

    monkeypatch.setattr(plan_module, "plan_memory", record)
    build_one(source, tmp_path / "a", "rtn", "nearest")
    plain = planned[-1]
    build_one(source, tmp_path / "b", "rtn", "nearest", ", yardstick: rtn")
    assert planned[-1].dense_bytes > plain.dense_bytes
    assert planned[-1].expert_bytes > plain.expert_bytes
    assert planned[-1].scratch_bytes > plain.scratch_bytes
