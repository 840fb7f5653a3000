"""Recipes: valid ones, their resolved values, and the message of every fault."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from quantkit.errors import RecipeError, UsageError
from quantkit.io.yaml_document import MAX_CHARACTERS, parse_scalar
from quantkit.recipe import patterns
from quantkit.recipe.parse import apply_overrides, expand_preset, parse_recipe
from quantkit.recipe.patterns import PRESETS, matches_module, names_module
from quantkit.recipe.quantize import Quantize
from quantkit.recipe.schema import Recipe, list_keys
from quantkit.recipe.value_types import parse_size

RECIPES = Path(__file__).parents[2] / "recipes"
SMALLEST = """\
version: 1
source: {model: builtin:tiny-v3}
fidelity: {set: tiny-v3-heldout}
output: {path: artifacts/x}
"""


def faults(text: str, overrides: dict[str, str] | None = None) -> tuple[str, ...]:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "x.yaml", overrides or {})
    return caught.value.faults


# -------------------------------------------------------------------------------------- what parses


def test_smallest_recipe_has_every_default() -> None:
    recipe = parse_recipe(SMALLEST, "x.yaml")
    assert recipe.dump() == {
        "version": 1,
        "source": {"model": "builtin:tiny-v3", "revision": None, "trust_remote_code": None},
        "quantize": {
            "method": "awq",
            "rounding": "gptq",
            "bits": 4,
            "group_size": 128,
            "symmetric": False,
            "scale_dtype": "auto",
            "double_quant": None,
        },
        "format": ["awq"],
        "rules": None,
        "calibration": None,
        "fidelity": {"set": "tiny-v3-heldout", "windows": None, "length": 2048},
        "evaluation": {
            "tasks": [],
            "limit": None,
            "likelihood": 64,
            "backend": "transformers",
            "batch_size": 128,
        },
        "gates": {},
        "output": {"path": "artifacts/x", "shard_bytes": 5_000_000_000},
        "memory": None,
        "mtp": "keep",
        "propagate": "auto",
        "compute": {"device": "auto", "dtype": "auto", "calibration": "auto"},
    }
    assert json.loads(json.dumps(recipe.dump())) == recipe.dump()
    assert recipe.name == "x.yaml"


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_recipes_parse(path: Path) -> None:
    recipe = parse_recipe(path.read_text(), path.name)
    assert recipe.output.path == f"artifacts/{path.stem}"


def test_flagship_has_the_promised_settings() -> None:
    recipe = parse_recipe((RECIPES / "v3-awq4.yaml").read_text(), "v3-awq4.yaml")
    assert recipe.source.model == "deepseek-ai/DeepSeek-V3"
    assert recipe.quantize == Quantize(
        method="awq", rounding="gptq", bits=4, group_size=128, symmetric=False
    )
    assert recipe.rules is not None
    assert [(rule.match, rule.keep) for rule in recipe.rules] == [
        (pattern, None if action == "quantize" else "source")
        for pattern, action in PRESETS["experts-only"]
    ]
    assert recipe.calibration is not None and recipe.calibration.set == "auto"
    assert (recipe.fidelity.set, recipe.fidelity.windows, recipe.fidelity.length) == (
        "auto",
        32,
        2048,
    )
    assert recipe.evaluation.tasks == ("gsm8k", "humaneval", "mbpp")
    assert (recipe.memory, recipe.mtp) == (64 * 10**9, "keep")


def list_commented_keys(path: Path) -> set[str]:
    """Return the keys that a recipe explains: `key: value  # type, default: meaning`, a
    commented-out key included.
    """
    section, actual = "", set()
    for line in path.read_text().splitlines():
        key = re.fullmatch(r"(#? *)(- )?([a-z][a-z_0-9]*):(.*)", line)
        if key is None:
            continue
        top = not (key[1] or key[2])
        section = key[3] if top else section
        if "#" in key[4]:
            actual.add(key[3] if top else f"{section}.{key[3]}")
    return actual


def test_flagship_comments_every_key_of_the_schema() -> None:
    assert set(list_keys()) - list_commented_keys(RECIPES / "v3-awq4.yaml") == set()


def allowed_values() -> set[str]:
    """Return the lists of allowed values that the flagship's comments state, e.g.

    "auto | cpu | cuda".
    """
    text = (RECIPES / "v3-awq4.yaml").read_text()
    return {match[1] for match in re.finditer(r"# ([\w.-]+(?: \| [\w.-]+)+)", text)}


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.name)
def test_only_the_flagship_states_allowed_values(path: Path) -> None:
    """The other recipes comment their specifics, and refer to README.md for the keys."""
    values, text = allowed_values(), path.read_text()
    assert "auto | cpu | cuda" in values
    assert "README.md" in text
    if path.stem != "v3-awq4":
        assert not [allowed for allowed in values if allowed in text]


# -------------------------------------------------------------------------------------------- rules


def test_rule_changes_some_keys_of_the_default() -> None:
    recipe = parse_recipe(
        SMALLEST + "quantize: {group_size: 64, symmetric: true}\n"
        "rules:\n  - {match: '*.down_proj', quantize: {bits: 8}}\n  - {match: '*.self_attn.*', "
        "keep: bf16}\n"
        "  - {match: '*', quantize: default}\n",
        "x.yaml",
    )
    assert recipe.rules is not None
    first, second, third = recipe.rules
    assert first.quantize == Quantize(bits=8, group_size=64, symmetric=True)
    assert (second.quantize, second.keep) == (None, "bf16")
    assert third.quantize == recipe.quantize
    assert [rule.label for rule in recipe.rules] == ["rules[0]", "rules[1]", "rules[2]"]
    assert [rule.line for rule in recipe.rules] == [7, 8, 9]
    assert "line" not in recipe.rules[0].model_dump()


def test_values_of_a_method_may_be_omitted() -> None:
    nf4 = Quantize(method="nf4")
    assert (nf4.bits, nf4.group_size, nf4.symmetric, nf4.scale_dtype, nf4.double_quant) == (
        4,
        64,
        True,
        "auto",
        True,
    )
    assert Quantize(method="nf4", double_quant=False).double_quant is False
    assert Quantize(method="awq").double_quant is None
    recipe = parse_recipe(
        SMALLEST + "quantize: {method: nf4, double_quant: false}\n"
        "rules:\n  - {match: '*.q_proj', quantize: {method: rtn, bits: 3}}\n  - {match: '*', "
        "quantize: {}}\n",
        "x.yaml",
    )
    assert recipe.rules is not None
    assert [rule.quantize for rule in recipe.rules] == [
        Quantize(method="rtn", bits=3),
        recipe.quantize,
    ]
    other = parse_recipe(
        SMALLEST
        + "quantize: {group_size: 128, rounding: gptq}\nrules: [{match: '*', quantize: {method: "
        "nf4}}]\n",
        "x.yaml",
    )
    assert other.rules is not None and other.rules[0].quantize == nf4


@pytest.mark.parametrize(
    ("written", "output"),
    [
        (
            "{method: nf4, bits: 3, group_size: 128}",
            "method nf4 is rounding: nearest, bits: 4, group_size: 64, symmetric: true, "
            "scale_dtype: auto, found bits: 3, group_size: 128; leave that out, or choose another "
            "method",
        ),
        ("{method: nf4, rounding: gptq}", "found rounding: gptq; leave that out"),
        (
            "{method: nf4, double_quant: null}",
            "double_quant: method nf4 expects true or false, found nothing",
        ),
        (
            "{method: rtn, double_quant: true}",
            "double_quant is for method nf4, found method: rtn; leave it out",
        ),
    ],
)
def test_contradiction_of_nf4_is_one_fault(written: str, output: str) -> None:
    with pytest.raises(RecipeError) as refused:
        parse_recipe(SMALLEST + f"quantize: {written}\n", "x.yaml")
    assert len(refused.value.faults) == 1 and output in refused.value.faults[0]


def test_presets_work_alone_and_in_a_list() -> None:
    alone = parse_recipe(SMALLEST + "rules: experts-only\n", "x.yaml").rules
    assert alone is not None
    assert [rule.label for rule in alone] == ["experts-only[0]", "experts-only[1]"]
    assert [rule.optional for rule in alone] == [False, False]
    mixed = parse_recipe(
        SMALLEST
        + "rules:\n  - {match: '*.down_proj', keep: source}\n  - preset: attention-source\n",
        "x.yaml",
    ).rules
    assert mixed is not None
    assert [(rule.label, rule.line) for rule in mixed] == [
        ("rules[0]", 6),
        ("attention-source[0]", 7),
        ("attention-source[1]", 7),
    ]


@pytest.mark.parametrize("name", PRESETS)
def test_preset_chosen_by_an_architecture_is_optional(name: str) -> None:
    assert all(rule.optional and rule.line == 0 for rule in expand_preset(name, Quantize()))


def test_experts_only_selects_routed_experts_and_nothing_else() -> None:
    experts, rest = expand_preset("experts-only", Quantize())
    for module in (
        "model.layers.3.mlp.experts.17.gate_proj",
        "model.layers.0.block_sparse_moe.experts.0.w1",
    ):
        assert experts.matches(module)
    for module in (
        "model.layers.3.mlp.shared_experts.gate_proj",
        "model.layers.3.mlp.gate",
        "model.layers.0.mlp.gate_proj",
        "model.layers.3.self_attn.o_proj",
        "lm_head",
    ):
        assert not experts.matches(module) and rest.matches(module)


@pytest.mark.parametrize(
    ("pattern", "module", "matched", "named"),
    [
        ("*", "model.layers.3.mlp.gate", True, False),
        ("*.mlp.*", "model.layers.3.mlp.gate", True, False),
        ("*.mlp.gat?", "model.layers.3.mlp.gate", True, False),
        ("*.mlp.gate*", "model.layers.3.mlp.gate", True, False),
        ("*.mlp.gate", "model.layers.3.mlp.gate", True, True),
        ("*gate", "model.layers.3.mlp.gate", True, True),
        ("model.layers.3.mlp.gate", "model.layers.3.mlp.gate", True, True),
        ("*.mlp.gate", "model.layers.3.mlp.gate_proj", False, False),
        ("*.MLP.gate", "model.layers.3.mlp.gate", False, False),
        ("lm_head", "lm_head", True, True),
        ("*head", "lm_head", True, False),
        ("re:.*lm_head", "lm_head", True, True),
        ("re:.*", "lm_head", True, False),
        ("re:lm_hea.", "lm_head", True, False),
        ("re:lm_head", "model.lm_head", False, False),
        (r"re:.*\.mlp\.gate", "model.layers.3.mlp.gate", True, True),
        (r"re:.*\.mlp\.gate$", "model.layers.3.mlp.gate", True, True),
        (r"re:.*\bgate\b", "model.layers.3.mlp.gate", True, True),
        (r"re:.*\.(gate|up_proj)", "model.layers.3.mlp.gate", True, True),
        (r"re:.*\.gate(_proj)?", "model.layers.3.mlp.gate", True, False),
        (r"re:.*\.mlp\.gate.*", "model.layers.3.mlp.gate", True, False),
        (r"re:.*\.embed_tokens", "model.embed_tokens", True, True),
        (r"re:(?!.*\.gate$).*", "model.layers.3.mlp.gate", False, False),
    ],
)
def test_patterns_match_and_name_modules(
    pattern: str, module: str, matched: bool, named: bool
) -> None:
    assert matches_module(pattern, module) is matched
    assert names_module(pattern, module) is named


# ------------------------------------------------------------------------------------------- faults


def test_all_faults_are_reported_in_the_order_of_the_lines() -> None:
    text = """\
