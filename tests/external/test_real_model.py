"""Tests of the real-model benchmarks without a real model: texts, unpackers, comparer, goals."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from external.real_model import against_peers, bench, texts, unpack
from external.real_model.bench import Cost
from external.real_model.measure import ModelComparer
from safetensors.torch import load_file, save_file
from support.checkpoints import make_tiny_config, write_checkpoint

from quantkit import registry
from quantkit.contracts import Scheme
from quantkit.io import package_data
from quantkit.methods import rtn
from quantkit.numerics.fidelity import Estimate
from quantkit.texts import corpora
from quantkit.texts.tokens import TokenSequence, pack_tokens

TEXT = "".join(f"line {index} of a text that has many of them .\n" for index in range(400))
CHECKPOINT = package_data.locate_model("builtin:tiny-v3")


# -------------------------------------------------------------------------------- texts


class WordTokenizer:
    """A tokenizer whose tokens are words, with their offsets."""

    def __call__(
        self, text: str, *, add_special_tokens: bool, return_offsets_mapping: bool, verbose: bool
    ) -> dict[str, list[tuple[int, int]]]:
        assert not add_special_tokens and return_offsets_mapping
        places, at = [], 0
        for word in text.split():
            at = text.index(word, at)
            places.append((at, at + len(word)))
            at += len(word)
        return {"offset_mapping": places}


def test_first_windows_match_the_whole_text() -> None:
    head = texts.cut_windows(TEXT, WordTokenizer(), 3, 20)
    assert TEXT.startswith(head)
    assert len(head.split()) == 3 * 20 + texts.MARGIN


def test_passages_start_at_lines_evenly_spaced() -> None:
    passages = texts.cut_passages(TEXT, WordTokenizer(), 4, 20)
    places = [TEXT.index(passage) for passage in passages]
    assert all(passage.startswith("line ") for passage in passages)
    assert places[0] == 0
    assert all(0 <= place - index * len(TEXT) // 4 < 60 for index, place in enumerate(places))


def test_short_text_is_rejected() -> None:
    with pytest.raises(SystemExit, match="expected a text of more than 264 tokens, found 54"):
        texts.cut_windows(TEXT[:200], WordTokenizer(), 2, 100)


def test_sets_give_quantkit_the_windows_of_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files with digest hashes become tokens through quantkit's own reader."""
    data = TEXT.encode()
    for file in ("valid.txt", "test.txt"):
        (tmp_path / file).write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    monkeypatch.setattr(texts, "VALID", ("valid.txt", digest))
    monkeypatch.setattr(
        texts, "TEST", {"tokenized": ("absent.txt", digest), "raw": ("test.txt", digest)}
    )
    for name, value in {"SEQUENCES": 3, "WINDOWS": 5, "LENGTH": 128}.items():
        monkeypatch.setattr(texts, name, value)
    tokenizer = corpora.load_tokenizer(CHECKPOINT)
    sets = texts.write_sets(tmp_path, tokenizer, tmp_path)
    assert sets.form == "raw"
    calibration = corpora.sample_sequences(
        corpora.load_set(str(sets.calibration), tmp_path), tokenizer, None, 128, 0
    )
    assert calibration.lengths == (128,) * 3
    sampled = corpora.sample_sequences(
        corpora.load_set(str(sets.fidelity), tmp_path), tokenizer, 5, 128, 0
    )
    whole = tokenizer([TEXT], add_special_tokens=False, verbose=False)["input_ids"][0]
    rows = sorted(
        sampled.sequence(index).tolist()[1:] for index in range(5)
    )  # without tiny-v3's BOS
    assert rows == sorted(whole[start : start + 127] for start in range(0, 5 * 127, 127))


def test_text_with_another_hash_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("other")
    with pytest.raises(SystemExit, match="expected sha256 00, found .*Restore the file"):
        texts.read_text(tmp_path, "x.txt", "00")


