"""Chat templates with limits give transformers' text."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from transformers import AutoTokenizer

from quantkit.io import package_data
from quantkit.io.templates import TemplateFault, TemplateWorker
from quantkit.texts.chat_templates import render_chat, render_unfinished_chat

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{%- for message in messages %}
    {%- if not loop.first and message.role == 'system' %}
        {{- raise_exception("System messages come first") }}
    {%- endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
{{- system_message }}
"""
REASONING = """\
{%- set ns = namespace(last=0, seen=false) %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {%- continue %}
    {%- endif %}
    {%- set ns.last = loop.index0 %}
    {%- if message.role == 'assistant' %}
        {%- generation %}
        {{- message.reasoning_content | default('none', true) }}|{{ message.content }}
        {%- endgeneration %}
    {%- else %}
        {{- message | tojson }}{{ {'é': [1, none]} | tojson(indent=1) }}
    {%- endif %}
{%- endfor %}
{{- ns.last }}{{ tools is none }}{{ documents }}{{ undefined_name }}
{{- dict(a=1).items() | list }}
"""
CONVERSATION = [
    {"role": "system", "content": " Be <brief> & 'exact'. ", "name": None},
    {"role": "user", "content": "1 + 1 = ?\n"},
    {"role": "assistant", "content": "2", "reasoning": "Two ones."},
    {"role": "tool", "content": "ignored"},
    {"role": "user", "content": "é \U0001f600"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(package_data.locate_model("builtin:tiny-v3"))


@pytest.fixture(scope="module")
def worker() -> Iterator[TemplateWorker]:
    with TemplateWorker() as made:
        yield made


@pytest.mark.parametrize(
    "template", [CHATML, LLAMA, REASONING], ids=["chatml", "llama", "reasoning"]
)
def test_render_chat_equals_transformers(tokenizer, worker, template):
    for messages in (CONVERSATION, CONVERSATION[1:2]):
        expected = tokenizer.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=True, tokenize=False
        )
        assert render_chat(worker, tokenizer, messages, template=template) == expected


@pytest.mark.parametrize("template", [CHATML, LLAMA], ids=["chatml", "llama"])
@pytest.mark.parametrize("content", ["The answer is", "The answer is ", "x"])
def test_unfinished_chat_equals_transformers(tokenizer, worker, template, content, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    messages = [*CONVERSATION[:2], {"role": "assistant", "content": content}]
    expected = tokenizer.apply_chat_template(
        messages, continue_final_message=True, add_generation_prompt=False, tokenize=False
    )
    assert render_unfinished_chat(worker, tokenizer, messages) == expected


def test_template_that_drops_the_open_message_is_a_fault(tokenizer, worker, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages[0].content }}")
    with pytest.raises(TemplateFault, match="expected the last message in its text"):
        render_unfinished_chat(worker, tokenizer, CONVERSATION)


def test_settings_reach_the_template(tokenizer, worker):
    text = render_chat(
        worker,
        tokenizer,
        CONVERSATION,
        template="{{ enable_thinking }}",
        settings={"enable_thinking": False},
    )
    assert text == "False"


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ namespace(__class__=1) }}", "cannot hold"),
        ("{% set n = namespace() %}{% set n.__init__ = 1 %}", "cannot hold|unsafe|invalid"),
        ("{{ cycler.__init__.__globals__ }}", "unsafe"),
        ("{% for m in messages %}", "Unexpected end of template"),
        ("{{ 'a' * 10**10 }}", "MiB of memory"),
    ],
)
def test_hostile_chat_template_is_a_fault(tokenizer, worker, template, sentence):
    with pytest.raises(TemplateFault, match=sentence):
        render_chat(worker, tokenizer, CONVERSATION, template=template)


def test_tokenizer_without_a_template_is_a_value_error(tokenizer, worker):
    with pytest.raises(ValueError, match="chat_template is not set"):
        render_chat(worker, tokenizer, CONVERSATION)
