"""What `verify` vouches for is what engines load: transformers reads the same tensors from an
artifact of every format, and a folder that an engine would read otherwise is rejected.

Planted files are in the manifest with their right hashes: only the rules of the folder reject them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support.builds import build
from support.checkpoints import make_tiny_config, write_checkpoint
from support.damage import edit_json, rehash
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_utils import _get_resolved_checkpoint_files

from quantkit.artifact.layout import INDEX, MANIFEST, SINGLE
from quantkit.errors import ArtifactError
from quantkit.verify.shallow import VerifyReport, verify_artifact

pytestmark = pytest.mark.usefixtures("quick_builds")

SYMMETRIC = "{method: rtn, bits: 4, group_size: 64, symmetric: true}"
FORMATS: Mapping[str, tuple[str, dict[str, str]]] = {
    "dense": ("llama", {"quantize": "{method: rtn, bits: 3, group_size: 32}"}),
    "awq": ("qwen3_moe", {"quantize": "{method: rtn, bits: 4, group_size: 64}"}),
    "gptq": ("qwen3_moe", {"quantize": SYMMETRIC}),
    "gptq_v2": (
        "llama",
        {"quantize": "{method: rtn, bits: 3, group_size: 32, symmetric: true}"},
    ),
    "compressed_tensors": ("llama", {"quantize": SYMMETRIC}),
    "bitsandbytes": ("llama", {"quantize": "{method: nf4}"}),
}
RUNS_HERE = ("dense", "compressed_tensors", "bitsandbytes")
"""Formats whose packed form transformers can hold on this machine: AWQ and GPTQ need gptqmodel."""
SHARDED = ("awq", "gptq", "compressed_tensors")


@pytest.fixture(scope="module")
def make_artifact(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Build an artifact of each format on first use; tests must not change it."""
    place = tmp_path_factory.mktemp("loads")

    def make(name: str) -> Path:
        family, keys = FORMATS[name]
        source, output = place / f"source-{family}", place / name
        if not source.exists():
            write_checkpoint(source, make_tiny_config(family))
            (source / "chat_template.jinja").write_text("{{ messages }}")
            (source / "additional_chat_templates").mkdir()
            (source / "additional_chat_templates/rag.jinja").write_text("{{ documents }}")
        if not output.exists():
            size = "200KB" if name in SHARDED else "5GB"
            build(
                source,
                output,
                format=name,
                fidelity="none",
                output=f"{{path: {output}, shard_bytes: {size}}}",
                **keys,
            )
        return output

    return make


