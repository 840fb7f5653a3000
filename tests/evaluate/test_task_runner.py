"""Running tasks offline and silently on a random model: scores as lm-eval's, repeatable items."""

from __future__ import annotations

import json
import os
import re
import socket
from dataclasses import replace

import pytest
import torch
from support.paths import ROOT
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from quantkit.errors import EvaluationError
from quantkit.evaluate import item_results, source_comparison, task_runner, tasks
from quantkit.evaluate.sandbox import Sandbox, probe_sandbox
from quantkit.evaluate.task_schema import DATA_VARIABLE
from quantkit.io import package_data
from quantkit.report import tables
from quantkit.texts import task_files

TRAINED = ROOT.parent / "shared" / "tiny-v3" / "bf16"
NO_SANDBOX = Sandbox(kind="none", reason="a test said so")
TINY = ("tiny-v3-math", "tiny-v3-code")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(package_data.locate_model("builtin:tiny-v3"))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=768,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def offline(monkeypatch):
    """Record and refuse every attempt to use the network."""
    attempts: list[object] = []

    def refuse(*arguments: object) -> None:
        attempts.append(arguments)
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return attempts


def limit_tokens(task: tasks.Task, tokens: int) -> tasks.Task:
    """Return the task with fewer tokens per answer, for a model that never stops."""
    kwargs = {**task.config["generation_kwargs"], "max_gen_toks": tokens}
    return replace(task, config={**task.config, "generation_kwargs": kwargs})


# --------------------------------------------------------------------------------------------------
# ------- the files


@pytest.mark.parametrize("name", task_files.list_task_names())
def test_every_shipped_task_loads(name, tmp_path):
    (task,) = tasks.load_tasks([name], tmp_path)
    assert task.name == name
    assert task.domain in ("math", "code")
    assert (task.code is not None) == (task.domain == "code")
    assert task.is_local == (name in TINY)
    assert task.filters


def test_shipped_tasks_comment_their_keys():
    for name in task_files.list_task_names():
        text = task_files.find_task_path(name).read_text(encoding="utf-8")
        assert text.startswith("#"), name
        assert text.count("#") > 12, name


def test_unknown_task_error_suggests_the_nearest_name():
    with pytest.raises(EvaluationError) as caught:
        tasks.load_tasks(["humanevil", "gsm9k"])
    assert "did you mean humaneval?" in str(caught.value)
    assert "did you mean gsm8k?" in str(caught.value)


def test_load_tasks_reports_every_fault(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "quantkit:\n  domian: math\n  local: {test: {file: none.jsonl, rows: [5, 2]}}\n  code: "
        "{source: x, cut: half, seconds: 0}\ntask: other\noutput_type: loglikelihood\n"
    )
    with pytest.raises(EvaluationError) as caught:
        tasks.load_tasks([str(path)])
    text = str(caught.value)
    for part in (
        "quantkit.domian: unknown key. Did you mean 'domain'?",
        "none.jsonl not found in",
        "quantkit.code.cut: expected none or first_unindented_line, found 'half'",
        "quantkit.code.tests: missing",
        "quantkit.local.test.rows: expected [from, to] with 0 <= from < to, found [5, 2]",
        "mine.yaml:4: quantkit.code.seconds: expected at least 1, found 0",
        "task: expected 'mine' like the file, found 'other'",
        "output_type: expected generate_until",
    ):
        assert part in text


