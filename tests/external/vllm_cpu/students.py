"""Small models, briefly trained, whose greedy answers are distinct.

A randomly initialized model repeats itself or has thousands of near-ties; after a minute of
training on tiny-v3's texts it answers in words. Tokenizer, texts and prompts are tiny-v3's, the
families Qwen3 and Qwen3-MoE.
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
    "hidden_size": 256,  # vLLM's expert kernels require multiples of 128
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
    """Return the BF16 checkpoint of a family's student under `place`; train it if it does not
    exist.
    """
    folder = place / f"student-{model_type}"
    if folder.exists():
        return folder
    config = make_tiny_config(model_type, **WIDTHS, **STUDENTS[model_type])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type].from_dict(dict(config)))
    train_student(model)
    part = place / f"{folder.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(part)
    (part / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(locate_model("builtin:tiny-v3") / name, part / name)
    part.rename(folder)
    return folder


def train_student(model: torch.nn.Module) -> float:
    """Train a model in place, deterministically.

    Return the loss of the last step in nats per token.
    """
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
    """Yield batches of tiny-v3's training texts, without its benchmarks' prompts."""
    tokenizer = Tokenizer.from_file(str(locate_model("builtin:tiny-v3") / "tokenizer.json"))
    rows = pack_rows(encode_items(make_clean_items(DOCUMENTS), tokenizer), ROW_TOKENS + 1)
    for start in range(0, len(rows.ids) - ROWS + 1, ROWS):
        batch_rows = slice(start, start + ROWS)
        ids, segments = rows.ids[batch_rows].long(), rows.segments[batch_rows]  # [rows, time + 1]
        inside = segments[:, 1:] == segments[:, :-1]
        yield Batch(
            ids=ids[:, :-1],
            positions=rows.positions[batch_rows][:, :-1].long(),
            targets=ids[:, 1:],
            weights=rows.weights[batch_rows][:, 1:].float() * inside,
            mask=make_attention_mask(segments[:, :-1], torch.float32),
            n_tokens=int((segments[:, :-1] >= 0).sum()),
        )
