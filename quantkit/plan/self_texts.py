"""Text that the model samples itself, in a plan: tokens, generator, memory. Samples nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from quantkit.checkpoint import hub
from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.checkpoint.source_config import read_text_config
from quantkit.contracts import Config, Layout
from quantkit.io import package_data
from quantkit.plan.memory import BASE_BYTES, WHOLE_MODEL_COPIES, count_parameters
from quantkit.recipe.schema import Recipe
from quantkit.recipe.sections import AUTO
from quantkit.texts.corpus_spec import CorpusSpec, read_spec
from quantkit.texts.exposure import LEAST_UNSEEN
from quantkit.texts.mixture_spec import PartSpec
from quantkit.texts.self_prompts import PROMPTS_VERSION
from quantkit.texts.self_text import (
    Sampling,
    count_cached_tokens,
    hash_tokenizer,
    locate_cache,
)

Stream = Literal["calibration", "fidelity"]

GROUP_SIZE = 32
"""Answers that are sampled together in this process. Fixed, so that the memory of a build never
changes a text.
"""
PROMPT_TOKENS = 128
"""Tokens of a prompt that the estimate of memory allows for."""
CACHE_COPIES = 2
"""Peak over size of the KV cache: a layer's tensors are copied when they grow."""


@dataclass(frozen=True, kw_only=True)
class SelfTextPlan:
    """A part of a stream's text that the model samples."""

    stream: Stream
    part: str
    kinds: tuple[str, ...]
    languages: tuple[str, ...]
    n_tokens: int
    length: int
    seed: int


def list_self_texts(recipe: Recipe) -> list[SelfTextPlan]:
    """Return the parts of the recipe's texts that the model samples."""
    plans = list[SelfTextPlan]()
    calibration = recipe.calibration if recipe.needs_calibration else None
    if calibration is not None:
        count, length = calibration.sequences, calibration.length
        plans += plan_set("calibration", calibration.set, count, length, calibration.seed)
    if (fidelity := recipe.fidelity) is not None:
        plans += plan_set("fidelity", fidelity.set, fidelity.windows, fidelity.length, 0)
    return plans


def plan_set(
    stream: Stream, set_name: str, sequences: int | None, length: int, seed: int
) -> list[SelfTextPlan]:
    """Return the parts of a set that the model samples; none for `auto`, which is no set yet."""
    if set_name == AUTO:
        return []
    spec = read_spec(set_name, package_data.locate_folder("calibration"))
    return [
        plan_part(stream, spec, part, sequences, length, seed)
        for part in spec.parts
        if part.sampled is not None
    ]


def plan_part(
    stream: Stream, spec: CorpusSpec, part: PartSpec, sequences: int | None, length: int, seed: int
) -> SelfTextPlan:
    """Return how much text of a part a stream needs, at most: its share in whole sequences."""
    assert part.sampled is not None
    n_sequences, share = sequences or 0, part.share
    if stream == "fidelity":  # parts of kinds that were not calibrated on get a larger share
        own = sum(each.share for each in spec.parts if each.sampled is not None)
        share *= max(1.0, LEAST_UNSEEN / own)
    if len(spec.parts) > 1:
        n_sequences = min(n_sequences, int(share * n_sequences) + 1)
    return SelfTextPlan(
        stream=stream,
        part=part.name,
        kinds=part.sampled.kinds,
        languages=part.sampled.languages,
        n_tokens=n_sequences * length,
        length=length,
        seed=seed,
    )


def make_sampling(recipe: Recipe) -> Sampling:
    """Return the parameters of sampling."""
    endpoint = recipe.endpoint
    return Sampling() if endpoint is None else Sampling(max_tokens=endpoint.max_tokens)


def make_identity(
    recipe: Recipe, text: SelfTextPlan, fingerprint: str, folder: Path, compute: str
) -> dict[str, object]:
    """Return everything that decides a text, except the bytes of the weights.

    compute: device and dtype, as "float32 on cpu".
    """
    endpoint = recipe.endpoint
    generator: Mapping[str, object] = {"compute": compute, "group": GROUP_SIZE}
    if endpoint is not None:
        generator = {"url": endpoint.url, "model": endpoint.model, "chat": endpoint.chat}
    return {
        "model": fingerprint,
        "tokenizer": hash_tokenizer(folder),
        "prompts": PROMPTS_VERSION,
        "kinds": list(text.kinds),
        "languages": list(text.languages),
        "sampling": asdict(make_sampling(recipe)),
        "seed": make_seed(text),
        "generator": generator,
    }


