"""`quantkit eval` in this process: items of servers, sources, baselines, sampling, errors."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from support.openai_server import Server
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from quantkit.cli.main import main
from quantkit.errors import EvaluationError, UsageError
from quantkit.evaluate import (
    backends,
    item_results,
    lm_eval_tasks,
    sandbox,
    source_comparison,
    statistics,
)
from quantkit.evaluate.item_results import read_items
from quantkit.evaluate.options import EvaluationOptions
from quantkit.io import package_data

SUBJECT = "math_question"
QUESTIONS = [
    {
        "question": f"{n} + {n}?",
        "choices": [str(2 * n + (n + k) % 4) for k in range(4)],
        "answer": -n % 4,
    }
    for n in range(1, 9)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Save a small ordinary model with tiny-v3's tokenizer."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=768,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    AutoTokenizer.from_pretrained(package_data.locate_model("builtin:tiny-v3")).save_pretrained(
        path
    )
    return path


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    """Work in a folder with a subject of MMLU where datasets searches before the hub."""
    place = tmp_path / "cais" / "mmlu"
    place.mkdir(parents=True)
    for split in ("test", "dev"):
        (place / f"{split}.jsonl").write_text(
            "".join(json.dumps(question) + "\n" for question in QUESTIONS)
        )
    files = "".join(f"  - {{split: {split}, path: {split}.jsonl}}\n" for split in ("test", "dev"))
    (place / "README.md").write_text(
        f"---\nconfigs:\n- config_name: marketing\n  data_files:\n{files}---\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path


def run(*options: str, code: int = 0):
    result = CliRunner(catch_exceptions=False).invoke(main, ["eval", *options, "--json"])
    assert result.exit_code == code, result.output
    return json.loads(result.stdout) if code == 0 else result.stderr


def test_local_and_served_model_give_the_same_items(folder, data):
    """Prompts, BOS, stop strings, tokens and scores of generation and likelihoods agree by item."""
    from quantkit.evaluate.decoding import decode
    from quantkit.evaluate.transformers_backend import StopCondition

    model, tokenizer = (
        LlamaForCausalLM.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )

    def answer(prompt: str, body: dict) -> str:
        ids = tokenizer(prompt).input_ids
        stop = StopCondition(tokenizer=tokenizer, eos=frozenset({1}), strings=tuple(body["stop"]))
        return stop.make_answer(decode(model, [ids], 0, body["max_tokens"], stop.is_met)[0]).text

    @torch.inference_mode()
    def logprobs(tokens: list[int]) -> list[tuple[float, float]]:
        log_probs = model(torch.tensor([tokens])).logits[0].log_softmax(-1)  # [tokens, vocabulary]
        return [
            (log_probs[at, token].item(), log_probs[at].max().item())
            for at, token in enumerate(tokens[1:])
        ]

    tasks = ["--tasks", "tiny-v3-math,mmlu_marketing", "--limit", "4", "--max-tokens", "40"]
    local = run(
        str(folder), *tasks, "--output", "here", "--dtype", "float32", "--device-map", "cpu"
    )
    with Server(answer=answer, logprobs=logprobs, piece=9999) as server:
        served = run(
            str(folder),
            *tasks,
            "--output",
            "there",
            "--backend",
            "openai",
            "--endpoint",
            server.url,
        )
    first, second = (
        read_items(data / "here" / "items.parquet"),
        read_items(data / "there" / "items.parquet"),
    )
    assert {item.task for item in first} == {"tiny-v3-math", "mmlu_marketing"}
    for mine, its in zip(first, second, strict=True):
        assert mine.key == its.key
        assert (mine.prompt, mine.response, mine.score, mine.outcome) == (
            its.prompt,
            its.response,
            its.score,
            its.outcome,
        )
    assert [row["score"] for row in local["tasks"]] == [row["score"] for row in served["tasks"]]
    choices = [item for item in first if item.task == "mmlu_marketing"]
    assert {item.response for item in choices} <= {" A", " B", " C", " D"}
    assert all(
        item.score == float(" ABCD".index(item.response.strip()) - 1 == int(item.target))
        for item in choices
    )


def test_artifact_is_compared_with_its_source_and_baseline_is_cached(built, data, monkeypatch):
    options = ["--tasks", "tiny-v3-math,tiny-v3-code", "--limit", "3", "--source"]
    first = run(str(built), *options, "--output", "first")
    assert first["evaluated"] == {
        "name": "tiny",
        "kind": "artifact",
        "sha256": first["backend"]["model"],
    }
    assert set(first["sandbox"]) == {"kind", "python", "memory", "reason"}
    assert [row["task"] for row in first["comparison"]] == ["tiny-v3-math", "tiny-v3-code"]
    assert all(row["n"] == 3 for row in first["comparison"])
    for row in first["comparison"]:
        chunks = next(
            each
            for each in first["tasks"]
            if (each["task"], each["filter"]) == (row["task"], row["metric"])
        )
        assert (row["truncated"][1], row["unparsed"][1]) == (
            chunks["truncated"],
            chunks["unparsed"],
        )
        assert len(row["truncated"]) == len(row["unparsed"]) == 2
    pairs = item_results.pair_items(
        *(
            read_items(path)
            for path in (
                next((data / "cache").rglob("*.parquet")),
                data / "first" / "items.parquet",
            )
        )
    )
    assert len(pairs) == 6
    loaded = backends.load_target_model
    monkeypatch.setattr(
        backends,
        "load_target_model",
        lambda who, setup: (
            loaded(who, setup) if who.kind == "artifact" else pytest.fail("asked again")
        ),
    )
    assert run(str(built), *options, "--output", "second") == first
    printed = CliRunner().invoke(
        main, ["eval", str(built), *options, "--output", "second", "--resume"]
    )
    assert "Scores" in printed.stdout
    assert "Benchmarks" in printed.stdout


def test_eval_refuses_another_source(built, folder, data):
    message = run(
        str(built),
        "--tasks",
        "tiny-v3-math",
        "--limit",
        "2",
        "--source",
        str(folder),
        "--output",
        "x",
        code=1,
    )
    assert "not the model that tiny was made from" in message
    assert "expected an artifact" in run(
        str(folder), "--tasks", "tiny-v3-math", "--source", "--output", "x", code=2
    )


def test_eval_names_tasks_that_cannot_run_and_runs_the_rest(folder, data):
    message = run(
        str(folder), "--tasks", "tiny-v3-math,gsm9k", "--limit", "2", "--max-tokens", "2000", code=1
    )
    assert "gsm9k: no such task; did you mean gsm8k" in message
    assert "do not fit into the model's context" in message
    result = CliRunner().invoke(
        main,
        [
            "eval",
            str(folder),
            "--tasks",
            "tiny-v3-math,gsm9k",
            "--limit",
            "2",
            "--output",
            "o",
            "--max-tokens",
            "9",
        ],
    )
    assert result.exit_code == 1
    assert "error: not run: gsm9k" in result.stderr
    assert json.loads((data / "o" / "results.json").read_text())["tasks"][0]["n"] == 2


@pytest.mark.parametrize(
    ("what", "tasks", "message"),
    [
        (None, "nosuch", "nosuch: no such task"),
        (None, "own/none.yaml", "'own/none.yaml': no such task"),
        ("builtin:nothing", "tiny-v3-math", "no built-in model"),
        ("./nope", "tiny-v3-math", "found './nope', which is none of these"),
    ],
)
def test_unknown_model_or_task_is_a_usage_error_and_writes_nothing(
    folder, data, what, tasks, message
):
    assert message in run(what or str(folder), "--tasks", tasks, "--output", "o", code=2)
    assert not (data / "o").exists()


def test_code_is_answered_but_not_judged_without_a_sandbox(folder, data, monkeypatch):
    monkeypatch.setattr(
        sandbox, "probe_sandbox", lambda: sandbox.Sandbox(kind="none", reason="a test said so")
    )
    tasks = [
        "--tasks",
        "tiny-v3-math,tiny-v3-code",
        "--limit",
        "2",
        "--max-tokens",
        "4",
        "--output",
        "o",
    ]
    assert "not run: tiny-v3-code; results.json says why" in run(str(folder), *tasks, code=1)
    math, code = json.loads((data / "o" / "results.json").read_text())["tasks"]
    assert (math["score"], code["score"], code["not_run"]) == (0.0, None, "a test said so")


def test_chat_template_is_required_and_applied(folder, data):
    message = run(
        str(folder),
        "--tasks",
        "tiny-v3-math",
        "--limit",
        "1",
        "--chat-template",
        "--output",
        "no",
        code=2,
    )
    assert "expected a chat template in the model's tokenizer" in message
    run(
        str(folder),
        "--tasks",
        "tiny-v3-math",
        "--limit",
        "1",
        "--max-tokens",
        "5",
        "--output",
        "no",
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    )
    tokenizer.save_pretrained(shutil.copytree(folder, data / "chatty"))
    run(
        "chatty",
        "--tasks",
        "tiny-v3-math",
        "--limit",
        "1",
        "--max-tokens",
        "5",
        "--chat-template",
        "--output",
        "yes",
    )
    (item,) = read_items(data / "yes" / "items.parquet")
    assert item.prompt.startswith("<user>Question: ")
    assert item.prompt.endswith("Answer:<assistant>")


def test_lm_eval_tasks_that_run_code_are_refused():
    unsafe = SimpleNamespace(UNSAFE_CODE=True)
    manager = SimpleNamespace(
        match_tasks=lambda names: names, load=lambda names: {"tasks": {names[0]: unsafe}}
    )
    with pytest.raises(EvaluationError, match="would run generated code outside the sandbox"):
        lm_eval_tasks._load_matching(manager, "humaneval_plus")


def test_task_sets_expand_to_known_tasks():
    assert lm_eval_tasks.expand_names(["code", "mgsm", "humaneval"]) == [
        "humaneval",
        "mbpp",
        "mgsm_native_cot_*",
    ]
    assert lm_eval_tasks.expand_names(["math"])[:2] == ["gsm8k", "minerva_math"]
    assert len(lm_eval_tasks.expand_names(["general"])) == 12
    for name in lm_eval_tasks.expand_names(["math", "general"]):
        assert lm_eval_tasks._index_lm_eval().match_tasks([name]), name


def test_native_model_and_device_maps_give_equal_logits(folder):
    ids = torch.tensor([[0, 5, 9]])
    whole = backends.load_native_model(folder, "float32", "auto")
    for device_map in ("balanced", "sequential"):
        spread = backends.dispatch_model(
            LlamaForCausalLM.from_pretrained(folder).eval(), device_map
        )
        assert torch.equal(spread(ids).logits, whole(ids).logits)


def test_native_loading_names_the_missing_library(built, monkeypatch):
    monkeypatch.setitem(sys.modules, "gptqmodel", None)
    with pytest.raises(
        EvaluationError, match="install the library of its format, or leave out --native"
    ):
        backends.load_native_model(built, "float32", "cpu")


def test_vllm_runs_in_chunks_and_its_absence_is_reported(folder, monkeypatch):
    from quantkit.evaluate import vllm_backend

    monkeypatch.setattr(vllm_backend, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="expected vLLM in this environment"):
        vllm_backend.VllmBackend(folder, {})

    class Engine:
        """A stand-in for lm-eval's vLLM class."""

        def __init__(self, pretrained: str, max_model_len: int) -> None:
            assert (pretrained, max_model_len) == (str(folder), 64)

        def generate_until(self, requests: list, disable_tqdm: bool) -> list[str]:
            return [request.args[0] * 2 for request in requests]

        def tok_encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return [*text]

    monkeypatch.setattr(vllm_backend, "find_spec", lambda name: True)
    monkeypatch.setattr(vllm_backend, "CHUNK_SIZE", 2)
    monkeypatch.setitem(sys.modules, "lm_eval.models.vllm_causallms", SimpleNamespace(VLLM=Engine))
    chunks: list = []
    requests = [
        SimpleNamespace(args=(text, {"max_gen_toks": 4}), task_name="t")
        for text in ("a", "bb", "c")
    ]
    vllm_backend.VllmBackend(folder, {"max_model_len": 64}).generate(requests, chunks.append)
    assert [[at for at, _ in some] for some in chunks] == [[0, 1], [2]]
    assert [(a.text, a.n_tokens, a.truncated) for some in chunks for _, a in some] == [
        ("aa", 2, False),
        ("bbbb", 4, True),
        ("cc", 2, False),
    ]


