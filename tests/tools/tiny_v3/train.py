"""Train tiny-v3 on one CPU core: `python -m tools.tiny_v3.train --minutes 27 --out DIR`.

Writes log.jsonl, bf16/ and fp8/ to DIR. With `--minutes` the schedule follows the clock: a slower
machine takes fewer steps. With `--steps` the run is a pure function of the seed on one machine.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from tools.tiny_v3.corpus import Item, make_training_items
from tools.tiny_v3.export import save_checkpoint
from tools.tiny_v3.held_out import make_held_out_sets
from tools.tiny_v3.model import ModelConfig, TinyV3, make_attention_mask
from tools.tiny_v3.muon import Muon
from tools.tiny_v3.packing import Rows, encode_items, pack_rows, train_tokenizer
from torch import Tensor

BATCH_ROWS, ROW_TOKENS = 64, 128
TOKENIZER_ITEMS = 30_000
CORPUS_SEED = 0
MUON_RATE, ADAM_RATE = 0.02, 3e-3
WARM_UP_STEPS, DECAY_FROM = 100, 0.3  # the rate falls linearly over the last 70 % of the run
BIAS_RATE, BIAS_FADE_FROM = 2e-3, 0.7  # of the score-correction bias (arXiv:2408.15664)
LOG_EVERY = 25


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """The rows of one step.

    ids, positions, targets [rows, time] int64; loss weights [rows, time] float32; mask [rows, 1,
    time, time].
    """

    ids: Tensor
    positions: Tensor
    targets: Tensor
    weights: Tensor
    mask: Tensor
    n_tokens: int


def make_clean_items(count: int) -> list[Item]:
    """Return training items, without those that have the prompt of a benchmark item."""
    held_out = make_held_out_sets()
    prompts = {
        row["prompt"] for name in ("eval_math.jsonl", "eval_code.jsonl") for row in held_out[name]
    }
    return [item for item in make_training_items(CORPUS_SEED, count) if item.prompt not in prompts]


def iterate_batches(rows: Rows, dtype: torch.dtype) -> Iterator[Batch]:
    """Yield shuffled batches endlessly, from torch's generator."""
    while True:
        order = torch.randperm(len(rows.ids))
        for start in range(0, len(order) - BATCH_ROWS + 1, BATCH_ROWS):
            taken = order[start : start + BATCH_ROWS]
            ids, segments = rows.ids[taken].long(), rows.segments[taken]  # [rows, time + 1]
            # no document predicts the first token of the next
            inside = segments[:, 1:] == segments[:, :-1]
            yield Batch(
                ids=ids[:, :-1],
                positions=rows.positions[taken][:, :-1],
                targets=ids[:, 1:],
                weights=rows.weights[taken][:, 1:].float() * inside,
                mask=make_attention_mask(segments[:, :-1], dtype),
                n_tokens=int((segments[:, :-1] >= 0).sum()),
            )


def compute_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Return the mean cross entropy in nats per weighted token."""
    losses = F.cross_entropy(
        logits.flatten(0, 1), batch.targets.flatten(), reduction="none"
    )  # [rows * time]
    weights = batch.weights.flatten()
    return (losses * weights).sum() / weights.sum()


def compute_rate_factor(step: int, progress: float) -> float:
    """Return the learning rate relative to its peak; progress runs from 0 to 1."""
    decay = (
        1.0 if progress < DECAY_FROM else max(0.02, 1 - (progress - DECAY_FROM) / (1 - DECAY_FROM))
    )
    return min(1.0, (step + 1) / WARM_UP_STEPS) * decay


@torch.no_grad()
def balance_experts(model: TinyV3, progress: float) -> None:
    """Move every expert's bias one step towards an even load and clear the counts.

    No auxiliary loss (arXiv:2408.15664).
    """
    fade = 1.0 if progress < BIAS_FADE_FROM else (1 - progress) / (1 - BIAS_FADE_FROM)
    for moe in model.moes:
        moe.bias += BIAS_RATE * fade * torch.sign(moe.load.mean() - moe.load)
        moe.load.zero_()


def train_model(
    model: TinyV3,
    rows: Rows,
    get_progress: Callable[[int], float],
    report: Callable[[int, float], None],
) -> int:
    """Train until get_progress(step) reaches 1; return the number of steps.

    report(step, loss) is called after every step.
    """
    matrices = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.dim() >= 2
        and name not in ("embedding", "head")
        and not name.endswith("router")
    ]
    by_muon = {id(parameter) for parameter in matrices}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in by_muon]
    muon = Muon(matrices)
    adam = torch.optim.AdamW(rest, lr=ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    step = 0
    for batch in iterate_batches(rows, model.dtype):
        progress = get_progress(step)
        if progress >= 1:
            break
        factor = compute_rate_factor(step, progress)
        loss = compute_loss(model(batch.ids, batch.positions, batch.mask), batch)
        loss.backward()
        adam.param_groups[0]["lr"] = ADAM_RATE * factor
        torch.nn.utils.clip_grad_norm_(rest, 1.0)
        adam.step()
        muon.step(MUON_RATE * factor, momentum=min(0.95, 0.85 + 0.1 * step / 300))
        model.zero_grad(set_to_none=True)
        balance_experts(model, progress)
        step += 1
        report(step, loss.item())
    return step


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--minutes",
    type=float,
    default=27.0,
    show_default=True,
    help="Time for training, after preparation.",
)
@click.option(
    "--steps",
    type=int,
    help="Take this many steps instead; then the result does not depend on the clock.",
)
@click.option(
    "--items", type=int, default=200_000, show_default=True, help="Documents to generate."
)
@click.option(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    help="Of the initial weights and the order of rows.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Output folder.",
)
def main(minutes: float, steps: int | None, items: int, seed: int, out: Path) -> None:
    """Train tiny-v3 on one CPU core and save it as BF16 and as FP8 with 128x128 blocks.

    Example: PYTHONPATH=tests python -m tools.tiny_v3.train --minutes 27 --out tiny-v3
    """
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    config = ModelConfig()
    corpus = make_clean_items(items)
    tokenizer = train_tokenizer((item.text for item in corpus[:TOKENIZER_ITEMS]), config.vocab_size)
    rows = pack_rows(encode_items(corpus, tokenizer), ROW_TOKENS + 1)
    model = TinyV3(config)
    click.echo(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(rows.ids):,} rows of "
        f"{ROW_TOKENS}"
    )
    start = time.monotonic()

    def get_progress(step: int) -> float:
        return step / steps if steps is not None else (time.monotonic() - start) / (60 * minutes)

    with (out / "log.jsonl").open("w", encoding="utf-8") as log:

        def report(step: int, loss: float) -> None:
            if step % LOG_EVERY == 0 or step == 1:
                line = {
                    "step": step,
                    "loss": round(loss, 4),
                    "seconds": round(time.monotonic() - start, 1),
                }
                log.write(json.dumps(line) + "\n")
                click.echo(f"step {step}: loss {loss:.4f}, {line['seconds']} s")

        n_steps = train_model(model, rows, get_progress, report)
    save_checkpoint(out / "bf16", model, tokenizer, fp8=False)
    save_checkpoint(out / "fp8", model, tokenizer, fp8=True)
    click.echo(f"{n_steps} steps; wrote {out / 'bf16'} and {out / 'fp8'}")


if __name__ == "__main__":
    main()
