"""Wrappers: the text model inside is located under each form of its names; the rest is left out."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache

import pytest
import torch
from support.wrappers import make_wrapper_config
from transformers.core_model_loading import revert_weight_conversion

from quantkit.checkpoint import hf_config
from quantkit.contracts import Architecture
from quantkit.errors import CheckpointError
from quantkit.models import derive, text_part
from quantkit.models.layers import MetaModel, make_meta_model
from quantkit.models.outer_model import find_layers


@cache
def make_meta(model_type: str) -> MetaModel:
    """Return the wrapper's model without its parts."""
    return make_meta_model(make_wrapper_config(model_type), torch.device("cpu"), torch.float32)


def list_names(model_type: str, form: str = "saved") -> list[str]:
    """Return names of a checkpoint: as transformers 5 saves it, or as its modules are called."""
    meta = make_meta(model_type)
    whole = text_part.put_parts_back(meta.model, meta.left_out)
    state = dict(whole.state_dict())
    names = list(revert_weight_conversion(whole, state) if form == "saved" else state)
    is_tied = whole.config.tie_word_embeddings
    return [name for name in names if not (is_tied and name.endswith("lm_head.weight"))]


def derive_named(model_type: str, names: Collection[str]) -> Architecture:
    """Derive the architecture of a checkpoint with these tensors."""
    return derive.derive_architecture(make_wrapper_config(model_type), names)


def test_text_list_is_found_next_to_one_of_the_same_length() -> None:
    meta = make_meta("llava")
    whole = text_part.put_parts_back(meta.model, meta.left_out)
    assert find_layers(whole)[0] == "model.language_model.layers"
    assert {*meta.left_out} == {"model.vision_tower", "model.multi_modal_projector"}
    assert not any("vision" in name for name in meta.model.state_dict())


@pytest.mark.parametrize(
    ("model_type", "form", "block", "parts"),
    [
        (
            "llava",
            "saved",
            "language_model.model.layers.0",
            ["model.multi_modal_projector", "model.vision_tower"],
        ),
        (
            "gemma3",
            "modules",
            "model.language_model.layers.0",
            ["model.multi_modal_projector", "model.vision_tower"],
        ),
        ("qwen2_5_vl", "saved", "model.layers.0", ["model.visual"]),
        ("qwen2_5_vl", "modules", "model.language_model.layers.0", ["model.visual"]),
    ],
)
def test_every_tensor_belongs_to_the_text_or_to_a_part(
    model_type: str, form: str, block: str, parts: list[str]
) -> None:
    names = list_names(model_type, form)
    architecture = derive_named(model_type, names)
    layout = architecture.layout(make_wrapper_config(model_type))
    assert layout.blocks[0].name == block
    assert layout.blocks[0].path == "model.language_model.layers.0"
    assert sorted(part.name for part in layout.parts) == parts
    copied = [name for part in layout.parts for name in part.tensors]
    assert sorted([*copied, *(derive.list_tensors(layout) & {*names})]) == sorted(names)
    assert architecture.classes == hf_config.list_model_classes(model_type)


def test_packed_tensors_say_where_the_text_lies() -> None:
    names = [
        name if "visual" in name else name.replace("_proj.weight", "_proj.weight_packed")
        for name in list_names("qwen2_5_vl", "modules")
    ]
    layout = derive_named("qwen2_5_vl", names).layout(make_wrapper_config("qwen2_5_vl"))
    assert layout.blocks[1].name == "model.language_model.layers.1"
    assert layout.blocks[1].linears[0].name.startswith("model.language_model.layers.1.")


def test_tensors_that_transformers_does_not_load_are_a_part() -> None:
    names = [*list_names("qwen3_5"), "mtp.layers.0.mlp.up_proj.weight", "mtp.norm.weight"]
    layout = derive_named("qwen3_5", names).layout(make_wrapper_config("qwen3_5"))
    (mtp,) = [part for part in layout.parts if part.name == "mtp"]
    assert mtp.tensors == ("mtp.layers.0.mlp.up_proj.weight", "mtp.norm.weight")


def test_part_without_some_of_its_tensors_is_refused() -> None:
    names = [x for x in list_names("llava") if "vision_tower" not in x or "layers.1" not in x]
    with pytest.raises(CheckpointError, match="vision_tower: expected the tensors of"):
        derive_named("llava", names)


def test_part_cannot_be_called() -> None:
    meta = make_meta("llava")
    with pytest.raises(NotImplementedError, match="text does not run through it"):
        meta.model.get_submodule("model.vision_tower")(None)


def test_text_model_alone_has_no_parts() -> None:
    config = make_wrapper_config("qwen3_5", architectures=["Qwen3_5ForCausalLM"])
    meta = make_meta_model(config, torch.device("cpu"), torch.float32)
    assert type(meta.model).__name__ == "Qwen3_5ForCausalLM" and not meta.left_out


def test_arguments_that_depend_on_learned_tables() -> None:
    """Mistral Large 4 learns a factor of its rotary tables: they are recorded with it."""
    names = list_names("mistral_large4")
    layout = derive.derive_layout(make_wrapper_config("mistral_large4"), names)
    assert [name.rpartition(".")[2] for name in layout.tables] == ["alpha"]
    assert layout.tables[0] in names and layout.state_width == 0
    assert [bool(block.experts) for block in layout.blocks] == [False, True]
