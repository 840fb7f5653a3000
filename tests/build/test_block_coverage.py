"""Coverage that a build records, compared with transformers' own activations."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.builds import build
from support.checkpoints import make_recipe_text, make_tiny_config, write_checkpoint
from transformers import AutoModelForCausalLM

from quantkit import pipeline
from quantkit.artifact.fidelity_schema import Fidelity, InputCoverage
from quantkit.build.coverage import SAMPLED_TOKENS, sample_tokens
from quantkit.build.hidden_states import StreamShape, open_stream
from quantkit.contracts import Config
from quantkit.models.layers import load_outer_model, make_meta_model
from quantkit.models.small_instance import make_random_tensors
from quantkit.recipe.parse import parse_recipe
from quantkit.texts.tokens import TokenSequence, pack_tokens

pytestmark = pytest.mark.usefixtures("quick_builds")

PART = "  - {{name: {0}, kind: {0}, licence: Apache-2.0, set: tiny-v3, domain: {0}}}\n"
FLOAT32 = "{device: cpu, dtype: float32, calibration: float32}"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama."""
    return write_checkpoint(tmp_path_factory.mktemp("llama") / "source", make_tiny_config("llama"))


def write_calibration(folder: Path, *kinds: str) -> str:
    """Return a calibration section with kinds of text in equal shares."""
    path = folder / "set.yaml"
    path.write_text("version: 2\nname: parts\nparts:\n" + "".join(map(PART.format, kinds)))
    return json.dumps({"set": str(path), "sequences": 48, "length": 128})


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A calibration section with mathematics only."""
    return write_calibration(tmp_path_factory.mktemp("set"), "math")


@pytest.fixture(scope="module")
def report(source: Path, narrow: str, tmp_path_factory: pytest.TempPathFactory) -> Fidelity:
    """The report of a build calibrated on mathematics only."""
    place = tmp_path_factory.mktemp("narrow")
    return build(source, place / "a", calibration=narrow, compute=FLOAT32).fidelity


def list_inputs(report: Fidelity) -> list[InputCoverage]:
    assert report.coverage is not None
    return [place for block in report.coverage for place in block.inputs]


def test_coverage_equals_that_of_transformers_activations(
    source: Path, narrow: str, report: Fidelity, tmp_path: Path
) -> None:
    """The inputs of the first block, observed in the whole model; shares by singular values in
    float64.
    """
    text = make_recipe_text(source, tmp_path / "a", calibration=narrow, compute=FLOAT32)
    tokens = pipeline.tokenize(parse_recipe(text, "test.yaml"), source).tokens
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    seen = dict[str, list[torch.Tensor]]()
    for module in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
        model.get_submodule(f"model.layers.0.{module}").register_forward_pre_hook(
            lambda _, x, name=module: seen.setdefault(name, []).append(x[0][0])
        )
    rows = dict[str, dict[str, np.ndarray]]()
    for use in ("calibration", "fidelity"):
        seen.clear()
        with torch.no_grad():
            for i in range(tokens[use].n_sequences):
                model(tokens[use].sequence(i).long()[None])
        rows[use] = {name: torch.cat(x).double().numpy() for name, x in seen.items()}
    kinds = np.repeat(tokens["fidelity"].domains, tokens["fidelity"].lengths)
    for place in list_inputs(report)[:4]:
        name = place.input.removeprefix("model.layers.0.")
        x, judged = rows["calibration"][name], rows["fidelity"][name]
        sizes = np.sqrt(np.square(x).sum(0))
        _, singular, directions = np.linalg.svd(x / sizes, full_matrices=True)
        parts = np.square((judged / sizes) @ directions.T)
        shares = parts @ (0.1 / (singular**2 + 0.1)) / parts.sum(1)
        expected = {kind: shares[kinds == kind].mean() for kind in sorted(set(kinds))}
        assert place.unspanned == pytest.approx(expected, rel=1e-3)
        assert place.effective_rank == pytest.approx(
            (singular**2 / (singular**2 + 0.1)).sum(), rel=1e-3
        )
        assert (place.tokens, place.channels) == x.shape


def test_kinds_that_were_not_calibrated_on_are_covered_less(report: Fidelity) -> None:
    """At every input; gates and table name the worst of them."""
    inputs = list_inputs(report)
    assert len(inputs) == 8
    for place in inputs:
        shares = {kind: share or 0.0 for kind, share in place.unspanned.items()}
        assert shares["math"] < min(shares["prose"], shares["code"])


def test_mixture_covers_what_a_narrow_set_does_not(
    source: Path, report: Fidelity, tmp_path: Path
) -> None:
    mixture = write_calibration(tmp_path, "prose", "math", "code")
    mixed = build(source, tmp_path / "a", calibration=mixture, compute=FLOAT32).fidelity
    for kind in ("prose", "code"):
        before, after = (
            max(place.unspanned[kind] or 0.0 for place in list_inputs(x)) for x in (report, mixed)
        )
        assert after < before


@pytest.mark.parametrize(
    "keys",
    [
        {"fidelity": "none", "gates": "{}"},
        {"quantize": "{method: rtn, bits: 4, group_size: 64}"},
    ],
)
def test_without_calibration_or_fidelity_text_there_is_none(
    source: Path, tmp_path: Path, keys: dict[str, str]
) -> None:
    build(source, tmp_path / "a", **keys)
    stored = json.loads((tmp_path / "a" / "quantkit" / "fidelity.json").read_text())
    assert stored["coverage"] is None


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_artifact_has_the_bytes_of_a_build_that_measures_nothing(
    family: str, tmp_path: Path
) -> None:
    """The grams hold factors in between, and every method reads them afterwards."""
    folder = write_checkpoint(tmp_path / "source", make_tiny_config(family))
    gptq = {"quantize": "{method: awq, rounding: gptq, bits: 4, group_size: 64}"}
    build(folder, tmp_path / "measured", **gptq)
    build(folder, tmp_path / "plain", fidelity="none", gates="{}", **gptq)
    name = "model.safetensors"
    assert (tmp_path / "measured" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_routed_experts_have_one_entry_by_their_shared_input(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "source", make_tiny_config("qwen3_moe"))
    report = build(folder, tmp_path / "a").fidelity
    names = [place.input for place in list_inputs(report)]
    assert [name for name in names if "mlp" in name] == [
        f"{block}.mlp.experts" for block in list_blocks(report)
    ]
    assert report.experts is not None


def list_blocks(report: Fidelity) -> list[str]:
    assert report.coverage is not None
    return [block.block for block in report.coverage]


def test_sample_takes_every_kind_evenly_and_no_solution(tmp_path: Path) -> None:
    """A long kind is cut to the limit, a short one is whole, at every position of a sequence."""
    math, prose = (
        TokenSequence(domain="math", ids=[1] * 64),
        TokenSequence(domain="prose", ids=[2] * 30),
    )
    text = pack_tokens([math] * 200 + [prose])
    solutions = pack_tokens([TokenSequence(domain="gsm8k", ids=[3] * 50)] * 4)
    meta = make_meta_model(
        Config(values=make_tiny_config("llama")), torch.device("cpu"), torch.float32
    )
    outer = load_outer_model(meta, make_random_tensors(meta))
    shape = StreamShape(folder=tmp_path, width=128, expert_width=0, equal_lengths=False)
    stream = open_stream("reference", text, solutions, outer, 8, shape, "float32")
    sample = sample_tokens(stream)
    assert sample.labels == ("math", "prose")
    counts = sample.kinds.bincount().tolist()
    assert abs(counts[0] - SAMPLED_TOKENS) <= 2 and counts[1] == 30
    ids = stream.tokens.ids[sample.rows]
    assert torch.equal(ids, sample.kinds.to(ids) + 1)
    positions = (sample.rows[sample.kinds == 0] % 64).bincount(minlength=64)
    assert int(positions.min()) >= 10 and int(positions.max()) <= 22
