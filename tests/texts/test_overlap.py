"""Benchmark prompts in calibration text: runs of words, prompts of a build's tasks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quantkit.evaluate.prompt_overlap import NO_LOCAL_DATA, check_overlaps
from quantkit.texts.overlap import RUN, TextRuns, count_overlaps, list_words

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
        PROMPT[: int(0.9 * len(PROMPT))],  # most of it
    ],
)
def test_prompt_in_text_overlaps(text: str) -> None:
    assert count_overlaps([text], [PROMPT]) == 1


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
    assert count_overlaps([text], [PROMPT]) == 0


def test_prompts_of_one_template_do_not_overlap() -> None:
    """A run of 13 words is shared, most words are not."""
    frame = "a long introduction that every prompt of this kind of task has in common with others "
    assert len(frame.split()) >= RUN
    mine, other = (frame + " ".join(f"{word}{n}" for n in range(30)) for word in "ab")
    assert count_overlaps([other], [mine]) == 0


def test_short_prompts_count_as_a_whole_and_tiny_ones_do_not() -> None:
    runs = TextRuns(["the text asks: what is the largest city of France? and answers it"])
    assert runs.overlaps("What is the largest city of France?")
    assert not runs.overlaps("What is the largest city of Spain?")
    assert not runs.overlaps("the largest city")


def test_ideographs_are_words() -> None:
    assert list_words("同样，施力 abc") == ["同", "样", "施", "力", "abc"]
    text = "同样，施力的大小不同，引起的加速度不同，最终的结果也不一样。"
    assert count_overlaps([f"前{text}后"], [text]) == 1


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
