"""Seeded exercises with a worked solution: fractions, algebra, sequences, geometry, divisibility, chance.

Some are set in plain text and some in LaTeX, as the text that real models were trained on is.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from fractions import Fraction

from tools.calibration_sets.word_problems import WORD_PROBLEMS, Problem


def latex(value: Fraction) -> str:
    """A fraction in LaTeX."""
    if value.denominator == 1:
        return str(value.numerator)
    sign = "-" if value < 0 else ""
    return f"{sign}\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


def signed(value: int, symbol: str = "") -> str:
    """A term with its sign in front: "+ 3x", "- x"."""
    number = "" if symbol and abs(value) == 1 else str(abs(value))
    return f"{'-' if value < 0 else '+'} {number}{symbol}"


def nonzero(rng: random.Random, most: int) -> int:
    """A number from -most to most that is not zero."""
    return rng.choice((-1, 1)) * rng.randint(1, most)


def fraction_sum(rng: random.Random) -> Problem:
    """A sum or difference of two fractions over their least common denominator."""
    first = Fraction(rng.randint(1, 11), rng.randint(2, 12))
    second = Fraction(rng.randint(1, 11), rng.randint(2, 12))
    plus = rng.random() < 0.5
    common = math.lcm(first.denominator, second.denominator)
    left, right = (
        first.numerator * common // first.denominator,
        second.numerator * common // second.denominator,
    )
    sign = "+" if plus else "-"
    result = first + second if plus else first - second
    raw = left + right if plus else left - right
    question = f"Compute ${latex(first)} {sign} {latex(second)}$ and simplify."
    solution = (
        f"The least common denominator is {common}. We have ${latex(first)} = {left}/{common}$ and "
        f"${latex(second)} = {right}/{common}$, so the result is ${raw}/{common} = {latex(result)}$. "
        f"The answer is $\\boxed{{{latex(result)}}}$."
    )
    return question, solution


def linear_equation(rng: random.Random) -> Problem:
    """An equation with the unknown on both sides."""
    root, left, right = nonzero(rng, 12), rng.randint(4, 15), rng.randint(1, 3)
    shift = nonzero(rng, 30)
    other = left * root + shift - right * root
    question = f"Solve for x: {left}x {signed(shift)} = {right}x {signed(other)}."
    solution = (
        f"Subtract {right}x from both sides: {left - right}x {signed(shift)} = {other}. Then {left - right}x = {other} "
        f"{signed(-shift)} = {other - shift}. Divide by {left - right}: x = {root}. Check: {left} × ({root}) "
        f"{signed(shift)} = {left * root + shift} and {right} × ({root}) {signed(other)} = {right * root + other}."
    )
    return question, solution


def quadratic(rng: random.Random) -> Problem:
    """A quadratic with whole roots, solved by the formula and by factors."""
    first, second = nonzero(rng, 9), nonzero(rng, 9)
    linear, constant = -(first + second), first * second
    middle = f" {signed(linear, 'x')}" if linear else ""
    inside = linear * linear - 4 * constant
    question = f"Find all real solutions of $x^2{middle} {signed(constant)} = 0$."
    roots = (
        f"x = {first}"
        if first == second
        else f"x = {min(first, second)} and x = {max(first, second)}"
    )
    solution = (
        f"The discriminant is $b^2 - 4ac = {linear * linear} {signed(-4 * constant)} = {inside}$, whose square root is "
        f"{math.isqrt(inside)}. So $x = \\frac{{{-linear} \\pm {math.isqrt(inside)}}}{{2}}$, that is {roots}. "
        f"Indeed $(x {signed(-first)})(x {signed(-second)}) = x^2{middle} {signed(constant)}$."
    )
    return question, solution


def two_equations(rng: random.Random) -> Problem:
    """Two linear equations, solved by elimination."""
    x, y = nonzero(rng, 9), nonzero(rng, 9)
    a, b, c = rng.randint(2, 5), nonzero(rng, 5), rng.randint(2, 6)
    first, second = a * x + b * y, c * x + y
    slope = a - b * c
    if slope == 0:
        return two_equations(rng)
    question = f"Solve the system\n    {a}x {signed(b, 'y')} = {first}\n    {c}x + y = {second}"
    solution = (
        f"From the second equation y = {second} - {c}x. Put this into the first: {a}x {signed(b)}({second} - {c}x) = "
        f"{first}, so {a}x {signed(b * second)} {signed(-b * c, 'x')} = {first}. Collecting terms, {slope}x = "
        f"{first - b * second}, so x = {x}. Then y = {second} - {c} × ({x}) = {y}. The solution is (x, y) = ({x}, {y})."
    )
    return question, solution


def percent_change(rng: random.Random) -> Problem:
    """A rise and a fall in percent, one after the other."""
    start, up, down = (
        200 * rng.randint(1, 40),
        rng.choice((10, 20, 25, 50)),
        rng.choice((10, 20, 30, 40)),
    )
    high = Fraction(start * (100 + up), 100)
    end = high * (100 - down) / 100
    change = (end - start) * 100 / start
    question = (
        f"A quantity of {start} rises by {up}% and then falls by {down}%. What is its final value, and what is the "
        f"change in percent from the start?"
    )
    solution = (
        f"After the rise it is {start} × {1 + up / 100:g} = {float(high):g}. After the fall it is {float(high):g} × "
        f"{1 - down / 100:g} = {float(end):g}. The ratio to the start is {float(end):g} / {start} = "
        f"{float(end / start):g}, a change of {float(change):+g}%."
    )
    return question, solution


def progression(rng: random.Random) -> Problem:
    """Term and sum of an arithmetic progression, with Gauss's formula."""
    first, step, count = rng.randint(-10, 20), nonzero(rng, 9), rng.randint(8, 40)
    last = first + (count - 1) * step
    total = count * (first + last) // 2
    question = (
        f"An arithmetic progression starts {first}, {first + step}, {first + 2 * step}, ... Find its term number "
        f"{count} and the sum of its first {count} terms."
    )
    solution = (
        f"The common difference is {step}. Term number {count} is {first} + {count - 1} × ({step}) = {last}. The sum "
        f"is {count} × ({first} + ({last})) / 2 = {count} × {first + last} / 2 = {total}."
    )
    return question, solution


