"""`architectures` without a class, and the scores of eager attention: the plan says both."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.checkpoints import make_tiny_config

from quantkit import registry
from quantkit.contracts import Architecture, Config
from quantkit.plan import memory
from quantkit.plan.match_checkpoint import find_class_warning
from quantkit.plan.plan import find_unsupported_engines
from quantkit.serve.engines.target import find_class_reasons

DERIVED = Architecture(layout=lambda _: None, tiny={}, derived="x", classes=("Gemma3ForCausalLM",))  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize("value", [None, []])
def test_missing_class_is_said_and_keeps_engines_out(value: object) -> None:
    config = Config(values={"model_type": "gemma3_text", "architectures": value})
    warning = find_class_warning(config, DERIVED)
    assert warning is not None
    assert "expected Gemma3ForCausalLM, found none" in warning and "add it" in warning
    layout = registry.get_architecture("llama").layout(Config(values=make_tiny_config("llama")))
    engines = find_unsupported_engines(registry.get_format("dense"), config, layout, {})
    assert set(engines) == {"vLLM", "SGLang"}


def test_class_of_another_family_is_said() -> None:
    names = ["MistralForCausalLM"]
    config = Config(values={"model_type": "gemma3_text", "architectures": names})
    warning = find_class_warning(config, DERIVED)
    assert warning is not None and "found ['MistralForCausalLM']" in warning


def test_right_class_is_not_mentioned() -> None:
    names = ["Gemma3ForCausalLM"]
    config = Config(values={"model_type": "gemma3_text", "architectures": names})
    assert find_class_warning(config, DERIVED) is None


def test_serve_refuses_engines_that_choose_by_the_class(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert set(find_class_reasons(tmp_path)) == {"vLLM", "SGLang"}
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    assert find_class_reasons(tmp_path) == {}


def test_scores_of_eager_attention_count() -> None:
    """heads * length^2 of one long sequence; of short ones as many as a batch holds."""
    layout = registry.get_architecture("llama").layout(Config(values=make_tiny_config("llama")))
    eager = replace(layout, eager_heads=8)
    for length, sequences in ((8192, 1), (512, memory.BATCH_TOKENS // 512)):
        with_scores, without = (
            memory.estimate_batch_bytes(x, x.blocks[0], length) for x in (eager, layout)
        )
        scores = 8 * length**2 * sequences * 4
        assert with_scores - without == memory.SCORE_COPIES * scores
