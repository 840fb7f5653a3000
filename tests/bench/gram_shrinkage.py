"""Error on kinds of text that calibration did not have, by how their grams are combined or shrunk.

    PYTHONPATH=tests .venv/bin/python -m bench.gram_shrinkage [--blocks 2 10 20 28] [--windows 18]
        [--method gptq] [--ways WAY ...] [--kinds KIND ...] [--without KIND ...]

SmolLM2-135M, some blocks, 4 bits symmetric, group size 64. Each of seven kinds is left out in turn;
the linears are quantized by the grams of the other six, combined in each of the ways of WAYS, and
the relative output error tr(D G D^T) / tr(W G W^T) is measured with grams of test text of the kind
left out and of the six kinds seen. The table shows the geometric mean over linears, blocks and
kinds, relative to the plain mean of the grams ("mean"). Rows are quantized independently, so ROWS
of each linear represent it. Text comes from QUANTKIT_DATA (tests/README.md).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from quantkit import registry
from quantkit.build.quantize_linear import compute_codes
from quantkit.contracts import InputStats, Scheme
from quantkit.numerics import affine, awq_scales
from quantkit.numerics import gram as grams

ROOT = Path(__file__).parents[2]
SCHEME = Scheme(bits=4, group_size=64, symmetric=True, scale_dtype="bfloat16")
ROUNDINGS = {"gptq": "gptq", "awq": "nearest"}
LENGTH, WINDOWS, TEST_WINDOWS = 512, 18, 4
"""Tokens of a window; windows per kind: 7 x 18 x 512 tokens are those of the recipes."""
BATCH, SEED, CHARACTERS = 4, 0, 6
"""Windows of a batch; characters of a token, at most."""
ROWS = 64
"""Rows of each linear that are quantized and measured."""
MASSIVE = 10.0
"""Tokens above this many median norms have massive activations (numerics/README.md)."""
INPUTS = {
    "self_attn.q_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}
"""The linear whose input is captured, and all linears that read it."""
UNSCALED = "self_attn.o_proj"
"""The input that AWQ does not scale: three value heads serve nine query heads."""
KINDS = {
    "wikitext": ("wikitext-2/valid.tokenized.txt", "wikitext-2/wiki.test.raw"),
    "web": ("ud/en-web-dev.txt", "ud/en-web-test.txt"),
    "gsm8k": ("gsm8k/train.jsonl", "gsm8k/test.jsonl"),
    "code": ("mbpp/mbpp.jsonl", "humaneval/HumanEval.jsonl"),
    "zh": ("zh/zh_gsdsimp-ud-dev.txt", "zh/zh_gsdsimp-ud-test.txt"),
    "de": ("ud/de-dev.txt", "ud/de-test.txt"),
    "fr": ("ud/fr-dev.txt", "ud/fr-test.txt"),
}
"""Calibration and test text of each kind."""
PRIOR = "random tokens"
"""Text without data: tokens drawn uniformly from the vocabulary."""


@dataclass(frozen=True, kw_only=True)
class InputGrams:
    """Statistics of one input on one kind of text, per token.

    gram [in, in]; unit: gram of the tokens divided by their norms; mean_abs [in]; ordinary: gram
    of the tokens without massive activations; massive: the number of those tokens.
    """

    gram: Tensor
    unit: Tensor
    mean_abs: Tensor
    ordinary: Tensor
    massive: int


Ways = Mapping[str, Callable[[Sequence[InputGrams], InputGrams], Tensor]]
"""Name -> function of the seen kinds and the prior that returns the gram [in, in] to use."""


def average_grams(kinds: Sequence[InputGrams], prior: InputGrams) -> Tensor:
    """Return the mean over tokens: every kind has the same number."""
    return torch.stack([kind.gram for kind in kinds]).mean(dim=0)


def normalize_tokens(kinds: Sequence[InputGrams], prior: InputGrams) -> Tensor:
    """Return the mean over tokens divided by their norms."""
    return torch.stack([kind.unit for kind in kinds]).mean(dim=0)


def compute_unit(gram: Tensor) -> Tensor:
    """Return the mean diagonal."""
    return gram.diagonal().mean()


def shrink_to_identity(kinds: Sequence[InputGrams], prior: InputGrams, share: float) -> Tensor:
    """Return (1 - share) G + share * mean diagonal * I."""
    gram = average_grams(kinds, prior)
    return (1 - share) * gram + share * compute_unit(gram) * torch.eye(len(gram))


def shrink_to_diagonal(kinds: Sequence[InputGrams], prior: InputGrams, share: float) -> Tensor:
    """Return (1 - share) G + share diag(G)."""
    gram = average_grams(kinds, prior)
    return (1 - share) * gram + share * torch.diag(gram.diagonal())


def normalize_kinds(kinds: Sequence[InputGrams], prior: InputGrams) -> Tensor:
    """Return the mean of the kinds' grams, each divided by its trace."""
    return torch.stack([kind.gram / kind.gram.trace() for kind in kinds]).mean(dim=0)


