"""Text of the model itself, sampled in this process and through a stand-in of an endpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.openai_server import Server

from quantkit import pipeline
from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.errors import CalibrationError, RecipeError
from quantkit.evaluate import model_text
from quantkit.evaluate.model_text import ModelTextGenerator
from quantkit.evaluate.prompt_text import PromptRenderer
from quantkit.evaluate.self_sampler import open_self_source
from quantkit.io.package_data import locate_folder, locate_model
from quantkit.io.templates import TemplateWorker
from quantkit.pipeline import TokenizedTexts
from quantkit.plan import sources
from quantkit.plan.sources import ResolvedCompute
from quantkit.progress import Progress
from quantkit.recipe.parse import parse_recipe
from quantkit.recipe.schema import Recipe
from quantkit.texts.corpora import load_tokenizer
from quantkit.texts.self_prompts import SELF_KINDS, SELF_LANGUAGES, list_prompts
from quantkit.texts.self_text import SampledText, Sampling, make_request

CPU = ResolvedCompute(device="cpu", dtype="float32", calibration="float32")
SELF = {
    "calibration.set": "self", "calibration.sequences": "6", "calibration.length": "64",
    "fidelity.set": "tiny-v3-heldout", "compute.device": "cpu", "evaluation.tasks": "[]",
    "gates": "{}",
}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
ANSWER = "An answer of a dozen words about rivers, bread and the weather of May. "


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "cache"))


def read_recipe(overrides: dict[str, str]) -> Recipe:
    text = (locate_folder("recipes") / "tiny-v3-awq4.yaml").read_text(encoding="utf-8")
    return parse_recipe(text, "tiny-v3-awq4.yaml", {**SELF, **overrides})


def tokenize(recipe: Recipe, folder: Path | None = None) -> TokenizedTexts:
    return pipeline.tokenize(recipe, folder or locate_model("builtin:tiny-v3"))


def generate(group_size: int, count: int, kinds: Sequence[str] = SELF_KINDS) -> list[SampledText]:
    """Sample the first texts of tiny-v3 in groups."""
    source = Checkpoint.open(locate_model("builtin:tiny-v3"))
    prompts = list_prompts(kinds, SELF_LANGUAGES, has_openings=True, has_messages=False)
    texts = list[SampledText]()
    with TemplateWorker() as worker:
        renderer = PromptRenderer(load_tokenizer(source.folder), worker, "tiny-v3")
        generator = ModelTextGenerator(source, CPU, renderer, Sampling(max_tokens=48), group_size)
        for first in range(0, count, group_size):
            group = [make_request(i, prompts, "0") for i in range(first, first + group_size)]
            needed = {request.index for request in group}
            generator.generate(group, needed, texts.append, lambda _: None)
    return texts[:count]


def test_batch_changes_no_text() -> None:
    assert generate(4, 8) == generate(8, 8)


def test_texts_are_the_models_own() -> None:
    texts = generate(6, 12)
    assert any("def " in text.text and "return" in text.text for text in texts)
    for text in texts:
        assert text.ended == text.text.endswith("<|eos|>")
        assert 0 < text.n_tokens <= 48 and not text.text.startswith("<|bos|>")


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """The texts of a recipe, sampled from tiny-v3, and what the sampling left and reported."""

    texts: TokenizedTexts
    reports: list[Progress]
    cache: Path


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Sampled:
    """Sample the calibration text of `read_recipe({})`; tests must not change the cache."""
    cache, reports = tmp_path_factory.mktemp("sampled") / "cache", list[Progress]()
    source = Checkpoint.open(locate_model("builtin:tiny-v3"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUANTKIT_CACHE", str(cache))
        texts = pipeline.tokenize(read_recipe({}), source.folder, (), source, reports.append)
    return Sampled(texts=texts, reports=reports, cache=cache)


@pytest.fixture
def filled_cache(sampled: Sampled, tmp_path: Path) -> None:
    """Put the text of `sampled` into this test's cache."""
    shutil.copytree(sampled.cache, tmp_path / "cache")


