"""Rules of file names in a model's folder, on names made of the parts that engines look for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatch
from random import Random

from quantkit.artifact.layout import MANIFEST, find_layout_faults
from quantkit.checkpoint.file_names import INDEX, SINGLE, format_shard_name
from quantkit.checkpoint.folder_rules import find_weight_set_faults, is_sidecar, is_weight_file
from quantkit.io.path_safety import find_name_faults

PARTS = (
    *("model", "pytorch_model", "consolidated", "adapter_model", "adapter_config", "tokenizer"),
    *("vocab", "merges", "config", "params", "LICENSE", "NOTICE", "chat_template", "mtp"),
    *("hf_quant_config", "quantize_config", "quant_config", "modules", "generation_config"),
    *("preprocessor_config", "model-00001-of-00002", "special_tokens_map", "processor_config"),
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".json", ".index.json", ".model"),
    *(".gguf", ".h5", ".msgpack", ".onnx", ".npz", ".py", ".pyc", ".txt", ".jinja", ".tiktoken"),
    *("_", "-", ".", "/", "..", "\\", " ", "\u200b", "\u202e", "\u3164", "\n", "\0", "0", "é"),
    *("additional_chat_templates/", "quantkit/", "1_Pooling/", "fp16/", "A", "x"),
)
READ_BY_ENGINES = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.onnx", "*.h5", "*.pkl"),
    *("*.msgpack", "*.npz", "*.index.json", "*quant_config.json", "*quantize_config.json"),
    *("adapter_config.json", "params.json", "*/modules.json", "config.json", "*/config.json"),
    *("*/params.json", "*/adapter_config.json", "model_index.json", "quantkit*", "recipe.yaml"),
)
"""Patterns by which an engine takes a file for weights, a quantization or another model."""


def iterate_names(count: int) -> Iterator[str]:
    """Yield names made of these parts, half of them in another letter case."""
    random = Random(0)
    for _ in range(count):
        name = "".join(random.choices(PARTS, k=random.randint(1, 4)))
        yield name if random.random() < 0.5 else random.choice((name.upper(), name.title()))


def test_no_name_that_engines_read_is_carried_over() -> None:
    accepted = [name for name in iterate_names(100_000) if is_sidecar(name)]
    assert len(set(accepted)) > 100
    for name in set(accepted):
        assert name.isascii() and name.isprintable() and " " not in name
        if not re.fullmatch(r"\d_Pooling/config\.json", name, re.IGNORECASE):  # of its own module
            read = [x for x in READ_BY_ENGINES if fnmatch(name.casefold(), x)]
            assert not read, name
        assert "/" not in name or not name.casefold().endswith((".py", ".pyc"))
        assert not is_weight_file(name)


def test_layout_accepts_only_safe_names() -> None:
    """Every name that the layout accepts is also a name that pull and publish accept."""
    for name in iterate_names(20_000):
        if not list(find_layout_faults([name, MANIFEST, SINGLE])):
            assert not list(find_name_faults([name]))


def test_one_set_of_weights_is_a_single_file_or_all_shards() -> None:
    shards = [format_shard_name(number, 3) for number in (1, 2, 3)]
    for good in ([SINGLE], [INDEX, *shards], [INDEX, format_shard_name(1, 1)]):
        assert list(find_weight_set_faults(good)) == []
    for bad in (
        [SINGLE, INDEX],
        [SINGLE, INDEX, *shards],
        [SINGLE, shards[0]],
        [INDEX],
        [INDEX, *shards[:2]],
        [INDEX, *shards, format_shard_name(1, 2)],
        [INDEX, format_shard_name(0, 1)],
        [INDEX, *shards[:2], format_shard_name(4, 3)],
    ):
        assert len(list(find_weight_set_faults(bad))) == 1, bad
