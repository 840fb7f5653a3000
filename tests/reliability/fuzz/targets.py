"""Fuzz targets: each parser of external input as one function of bytes.

A target writes the bytes where the product expects them and calls the product's parser.
QuantkitError is a valid result; any other exception is a defect, and so is a message with
unprintable characters.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reliability.fuzz.mutate import (
    Mutation,
    mutate_bytes,
    mutate_json,
    mutate_lines,
    mutate_template,
    mutate_yaml,
)

from quantkit import errors

if TYPE_CHECKING:
    from quantkit.io.templates import TemplateWorker
    from quantkit.recipe.schema import Recipe

MESSAGE_LINES = 41
ROOT = Path(__file__).parents[3]

HEADER = {
    "__metadata__": {"format": "pt"},
    "a.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b.weight": {"dtype": "BF16", "shape": [2, 4], "data_offsets": [16, 32]},
    "c.weight": {"dtype": "F8_E4M3", "shape": [4, 4], "data_offsets": [32, 48]},
    "c.weight_scale_inv": {"dtype": "F32", "shape": [1, 1], "data_offsets": [48, 52]},
}
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "head_dim": 16,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}
RECIPE = """\
version: 1
source: {model: builtin:tiny-v3, revision: null}
quantize: {method: awq, rounding: gptq, bits: 4, group_size: 64, symmetric: false}
format: [awq, dense]
rules:
  - {match: "re:.*[.]experts[.].*", quantize: {bits: 3}}
  - match: "*.q_proj"
    keep: bf16
  - {preset: experts-only}
calibration: {set: tiny-v3, sequences: 8, length: 64}
fidelity: {set: tiny-v3-heldout, windows: 4, length: 64}
evaluation: {tasks: [tiny-v3-math], limit: 5}
gates: {kl_mean@math: {max: 0.1}, size: {max: 400GB}, tiny-v3-math: {margin_pp: 2}}
output: {path: out, shard_bytes: 5GB}
memory: 4GB
compute: {device: cpu}
"""
MIXTURE = """\
version: 2
name: mixed
parts:
  - {name: a, kind: web, language: zh, share: 2, licence: MIT, file: text.txt}
  - {name: b, kind: math, licence: MIT, file: rows.jsonl, template: "{q} {a}", packing: documents}
  - {name: c, kind: prose, licence: MIT, set: mine, domain: prose, rows: 5}
"""
SPEC = """\
version: 1
name: mine
licence: CC0
origin: written here
domains: [math, prose]
packing: documents
end: eos
file: mine.jsonl
sha256: {sha256}
"""
ROWS = b'{"domain": "math", "text": "1 + 1 = 2"}\n{"domain": "prose", "text": "once upon"}\n'
TASK = """\
task: mine
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
filter_list:
  - name: answer
    filter: [{function: regex, regex_pattern: "([0-9]+)"}]
quantkit:
  domain: math
  local: {test: {file: mine.jsonl, rows: [0, 2]}}
  gold: "{{answer}}"
  code: {source: "{{completion}}", tests: "{{test}}", cut: none, seconds: 10}
"""
FULL_TASK = """\
task: mine
tag: [a, b]
output_type: generate_until
test_split: test
fewshot_split: test
num_fewshot: 2
fewshot_config:
  sampler: first_n
  samples: [{question: "1", answer: "2", list: [1, {a: b}]}]
  doc_to_text: "{{question}}"
  gen_prefix: "It is"
description: "Add."
doc_to_text: "Question: {{question}}"
doc_to_target: "{{answer}}"
target_delimiter: " "
fewshot_delimiter: "\\n\\n"
gen_prefix: "A"
repeats: 3
generation_kwargs: {until: ["\\n"], do_sample: true, temperature: 0.7, top_p: 0.9, max_gen_toks: 8}
filter_list:
  - name: answer
    filter:
      - {function: take_first_k, k: 2}
      - {function: regex, regex_pattern: "([0-9]+)", group_select: -1, fallback: none}
      - {function: map, mapping_dict: {a: b}, default_value: c}
      - {function: majority_vote}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true, regexes_to_ignore: [","]}
metadata: {version: 1.0}
quantkit:
  domain: math
  hub: {path: openai/gsm8k, name: main}
  local: {test: mine.jsonl}
  gold: "{{answer}}"
