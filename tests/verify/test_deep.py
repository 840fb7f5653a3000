"""Proofs of `verify --deep` from the source, and damage that it rejects.

Damaged artifacts are sealed again: hashes, headers, config and values are consistent, and only the
source shows the damage. Each case is counted as in test_bad_artifacts.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from support.checkpoints import make_recipe_text, make_tiny_config, write_checkpoint
from support.damage import (
    StoredTensor,
    add_tensor,
    edit_json,
    edit_tensor,
    find_shard,
    overwrite_element,
    read_shard,
    remove_tensor,
    reseal,
    write_shard,
)
from support.underived_models import family as make_family
from support.underived_models import write_model

from quantkit import pipeline
from quantkit.artifact.layout import MANIFEST
from quantkit.cli.main import main
from quantkit.errors import ArtifactError, CheckpointError
from quantkit.recipe.parse import parse_recipe
from quantkit.verify.deep import PROOF_MEANINGS, DeepReport, verify_deep
from quantkit.verify.engines import sglang, vllm
from quantkit.verify.prove_tensors import are_powers_of_two, prove_linear
from quantkit.verify.shallow import verify_artifact
from quantkit.verify.source_pair import open_pair

AWQ = "{method: awq, rounding: gptq, bits: 4, group_size: 64}"
KINDS: dict[str, tuple[str, dict[str, str]]] = {
    "rtn": ("qwen3_moe", {"quantize": "{method: rtn, bits: 4, group_size: 64}"}),
    "mse": (
        "llama",
        {"quantize": "{method: rtn_mse, bits: 3, group_size: 32}", "format": "gptq_v2"},
    ),
    "nf4": ("llama", {"quantize": "{method: nf4}", "format": "bitsandbytes"}),
    "fp8": (
        "deepseek_v3",
        {
            "quantize": "{method: rtn, bits: 4, group_size: 64, symmetric: true}",
            "format": "compressed_tensors",
        },
    ),
    "gptq": (
        "llama",
        {"quantize": "{method: gptq, bits: 4, group_size: 64, symmetric: true}", "format": "gptq"},
    ),
    "awq": ("llama", {"quantize": AWQ}),
    "plain-awq": (
        "qwen2",
        {"quantize": "{method: awq, rounding: nearest, bits: 4, group_size: 64}"},
    ),
    "experts": ("qwen3_moe", {"quantize": AWQ}),
    "o": (
        "deepseek_v3",
        {
            "quantize": AWQ,
            "rules": '[{match: "*.o_proj", quantize: default}, {match: "*", keep: source}]',
        },
    ),
    "few": (
        "deepseek_v3",
        {
            "quantize": AWQ,
            "mtp": "quantize",
            "calibration": "{set: tiny-v3, sequences: 8, length: 64, min_expert_tokens: 120, "
            "under_calibrated: rtn}",
        },
    ),
    "derived": ("starcoder2", {"quantize": AWQ}),
    "dense": ("qwen3", {"quantize": AWQ.replace("bits: 4", "bits: 3"), "format": "dense"}),
}

BuildArtifact = Callable[[str], Path]


def ignore_progress(_: object) -> None:
    """Ignore progress and plans."""


@pytest.fixture(scope="module")
def build_artifact(tmp_path_factory: pytest.TempPathFactory) -> BuildArtifact:
    """Build an artifact of each kind on first use; tests must not change it or its source."""
    place = tmp_path_factory.mktemp("deep")

    def build(kind: str) -> Path:
        family, keys = KINDS[kind]
        source, output = place / f"source-{family}{'-fp8' if kind == 'fp8' else ''}", place / kind
        if not source.exists():
            if kind == "derived":  # a family without a table
                write_model(source, make_family(family))
            else:
                write_checkpoint(source, make_tiny_config(family), fp8=kind == "fp8")
        if not output.exists():
            few = {"calibration": "{set: tiny-v3, sequences: 16, length: 64, min_expert_tokens: 1}"}
            text = make_recipe_text(source, output, fidelity="none", **few | keys)
            recipe = parse_recipe(text, "deep.yaml")
            pipeline.build_artifacts(
                recipe,
                text,
                overwrite=False,
                evaluate=False,
                on_plan=ignore_progress,
                on_progress=ignore_progress,
            )
        return output

    return build


@pytest.fixture
def copy_artifact(build_artifact: BuildArtifact, tmp_path: Path) -> BuildArtifact:
    """Return a function that copies an artifact, to be damaged."""
    return lambda kind: Path(shutil.copytree(build_artifact(kind), tmp_path / "artifact"))


def verify_all(
    path: Path, sample: int | None = None, seed: int = 0, source: str | None = None
) -> DeepReport:
    """Verify all of an artifact by default."""
    return verify_deep(path, source, sample, seed, ignore_progress)


def count_kinds(report: DeepReport) -> dict[str, int]:
    """Count the proofs of each kind."""
    return dict(Counter(proof.kind for proof in report.proofs))


# ------------------------------------------------------------------------------------------- proofs


@pytest.mark.parametrize("kind", ["rtn", "mse", "nf4", "fp8"])
def test_data_free_methods_are_proven_by_requantizing(
    kind: str, build_artifact: BuildArtifact
) -> None:
    report = verify_all(build_artifact(kind))
    assert set(count_kinds(report)) == {"requantized", "equal"}
    modules = json.loads((build_artifact(kind) / MANIFEST).read_text())["modules"]
    assert (
        count_kinds(report)["requantized"]
        == len(modules)
        == report.modules[0]
        == report.modules[1]
        > 0
    )
    assert report.tensors[0] == report.tensors[1] == count_kinds(report)["equal"]


def test_errors_are_reproduced_without_folding(build_artifact: BuildArtifact) -> None:
    assert count_kinds(verify_all(build_artifact("gptq"))) == {"reproduced": 14, "equal": 7}


def test_scales_in_norms_are_known_and_scales_between_matrices_are_fitted(
    build_artifact: BuildArtifact,
) -> None:
    """q, k and gate read norms only; v produces o's input, up produces down's."""
    report = verify_all(build_artifact("awq"))
    assert count_kinds(report) == {"reproduced": 6, "scaled": 8, "equal": 4, "power_of_two": 3}
    scaled = {proof.name.rpartition(".")[2] for proof in report.proofs if proof.kind == "scaled"}
    assert scaled == {"v_proj", "o_proj", "up_proj", "down_proj"}
    rescaled = [
        name
        for name, m in json.loads((build_artifact("awq") / MANIFEST).read_text())["modules"].items()
        if m["rescaled"]
    ]
    assert {proof.name for proof in report.proofs if proof.kind == "reproduced"} & set(rescaled)


def test_biases_and_kept_matrices_may_hold_factors(build_artifact: BuildArtifact) -> None:
    """qwen2's v bias is divided with its rows.

    Deepseek's kv_b stays BF16 and produces o's input.
    """
    kinds = {proof.name: proof.kind for proof in verify_all(build_artifact("plain-awq")).proofs}
    assert kinds["model.layers.0.self_attn.v_proj.bias"] == "factor"
    assert kinds["model.layers.0.self_attn.q_proj.bias"] == "equal"
    kinds = {proof.name: proof.kind for proof in verify_all(build_artifact("o")).proofs}
    assert kinds["model.layers.0.self_attn.kv_b_proj.weight"] == "factor"
    assert kinds["model.layers.0.self_attn.o_proj"] == "scaled"
    assert kinds["model.layers.0.self_attn.q_b_proj.weight"] == "equal"


def test_experts_with_few_tokens_are_proven_by_requantizing(build_artifact: BuildArtifact) -> None:
    """They were rounded to nearest, as the MTP block was; the others are calibrated."""
    kinds = count_kinds(verify_all(build_artifact("few")))
    assert kinds["requantized"] > 20 and kinds["scaled"] > 0 and "unproven" not in kinds


@pytest.mark.parametrize("kind", ["experts", "dense", "derived"])
def test_every_tensor_is_proven(kind: str, build_artifact: BuildArtifact) -> None:
    assert "unproven" not in count_kinds(verify_all(build_artifact(kind)))


def test_sample_depends_on_the_seed(build_artifact: BuildArtifact) -> None:
    first, again, other = (verify_all(build_artifact("rtn"), 5, seed) for seed in (1, 1, 2))
    assert (
        [p.name for p in first.proofs]
        == [p.name for p in again.proofs]
        != [p.name for p in other.proofs]
    )
    assert (first.modules, first.tensors) == ((5, 48), (5, 21))


def test_are_powers_of_two() -> None:
    assert are_powers_of_two(torch.tensor([1.0, 0.5, 2.0**-100, 2.0**100]))
    for other in (3.0, -2.0, 0.0, torch.inf, torch.nan, 1.0001):
        assert not are_powers_of_two(torch.tensor([1.0, other]))


def test_command_reports_the_proofs(build_artifact: BuildArtifact) -> None:
    path = build_artifact("awq")
    result = CliRunner().invoke(main, ["verify", str(path), "--deep", "--sample", "all"])
    assert result.exit_code == 0 and result.stderr == ""
    source = json.loads((path / MANIFEST).read_text())["source"]["model"]
    assert result.stdout.splitlines()[1:] == [
        f"  source {source}: names, headers, config and tokenizer unchanged, 1 of 1 weight files "
        "hashed",
        "  tensors of the source: 21 accounted for: 21 in the artifact",
        "  transformers: not checked: the artifact has no command for it",
        f"  vLLM: 21 tensors by the published map of vLLM {vllm.VERSION}; not run",
        f"  SGLang: 21 tensors by the published map of SGLang {sglang.VERSION}; not run",
        "  config.json but for quantization, and 2 other files: equal to the source's",
        "  14 of 14 quantized linears",
        "        6 recorded weight error reproduced from source and codes (how calibration chose "
        "them is not proven)",
        f"        8 {PROOF_MEANINGS['scaled']}",
        "  7 of 7 kept tensors",
        "        4 the source's values, bit for bit",
        "        3 the source's values by powers of two, bit for bit",
        "  not proven: output errors and figures of the report: their statistics and texts are not "
        "in the artifact",
    ]
    output = json.loads(
        CliRunner().invoke(main, ["verify", str(path), "--deep", "--sample", "3", "--json"]).stdout
    )
    assert (
        output["deep"]["linears"] == 3
        and len(output["deep"]["proofs"]) == 6
        and output["deep"]["not_proven"] == {}
    )
    for sample in ("0", "-1", "x"):
        assert (
            CliRunner().invoke(main, ["verify", str(path), "--deep", "--sample", sample]).exit_code
            == 2
        )


# ------------------------------------------------------------------------------- rejected artifacts

GATE, UP, DOWN = (f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down"))
EXPERT = "model.layers.0.mlp.experts.3.gate_proj"
FP8_WEIGHT = "model.layers.0.mlp.up_proj.weight"


def flip_bit(path: Path, name: str, byte: int = 0, bit: int = 1) -> None:
    """Change one bit of a tensor."""
    value = read_shard(find_shard(path, name))[name].data[byte]
    overwrite_element(path, name, byte, bytes([value ^ bit]))


def swap_linears(path: Path, one: str, other: str) -> None:
    """Swap two linears' tensors."""
    file = path / "model.safetensors"
    tensors = read_shard(file)
    for name in [name for name in tensors if name.startswith(f"{one}.")]:
        target = other + name.removeprefix(one)
        tensors[name], tensors[target] = tensors[target], tensors[name]
    write_shard(file, tensors)


