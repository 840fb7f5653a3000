"""How engines load an artifact, as code for its card. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator

from quantkit.artifact.fidelity_schema import Fidelity

_VLLM = """\
from vllm import LLM, SamplingParams

model = LLM({name})
print(model.generate("Once upon a time", SamplingParams(max_tokens=64))[0].outputs[0].text)"""
_TRANSFORMERS = """\
{install}from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({name})
model = AutoModelForCausalLM.from_pretrained({name}, dtype="auto", device_map="auto")
inputs = tokenizer("Once upon a time", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))"""
_QUANTKIT = """\
import quantkit

model = quantkit.load({name})  # a transformers model"""
PACKAGES = {"compressed_tensors": "compressed-tensors", "bitsandbytes": "bitsandbytes"}
"""Format -> what transformers needs to read it."""
CODE = {"vLLM": _VLLM, "transformers": _TRANSFORMERS}


def list_snippets(fidelity: Fidelity) -> Iterator[tuple[str, str]]:
    """Yield engine and Python code for each library that loads the artifact.

    The folder is named as the artifact; quantkit itself loads every format.
    """
    name = json.dumps(fidelity.artifact.name, ensure_ascii=False)
    engines = [command.engine for command in fidelity.artifact.serving]
    for engine, code in CODE.items():
        if engine in engines and fidelity.source.pipeline_tag == "text-generation":
            package = PACKAGES.get(fidelity.artifact.format)
            install = f"# pip install transformers {package}\n" if package else ""
            yield engine, code.format(name=name, install=install)
    yield "quantkit", _QUANTKIT.format(name=name)
