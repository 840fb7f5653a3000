"""Text of the model itself: prompts, order of requests, dropped answers, cache, resume."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from quantkit.errors import CalibrationError, UsageError
from quantkit.io.lock import hold_lock
from quantkit.texts import self_text
from quantkit.texts.mixture_spec import LABEL_PATTERN
from quantkit.texts.self_prompts import (
    SELF_KINDS,
    SELF_LANGUAGES,
    list_labels,
    list_prompts,
)
from quantkit.texts.self_text import (
    SampledText,
    SelfTexts,
    TextRequest,
    count_cached_tokens,
    draw_uniform,
    find_degeneration,
    locate_cache,
    make_request,
    open_cache,
    sample_texts,
)

PROMPTS = list_prompts(SELF_KINDS, SELF_LANGUAGES, has_openings=True, has_messages=True)
BENCHMARKS = {"gsm8k": "question", "humaneval": "prompt", "mbpp": "text"}
IDENTITY = {"model": "m", "seed": "calibration 0"}


@dataclass
class Generator:
    """Words that follow from the request's seed. dies_after: texts before it raises, or kills."""

    group_size: int = 8
    dies_after: int = -1
    kills: bool = False
    loops: bool = False
    made: list[int] = field(default_factory=list)

    def generate(
        self,
        group: Sequence[TextRequest],
        needed: Collection[int],
        on_text: Callable[[SampledText], None],
        on_tokens: Callable[[int], None],
    ) -> None:
        for request in group:
            if request.index not in needed:
                continue
            if len(self.made) == self.dies_after:
                if self.kills:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise KeyboardInterrupt
            self.made.append(request.index)
            words = [hashlib.sha256(f"{request.seed} {i}".encode()).hexdigest() for i in range(20)]
            words = ["again"] * 200 if self.loops else words
            start = len(request.prompt.text)
            text = request.prompt.text + " " + " ".join(words)
            on_tokens(len(words))
            on_text(
                SampledText(
                    index=request.index, text=text, start=start, n_tokens=len(words), ended=True
                )
            )

    def close(self) -> None:
        pass


def sample(
    path: Path, n_tokens: int, generator: Generator | None = None, seed: str = "0"
) -> SelfTexts:
    generator = generator or Generator()
    with open_cache(path, IDENTITY) as cache:
        return sample_texts(
            cache,
            lambda index: make_request(index, PROMPTS, seed),
            lambda: generator,
            n_tokens=n_tokens,
            count_tokens=lambda text: len(text.split()),
        )