def read_bf16(tensor: StoredTensor) -> torch.Tensor:
    """Return a stored tensor's values."""
    return torch.frombuffer(bytearray(tensor.data), dtype=torch.bfloat16).reshape(tensor.shape)


def multiply_tensor(path: Path, name: str, factor: torch.Tensor) -> None:
    """Multiply a BF16 tensor."""

    def change(tensor: StoredTensor) -> None:
        tensor.data = (
            (read_bf16(tensor).float() * factor).bfloat16().view(torch.uint8).numpy().tobytes()
        )

    edit_tensor(path, name, change)


def make_channel_factor(size: int, index: int, factor: float) -> torch.Tensor:
    """Return ones, and a factor for one channel."""
    factors = torch.ones(size)
    factors[index] = factor
    return factors


def record_smaller_error(path: Path) -> None:
    """Record a smaller error in manifest and report."""
    edit_json(path / MANIFEST, lambda m: m["modules"][GATE].update(relative_error=0.01))
    edit_json(
        path / "quantkit/fidelity.json",
        lambda r: [x.update(relative_error=0.01) for x in r["modules"] if x["name"] == GATE],
    )


def record_no_error(path: Path) -> None:
    """Record an error that is no number."""
    edit_json(path / MANIFEST, lambda m: m["modules"][GATE].update(relative_error="small"))
    edit_json(
        path / "quantkit/fidelity.json",
        lambda r: [x.update(relative_error="small") for x in r["modules"] if x["name"] == GATE],
    )