def test_benchmark_is_skipped_without_wikitext(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(texts, "find_wikitext", lambda: None)
    assert bench.prepare_bench(CHECKPOINT, tmp_path / "place") is None
    assert capsys.readouterr().out.startswith("skipped: wikitext-2 is not on this machine")
    assert not (tmp_path / "place").exists()


# -------------------------------------------------------------------------------- unpackers


@pytest.mark.parametrize(("name", "symmetric"), [
    ("awq", False), ("gptq", True), ("compressed_tensors", True), ("compressed_tensors", False),
])  # fmt: skip
def test_unpacker_matches_each_format(name: str, symmetric: bool, tmp_path: Path) -> None:
    """Two independent implementations read one artifact bit for bit."""
    scheme = Scheme(bits=4, group_size=32, symmetric=symmetric, scale_dtype="bfloat16", kind="int")
    weight = torch.randn(24, 96, generator=torch.Generator().manual_seed(1))
    packed = registry.get_format(name).pack(rtn.METHOD.solve(weight, None, scheme), scheme)
    save_file(
        {f"model.a.{part}": value.contiguous() for part, value in packed.items()},
        tmp_path / "x.safetensors",
    )
    config = {"quantization_config": {"quant_method": name}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    [(module, unpacked)] = unpack.read_dense_weights(tmp_path).items()
    assert module == "model.a.weight"
    assert torch.equal(unpacked, registry.get_format(name).dequantize(packed, scheme))


def test_gptq_v2_stores_unshifted_zero_points() -> None:
    words = torch.tensor([[-1985229329]], dtype=torch.int32)  # 0x89ABCDEF: inputs 15, 14, ... 8
    parts = {
        "qweight": words.expand(1, 8).contiguous(),
        "qzeros": torch.tensor([[-2004318072]], dtype=torch.int32),  # 0x88888888
        "scales": torch.ones(1, 8),
        "g_idx": torch.zeros(8, dtype=torch.int32),
    }
    assert unpack.unpack_gptq(parts, {"checkpoint_format": "gptq_v2"})[0].tolist() == [
        7,
        6,
        5,
        4,
        3,
        2,
        1,
        0,
    ]
    assert unpack.unpack_gptq(parts, {"checkpoint_format": "gptq"})[0].tolist() == [
        6,
        5,
        4,
        3,
        2,
        1,
        0,
        -1,
    ]


@pytest.mark.parametrize("nested", [False, True])
def test_nf4_is_read_as_documented(nested: bool) -> None:
    """As in quantkit/formats/README.md: first code in the high nibble; nested scales if
    quantized.
    """
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [1, 64]}
    scale = {"weight.absmax": torch.tensor([2.0])}
    if nested:
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}
        scale = {
            "weight.absmax": torch.tensor([200], dtype=torch.uint8),
            "weight.nested_absmax": torch.tensor([3.0]),
            "weight.nested_quant_map": torch.full((256,), 0.5),
        }
    codes = bytes.fromhex("0123456789abcdef" + "77" * 24)
    parts = {
        **scale,
        "weight": torch.tensor(list(codes), dtype=torch.uint8)[:, None],
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(
            list(json.dumps(state).encode()), dtype=torch.uint8
        ),
    }
    assert np.array_equal(
        unpack.unpack_nf4(parts, {}),
        2 * np.concatenate([unpack.NF4, np.zeros(48)])[None].astype("f4"),
    )


# -------------------------------------------------------------------------------- comparer


def test_comparer_measures_zero_for_the_source_and_kl_for_a_changed_model(
    tmp_path: Path,
) -> None:
    source = write_checkpoint(tmp_path / "source", make_tiny_config("llama"))
    changed = write_checkpoint(tmp_path / "changed", make_tiny_config("llama"))
    tensors = load_file(changed / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"] *= 0.5
    save_file(tensors, changed / "model.safetensors")
    rows = [
        TokenSequence(
            domain="prose",
            ids=torch.randint(3, 700, (20,), generator=torch.Generator().manual_seed(i)).tolist(),
        )
        for i in (0, 1)
    ]
    comparer = ModelComparer(source, pack_tokens(rows))
    same, other = comparer.compute_figures(source), comparer.compute_figures(changed)
    assert same["kl_mean"].n == other["kl_mean"].n == 2 * 19
    assert same["kl_mean"].value < 1e-9 and same["top1"].value == 1
    assert other["kl_mean"].value > 1e-4


def make_result(name: str, kl: float, cpu_s: float, peak: int) -> against_peers.Result:
    return against_peers.Result(
        name=name,
        figures={"kl_mean": Estimate(value=kl, error=0.0, n=1)},
        cost=Cost(cpu_s=cpu_s, wall_s=cpu_s, peak_rss=peak),
        n_bytes=1,
    )


@pytest.mark.parametrize(
    ("kl", "cpu_s", "peak", "is_reached"),
    [(0.08, 20, 90, True), (0.11, 20, 90, False), (0.08, 26, 90, False), (0.08, 20, 100, False)],
)
def test_goals_are_relative_to_the_best_peer(
    kl: float, cpu_s: float, peak: int, is_reached: bool
) -> None:
    others = against_peers.list_peers("a", "b")
    theirs = [
        make_result(peer.name, 0.2 + index / 10, 100 + index, 100 + index)
        for index, peer in enumerate(others)
    ]
    symmetric = make_result(against_peers.SYMMETRIC.name, kl, cpu_s, peak)
    ours = [make_result(build.name, 0.1, 20, 90) for build in against_peers.BUILDS[1:]]
    rows, all_reached = against_peers.compare_with_peers([symmetric, *ours, *theirs], others)
    assert all_reached is is_reached
    assert rows[0][1:4] == [f"{kl / 0.2:.3f}", f"{cpu_s / 100:.3f}", f"{peak / 100:.3f}"]
    assert rows[1][1] == f"{0.1 / 0.4:.3f}"  # compared with the third peer


def test_keys_of_a_replaced_section_are_dropped() -> None:
    keys = {"calibration.set": "x", "calibration": "null", "fidelity.set": "y", "source.model": "m"}
    assert bench.drop_keys_of_replaced(keys) == {
        "calibration": "null",
        "fidelity.set": "y",
        "source.model": "m",
    }
