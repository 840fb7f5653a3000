"""The worked examples of quantkit/formats/README.md, computed by the formats."""

from __future__ import annotations

import json

import pytest
import torch
from support.gptq_examples import M
from support.paths import ROOT

from quantkit import registry
from quantkit.contracts import Quantized, Scheme
from quantkit.methods.nf4 import METHOD
from quantkit.numerics import bitpack, nf4

PAGE = (ROOT / "quantkit/formats/README.md").read_text(encoding="utf-8")
SCALE = torch.tensor([[0.5], [1], [1], [1], [1], [1], [1], [0.25]], dtype=torch.float16)
ZERO = torch.tensor([[8]] * 7 + [[0]], dtype=torch.uint8)


def pack_example(format_name: str, symmetric: bool) -> dict[str, torch.Tensor]:
    scheme = Scheme(bits=4, group_size=-1, symmetric=symmetric, scale_dtype="float16")
    quantized = Quantized(codes=M.T, scale=SCALE, zero=None if symmetric else ZERO)
    tensors = registry.get_format(format_name).pack(quantized, scheme)
    weight = registry.get_format(format_name).dequantize(tensors, scheme)  # [out, in]
    last = [-0.5, 1.5] if symmetric else [1.5, 3.5]
    assert weight[:7, :2].T.tolist() == [[-3.5, -4, -1, 2, 5, -8, -5], [0.5, 4, 7, -6, -3, 0, 3]]
    assert weight[7, :2].tolist() == last
    return tensors


def format_words(words: torch.Tensor) -> list[str]:
    return [f"{word & 0xFFFFFFFF:08X}" for word in words.flatten().tolist()]


def read_section(title: str) -> str:
    """Return the text of one section of the page, without its subsections."""
    return PAGE.split(f"# {title}\n", 1)[1].split("\n#", 1)[0]


@pytest.mark.parametrize(
    ("bits", "codes", "order"),
    [
        (8, [1, 2, 3, 255], None),
        (4, list(range(8)), None),
        (4, list(range(8)), bitpack.AWQ_ORDER),
        (3, list(range(8)) * 4, None),
    ],
)
def test_packing_table(bits: int, codes: list[int], order: tuple[int, ...] | None) -> None:
    words = format_words(bitpack.pack(torch.tensor([codes]), bits, axis=1, order=order))
    name = f"{bits}, AWQ order" if order else str(bits)
    (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| {name} |")]
    assert row.endswith(f"| {' '.join(words)} |")


def test_awq_example() -> None:
    tensors, section = pack_example("awq", symmetric=False), read_section("AWQ gemm")
    words = format_words(tensors["qweight"])
    assert words == ["60A43D71", "E82CB5F9"] * 4 and words[0] in section and words[1] in section
    assert f"`qzeros` = {format_words(tensors['qzeros'])[0]}" in section


def test_gptq_example() -> None:
    section = read_section("GPTQ")
    asymmetric = pack_example("gptq_v2", symmetric=False)
    assert " ".join(format_words(asymmetric["qweight"])) in section
    zeros = {
        name: format_words(pack_example(name, symmetric=True)["qzeros"])[0]
        for name in ("gptq", "gptq_v2")
    }
    sentence = (
        f"`qzeros` is {zeros['gptq']} for symmetric v1, {zeros['gptq_v2']} for symmetric v2 and "
        f"{format_words(asymmetric['qzeros'])[0]} for v2 with the zero points of the example."
    )
    assert sentence in " ".join(section.split())


def test_compressed_tensors_example() -> None:
    section = " ".join(read_section("compressed-tensors").split())
    tensors = pack_example("compressed_tensors", symmetric=False)
    assert torch.equal(
        tensors["weight_packed"].T, pack_example("gptq_v2", symmetric=False)["qweight"]
    )
    assert f"`weight_zero_point` = {format_words(tensors['weight_zero_point'])[0]}" in section
    signed = torch.tensor([[-8, -7, 0, 1, 2, 3, 4, 5]]) + 8
    assert f"are the word {format_words(bitpack.pack(signed, 4, axis=1))[0]}" in section


def test_nf4_example() -> None:
    section = read_section("bitsandbytes NF4")
    weight = torch.zeros(2, 64)
    weight[0, :16] = 2 * torch.tensor(nf4.CODEBOOK)
    weight[1, :3] = torch.tensor([4, -4, 0.1])
    for double_quant in (False, True):
        scheme = Scheme(
            bits=4, group_size=64, symmetric=True, scale_dtype="float32", kind="nf4",
            double_quant=double_quant, source_dtype="bfloat16",
        )  # fmt: skip
        quantized = METHOD.solve(weight.bfloat16().float(), None, scheme)
        tensors = registry.get_format("bitsandbytes").pack(quantized, scheme)
        rows = tensors["weight"].reshape(2, 32).tolist()
        state = bytes(tensors["weight.quant_state.bitsandbytes__nf4"].tolist())
        assert bytes(rows[0]).hex(" ").upper() == "01 23 45 67 89 AB CD EF" + " 77" * 24
        assert bytes(rows[1]).hex(" ").upper() == "F0" + " 77" * 31
        assert f"state of {len(state)} bytes" in section or f"{len(state)} bytes" in section
        if not double_quant:
            assert tensors["weight.absmax"].tolist() == [2, 4]
            continue
        assert tensors["weight.absmax"].tolist() == [0x00, 0xFF]
        assert tensors["weight.nested_absmax"].tolist() == [1]
        assert json.loads(state)["nested_offset"] == 3
    assert "01 23 45 67 89 AB CD EF, then 24 bytes 77" in section
    assert "F0, then 31 bytes 77" in section
    assert "absmax codes 00 FF, nested_absmax 1, nested_offset 3, state of 172 bytes" in section