"""
PYTHON = b"def doc_to_text(doc):\n    return 'x'\n"
PYTHON_TASK = """\
task: mine
output_type: generate_until
quantkit: {domain: math, local: {test: mine.jsonl}, python: helpers.py}
"""
TEMPLATE = """\
{% set ns = namespace(n=0) %}{% for c in choices %}{% set ns.n = ns.n + loop.index %}
{{- c|upper|replace("A", 'b') ~ ns.n * 2 }}{% if not loop.last %}, {% endif %}{% endfor %}
{% macro show(x) %}{{ "%s-%d"|format(x, 3) }}{% endmacro %}{{ show(question) }}
{{ question[:3] + choices[-1] }} {{ (1 + 2) ** 3 // 2 }} {{ [1, 2]|join('-') }} {{ d.a.b|tojson }}
{{ cycler('a', 'b').next() }} {{ question.__class__ }}
"""
TOKENIZER = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [
        {
            "id": 0,
            "content": "<s>",
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
    ],
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    },
    "post_processor": {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": False,
        "use_regex": True,
    },
    "decoder": {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": True,
        "use_regex": True,
    },
    "model": {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {"<s>": 0, "a": 1, "b": 2, "ab": 3},
        "merges": [["a", "b"]],
    },
}
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": "<s>",
    "model_max_length": 512,
    "added_tokens_decoder": {"0": {"content": "<s>", "lstrip": False, "special": True}},
    "chat_template": "{{ x }}",
    "clean_up_tokenization_spaces": False,
    "padding_side": "left",
    "add_bos_token": True,
}
CARD = "---\nlicense: mit\nlicense_link: x\ntags: [a, b]\n---\n# A model\n"


@dataclass(frozen=True, kw_only=True)
class Target:
    """A parser. `read` takes a folder that contains `file`; `mutate` damages a valid input."""

    name: str
    file: str
    read: Callable[[Path], object]
    make_seeds: Callable[[], tuple[bytes, ...]]
    mutate: Mutation
    make_companions: Callable[[], Mapping[str, bytes]]

    @cached_property
    def seeds(self) -> tuple[bytes, ...]:
        """Valid inputs."""
        return self.make_seeds()


def encode_json(value: object) -> bytes:
    """Encode a value as JSON."""
    return json.dumps(value, indent=1).encode()


def join_shard(header: bytes, data: bytes) -> bytes:
    """Join header and data to a safetensors file."""
    return len(header).to_bytes(8, "little") + header + data


def mutate_shard(data: bytes, rng: random.Random) -> bytes:
    """Damage the header of a shard, mostly with the correct header length."""
    length = int.from_bytes(data[:8], "little")
    if rng.random() < 0.2 or length > len(data):
        return mutate_bytes(data, rng)
    header = mutate_json(data[8 : 8 + length], rng)
    return join_shard(header, data[8 + length :])


PLAIN = dict([*HEADER.items()][:3])  # without FP8
SHARD_NAME = "a.safetensors"
SHARD = join_shard(encode_json(HEADER), bytes(52))
TARGETS: dict[str, Target] = {}


def register_target(
    name: str,
    file: str,
    seeds: Callable[[], tuple[bytes, ...]],
    mutate: Mutation,
    companions: Callable[[], Mapping[str, bytes]] = dict,
) -> Callable[[Callable[[Path], object]], Callable[[Path], object]]:
    """Register the decorated function as the target `name`."""

    def register(read: Callable[[Path], object]) -> Callable[[Path], object]:
        TARGETS[name] = Target(
            name=name,
            file=file,
            read=read,
            make_seeds=seeds,
            mutate=mutate,
            make_companions=companions,
        )
        return read

    return register


# ------------------------------------------------------------------------------------------ recipes


@register_target("recipe", "recipe.yaml", lambda: (RECIPE.encode(),), mutate_yaml)
def fuzz_recipe(folder: Path) -> object:
    """Parse a recipe file."""
    from quantkit.recipe.recipe_file import read_recipe

    return read_recipe(str(folder / "recipe.yaml"), {})[1].hash


@register_target(
    "override",
    "overrides",
    lambda: (b"quantize.bits=3\noutput.path=x\nrules=[{match: a, keep: bf16}]",),
    mutate_yaml,
)
def fuzz_override(folder: Path) -> object:
    """Parse --set KEY=VALUE, one per line, and apply the overrides to the recipe's text."""
    from quantkit.recipe.parse import apply_overrides, parse_recipe

    text = (folder / "overrides").read_bytes().decode("utf-8", errors="surrogateescape")
    pairs = dict(line.partition("=")[::2] for line in text.split("\n"))
    return apply_overrides(RECIPE, parse_recipe(RECIPE, "recipe.yaml", pairs))


@register_target(
    "gates",
    "gates.yaml",
    lambda: (
        b"gates:\n  kl_mean@math: {max: 0.1}\n  size: {max: 4GB}\n  mine: {min_score: 0.5}\n",
    ),
    mutate_yaml,
)
def fuzz_gates(folder: Path) -> object:
    """Parse a gates file."""
    from quantkit.recipe.parse import parse_gates
    from quantkit.recipe.recipe_file import read_text_file

    return parse_gates(read_text_file(folder / "gates.yaml"), "gates.yaml", ["mine"])


# -------------------------------------------------------------------------------------- checkpoints


@register_target("config", "config.json", lambda: make_configs(), mutate_json)
def fuzz_config(folder: Path) -> object:
    """Plan from config.json, for a family with a table: layout, decisions, shards, memory."""
    from quantkit import registry
    from quantkit.checkpoint.checkpoint import read_config
    from quantkit.plan import sources
    from quantkit.plan.plan import SourceFacts

    config = read_config(folder)
    registry.get_architecture(
        config.text("model_type")
    )  # other families are derived from transformers, which takes seconds
    facts = SourceFacts(
        model="m", revision=None, config=config, specs=None, fingerprint=None, where="m"
    )
    return [
        plan.hash
        for plan in sources.plan_recipe(make_recipe(), facts, {"calibration": 9, "fidelity": 9})
    ]


@cache
def make_recipe() -> Recipe:
    """Return a recipe that is valid for every family."""
    from quantkit.recipe.parse import parse_recipe

    text = "{version: 1, source: {model: m}, fidelity: none, output: {path: out}, memory: 64GB, "
    text += "format: dense, "
    text += "calibration: {set: tiny-v3, sequences: 2, length: 8}, "
    return parse_recipe(
        text + "quantize: {method: gptq, group_size: 32}, compute: {device: cpu}}", "r"
    )


@cache
def make_configs() -> tuple[bytes, ...]:
    """Return the tiny config of every family with a table."""
    from quantkit import registry

    names = registry.list_names("architectures")
    return (
        encode_json(LLAMA),
        *(encode_json({**registry.get_architecture(name).tiny}) for name in names),
    )


@register_target(
    "index", "model.safetensors.index.json",
    lambda: (
        encode_json({
            "metadata": {"total_size": 52},
            "weight_map": dict.fromkeys(list(HEADER)[1:], SHARD_NAME),
        }),
    ),
    mutate_json, lambda: {SHARD_NAME: SHARD},
)  # fmt: skip
def fuzz_index(folder: Path) -> object:
    """Read the index of a sharded checkpoint."""
    from quantkit.checkpoint.shards import open_shards

    return open_shards(folder).compute_fingerprint()


@register_target(
    "header", "model.safetensors", lambda: (SHARD, join_shard(b"{}", b"")), mutate_shard
)
def fuzz_header(folder: Path) -> object:
    """Read a safetensors header."""
    from quantkit.checkpoint.header import read_header

    return read_header(folder / "model.safetensors")


@register_target(
    "checkpoint",
    "model.safetensors",
    lambda: (SHARD,),
    mutate_shard,
    lambda: {"config.json": encode_json(LLAMA)},
)
def fuzz_checkpoint(folder: Path) -> object:
    """Read every tensor of a checkpoint."""
    from quantkit.checkpoint.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(folder)
    checkpoint.compute_fingerprint()
    return checkpoint.read(checkpoint.specs)


def make_encoded_shard() -> bytes:
    """Return a shard with a weight in each source encoding; all codes are zero."""
    shapes: dict[str, tuple[str, tuple[int, ...], int]] = {
        "a.weight_packed": ("I32", (8, 8), 4),
        "a.weight_scale": ("BF16", (8, 2), 2),
        "a.weight_zero_point": ("I32", (1, 2), 4),
        "a.weight_g_idx": ("I32", (64,), 4),
        "b.weight": ("I8", (8, 64), 1),
        "b.weight_scale": ("F32", (8, 1), 4),
        "c.weight_packed": ("U8", (8, 32), 1),
        "c.weight_scale": ("U8", (8, 2), 1),
        "d.weight": ("U8", (8, 32), 1),
        "d.weight_scale": ("F8_E4M3", (8, 4), 1),
        "d.weight_scale_2": ("F32", (), 4),
        "e.qweight": ("I32", (64, 1), 4),
        "e.qzeros": ("I32", (2, 1), 4),
        "e.scales": ("F16", (2, 8), 2),
        "f.qweight": ("I32", (8, 8), 4),
        "f.qzeros": ("I32", (2, 1), 4),
        "f.scales": ("F16", (2, 8), 2),
        "f.g_idx": ("I32", (64,), 4),
        "g.weight": ("U8", (256, 1), 1),
        "g.weight.absmax": ("F32", (8,), 4),
        "g.weight.quant_map": ("F32", (16,), 4),
        "g.weight.quant_state.bitsandbytes__nf4": ("U8", (len(NF4_STATE),), 1),
        "h.weight": ("F8_E4M3", (8, 64), 1),
        "h.weight_scale": ("F8_E8M0", (8, 2), 1),
        "h.input_scale": ("F32", (), 4),
        "i_blocks": ("U8", (2, 8, 2, 16), 1),
        "i_scales": ("U8", (2, 8, 2), 1),
    }
    header, data = dict[str, object](), b""
    for name, (dtype, shape, width) in shapes.items():
        n_bytes = math.prod(shape) * width
        content = NF4_STATE if "quant_state" in name else bytes(n_bytes)
        content = bytes([0, 0, 128, 63]) if name == "d.weight_scale_2" else content
        offsets = [len(data), len(data) + n_bytes]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        data += content
    return join_shard(encode_json(header), data)


NF4_STATE = b'{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [8, 64]}'


def make_encoded_config() -> bytes:
    """Return the config.json of the shard with source encodings."""
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    group = {"targets": ["Linear", "re:.*a"], "weights": weights}
    entry = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    return encode_json({"model_type": "x", "quantization_config": entry})


def read_encoded(folder: Path) -> object:
    """Read every tensor of a source with encodings."""
    from quantkit.checkpoint.checkpoint import Checkpoint

    source = Checkpoint.open(folder, decode=True)
    return source.read(source.specs)


@register_target(
    "encodings",
    "model.safetensors",
    lambda: (make_encoded_shard(),),
    mutate_shard,
    lambda: {"config.json": make_encoded_config()},
)
def fuzz_encodings(folder: Path) -> object:
    """Decode the weights of a shard with source encodings."""
    return read_encoded(folder)


@register_target(
    "quantization config",
    "config.json",
    lambda: (make_encoded_config(),),
    mutate_json,
    lambda: {"model.safetensors": make_encoded_shard()},
)
def fuzz_quantization_config(folder: Path) -> object:
    """Decode source encodings by a quantization_config."""
    return read_encoded(folder)


@register_target("model card", "README.md", lambda: (CARD.encode(),), mutate_yaml)
def fuzz_model_card(folder: Path) -> object:
    """Read the front matter of a source's model card."""
    from quantkit.artifact.front_matter import read_front_matter

    return read_front_matter(folder)


@register_target(
    "tokenizer",
    "tokenizer.json",
    lambda: (encode_json(TOKENIZER),),
    mutate_json,
    lambda: {
        "tokenizer_config.json": encode_json(TOKENIZER_CONFIG),
        "config.json": encode_json(LLAMA),
    },
)
def fuzz_tokenizer(folder: Path) -> object:
    """Load tokenizer.json and tokenize a text."""
    from quantkit.texts.corpora import load_tokenizer

    return load_tokenizer(folder)(["abba"], add_special_tokens=True, verbose=False)


@register_target(
    "tokenizer config",
    "tokenizer_config.json",
    lambda: (encode_json(TOKENIZER_CONFIG),),
    mutate_json,
    lambda: {"tokenizer.json": encode_json(TOKENIZER), "config.json": encode_json(LLAMA)},
)
def fuzz_tokenizer_config(folder: Path) -> object:
    """Load tokenizer_config.json and tokenize a text."""
    return fuzz_tokenizer(folder)


# -------------------------------------------------------------------------------------------- texts


@register_target(
    "calibration spec",
    "mine.yaml",
    lambda: (SPEC.format(sha256=hashlib.sha256(ROWS).hexdigest()).encode(),),
    mutate_yaml,
    lambda: {"mine.jsonl": ROWS},
)
def fuzz_calibration_spec(folder: Path) -> object:
    """Load the spec of a calibration or fidelity set."""
    from quantkit.texts.corpora import load_set

    return load_set(str(folder / "mine.yaml"), folder)


@register_target(
    "mixture spec",
    "mixed.yaml",
    lambda: (MIXTURE.encode(),),
    mutate_yaml,
    lambda: {
        "mine.jsonl": ROWS,
        "mine.yaml": SPEC.format(sha256=hashlib.sha256(ROWS).hexdigest()).encode(),
        "rows.jsonl": b'{"q": "one", "a": "two"}\n' * 3,
        "text.txt": b"one\n\ntwo",
    },
)
def fuzz_mixture_spec(folder: Path) -> object:
    """Load a mixture of files and another set."""
    from quantkit.texts.corpora import load_set

    return load_set(str(folder / "mixed.yaml"), folder)


@register_target(
    "mixture rows",
    "rows.jsonl",
    lambda: (b'{"q": "one", "a": "two"}\n' * 3,),
    mutate_lines,
)
def fuzz_mixture_rows(folder: Path) -> object:
    """Read the rows of a mixture's part."""
    from quantkit.texts.text_rows import RowReader, read_text_rows

    return read_text_rows(folder / "rows.jsonl", RowReader(template="{q} {a}"), 100)


@register_target("calibration rows", "mine.jsonl", lambda: (ROWS,), mutate_lines)
def fuzz_calibration_rows(folder: Path) -> object:
    """Load the rows of a set whose spec has the matching hash."""
    from quantkit.texts.corpora import load_set

    digest = hashlib.sha256((folder / "mine.jsonl").read_bytes()).hexdigest()
    (folder / "mine.yaml").write_text(SPEC.format(sha256=digest))
    return load_set(str(folder / "mine.yaml"), folder)


@register_target(
    "evaluation task",
    "mine.yaml",
    lambda: (TASK.encode(), FULL_TASK.encode(), PYTHON_TASK.encode()),
    mutate_yaml,
    lambda: {"mine.jsonl": b'{"question": "1"}\n' * 2, "helpers.py": PYTHON},
)
def fuzz_evaluation_task(folder: Path) -> object:
    """Load a task file and prepare its data for lm-eval."""
    from quantkit.evaluate.tasks import get_lm_eval_keys, load_tasks, open_task_data

    trusted = [hashlib.sha256(PYTHON).hexdigest()]
    tasks = load_tasks([str(folder / "mine.yaml")], folder, trusted=trusted)
    with open_task_data(tasks):
        return [get_lm_eval_keys(task) for task in tasks]


@cache
def start_template_worker() -> TemplateWorker:
    """Start the process that renders templates, which ends with this one; loops end after 1 s."""
    from quantkit.io import templates
    from quantkit.io.templates import TemplateWorker, WorkerLimits

    templates.RENDER_SECONDS = 1
    return TemplateWorker(WorkerLimits(total_seconds=None, total_characters=None))


@register_target(
    "template",
    "template.jinja",
    lambda: (TEMPLATE.replace(" {{ question.__class__ }}", "").encode(),),
    mutate_template,
)
def fuzz_template(folder: Path) -> object:
    """Render a template of a task."""
    from quantkit.evaluate.tasks import render_target

    text = (folder / "template.jinja").read_bytes().decode("utf-8", errors="replace")
    row = {"question": "1 + 1", "choices": ["a", "b"], "d": {"a": {"b": [1, None, 0.5]}}}
    return render_target(start_template_worker(), "mine: doc_to_text", text, row)


@register_target(
    "evaluation rows",
    "mine.jsonl",
    lambda: (b'{"question": "1 + 1", "answer": "2"}\n' * 3,),
    mutate_lines,
)
def fuzz_evaluation_rows(folder: Path) -> object:
    """Read the rows of a benchmark."""
    from quantkit.texts.task_files import read_first_rows, read_row_range

    read_row_range(folder / "mine.jsonl", 0, 2)
    return read_first_rows(folder / "mine.jsonl", (0, 3), 2)


# ---------------------------------------------------------------------------------------- artifacts


def make_report() -> dict[str, object]:
    """Return a report as builds write it: non-finite figures are null."""
    from support.report_example import FIDELITY

    from quantkit.artifact.fidelity_schema import Fidelity

    return Fidelity.model_validate(FIDELITY).model_dump(mode="json")


@cache
def make_artifact_files() -> dict[str, bytes]:
    """Return the files of a small artifact with its report."""
    gate = {"figure": "kl_mean", "bound": "<= 1", "value": 0.1, "ok": True, "reason": ""}
    fidelity = encode_json({**make_report(), "status": "accepted", "gates": [gate], "modules": []})
    plan = encode_json({
        "hash": "00",
        "recipe": {"version": 1, "gates": {"kl_mean": {"max": 1}}, "evaluation": {"tasks": []}},
        "summary": {"rules": [], "totals": {"tensors": 5}, "warnings": [], "shards": [{}]},
        "decisions": {"a": ["awq int4 g128", "rules[0]"]},
        "dropped": [],
    })
    files = {
        "model.safetensors": join_shard(encode_json(PLAIN), bytes(32)),
        "config.json": encode_json({"model_type": "mine"}),
        "quantkit/fidelity.json": fidelity,
        "quantkit/plan.json": plan,
    }
    return files | {"quantkit/manifest.json": make_manifest(files)}


def make_manifest(files: Mapping[str, bytes]) -> bytes:
    """Return a manifest that matches these files."""
    return encode_json({
        "schema_version": 1,
        "status": "accepted",
        "plan": "00",
        "unhashed": ["quantkit/timings.json"],
        "files": {
            name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
            for name, data in files.items()
        },
        "tensors": {
            name: [row["dtype"], row["shape"]] for name, row in PLAIN.items() if "dtype" in row
        },
        "quantization_config": None,
        "source": {"model": "x", "files": {"m": "00"}, "revision": None},
        "versions": {"torch": "1"},
        "environment": {"device": "cpu"},
        "modules": {},
        "blocks": {},
        "seeds": {},
    })


def reseal_artifact(folder: Path) -> None:
    """Update the manifest to match the files, as a forger would."""
    names = [name for name in make_artifact_files() if name != "quantkit/manifest.json"]
    (folder / "quantkit/manifest.json").write_bytes(
        make_manifest({name: (folder / name).read_bytes() for name in names})
    )


@register_target(
    "manifest",
    "quantkit/manifest.json",
    lambda: (make_artifact_files()["quantkit/manifest.json"],),
    mutate_json,
    lambda: make_artifact_files(),
)
def fuzz_manifest(folder: Path) -> object:
    """Read the manifest with verify and diff."""
    from quantkit.diff.sides import read_sides

    faults = call_checked(lambda: read_sides(str(folder), str(folder)))
    from quantkit.verify.shallow import verify_artifact

    verify_artifact(folder)
    return faults


@register_target(
    "plan.json",
    "quantkit/plan.json",
    lambda: (make_artifact_files()["quantkit/plan.json"],),
    mutate_json,
    lambda: make_artifact_files(),
)
def fuzz_plan_json(folder: Path) -> object:
    """Read plan.json, with a matching manifest, with diff and gate."""
    from quantkit.artifact.read_report import read_sealed_report
    from quantkit.cli.commands.gate import read_gates
    from quantkit.diff.compare import compare_sides
    from quantkit.diff.sides import read_sides

    reseal_artifact(folder)
    report, _ = read_sealed_report(folder)
    call_checked(lambda: read_gates(None, folder, report))
    return compare_sides(*read_sides(str(folder), str(folder)), partial=True)


@register_target(
    "fidelity.json",
    "quantkit/fidelity.json",
    lambda: make_reports(),
    mutate_json,
    lambda: make_artifact_files(),
)
def fuzz_fidelity_json(folder: Path) -> object:
    """Read fidelity.json with report, runs and gate."""
    from quantkit.artifact.read_report import read_report
    from quantkit.recipe.parse import parse_gates
    from quantkit.report import gates as judge

    verdicts = judge.apply_gates(
        parse_gates("gates: {kl_mean: {max: 1}, size: {max: 1}}", "g", []), read_report(folder)
    )
    check_rendering(verdicts)
    return verdicts


@cache
def make_reports() -> tuple[bytes, ...]:
    """Return reports with and without modules."""
    return encode_json(make_report()), make_artifact_files()["quantkit/fidelity.json"]


def check_rendering(report: object) -> None:
    """Check that `quantkit report` prints no control characters."""
    import io

    from rich.console import Console

    from quantkit.cli.rich_output import EscapedRenderable
    from quantkit.report.terminal import render_report

    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    Console(file=out, width=100).print(EscapedRenderable(render_report(report)))  # type: ignore[arg-type]
    out.flush()
    raw: bytes = out.buffer.getvalue()  # type: ignore[attr-defined]
    assert not any(character < 32 and character != 10 for character in raw), (
        "expected no control characters in the output"
    )


# ------------------------------------------------------------------------------------------- resume


@cache
def make_journal() -> tuple[bytes, ...]:
    """Return a journal of three entries."""
    from quantkit.io.journal import _format_line

    inputs = {"source": {"files": {"m": "0" * 64}, "other files": "0"}, "recipe": {"version": 1}}
    first, digest = _format_line("", {"kind": "began", "stamps": {"m": [1, 2]}, "of": inputs})
    step = {"loop": 0, "record": None, "states": {"calibration": "x"}, "stored": []}
    second, digest = _format_line(digest, {"kind": "step", "step": step})
    third, _ = _format_line(digest, {"kind": "ready", "loop": 0, "manifests": {"awq": "0" * 64}})
    return (first + second + third,)


@register_target("journal", "journal.jsonl", lambda: make_journal(), mutate_lines)
def fuzz_journal(folder: Path) -> object:
    """Open the journal of an interrupted build."""
    from quantkit.io.journal import Journal

    return Journal.open(folder / "journal.jsonl")


@cache
def make_entries() -> tuple[bytes, ...]:
    """Return the entries of a build's journal, without their hashes."""
    source = {"revision": None, "files": {"m": "0" * 64}, "other files": "0"}
    state = {"tensors": ["a"], "files": {"m": {"sha256": "0" * 64, "n_bytes": 3}}}
    states = {"calibration": "c-1"}
    step = {"loop": 0, "record": None, "states": states, "stored": [state]}
    wave = {
        "loop": 0,
        "steps": 1,
        "searched": 2,
        "quantized": 2,
        "states": states,
        "sums": None,
        "modules": [],
        "stored": [state],
    }
    entries: list[dict[str, object]] = [
        {"kind": "began", "owner": "0" * 32, "stamps": {"m": [1, 2]}, "of": {"source": source}},
        {"kind": "step", "step": step},
        {"kind": "wave", "wave": wave},
        {"kind": "ready", "loop": 0, "manifests": {"awq": "0" * 64}},
        {"kind": "replaces", "format": "awq", "manifest": "link"},
    ]
    return (encode_json({"entries": entries}),)


@register_target("build journal", "entries.json", lambda: make_entries(), mutate_json)
def fuzz_build_journal(folder: Path) -> object:
    """Read the entries of a build's journal, whose hashes are right, and its owner."""
    from quantkit.build.journal_schema import open_build_journal
    from quantkit.build.progress_log import BuildProgress
    from quantkit.build.session import describe_change, flatten_json
    from quantkit.io.journal import _format_line, read_first_entry
    from quantkit.io.owned_dirs import parse_owner

    try:
        values = json.loads((folder / "entries.json").read_bytes())
        entries = values["entries"]
        digest, lines = "", b""
        for entry in entries:
            line, digest = _format_line(digest, entry)
            lines += line
    except (ValueError, TypeError, KeyError, RecursionError):
        return None  # not what this target writes
    path = folder / "journal.jsonl"
    path.unlink(missing_ok=True)
    path.write_bytes(lines)
    owner = parse_owner(read_first_entry(path))
    journal = open_build_journal(path)
    if journal is None:
        return None
    progress = BuildProgress.read(journal, 0)
    _ = (
        progress.files,
        progress.blocks,
        progress.wave,
        progress.get_written_state(0) if progress.steps else 0,
    )
    changed = flatten_json(journal.entries[0]["of"])
    return owner, [describe_change(value, None) for value in changed.values()]


@register_target(
    "owner marker", ".quantkit-owner", lambda: (b'{"owner": "' + b"0" * 32 + b'"}',), mutate_json
)
def fuzz_owner_marker(folder: Path) -> object:
    """Read the marker of a folder, and check the folder."""
    from quantkit.io.owned_dirs import check_owned_dir, read_marker

    owner = read_marker(folder)
    assert owner is None or len(owner) == 32
    return check_owned_dir(folder, owner or "0" * 32, "move it away") if owner else None


@register_target(
    "oci login",
    "answer",
    lambda: (
        b'Bearer realm="https://auth.example.com/token",service="s",scope="repository:a:pull"\n'
        b'{"token": "abc", "access_token": "abc", "expires_in": 300}',
    ),
    mutate_lines,
)
def fuzz_oci_login(folder: Path) -> object:
    """Read a registry's challenge and the answer of its login: the host is one of its domain, and
    the token adds no header.
    """
    from urllib.parse import urlsplit

    from quantkit.publish.oci_auth import check_realm, parse_challenge, parse_token

    header, _, body = (folder / "answer").read_bytes().partition(b"\n")
    _, challenge = parse_challenge(header.decode("latin-1"))
    realm = check_realm(challenge.get("realm", ""), "registry.example.com", "https", "oci://x")
    host = urlsplit(realm).hostname or ""
    assert host == "example.com" or host.endswith(".example.com"), realm
    token = parse_token(body, "oci://x")
    assert token.isascii() and token.isprintable() and " " not in token
    return token


@register_target(
    "auto_map",
    "config.json",
    lambda: (encode_json({"auto_map": {"AutoConfig": "own.Own", "AutoModel": [None, "b.B"]}}),),
    mutate_json,
    lambda: {"own.py": b"from .b import x\nimport .c\n", "b.py": b"", "usercustomize.py": b""},
)
def fuzz_auto_map(folder: Path) -> object:
    """List the code that an artifact carries over."""
    from quantkit.checkpoint.remote_code import list_code_files

    names = list_code_files(folder)
    assert set(names) <= {"own.py", "b.py"}, names
    return names


@register_target("answers", "answers.sqlite", lambda: make_answers_file(), mutate_bytes)
def fuzz_answers(folder: Path) -> object:
    """Open, read and extend the answers of an interrupted evaluation."""
    from quantkit.evaluate.answer_store import AnswerKey, open_answer_store

    for left in folder.glob("answers.sqlite-*"):
        left.unlink()
    question = AnswerKey("task", "doc", "prompt", "settings", "model", 0)
    with open_answer_store(folder / "answers.sqlite") as store:
        stored = store.get(question), len(store)
        store.put([(question, ["x"])])
        return stored


@cache
def make_answers_file() -> tuple[bytes, ...]:
    """Return an answer store written by quantkit."""
    import tempfile

    from quantkit.evaluate.answer_store import AnswerKey, open_answer_store

    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "answers.sqlite"
        with open_answer_store(path) as store:
            store.put([
                (AnswerKey("task", "doc", "prompt", "settings", "model", turn), ["yes", 1])
                for turn in range(3)
            ])
        return (path.read_bytes(),)


@register_target(
    "samples", "quantkit/samples/tokens.parquet", lambda: make_samples_file(), mutate_bytes
)
def fuzz_samples(folder: Path) -> object:
    """Read the Parquet samples of an artifact."""
    from quantkit.diff.sides import read_tokens
    from quantkit.report.samples import read_samples

    read_samples(folder, {})
    return read_tokens(folder / "quantkit/samples/tokens.parquet")


@cache
def make_samples_file() -> tuple[bytes, ...]:
    """Return tokens.parquet with three tokens."""
    import io

    import pyarrow as arrow
    import pyarrow.parquet as parquet

    floats = arrow.array([0.1, 0.2, 0.3])
    table = arrow.table({
        "domain": ["math"] * 3,
        "kl": floats,
        "nll_source": floats,
        "nll_artifact": floats,
        "same_top": [True] * 3,
    })
    buffer = io.BytesIO()
    parquet.write_table(table, buffer)
    return (buffer.getvalue(),)


@register_target(
    "lock",
    "x.lock",
    lambda: (b'{"host": "a", "pid": 1, "ticks": 2, "since": "now"}',),
    mutate_json,
)
def fuzz_lock(folder: Path) -> object:
    """Read a lock file, first held by a running process, then left by an ended one."""
    import fcntl
    import os

    from quantkit.io import lock

    holder = os.open(folder / "x.lock", os.O_RDWR)
    try:
        fcntl.flock(holder, fcntl.LOCK_EX)

        def lock_again() -> None:
            with lock.hold_lock(folder / "x.lock", seconds=0):
                raise AssertionError("expected one holder of the lock, found two")

        call_checked(lock_again)
    finally:
        os.close(holder)
    with lock.hold_lock(folder / "x.lock"):
        return None


# ----------------------------------------------------------------------------------------- requests

BODIES = (
    b'{"model": "m", "prompt": ["a", "b"], "stream": true, "n": 2, "priority": 3}',
    b'{"prompt": [1, 2, 3], "x": {"y": [{"z": 1.5e3}, null, "\\u00e9\\n"]}, "max_tokens": 5}',
)
HEADS = (
    b"POST /v1/completions HTTP/1.1\r\nhost: a\r\nx-priority: 3\r\ncontent-length: 2\r\n\r\n{}"
    b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"
    b"2;x=y\r\n{}\r\n0\r\nx-trailer: z\r\n\r\n",
)


@register_target("request body", "body.json", lambda: BODIES, mutate_json)
def fuzz_request_body(folder: Path) -> object:
    """Validate a request's body; accepted bodies equal those of a strict parser."""
    from quantkit.serve.gateway.api_keys import ANONYMOUS
    from quantkit.serve.gateway.bodies import ByteBudget, HeldBytes
    from quantkit.serve.gateway.errors import RequestRejected
    from quantkit.serve.gateway.json_scan import InvalidJson, scan_object
    from quantkit.serve.gateway.request import _NAMES, parse_request
    from quantkit.serve.gateway.settings import Limits, Upstream

    held = HeldBytes(ByteBudget(1 << 30))
    held.content = (folder / "body.json").read_bytes()
    try:
        scanned = scan_object(held.content, _NAMES)
        request = parse_request("/completions", held, scanned, {}, ANONYMOUS, Limits())
    except (InvalidJson, RequestRejected) as fault:
        raise errors.QuantkitError(str(fault)) from None
    values = json.loads(held.content)
    sent = request.body_for(Upstream(name="a", url="http://a", model="other", priorities=True))
    changed = json.loads(b"".join(sent))
    assert changed.pop("model") == "other" and changed.pop("priority", 0) == request.priority
    assert changed == {key: one for key, one in values.items() if key not in ("model", "priority")}
    return request.turns


@register_target("request head", "head.txt", lambda: HEADS, mutate_lines)
def fuzz_request_head(folder: Path) -> object:
    """Feed a connection's bytes to the guard in pieces; its memory stays within its bounds."""
    from quantkit.serve.gateway import connections

    data = (folder / "head.txt").read_bytes()
    table, limit = make_fuzz_table(), 1024
    guard = table.make_protocol(make_server_config(), make_server_state(), {}, FakeLoop())
    transport = FakeTransport()
    guard.connection_made(transport)
    rng = random.Random(len(data))
    while data and not transport.closed:
        size = rng.choice((1, 7, 100, 5000))
        guard.data_received(data[:size])
        data = data[size:]
        inner = guard._inner
        assert len(inner.pipeline) <= connections.MAX_PIPELINED
        headers = getattr(inner, "headers", None) or []
        held = sum(len(name) + len(value) for name, value in headers) + len(
            getattr(inner, "url", b"")
        )
        assert held <= 2 * limit and len(headers) <= connections.MAX_HEADERS
    guard.expire(0.0)
    is_refused = transport.closed
    guard.connection_lost(None)
    assert not table.guards and not table._counts and not table._idle
    if is_refused:
        raise errors.QuantkitError(transport.written.decode("latin-1")[:20].strip() or "closed")
    return None


class FakeTransport:
    """A transport without a socket."""

    def __init__(self) -> None:
        self.written, self.closed = b"", False

    def get_extra_info(self, name: str) -> object:
        return ("127.0.0.1", 1) if name in ("peername", "sockname") else None

    def write(self, data: bytes) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    abort = close

    def pause_reading(self) -> None:
        """Do nothing: the next piece comes anyway."""

    resume_reading = pause_reading


class FakeLoop:
    """A loop that runs no task: no response is ever sent."""

    def create_task(self, work: object) -> FakeLoop:
        work.close()  # type: ignore[attr-defined]
        return self

    def add_done_callback(self, _: object) -> None:
        """Never done."""


@cache
def make_server_config() -> object:
    """Return a loaded configuration of uvicorn."""
    import uvicorn

    config = uvicorn.Config(lambda: None, log_level="critical", lifespan="off", ws="none")
    config.load()
    return config


def make_server_state() -> object:
    """Return the state of a server without connections."""
    from uvicorn.server import ServerState

    return ServerState()


def make_fuzz_table() -> Any:
    """Return a table of connections without timers."""
    from quantkit.serve.gateway.connections import ConnectionTable
    from quantkit.serve.gateway.settings import Limits

    table = ConnectionTable(Limits(header_bytes=1024), clock=lambda: 0.0)
    table._is_sweeping = True
    return table


# ------------------------------------------------------------------------------------------ running


def call_checked(action: Callable[[], object]) -> str | None:
    """Return quantkit's checked error message for a rejected input, None for an accepted one."""
    try:
        action()
    except errors.QuantkitError as error:
        check_message(str(error))
        return str(error)
    return None


def check_message(message: str) -> None:
    """Check an error message as the command line prints it: not empty, printable, of limited
    length.
    """
    from quantkit.cli.console import format_message

    message = format_message(message)
    assert message.strip(), "expected an error message, found an empty one"
    message.encode()
    lines = message.split("\n")
    assert len(lines) <= MESSAGE_LINES, (
        f"expected at most {MESSAGE_LINES} lines, found {len(lines)}"
    )
    unprintable = [line for line in lines if not line.isprintable()]
    assert not unprintable, f"not printable: {unprintable[0]!r:.200}"


def prepare_folder(target: Target, folder: Path) -> None:
    """Write the companion files of a target."""
    for name, data in {**target.make_companions(), target.file: b""}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def run_target(target: Target, folder: Path, data: bytes) -> str | None:
    """Run one input. Return quantkit's message if it is rejected, None if accepted."""
    (folder / target.file).unlink(
        missing_ok=True
    )  # a new inode, so that open handles keep the old file
    (folder / target.file).write_bytes(data)
    return call_checked(lambda: target.read(folder))
