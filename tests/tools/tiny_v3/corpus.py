"""The seeded corpus of tiny-v3: word problems, arithmetic, Python functions, English.

An item is held out if `crc32(repr(key)) % 40 == 0`. The key contains the template and its numbers,
not the wording, so no rewording of a held-out item is trained on. All draws come from the given
`random.Random` in a fixed order: the text is a pure function of the seed, and the order of draws
must not change.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from string import Formatter
from typing import Literal

from tools.tiny_v3.templates import FunctionTemplate, WordProblem, load_templates

Kind = Literal["math_item", "arith_item", "code_item", "eng_item"]
Domain = Literal["prose", "math", "code"]

MIX: Mapping[Kind, float] = {
    "math_item": 0.46,
    "arith_item": 0.16,
    "code_item": 0.30,
    "eng_item": 0.08,
}
DOMAIN: Mapping[Kind, Domain] = {
    "math_item": "math",
    "arith_item": "math",
    "code_item": "code",
    "eng_item": "prose",
}
HELD_OUT_ONE_IN = 40

TEMPLATES = load_templates()
WORDS = TEMPLATES.words


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One document: the model's `prompt` and the expected `answer`; prose has no prompt.

    `result` is the number of a math item; `function` and `template` belong to a code item.
    """

    kind: Kind
    key: tuple[object, ...]
    prompt: str
    answer: str
    result: int | None = None
    function: str = ""
    template: int = -1

    @property
    def text(self) -> str:
        return self.prompt + self.answer

    @property
    def held_out(self) -> bool:
        return zlib.crc32(repr(self.key).encode()) % HELD_OUT_ONE_IN == 0


def draw_kind(rng: random.Random) -> Kind:
    """Draw a kind of item in the proportions of the training mix."""
    return rng.choices(list(MIX), list(MIX.values()))[0]


def draw_item(kind: Kind, rng: random.Random) -> Item:
    """Draw one item of a kind, held out or not."""
    if kind == "math_item":
        return make_word_problem(rng)
    if kind == "arith_item":
        return make_arithmetic(rng)
    if kind == "code_item":
        return make_function_item(rng)
    return make_english(rng)


def make_training_items(seed: int, count: int) -> list[Item]:
    """Return `count` items in the training mix, none of them held out."""
    rng = random.Random(seed)
    items: list[Item] = []
    while len(items) < count:
        item = draw_item(draw_kind(rng), rng)
        if not item.held_out:
            items.append(item)
    return items


def make_word_problem(rng: random.Random) -> Item:
    """Return a word problem of one to three steps; the answer has GSM8K's form (`#### N`)."""
    index = rng.randrange(len(TEMPLATES.word_problems))
    problem = TEMPLATES.word_problems[index]
    values = _draw_numbers(problem, rng)
    scene = _draw_scene(rng)
    question = problem.questions[rng.randrange(len(problem.questions))].format(**scene, **values)
    sentences = [step.sentence.format(**scene, **values) for step in problem.steps]
    result = values[f"v{len(problem.steps)}"]
    return Item(
        kind="math_item",
        key=("m", index, scene["n"], scene["o"], tuple(sorted(values.items()))),
        prompt=f"Question: {question}\nAnswer:",
        answer=" " + " ".join(sentences) + f"\n#### {result}",
        result=result,
    )


def _draw_numbers(problem: WordProblem, rng: random.Random) -> dict[str, int]:
    """Draw numbers until every bound holds and every result is positive; add the results."""
    while True:
        values = {name: rng.randint(low, high) for name, (low, high) in problem.ranges.items()}
        if "q" in values:  # a division without remainder: draw divisor and quotient
            values["a"] = values["q"] * values["c"]
        bounded = all(values[name] <= most for name, most in problem.at_most.items())
        for number, step in enumerate(problem.steps, start=1):
            values[f"v{number}"] = step.value(values)
        if bounded and all(values[f"v{number}"] > 0 for number in range(1, len(problem.steps) + 1)):
            return values


def _draw_scene(rng: random.Random) -> dict[str, str]:
    """Return people, things and places by placeholder name."""
    first, second, third = rng.sample(WORDS["name"], 3)
    thing, other = rng.sample(WORDS["thing"], 2)
    day, later = rng.sample(WORDS["day"], 2)
    he = "She" if first in WORDS["female"] else "He"
    return {
        "n": first,
        "m": second,
        "w": third,
        "o": thing,
        "p": other,
        "b": rng.choice(WORDS["container"]),
        "he": he,
        "hel": he.lower(),
        "pl": rng.choice(WORDS["place"]),
        "d1": day,
        "d2": later,
    }