def blend_geometrically(kinds: Sequence[InputGrams], prior: InputGrams, share: float) -> Tensor:
    """Return G^(1 - share) in units of the mean diagonal: the geodesic from G to I."""
    gram = average_grams(kinds, prior).double()
    values, vectors = torch.linalg.eigh(gram / compute_unit(gram))
    return ((vectors * values.clamp(min=0) ** (1 - share)) @ vectors.T).float()


def blend_with_prior(kinds: Sequence[InputGrams], prior: InputGrams, share: float) -> Tensor:
    """Return (1 - share) G + share P, with the prior's gram P at G's trace."""
    gram = average_grams(kinds, prior)
    return (1 - share) * gram + share * prior.gram * (gram.trace() / prior.gram.trace())


def add_spread(kinds: Sequence[InputGrams], prior: InputGrams, share: float) -> Tensor:
    """Return G + share * diag(mean over kinds of |G_k - G|).

    Channels in which the seen kinds differ count more: an unseen kind may differ there too.
    """
    gram = average_grams(kinds, prior)
    spread = torch.stack([(kind.gram - gram).diagonal().abs() for kind in kinds])
    return gram + share * torch.diag(spread.mean(dim=0))  # [kinds, in] -> [in] -> [in, in]


def name_ways() -> Ways:
    """Return every way to combine grams; "mean" is that of a build."""
    ways: dict[str, Callable[[Sequence[InputGrams], InputGrams], Tensor]] = {"mean": average_grams}
    for function, name, shares in (
        (shrink_to_identity, "identity", (0.003, 0.01, 0.03, 0.1, 0.2, 0.3)),
        (shrink_to_diagonal, "diagonal", (0.01, 0.03, 0.1, 0.3)),
        (blend_geometrically, "geometric", (0.1, 0.3)),
        (blend_with_prior, PRIOR, (0.03, 0.1, 0.3)),
        (add_spread, "spread of kinds", (0.03, 0.1, 0.3)),
    ):
        ways |= {f"{name} {share:g}": partial(function, share=share) for share in shares}
    ways["kinds equal"] = normalize_kinds
    ways["tokens equal"] = normalize_tokens
    return ways


WAYS = name_ways()
BASE, INCLUDED, NEAREST = "mean", "(kind included)", "(rtn)"
"""References: the grams of a build; calibration that has the kind left out; no calibration."""
ALL, ORDINARY = "all", "ordinary"
"""Tokens of the test text that are measured."""


class Record(NamedTuple):
    """The relative output error of one linear on one kind of test text."""

    linear: str
    way: str
    left_out: str
    kind: str
    tokens: str
    error: float