# --------------------------------------------------------------------------------------------------
# ------ sampling


def test_samples_follow_temperature_and_top_p():
    from quantkit.evaluate.transformers_backend import make_sampler

    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).log_softmax(-1)
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.8)):
        choose = make_sampler([[1, 2]], temperature, top_p, seed=3)
        sampled_tokens = torch.cat([choose(logits[None], [0])[0] for _ in range(4000)])
        frequency = torch.bincount(sampled_tokens, minlength=4) / 4000
        expected = (logits / temperature).softmax(-1)
        if top_p < 1:  # 0.64 and 0.24 make up 0.8; the others are cut
            expected = torch.where(torch.tensor([True, True, False, False]), expected, 0)
            expected /= expected.sum()
        assert torch.allclose(frequency, expected, atol=4 * 0.5 / 4000**0.5)


def test_samples_depend_on_prompt_and_seed_not_on_the_batch():
    from quantkit.evaluate.transformers_backend import make_sampler

    torch.manual_seed(5)
    logits, state = torch.randn(6, 2, 50), torch.random.get_rng_state()

    def draws(prompts: list[list[int]], row: int, seed: int) -> list[int]:
        choose = make_sampler(prompts, 1.0, 1.0, seed)
        return [
            choose(step[: len(prompts)], range(len(prompts)))[row].item()
            for step in logits[:, [0, 0]]
        ]

    unbatched = draws([[1, 2]], 0, 7)
    assert draws([[9], [1, 2]], 1, 7) == unbatched
    assert draws([[1, 2]], 0, 8) != unbatched
    assert draws([[1, 3]], 0, 7) != unbatched
    assert torch.equal(state, torch.random.get_rng_state()), "no global generator is touched"


