"""Source checkpoints: rejected input and its messages, and FP8 blocks by independent arithmetic."""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.checkpoint.folder_rules import is_sidecar
from quantkit.errors import CheckpointError

CONFIG = {
    "model_type": "x",
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [2, 2]},
}
WEIGHT = torch.ones(3, 3).to(torch.float8_e4m3fn)
SCALE = torch.tensor([[1.0, 2], [3, 4]])


def save(folder: Path, *shards: Mapping[str, Tensor], config: object = CONFIG) -> Path:
    """Write a checkpoint of one file, or of several with an index."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if len(shards) == 1:
        save_file(dict(shards[0]), folder / "model.safetensors")
        return folder
    for number, shard in enumerate(shards):
        save_file(dict(shard), folder / f"{number}.safetensors")
    return write_index(
        folder,
        {name: f"{number}.safetensors" for number, shard in enumerate(shards) for name in shard},
    )


def write_index(folder: Path, weight_map: object) -> Path:
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return folder


def get_error(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    return str(caught.value).replace(str(folder), "F")


def test_all_faults_are_reported_at_once(tmp_path: Path) -> None:
    tensors = {f"a{i}.weight": WEIGHT.clone() for i in range(25)}
    scales = {f"a{i}.weight_scale_inv": torch.ones(3 + i, 7) for i in range(25)}
    folder = save(tmp_path, tensors)
    assert "'a0.weight' and 24 more: expected its scale" in get_error(folder)  # one kind of fault
    save(tmp_path, {**tensors, **scales})
    lines = get_error(folder).splitlines()
    assert len(lines) == 21
    assert lines[-1] == "and 5 more faults of this checkpoint"
    (folder / "config.json").unlink()
    os.truncate(folder / "model.safetensors", 3)
    assert get_error(folder).splitlines() == [
        "F/config.json: expected the model's configuration, found no file; check the path",
        "F/model.safetensors: expected at least 8 bytes of header length, found 3; "
        "the file is damaged, fetch or write it again",
    ]


# ------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_read_rejects_nan_and_infinity_anywhere(
    tmp_path: Path, value: float, dtype: torch.dtype
) -> None:
    tensor = torch.zeros(5, 7, dtype=dtype)
    tensor[3, 4] = value
    opened = Checkpoint.open(save(tmp_path, {"w": tensor}))
    with pytest.raises(CheckpointError) as caught:
        opened.read(["w"])
    assert str(caught.value) == (
        f"{tmp_path}/model.safetensors: tensor 'w': expected finite values, found {value} at "
        "element 25; the weights are damaged, fetch the file again"
    )


def test_read_rejects_nan_in_fp8_and_in_scales(tmp_path: Path) -> None:
    bad = WEIGHT.clone()
    bad.view(torch.uint8)[2, 1] = 0xFF
    opened = Checkpoint.open(save(tmp_path, {"w": bad, "w_scale_inv": SCALE}))
    for read in (lambda: opened.read(["w"]), lambda: opened.read_fp8_blocks("w")):
        with pytest.raises(
            CheckpointError, match="tensor 'w': expected finite values, found nan at element 7"
        ):
            read()
    opened = Checkpoint.open(save(tmp_path, {"w": WEIGHT, "w_scale_inv": SCALE / 0}))
    for read in (lambda: opened.read(["w"]), lambda: opened.read_fp8_blocks("w")):
        with pytest.raises(
            CheckpointError, match="tensor 'w_scale_inv': expected finite values, found inf at elem"
        ):
            read()


def test_read_fp8_blocks_rejects_other_dtypes(tmp_path: Path) -> None:
    opened = Checkpoint.open(save(tmp_path, {"w": WEIGHT, "w_scale_inv": SCALE, "v": SCALE + 1}))
    with pytest.raises(CheckpointError, match="tensor 'v': expected F8_E4M3 blocks, found F32"):
        opened.read_fp8_blocks("v")
    with pytest.raises(CheckpointError, match="expected a tensor 'x', found none of that name"):
        opened.read_fp8_blocks("x")


def test_other_dtypes_are_read_as_stored_and_unknown_names_get_a_suggestion(tmp_path: Path) -> None:
    tensors = {
        "half": torch.tensor([1.5]).half(),
        "single": torch.tensor([1.1]),
        "brain": torch.tensor([[2.0]]).bfloat16(),
        "count": torch.tensor(3),
    }
    opened = Checkpoint.open(save(tmp_path, tensors))
    read = opened.read(tensors)
    assert list(read) == list(tensors)
    assert all(
        read[name].dtype == tensors[name].dtype and torch.equal(read[name], tensors[name])
        for name in tensors
    )
    with pytest.raises(CheckpointError) as caught:
        opened.read(["singel"])
    assert str(caught.value) == (
        f"{tmp_path}: expected a tensor 'singel', found none of that name; did you mean 'single'?"
    )


def test_threads_read_concurrently(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((300, 300), float(i)) for i in range(8)}
    opened = Checkpoint.open(save(tmp_path, tensors))
    wrong: list[str] = []

    def work() -> None:
        for _ in range(20):
            wrong.extend(
                name
                for name, tensor in opened.read(tensors).items()
                if not torch.equal(tensor, tensors[name])
            )

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# ---------------------------------------------------------------------------------- files and index


A, B = {"a": torch.zeros(1)}, {"b": torch.zeros(1)}


def test_sharded_checkpoint_reads_as_one(tmp_path: Path) -> None:
    opened = Checkpoint.open(save(tmp_path, A, B))
    assert list(opened.read(["b", "a"])) == ["b", "a"]
    assert opened.config.text("model_type") == "x"


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (
            {"a": "/etc/x.safetensors"},
            "F/model.safetensors.index.json: file '/etc/x.safetensors': expected a path inside the "
            "folder, found one that leads elsewhere; do not use this checkpoint",
        ),
        (
            {"a": "../0.safetensors"},
            "F/model.safetensors.index.json: file '../0.safetensors': expected a path inside the "
            "folder, found one that leads elsewhere; do not use this checkpoint",
        ),
        (
            {"a": "0.bin"},
            "F/model.safetensors.index.json: file '0.bin': expected a .safetensors file, found "
            "'.bin'; convert the checkpoint",
        ),
        (
            {"a": "0.safetensors", "b": "9.safetensors"},
            "F/9.safetensors: expected a file named by the checkpoint, found none; fetch the "
            "missing file",
        ),
        (
            {"a": "0.safetensors", "b": "1.safetensors", "c": "1.safetensors"},
            "F/model.safetensors.index.json: tensor 'c': expected in 1.safetensors, found no such "
            "tensor there; fetch the file again",
        ),
        (
            {"a": "0.safetensors", "x": "1.safetensors"},
            "F/model.safetensors.index.json: tensor 'b' of 1.safetensors: expected in weight_map, "
            "found no entry; add it to the index or it would be lost\n"
            "F/model.safetensors.index.json: tensor 'x': expected in 1.safetensors, found no such "
            "tensor there; fetch the file again",
        ),
        (
            {},
            "F/model.safetensors.index.json: weight_map: expected an object of tensor names and "
            "file names, found {}; fetch the index again",
        ),
        (
            {"a": 1},
            "F/model.safetensors.index.json: weight_map: expected an object of tensor names and "
            "file names, found {'a': 1}; fetch the index again",
        ),
    ],
)
def test_wrong_index_is_rejected(tmp_path: Path, weight_map: object, message: str) -> None:
    assert get_error(write_index(save(tmp_path, A, B), weight_map)) == message


def test_tensor_in_two_shards_is_rejected(tmp_path: Path) -> None:
    folder = write_index(
        save(tmp_path, A, {**A, **B}), {"a": "0.safetensors", "b": "1.safetensors"}
    )
    assert get_error(folder) == (
        "F/model.safetensors.index.json: tensor 'a': expected in one file, found in 0.safetensors "
        "and 1.safetensors; fetch the checkpoint again"
    )


def test_folders_without_weights_are_rejected(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", A)
    (folder / "model.safetensors").unlink()
    expected = "F: expected model.safetensors or model.safetensors.index.json"
    assert (
        get_error(folder)
        == f"{expected}, found neither; check the path or fetch the checkpoint again"
    )
    (folder / "pytorch_model.bin").touch()
    assert get_error(folder) == (
        f"{expected}, found pickled weights (pytorch_model.bin) only; quantkit reads safetensors "
        "only, convert them with transformers (from_pretrained, then save_pretrained into a new "
        "folder)"
    )
    (folder / "model-00001-of-00002.safetensors").touch()
    assert get_error(folder) == (
        f"{expected}, found model-00001-of-00002.safetensors without an index; fetch the "
        "index, or all shards of one set"
    )
    assert get_error(tmp_path / "absent").splitlines()[-1] == (
        "F: expected a model folder, found none; check the path"
    )


def test_two_sets_of_weights_are_rejected(tmp_path: Path) -> None:
    folder = save(tmp_path, A, B)
    save_file(A, folder / "model.safetensors")
    assert get_error(folder) == (
        "F: expected one set of weights, found model.safetensors, which transformers loads, and an "
        "index that names '0.safetensors', which vLLM loads; remove one of them"
    )


def test_index_that_names_the_single_file_among_others_is_rejected(tmp_path: Path) -> None:
    """transformers loads model.safetensors alone and leaves the other tensors random."""
    folder = save(tmp_path, A, B)
    (folder / "0.safetensors").rename(folder / "model.safetensors")
    single = dict.fromkeys(A, "model.safetensors")
    write_index(folder, {**single, **dict.fromkeys(B, "1.safetensors")})
    assert get_error(folder) == (
        "F: expected one set of weights, found model.safetensors, which transformers loads, and an "
        "index that names '1.safetensors', which vLLM loads; remove one of them"
    )
    write_index(folder, single)
    assert set(Checkpoint.open(folder).specs) == set(A)  # both engines load the same


REDIRECTS = {
    "another weight file": {"transformers_weights": "other.safetensors"},
    "another config": {"configuration_files": ["config.4.0.0.json"]},
    "another model": {"speculators_config": {"verifier": {"name_or_path": "org/other"}}},
    "another quantization": {"compression_config": {"format": "pack-quantized"}},
    "a kernel of the Hub": {"_attn_implementation": "org/kernel"},
    "a nested key": {"text_config": {"attn_implementation": "org/kernel@main:run"}},
}


@pytest.mark.parametrize("redirect", REDIRECTS)
def test_config_that_leads_elsewhere_is_rejected(tmp_path: Path, redirect: str) -> None:
    folder = save(tmp_path, A)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | REDIRECTS[redirect]))
    assert get_error(folder).startswith("F/config.json: ")
    assert "; remove the key" in get_error(folder)


def test_adapter_next_to_a_model_is_rejected(tmp_path: Path) -> None:
    folder = save(tmp_path, A)
    (folder / "adapter_config.json").write_text("{}")
    assert get_error(folder) == (
        "F/adapter_config.json: expected a model alone, found an adapter next to it, which "
        "transformers adds where peft is installed; merge it into the weights, or remove it"
    )


def test_links_out_of_the_folder_are_rejected_except_in_the_hub_cache(tmp_path: Path) -> None:
    outside = save(tmp_path / "outside", A)
    folder = save(tmp_path / "m", A)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(outside / "model.safetensors")
    assert get_error(folder) == (
        "F/model.safetensors: expected a file inside the folder, found a link that leads out of "
        "it; copy the file, or set QUANTKIT_LINKS to the folder that it leads to"
    )
    snapshot = tmp_path / "models--o--n" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    blobs = tmp_path / "models--o--n" / "blobs"
    blobs.mkdir()
    for name in ("config.json", "model.safetensors"):
        (blobs / name).write_bytes((outside / name).read_bytes())
        (snapshot / name).symlink_to(Path("../../blobs") / name)
    assert list(Checkpoint.open(snapshot).specs) == ["a"]
    (snapshot / "tokenizer.json").symlink_to("/etc/hostname")
    with pytest.raises(
        CheckpointError, match="tokenizer.json: expected a file inside the folder, found a link"
    ):
        _ = Checkpoint.open(snapshot).sidecars


def test_links_into_a_named_folder_are_read_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside, folder = save(tmp_path / "outside", A), save(tmp_path / "m", A)
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()
        (folder / name).symlink_to(outside / name)
    for wrong in ("", "outside", str(tmp_path / "other"), str(tmp_path / "out")):
        monkeypatch.setenv("QUANTKIT_LINKS", wrong)
        assert "set QUANTKIT_LINKS to the folder" in get_error(folder)
    monkeypatch.setenv("QUANTKIT_LINKS", f"/nowhere:{outside}")
    opened = Checkpoint.open(folder)
    assert list(opened.specs) == ["a"]
    assert opened.shards.notes == (
        "1 weight files are links out of the folder, which QUANTKIT_LINKS allows",
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xef\xbb\xbf{}", "expected plain UTF-8, found a byte order mark; save the file without "
                            "it"),
        (b'{"a": "\xe9"}', "expected UTF-8, found byte 0xe9 at offset 7; save it as UTF-8"),
        (b'{"a": 1, "a": 2}', "expected every key once, found 'a' twice in one object; remove one "
                              "of them"),
        (b"[]", "expected a JSON object, found list; fetch the file again"),
        (b'{"a" 1}', "expected JSON, found an error (expecting ':' delimiter) at line 1 column 6; "
                      "repair or fetch the file"),
        (b"[" * 100_000, "expected JSON, found nesting or a number beyond any real file; fetch it "
                         "again"),
    ],
)  # fmt: skip
def test_unreadable_config_is_rejected(tmp_path: Path, content: bytes, message: str) -> None:
    folder = save(tmp_path, A)
    (folder / "config.json").write_bytes(content)
    assert get_error(folder) == f"F/config.json: {message}"


def test_unreadable_generation_config_is_rejected(tmp_path: Path) -> None:
    folder = save(tmp_path, A)
    (folder / "generation_config.json").write_text('{"temperature":')
    assert get_error(folder).startswith("F/generation_config.json: expected JSON, found an error")
    (folder / "generation_config.json").write_text("[]")
    assert get_error(folder).startswith(
        "F/generation_config.json: expected a JSON object, found list"
    )


def test_sidecars_are_the_files_that_an_artifact_carries_over(tmp_path: Path) -> None:
    folder = save(tmp_path, A, config={"auto_map": {"AutoConfig": "modeling_x.Config"}})
    kept = [
        "LICENSE",
        "chat_template.jinja",
        "generation_config.json",
        "merges.txt",
        "modeling_x.py",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
    ]
    for name in (
        *kept,
        "README.md",
        "unnamed.py",
        "pytorch_model.bin",
        "x.pt",
        "adapter.safetensors",
        "pytorch_model.bin.index.json",
    ):
        (folder / name).write_text("{}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/rag.jinja").write_text("{}")
    (folder / "additional_chat_templates/rag.py").write_text("{}")
    assert [path.relative_to(folder).as_posix() for path in Checkpoint.open(folder).sidecars] == [
        "LICENSE",
        "additional_chat_templates/rag.jinja",
        *kept[1:],
    ]


CARRIED = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.4.0.0.json", "tekken.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("spiece.model", "sentencepiece.bpe.model", "tokenizer.model.v3", "qwen.tiktoken"),
    *("chat_template.jinja", "chat_template.json", "generation_config.json"),
    *("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"),
    *("configuration_x.py", "LICENSE", "LICENSE.txt", "LICENSE-MODEL", "LICENCE.md", "NOTICE.txt"),
    *("LICENSE-APACHE-2.0", "additional_chat_templates/tool_use.jinja"),
    *("USE_POLICY", "Notice", "MODEL_LICENSE_AGREEMENT", "licenses/LICENSE", "Gemma-Terms.pdf"),
    *("modules.json", "1_Pooling/config.json", "sentence_bert_config.json", "x/tokenizer.json"),
    *("assets/figure.png", "configuration.json", "original/tokenizer.model", "audio.v2.yaml"),
    *("additional_chat_templates/x/y.jinja", "trainer_state.json", "evaluation_results.csv"),
    "2_Dense/model.safetensors",  # if modules.json names 2_Dense
)
LEFT = (
    *("vocab.pkl", "vocab.bin", "tokenizer.pkl", "LICENSE.bin", "LICENSE.safetensors", "NOTICE.PT"),
    *("tokenizer_quant_config.json", "hf_quant_config.json", "config.json", "README.md"),
    *("x/params.json", "x/config.json", "../tokenizer.json", "x/model.safetensors"),
    *("2_Dense/pytorch_model.bin", "2_Dense/x.safetensors", "x/2_Dense/model.safetensors"),
    *("x/modules.json", "quantkit/manifest.json", "recipe.yaml", "model_index.json", "page.html"),
    *("config.4.0.0.json", "model.safetensors.index.fp8.json", "x/hf_quant_config.json"),
    *("x/y.py", "figure.svg", "run.sh", "a/b/c/d/e.txt", "x/LICENSE.bin", "adapter_x.json", "data"),
    *("tokenizer\u200b.json", "spiece\u202e.model", "modeling_x.pyc", "chat_template.jinja\n"),
    *("model.bin.model.pt", ".model", "adapter_config.json", "params.json"),
)


@pytest.mark.parametrize("name", CARRIED)
def test_tokenizers_templates_and_licenses_are_carried_over(name: str) -> None:
    assert is_sidecar(name)


@pytest.mark.parametrize("name", LEFT)
def test_other_files_are_left(name: str) -> None:
    assert not is_sidecar(name)


def test_fingerprint_and_content_hash_differ_between_checkpoints(tmp_path: Path) -> None:
    one = Checkpoint.open(save(tmp_path / "1", A))
    same = Checkpoint.open(save(tmp_path / "2", A))
    values = Checkpoint.open(save(tmp_path / "3", {"a": torch.ones(1)}))
    names = Checkpoint.open(save(tmp_path / "4", B))
    config = Checkpoint.open(save(tmp_path / "5", A, config={}))
    assert one.compute_fingerprint() == same.compute_fingerprint() == values.compute_fingerprint()
    assert (
        len({one.compute_fingerprint(), names.compute_fingerprint(), config.compute_fingerprint()})
        == 3
    )
    assert one.compute_content_hash() == same.compute_content_hash()
    assert len({c.compute_content_hash() for c in (one, values, names, config)}) == 4
    (tmp_path / "1" / "tokenizer.json").write_text("{}")
    assert Checkpoint.open(tmp_path / "1").compute_fingerprint() != same.compute_fingerprint()


def test_hashing_reports_progress_once(tmp_path: Path) -> None:
    """The first call reports progress; the second one returns the known hashes."""
    steps = list[tuple[int, int, str]]()
    source = Checkpoint.open(
        save(tmp_path / "m", {"a": torch.ones(2, 2)}, {"b": torch.ones(3)}, config={})
    )
    files = [tmp_path / "m" / f"{number}.safetensors" for number in (0, 1)]
    expected = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    first, second = (file.stat().st_size for file in files)
    total = first + second
    for _ in range(2):
        assert (
            source.compute_hashes(lambda step: steps.append((step.done, step.total, step.note)))
            == expected
        )
        assert steps == [
            (0, total, "0.safetensors"),
            (first, total, "1.safetensors"),
            (total, total, ""),
        ]
