"""The report's figures, computed a second time by code that shares nothing with quantkit.

Source and artifact are read with the safetensors library, FP8 blocks and AWQ words are unpacked here with numpy, and
both models are loaded whole into transformers. The streaming figures must agree to 1 %.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_contracts import ignore
from transformers import AutoConfig, AutoModelForCausalLM

from quantkit import pipeline
from quantkit.planning.recipe import parse
from quantkit.storage import builtin, corpora

SLOTS = [0, 4, 1, 5, 2, 6, 3, 7]  # FORMATS.md 1.2: column j of a word lies in slot SLOTS[j]
AGREEMENT = 0.01


def fp8_weights(folder: Path) -> dict[str, torch.Tensor]:
    """BF16 dequantization of an FP8 checkpoint, block by block."""
    stored = load_file(folder / "model.safetensors")
    found = {}
    for name, value in stored.items():
        if name.endswith("_scale_inv"):
            continue
        scale = stored.get(f"{name}_scale_inv")
        if scale is not None:
            wide = scale.repeat_interleave(128, 0)[: value.shape[0]].repeat_interleave(128, 1)[:, : value.shape[1]]
            value = (value.float() * wide).bfloat16()
        found[name] = value
    return found


def unpack(words: torch.Tensor) -> np.ndarray:
    """int32 words [rows, columns / 8] -> nibbles [rows, columns] in AWQ's order."""
    bits = words.numpy().astype(np.int64) & 0xFFFFFFFF
    slots = np.stack([(bits >> (4 * slot)) & 15 for slot in range(8)], axis=-1)  # [rows, words, slot]
    return slots[:, :, SLOTS].reshape(bits.shape[0], -1)


def awq_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every logical weight of an AWQ artifact: (q - z) * s, group by group."""
    stored = load_file(folder / "model.safetensors")
    group = json.loads((folder / "config.json").read_text())["quantization_config"]["group_size"]
    found = {}
    for name, value in stored.items():
        module, _, kind = name.rpartition(".")
        if kind == "qweight":
            zeros = np.repeat(unpack(stored[f"{module}.qzeros"]), group, axis=0)
            scales = np.repeat(stored[f"{module}.scales"].float().numpy(), group, axis=0)
            found[f"{module}.weight"] = torch.from_numpy(((unpack(value) - zeros) * scales).T.astype(np.float32))
        elif kind not in {"qzeros", "scales"}:
            found[name] = value
    return found


def whole_model(folder: Path, weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    """A transformers model in float32 with these weights, experts stacked by transformers' names."""
    values = json.loads((folder / "config.json").read_text())
    values.pop("quantization_config")
    config = AutoConfig.for_model(**values)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    state = {name: value.float() for name, value in weights.items() if ".experts." not in name}
    for layer in range(config.first_k_dense_replace, config.num_hidden_layers):
        prefix = f"model.layers.{layer}.mlp.experts"
        names = [f"{prefix}.{e}" for e in range(config.n_routed_experts)]
        both = [torch.cat([weights[f"{n}.gate_proj.weight"], weights[f"{n}.up_proj.weight"]]) for n in names]
        state[f"{prefix}.gate_up_proj"] = torch.stack(both).float()
        state[f"{prefix}.down_proj"] = torch.stack([weights[f"{n}.down_proj.weight"] for n in names]).float()
    model.load_state_dict(state, strict=True)
    return model


@pytest.mark.parametrize("rules", ["experts-only", "all-linear"])
def test_streaming_figures_equal_whole_models(rules: str, tmp_path: Path) -> None:
    """KL, perplexity ratio, top-1 and delta-p of the demo's recipe, on all of its held-out text."""
    text = (builtin.folder("recipes") / "tiny-v3-awq4.yaml").read_text()
    recipe = parse(
        text, "tiny-v3-awq4.yaml", {"output.path": str(tmp_path / "a"), "rules": rules, "calibration.sequences": "100"}
    )
    (outcome,) = pipeline.run(recipe, text, overwrite=False, evaluate=False, planned=ignore, tell=ignore)
    source = builtin.resolve_model("builtin:tiny-v3")
    first, second = whole_model(source, fp8_weights(source)), whole_model(outcome.path, awq_weights(outcome.path))
    corpus = corpora.load_set(recipe.fidelity.set, builtin.folder("calibration"))
    tokens = corpora.token_batches(corpus, corpora.load_tokenizer(source), None, 512, 0)
    kl, nll_p, nll_q, same = [], [], [], []
    with torch.no_grad():
        for i in range(tokens.n_sequences):
            ids = tokens.sequence(i).long()
            p = first(ids[None]).logits[0, :-1].double().log_softmax(-1).numpy()
            q = second(ids[None]).logits[0, :-1].double().log_softmax(-1).numpy()
            true = ids[1:].numpy()
            kl.append((np.exp(p) * (p - q)).sum(-1))
            nll_p.append(-p[np.arange(len(true)), true])
            nll_q.append(-q[np.arange(len(true)), true])
            same.append(p.argmax(-1) == q.argmax(-1))
    kl, p, q = np.concatenate(kl), np.concatenate(nll_p), np.concatenate(nll_q)
    delta = np.exp(-q) - np.exp(-p)
    pooled = outcome.fidelity.distribution[0]
    expected = {
        "kl_mean": kl.mean(),
        "kl_median": np.median(kl),
        "kl_p99": np.quantile(kl, 0.99),
        "kl_p999": np.quantile(kl, 0.999),
        "kl_max": kl.max(),
        "ppl_source": np.exp(p.mean()),
        "ppl_ratio": np.exp((q - p).mean()),
        "top1": np.concatenate(same).mean(),
        "rms_delta_p": np.sqrt((delta**2).mean()),
    }
    assert pooled.tokens == len(kl)
    for name, value in expected.items():
        figure = getattr(pooled, name)
        assert figure.value == pytest.approx(value, rel=AGREEMENT), name
    assert pooled.mean_delta_p is not None
    assert pooled.mean_delta_p.value == pytest.approx(delta.mean(), rel=AGREEMENT, abs=1e-6)
