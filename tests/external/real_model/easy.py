"""Two tasks for a model of 135 M parameters, whose scores of about 1 % on GSM8K and HumanEval are
too low to measure a loss.

`write_tasks` writes `easy-math` (200 word problems of one step, after three worked examples) and
`easy-code` (120 functions of one line from a signature and a docstring, after two examples) to a
folder, with the same content every time.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

SEED = 0
N_SUMS, N_EXAMPLES = 200, 3
NAMES = ["Tom", "Anna", "Ben", "Lucy", "Sam", "Mia", "Paul", "Nora", "Jack", "Emma"]
THINGS = ["apples", "books", "pencils", "coins", "cards", "stamps", "shells", "marbles"]
EXAMPLES = '''def double(n):
    """Return n multiplied by two."""
    return n * 2


def join_words(words):
    """Return the words joined by a space."""
    return " ".join(words)


'''
FIXED = (  # name(argument), docstring, body, two pairs of (argument, expected result)
    (
        "maximum(xs)",
        "Return the largest number in the list xs.",
        "max(xs)",
        ([1, 5, 2], 5),
        ([-3, -1], -1),
    ),
    (
        "minimum(xs)",
        "Return the smallest number in the list xs.",
        "min(xs)",
        ([1, 5, 2], 1),
        ([-3, -1], -3),
    ),
    (
        "total(xs)",
        "Return the sum of the numbers in the list xs.",
        "sum(xs)",
        ([1, 5, 2], 8),
        ([], 0),
    ),
    (
        "mean(xs)",
        "Return the average of the list xs.",
        "sum(xs) / len(xs)",
        ([1, 5, 3], 3),
        ([4], 4),
    ),
    (
        "length(xs)",
        "Return the number of elements in the list xs.",
        "len(xs)",
        ([1, 5, 3], 3),
        ([], 0),
    ),
    ("first(xs)", "Return the first element of the list xs.", "xs[0]", ([4, 5], 4), ([9], 9)),
    ("last(xs)", "Return the last element of the list xs.", "xs[-1]", ([4, 5], 5), ([9], 9)),
    (
        "tail(xs)",
        "Return the list xs without its first element.",
        "xs[1:]",
        ([4, 5], [5]),
        ([9], []),
    ),
    ("reverse(xs)", "Return the list xs reversed.", "xs[::-1]", ([1, 2, 3], [3, 2, 1]), ([], [])),
    (
        "ascending(xs)",
        "Return the list xs in ascending order.",
        "sorted(xs)",
        ([3, 1, 2], [1, 2, 3]),
        ([], []),
    ),
    (
        "unique(xs)",
        "Return the set of elements of the list xs.",
        "set(xs)",
        ([1, 1, 2], {1, 2}),
        ([], set()),
    ),
    (
        "evens(xs)",
        "Return the even numbers of xs.",
        "[x for x in xs if x % 2 == 0]",
        ([1, 2, 4], [2, 4]),
        ([], []),
    ),
    (
        "odds(xs)",
        "Return the odd numbers of xs.",
        "[x for x in xs if x % 2 == 1]",
        ([1, 2, 3], [1, 3]),
        ([], []),
    ),
    (
        "squares(xs)",
        "Return the square of each number in xs.",
        "[x ** 2 for x in xs]",
        ([1, 3], [1, 9]),
        ([], []),
    ),
    (
        "doubled(xs)",
        "Return each number in xs doubled.",
        "[x * 2 for x in xs]",
        ([1, 3], [2, 6]),
        ([], []),
    ),
    (
        "positives(xs)",
        "Return the positive numbers of xs.",
        "[x for x in xs if x > 0]",
        ([1, -2], [1]),
        ([], []),
    ),
    (
        "negatives(xs)",
        "Return the negative numbers of xs.",
        "[x for x in xs if x < 0]",
        ([1, -2], [-2]),
        ([], []),
    ),
    (
        "is_empty(xs)",
        "Return True if the list xs is empty.",
        "len(xs) == 0",
        ([], True),
        ([1], False),
    ),
    ("upper(s)", "Return the string s in upper case.", "s.upper()", ("ab", "AB"), ("", "")),
    ("lower(s)", "Return the string s in lower case.", "s.lower()", ("AB", "ab"), ("", "")),
    ("title(s)", "Return the string s in title case.", "s.title()", ("ab cd", "Ab Cd"), ("x", "X")),
    ("reverse_string(s)", "Return the string s reversed.", "s[::-1]", ("abc", "cba"), ("", "")),
    (
        "is_palindrome(s)",
        "Return True if s is a palindrome.",
        "s == s[::-1]",
        ("aba", True),
        ("ab", False),
    ),
    (
        "first_char(s)",
        "Return the first character of the string s.",
        "s[0]",
        ("abc", "a"),
        ("z", "z"),
    ),
    (
        "last_char(s)",
        "Return the last character of the string s.",
        "s[-1]",
        ("abc", "c"),
        ("z", "z"),
    ),
    (
        "strip_spaces(s)",
        "Return s without spaces at its ends.",
        "s.strip()",
        (" a ", "a"),
        ("b", "b"),
    ),
    (
        "words(s)",
        "Return the list of words in the string s.",
        "s.split()",
        ("a b", ["a", "b"]),
        ("x", ["x"]),
    ),
    (
        "n_chars(s)",
        "Return the number of characters in the string s.",
        "len(s)",
        ("abc", 3),
        ("", 0),
    ),
    ("n_words(s)", "Return the number of words in s.", "len(s.split())", ("a b", 2), ("x", 1)),
    ("to_int(s)", "Return the string s as an integer.", "int(s)", ("12", 12), ("-3", -3)),
    ("to_float(s)", "Return the string s as a float.", "float(s)", ("1.5", 1.5), ("-3", -3.0)),
    (
        "is_digit(s)",
        "Return True if s consists of digits.",
        "s.isdigit()",
        ("12", True),
        ("a", False),
    ),
    (
        "is_alpha(s)",
        "Return True if s consists of letters.",
        "s.isalpha()",
        ("ab", True),
        ("1", False),
    ),
    ("is_even(n)", "Return True if n is even.", "n % 2 == 0", (4, True), (3, False)),
    ("is_odd(n)", "Return True if n is odd.", "n % 2 == 1", (4, False), (3, True)),
    ("is_positive(n)", "Return True if n is positive.", "n > 0", (4, True), (-3, False)),
    ("is_negative(n)", "Return True if n is negative.", "n < 0", (4, False), (-3, True)),
    ("is_zero(n)", "Return True if n is zero.", "n == 0", (4, False), (0, True)),
    ("square(n)", "Return the square of n.", "n ** 2", (4, 16), (-3, 9)),
    ("cube(n)", "Return the cube of n.", "n ** 3", (2, 8), (3, 27)),
    ("absolute(n)", "Return the absolute value of n.", "abs(n)", (4, 4), (-3, 3)),
    ("negate(n)", "Return n with its sign changed.", "-n", (4, -4), (-3, 3)),
    ("half(n)", "Return half of n.", "n / 2", (4, 2), (9, 4.5)),
    ("to_string(n)", "Return the number n as a string.", "str(n)", (4, "4"), (-3, "-3")),
    (
        "digits(n)",
        "Return the digits of n as a list of integers.",
        "[int(d) for d in str(n)]",
        (42, [4, 2]),
        (7, [7]),
    ),
    (
        "up_to(n)",
        "Return the list of numbers from 0 to n - 1.",
        "list(range(n))",
        (3, [0, 1, 2]),
        (0, []),
    ),
)


def iterate_sums() -> Iterator[dict[str, object]]:
    """Yield word problems of one step: question, the equation that solves it, its value."""
    rng = random.Random(SEED)
    while True:
        name, thing, kind = rng.choice(NAMES), rng.choice(THINGS), rng.randrange(4)
        a, b = (
            (rng.randint(2, 60), rng.randint(2, 60))
            if kind < 2
            else (rng.randint(2, 10), rng.randint(2, 10))
        )
        a, b = (max(a, b) + 1, min(a, b)) if kind == 1 else (a, b)
        question, sign, left, value = (
            (
                f"{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have now?",
                "+",
                a,
                a + b,
            ),
            (
                f"{name} has {a} {thing} and gives away {b}. How many {thing} are left?",
                "-",
                a,
                a - b,
            ),
            (
                f"{name} has {a} boxes with {b} {thing} each. How many {thing} does {name} have?",
                "*",
                a,
                a * b,
            ),
            (
                f"{name} shares {a * b} {thing} equally among {b} friends. How many {thing} does "
                "each get?",
                "/",
                a * b,
                a,
            ),
        )[kind]
        yield {
            "question": question,
            "solution": f"{left} {sign} {b} = {value}",
            "answer": str(value),
        }


def iterate_functions() -> Iterator[dict[str, object]]:
    """Yield functions of one line: prompt, body, and a test of one or two calls."""
    for word, sign in (("plus", "+"), ("minus", "-"), ("multiplied by", "*"), ("modulo", "%")):
        for k in range(2, 10):
            calls = [(x, {"+": x + k, "-": x - k, "*": x * k, "%": x % k}[sign]) for x in (4, 11)]
            yield make_function_row(
                f"{word.split()[0]}_{k}(x)", f"Return x {word} {k}.", f"x {sign} {k}", *calls
            )
    for word, sign in (("greater than", ">"), ("less than", "<"), ("equal to", "==")):
        for k in range(2, 10):
            calls = [(x, {">": x > k, "<": x < k, "==": x == k}[sign]) for x in (k, k + 3)]
            yield make_function_row(
                f"is_{word.split()[0]}_{k}(x)",
                f"Return True if x is {word} {k}.",
                f"x {sign} {k}",
                *calls,
            )
    for k in range(2, 8):
        numbers = [*range(9)]
        yield make_function_row(
            f"first_{k}(xs)",
            f"Return the first {k} elements of xs.",
            f"xs[:{k}]",
            (numbers, numbers[:k]),
        )
        yield make_function_row(
            f"last_{k}(xs)",
            f"Return the last {k} elements of xs.",
            f"xs[-{k}:]",
            (numbers, numbers[-k:]),
        )
        yield make_function_row(
            f"above_{k}(xs)",
            f"Return the numbers of xs that are greater than {k}.",
            f"[x for x in xs if x > {k}]",
            (numbers, numbers[k + 1 :]),
        )
    for signature, text, body, *calls in FIXED:
        yield make_function_row(signature, text, body, *calls)


def make_function_row(
    signature: str, text: str, body: str, *calls: tuple[object, object]
) -> dict[str, object]:
    """Return a row of easy-code."""
    asserts = "".join(
        f"    assert candidate({argument!r}) == {value!r}\n" for argument, value in calls
    )
    return {
        "prompt": f"{EXAMPLES}def {signature}:\n    "
        f'"""{text}"""',  # newline and indent are one token
        "canonical_solution": f"\n    return {body}",
        "test": f"def check(candidate):\n{asserts}",
        "entry_point": signature.split("(")[0],
    }


def write_tasks(folder: Path) -> tuple[str, str]:
    """Write easy-math.yaml and easy-code.yaml with their data to `folder`. Return their paths."""
    source = iterate_sums()
    worked = [next(source) for _ in range(N_EXAMPLES)]
    questions = [next(source) for _ in range(N_SUMS)]
    examples = "".join(
        f"Question: {row['question']}\nAnswer: {row['solution']}\n\n" for row in worked
    )
    common = {
        "output_type": "generate_until",
        "test_split": "test",
        "num_fewshot": 0,
        "metadata": {"version": 1.0},
    }
    math = {
        **common,
        "quantkit": {
            "domain": "math",
            "local": {"test": "easy-math.jsonl"},
            "gold": " {{solution}}",
        },
        "task": "easy-math",
        "doc_to_text": examples + "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 16},
        "filter_list": [
            {
                "name": "answer",
                "filter": [
                    {"function": "regex", "regex_pattern": "=\\s*(-?\\d+)"},
                    {"function": "take_first"},
                ],
            }
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    code = {
        **common,
        "quantkit": {
            "domain": "code",
            "local": {"test": "easy-code.jsonl"},
            "gold": "{{canonical_solution}}",
            "code": {
                "cut": "none",
                "source": "{{prompt}}{{completion}}",
                "tests": "{{test}}\ncheck({{entry_point}})",
                "seconds": 3,
            },
        },
        "task": "easy-code",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{canonical_solution}}",
        "generation_kwargs": {
            "until": ["\n\n", "\ndef ", "\nclass "],
            "do_sample": False,
            "max_gen_toks": 48,
        },
        "filter_list": [{"name": "pass@1", "filter": [{"function": "take_first"}]}],
        "metric_list": [{"metric": "bypass", "aggregation": "bypass", "higher_is_better": True}],
    }
    (folder / "data").mkdir()
    for task, rows in ((math, questions), (code, [*iterate_functions()])):
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / "data" / f"{task['task']}.jsonl").write_text("".join(lines), encoding="utf-8")
        (folder / f"{task['task']}.yaml").write_text(
            json.dumps(task, indent=1), encoding="utf-8"
        )  # JSON is YAML
    return str(folder / "easy-math.yaml"), str(folder / "easy-code.yaml")