@pytest.mark.usefixtures("filled_cache")
def test_calibration_text_is_cached_and_extended(
    sampled: Sampled, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, tokens, reports = read_recipe({}), sampled.texts, sampled.reports
    calibration = tokens.tokens["calibration"]
    assert 6 * 64 <= calibration.n_tokens < 7 * 64
    assert reports[-1].stage == "sampling text" and reports[-1].done == reports[-1].total == 6 * 64
    [part] = tokens.descriptions["calibration"].parts
    assert (part.name, part.language, part.license) == ("self", "mul", "model output")
    assert {"code", "math", "prose"} <= set(tokens.descriptions["calibration"].kinds)

    def refuse(*_: object) -> None:
        raise AssertionError("the cache holds the text")

    monkeypatch.setattr(model_text, "decode", refuse)
    assert tokenize(recipe).hashes() == tokens.hashes()
    with pytest.raises(AssertionError, match="the cache holds"):
        tokenize(read_recipe({"calibration.seed": "1"}))
    with pytest.raises(AssertionError, match="the cache holds"):
        tokenize(read_recipe({"compute.dtype": "bfloat16"}))


@pytest.mark.usefixtures("filled_cache")
def test_fidelity_text_shares_no_answer_with_calibration() -> None:
    recipe = read_recipe({
        "fidelity.set": "self", "fidelity.windows": "4", "fidelity.length": "64",
    })  # fmt: skip
    tokens = tokenize(recipe).tokens
    sequences = [
        {tuple(tokens[name].sequence(i).tolist()) for i in range(tokens[name].n_sequences)}
        for name in ("calibration", "fidelity")
    ]
    assert sequences[0] and sequences[1] and not sequences[0] & sequences[1]


def test_part_of_a_mixture_has_some_kinds(tmp_path: Path) -> None:
    path = tmp_path / "mixed.yaml"
    path.write_text(
        "version: 2\nname: mixed\nparts:\n"
        "  - {name: own, kind: self, language: mul,\n"
        "     self: {kinds: [code, math], languages: [en, de]}}\n"
        "  - {name: tiny, kind: prose, licence: Apache-2.0, set: tiny-v3, domain: prose}\n"
    )
    recipe = read_recipe({"calibration.set": str(path), "calibration.sequences": "8"})
    text = tokenize(recipe).descriptions["calibration"]
    assert {kind.partition("-")[2] for kind in text.kinds} == {"", "de"}
    assert text.license == "model output AND Apache-2.0"
    assert {kind.partition("-")[0] for kind in text.kinds} == {"code", "math", "prose"}
    assert text.parts[0].tokens >= 4 * 64


def test_plan_says_what_is_sampled_and_samples_nothing(sampled: Sampled, tmp_path: Path) -> None:
    recipe = read_recipe({})
    expected = "calibration: 384 tokens of the model's own text"
    assert sources.describe_sampled_texts(recipe) == (
        f"{expected} will be sampled (in this process, float32 on cpu)",
    )
    shutil.copytree(sampled.cache, tmp_path / "cache")
    assert sources.describe_sampled_texts(recipe) == (f"{expected}; the cache holds them",)
    longer = sources.describe_sampled_texts(read_recipe({"calibration.sequences": "600"}))
    assert "will be sampled" in longer[0] and "; the cache holds" in longer[0]
    assert sources.describe_sampled_texts(read_recipe({"calibration.set": "tiny-v3"})) == ()


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"calibration.sequences": "null"}, "calibration.sequences: expected a number for text of"),
        ({"memory": "0.95GB"}, "needs .* GB, memory allows 0.95 GB; set calibration.endpoint to"),
        (
            {"calibration.set": "tiny-v3",
             "calibration.endpoint": "{url: 'http://localhost:1/v1', model: m}"},
            "calibration.endpoint: expected a set with text of the model itself",
        ),
    ],
)  # fmt: skip
def test_plan_finds_faults(overrides: dict[str, str], message: str) -> None:
    recipe = read_recipe(overrides)
    with pytest.raises(RecipeError, match=message):
        sources.plan_recipe(recipe, sources.resolve_source_facts(recipe))


# --------------------------------------------------------------------------------------- endpoint