def make_arithmetic(rng: random.Random) -> Item:
    """Return one bare calculation with two or three numbers."""
    operation = rng.choice("++--**/3")
    if operation == "3":
        expression, worked, result = _draw_three_numbers(rng)
    else:
        expression, result = _draw_two_numbers(operation, rng)
        worked = f"{expression} = {result}"
    question = rng.choice(TEMPLATES.arithmetic_questions).format(e=expression)
    return Item(
        kind="arith_item",
        key=("a", expression),
        prompt=f"Question: {question}\nAnswer:",
        answer=f" {worked}.\n#### {result}",
        result=result,
    )


def _draw_two_numbers(operation: str, rng: random.Random) -> tuple[str, int]:
    """Return expression and result; differences are not negative, quotients are whole."""
    if operation in "+-":
        low, high = (10, 999) if rng.random() < 0.6 else (2, 99)
        left, right = rng.randint(low, high), rng.randint(low, high)
        if operation == "+":
            return f"{left} + {right}", left + right
        left, right = max(left, right), min(left, right)
        return f"{left} - {right}", left - right
    if operation == "*":
        left, right = rng.randint(2, 99), rng.randint(2, 12)
        return f"{left} * {right}", left * right
    divisor, quotient = rng.randint(2, 12), rng.randint(2, 20)
    return f"{divisor * quotient} / {divisor}", quotient


def _draw_three_numbers(rng: random.Random) -> tuple[str, str, int]:
    """Return expression, worked solution and result of a sum plus or minus a third number."""
    first, second, third = rng.randint(2, 60), rng.randint(2, 60), rng.randint(2, 60)
    partial = first + second
    minus = third < partial and rng.random() < 0.5
    sign, result = ("-", partial - third) if minus else ("+", partial + third)
    expression = f"{first} + {second} {sign} {third}"
    return (
        expression,
        f"{first} + {second} = {partial}. {partial} {sign} {third} = {result}",
        result,
    )


def make_function_item(rng: random.Random) -> Item:
    """Return a Python function: the prompt is its head and docstring, the answer its body."""
    index = rng.randrange(len(TEMPLATES.functions))
    template = TEMPLATES.functions[index]
    constants = {name: rng.randint(low, high) for name, (low, high) in template.constants.items()}
    parameter = rng.choice(TEMPLATES.parameters[template.kind])
    name = rng.choice(template.names).format(**constants)
    doc = rng.choice(template.docs).format(x=parameter, **constants)
    body = template.body.format(x=parameter, **constants)
    parameters = "a, b" if template.kind == "two numbers" else parameter
    return Item(
        kind="code_item",
        key=("c", index, tuple(sorted(constants.items())), name),
        prompt=f'def {name}({parameters}):\n    """{doc}"""\n',
        answer="".join(f"    {line}\n" for line in body.split("\n")),
        function=name,
        template=index,
    )


def draw_arguments(template: FunctionTemplate, rng: random.Random) -> tuple[object, ...]:
    """Draw the arguments of one test of a function."""
    kind = template.arguments
    if kind == "integer":
        return (rng.randint(-30, 60),)
    if kind == "positive":
        return (rng.randint(1, 40),)
    if kind == "two integers":
        return (rng.randint(-20, 40), rng.randint(-20, 40))
    if kind == "integers":
        return ([rng.randint(-20, 60) for _ in range(rng.randint(1, 8))],)
    if kind == "text":
        return (_draw_letters("abcdeio uAEBc1", 9, rng),)
    if kind == "sentence":
        return (" ".join(_draw_letters("abcde", 5, rng) for _ in range(rng.randint(1, 5))),)
    if kind == "texts":
        return ([_draw_letters("abcde", 6, rng) for _ in range(rng.randint(1, 5))],)
    raise ValueError(f"templates.json: functions: unknown kind of arguments {kind!r}")


def _draw_letters(alphabet: str, most: int, rng: random.Random) -> str:
    return "".join(rng.choice(alphabet) for _ in range(rng.randint(1, most)))


def make_english(rng: random.Random) -> Item:
    """Return two to four sentences about two people and an animal."""
    first, second = rng.sample(WORDS["name"], 2)
    female = first in WORDS["female"]
    fixed = {
        "n": first,
        "m": second,
        "he": "she" if female else "he",
        "her": "her" if female else "his",
        "a": rng.choice(WORDS["animal"]),
        "v": rng.choice(WORDS["verb"]),
        "l": rng.choice(WORDS["location"]),
        "t": rng.choice(WORDS["time"]),
    }
    sentences = [_fill_sentence(sentence, fixed, rng) for sentence in TEMPLATES.english_sentences]
    text = " ".join(rng.sample(sentences, rng.randint(2, 4)))
    return Item(kind="eng_item", key=("e", text), prompt="", answer=text)


def _fill_sentence(sentence: str, fixed: Mapping[str, str], rng: random.Random) -> str:
    """Fill fixed placeholders with their word, others with a random word of their list."""
    parts: list[str] = []
    for literal, field, _, _ in Formatter().parse(sentence):
        parts.append(literal)
        if field is not None:
            parts.append(fixed[field] if field in fixed else rng.choice(WORDS[field]))
    return "".join(parts)