@pytest.mark.parametrize("split", ["../../../out", "a/b", "te st", "x" * 65, ""])
def test_load_tasks_rejects_invalid_split_names(tmp_path, split):
    """The split's name becomes part of a file name."""
    (tmp_path / "rows.jsonl").write_text("{}\n{}\n")
    path = tmp_path / "mine.yaml"
    block = {"domain": "math", "local": {split: {"file": "rows.jsonl", "rows": [0, 1]}}}
    path.write_text(
        json.dumps({"quantkit": block, "task": "mine", "output_type": "generate_until"})
    )
    with pytest.raises(EvaluationError, match="quantkit.local: expected a split's name"):
        tasks.load_tasks([str(path)], tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "mine.yaml: the task is empty; it starts with 'task: NAME'"),
        ("- a list", "mine.yaml:1: expected a mapping of keys (task: NAME, ...), found a list"),
        ("a: [", "mine.yaml:1: not valid YAML: expected"),
        ("quantkit: 3\ntask: mine", "mine.yaml:1: quantkit: expected a mapping of keys, found 3"),
        ("\x00", "mine.yaml: not valid YAML"),
        ("a: .inf", "mine.yaml: expected finite numbers"),
    ],
)
def test_load_tasks_rejects_other_files(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(EvaluationError, match=re.escape(message)):
        tasks.load_tasks([str(path)])


def test_data_folder_comes_from_argument_or_environment(tmp_path, monkeypatch):
    (tmp_path / "humaneval").mkdir()
    (tmp_path / "humaneval" / "HumanEval.jsonl").write_text("{}\n")
    assert tasks.load_tasks(["humaneval"], tmp_path)[0].is_local
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    first = tasks.load_tasks(["humaneval"])[0]
    assert first.is_local
    (tmp_path / "humaneval" / "HumanEval.jsonl").write_text('{"changed": 1}\n')
    assert tasks.load_tasks(["humaneval"])[0].sha256 != first.sha256


def test_rows_beyond_the_end_of_the_file_are_refused(tmp_path):
    (tmp_path / "mbpp").mkdir()
    (tmp_path / "mbpp" / "mbpp.jsonl").write_text("{}\n" * 20)
    with (
        pytest.raises(EvaluationError, match="expected rows 10 to 510, found 20 rows"),
        tasks.open_task_data(tasks.load_tasks(["mbpp"], tmp_path)),
    ):
        pass


# --------------------------------------------------------------------------------------------------
# ------- running


def test_tiny_tasks_run_offline_and_silently(model, tokenizer, offline, capfd):
    seen: list[tuple[int, int]] = []
    items = task_runner.run_tasks(
        model,
        tokenizer,
        tasks.load_tasks(TINY),
        limit=2,
        batch_size=2,
        jail=probe_sandbox(),
        progress=lambda done, of: seen.append((done, of)),
    )
    assert [(item.task, item.doc_id) for item in items] == [
        (name, doc) for name in TINY for doc in (0, 1)
    ]
    assert all(1 <= item.n_tokens <= 80 for item in items)
    assert seen == [(0, 4), (2, 4), (4, 4)]
    assert offline == []
    assert capfd.readouterr() == ("", "")
    assert [score.task for score in task_runner.aggregate_scores(items)] == list(TINY)


def test_run_is_repeatable_for_any_batch_size(model, tokenizer):
    loaded = tasks.load_tasks(TINY)
    state = torch.random.get_rng_state()
    first = task_runner.run_tasks(model, tokenizer, loaded, limit=5, batch_size=1, jail=NO_SANDBOX)
    assert first == task_runner.run_tasks(
        model, tokenizer, loaded, limit=5, batch_size=64, jail=NO_SANDBOX
    )
    assert torch.equal(state, torch.random.get_rng_state()), "no global generator is touched"


def test_interrupted_run_resumes_with_missing_answers_only(model, tokenizer, tmp_path):
    """Stored answers are reused and the other batches are the same, so all answers are equal."""
    loaded, seen, kept = (
        tasks.load_tasks(TINY),
        list[tuple[int, int]](),
        tmp_path / "answers" / "model.sqlite",
    )

    def cut(done: int, of: int) -> None:
        if done >= 4:
            raise KeyboardInterrupt

    def run(progress, answers):
        return task_runner.run_tasks(
            model,
            tokenizer,
            loaded,
            limit=5,
            batch_size=2,
            jail=NO_SANDBOX,
            progress=progress,
            answers=answers,
        )

    with pytest.raises(KeyboardInterrupt):
        run(cut, kept)
    again = run(lambda done, of: seen.append((done, of)), kept)
    assert seen[0] == (4, 10)
    assert again == run(None, None)


def test_code_is_not_run_without_a_sandbox(model, tokenizer):
    items = task_runner.run_tasks(
        model, tokenizer, tasks.load_tasks(TINY), limit=2, jail=NO_SANDBOX
    )
    math, code = task_runner.aggregate_scores(items)
    assert math.score == 0.0
    assert code.score is None
    assert code.standard_error is None
    assert code.not_run == "a test said so"


def test_shipped_tasks_run_on_local_rows(model, tokenizer, tmp_path, offline):
    rows = {
        "gsm8k/train.jsonl": [
            {"question": f"{n} + {n}?", "answer": f"It is {2 * n}.\n#### {2 * n}"} for n in range(5)
        ],
        "gsm8k/test.jsonl": [{"question": "1 + 2?", "answer": "It is 3.\n#### 3"}],
        "humaneval/HumanEval.jsonl": [
            {
                "task_id": "x/0",
                "prompt": "def one():\n",
                "canonical_solution": "    return 1\n",
                "entry_point": "one",
                "test": "def check(candidate):\n    assert candidate() == 1\n",
            }
        ],
        "mbpp/mbpp.jsonl": [
            {
                "task_id": n,
                "text": f"Return {n}.",
                "code": f"def f():\r\n  return {n}",
                "test_setup_code": "",
                "test_list": [f"assert f() == {n}"] * 3,
            }
            for n in range(1, 511)
        ],
    }
    for name, docs in rows.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    loaded = [
        limit_tokens(task, 4) for task in tasks.load_tasks(["gsm8k", "humaneval", "mbpp"], tmp_path)
    ]
    items = task_runner.run_tasks(model, tokenizer, loaded, limit=1, jail=NO_SANDBOX)
    prompts = {item.task: item.prompt for item in items}
    assert prompts["gsm8k"].count("#### ") == 5
    assert prompts["gsm8k"].endswith("Question: 1 + 2?\nAnswer:")
    assert prompts["humaneval"] == "def one():\n"
    assert prompts["mbpp"].count("[DONE]") == 3
    assert prompts["mbpp"].count("[BEGIN]\n") == 4
    assert "your task: Return 11." in prompts["mbpp"]
    assert {item.filter for item in items if item.task == "gsm8k"} == {
        "strict-match",
        "flexible-extract",
    }
    assert [
        score.is_primary for score in task_runner.aggregate_scores(items) if score.task == "gsm8k"
    ] == [
        True,
        False,
    ]
    assert all(item.truncated for item in items)
    assert offline == []


def test_hub_task_without_network_is_one_clear_error(model, tokenizer, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        EvaluationError, match="the data comes from the hub; connect, or set QUANTKIT_DATA"
    ):
        task_runner.run_tasks(
            model, tokenizer, tasks.load_tasks(["humaneval"], tmp_path), limit=1, jail=NO_SANDBOX
        )


def test_prompt_longer_than_the_context_is_refused(tokenizer):
    config = LlamaConfig(
        vocab_size=768,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=64,
    )
    with pytest.raises(EvaluationError, match="do not fit into the model's context of 64"):
        task_runner.run_tasks(
            LlamaForCausalLM(config), tokenizer, tasks.load_tasks(["tiny-v3-math"]), limit=1
        )


def test_no_tasks_give_no_items_and_limit_must_be_positive(model, tokenizer):
    assert task_runner.run_tasks(model, tokenizer, []) == []
    with pytest.raises(EvaluationError, match=r"evaluation\.limit"):
        task_runner.run_tasks(model, tokenizer, tasks.load_tasks(TINY), limit=0)


# --------------------------------------------------------------------------------------------------
# -- generation


def test_prompts_start_with_exactly_one_bos(model, tokenizer):
    from quantkit.evaluate.transformers_backend import TransformersBackend

    language_model = TransformersBackend(model, tokenizer, 4)
    for text in ("Question: 1 + 1 = ?\nAnswer:", "<|bos|>Question: 1 + 1 = ?\nAnswer:"):
        assert language_model.tok_encode(text).count(tokenizer.bos_token_id) == 1
        assert language_model.tok_encode(text)[0] == tokenizer.bos_token_id


@pytest.mark.parametrize(("front", "shared"), [(0, 0), (12, 0), (40, 40)])
def test_greedy_equals_transformers_generate(front, shared, model, monkeypatch):
    """Also for prompts with shared leading tokens, which are read once."""
    from quantkit.evaluate import decoding

    torch.manual_seed(1)
    same, longest = torch.randint(3, 768, (front,)).tolist(), front + 20
    prompts = [same + torch.randint(3, 768, (n,)).tolist() for n in (3, 9, 17, 20, 5)]
    ids = torch.tensor([
        [2] * (longest - len(prompt)) + prompt for prompt in prompts
    ])  # [5, longest]
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    eos_tokens = set(range(1, 768, 9))  # rows stop at different steps
    expected = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=24,
        do_sample=False,
        eos_token_id=sorted(eos_tokens),
        pad_token_id=2,
    )[:, longest:].tolist()
    shapes = []
    count = model.register_forward_pre_hook(
        lambda _, __, given: shapes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    decoded = decoding.decode(model, prompts, 2, 24, lambda tokens: tokens[-1] in eos_tokens)
    count.remove()
    assert shapes[: 1 + bool(shared)] == [*([(1, shared)] if shared else []), (5, longest - shared)]
    assert len({len(row) for row in decoded}) > 1
    for row, reference in zip(decoded, expected, strict=True):
        assert row == reference[: len(row)]
        assert len(row) == 24 or row[-1] in eos_tokens


def test_count_shared_tokens_stops_where_sharing_would_change_results(model):
    """Equal prompts keep their last tokens.

    One prompt, few tokens and sliding windows share none.
    """
    from quantkit.evaluate.decoding import count_shared_tokens, prefill

    full, prompt = DynamicCache(config=model.config), list(range(3, 43))
    assert count_shared_tokens([prompt, prompt], full) == 39
    assert count_shared_tokens([prompt, prompt[:-1]], full) == 38
    assert count_shared_tokens([prompt, prompt[:30] + [2], prompt], full) == 30
    assert count_shared_tokens([prompt], full) == 0
    assert count_shared_tokens([prompt, prompt[:9] + [2] * 31], full) == 0
    sliding = MistralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=8,
    )
    slides = MistralForCausalLM(sliding).eval()
    assert count_shared_tokens([prompt, prompt], DynamicCache(config=sliding)) == 0
    longer = [5, *prompt]
    with torch.inference_mode():
        output, _ = prefill(slides, [longer, longer[:-3]], 0)
        unbatched = [
            slides(torch.tensor([each]), logits_to_keep=1).logits[0]
            for each in (longer, longer[:-3])
        ]
    torch.testing.assert_close(output.logits, torch.stack(unbatched))