def rectangle(rng: random.Random) -> Problem:
    """A rectangle with a border: areas and a length in other units."""
    width, height, border = rng.randint(8, 30), rng.randint(5, 20), rng.randint(1, 3)
    outer = (width + 2 * border) * (height + 2 * border)
    area = outer - width * height
    around = 2 * (width + height + 4 * border)
    question = (
        f"A garden of {width} m by {height} m is surrounded by a path {100 * border} cm wide. Find the area of the "
        f"path in square metres and the length of a fence around the outside."
    )
    solution = (
        f"{100 * border} cm are {border} m. With the path the rectangle is {width + 2 * border} m by "
        f"{height + 2 * border} m, an area of {outer} m². The garden has {width} × {height} = {width * height} m². The "
        f"path has {outer} - {width * height} = {area} m². The fence is 2 × ({width + 2 * border} + "
        f"{height + 2 * border}) = {around} m long."
    )
    return question, solution


def right_triangle(rng: random.Random) -> Problem:
    """A Pythagorean triangle."""
    larger = rng.randint(2, 7)
    smaller = rng.randint(1, larger - 1)
    scale = rng.randint(1, 3)
    legs = sorted((scale * (larger**2 - smaller**2), scale * 2 * larger * smaller))
    hypotenuse = scale * (larger**2 + smaller**2)
    question = (
        f"The legs of a right triangle are {legs[0]} and {legs[1]}. Find the hypotenuse, the area and the height over "
        f"the hypotenuse."
    )
    area = Fraction(legs[0] * legs[1], 2)
    solution = (
        f"By Pythagoras, $c^2 = {legs[0]}^2 + {legs[1]}^2 = {legs[0] ** 2} + {legs[1] ** 2} = {hypotenuse**2}$, so "
        f"$c = {hypotenuse}$. The area is ${legs[0]} \\cdot {legs[1]} / 2 = {area}$. The area is also $c h / 2$, so "
        f"$h = 2 \\cdot {area} / {hypotenuse} = {latex(2 * area / hypotenuse)}$."
    )
    return question, solution