def make_seed(text: SelfTextPlan) -> str:
    """Return the seed of a stream: calibration and fidelity never share an answer."""
    return f"{text.stream} {text.seed}"


def describe_self_texts(recipe: Recipe, compute: str) -> tuple[str, ...]:
    """Return a sentence per text of the model itself: how many tokens will be sampled, by what, and
    how many the cache holds.
    """
    lines, texts = list[str](), list_self_texts(recipe)
    if not texts:
        return ()
    folder = hub.find_local_folder(recipe.source.model)
    fingerprint = Checkpoint.open(folder).compute_fingerprint() if folder is not None else ""
    several = Counter(text.stream for text in texts)
    for text in texts:
        endpoint = recipe.endpoint
        by = f"in this process, {compute}" if endpoint is None else f"by {endpoint.url}"
        part = f" ({text.part})" if several[text.stream] > 1 else ""
        line = f"{text.stream}{part}: {text.n_tokens:,} tokens of the model's own text"
        held = 0
        if folder is not None:
            identity = make_identity(recipe, text, fingerprint, folder, compute)
            held = count_cached_tokens(locate_cache(identity), text.length)
        if held >= text.n_tokens:
            lines.append(f"{line}; the cache holds them")
        else:
            more = f"; the cache holds {held:,}" if held else ""
            lines.append(f"{line} will be sampled ({by}){more}")
    return tuple(lines)


def find_self_faults(
    recipe: Recipe, config: Config, layout: Layout, budget_bytes: int, value_bytes: int
) -> list[str]:
    """Return the faults of texts of the model itself: no number of sequences, a model that does not
    fit, an endpoint that samples nothing.

    value_bytes: bytes of a weight in the dtype of the computation.
    """
    texts, faults = list_self_texts(recipe), list[str]()
    for text in texts:
        key = "sequences" if text.stream == "calibration" else "windows"
        if text.n_tokens == 0:
            faults.append(
                f"{recipe.where(text.stream, key)}: {text.stream}.{key}: expected a number for "
                "text of the model itself, found null; name one"
            )
    if recipe.endpoint is not None and not texts and not recipe.chosen_texts:
        faults.append(
            f"{recipe.where('calibration', 'endpoint')}: calibration.endpoint: expected a set with "
            "text of the model itself, found none; set calibration.set: self, or remove the key"
        )
    fault = ""
    if texts and recipe.endpoint is None:
        fault = find_sampling_fault(config, layout, budget_bytes, value_bytes)
    if fault:
        where = recipe.where(texts[0].stream, "set")
        faults.append(
            f"{where}: {texts[0].stream}.set: {fault}; set calibration.endpoint to a server of "
            + ("a model" if layout.output != "logits" else "the model, raise memory")
            + ", or choose another set"
        )
    return faults


def find_sampling_fault(config: Config, layout: Layout, budget_bytes: int, value_bytes: int) -> str:
    """Return why the model cannot be sampled in this process, or ""."""
    if layout.output != "logits":
        return "the model has no language head to sample text with"
    needed = estimate_sampling_bytes(config, layout, value_bytes)
    if needed <= budget_bytes:
        return ""
    return (
        f"sampling text of the model in this process needs {-(-needed // 10**7) / 100:.2f} GB, "
        f"memory allows {budget_bytes // 10**7 / 100:.2f} GB"
    )


def estimate_sampling_bytes(config: Config, layout: Layout, value_bytes: int) -> int:
    """Return the peak bytes of sampling in this process: the whole model and the KV cache."""
    weights = int(WHOLE_MODEL_COPIES * value_bytes * count_parameters(layout))
    n_layers = sum(block.kind == "decoder" for block in layout.blocks)
    n_tokens = GROUP_SIZE * (Sampling().max_tokens + PROMPT_TOKENS)
    cache = CACHE_COPIES * value_bytes * n_layers * count_cached_values(config) * n_tokens
    return BASE_BYTES + weights + cache


def count_cached_values(config: Config) -> int:
    """Return the values of keys and values of one token in one layer, as transformers keeps them.

    For MLA these are the expanded heads.
    """
    config = read_text_config(config)
    heads = config.integer("num_attention_heads", 1)
    if config.has("kv_lora_rank"):
        names = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        return heads * sum(config.integer(name, 0) for name in names)
    size = config.integer("head_dim", config.integer("hidden_size", 0) // max(1, heads))
    return 2 * config.integer("num_key_value_heads", heads) * size
