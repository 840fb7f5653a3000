"""Small models that were taught a little, so that what they say under greedy decoding can be told apart.

A random model repeats itself, or sees thousands of near-ties; one that has learnt the texts of tiny-v3 for a minute
answers in words. Same tokenizer, same texts, same prompts as tiny-v3, but the families Qwen3 and Qwen3-MoE.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from support.checkpoints import make_tiny_config
from tokenizers import Tokenizer
from tools.tiny_v3.packing import encode_items, pack_rows
from tools.tiny_v3.train import Batch, compute_loss, make_attention_mask, make_clean_items
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from quantkit.io.package_data import locate_model

WIDTHS = {
    "hidden_size": 256,  # vLLM's kernels for experts want multiples of 128
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "head_dim": 64,
    "max_position_embeddings": 512,
}
STUDENTS: dict[str, dict[str, object]] = {
    "qwen3": {},
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 128},
}
STEPS, ROWS, ROW_TOKENS, DOCUMENTS = 200, 16, 128, 12_000
LEARNING_RATE, WARM_UP = 4e-3, 20


def make_student(model_type: str, place: Path) -> Path:
    """The taught model of a family as a BF16 checkpoint under `place`; taught only where it is not there yet."""
    folder = place / f"student-{model_type}"
    if folder.exists():
        return folder
    config = make_tiny_config(model_type, **WIDTHS, **STUDENTS[model_type])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type].from_dict(dict(config)))
    train_student(model)
    beside = place / f"{folder.name}.part"
    shutil.rmtree(beside, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(beside)
    (beside / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(locate_model("builtin:tiny-v3") / name, beside / name)
    beside.rename(folder)
    return folder


def train_student(model: torch.nn.Module) -> float:
    """Train in place, a pure function of the model; the loss of the last step in nats per token."""
    adam = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0
    )
    loss = torch.tensor(0.0)
    for step, batch in zip(range(STEPS), iterate_batches()):
        rate = LEARNING_RATE * min(1, (step + 1) / WARM_UP) * max(0.02, 1 - step / STEPS)
        adam.param_groups[0]["lr"] = rate
        logits = model(
            input_ids=batch.ids, position_ids=batch.positions, attention_mask=batch.mask
        ).logits
        loss = compute_loss(logits, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
    return loss.item()


def iterate_batches() -> Iterator[Batch]:
    """Batches of tiny-v3's training texts, without its benchmarks' prompts."""
    tokenizer = Tokenizer.from_file(str(locate_model("builtin:tiny-v3") / "tokenizer.json"))
    rows = pack_rows(encode_items(make_clean_items(DOCUMENTS), tokenizer), ROW_TOKENS + 1)
    for start in range(0, len(rows.ids) - ROWS + 1, ROWS):
        taken = slice(start, start + ROWS)
        ids, segments = rows.ids[taken].long(), rows.segments[taken]  # [rows, time + 1]
        inside = segments[:, 1:] == segments[:, :-1]
        yield Batch(
            ids=ids[:, :-1],
            positions=rows.positions[taken][:, :-1].long(),
            targets=ids[:, 1:],
            weights=rows.weights[taken][:, 1:].float() * inside,
            mask=make_attention_mask(segments[:, :-1], torch.float32),
            n_tokens=int((segments[:, :-1] >= 0).sum()),
        )
