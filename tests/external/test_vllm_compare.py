"""Tests of the comparison rules of `make test-vllm`, without vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest
from external.vllm_cpu.compare import Answer, Step, compare_answers, read_answers, write_answers


def make_answer(
    *steps: tuple[int, dict[int, float]],
    task_id: str = "math/0",
    prompt_tokens: tuple[int, ...] = (0, 7),
):
    step_list = [Step(token=token, logprobs=logprobs) for token, logprobs in steps]
    return Answer(
        task_id=task_id,
        prompt="p",
        prompt_tokens=list(prompt_tokens),
        text=str(steps),
        steps=step_list,
    )


SURE = (3, {3: -0.01, 4: -4.6})
TIED = (5, {5: -0.6, 6: -0.9})
END = (1, {1: 0.0, 2: -20.0})
REFERENCE = make_answer(SURE, TIED, END)


def make_ten(changed: Answer) -> tuple[list[Answer], list[Answer]]:
    """Return ten reference answers, and the same with one changed (the largest allowed share)."""
    return [REFERENCE] * 10, [changed, *[REFERENCE] * 9]


def test_equal_answers_have_no_faults() -> None:
    result = compare_answers(*make_ten(REFERENCE))
    assert result.differences == () and result.faults == []
    assert result.margins == (0.0,) * 20  # EOS is decided and does not count
    assert (
        result.format_lines()[0]
        == "10 prompts: 10 answers equal token by token, 0 near-ties, 0 other differences"
    )


def test_near_tie_is_counted_and_accepted() -> None:
    result = compare_answers(*make_ten(make_answer(SURE, (6, {6: -0.7, 5: -0.75}), END)))
    assert result.faults == []
    assert result.format_lines()[1] == "near-tie: math/0, token 1, margin 0.300 nats"


def test_too_many_near_ties_are_a_fault() -> None:
    expected, actual = make_ten(make_answer(SURE, (6, {6: -0.7, 5: -0.75}), END))
    result = compare_answers(expected, [actual[0], actual[0], *actual[2:]])
    assert result.faults == [
        "2 of 10 answers differ at a margin above 0.1 nats, expected at most 10%"
    ]
    assert compare_answers(expected, [actual[0], actual[0], *actual[2:]], 0.31).faults == []
    assert compare_answers(expected, [actual[0], actual[0], *actual[2:]], 0.29).faults != []


def test_any_number_of_close_ties_is_accepted() -> None:
    close = make_answer(SURE, (5, {5: -0.69, 6: -0.7}), END)
    result = compare_answers([close] * 10, [make_answer(SURE, (6, {6: -0.69, 5: -0.7}), END)] * 10)
    assert result.faults == [] and len(result.differences) == 10


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        (make_answer((4, {4: -0.1, 3: -2.0}), TIED, END), "token 0 is no near-tie (margin 4.590"),
        (
            make_answer(SURE, (9, {9: -0.1, 5: -2.0}), END),
            "token 1 is no near-tie (margin beyond the candidates",
        ),
        (make_answer(SURE, TIED), "token 2 is no near-tie (margin beyond the candidates"),
        (
            make_answer(SURE, TIED, END, prompt_tokens=(7,)),
            "the prompt is no near-tie (margin beyond the candidates",
        ),
    ],
    ids=["sure", "unlikely", "shorter", "prompt"],
)
def test_other_differences_are_faults(changed: Answer, fault: str) -> None:
    result = compare_answers(*make_ten(changed))
    assert len(result.faults) == 1 and fault in result.faults[0]


def test_other_weights_with_equal_text_are_a_fault() -> None:
    other = make_answer((3, {3: -0.01, 4: -4.3}), (5, {5: -0.5, 6: -1.1}), END)
    result = compare_answers([REFERENCE] * 10, [other] * 10)
    assert result.differences == ()
    assert result.faults == [
        "margins moved by 0.300 nats in the median, expected at most 0.12: "
        "a change this large means other weights, not other arithmetic"
    ]


def test_answers_round_trip_through_json(tmp_path: Path) -> None:
    write_answers([REFERENCE], tmp_path / "answers.json")
    assert read_answers(tmp_path / "answers.json") == [REFERENCE]
