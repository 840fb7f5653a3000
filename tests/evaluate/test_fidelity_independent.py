"""Figures of the report against an independent computation that shares no code with quantkit.

Source and artifact are read with the safetensors library, FP8 blocks and AWQ words are unpacked
here with numpy, and both models are loaded whole into transformers. The streaming figures must
agree to 1 %.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.builds import ignore_progress
from support.whole_models import awq_weights, fp8_weights, whole_model

from quantkit import pipeline
from quantkit.io import package_data
from quantkit.recipe.parse import parse_recipe
from quantkit.texts import corpora

AGREEMENT = 0.01


@pytest.mark.slow
@pytest.mark.parametrize("rules", ["experts-only", "all-linear"])
def test_streaming_figures_equal_whole_models(rules: str, tmp_path: Path) -> None:
    """KL, perplexity ratio, top-1 and delta-p of the demo's recipe, on all of its held-out text."""
    text = (package_data.locate_folder("recipes") / "tiny-v3-awq4.yaml").read_text()
    recipe = parse_recipe(
        text,
        "tiny-v3-awq4.yaml",
        {"output.path": str(tmp_path / "a"), "rules": rules, "calibration.sequences": "100"},
    )
    (outcome,) = pipeline.build_artifacts(
        recipe,
        text,
        overwrite=False,
        evaluate=False,
        on_plan=ignore_progress,
        on_progress=ignore_progress,
    )
    source = package_data.locate_model("builtin:tiny-v3")
    first, second = (
        whole_model(source, fp8_weights(source)),
        whole_model(outcome.path, awq_weights(outcome.path)),
    )
    corpus = corpora.load_set(recipe.fidelity.set, package_data.locate_folder("calibration"))
    tokens = corpora.sample_sequences(corpus, corpora.load_tokenizer(source), None, 512, 0)
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
