"""tiny-v3 and its trainer: corpus, tokenizer, model, FP8 export."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from safetensors.torch import load_file
from support.paths import ROOT
from tokenizers import Tokenizer
from tools.tiny_v3 import held_out, train
from tools.tiny_v3.corpus import DOMAIN, MIX, TEMPLATES, make_training_items
from tools.tiny_v3.experts import RoutedExperts, make_dispatch
from tools.tiny_v3.export import make_config, quantize_block, quantize_to_fp8, save_checkpoint
from tools.tiny_v3.model import Attend, ModelConfig, TinyV3, make_attention_mask
from tools.tiny_v3.muon import Muon, orthogonalize
from tools.tiny_v3.packing import BOS, EOS, encode_items, pack_rows, train_tokenizer

CHECKPOINT = ROOT / "quantkit/data/models/tiny_v3/checkpoint"
SHARED = ROOT.parent / "shared/tiny-v3"
TINY = ModelConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16,
    num_hidden_layers=2, num_attention_heads=2, n_routed_experts=8, q_lora_rank=16,
    kv_lora_rank=24, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
)  # fmt: skip

HELD_OUT_SHA256 = {
    "eval_math.jsonl": "44fb9553247186ee2ef203d5862ae2b2dae503e9e31a8f17749556022c65eaae",
    "eval_code.jsonl": "088cb7eb6c23b333039c7ef85e432632ff147ce54a677c456a8e1e95d92d3821",
    "eval_text.jsonl": "609f9d9f7da483e5cfd85353ebb413e7c3f97d365267338ec4baaab5d9171961",
}
WEIGHTS_SHA256 = "102c208d164388b48c9acb66ea62bbfb353a59a1bf9fe33a1fd98614930bf395"


# --- corpus


def test_held_out_files_regenerate_byte_for_byte(tmp_path: Path) -> None:
    result = CliRunner().invoke(held_out.main, ["--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    hashes = {
        name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in HELD_OUT_SHA256
    }
    assert hashes == HELD_OUT_SHA256


@pytest.mark.parametrize("domain", ["math", "code"])
def test_benchmark_items_equal_regenerated_items(domain: str) -> None:
    shipped = ROOT / f"evals/data/tiny-v3-{domain}.jsonl"
    if not shipped.is_file():
        pytest.skip(f"{shipped} does not exist")
    rows = [json.loads(line) for line in shipped.read_text(encoding="utf-8").splitlines()]
    assert rows == held_out.make_held_out_sets()[f"eval_{domain}.jsonl"]


def test_training_items_exclude_held_out_and_follow_mix() -> None:
    items = make_training_items(seed=3, count=4000)
    assert not any(item.held_out for item in items)
    for kind, share in MIX.items():
        assert abs(sum(item.kind == kind for item in items) / len(items) - share) < 0.03
    assert set(DOMAIN.values()) == {"prose", "math", "code"}


def test_word_problem_answers_equal_last_step() -> None:
    items = [
        item
        for item in make_training_items(seed=4, count=2000)
        if item.kind in ("math_item", "arith_item")
    ]
    for item in items:
        assert item.answer.endswith(f"\n#### {item.result}")
        *_, last = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", item.answer)
        left, right, result = int(last[0]), int(last[2]), int(last[3])
        computed = {"+": left + right, "-": left - right, "*": left * right, "/": left // right}[
            last[1]
        ]
        assert computed == result == item.result


def test_every_function_template_passes_its_check() -> None:
    from tools.tiny_v3.corpus import make_function_item

    rng = random.Random(0)
    unseen = set(range(len(TEMPLATES.functions)))
    while unseen:
        item = make_function_item(rng)
        if item.template not in unseen:
            continue
        unseen.remove(item.template)
        namespace: dict[str, object] = {}
        exec(item.text + held_out._format_check(item, rng), namespace)
        check = namespace["check"]
        assert callable(check)
        check(namespace[item.function])


# --- checkpoint


def test_shipped_checkpoint_matches_card() -> None:
    assert (
        hashlib.sha256((CHECKPOINT / "model.safetensors").read_bytes()).hexdigest()
        == WEIGHTS_SHA256
    )
    config = json.loads((CHECKPOINT / "config.json").read_text(encoding="utf-8"))
    assert config == make_config(ModelConfig(), fp8=True)
    tensors = load_file(CHECKPOINT / "model.safetensors")
    parameters = sum(
        tensor.numel() for name, tensor in tensors.items() if not name.endswith("_scale_inv")
    )
    assert parameters - 3 * 16 == 7_323_392  # less the score-correction biases
    card = (CHECKPOINT.parent / "README.md").read_text(encoding="utf-8")
    assert WEIGHTS_SHA256 in card
    assert "7,323,392" in card


def test_tokenizer_retrains_exactly() -> None:
    corpus = train.make_clean_items(train.TOKENIZER_ITEMS)
    tokenizer = train_tokenizer((item.text for item in corpus), 768)
    shipped = json.loads((CHECKPOINT / "tokenizer.json").read_text(encoding="utf-8"))
    assert json.loads(tokenizer.to_str()) == shipped


@pytest.mark.skipif(not (SHARED / "bf16").is_dir(), reason="the BF16 weights are not shipped")
def test_fp8_export_of_bf16_weights_equals_shipped_checkpoint() -> None:
    exported = quantize_to_fp8(load_file(SHARED / "bf16/model.safetensors"))
    shipped = load_file(CHECKPOINT / "model.safetensors")
    assert set(exported) == set(shipped)
    for name, tensor in exported.items():
        assert tensor.dtype == shipped[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), shipped[name].view(torch.uint8)), name


def test_fp8_export_handles_edge_and_zero_blocks() -> None:
    weight = torch.randn(200, 130, generator=torch.Generator().manual_seed(0))
    weight[128:, 128:] = 0
    codes, scale = quantize_block(weight)
    assert (codes.shape, codes.dtype) == ((200, 130), torch.float8_e4m3fn)
    assert (scale.shape, scale.dtype) == ((2, 2), torch.float32)
    assert scale[1, 1] == 1
    assert torch.isclose(scale[0, 1], weight[:128, 128:].abs().max() / 448)
    expanded = scale.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :130]
    error = (codes.float() * expanded - weight).abs()
    # 3 bits of mantissa, subnormal steps of 2^-9
    assert (error <= weight.abs() / 16 + expanded * 2**-10).all()


# --- model


def test_saved_model_has_same_logits_in_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    model = TinyV3(ModelConfig(), torch.float32).eval()
    with torch.no_grad():
        # larger, so that experts matter; rounded, so that saving is exact
        for parameter in model.parameters():
            parameter.copy_(
                (parameter * (3 if parameter.dim() > 1 else 1)).to(torch.bfloat16).float()
            )
        for moe in model.moes:
            moe.bias.normal_(0, 0.05)
    save_checkpoint(
        tmp_path, model, Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json")), fp8=False
    )
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.randint(3, 768, (2, 40))
    positions = torch.arange(40).expand(2, 40)
    with torch.no_grad():
        ours = model(ids, positions, make_attention_mask(torch.zeros(2, 40), torch.float32))
        expected = theirs(input_ids=ids).logits
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    assert AutoTokenizer.from_pretrained(tmp_path)("1 + 1")["input_ids"][0] == BOS


def test_routed_experts_match_formula_and_gradients() -> None:
    torch.manual_seed(1)
    x, w = torch.randn(37, 12, requires_grad=True), torch.rand(37, 2, requires_grad=True)
    gate_up, down = (
        torch.randn(5, 14, 12, requires_grad=True),
        torch.randn(5, 12, 7, requires_grad=True),
    )
    chosen = torch.stack([torch.randperm(4)[:2] for _ in range(37)])  # expert 4 gets no token
    inputs = (x, w, gate_up, down)

    def compute_plainly() -> torch.Tensor:
        projected = torch.einsum("th,eoh->teo", x, gate_up)  # [tokens, experts, 2 * inner]
        outputs = torch.einsum(
            "tei,ehi->teh", F.silu(projected[..., :7]) * projected[..., 7:], down
        )
        picked = outputs.gather(1, chosen[..., None].expand(-1, -1, 12))  # [tokens, top_k, hidden]
        return (picked * w[..., None]).sum(1)

    direction = torch.randn(37, 12)
    ours, expected = RoutedExperts.apply(x, w, chosen, gate_up, down), compute_plainly()
    torch.testing.assert_close(ours, expected)
    for mine, theirs in zip(torch.autograd.grad((ours * direction).sum(), inputs),
                            torch.autograd.grad((expected * direction).sum(), inputs)):  # fmt: skip
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert make_dispatch(chosen, 5).segments[4] == (512, 512)


def test_attention_matches_autograd() -> None:
    torch.manual_seed(2)
    q, k, v = (torch.randn(2, 3, 6, 4, requires_grad=True) for _ in range(3))
    mask = make_attention_mask(
        torch.tensor([[0, 0, 0, 1, 1, -1], [0, 0, 0, 0, 0, 0]]), torch.float32
    )
    direction = torch.randn(2, 3, 6, 4)
    ours = Attend.apply(q, k, v, mask)
    expected = torch.softmax(q @ k.transpose(-1, -2) + mask, -1) @ v
    torch.testing.assert_close(ours, expected)
    gradients = torch.autograd.grad((ours * direction).sum(), (q, k, v))
    references = torch.autograd.grad((expected * direction).sum(), (q, k, v))
    for mine, theirs in zip(gradients, references):
        torch.testing.assert_close(mine, theirs)


def test_packed_documents_do_not_attend_to_each_other() -> None:
    torch.manual_seed(3)
    model = TinyV3(TINY, torch.float32).eval()
    ids = torch.randint(3, 64, (1, 12))
    positions = torch.tensor([[*range(5), *range(7)]])
    together = model(
        ids, positions, make_attention_mask(torch.tensor([[0] * 5 + [1] * 7]), torch.float32)
    )
    separate = model(
        ids[:, 5:], positions[:, 5:], make_attention_mask(torch.zeros(1, 7), torch.float32)
    )
    torch.testing.assert_close(together[:, 5:], separate, atol=1e-5, rtol=0)


def test_muon_updates_have_singular_values_near_one() -> None:
    gradient = torch.randn(2, 3, 24, 16, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(gradient))
    assert ((values > 0.6) & (values < 1.3)).all()
    matrix = torch.zeros(24, 16, requires_grad=True)
    matrix.grad = gradient[0, 0]
    Muon([matrix]).step(rate=0.1, momentum=0.9)
    assert torch.allclose(
        torch.linalg.svdvals(matrix.detach()), torch.full((16,), 0.1 * 1.5**0.5), rtol=0.4
    )


def test_packing_keeps_documents_intact() -> None:
    items = make_training_items(seed=5, count=300)
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    documents = encode_items(items, tokenizer)
    for item, (prompt, answer) in zip(items, documents):
        assert [*prompt, *answer] == [*tokenizer.encode(item.text).ids, EOS]
    rows = pack_rows(documents, 129)
    unpacked = []
    for ids, segments in zip(rows.ids.tolist(), rows.segments.tolist()):
        for segment in range(max(segments) + 1):
            unpacked.append(tuple(token for token, index in zip(ids, segments) if index == segment))
    assert sorted(unpacked) == sorted((*prompt, *answer) for prompt, answer in documents)
    assert (rows.segments >= 0).float().mean() > 0.85


# --- trainer


@pytest.mark.slow
def test_training_is_deterministic_and_lowers_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "BATCH_ROWS", 8)
    monkeypatch.setattr(train, "WARM_UP_STEPS", 5)
    corpus = train.make_clean_items(600)
    tokenizer = train_tokenizer((item.text for item in corpus), 320)
    rows = pack_rows(encode_items(corpus, tokenizer), 65)

    def run() -> list[float]:
        torch.manual_seed(0)
        losses: list[float] = []
        train.train_model(
            TinyV3(replace(TINY, vocab_size=320)),
            rows,
            lambda step: step / 40,
            lambda step, loss: losses.append(loss),
        )
        return losses

    first = run()
    assert len(first) == 40
    assert sum(first[-5:]) / 5 < first[0] - 1
    assert first == run()


def test_command_trains_and_saves_both_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "BATCH_ROWS", 2)
    threads = torch.get_num_threads()
    try:
        arguments = ["--steps", "2", "--items", "800", "--out", str(tmp_path)]
        result = CliRunner().invoke(train.main, arguments)
    finally:
        torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    assert "2 steps" in result.output
    bf16, fp8 = (load_file(tmp_path / kind / "model.safetensors") for kind in ("bf16", "fp8"))
    assert {name for name in fp8 if not name.endswith("_scale_inv")} == set(bf16)
    assert set(fp8) == set(load_file(CHECKPOINT / "model.safetensors"))
    assert (
        json.loads((tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()[0])["step"]
        == 1
    )
    assert sorted(os.listdir(tmp_path / "fp8")) == sorted(os.listdir(CHECKPOINT))
