"""Benchmark prompts in calibration text: runs of words, prompts of a build's tasks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quantkit.evaluate.prompt_overlap import NO_LOCAL_DATA, check_overlaps
from quantkit.texts.overlap import RUN, TextRuns, count_overlaps, hash_runs, list_words

PROMPT = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in "
    "May. How many clips did Natalia sell altogether in April and May?"
)
TASK = """
quantkit: {{domain: math, local: {{test: {file}}}}}
task: mine
output_type: generate_until
test_split: test
num_fewshot: 0
doc_to_text: "Question: {{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], do_sample: false, max_gen_toks: 8}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.mark.parametrize(
    "text",
    [
        f"Before. {PROMPT} After.",
        PROMPT.upper().replace(" ", "\n").replace(",", " -"),  # case, blanks and punctuation
        PROMPT.removeprefix("Natalia "),  # most of it
    ],
)
def test_prompt_in_text_overlaps(text: str) -> None:
    assert count_overlaps(TextRuns([text]), [PROMPT]) == 1


@pytest.mark.parametrize(
    "text",
    [
        PROMPT[: len(PROMPT) // 2],
        PROMPT.replace("clips", "coins").replace("sold", "bought").replace("and", "then"),
        " ".join(reversed(PROMPT.split())),
        "",
    ],
)
def test_other_text_does_not_overlap(text: str) -> None:
    assert count_overlaps(TextRuns([text]), [PROMPT]) == 0


def test_prompts_of_one_template_do_not_overlap() -> None:
    """A run of 13 words is shared, and other texts have the rest, but no text has the line."""
    line = "{0} earns {1} dollars an hour and works {2} hours a day. How much are {3} days for {0}?"
    mine = line.format("Owen", 5, 8, 2)
    others = [line.format("Jack", 9, 8, 2), line.format("Owen", 5, 7, 3)]
    assert max(len(hash_runs(list_words(text), RUN)) for text in others) > 0
    assert count_overlaps(TextRuns(others), [mine]) == 0
    assert count_overlaps(TextRuns([*others, mine]), [mine]) == 1


def test_one_line_of_a_prompt_is_enough_and_the_frame_is_not() -> None:
    """As MBPP's prompts: a sentence, tests, and a frame that all items have."""
    frame = "You are an expert Python programmer and here is your task, with tests that must pass"
    numbers = ("seven", "eight", "nine", "ten", "twelve", "forty", "sixty")
    sentence = "Write a function to find the {0} largest of all {0} numbers in {0} lists of {0}"
    sentences = [sentence.format(number) for number in numbers]
    prompts = [f"{frame}\n{text}\nassert f([1, 2, 3]) == {n}" for n, text in enumerate(sentences)]
    runs = TextRuns([f"# {sentences[2]}\ndef f(numbers): ...", frame])
    assert count_overlaps(runs, prompts) == 1


def test_short_prompts_count_as_a_whole_and_tiny_ones_do_not() -> None:
    runs = TextRuns(["the text asks: what is the largest city of France? and answers it"])
    assert count_overlaps(runs, ["What is the largest city of France?"]) == 1
    assert count_overlaps(runs, ["What is the largest city of Spain?"]) == 0
    assert count_overlaps(runs, ["the largest city"]) == 0


def test_ideographs_are_words() -> None:
    assert list_words("同样，施力 abc") == ("同", "样", "施", "力", "abc")
    text = "同样，施力的大小不同，引起的加速度不同，最终的结果也不一样。"
    assert count_overlaps(TextRuns([f"前{text}后"]), [text]) == 1


def write_task(folder: Path, questions: list[str]) -> str:
    rows = [json.dumps({"question": question, "answer": "72"}) for question in questions]
    (folder / "data").mkdir()
    (folder / "data" / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (folder / "mine.yaml").write_text(TASK.format(file="rows.jsonl"), encoding="utf-8")
    return str(folder / "mine.yaml")


def test_tasks_of_the_recipe_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QUANTKIT_DATA", raising=False)
    name = write_task(tmp_path, [PROMPT, "Another question with more than six words of its own?"])
    (mine, *shipped) = check_overlaps([name], [f"Question: {PROMPT}"])
    assert (mine.task, mine.items, mine.overlapping, mine.reason) == ("mine", 2, 1, "")
    # the shipped tasks with data in the package; gsm8k and others have none here
    assert {row.task for row in shipped} == {"tiny-v3-code", "tiny-v3-math"}
    assert all(row.overlapping == 0 < row.items for row in shipped)


def test_named_task_without_data_has_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QUANTKIT_DATA", raising=False)
    row = next(row for row in check_overlaps(["gsm8k"], ["text"]) if row.task == "gsm8k")
    assert (row.items, row.overlapping, row.reason) == (0, 0, NO_LOCAL_DATA)