version: 2
source: {modle: 3, model: 12}
quantize: {method: awk, bits: 9, group_size: 100, symmetric: yes}
rules:
  - {match: "re:(", quantize: default}
  - {match: "", keep: source}
  - {match: "*", keep: sorce}
  - {match: "*", quantize: {bitts: 3, bits: 17}}
  - {match: "*"}
  - {preset: expert-only}
  - hello
evaluation: {tasks: [gsm8k, 3]}
gates: {kl_maen: {max: 1}, gsm8k: {max: 1}, kl_mean: {}, top1: 5}
memory: 64 gigabytes
output: {path: x, shard_bytes: 0}
fidelty: {}
"""
    actual = faults(text, {"compute.device": "tpu", "rules.0.match": "x"})
    methods = re.sub(r".*Known: ", "", next(fault for fault in actual if "method" in fault))
    assert actual == (
        "override rules.0.match: expected keys in rules, found a list; override rules itself",
        "override compute.device: compute.device: expected auto, cpu or cuda, found 'tpu'",
        "x.yaml:1: version: expected 1, found 2",
        "x.yaml:1: fidelity: missing; this key has no default",
        "x.yaml:2: source.model: expected text, found 12 (quote it to make it text)",
        "x.yaml:2: source.modle: unknown key. Did you mean 'model'? Known: model, revision, "
        "trust_remote_code.",
        f"x.yaml:3: quantize.method: no method named 'awk'. Did you mean 'awq'? Known: {methods}",
        "x.yaml:3: quantize.bits: expected at most 8, found 9",
        "x.yaml:3: quantize.group_size: expected 16, 32, 64, 128 or -1, found 100",
        "x.yaml:3: quantize.symmetric: expected true or false, found 'yes'",
        "x.yaml:5: rules[0].match: not a regular expression: missing ), unterminated subpattern at "
        "position 0",
        "x.yaml:6: rules[1].match: expected text that is not empty, found ''",
        "x.yaml:7: rules[2].keep: expected source or bf16, found 'sorce'",
        "x.yaml:8: rules[3].quantize.bits: expected at most 8, found 17",
        "x.yaml:8: rules[3].quantize.bitts: unknown key. Did you mean 'bits'? Known: method, "
        "rounding, scheme, bits, group_size, symmetric, scale_dtype, double_quant.",
        "x.yaml:9: rules[4]: a rule is {match: PATTERN, quantize: default} or {match: PATTERN, "
        "keep: source}, or {preset: NAME}",
        "x.yaml:10: rules[5].preset: no preset named 'expert-only'. Did you mean 'experts-only'? "
        "Known: experts-only, all-linear, attention-source.",
        "x.yaml:11: rules[6]: expected a mapping of keys, found 'hello'",
        "x.yaml:12: evaluation.tasks[1]: expected text, found 3 (quote it to make it text)",
        "x.yaml:13: gates.top1: expected a mapping of keys, found 5",
        "x.yaml:13: gates.kl_maen: no figure or task of evaluation.tasks named 'kl_maen'. Did you "
        "mean 'kl_mean'? Known: size, bits_overall, bits_per_weight, kl_worst_kind, kl_mean_kinds, "
        "shift, kl_mean, yardstick, kl_yardstick, kl_noise, kl_median, kl_p99, kl_p999, kl_max, "
        "ppl_source, ppl_artifact, ppl_ratio, top1, mean_delta_p, rms_delta_p, router_agreement, "
        "block_error, module_error, "
        "output_error, experts_uncalibrated, coverage, fallbacks, lost_items, overlapping_items, "
        "likelihood, gsm8k. Of one kind of text: kl_mean@code.",
        "x.yaml:13: gates.gsm8k: expected {min_recovery: NUMBER} or {margin_pp: NUMBER} or "
        "{max_lost: NUMBER} or {min_score: NUMBER} or {max_truncated_pp: NUMBER} or "
        "{max_unparsed_pp: NUMBER}",
        "x.yaml:13: gates.kl_mean: expected {max: NUMBER} or {min: NUMBER}",
        "x.yaml:14: memory: expected a size such as 64GB, 512MiB or a number of bytes, found '64 "
        "gigabytes'",
        "x.yaml:15: output.shard_bytes: expected a size above 0 and below 8 EiB, found '0'",
        "x.yaml:16: fidelty: unknown key. Did you mean 'fidelity'? Known: version, source, "
        "quantize, format, rules, calibration, fidelity, evaluation, gates, slo, output, memory, "
        "mtp, propagate, compute.",
    )


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "x.yaml: the recipe is empty; it starts with 'version: 1'"),
        ("# only a comment\n", "x.yaml: the recipe is empty; it starts with 'version: 1'"),
        ("- a\n- b\n", "x.yaml:1: expected a mapping of keys (version: 1, ...), found a list"),
        ("hello\n", "x.yaml:1: expected a mapping of keys (version: 1, ...), found 'hello'"),
        ("a: &x 1\n", "x.yaml:1: anchors (&x) are not allowed in a recipe; write the value out"),
        (
            "a: &x 1\nb: *x\n",
            "x.yaml:2: aliases (*name) are not allowed in a recipe; write the value out",
        ),
        (
            "a: !!python/name:os.system 1\n",
            "x.yaml:1: tags (tag:yaml.org,2002:python/name:os.system) are not allowed",
        ),
        ("a: 1\nb: 2\na: 3\n", "x.yaml:3: a: written twice, first in line 1"),
        ("a: {b: 1, b: 2}\n", "x.yaml:1: a.b: written twice, first in line 1"),
        ("a: 1\n---\nb: 1\n", "x.yaml:2: a recipe is one YAML document, a second one starts here"),
        (
            "%YAML 1.1\n---\na: 1\n",
            "x.yaml:2: %YAML and %TAG directives are not allowed in a recipe",
        ),
        ("? [a]\n: b\n", "x.yaml:1: a key must be plain text"),
        ("? {a: b}\n: c\n", "x.yaml:1: a key must be plain text"),
        ('a: "\\0"\n', "x.yaml:1: text must not contain NUL or half a surrogate pair"),
        ('a: "\\ud800"\n', "x.yaml:1: text must not contain NUL or half a surrogate pair"),
        ("a: \0\n", "x.yaml: not valid YAML: "),
        ("a: [1\nb: 2\n", "x.yaml:2: not valid YAML: "),
        ("a: b: c\n", "x.yaml:1: not valid YAML: "),
        ("\ta: 1\n", "x.yaml:1: not valid YAML: "),
        ('a: "\\UFFFFFFFF"\n', "x.yaml: not valid YAML: "),
        ("a: " + "[" * 100_000, "x.yaml:1: nested more than 16 deep, no recipe is"),
        ("? " * 50_000, "x.yaml:1: a key must be plain text"),
        (
            "a" * (MAX_CHARACTERS + 1),
            "x.yaml: a recipe has at most 200,000 characters, this one 200,001",
        ),
    ],
)
def test_invalid_yaml_is_refused(text: str, fault: str) -> None:
    actual = faults(text)
    assert any(sentence.startswith(fault) for sentence in actual), actual
    assert all("\n" not in sentence and len(sentence) < 400 for sentence in actual)


@pytest.mark.parametrize(
    ("key", "value", "fault"),
    [
        (
            "memory",
            "-1",
            "memory: expected a size such as 64GB, 512MiB or a number of bytes, found '-1'",
        ),
        (
            "memory",
            "true",
            "memory: expected a size such as 64GB, 512MiB or a number of bytes, found bool",
        ),
        (
            "memory",
            "9" * 19 + "TB",
            "memory: expected a size above 0 and below 8 EiB, found '" + "9" * 19 + "TB'",
        ),
        ("quantize", "{bits: 4.0}", "quantize.bits: expected a whole number, found 4.0"),
        ("quantize", "{bits: true}", "quantize.bits: expected a whole number, found true"),
        (
            "quantize",
            "{group_size: true}",
            "quantize.group_size: expected 16, 32, 64, 128 or -1, found true",
        ),
        (
            "gates",
            "{kl_mean: {max: .nan}}",
            "gates.kl_mean.max: expected a finite number, found nan",
        ),
        (
            "gates",
            "{kl_mean: {max: 1e999}}",
            "gates.kl_mean.max: expected a finite number, found inf",
        ),
        (
            "gates",
            "{gsm8k: {min_recovery: 98}}",
            "gates.gsm8k.min_recovery: expected at most 1, found 98",
        ),
        (
            "gates",
            "{kl_mean: {min_recovery: 0.9}}",
            "gates.kl_mean: expected {max: NUMBER} or {min: NUMBER}",
        ),
        (
            "gates",
            "{kl_mean@Maths: {max: 1}}",
            "gates.kl_mean@Maths: expected a kind of the fidelity text after @, such as math or "
            "web-zh, found 'Maths'",
        ),
        (
            "gates",
            "{size@math: {max: 1}}",
            "gates.size@math: no figure or task of evaluation.tasks named 'size@math'",
        ),
        (
            "gates",
            "{kl_mean: {max: 5GB}}",
            "gates.kl_mean: expected a number; only size takes one such as 400GB",
        ),
        (
            "gates",
            "{size: {max: 5 tons}}",
            "gates.size.max: expected a size such as 64GB, 512MiB or a number of",
        ),
        (
            "gates",
            "{gsm8k: {margin_pp: -1}}",
            "gates.gsm8k.margin_pp: expected at least 0, found -1",
        ),
        (
            "gates",
            "{gsm8k: {max_lost: 0.5}}",
            "gates.gsm8k.max_lost: expected a whole number, found 0.5",
        ),
        (
            "gates",
            "{gsm8k: {margin: 1}}",
            "gates.gsm8k.margin: unknown key. Did you mean 'margin_pp'? Known: max, min",
        ),
        ("evaluation", "{tasks: [a, a]}", "evaluation.tasks: a: listed twice"),
        (
            "rules",
            "[]",
            "rules: expected a preset (experts-only, all-linear, attention-source) or a list of "
            "rules",
        ),
        (
            "rules",
            "[{match: a, quantize: default, keep: source}]",
            "rules[0]: a rule is {match: PATTERN, quantize",
        ),
        (
            "rules",
            "[{preset: all-linear, keep: source}]",
            "rules[0]: a rule is {match: PATTERN, quantize: default}",
        ),
        (
            "rules",
            "[{match: a, quantize: no}]",
            "rules[0].quantize: expected a mapping of keys, found 'no'",
        ),
        (
            "rules",
            "[{match: 're:', keep: source}]",
            "rules[0].match: an empty pattern matches nothing",
        ),
        ("source", "null", "source: expected a mapping of keys, found nothing"),
        ("output", "{path: ''}", "output.path: expected text that is not empty, found ''"),
        (
            "output",
            "{path: .}",
            "output.path: expected a folder with a name of its own, found '.'; write one that ",
        ),
        (
            "output",
            "{path: /}",
            "output.path: expected a folder with a name of its own, found '/'; write one that ",
        ),
        (
            "output",
            "{path: a/..}",
            "output.path: expected a folder with a name of its own, found 'a/..'; write one ",
        ),
        (
            "output",
            "{path: a.building}",
            "output.path: expected a folder with a name of its own, found 'a.building'",
        ),
        (
            "output",
            "{path: ~nobody-here/x}",
            "output.path: expected a folder, found '~nobody-here/x', of a user ",
        ),
        ("fidelity", "{set: s, length: 1}", "fidelity.length: expected at least 2, found 1"),
    ],
)
def test_invalid_values_are_refused(key: str, value: str, fault: str) -> None:
    kept = "".join(f"{line}\n" for line in SMALLEST.splitlines() if not line.startswith(f"{key}:"))
    tasks = "evaluation: {tasks: [gsm8k]}\n" if key == "gates" else ""
    actual = faults(f"{key}: {value}\n{kept}{tasks}")
    assert len(actual) == 1 and actual[0].startswith(f"x.yaml:1: {fault}"), actual


# ---------------------------------------------------------------------------------- small questions


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("64GB", 64 * 10**9),
        ("512MiB", 2**29),
        ("1.5 TB", 1_500_000_000_000),
        (4096, 4096),
        ("7", 7),
        ("3kB", 3000),
    ],
)
def test_sizes_are_parsed(text: object, n_bytes: int) -> None:
    assert parse_size(text) == n_bytes


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("yes", "yes"),
        ("on", "on"),
        ("true", True),
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("1_000", "1_000"),
        ("2024-01-01", "2024-01-01"),
        ("12:30", "12:30"),
        ("1e3", 1000.0),
        ("-.inf", float("-inf")),
        ("~", None),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_plain_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    assert parse_scalar(text) == value
    assert type(parse_scalar(text)) is type(value)


def test_overrides_replace_values() -> None:
    overrides = {
        "output.path": "123",
        "memory": "2GB",
        "evaluation.tasks": "[a, b]",
        "gates.kl_mean.max": "0.5",
    }
    recipe = parse_recipe(SMALLEST, "x.yaml", {**overrides, "mtp": "drop"})
    assert recipe.output.path == "123"
    assert parse_recipe(SMALLEST, "x.yaml", {"output.path": "~/x"}).output.path == str(
        Path.home() / "x"
    )
    assert recipe.memory == 2 * 10**9
    assert recipe.evaluation.tasks == ("a", "b")
    assert recipe.gates["kl_mean"].max == 0.5
    assert recipe.mtp == "drop"
    assert recipe.where("output", "path") == "override output.path"
    assert recipe.where("fidelity", "length") == "x.yaml:3"


def test_misspelled_override_is_reported_like_a_key() -> None:
    assert faults(SMALLEST, {"output.paht": "x"}) == (
        "override output.paht: output.paht: unknown key. Did you mean 'path'? Known: path, "
        "shard_bytes.",
    )


def test_override_with_a_lone_surrogate_is_refused() -> None:
    assert faults(SMALLEST, {"source.model": "\ud800"}) == (
        "override source.model: text must not contain NUL or half a surrogate pair",
    )


def test_overrides_are_written_into_the_text() -> None:
    """Comments, order and all other lines stay; a new key comes first in its section.

    Path and memory are left out.
    """
    text = (RECIPES / "tiny-v3-awq4.yaml").read_text()
    changes = {
        "quantize.bits": "8",
        "gates.kl_mean.max": "1e-5",
        "source.revision": "a: b",
        "gates.top1.min": "0.9",
    }
    recipe = parse_recipe(
        text,
        "x.yaml",
        {**changes, "memory": "1GB", "output.path": "y", "quantize.double_quant": "null"},
    )
    actual = apply_overrides(text, recipe)
    before, after = text.splitlines(), actual.splitlines()
    assert [line for line in after if line not in before] == [
        "  revision: 'a: b'",
        "  double_quant: null",
        "  bits: 8",
        "    max: 1e-05                        # plain rounding of the experts costs about 0.0006",
        "  top1:",
        "    min: 0.9",
    ]
    assert len([line for line in before if line not in after]) == 3
    assert parse_recipe(actual, "x.yaml").hash == recipe.hash
    assert (
        apply_overrides(text, parse_recipe(text, "x.yaml", {"memory": "1GB", "output.path": "y"}))
        == text
    )


@pytest.mark.parametrize(
    "text",
    [
        "{version: 1, source: {model: x, revision: }, fidelity: none, output: {path: y}}",
        "version: 1\nsource: {model: 2024-13-45}\nfidelity: ~\noutput:\n  path: "
        "'y'\ncalibration:\nquantize: {}\n",
        "version: 1\nsource: {model: 0x1F_}\nfidelity: none\noutput:\n  path: >-\n    a\n\n    "
        "b\n# end",
    ],
)
def test_overrides_are_written_into_any_layout(text: str) -> None:
    """Empty values, invalid dates, JSON: a layout that ruamel would change is rewritten."""
    for key, value in {
        "quantize.method": "rtn",
        "calibration.set": "true",
        "rules": "[{preset: all-linear}]",
    }.items():
        recipe = parse_recipe(text, "x.yaml", {key: value})
        again = parse_recipe(apply_overrides(text, recipe), "x.yaml")
        assert again.dump() == recipe.dump() != parse_recipe(text, "x.yaml").dump()


def test_later_override_wins_in_the_text() -> None:
    for order in (1, -1):
        overrides = dict([("quantize.bits", "8"), ("quantize", "{method: rtn, bits: 2}")][::order])
        recipe = parse_recipe(SMALLEST, "x.yaml", overrides)
        assert parse_recipe(apply_overrides(SMALLEST, recipe), "x.yaml").dump() == recipe.dump()


def test_hash_ignores_only_comments_path_and_memory() -> None:
    base = parse_recipe(SMALLEST, "x.yaml").hash
    assert (
        parse_recipe(
            "# a comment\n" + SMALLEST, "other.yaml", {"output.path": "y", "memory": "1GB"}
        ).hash
        == base
    )
    assert parse_recipe(SMALLEST, "x.yaml", {"quantize.bits": "3"}).hash != base
    assert parse_recipe(SMALLEST, "x.yaml", {"rules": "all-linear"}).hash != base


def test_recipe_is_frozen() -> None:
    recipe = parse_recipe(SMALLEST, "x.yaml")
    with pytest.raises(ValueError, match="frozen"):
        recipe.mtp = "drop"


# --------------------------------------------------------------------------------------------- fuzz

WORDS = st.sampled_from(
    [
        *list_keys(),
        "version",
        "source",
        "quantize",
        "rules",
        "gates",
        "match",
        "keep",
        "default",
        "re:(",
        "*",
        "1",
        "-1",
    ]
    + [
        "null",
        "64GB",
        "&a",
        "*a",
        "!!str",
        "{",
        "}",
        "[",
        "]",
        ": ",
        "- ",
        "\n",
        "  ",
        "'",
        '"',
        "\\",
        "|",
        ">",
        "?",
    ]
    + [
        "%YAML 1.1",
        "---",
        "...",
        "\t",
        "\0",
        "\u2028",
        "\ufeff",
        "\ud800",
        "<<",
        "=",
        "1e999",
        ".nan",
        "9" * 5000,
    ]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | WORDS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=8) | WORDS, inner, max_size=4)
    ),
    max_leaves=12,
)
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def only_recipe_errors(text: str, overrides: dict[str, str] | None = None) -> None:
    try:
        recipe = parse_recipe(text, "x.yaml", overrides or {})
    except RecipeError as error:
        assert error.faults
        assert all(fault and "\n" not in fault for fault in error.faults), error.faults
    else:
        assert isinstance(recipe, Recipe)
        json.dumps(recipe.dump())


@QUICK
@given(st.text(max_size=300))
def test_fuzz_any_text(text: str) -> None:
    only_recipe_errors(text)


@QUICK
@given(st.lists(WORDS, max_size=40).map("".join))
def test_fuzz_yaml_like_text(text: str) -> None:
    only_recipe_errors(text)
    only_recipe_errors(SMALLEST + text)


@QUICK
@given(
    st.dictionaries(st.sampled_from([key.split(".")[0] for key in list_keys()]), VALUES, max_size=6)
)
def test_fuzz_well_formed_values(values: dict[str, object]) -> None:
    only_recipe_errors(json.dumps(values))
    merged = {
        "version": 1,
        "source": {"model": "x"},
        "fidelity": {"set": "x"},
        "output": {"path": "x"},
        **values,
    }
    only_recipe_errors(json.dumps(merged, ensure_ascii=False))


@QUICK
@given(
    st.dictionaries(
        st.text(max_size=12) | st.sampled_from(list_keys()),
        st.text(max_size=12) | WORDS,
        max_size=3,
    )
)
def test_fuzz_overrides(overrides: dict[str, str]) -> None:
    only_recipe_errors(SMALLEST, overrides)


CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "source.model": st.text(min_size=1, max_size=12) | WORDS,
        "calibration.set": st.text(min_size=1, max_size=12) | WORDS,
        "source.revision": st.text(max_size=8) | WORDS,
        "quantize.bits": st.sampled_from(["2", "0x8", "+4"]),
        "quantize": st.just("{method: rtn, bits: 3, symmetric: true}"),
        "evaluation.tasks": st.lists(WORDS, max_size=3).map(
            lambda tasks: json.dumps(tasks, ensure_ascii=False)
        ),
        "gates.kl_max.max": st.floats(0, 1e9).map(repr),
        "rules": st.sampled_from([
            "all-linear",
            "[{match: 're:a: b', keep: bf16}]",
            "[{match: '#', quantize: default}]",
        ]),
        "fidelity": st.sampled_from(["none", "{set: 'null', length: 12}"]),
    },
)


@QUICK
@given(CHANGES)
def test_fuzz_overrides_written_into_the_text(overrides: dict[str, str]) -> None:
    text = SMALLEST + "# why\nquantize:  # this\n  bits: 4  # is\n\nmtp: drop\n"
    try:
        recipe = parse_recipe(text, "x.yaml", overrides)
    except RecipeError:
        reject()
    assert parse_recipe(apply_overrides(text, recipe), "x.yaml").dump() == recipe.dump()


@QUICK
@given(st.integers(0, 4000), st.text(max_size=4))
def test_fuzz_a_damaged_flagship(at: int, insert: str) -> None:
    text = (RECIPES / "v3-awq4.yaml").read_text()
    only_recipe_errors(text[:at] + insert + text[at + 1 :])


def test_slow_regular_expression_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would block a plan; similar expressions that are fast are accepted."""
    monkeypatch.setattr(patterns, "MATCH_SECONDS", 0.1)
    name = "model.layers.30.mlp.experts.200.gate_proj"
    assert not matches_module("re:(([a-z._0-9]+)+)+[!]", name)
    with pytest.raises(
        UsageError,
        match=r"^rules: 're:\(.*: expected a result for 'model\.layers.*' within 0\.1 seconds, "
        r"found a",
    ):
        matches_module(r"re:(\w|\.|[a-z])*[A-Z]", name)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("gguf", "no format named 'gguf'"),
        ("[]", "expected a format or a list of some, found an empty list"),
    ],
)
def test_invalid_format_is_one_fault(text: str, words: str) -> None:
    with pytest.raises(RecipeError) as raised:
        parse_recipe(SMALLEST, "r.yaml", {"format": text})
    [fault] = raised.value.faults
    assert words in fault


