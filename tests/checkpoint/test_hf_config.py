"""config.json is read as transformers' config classes read it."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import pytest
from support.checkpoints import make_tiny_config
from support.wrappers import make_wrapper_config
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from quantkit import registry
from quantkit.checkpoint import hf_config, source_config
from quantkit.checkpoint.checkpoint import read_config
from quantkit.contracts import Config
from quantkit.errors import CheckpointError
from quantkit.io.files import write_json


def test_key_under_another_name_is_found() -> None:
    """transformers 5 saves num_experts of qwen3_moe as num_local_experts."""
    values = dict(make_tiny_config("qwen3_moe"))
    layout = registry.get_architecture("qwen3_moe").layout(Config(values=values))
    values["num_local_experts"] = values.pop("num_experts")
    config = source_config.make_source_config(values, "config.json")
    assert registry.get_architecture("qwen3_moe").layout(config) == layout


def test_default_of_the_class_is_no_size_of_the_model() -> None:
    config = source_config.make_source_config({"model_type": "mixtral"}, "config.json")
    with pytest.raises(CheckpointError, match="num_hidden_layers: expected an integer"):
        config.integer("num_hidden_layers")


def test_key_of_the_text_model_in_a_wrapper_is_found() -> None:
    values = make_wrapper_config("llava").values
    assert source_config.make_source_config(values, "config.json").integer("hidden_size") == 64


def test_unknown_type_has_no_defaults() -> None:
    config = source_config.make_source_config({"model_type": "nonsense"}, "config.json")
    with pytest.raises(CheckpointError, match="hidden_size: expected an integer .* found nothing"):
        config.integer("hidden_size")


def test_text_model_of_a_wrapper_is_read() -> None:
    config = make_wrapper_config("qwen2_5_vl", dtype="float16")
    text = source_config.read_text_config(config)
    assert text.integer("max_position_embeddings") == 256
    assert text.integer("hidden_size") == 64
    assert hf_config.read_dtype(config) == "float16"


def test_flat_configuration_of_a_wrapper_is_read() -> None:
    """Qwen2-VL was published with the keys of its text model at the top."""
    values = {"model_type": "qwen2_vl", "hidden_size": 64, "num_hidden_layers": 2}
    text = source_config.read_text_config(Config(values={**values, "vision_config": {}}))
    assert (text.integer("hidden_size"), text.integer("num_hidden_layers")) == (64, 2)


@pytest.mark.parametrize("infinite", [math.inf, {"__float__": "Infinity"}])
def test_infinite_numbers_are_read(infinite: object, tmp_path: Path) -> None:
    values = {"model_type": "falcon_h1", "time_step_limit": [0.0, infinite]}
    write_json(tmp_path / "config.json", values, infinite=True)
    assert hf_config.make_hf_config(read_config(tmp_path)).time_step_limit[1] == math.inf


def test_warnings_of_transformers_do_not_show(caplog: pytest.LogCaptureFixture) -> None:
    rope = {"type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16}
    values = {"model_type": "phi3", "rope_scaling": rope, "torch_dtype": "bfloat16"}
    values |= {"hidden_size": 128, "num_attention_heads": 4}
    values |= {"original_max_position_embeddings": 64, "pad_token_id": 0}
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        hf_config.make_hf_config(Config(values=values))
    assert not shown and not caplog.records


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_labels", "max_window_layers"])
def test_absurd_numbers_are_refused_at_once(key: str) -> None:
    config = Config(values={"model_type": "qwen2", key: 2**31 - 1})
    with pytest.raises(CheckpointError, match=f"{key}: expected at most"):
        hf_config.make_hf_config(config)


def test_absurd_numbers_are_found_in_nested_configurations() -> None:
    text = {"model_type": "llama", "num_hidden_layers": 10**9}
    config = Config(values={"model_type": "llava", "text_config": text})
    with pytest.raises(CheckpointError, match="text_config.num_hidden_layers: expected at most"):
        hf_config.make_hf_config(config)


@pytest.mark.parametrize("model_type", registry.list_names("architectures"))
def test_optional_keys_of_tables_have_one_name(model_type: str) -> None:
    """A key with a default is read from config.json alone, not under another name."""
    asked = dict[str, object]()

    class Recorder(dict[str, object]):
        def get(self, key: str, default: object = None) -> object:
            asked.setdefault(key, super().get(key))
            return super().get(key, default)

    values = Recorder(make_tiny_config(model_type))
    registry.get_architecture(model_type).layout(Config(values=values))
    names = CONFIG_MAPPING[model_type].attribute_map
    absent = [key for key, value in asked.items() if value is None]
    assert not {*absent} & {*names, *names.values()}