@pytest.fixture
def chat_model(tmp_path: Path) -> Path:
    """tiny-v3 with a chat template."""
    folder = Path(shutil.copytree(locate_model("builtin:tiny-v3"), tmp_path / "chat"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def connect(server: Server, **more: object) -> Recipe:
    endpoint = {"url": server.url, "model": "tiny", "concurrency": 3, "tries": 3, **more}
    return read_recipe({"calibration.endpoint": json.dumps(endpoint)})


def read_texts(recipe: Recipe, folder: Path) -> list[str]:
    """Return the texts of the calibration set."""
    source = Checkpoint.open(folder)
    assert recipe.calibration is not None
    with open_self_source(recipe, source, load_tokenizer(folder), lambda _: None) as own:
        sample = own.make_sampler("calibration", 6, 64, 0)
        from quantkit.texts.corpora import load_set

        (part,) = load_set("self", locate_folder("calibration"), sample).parts
    return list(part.texts)


def test_completions_get_raw_prompts(chat_model: Path) -> None:
    with Server(answer=lambda prompt, body: ANSWER) as server:
        texts = read_texts(connect(server, chat=False), chat_model)
        assert all(text.endswith(ANSWER) for text in texts)
        assert any(text.startswith("<user>") for text in texts)
        assert any(text.startswith("The history of the canal begins in") for text in texts)
        body = server.records[0].body
        assert (body["temperature"], body["top_p"], body["max_tokens"]) == (1.0, 0.95, 2048)
        assert len({record.body["seed"] for record in server.records}) == len(server.records)


def test_reasoning_is_joined_as_the_template_does(chat_model: Path) -> None:
    with Server(answer=lambda *_: ANSWER, reasoning=lambda *_: "I think of rivers.") as server:
        texts = read_texts(connect(server), chat_model)
    assert all("<assistant><think>I think of rivers.</think>An answer" in text for text in texts)
    assert all(text.startswith("<user>") and text.endswith("<end>") for text in texts)


def test_reasoning_that_the_template_drops_is_kept(chat_model: Path) -> None:
    (chat_model / "chat_template.jinja").write_text(
        TEMPLATE.replace("{% if m.reasoning_content %}", "{% if false %}")
    )
    with Server(answer=lambda *_: ANSWER, reasoning=lambda *_: "I think of rivers.") as server:
        texts = read_texts(connect(server), chat_model)
    joined = "<assistant><think>\nI think of rivers.\n</think>\n\nAn answer"
    assert all(joined in text for text in texts)


def test_faults_of_the_server_are_retried_and_lose_nothing(
    chat_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantkit.evaluate.openai_client.INITIAL_BACKOFF", 0.01)
    faults = ("500", "cut", "end", "")
    with Server(answer=lambda prompt, _: f"{ANSWER}{prompt}") as plain:
        expected = read_texts(connect(plain, chat=False), chat_model)
    with Server(
        answer=lambda prompt, _: f"{ANSWER}{prompt}",
        fault=lambda prompt, nth: faults[(len(prompt) + nth) % 4] if nth < 2 else "",
    ) as server:
        assert read_texts(connect(server, chat=False), chat_model) == expected
        assert any(record.fault == "cut" for record in server.records)


def test_unreachable_endpoint_is_one_sentence_and_keeps_answers(
    chat_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantkit.evaluate.openai_client.INITIAL_BACKOFF", 0.01)
    broken: list[bool] = [True]
    with Server(
        answer=lambda *_: ANSWER,
        fault=lambda prompt, nth: "500" if broken[0] and len(server.records) > 2 else "",
    ) as server:
        recipe = connect(server, chat=False)
        with pytest.raises(CalibrationError, match="no answer in 3 tries .* run the same command"):
            read_texts(recipe, chat_model)
        served = server.count_served()
        broken[0] = False
        read_texts(recipe, chat_model)
        assert served and max(server.count_served().values()) == 1
    with pytest.raises(CalibrationError, match=f"calibration.endpoint: {server.url}: no answer"):
        read_texts(recipe.model_copy(update={"calibration": recipe.calibration.model_copy(
            update={"seed": 1})}), shift(chat_model))  # fmt: skip


def shift(folder: Path) -> Path:
    """Return the folder with another tokenizer hash, so that no cached text fits."""
    (folder / "chat_template.jinja").write_text(TEMPLATE + " ")
    return folder


def test_chat_endpoint_needs_a_template() -> None:
    with (
        Server(answer=lambda *_: ANSWER) as server,
        pytest.raises(CalibrationError, match=r"expected a chat template .*chat: false"),
    ):
        read_texts(connect(server), locate_model("builtin:tiny-v3"))


@pytest.mark.parametrize(
    "value, message",
    [
        ("{url: 'http://me:secret@host/v1', model: m}", "expected no user, password or query"),
        ("{url: host, model: m}", "calibration.endpoint.url: expected http://HOST:PORT/v1"),
        ("{url: 'http://host/v1'}", "calibration.endpoint.model: missing"),
        ("{url: 'http://host/v1', modell: m}", "Did you mean 'model'"),
    ],
)
def test_endpoint_faults_name_the_key(value: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_recipe({"calibration.endpoint": value})