def test_format_accepts_the_spelling_of_engines() -> None:
    assert parse_recipe(SMALLEST, "r.yaml", {"format": "compressed-tensors"}).format == (
        "compressed_tensors",
    )


# ---------------------------------------------------------------------------------------------- FP4


def test_values_of_an_fp4_scheme_may_be_omitted() -> None:
    nvfp4, mxfp4 = Quantize(scheme="nvfp4"), Quantize(scheme="mxfp4", method="rtn")
    assert (nvfp4.method, nvfp4.rounding, nvfp4.group_size) == ("gptq", "gptq", 16)
    assert (mxfp4.method, mxfp4.rounding, mxfp4.group_size) == ("rtn", "nearest", 32)
    assert nvfp4.symmetric and (nvfp4.bits, nvfp4.scale_dtype) == (4, "auto")
    assert "scheme" not in Quantize().model_dump() and nvfp4.model_dump()["scheme"] == "nvfp4"


def test_values_of_a_scheme_do_not_pass_to_another() -> None:
    rules = (
        "rules:\n  - {match: '*.q_proj', quantize: {scheme: mxfp4}}\n"
        "  - {match: '*.k_proj', quantize: {scheme: int}}\n"
        "  - {match: '*', quantize: {method: rtn, rounding: nearest}}\n"
    )
    recipe = parse_recipe(SMALLEST + "quantize: {scheme: nvfp4}\n" + rules, "x.yaml")
    assert recipe.rules is not None
    assert [rule.quantize for rule in recipe.rules] == [
        Quantize(scheme="mxfp4"),
        Quantize(method="gptq"),
        Quantize(scheme="nvfp4", method="rtn"),
    ]


@pytest.mark.parametrize(
    ("written", "output"),
    [
        (
            "{scheme: nvfp4, bits: 3, group_size: 128}",
            "scheme nvfp4 is bits: 4, group_size: 16, symmetric: true, scale_dtype: auto, found "
            "bits: 3, group_size: 128; leave that out, or choose scheme: int",
        ),
        ("{scheme: mxfp4, symmetric: false}", "found symmetric: false; leave that out"),
        ("{scheme: mxfp4, scale_dtype: float16}", "found scale_dtype: float16; leave that out"),
        ("{scheme: nvfp4, method: nf4}", "method nf4 "),
        ("{group_size: 16}", "group_size: 16 is that of scheme nvfp4, integer codes have 32"),
        ("{scheme: fp4}", "expected int, mxfp4 or nvfp4, found 'fp4'"),
    ],
)
def test_contradiction_of_a_scheme_is_one_fault(written: str, output: str) -> None:
    with pytest.raises(RecipeError) as refused:
        parse_recipe(SMALLEST + f"quantize: {written}\n", "x.yaml")
    assert len(refused.value.faults) == 1 and output in refused.value.faults[0]