def list_grams(text: str, n: int = 8) -> set[tuple[str, ...]]:
    """Return the n-grams of the words of a text."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def test_prompts_span_kinds_and_languages() -> None:
    rows = [prompt for prompts in PROMPTS.values() for prompt in prompts]
    assert 60 <= len(rows) <= 100 and len(set(rows)) == len(rows)
    assert len({prompt.language for prompt in rows}) >= 12
    assert tuple(PROMPTS) == SELF_KINDS
    for form in ("has_openings", "has_messages"):
        forms = {"has_openings": False, "has_messages": False, form: True}
        assert all(list_prompts(SELF_KINDS, SELF_LANGUAGES, **forms).values())
    assert all(
        re.fullmatch(LABEL_PATTERN, label) for label in list_labels(SELF_KINDS, SELF_LANGUAGES)
    )


def test_no_prompt_overlaps_a_benchmark() -> None:
    data = Path(os.environ.get("QUANTKIT_DATA", ""))
    folders = [data / name for name in BENCHMARKS if (data / name).is_dir()]
    if not os.environ.get("QUANTKIT_DATA") or len(folders) < len(BENCHMARKS):
        pytest.skip("QUANTKIT_DATA does not hold GSM8K, HumanEval and MBPP")
    grams = {
        gram
        for prompts in PROMPTS.values()
        for prompt in prompts
        for gram in list_grams(prompt.text)
    }
    n_rows = 0
    for folder in folders:
        for path in folder.rglob("*.jsonl"):
            for line in path.read_text(encoding="utf-8").splitlines():
                question = str(json.loads(line).get(BENCHMARKS[folder.name], ""))
                assert question, path
                assert not grams & list_grams(question)
                n_rows += 1
    assert n_rows > 1000


def test_any_prefix_of_requests_is_a_mixture() -> None:
    requests = [make_request(index, PROMPTS, "0") for index in range(240)]
    counts = Counter(request.prompt.kind for request in requests[:60])
    assert set(counts.values()) == {10}
    assert len({request.prompt.language for request in requests[:60]}) >= 8
    assert {request.prompt for request in requests} == {p for row in PROMPTS.values() for p in row}
    assert len({request.seed for request in requests}) == 240


def test_seed_changes_texts(tmp_path: Path) -> None:
    first, other = sample(tmp_path / "a.jsonl", 200), sample(tmp_path / "b.jsonl", 200, seed="1")
    assert first.labels[:8] == other.labels[:8] and not set(first.texts) & set(other.texts)
    assert draw_uniform(1, 0) != draw_uniform(1, 1) != draw_uniform(2, 1)
    assert all(0 <= draw_uniform(seed, 7) < 1 for seed in range(1000))


def test_longer_request_extends_the_cache(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    short, more = sample(path, 300), Generator()
    longer = sample(path, 900, more)
    assert longer.texts[: len(short.texts)] == short.texts
    assert min(more.made) >= 8 and len(more.made) == len(set(more.made))
    assert longer == sample(tmp_path / "fresh.jsonl", 900)
    unused = Generator(dies_after=0)
    assert sample(path, 300, unused) == short and unused.made == []


@pytest.mark.parametrize("dies_after", [0, 3, 8, 13])
def test_interruption_changes_no_text(tmp_path: Path, dies_after: int) -> None:
    path = tmp_path / "own.jsonl"
    with pytest.raises(KeyboardInterrupt):
        sample(path, 900, Generator(dies_after=dies_after))
    resumed = Generator()
    assert sample(path, 900, resumed) == sample(tmp_path / "fresh.jsonl", 900)
    assert resumed.made == list(range(dies_after, max(resumed.made) + 1))


def test_group_size_changes_no_text(tmp_path: Path) -> None:
    texts = {sample(tmp_path / f"{n}.jsonl", 900, Generator(group_size=n)) for n in (1, 5, 32)}
    assert len(texts) == 1


def test_torn_line_is_dropped_and_sampled_again(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    whole = sample(path, 300, Generator(group_size=1))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:40])
    again = Generator(group_size=1)
    assert sample(path, 300, again) == whole
    assert again.made == [len(lines) - 2]


@pytest.mark.parametrize("old, new", [(b"again", b"AGAIN"), (b'"kind":"text"', b'"kind":"junk"')])
def test_damaged_cache_is_replaced(tmp_path: Path, old: bytes, new: bytes) -> None:
    path = tmp_path / "own.jsonl"
    whole = sample(path, 300)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"Clara", b"Carla", 1).replace(old, new, 1))
    if path.read_bytes() == content:  # no such word in the texts
        path.write_bytes(content[:200] + b"x" + content[201:])
    assert sample(path, 300) == whole
    assert path.read_bytes() == content


def test_cache_of_another_identity_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    sample(path, 300)
    with open_cache(path, {**IDENTITY, "weights": "other"}) as cache:
        assert len(cache) == 0


def test_every_part_of_the_identity_changes_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    base = {"model": "m", "tokenizer": "t", "prompts": 1, "seed": "calibration 0", "kinds": ["web"]}
    changed = [{**base, key: "other"} for key in base]
    assert len({locate_cache(identity) for identity in [base, *changed]}) == len(base) + 1
    monkeypatch.setenv("QUANTKIT_CACHE", "/elsewhere")
    assert locate_cache(base).is_relative_to("/elsewhere/self-text")


def test_cache_in_use_names_its_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_text, "LOCK_SECONDS", 0.1)
    path = tmp_path / "own.jsonl"
    with hold_lock(path.with_suffix(".lock")), pytest.raises(UsageError, match="sampling job"):
        sample(path, 300)


def test_degenerate_answers_are_dropped_and_counted(tmp_path: Path) -> None:
    def judge(answer: str, n_tokens: int = 100) -> str:
        return find_degeneration(
            SampledText(index=0, text=f"x{answer}", start=1, n_tokens=n_tokens, ended=True)
        )

    prose = " ".join(hashlib.sha256(bytes([i])).hexdigest()[:7] for i in range(200))
    assert judge(prose) == judge("Yes, of course I can.") == ""
    assert judge(" \n") == judge("Yes.", 2) == "short"
    assert judge("the cat and " * 100) == judge(prose + " no" * 800) == "repeated"
    with pytest.raises(CalibrationError, match="found 64 of 64 answers empty or repeated"):
        sample(tmp_path / "own.jsonl", 5000, Generator(loops=True))


def test_count_of_cached_tokens_reads_only(tmp_path: Path) -> None:
    assert count_cached_tokens(tmp_path, 100) == 0
    sample(tmp_path / "own.jsonl", 300)
    with (tmp_path / "own.jsonl").open("ab") as file:
        file.write(b'{"sha256":')
    before = (tmp_path / "own.jsonl").read_bytes()
    n_texts = before.count(b'"kind":"text"')
    assert count_cached_tokens(tmp_path, 100) == 20 * n_texts
    assert count_cached_tokens(tmp_path, 5) == 5 * n_texts
    assert (tmp_path / "own.jsonl").read_bytes() == before


def test_killed_process_resumes(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    command = (
        "import sys; from pathlib import Path; from texts.test_self_text import Generator, sample; "
        "sample(Path(sys.argv[1]), 900, Generator(dies_after=11, kills=True))"
    )
    tests = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([tests, *sys.path])}
    run = subprocess.run([sys.executable, "-c", command, str(path)], env=environment)
    assert run.returncode == -signal.SIGKILL
    resumed = Generator()
    assert sample(path, 900, resumed) == sample(tmp_path / "fresh.jsonl", 900)
    assert resumed.made[0] == 11