def common_divisor(rng: random.Random) -> Problem:
    """Euclid's algorithm step by step."""
    factor = rng.randint(2, 24)
    larger, smaller = factor * rng.randint(20, 60), factor * rng.randint(5, 19)
    steps, a, b = [], larger, smaller
    while b:
        steps.append(f"{a} = {a // b} × {b} + {a % b}")
        a, b = b, a % b
    question = (
        f"Find the greatest common divisor and the least common multiple of {larger} and {smaller}."
    )
    solution = (
        f"Euclid's algorithm: {'; '.join(steps)}. The last remainder that is not zero is {a}, so the greatest common "
        f"divisor is {a}. The least common multiple is {larger} × {smaller} / {a} = {larger * smaller // a}."
    )
    return question, solution


def chance(rng: random.Random) -> Problem:
    """Two balls without replacement."""
    red, blue = rng.randint(2, 9), rng.randint(2, 9)
    total = red + blue
    same = Fraction(red * (red - 1) + blue * (blue - 1), total * (total - 1))
    question = (
        f"An urn holds {red} red and {blue} blue balls. Two are drawn without putting the first one back. What is the "
        f"probability that they have the same colour?"
    )
    solution = (
        f"Both red: {red}/{total} × {red - 1}/{total - 1} = {Fraction(red * (red - 1), total * (total - 1))}. Both "
        f"blue: {blue}/{total} × {blue - 1}/{total - 1} = {Fraction(blue * (blue - 1), total * (total - 1))}. Added, "
        f"the probability is {same}, about {float(same):.3f}."
    )
    return question, solution


def mean_and_median(rng: random.Random) -> Problem:
    """Mean, median and range of a short list."""
    values = [rng.randint(1, 60) for _ in range(rng.choice((5, 7, 9)))]
    ordered = sorted(values)
    question = f"Find the mean, the median and the range of {', '.join(map(str, values))}."
    mean = Fraction(sum(values), len(values))
    solution = (
        f"Sorted: {', '.join(map(str, ordered))}. The sum is {sum(values)}, so the mean is {sum(values)} / "
        f"{len(values)} = {float(mean):.4g}. The value in the middle, number {len(values) // 2 + 1} of {len(values)}, "
        f"is {ordered[len(values) // 2]}. The range is {ordered[-1]} - {ordered[0]} = {ordered[-1] - ordered[0]}."
    )
    return question, solution


def derivative(rng: random.Random) -> Problem:
    """Derivative and tangent of a cubic."""
    a, b, c, at = rng.randint(2, 6), nonzero(rng, 8), nonzero(rng, 9), nonzero(rng, 3)
    value, slope = a * at**3 + b * at**2 + c * at, 3 * a * at**2 + 2 * b * at + c
    question = f"Let $f(x) = {a}x^3 {signed(b, 'x^2')} {signed(c, 'x')}$. Find the tangent line at $x = {at}$."
    solution = (
        f"$f'(x) = {3 * a}x^2 {signed(2 * b, 'x')} {signed(c)}$, so $f'({at}) = {slope}$. Also $f({at}) = {value}$. "
        f"The tangent is $y = {slope}(x {signed(-at)}) {signed(value)}$, that is "
        f"$y = {slope}x {signed(value - slope * at)}$."
    )
    return question, solution


EXERCISES: tuple[Callable[[random.Random], Problem], ...] = (
    fraction_sum, linear_equation, quadratic, two_equations, percent_change, progression, rectangle, right_triangle,
    common_divisor, chance, mean_and_median, derivative,
)  # fmt: skip

LAYOUTS = (
    "Question: {question}\n\nSolution: {solution}",
    "Problem. {question}\n\n{solution}",
    "Q: {question}\nA: {solution}",
    "## Exercise\n\n{question}\n\n## Solution\n\n{solution}",
)


def problem_text(rng: random.Random) -> str:
    """One problem, of any kind, with its solution."""
    question, solution = rng.choice(WORD_PROBLEMS + EXERCISES)(rng)
    return rng.choice(LAYOUTS).format(question=question, solution=solution)