def read_documents(path: Path) -> list[str]:
    """Return the documents of a file: rows of JSONL, or lines of text."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".jsonl":
        return text.splitlines()
    rows = [json.loads(line) for line in text.splitlines()]
    if path.name == "mbpp.jsonl":
        return [f"{r['text']}\n{r['code']}" for r in rows if 601 <= r["task_id"] <= 974]
    columns = ("question", "answer") if "question" in rows[0] else ("prompt", "canonical_solution")
    separator = "\n" if "question" in rows[0] else ""
    return [separator.join(row[column] for column in columns) for row in rows]


def cut_windows(documents: Sequence[str], tokenizer: Any, count: int) -> Tensor:
    """Return `count` evenly spaced windows of the joined documents: [count, LENGTH] int64.

    Of long texts, only evenly spaced documents are tokenized.
    """
    step = max(1, sum(map(len, documents)) // (2 * CHARACTERS * count * LENGTH))
    ids = tokenizer("\n\n".join(documents[::step]), verbose=False, return_tensors="pt").input_ids[0]
    windows = ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)  # [tokens] -> [n, LENGTH]
    if len(windows) < count:
        raise SystemExit(f"expected {count} windows of {LENGTH} tokens, found {len(windows)}")
    return windows[torch.arange(count) * len(windows) // count]


def read_texts(data: Path, tokenizer: Any, kinds: Sequence[str], windows: int) -> dict[str, Tensor]:
    """Return the windows of every kind, "KIND" and "KIND test", and of the prior."""
    texts = {}
    for kind in kinds:
        calibration, test = KINDS[kind]
        texts[kind] = cut_windows(read_documents(data / calibration), tokenizer, windows)
        texts[f"{kind} test"] = cut_windows(read_documents(data / test), tokenizer, TEST_WINDOWS)
    generator = torch.Generator().manual_seed(SEED)
    shape = (TEST_WINDOWS, LENGTH)
    texts[PRIOR] = torch.randint(len(tokenizer), shape, generator=generator)
    return texts


class GramCapture:
    """Sums the grams of the inputs of some blocks while the model runs one text."""

    def __init__(self, model: Any, blocks: Sequence[int]) -> None:
        self.sums: dict[tuple[int, str], dict[str, Tensor]] = {}
        self.massive = Counter[tuple[int, str]]()
        self.handles = [
            model
            .layers[block]
            .get_submodule(name)
            .register_forward_pre_hook(partial(self.add_tokens, (block, name)))
            for block in blocks
            for name in INPUTS
        ]

    def add_tokens(self, key: tuple[int, str], _: Any, inputs: tuple[Tensor, ...]) -> None:
        """Add one batch of inputs [batch, LENGTH, in]."""
        x = inputs[0].flatten(end_dim=-2)  # [batch, LENGTH, in] -> [n, in]
        norm = x.norm(dim=-1, keepdim=True).clamp(min=1e-9)  # [n, 1]
        massive = x[(norm > MASSIVE * norm.median()).flatten()]  # [few, in]
        self.massive[key] += len(massive)
        sums = self.sums.setdefault(key, {})
        for name, part in (("plain", x), ("unit", x / norm), ("massive", massive)):
            total = sums.setdefault(name, torch.zeros(x.shape[-1], x.shape[-1]))
            if len(part):
                grams.accumulate_gram(
                    total, sums.setdefault(f"{name} abs", x.new_zeros(x.shape[-1])), part
                )

    def finish(self, tokens: int) -> dict[tuple[int, str], InputGrams]:
        """Remove the hooks and return the statistics per token."""
        for handle in self.handles:
            handle.remove()
        result = {}
        for key, sums in self.sums.items():
            plain, unit, massive = (
                grams.complete_gram(sums[name]) / tokens for name in ("plain", "unit", "massive")
            )
            result[key] = InputGrams(
                gram=plain,
                unit=unit,
                ordinary=plain - massive,
                mean_abs=sums["plain abs"] / tokens,
                massive=self.massive[key],
            )
        return result


def capture_grams(
    model: Any, texts: Mapping[str, Tensor], blocks: Sequence[int], place: Path
) -> dict[str, dict[tuple[int, str], InputGrams]]:
    """Run every text through the model; return text -> (block, input) -> statistics.

    Finished texts are kept in `place`.
    """
    captured = {}
    for name, windows in texts.items():
        path = place / f"{name} {windows.numel()} {blocks}.pt"
        if not path.is_file():
            capture = GramCapture(model, blocks)
            for batch in windows.split(BATCH):
                model(input_ids=batch, use_cache=False)
            torch.save(capture.finish(windows.numel()), path)
        captured[name] = torch.load(path, weights_only=False)
    return captured


def quantize_weights(method: str, weights: Tensor, stats: InputStats, *, scaled: bool) -> Tensor:
    """Quantize weights [ways, out, in] as a build does; return them as stored, same shape.

    With AWQ and `scaled`, the input's scale is searched first, in powers of two.
    """
    rescale = registry.get_method(method).rescale
    if rescale is not None and scaled:
        # [n, ways, in] and [n, ways]
        candidates = awq_scales.round_to_powers_of_two(rescale.candidates(stats.mean_abs))
        errors = [rescale.error(weights, stats.gram, one, SCHEME) for one in candidates]
        best = torch.stack(errors).argmin(dim=0)  # [ways]
        scale = candidates[best, torch.arange(len(best))]  # [ways, in]
    else:
        scale = torch.ones_like(stats.mean_abs)
    divided = InputStats(
        gram=grams.rescale_gram(stats.gram, scale),
        mean_abs=stats.mean_abs / scale,
        n_tokens=stats.n_tokens,
    )
    scale = scale.unsqueeze(-2)  # [ways, in] -> [ways, 1, in]
    rounded = compute_codes(method, ROUNDINGS[method], weights * scale, divided, SCHEME)
    return affine.dequantize(rounded.quantized, SCHEME) / scale


def sample_rows(weight: Tensor) -> Tensor:
    """Return ROWS evenly spaced rows of weight [out, in]: rows are quantized independently."""
    return weight[torch.arange(ROWS) * len(weight) // ROWS]


def measure_input(
    layer: Any,
    key: tuple[int, str],
    left_out: str,
    captured: Mapping[str, Any],
    options: argparse.Namespace,
) -> Iterator[Record]:
    """Quantize the linears of one input in every way and yield their errors on every kind."""
    block, name = key
    weight = torch.cat([sample_rows(layer.get_submodule(reader).weight) for reader in INPUTS[name]])
    stored = quantize_every_way(weight, left_out, key, captured, options)
    for kind in options.kinds:
        test = captured[f"{kind} test"][key]
        figures = [measure_errors(stored, weight, test.gram)]  # [ways, linears] each
        same = test.massive == 0
        figures.append(figures[0] if same else measure_errors(stored, weight, test.ordinary))
        for tokens, errors in zip((ALL, ORDINARY), figures, strict=True):
            for way, row in zip(options.ways, errors.tolist(), strict=True):
                for reader, error in zip(INPUTS[name], row, strict=True):
                    yield Record(f"{block}.{reader}", way, left_out, kind, tokens, error)


def measure_errors(stored: Tensor, weight: Tensor, gram: Tensor) -> Tensor:
    """Return the relative output errors of linears of ROWS rows that are stacked: [ways, linears].

    stored [ways, linears * ROWS, in], weight [linears * ROWS, in].
    """
    lost = grams.compute_row_errors(stored - weight, gram)  # [ways, linears * ROWS]
    energy = grams.compute_row_errors(weight, gram)  # [linears * ROWS]
    return lost.unflatten(-1, (-1, ROWS)).sum(-1) / energy.unflatten(-1, (-1, ROWS)).sum(-1)


def quantize_every_way(
    weight: Tensor,
    left_out: str,
    key: tuple[int, str],
    captured: Mapping[str, Any],
    options: argparse.Namespace,
) -> Tensor:
    """Return weight [out, in] as stored after quantization in every way: [ways, out, in]."""
    matrices, means = list[Tensor](), list[Tensor]()
    for way in options.ways:
        seen = [
            captured[kind][key] for kind in options.kinds if kind != left_out or way == INCLUDED
        ]
        matrices.append(WAYS.get(way, average_grams)(seen, captured[PRIOR][key]))
        means.append(torch.stack([kind.mean_abs for kind in seen]).mean(dim=0))
    stats = InputStats(
        gram=torch.stack(matrices),  # [ways, in, in]
        mean_abs=torch.stack(means),  # [ways, in]
        n_tokens=torch.full((len(matrices),), len(options.kinds) * options.windows * LENGTH),
    )
    weights = weight.expand(len(matrices), *weight.shape).contiguous()  # -> [ways, out, in]
    stored = quantize_weights(options.method, weights, stats, scaled=key[1] != UNSCALED)
    if NEAREST in options.ways:
        plain = compute_codes("rtn", "nearest", weight, None, SCHEME).quantized
        stored[options.ways.index(NEAREST)] = affine.dequantize(plain, SCHEME)
    return stored


def compute_ratios(errors: Mapping[tuple[str, ...], float]) -> dict[tuple[str, ...], float]:
    """Return (way, tokens, column) -> geometric mean of error / error of BASE.

    Over linears and kinds left out. Columns: "unseen", the kind left out; "seen", all others;
    KIND, as a kind left out; "seen KIND".
    """
    logs: dict[tuple[str, ...], list[float]] = {}
    for (linear, way, left_out, kind, tokens), error in errors.items():
        change = math.log(error / errors[linear, BASE, left_out, kind, tokens])
        columns = ("unseen", kind) if kind == left_out else ("seen", f"seen {kind}")
        for column in columns:
            logs.setdefault((way, tokens, column), []).append(change)
    return {key: math.exp(fmean(changes)) for key, changes in logs.items()}


def format_table(errors: Mapping[tuple[str, ...], float], tokens: str) -> Table:
    """Format the ratios on kinds left out, in all and each, and on seen kinds, in all and worst."""
    ratios = compute_ratios(errors)
    columns = [name for name in ("unseen", *KINDS, "seen") if (BASE, tokens, name) in ratios]
    table = Table("grams", *columns, "worst seen", box=None, title=f"{tokens} tokens")
    for way in dict.fromkeys(key[1] for key in errors):
        figures = [ratios[way, tokens, column] for column in columns]
        figures.append(max(ratios.get((way, tokens, f"seen {kind}"), 0.0) for kind in KINDS))
        table.add_row(way, *(f"{figure:.3f}" for figure in figures))
    return table


def parse_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ROOT / "artifacts" / "real" / "smollm2-135m")
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 10, 20, 28])
    parser.add_argument("--method", choices=("gptq", "awq"), default="gptq")
    parser.add_argument("--ways", nargs="+", default=[NEAREST, INCLUDED, *WAYS], metavar="WAY")
    parser.add_argument("--windows", type=int, default=WINDOWS, help="of calibration, per kind")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--without", nargs="+", choices=list(KINDS), help="kinds to leave out")
    parser.add_argument("--cache", type=Path, help="folder that keeps the grams, 1.5 GB")
    options = parser.parse_args()
    if unknown := set(options.ways) - {NEAREST, INCLUDED, *WAYS}:
        parser.error(f"--ways: expected {', '.join(WAYS)}; found {', '.join(sorted(unknown))}")
    options.without = options.without or options.kinds
    options.ways = list(dict.fromkeys([BASE, *options.ways]))
    return options


@torch.inference_mode()
def main() -> None:
    """Capture grams, quantize in every way, and print the tables."""
    options, console = parse_options(), Console(width=170)
    data = Path(os.environ.get("QUANTKIT_DATA", ROOT.parent / "shared" / "data"))
    model = AutoModel.from_pretrained(options.model, dtype=torch.float32)
    del model.layers[max(options.blocks) + 1 :]
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    texts = read_texts(data, tokenizer, options.kinds, options.windows)
    with tempfile.TemporaryDirectory() as place:
        captured = capture_grams(model, texts, options.blocks, options.cache or Path(place))
    errors: dict[tuple[str, ...], float] = {}
    for left_out in options.without:
        for key in ((block, name) for block in options.blocks for name in INPUTS):
            layer = model.layers[key[0]]
            for record in measure_input(layer, key, left_out, captured, options):
                *case, error = record
                errors[tuple(case)] = error
        console.log(f"without {left_out}")
        for tokens in (ALL, ORDINARY):
            console.print(format_table(errors, tokens))


if __name__ == "__main__":
    main()