# --------------------------------------------------------------------------------------------------
# ------ settings


def test_contradicting_options_are_refused():
    for setup, message in (
        (EvaluationOptions(seeds=2), "--temperature"),
        (EvaluationOptions(backend="openai"), "--endpoint"),
        (EvaluationOptions(limit=0), "--limit"),
    ):
        with pytest.raises(UsageError, match=message):
            setup.check()


def test_mean_interval_equals_scipy():
    from scipy.stats import binomtest

    wilson = binomtest(3, 10).proportion_ci(method="wilson")
    log_probs = statistics.mean_interval([1.0] * 3 + [0.0] * 7)
    assert (log_probs.low, log_probs.high) == pytest.approx((wilson.low, wilson.high))
    spread = statistics.mean_interval([0.25, 0.5, 0.75])
    assert (spread.low, spread.high) == pytest.approx((
        0.5 - 1.959964 * 0.25 / 3**0.5,
        0.5 + 1.959964 * 0.25 / 3**0.5,
    ))


def test_average_runs_averages_items_over_seeds(folder):
    item = item_results.ItemResult(
        task="t",
        domain="math",
        filter="f",
        doc_id=0,
        doc_hash="",
        prompt_hash="",
        target_hash="",
        prompt="",
        target="",
        response="one",
        score=1.0,
        outcome="",
        n_tokens=3,
        truncated=False,
        parsed=True,
    )
    from dataclasses import replace

    other = replace(item, score=0.0, response="two", n_tokens=6, truncated=True, parsed=False)
    (mean,) = item_results.average_runs([[item], [other], [other]])
    assert (mean.score, mean.response, mean.n_tokens, mean.truncated, mean.parsed) == (
        1 / 3,
        "one",
        5,
        True,
        False,
    )
    assert item_results.average_runs([[item], [replace(other, score=None)]])[0].score is None
    assert item_results.average_runs([[item]]) == [item]
    assert source_comparison.DEFAULT_RECOVERY < 1


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{{ raise_exception('\x1b[31mroles must alternate') }}", "roles must alternate"),
        ("{{ cycler.__init__.__globals__ }}", "is unsafe"),
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "of processor time, found more",
        ),
    ],
    ids=["raises", "code", "loop"],
)
def test_hostile_chat_template_is_one_sentence(folder, data, template, sentence, monkeypatch):
    monkeypatch.setattr("quantkit.io.templates.RENDER_SECONDS", 1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(shutil.copytree(folder, data / "chatty"))
    chat = ("--limit", "1", "--max-tokens", "5", "--chat-template")
    message = run("chatty", "--tasks", "tiny-v3-math", *chat, "--output", "o", code=2)
    assert "the model's chat template gives no text: " in message
    assert sentence in message
    assert message.strip().isprintable()


def test_own_python_of_a_task_needs_its_hash(folder, data):
    python = "def doc_to_text(doc):\n    return 'Q: ' + doc['question']\n"
    (data / "helpers.py").write_text(python)
    (data / "data").mkdir()
    (data / "data" / "mine.jsonl").write_text('{"question": "1 + 1", "answer": "2"}\n' * 2)
    (data / "mine.yaml").write_text(
        "task: mine\noutput_type: generate_until\ntest_split: test\ndoc_to_target: '{{answer}}'\n"
        "generation_kwargs: {until: ['x'], max_gen_toks: 3}\n"
        "quantkit: {domain: math, local: {test: mine.jsonl}, python: helpers.py}\n"
    )
    tasks = ("--tasks", "mine.yaml", "--output", "o")
    message = run(str(folder), *tasks, code=1)
    sha256 = hashlib.sha256(python.encode()).hexdigest()
    assert "helpers.py is code that would run on this machine with your rights" in message
    assert f"add --trust-task-code {sha256}" in message
    assert f"add --trust-task-code {sha256}" in run(
        str(folder), *tasks, "--trust-task-code", "0" * 64, code=1
    )
    run(str(folder), *tasks, "--trust-task-code", sha256)
    assert [item.prompt for item in read_items(data / "o" / "items.parquet")] == ["Q: 1 + 1"] * 2