def test_stop_strings_end_an_answer_and_are_removed(tokenizer):
    from quantkit.evaluate.transformers_backend import StopCondition

    stop = StopCondition(tokenizer=tokenizer, eos=frozenset({1}), strings=("\nQuestion:", "é!"))
    tokens = tokenizer("The answer is 4.\nQuestion: 5", add_special_tokens=False).input_ids
    ends = [end for end in range(1, len(tokens) + 1) if stop.is_met(tokens[:end])]
    assert tokenizer.decode(tokens[: ends[0]]).endswith("\nQuestion:")
    answer = stop.make_answer(tokens[: ends[0]])
    assert answer.text == "The answer is 4."
    assert answer.n_tokens == ends[0]
    assert not answer.truncated
    assert stop.make_answer(tokens[:3]).truncated
    assert not stop.make_answer([*tokens[:3], 1]).truncated
    assert stop.is_met(tokenizer("caf é!", add_special_tokens=False).input_ids)


def test_cut_at_unindented_line():
    assert (
        task_runner.cut_at_unindented_line("    a = 1\n\n    return a\nprint(1)\n    b")
        == "    a = 1\n\n    return a"
    )
    assert task_runner.cut_at_unindented_line("x = 1\n    y") == ""
    assert task_runner.cut_at_unindented_line("    return 1\n") == "    return 1\n"


