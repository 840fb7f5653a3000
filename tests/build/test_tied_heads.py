"""A head that is the embedding has no tensor; config.json names it, for loaders take it for a
linear all the same.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.builds import build
from support.checkpoints import make_tiny_config, write_checkpoint
from support.dequantized import Stored
from support.underived_models import write_model
from transformers import AutoConfig, AutoModelForCausalLM

from quantkit.errors import ArtifactError
from quantkit.verify.shallow import verify_artifact

pytestmark = pytest.mark.usefixtures("quick_builds")

SCHEMES = {
    "compressed_tensors": "{method: rtn, bits: 4, group_size: 64, symmetric: true}",
    "bitsandbytes": "{method: nf4}",
}
ENTRIES = {"compressed_tensors": "ignore", "bitsandbytes": "llm_int8_skip_modules"}


def llama(folder: Path) -> Path:
    return write_checkpoint(folder, make_tiny_config("llama", tie_word_embeddings=True))


def starcoder2(folder: Path) -> Path:
    """A family without a table."""
    config = AutoConfig.for_model(
        "starcoder2",
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=768,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    return write_model(folder, {**config.to_dict(), "dtype": "bfloat16"})


@pytest.mark.parametrize("source", [llama, starcoder2])
@pytest.mark.parametrize("name", SCHEMES)
def test_transformers_leaves_a_tied_head_alone(name: str, source: object, tmp_path: Path) -> None:
    folder = source(tmp_path / "source")  # type: ignore[operator]
    keys = {"quantize": SCHEMES[name], "format": name, "rules": "all-linear", "calibration": "null"}
    path = build(folder, tmp_path / "artifact", **keys).path
    theirs, output = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(output.values()), output
    tokens = torch.randint(0, 700, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        actual, expected = theirs(tokens).logits, Stored.open(path).model()(tokens).logits
    assert (
        float((actual.float() - expected).norm() / expected.norm()) < 0.04
    )  # they compute in bfloat16


@pytest.mark.parametrize("name", SCHEMES)
def test_verify_misses_a_tied_head_that_is_not_named(name: str, tmp_path: Path) -> None:
    keys = {"quantize": SCHEMES[name], "format": name, "rules": "all-linear", "calibration": "null"}
    path = build(llama(tmp_path / "source"), tmp_path / "artifact", **keys).path
    verify_artifact(path)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"][ENTRIES[name]].remove("lm_head")
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ArtifactError, match="lm_head is not quantized in the tensors, but quantized to"
    ):
        verify_artifact(path)
