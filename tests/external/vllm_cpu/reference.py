"""Reference answers: an artifact dequantized to float32 weights, run greedily by transformers.

vLLM is compared with these answers. Each token is stored with the other likely tokens at its
position, so that a near-tie can be distinguished from a real difference.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from external.vllm_cpu.compare import Answer, Step, compute_margin_changes
from support.dequantized import Stored
from torch import Tensor

from quantkit.io import package_data
from quantkit.texts.corpora import load_tokenizer

TASKS = ("tiny-v3-math", "tiny-v3-code")
NEW_TOKENS = 80
"""The longest reference answer of both tasks has 62 tokens, so a correct answer ends with EOS."""
ROUNDING_QUANTILE = 0.95
"""Quantile of the margin changes that is reported as the effect of bfloat16."""
CANDIDATES = 20
"""Tokens per step whose log-probability is kept; a token outside them is never a near-tie."""


def read_prompts(count: int) -> list[tuple[str, str]]:
    """Return (task id, prompt) of held-out items, the first count / 2 of each task."""
    pairs = []
    for task in TASKS:
        lines = (
            (package_data.locate_folder("evals") / "data" / f"{task}.jsonl")
            .read_text(encoding="utf-8")
            .splitlines()
        )
        items = [json.loads(line) for line in lines[: count // len(TASKS)]]
        pairs += [(item["task_id"], item["prompt"]) for item in items]
    return pairs


def generate_answer(model: Any, tokenizer: Any, task_id: str, prompt: str) -> Answer:
    """Generate greedily until EOS, at most NEW_TOKENS."""
    encoded = tokenizer(prompt, return_tensors="pt")["input_ids"]  # [1, prompt tokens]
    with torch.no_grad():
        output = model.generate(
            encoded,
            attention_mask=torch.ones_like(encoded),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            output_logits=True,
            return_dict_in_generate=True,
        )
    tokens = output.sequences[0, encoded.shape[1] :].tolist()  # [1, prompt + new] -> [new]
    steps = [
        make_step(token, logits[0]) for token, logits in zip(tokens, output.logits, strict=True)
    ]
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    return Answer(
        task_id=task_id, prompt=prompt, prompt_tokens=encoded[0].tolist(), text=text, steps=steps
    )


def make_step(token: int, logits: Tensor) -> Step:
    """Convert the logits [vocabulary] at the position of `token` to the top log-probabilities."""
    best = torch.log_softmax(logits.float(), dim=-1).topk(CANDIDATES)
    return Step(
        token=token, logprobs=dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    )


def measure_rounding(model: Any, answers: Sequence[Answer]) -> float:
    """Return the 95 % quantile of the change that bfloat16 causes in undecided margins, in nats.

    The model reads its own answers, so that both precisions see the same tokens. Converts the model
    to bfloat16 in place.
    """
    model.to(torch.bfloat16)
    changes = list[float]()
    for answer in answers:
        tokens = [step.token for step in answer.steps]
        ids = torch.tensor([[*answer.prompt_tokens, *tokens[:-1]]])  # [1, prompt + new - 1]
        with torch.no_grad():
            logits = model(ids).logits[0, len(answer.prompt_tokens) - 1 :]  # [new, vocabulary]
        changes += compute_margin_changes(
            answer.steps, [make_step(*pair) for pair in zip(tokens, logits, strict=True)]
        )
    return torch.tensor(changes).quantile(ROUNDING_QUANTILE).item() if changes else 0.0


def generate_answers(artifact: Path, count: int) -> tuple[list[Answer], float]:
    """Return the dequantized model's answers to `count` held-out prompts, and bfloat16's effect on
    margins.

    The effect is that of `measure_rounding`, in nats.
    """
    model, tokenizer = Stored.open(artifact).model(), load_tokenizer(artifact)
    answers = [
        generate_answer(model, tokenizer, task_id, prompt)
        for task_id, prompt in read_prompts(count)
    ]
    return answers, measure_rounding(model, answers)