# --------------------------------------------------------------------------------------------------
# ------ samples


@pytest.fixture(scope="module")
def items(model, tokenizer):
    return task_runner.run_tasks(model, tokenizer, tasks.load_tasks(TINY), limit=2, jail=NO_SANDBOX)


def test_items_round_trip_through_parquet(items, tmp_path):
    item_results.write_items(items, tmp_path / "items.parquet")
    item_results.write_items(items, tmp_path / "again.parquet")
    assert item_results.read_items(tmp_path / "items.parquet") == items
    assert (tmp_path / "items.parquet").read_bytes() == (tmp_path / "again.parquet").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["again.parquet", "items.parquet"]


def test_pair_items_joins_by_item_and_checks_prompts(items, tmp_path):
    import pyarrow.parquet as parquet

    changed = [replace(item, response=item.response[:3] + "?") for item in reversed(items)]
    pairs = item_results.pair_items(items, changed)
    assert [both.baseline for both in pairs] == items
    assert all(both.first_divergence == 3 for both in pairs)
    item_results.write_pairs(pairs, tmp_path / "pairs.parquet")
    row = parquet.read_table(tmp_path / "pairs.parquet").to_pylist()[0]
    assert row["quant_response"] == changed[-1].response
    assert row["base_response"] == items[0].response
    with pytest.raises(EvaluationError, match="prompt_hash differs"):
        item_results.pair_items(items, [replace(item, prompt_hash="other") for item in items])
    with pytest.raises(EvaluationError, match="was answered by one model only"):
        item_results.pair_items(items, items[:-1])


