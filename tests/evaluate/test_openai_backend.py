"""Evaluation over HTTP: server faults lose and duplicate nothing, a killed evaluation resumes."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.openai_server import RETRY_AFTER, Server

from quantkit.cli.main import main
from quantkit.errors import EvaluationError, UsageError
from quantkit.evaluate.item_results import read_items
from quantkit.io import package_data

TASK = "tiny-v3-math"
DOCS = [
    json.loads(line)
    for line in (package_data.locate_folder("evals") / "data" / f"{TASK}.jsonl")
    .read_text(encoding="utf-8")
    .splitlines()
]
RIGHT = {doc["prompt"]: doc["solution"] for doc in DOCS}
FAULTS = ("429", "500", "drop", "cut", "end", "error", "slow", "silent")


def number(prompt: str) -> int:
    """Return a number derived from a prompt."""
    return int(hashlib.sha256(prompt.encode()).hexdigest(), 16)


def answer(prompt: str, body: dict) -> str:
    """Return the reference solution, or a wrong one for a third of the prompts."""
    question = json.loads(prompt)[-1]["content"] if prompt.startswith("[") else prompt
    return RIGHT[question] if number(question) % 3 else " It is zero.\n#### 0"


def evaluate(server: Server, folder: Path, *options: str, code: int = 0):
    """Run `quantkit eval` in this process.

    Return its JSON output, or standard error if it fails.
    """
    result = CliRunner(catch_exceptions=False).invoke(
        main,
        [
            "eval",
            "tiny",
            "--backend",
            "openai",
            "--endpoint",
            server.url,
            "--tasks",
            TASK,
            "--output",
            str(folder),
            "--json",
            *options,
        ],
    )
    assert result.exit_code == code, result.output
    return json.loads(result.stdout) if code == 0 else result.stderr


def run_failing(server: Server, folder: Path, *options: str) -> str:
    """Return the error of an evaluation that must fail, with tasks other than TASK."""
    arguments = [
        "eval",
        "tiny",
        "--backend",
        "openai",
        "--endpoint",
        server.url,
        "--output",
        str(folder),
        *options,
    ]
    result = CliRunner(catch_exceptions=False).invoke(main, arguments)
    assert result.exit_code == 1, result.output
    return result.stderr


def rows(folder: Path) -> list[tuple]:
    """Read the stored answers with sqlite3 itself."""
    with sqlite3.connect(folder / "answers.sqlite") as connection:
        return connection.execute("select prompt_hash, value from answers").fetchall()


@pytest.mark.parametrize("chat", [False, True], ids=["completions", "chat"])
def test_every_server_fault_is_retried_without_loss_or_duplicates(chat, tmp_path, monkeypatch):
    monkeypatch.setattr("quantkit.evaluate.openai_client.INITIAL_BACKOFF", 0.05)
    limit = 16
    prompts = [doc["prompt"] for doc in DOCS[:limit]]

    def choose_fault(name: str, nth: int) -> str:
        """Fail the first try of every prompt, and the second try of a third of them."""
        question = json.loads(name)[-1]["content"] if chat else name
        place = prompts.index(question)
        kinds = [
            FAULTS[place % len(FAULTS)],
            FAULTS[(place + 3) % (len(FAULTS) - 1)] if place % 3 == 0 else "",
        ]
        return kinds[nth] if nth < len(kinds) else ""

    with Server(answer=answer, fault=choose_fault, pause=0.02) as server:
        options = ["--limit", str(limit), "--concurrency", "6", "--timeout", "0.8"]
        results = evaluate(
            server, tmp_path / "out", *options, *(["--chat-template"] if chat else [])
        )
    items = read_items(tmp_path / "out" / "items.parquet")
    assert [item.doc_id for item in items] == list(range(limit))
    assert [item.response for item in items] == [answer(prompt, {}) for prompt in prompts]
    assert [item.score for item in items] == [float(bool(number(prompt) % 3)) for prompt in prompts]
    assert (
        results["tasks"][0]["score"] == sum(bool(number(prompt) % 3) for prompt in prompts) / limit
    )
    assert not any(item.truncated for item in items)
    assert [item.n_tokens for item in items] == [-(-len(item.response) // 3) for item in items], (
        "the server's own count"
    )
    assert len(rows(tmp_path / "out")) == limit
    assert {record.fault for record in server.records} == {*FAULTS, "served"}
    assert set(server.count_served().values()) == {1}, "a complete answer is never requested again"
    assert len(server.count_served()) == limit
    hanging = sum(record.fault == "silent" for record in server.records)
    assert 1 < server.most_at_once <= 6 + hanging, (
        "a request that was given up still hangs in the server"
    )
    by_prompt: dict[str, list] = {}
    for record in server.records:
        by_prompt.setdefault(record.prompt, []).append(record)
    waits = [
        after.at - before.at
        for same_prompt in by_prompt.values()
        for before, after in pairwise(same_prompt)
        if before.fault == "429"
    ]
    assert waits
    assert min(waits) >= RETRY_AFTER, "Retry-After is obeyed"


def test_answer_at_the_token_limit_is_truncated(tmp_path):
    with Server(answer=answer) as server:
        evaluate(server, tmp_path / "out", "--limit", "3", "--max-tokens", "4")
    assert {record.body["max_tokens"] for record in server.records} == {4}
    for item in read_items(tmp_path / "out" / "items.parquet"):
        assert item.truncated
        assert (item.n_tokens, len(item.response)) == (4, 12)


def test_killed_evaluation_resumes_and_repeats_no_request(tmp_path):
    limit, folder = 40, tmp_path / "out"
    with Server(answer=answer, pause=0.25) as server:
        command = [
            sys.executable,
            "-m",
            "quantkit",
            "eval",
            "tiny",
            "--backend",
            "openai",
            "--endpoint",
            server.url,
            "--tasks",
            TASK,
            "--output",
            str(folder),
            "--limit",
            str(limit),
            "--concurrency",
            "2",
        ]
        running = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        deadline = time.monotonic() + 120
        while sum(server.count_served().values()) < 9 and time.monotonic() < deadline:
            time.sleep(0.02)
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
        time.sleep(0.6)  # requests in progress
        kept = rows(folder)
        assert 7 <= len(kept) < 20, "finished samples are stored as they come"
        first = Counter(record.prompt for record in server.records)
        assert "already" in evaluate(server, folder, "--limit", str(limit), code=2)
        assert Counter(record.prompt for record in server.records) == first, (
            "without --resume nothing is asked"
        )
        server.pause = 0.0
        results = evaluate(server, folder, "--limit", str(limit), "--resume")
        stored = {hashed for hashed, _ in kept}
        repeated = {record.prompt for record in server.records[sum(first.values()) :]}
        assert len(repeated) == limit - len(kept)
        assert not {hashlib.sha256(prompt.encode()).hexdigest() for prompt in repeated} & stored
        assert (results["tasks"][0]["n"], len(rows(folder))) == (limit, limit)
        n_requests = len(server.records)
        assert evaluate(server, folder, "--limit", str(limit), "--resume") == results
        assert evaluate(server, folder, "--limit", "5", "--resume")["tasks"][0]["n"] == 5
        assert len(server.records) == n_requests, "a finished evaluation asks nothing"
        evaluate(server, folder, "--limit", "5", "--resume", "--max-tokens", "30")
        assert len(server.records) == n_requests + 5, "other settings are other questions"
        evaluate(server, folder, "--limit", "5", "--resume", "--think-end", "</think>")
        assert len(server.records) == n_requests + 10, "without stop strings it is another question"
    with Server(answer=answer) as moved:
        assert evaluate(moved, folder, "--limit", "5", "--resume")["tasks"][0]["n"] == 5
        assert moved.records == [], "a server that moved is the same model"


def test_dead_server_is_one_error_and_keeps_complete_answers(tmp_path, monkeypatch):
    monkeypatch.setattr("quantkit.evaluate.openai_client.INITIAL_BACKOFF", 0.01)
    bad = DOCS[6]["prompt"]
    with Server(answer=answer, fault=lambda name, nth: "503" if name == bad else "") as server:
        message = evaluate(
            server, tmp_path / "out", "--limit", "12", "--concurrency", "1", "--tries", "3", code=1
        )
        assert "no answer in 3 tries" in message
        assert "--resume" in message
        assert len(rows(tmp_path / "out")) == 6
        assert server.asked[bad] == 3
        assert len(server.records) == 9, "nothing new is asked after a failure"
        server.fault = lambda name, nth: ""
        assert (
            evaluate(server, tmp_path / "out", "--limit", "12", "--resume")["tasks"][0]["n"] == 12
        )
        assert set(server.count_served().values()) == {1}
    with Server(answer=answer, fault=lambda name, nth: "html") as server:
        message = evaluate(server, tmp_path / "page", "--limit", "2", "--tries", "2", code=1)
        assert "the stream ended before the answer did" in message
    message = evaluate(
        server, tmp_path / "none", "--model", "tiny", "--limit", "1", "--tries", "2", code=1
    )
    assert "no answer in 2 tries" in message


def test_refused_request_is_not_retried_and_key_is_redacted(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    with Server(answer=answer, key="sk-other") as server:
        message = evaluate(server, tmp_path / "out", "--limit", "3", "--concurrency", "1", code=1)
        assert "refused" in message
        assert "secret" not in message
        assert "***" in message
        assert len(server.records) == 1
        monkeypatch.setenv("MY_KEY", "sk-other")
        results = evaluate(
            server, tmp_path / "out", "--limit", "3", "--key-variable", "MY_KEY", "--resume"
        )
    assert "sk-" not in json.dumps(results)
    assert not any(b"sk-" in path.read_bytes() for path in (tmp_path / "out").iterdir())


def test_too_long_prompt_fails_only_its_task(tmp_path):
    bad = DOCS[3]["prompt"]
    tasks = ("--tasks", "tiny-v3-code", "--limit", "5", "--concurrency", "1")
    with Server(
        answer=lambda prompt, body: RIGHT.get(prompt, ""),
        fault=lambda name, nth: "long" * (name == bad),
    ) as server:
        message = evaluate(server, tmp_path / "out", *tasks, code=1)
        assert "error: not run: tiny-v3-math" in message
        assert server.asked[bad] == 1
    document = json.loads((tmp_path / "out" / "results.json").read_text())
    assert "maximum context length is 512 tokens" in document["not_run"]["tiny-v3-math"]
    assert [row["n"] for row in document["tasks"]] == [5]
    with Server(answer=answer, fault=lambda name, nth: "unknown") as server:
        message = evaluate(server, tmp_path / "other", *tasks, code=1)
        assert "refused" in message and "--resume" in message
        assert len(server.records) == 1, "a model that is not there is asked nothing more"


def test_served_model_is_detected_or_must_be_named(tmp_path):
    with Server(answer=answer, models=("a", "b")) as server:
        message = evaluate(server, tmp_path / "out", "--limit", "2", code=2)
        assert "expected one served model, found a, b; name one with --model" in message
        evaluate(server, tmp_path / "out", "--limit", "2", "--model", "b")
        assert {record.body["model"] for record in server.records} == {"b"}


def test_eval_averages_seeds_per_item(tmp_path):
    def answer_by_seed(prompt: str, body: dict) -> str:
        return RIGHT[prompt] if (number(prompt) + body["seed"]) % 4 < 2 else " No idea."

    with Server(answer=answer_by_seed) as server:
        message = evaluate(
            server,
            tmp_path / "out",
            "--limit",
            "10",
            "--seeds",
            "3",
            "--temperature",
            "0.6",
            "--top-p",
            "0.95",
            code=1,  # more answers without a result than a valid task has
        )
        assert {(r.body["temperature"], r.body["top_p"]) for r in server.records} == {(0.6, 0.95)}
        assert Counter(r.body["seed"] for r in server.records) == {0: 10, 1: 10, 2: 10}
        assert "--temperature" in evaluate(server, tmp_path / "no", "--seeds", "3", code=2)
    assert "tiny-v3-math: expected at most 20%, but 47% of the answers" in message
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    items = read_items(tmp_path / "out" / "items.parquet")
    expected = [
        sum((number(doc["prompt"]) + seed) % 4 < 2 for seed in range(3)) / 3 for doc in DOCS[:10]
    ]
    assert [item.score for item in items] == pytest.approx(expected)
    assert {0 < item.score < 1 for item in items} == {True}
    assert results["tasks"][0]["score"] == pytest.approx(sum(expected) / 10)
    low, high = results["tasks"][0]["interval"]
    assert low < sum(expected) / 10 < high
    assert results["tasks"][0]["unparsed"] == pytest.approx(
        sum((number(doc["prompt"]) + seed) % 4 >= 2 for seed in range(3) for doc in DOCS[:10]) / 30
    )
    for seed in range(3):
        assert [item.score for item in read_items(tmp_path / "out" / f"seed-{seed}.parquet")] == [
            float((number(doc["prompt"]) + seed) % 4 < 2) for doc in DOCS[:10]
        ]


def test_think_end_removes_thoughts_and_their_stop_strings(tmp_path):
    def thinking(prompt: str, body: dict) -> str:
        return (
            f"Hm.\nQuestion: #### 7?</think>{RIGHT[prompt]}\nQuestion: next"
            if number(prompt) % 2
            else "Hm, #### 1"
        )

    with Server(answer=thinking) as server:
        evaluate(
            server,
            tmp_path / "out",
            "--limit",
            "8",
            "--think-end",
            "</think>",
            "--max-tokens",
            "900",
        )
        assert not any("stop" in record.body for record in server.records)
    items = read_items(tmp_path / "out" / "items.parquet")
    assert [item.response for item in items] == [
        RIGHT[doc["prompt"]] if number(doc["prompt"]) % 2 else "" for doc in DOCS[:8]
    ]


def test_baseline_is_compared_item_by_item(tmp_path):
    with Server(answer=lambda prompt, body: RIGHT[prompt]) as server:
        evaluate(server, tmp_path / "source", "--limit", "12")
        server.answer = answer
        results = evaluate(
            server, tmp_path / "out", "--limit", "12", "--baseline", str(tmp_path / "source")
        )
        (row,) = results["comparison"]
        wrong = sum(not number(doc["prompt"]) % 3 for doc in DOCS[:12])
        assert (row["n"], row["lost"], row["gained"], row["source"]) == (12, wrong, 0, 1.0)
        assert (tmp_path / "out" / "pairs.parquet").is_file()
        message = evaluate(
            server,
            tmp_path / "other",
            "--limit",
            "12",
            "--max-tokens",
            "40",
            "--baseline",
            str(tmp_path / "source"),
            code=1,
        )
        assert "max_tokens: expected 40 as in this evaluation, found None" in message
        results = evaluate(
            server, tmp_path / "fewer", "--limit", "4", "--baseline", str(tmp_path / "source")
        )
        assert [row["n"] for row in results["comparison"]] == [4], "the items that both have"
        before = len(server.records)
        options = ("--tasks", "tiny-v3-code", "--baseline", str(tmp_path / "source"))
        message = run_failing(server, tmp_path / "task", *options)
        assert "expected one of the tasks tiny-v3-code, found tiny-v3-math" in message
        assert "expected the folder of an evaluation" in evaluate(
            server, tmp_path / "x", "--baseline", "no", code=2
        )
        assert len(server.records) == before, "refused before anything was asked"
        assert not (tmp_path / "task").exists() and not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("localhost:8000", "expected http://HOST"),
        ("http://me:word@host/v1", "no user"),
        ("http://h/v1?key=1", "no user"),
    ],
)
def test_normalize_url_refuses_secrets_and_other_text(url, message):
    from quantkit.evaluate.openai_client import normalize_url

    with pytest.raises(UsageError, match=message):
        normalize_url(url)


def test_answer_store_is_exclusive_and_names_damaged_files(tmp_path):
    from quantkit.evaluate import answer_store

    with answer_store.open_answer_store(tmp_path / "a.sqlite") as book:
        question = answer_store.AnswerKey("task", "doc", "prompt", "{}", "model", 0)
        book.put([(question, ["first"])])
        book.put([(question, ["second"])])
        assert book.get(question) == ["first"]
        assert book.get(question._replace(turn=1)) is None
        assert len(book) == 1
        with (
            pytest.raises(EvaluationError, match="wait for the evaluation"),
            answer_store.open_answer_store(tmp_path / "a.sqlite"),
        ):
            pass
    (tmp_path / "b.sqlite").write_bytes(b"something else" * 99)
    with (
        pytest.raises(EvaluationError, match="expected the answers"),
        answer_store.open_answer_store(tmp_path / "b.sqlite"),
    ):
        pass
