"""How engines load an artifact, as code for its card. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator

from quantkit.artifact.fidelity_schema import Fidelity

PROMPT = "Once upon a time"
QUESTION = "Why is the sky blue?"
_VLLM = """\
from vllm import LLM, SamplingParams

model = LLM({name})
answers = model.{call}, SamplingParams(max_tokens=64))
print(answers[0].outputs[0].text)"""
_VLLM_CALLS = (
    f'generate("{PROMPT}"',
    f'chat([{{"role": "user", "content": "{QUESTION}"}}]',
)
_TRANSFORMERS = """\
# pip install {packages}
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({name})
model = AutoModelForCausalLM.from_pretrained({name}, dtype="auto", device_map="auto")
{inputs}
output = model.generate(**inputs.to(model.device), max_new_tokens=64)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:]))"""
_TRANSFORMERS_INPUTS = (
    f'inputs = tokenizer("{PROMPT}", return_tensors="pt")',
    f"""\
messages = [{{"role": "user", "content": "{QUESTION}"}}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)""",
)
_QUANTKIT = """\
import quantkit

model = quantkit.load({name})  # a transformers model"""
PACKAGES = {"compressed_tensors": "compressed-tensors", "bitsandbytes": "bitsandbytes"}
"""Format -> what transformers needs to read it."""


def list_snippets(fidelity: Fidelity) -> Iterator[tuple[str, str]]:
    """Yield engine and Python code for each library that loads the artifact.

    The folder is named as the artifact; quantkit itself loads every format. A model with a chat
    template is asked a question, another one continues a text.
    """
    name, source = json.dumps(fidelity.artifact.name, ensure_ascii=False), fidelity.source
    engines = [command.engine for command in fidelity.artifact.serving]
    if source.pipeline_tag == "text-generation":
        if "vLLM" in engines:
            yield "vLLM", _VLLM.format(name=name, call=_VLLM_CALLS[source.chat])
        if "transformers" in engines:
            package = PACKAGES.get(fidelity.artifact.format)
            packages = " ".join(["transformers", "accelerate", *([package] if package else [])])
            inputs = _TRANSFORMERS_INPUTS[source.chat]
            yield "transformers", _TRANSFORMERS.format(name=name, packages=packages, inputs=inputs)
    yield "quantkit", _QUANTKIT.format(name=name)