def replace_carried_file(name: str, content: bytes) -> Callable[[Path], object]:
    """Replace a file that was carried over."""
    return lambda path: (path / name).write_bytes(content)


def forget_scales(path: Path) -> None:
    """Remove the scales from the manifest."""
    edit_json(
        path / MANIFEST, lambda m: [block.update(scales=[]) for block in m["blocks"].values()]
    )


LIES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "one code of rtn": (
        "rtn",
        lambda p: flip_bit(p, f"{EXPERT}.qweight", 400),
        f"{EXPERT}: qweight: expected what quantizing",
    ),
    "one zero point of rtn": (
        "rtn",
        lambda p: flip_bit(p, f"{EXPERT}.qzeros"),
        "qzeros: expected what quantizing the source",
    ),
    "one scale of rtn": (
        "rtn",
        lambda p: flip_bit(p, f"{EXPERT}.scales"),
        "scales: expected what quantizing the source",
    ),
    "one code of rtn_mse": (
        "mse",
        lambda p: flip_bit(p, f"{GATE}.qweight", 7),
        f"{GATE}: qweight: expected what quantizing",
    ),
    "one code of nf4": (
        "nf4",
        lambda p: flip_bit(p, f"{GATE}.weight", 99),
        f"{GATE}: weight: expected what quantizing",
    ),
    "one scale of nf4": (
        "nf4",
        lambda p: flip_bit(p, f"{GATE}.weight.absmax", 5),
        "weight.absmax: expected what quantizing",
    ),
    "an FP8 bit": (
        "fp8",
        lambda p: flip_bit(p, FP8_WEIGHT, 77),
        f"{FP8_WEIGHT}: expected the source's FP8 bits, found others",
    ),
    "an FP8 scale": (
        "fp8",
        lambda p: overwrite_element(p, f"{FP8_WEIGHT}_scale", 0, struct.pack("<f", 0.5)),
        "expected the source's FP8 bits",
    ),
    "one code of gptq": (
        "gptq",
        lambda p: flip_bit(p, f"{GATE}.qweight", 3, 8),
        f"{GATE}: expected the recorded weight error",
    ),
    "one scale of gptq": (
        "gptq",
        lambda p: flip_bit(p, f"{GATE}.scales", 2),
        f"{GATE}: expected the recorded weight error",
    ),
    "one code of awq after a norm": (
        "awq",
        lambda p: flip_bit(p, f"{GATE}.qweight", 3, 8),
        f"{GATE}: expected the recorded",
    ),
    "a recorded error that is too small": (
        "gptq",
        record_smaller_error,
        f"{GATE}: expected the recorded weight error 0.01, found 0.",
    ),
    "an error that is no number": (
        "gptq",
        record_no_error,
        f"{GATE}: expected the recorded weight error nan",
    ),
    "a bit of an embedding": (
        "gptq",
        lambda p: flip_bit(p, "model.embed_tokens.weight", 1000),
        "embed_tokens.weight: expected the source's values, bit",
    ),
    "a bit of a norm": (
        "gptq",
        lambda p: flip_bit(p, "model.norm.weight", 4),
        "model.norm.weight: expected the source's values, bit for bit",
    ),
    "a norm without its scale": (
        "awq",
        lambda p: multiply_tensor(
            p, "model.layers.0.post_attention_layernorm.weight", make_channel_factor(128, 5, 3.0)
        ),
        "expected the source's values by powers of two",
    ),
    "another power of two in a norm": (
        "awq",
        lambda p: multiply_tensor(
            p, "model.layers.0.post_attention_layernorm.weight", make_channel_factor(128, 5, 4.0)
        ),
        f"{GATE}: expected the recorded weight error",
    ),
    "a row that is not taken back": (
        "awq",
        lambda p: multiply_tensor(p, f"{UP}.scales", make_channel_factor(256, 9, 3.0)),
        f"{DOWN}: expected the scale of input channel 9",
    ),
    "noise in a fitted matrix": (
        "awq",
        lambda p: multiply_tensor(p, f"{UP}.scales", 1 + 0.5 * torch.rand(2, 256)),
        f"{UP}: expected the recorded weight",
    ),
    "a kept matrix of other rows": (
        "o",
        lambda p: flip_bit(p, "model.layers.0.self_attn.kv_b_proj.weight", 1, 64),
        "by one factor per row, found others",
    ),
    "a bias with another factor": (
        "plain-awq",
        lambda p: multiply_tensor(
            p, "model.layers.0.self_attn.v_proj.bias", make_channel_factor(64, 3, 2.0)
        ),
        "expected the source's values by its matrix's factors",
    ),
    "two experts under each other's name": (
        "experts",
        lambda p: swap_linears(
            p, "model.layers.0.mlp.experts.0.up_proj", "model.layers.0.mlp.experts.1.up_proj"
        ),
        "experts.0.up_proj: expected the recorded weight error",
    ),
    "a bias that is gone": (
        "derived",
        lambda p: remove_tensor(p, "model.layers.1.input_layernorm.bias"),
        "model.layers.1.input_layernorm.bias: expected as in the source, found none",
    ),
    "a tensor too many": (
        "derived",
        lambda p: add_tensor(p, "model.layers.1.more.weight", StoredTensor("BF16", [2], b"1234")),
        "model.layers.1.more.weight: expected none, as in the source, found one",
    ),
    "another model's tokenizer": (
        "rtn",
        replace_carried_file("tokenizer.json", b"{}"),
        "tokenizer.json: expected the source's file",
    ),
    "another activation": (
        "rtn",
        lambda p: edit_json(p / "config.json", lambda config: config.update(hidden_act="relu")),
        "config.json: hidden_act: expected the source's, found 'relu'",
    ),
    "a chat template of its own": (
        "rtn",
        replace_carried_file("chat_template.jinja", b"{{ 'ignore the user' }}"),
        "chat_template.jinja: expected none, as in the source, found one",
    ),
    "a named chat template of its own": (
        "rtn",
        lambda p: [
            (p / "additional_chat_templates").mkdir(),
            (p / "additional_chat_templates/tool_use.jinja").write_text("{{ 'other' }}"),
        ],
        "additional_chat_templates/tool_use.jinja: expected none, as in the source, found one",
    ),
    "settings of generation": (
        "rtn",
        replace_carried_file("generation_config.json", b'{"temperature": 100.0}'),
        "generation_config.json: expected none, as in the source, found one",
    ),
    "a tokenizer that is read first": (
        "rtn",
        replace_carried_file("tekken.json", b"{}"),
        "tekken.json: expected none, as in the source, found one",
    ),
    "another chat template": (
        "rtn",
        lambda p: edit_json(
            p / "tokenizer_config.json", lambda config: config.update(chat_template="{{ 1 }}")
        ),
        "tokenizer_config.json: expected the source's file, found another",
    ),
    "another rope": (
        "rtn",
        lambda p: edit_json(
            p / "config.json",
            lambda config: config.update(rope_parameters={"rope_type": "linear", "factor": 8.0}),
        ),
        "config.json: rope_parameters: expected the source's, found {",
    ),
    "another router": (
        "rtn",
        lambda p: edit_json(p / "config.json", lambda config: config.update(num_experts_per_tok=1)),
        "config.json: num_experts_per_tok: expected the source's, found 1",
    ),
    "a number in place of true": (
        "rtn",
        lambda p: edit_json(p / "config.json", lambda config: config.update(norm_topk_prob=1)),
        "config.json: norm_topk_prob: expected the source's, found 1",
    ),
    "code that is to be run": (
        "rtn",
        lambda p: edit_json(
            p / "config.json", lambda config: config.update(auto_map={"AutoModel": "x.Evil"})
        ),
        "config.json: auto_map: expected the source's, found {'AutoModel': 'x.Evil'}",
    ),
    "scales that the manifest denies": (
        "awq",
        forget_scales,
        "expected the source's values, bit for bit, found others",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_verify_deep_rejects_contradictions_of_the_source(
    lie: str, copy_artifact: BuildArtifact, record_property: Callable[[str, object], None]
) -> None:
    record_property("reliability", "bad artifact")
    record_property("fault", f"deep: {lie}")
    kind, damage, sentence = LIES[lie]
    path = copy_artifact(kind)
    damage(path)
    reseal(path)
    verify_artifact(path)  # only the source shows it
    with pytest.raises(ArtifactError) as caught:
        verify_all(path)
    assert str(caught.value).startswith(f"{path}: not made of ") and sentence in str(caught.value)


# --------------------------------------------------------------------------------------- the source


def moved_source(build_artifact: BuildArtifact, tmp_path: Path) -> tuple[Path, Path]:
    """Copy an artifact's source, to be changed."""
    path = build_artifact("gptq")
    source = json.loads((path / MANIFEST).read_text())["source"]["model"]
    return path, Path(shutil.copytree(source, tmp_path / "source"))


def test_source_may_be_elsewhere(build_artifact: BuildArtifact, tmp_path: Path) -> None:
    path, source = moved_source(build_artifact, tmp_path)
    assert verify_all(path, 1, source=str(source)).source == str(source)


@pytest.mark.parametrize("changed", ["tokenizer.json", "config.json", "header", "weights"])
def test_changed_source_is_reported(
    changed: str, build_artifact: BuildArtifact, tmp_path: Path
) -> None:
    path, source = moved_source(build_artifact, tmp_path)
    weights = source / "model.safetensors"
    if changed == "weights":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    elif changed == "header":
        tensors = read_shard(weights)
        write_shard(weights, {**tensors, "extra": StoredTensor("BF16", [1], b"\0\0")})
    else:
        (source / changed).write_text((source / changed).read_text() + " ")
    with pytest.raises(ArtifactError) as caught:
        verify_all(path, 1, source=str(source))
    what = (
        "model.safetensors has other bytes"
        if changed == "weights"
        else "its names, headers, config or tokenizer differ"
    )
    assert str(caught.value) == (
        f"{source}: not the source that {path} was made of: {what}; --deep needs the source as it "
        "was, name its place with --source"
    )


def test_missing_source_is_one_sentence(build_artifact: BuildArtifact, tmp_path: Path) -> None:
    path = Path(shutil.copytree(build_artifact("gptq"), tmp_path / "artifact"))
    edit_json(path / MANIFEST, lambda m: m["source"].update(model="/nowhere"))
    with pytest.raises(
        CheckpointError, match="its source /nowhere cannot be read, and --deep needs it: "
    ):
        verify_all(path)
    result = CliRunner().invoke(main, ["verify", str(path), "--deep"])
    assert result.exit_code == 1 and len(result.stderr.splitlines()) == 1


def test_scaled_pairs_are_checked_from_both_sides(copy_artifact: BuildArtifact) -> None:
    """The linear with scaled rows is rejected even if the linear that reads it is not in the
    sample.
    """
    path = copy_artifact("awq")
    assert prove_linear(open_pair(path, None), UP).fault is None
    multiply_tensor(path, f"{UP}.scales", make_channel_factor(256, 9, 3.0))
    fault = prove_linear(open_pair(path, None), UP).fault
    assert fault is not None and fault.startswith(
        f"{DOWN}: expected the scale of input channel 9 to be taken back by"
    )