def test_cache_returns_stored_items(items, tmp_path):
    key = item_results.compute_cache_key("source", {"a": "1"}, None, "float32", {"torch": "2"})
    assert item_results.read_cached_items(tmp_path, key) is None
    item_results.write_cached_items(tmp_path / "new", key, items)
    assert item_results.read_cached_items(tmp_path / "new", key) == items
    (tmp_path / "new" / f"{key}.parquet").write_bytes(b"damaged")
    assert item_results.read_cached_items(tmp_path / "new", key) is None


def test_cache_key_depends_on_every_part():
    whole = ("source", {"a": "1"}, None, "float32", {"torch": "2"})
    changes = [("other", 0), ({"a": "2"}, 1), (5, 2), ("bfloat16", 3), ({"torch": "3"}, 4)]
    keys = {item_results.compute_cache_key(*whole)}
    for value, place in changes:
        keys.add(item_results.compute_cache_key(*whole[:place], value, *whole[place + 1 :]))
    assert len(keys) == 6


def test_row_reports_truncated_and_unparsed_answers_of_both_sides(items):
    (task,) = tasks.load_tasks(["tiny-v3-math"])
    mine = [item for item in items if item.task == task.name and item.filter == task.filters[0]]
    whole = [replace(item, truncated=False, parsed=True) for item in mine]
    cut = [replace(item, truncated=True, parsed=False) for item in mine[:1]] + whole[1:]
    row = source_comparison.make_benchmark_row(task, item_results.pair_items(whole, cut), 0.98)
    assert row.truncated == row.unparsed == (0.0, 1 / len(mine))
    note = tables.make_comparison_table([row], "Greedy").note
    assert "Cut at the token limit: tiny-v3-math 0.0 % ->" in note
    assert "Without a result: tiny-v3-math 0.0 % ->" in note


# -------------------------------------------------------------------------------------------------
# the real model


@pytest.mark.slow
@pytest.mark.skipif(
    not TRAINED.is_dir(), reason="the BF16 checkpoint of tiny-v3 is not on this machine"
)
def test_tiny_v3_scores_equal_its_model_card(tokenizer):
    trained = AutoModelForCausalLM.from_pretrained(TRAINED, dtype=torch.float32).eval()
    math, code = task_runner.aggregate_scores(
        task_runner.run_tasks(trained, tokenizer, tasks.load_tasks(TINY), jail=probe_sandbox())
    )
    assert (math.n, round(100 * math.score, 1)) == (300, 82.7)
    assert code.n == 100
    assert code.score == 1.0 or code.not_run
    assert math.truncated == math.unparsed == 0.0