@pytest.fixture
def sharded_artifact(make_artifact: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of an artifact with an index, to be changed."""
    return Path(shutil.copytree(make_artifact("awq"), tmp_path / "artifact"))


def read_tensors(path: Path, files: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Read every tensor of these files with the safetensors library."""
    tensors = {}
    for name in files:
        with safe_open(path / name, framework="pt") as file:
            tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return tensors


def list_transformers_files(path: Path) -> tuple[str, ...]:
    """Return the weight files that transformers chooses in a folder."""
    files, _ = _get_resolved_checkpoint_files(
        pretrained_model_name_or_path=path,
        variant=None,
        gguf_file=None,
        use_safetensors=None,
        user_agent={},
        is_remote_code=False,
        download_kwargs={},
    )
    return tuple(sorted(Path(file).name for file in files))


def list_vllm_files(path: Path) -> tuple[str, ...]:
    """Return the weight files that vLLM and SGLang choose, by the rule that README.md describes."""
    if any(path.glob("consolidated*.safetensors")):
        return tuple(sorted(file.name for file in path.glob("consolidated*.safetensors")))
    for pattern in ("*.safetensors", "*.bin", "*.pt"):
        if files := {file.name for file in path.glob(pattern)}:
            break
    if (path / INDEX).is_file() and pattern == "*.safetensors":
        files &= set(json.loads((path / INDEX).read_text())["weight_map"].values())
    return tuple(sorted(files))


def get_error(path: Path) -> str:
    """Return verify's message."""
    with pytest.raises(ArtifactError) as caught:
        verify_artifact(path)
    return str(caught.value)


# ------------------------------------------------------------------------------- what engines load


@pytest.mark.parametrize("name", FORMATS)
def test_engines_choose_the_files_that_verify_names(
    name: str, make_artifact: Callable[[str], Path]
) -> None:
    path = make_artifact(name)
    report = verify_artifact(path)
    assert list_transformers_files(path) == report.weight_files == list_vllm_files(path)
    assert (len(report.weight_files) > 1) == (name in SHARDED)
    assert len(read_tensors(path, report.weight_files)) == report.tensors


@pytest.mark.parametrize("name", RUNS_HERE)
def test_transformers_loads_the_tensors_that_verify_names(
    name: str, make_artifact: Callable[[str], Path]
) -> None:
    """Every stored tensor is in the loaded model, with the same bits, and no other is random."""
    path = make_artifact(name)
    report = verify_artifact(path)
    stored = read_tensors(path, report.weight_files)
    model, info = load_with_transformers(path)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    state = model.state_dict()
    for key, tensor in stored.items():
        if ".quant_state." in key or ".nested_" in key:
            continue  # bitsandbytes' own record, from which the next tensors are made
        assert torch.equal(state[key].cpu().view(torch.uint8), tensor.view(torch.uint8)), key
    others = {key for key in state if key not in stored}
    assert others == set() or name == "bitsandbytes"


def load_with_transformers(path: Path) -> tuple[Any, Mapping[str, Any]]:
    """Load an artifact as stored, and return transformers' record of the load."""
    model, info = AutoModelForCausalLM.from_pretrained(
        path, dtype="auto", device_map="cpu", output_loading_info=True
    )
    return model, info


def test_chat_templates_of_the_source_travel(make_artifact: Callable[[str], Path]) -> None:
    path = make_artifact("dense")
    assert AutoTokenizer.from_pretrained(path).chat_template == {
        "default": "{{ messages }}",
        "rag": "{{ documents }}",
    }
    assert "additional_chat_templates/rag.jinja" in verify_artifact(path).sha256


# --------------------------------------------------------------------------- two models in a folder


def plant_small_file(path: Path) -> None:
    """Add a model.safetensors that holds the first tensors only."""
    first = sorted(path.glob("model-*.safetensors"))[0]
    shutil.copy(first, path / SINGLE)


def test_small_file_next_to_an_index_is_another_model_to_transformers(
    sharded_artifact: Path,
) -> None:
    """The attack is real: transformers loads the small file, vLLM the shards."""
    expected = list_transformers_files(sharded_artifact)
    plant_small_file(sharded_artifact)
    assert list_transformers_files(sharded_artifact) == (SINGLE,) != expected
    assert list_vllm_files(sharded_artifact) == expected
    rehash(sharded_artifact)
    assert (
        f"{SINGLE}: expected one set of weights, found {INDEX} too: transformers loads {SINGLE} "
        "alone, vLLM the files of the index"
    ) in get_error(sharded_artifact)


def write(name: str, content: str = "{}") -> Callable[[Path], object]:
    """Return a function that writes a file into an artifact."""

    def plant(path: Path) -> None:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(content)

    return plant


def write_weights(name: str) -> Callable[[Path], object]:
    """Return a function that writes a safetensors file into an artifact."""

    def plant(path: Path) -> None:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        save_file({"lm_head.weight": torch.zeros(2, 2)}, path / name)

    return plant


def set_config(**values: object) -> Callable[[Path], object]:
    """Return a function that adds keys to config.json."""
    return lambda path: edit_json(path / "config.json", lambda config: config.update(values))


def drop_shard_number(path: Path) -> None:
    """Name the last shard one number higher than their count, in the index too."""
    old = sorted(path.glob("model-*.safetensors"))[-1].name
    new = f"model-{int(old[6:11]) + 1:05d}{old[11:]}"
    (path / old).rename(path / new)
    (path / INDEX).write_text((path / INDEX).read_text().replace(old, new))


def rename_shard(path: Path) -> None:
    """Give the last shard a name of its own, in the index too."""
    old = sorted(path.glob("model-*.safetensors"))[-1].name
    (path / old).rename(path / "part-b.safetensors")
    (path / INDEX).write_text((path / INDEX).read_text().replace(old, "part-b.safetensors"))


def move_shard_into_folder(path: Path) -> None:
    """Move a shard into a folder, in the index too; vLLM would not find it."""
    old = sorted(path.glob("model-*.safetensors"))[-1].name
    (path / "shards").mkdir()
    (path / old).rename(path / "shards" / old)
    (path / INDEX).write_text((path / INDEX).read_text().replace(old, f"shards/{old}"))


SECOND = "a second set of weights"
PICKLE = "a pickle, which runs code"
ADAPTER = "an adapter, which engines may add"
ELSEWHERE = "a file by which an engine would load something else"
OTHER = "a kind of file that an artifact does not hold"
PLANTED: dict[str, tuple[Callable[[Path], object], str]] = {
    # ------------------------------------------------------------------------------ other weights
    "half precision": (write_weights("model.fp16.safetensors"), SECOND),
    "Mistral's format": (write_weights("consolidated.safetensors"), SECOND),
    "Mistral's config": (write("params.json"), ELSEWHERE),
    "MTP weights that SGLang adds": (write_weights("mtp.safetensors"), SECOND),
    "other case": (write_weights("MODEL.safetensors"), SECOND),
    "other case of the suffix": (write_weights("model.SafeTensors"), SECOND),
    "a folder": (write_weights("fp16/model.safetensors"), SECOND),
    "a folder of an adapter": (write("adapter/adapter_config.json"), ADAPTER),
    "a shard of another set": (
        write_weights("model-00001-of-00002.safetensors"),
        "expected shards of one set",
    ),
    "a missing number": (drop_shard_number, "expected shards 1 to "),
    "a shard of another name": (rename_shard, f"part-b.safetensors: {SECOND}"),
    "a shard in a folder": (move_shard_into_folder, SECOND),
    "PyTorch": (write("pytorch_model.bin"), PICKLE),
    "PyTorch in capitals": (write("pytorch_model.BIN"), PICKLE),
    "PyTorch's index": (write("pytorch_model.bin.index.json"), "an index of a second set"),
    "another index": (write("model.safetensors.index.fp8.json"), ELSEWHERE),
    "an index of a variant": (write("model.fp8.safetensors.index.json"), "an index of a second"),
    "TensorFlow": (write("tf_model.h5"), SECOND),
    "Flax": (write("flax_model.msgpack"), SECOND),
    "GGUF": (write("model.gguf"), SECOND),
    "ONNX": (write("onnx/model.onnx"), SECOND),
    "TorchServe": (write("model.mar"), PICKLE),
    "NumPy": (write("weights.npz"), PICKLE),
    "a checkpoint": (write("last.ckpt"), PICKLE),
    "training state": (write("optimizer.pt"), PICKLE),
    # ----------------------------------------------------------------------------------- adapters
    "an adapter's config": (write("adapter_config.json"), ADAPTER),
    "an adapter": (write_weights("adapter_model.safetensors"), ADAPTER),
    "a pickled adapter": (write("Adapter_Model.bin"), PICKLE),
    # ------------------------------------------------------------------------------- running code
    "joblib": (write("vectorizer.joblib"), PICKLE),
    "dill": (write("x.dill"), PICKLE),
    "a pickled vocabulary": (write("vocab.pkl"), PICKLE),
    "a pickle in capitals": (write("tokenizer.PKL"), PICKLE),
    "a license that is a pickle": (write("LICENSE.bin"), PICKLE),
    "a license that is weights": (write_weights("LICENSE.safetensors"), SECOND),
    "a compiled module": (write("modeling_x.pyc"), "code that no auto_map"),
    "a library": (write("modeling_x.so"), "code that no auto_map"),
    "a module that Python runs": (write("usercustomize.py"), "code that no auto_map"),
    "a module that hides a library": (write("torch.py"), "code that no auto_map"),
    "a module in a folder": (write("custom_generate/generate.py"), "code that no auto_map"),
    # ----------------------------------------------------------------- files that engines look for
    "ModelOpt's quantization": (write("hf_quant_config.json"), ELSEWHERE),
    "a quantization that vLLM globs": (write("tokenizer_quant_config.json"), ELSEWHERE),
    "an older quantization": (write("quantize_config.json"), ELSEWHERE),
    "a pooling model": (write("1_Pooling/config.json"), "without the modules.json"),
    "modules": (write("modules.json"), "expected a class of sentence_transformers"),
    "a config for newer versions": (write("config.4.0.0.json"), ELSEWHERE),
    "a page": (write("quantkit/loadtest.html", "<script>"), "a file that the artifact writes"),
    "another page": (write("index.html", "<script>"), OTHER),
    # -------------------------------------------------------------------------------------- names
    "an invisible character": (write("tokenizer\u200b.json"), "holds a control character"),
    "a name from right to left": (write("nosj\u202e.txt"), "holds a control character"),
    "an invisible letter": (write("tokenizer\u3164.json"), OTHER),
    "a wide blank": (write("tokenizer\u2003.json"), OTHER),
    "a name of another case": (write("Tokenizer.json"), "the same file as"),
    "a name that Windows reads": (write("..\\tokenizer.json"), "a path of another system"),
    # --------------------------------------------------------------------------------------- keys
    "transformers' weights": (set_config(transformers_weights="x.safetensors"), "load another"),
    "transformers' configs": (set_config(configuration_files=["c.json"]), "read another file"),
    "vLLM's speculators": (set_config(speculators_config={"a": 1}), "serve another model"),
    "a kernel": (set_config(_attn_implementation="org/kernel"), "code of another repository"),
    "nested": (set_config(text_config={"compression_config": {"a": 1}}), "text_config.compression"),
    "another class than model_type's": (
        set_config(architectures=["LlamaForSequenceClassification"]),
        "architectures: expected the causal language model of qwen3_moe, found",
    ),
    "a head that transformers ties": (set_config(tie_word_embeddings=True), "lm_head.weight"),
    "a vocabulary elsewhere": (
        write("tokenizer_config.json", '{"vocab_file": "/etc/passwd"}'),
        "vocab_file: expected a file of this folder, found '/etc/passwd'",
    ),
}
"""Fault -> the planted files, and part of the message."""


@pytest.mark.parametrize("fault", PLANTED)
def test_verify_rejects_what_engines_read_otherwise(
    fault: str, sharded_artifact: Path, record_property: Callable[[str, object], None]
) -> None:
    record_property("reliability", "bad artifact")
    record_property("fault", f"engines: {fault}")
    plant, sentence = PLANTED[fault]
    plant(sharded_artifact)
    rehash(sharded_artifact)
    message = get_error(sharded_artifact)
    assert sentence in message
    assert "sha256" not in message and "not in the manifest" not in message


def test_index_next_to_a_single_file_is_rejected(
    make_artifact: Callable[[str], Path], tmp_path: Path
) -> None:
    """An index that names other files makes vLLM load nothing of the single file."""
    path = Path(shutil.copytree(make_artifact("dense"), tmp_path / "artifact"))
    (path / INDEX).write_text('{"metadata": {}, "weight_map": {"x": "y.safetensors"}}')
    rehash(path)
    assert f"{SINGLE}: expected one set of weights, found {INDEX} too" in get_error(path)


def test_code_of_another_repository_is_noted(sharded_artifact: Path) -> None:
    """Such a model is common; its code runs only on request, and nothing vouches for it."""
    set_config(auto_map={"AutoModel": "org/repo--modeling_x.Model"})(sharded_artifact)
    rehash(sharded_artifact)
    (note,) = verify_artifact(sharded_artifact).notes
    assert note.startswith(
        "config.json: auto_map names code of another repository, 'org/repo--modeling_x.Model'"
    )


def test_page_of_an_older_load_test_is_named(sharded_artifact: Path) -> None:
    write("quantkit/loadtest.html", "<script>")(sharded_artifact)
    assert "quantkit/loadtest.html: a page that neither manifest nor signature covers" in get_error(
        sharded_artifact
    )


# ------------------------------------------------------------------------- changes during the check


def test_unreadable_folder_is_rejected(
    sharded_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine may open files by name in a folder that cannot be listed."""
    import os

    scan = os.scandir

    def refuse(path: Any = ".") -> Any:
        if str(path).endswith("quantkit"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert get_error(sharded_artifact) == (
        f"{sharded_artifact}: expected a readable folder, found: permission denied; check its "
        "permissions"
    )


def exchange(path: Path) -> None:
    """Exchange a file for one with the same bytes."""
    shutil.copy2(path, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def write_same(path: Path) -> None:
    """Write the same bytes in place, and reset mtime."""
    import os

    state = path.stat()
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def swap_and_back(path: Path) -> None:
    """Rename a file away and back."""
    path.rename(path.with_name("away"))
    path.with_name("away").rename(path)


CHANGES = {"exchanged": exchange, "written": write_same, "renamed and back": swap_and_back}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["config.json", "model-00001-of-{count}.safetensors", MANIFEST])
def test_change_during_the_check_is_rejected(
    change: str, name: str, sharded_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the bytes are right before and after: in between they may have been others."""
    from quantkit.verify import shallow

    count = f"{len(list(sharded_artifact.glob('model-*.safetensors'))):05d}"
    file = sharded_artifact / name.format(count=count)
    find = shallow.find_report_faults

    def change_then_find(*arguments: Any) -> Any:
        CHANGES[change](file)
        return find(*arguments)

    monkeypatch.setattr(shallow, "find_report_faults", change_then_find)
    assert "changed or exchanged while it was verified; find out" in get_error(sharded_artifact)


def test_manifest_is_part_of_the_report(sharded_artifact: Path) -> None:
    report: VerifyReport = verify_artifact(sharded_artifact)
    folders = {"./", "additional_chat_templates/"}
    assert set(report.sha256) | {MANIFEST} | folders == set(report.stamps)
