"""Names of modules in a wrapper: engines find the text quantized, all other parts plain."""

from __future__ import annotations

import pytest

from quantkit import registry
from quantkit.contracts import Contents, Scheme
from quantkit.errors import UsageError
from quantkit.formats.common import wrapper_names

ROOTS = ("language_model.model", "model.language_model", "model")
"""Where checkpoints have the text model; transformers has it in one of them, engines in the first.
"""
PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj")
TOWER = [f"encoder.layers.{n}.{name}" for n in range(2) for name in PROJECTIONS]
"""Linears of the image encoder, with the names of the text's."""
FORMATS = ("compressed_tensors", "awq", "gptq", "bitsandbytes")


def make_scheme(format_name: str) -> Scheme:
    """Return a scheme that a format stores."""
    nf4 = format_name == "bitsandbytes"
    return Scheme(
        bits=4,
        group_size=64 if nf4 else 128,
        symmetric=format_name != "awq",
        scale_dtype="float32" if nf4 else "bfloat16",
        kind="nf4" if nf4 else "int",
        source_dtype="bfloat16" if nf4 else None,
    )


def make_contents(format_name: str, root: str, kept: str = "layers.1.mlp.down_proj") -> Contents:
    """Return the contents of a wrapper with two layers, of which one linear is kept."""
    text = [f"layers.{n}.{name}" for n in range(2) for name in (*PROJECTIONS, "mlp.down_proj")]
    schemes = {f"{root}.{x}": make_scheme(format_name) for x in text if x != kept}
    return Contents(
        schemes=schemes,
        kept=[f"{root}.embed_tokens", f"{root}.{kept}", "lm_head"],
        parts={
            "model.vision_tower": [f"vision_tower.{name}" for name in TOWER],
            # kimi_k25 is stored with both prefixes
            "model.multi_modal_projector": [
                "multi_modal_projector.linear_1",
                "model.multi_modal_projector.norm",
            ],
            "mtp": ["mtp.layers.0.mlp.up_proj"],
        },
        text_prefixes=(root, "model.language_model"),
    )


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("root", ROOTS)
def test_engines_find_text_quantized_and_other_parts_plain(format_name: str, root: str) -> None:
    contents = make_contents(format_name, root)
    entry = registry.get_format(format_name).quantization_config(contents)
    assert entry is not None
    parts = [name for modules in contents.parts.values() for name in modules]
    others = ["vision_tower.encoder.layers.0.self_attn.qkv_proj", *parts, "lm_head"]
    for loader in registry.get_checks(format_name).loaders:
        treatment = loader.classify(entry)
        in_transformers = "transformers" in loader.engines
        for form in (root, "model.language_model" if in_transformers else ROOTS[0]):
            for name in contents.schemes:
                assert treatment(form + name.removeprefix(root)) != "plain", (loader.engines, name)
            assert treatment(f"{form}.layers.1.mlp.down_proj") == "plain"
        for name in others:
            for prefix in ("", "model."):
                assert treatment(prefix + name) == "plain", (loader.engines, prefix, name)


def test_part_is_named_by_its_path_where_a_quantized_module_has_its_name() -> None:
    contents = Contents(
        schemes={"model.text.mlp.up_proj": make_scheme("gptq")},
        kept=[],
        parts={"model.vision.mlp": ["vision.mlp.fc1"]},
        text_prefixes=("model.text",),
    )
    assert wrapper_names.list_part_names(contents) == ["vision", "model.vision.mlp"]


def test_part_inside_a_quantized_module_is_refused() -> None:
    contents = Contents(
        schemes={"model.text.layers.0.mlp": make_scheme("gptq")},
        kept=[],
        parts={"layers.0": ["layers.0.mlp"]},
        text_prefixes=("model.text",),
    )
    with pytest.raises(UsageError, match="keep that module"):
        wrapper_names.list_part_names(contents)


def test_skipped_layer_is_named_by_its_number() -> None:
    contents = Contents(
        schemes={"model.layers.0.mlp.up_proj": make_scheme("gptq")},
        kept=[],
        parts={"model.layers.1": ["model.layers.1.mlp.up_proj", "model.layers.1.eh_proj"]},
        text_prefixes=("model",),
    )
    assert wrapper_names.list_part_patterns(contents) == [r"(.*\.)?layers\.1(\..*)?$"]


def test_language_model_has_no_prefixes() -> None:
    contents = Contents(schemes={"model.layers.0.mlp.up_proj": make_scheme("gptq")}, kept=[])
    assert wrapper_names.make_relative(contents) is contents
    assert wrapper_names.get_prefix(contents) == ""
    assert wrapper_names.add_prefixes(["lm_head"], contents) == ["lm_head"]
