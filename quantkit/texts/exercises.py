"""Seeded exercises with worked solutions: fractions, algebra, sequences, geometry, probability.

Some are plain text and some LaTeX, as in the training text of real models.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from fractions import Fraction

from quantkit.texts.word_problems import Problem


def format_latex(value: Fraction) -> str:
    """Format a fraction in LaTeX."""
    if value.denominator == 1:
        return str(value.numerator)
    sign = "-" if value < 0 else ""
    return f"{sign}\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


def format_signed(value: int, symbol: str = "") -> str:
    """Format a term with its sign: "+ 3x", "- x"."""
    number = "" if symbol and abs(value) == 1 else str(abs(value))
    return f"{'-' if value < 0 else '+'} {number}{symbol}"


def draw_nonzero(rng: random.Random, most: int) -> int:
    """Draw a number from -most to most that is not zero."""
    return rng.choice((-1, 1)) * rng.randint(1, most)


def make_fraction_sum(rng: random.Random) -> Problem:
    """Make a problem: a sum or difference of two fractions over their least common denominator."""
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
    question = f"Compute ${format_latex(first)} {sign} {format_latex(second)}$ and simplify."
    solution = (
        f"The least common denominator is {common}. We have ${format_latex(first)} = "
        f"{left}/{common}$ and ${format_latex(second)} = {right}/{common}$, so the result is "
        f"${raw}/{common} = {format_latex(result)}$. The answer is "
        f"$\\boxed{{{format_latex(result)}}}$."
    )
    return question, solution


def make_linear_equation(rng: random.Random) -> Problem:
    """Make a problem: an equation with the unknown on both sides."""
    root, left, right = draw_nonzero(rng, 12), rng.randint(4, 15), rng.randint(1, 3)
    shift = draw_nonzero(rng, 30)
    other = left * root + shift - right * root
    question = f"Solve for x: {left}x {format_signed(shift)} = {right}x {format_signed(other)}."
    solution = (
        f"Subtract {right}x from both sides: {left - right}x {format_signed(shift)} = {other}. "
        f"Then {left - right}x = {other} {format_signed(-shift)} = {other - shift}. Divide by "
        f"{left - right}: x = {root}. Check: {left} × ({root}) {format_signed(shift)} = "
        f"{left * root + shift} and {right} × ({root}) {format_signed(other)} = "
        f"{right * root + other}."
    )
    return question, solution


def make_quadratic(rng: random.Random) -> Problem:
    """Make a problem: a quadratic with whole roots, solved by the formula and by factors."""
    first, second = draw_nonzero(rng, 9), draw_nonzero(rng, 9)
    linear, constant = -(first + second), first * second
    middle = f" {format_signed(linear, 'x')}" if linear else ""
    inside = linear * linear - 4 * constant
    question = f"Find all real solutions of $x^2{middle} {format_signed(constant)} = 0$."
    roots = (
        f"x = {first}"
        if first == second
        else f"x = {min(first, second)} and x = {max(first, second)}"
    )
    solution = (
        f"The discriminant is $b^2 - 4ac = {linear * linear} {format_signed(-4 * constant)} = "
        f"{inside}$, whose square root is {math.isqrt(inside)}. So $x = \\frac{{{-linear} \\pm "
        f"{math.isqrt(inside)}}}{{2}}$, that is {roots}. Indeed $(x {format_signed(-first)})(x "
        f"{format_signed(-second)}) = x^2{middle} {format_signed(constant)}$."
    )
    return question, solution


def make_two_equations(rng: random.Random) -> Problem:
    """Make a problem: two linear equations, solved by elimination."""
    x, y = draw_nonzero(rng, 9), draw_nonzero(rng, 9)
    a, b, c = rng.randint(2, 5), draw_nonzero(rng, 5), rng.randint(2, 6)
    first, second = a * x + b * y, c * x + y
    slope = a - b * c
    if slope == 0:
        return make_two_equations(rng)
    question = (
        f"Solve the system\n    {a}x {format_signed(b, 'y')} = {first}\n    {c}x + y = {second}"
    )
    solution = (
        f"From the second equation y = {second} - {c}x. Put this into the first: {a}x "
        f"{format_signed(b)}({second} - {c}x) = {first}, so {a}x {format_signed(b * second)} "
        f"{format_signed(-b * c, 'x')} = {first}. Collecting terms, {slope}x = "
        f"{first - b * second}, so x = {x}. Then y = {second} - {c} × ({x}) = {y}. The solution is "
        f"(x, y) = ({x}, {y})."
    )
    return question, solution


def make_percent_change(rng: random.Random) -> Problem:
    """Make a problem: a rise and a fall in percent, one after the other."""
    start, up, down = (
        200 * rng.randint(1, 40),
        rng.choice((10, 20, 25, 50)),
        rng.choice((10, 20, 30, 40)),
    )
    high = Fraction(start * (100 + up), 100)
    end = high * (100 - down) / 100
    change = (end - start) * 100 / start
    question = (
        f"A quantity of {start} rises by {up}% and then falls by {down}%. What is its final value, "
        "and what is the change in percent from the start?"
    )
    solution = (
        f"After the rise it is {start} × {1 + up / 100:g} = {float(high):g}. After the fall it is "
        f"{float(high):g} × {1 - down / 100:g} = {float(end):g}. The ratio to the start is "
        f"{float(end):g} / {start} = {float(end / start):g}, a change of {float(change):+g}%."
    )
    return question, solution


def make_progression(rng: random.Random) -> Problem:
    """Make a problem: term and sum of an arithmetic progression, with Gauss's formula."""
    first, step, count = rng.randint(-10, 20), draw_nonzero(rng, 9), rng.randint(8, 40)
    last = first + (count - 1) * step
    total = count * (first + last) // 2
    question = (
        f"An arithmetic progression starts {first}, {first + step}, {first + 2 * step}, ... Find "
        f"its term number {count} and the sum of its first {count} terms."
    )
    solution = (
        f"The common difference is {step}. Term number {count} is {first} + {count - 1} × ({step}) "
        f"= {last}. The sum is {count} × ({first} + ({last})) / 2 = {count} × {first + last} / 2 = "
        f"{total}."
    )
    return question, solution


def make_rectangle(rng: random.Random) -> Problem:
    """Make a problem: a rectangle with a border: areas and a length in other units."""
    width, height, border = rng.randint(8, 30), rng.randint(5, 20), rng.randint(1, 3)
    outer = (width + 2 * border) * (height + 2 * border)
    area = outer - width * height
    around = 2 * (width + height + 4 * border)
    question = (
        f"A garden of {width} m by {height} m is surrounded by a path {100 * border} cm wide. Find "
        "the area of the path in square metres and the length of a fence around the outside."
    )
    solution = (
        f"{100 * border} cm are {border} m. With the path the rectangle is {width + 2 * border} m "
        f"by {height + 2 * border} m, an area of {outer} m². The garden has {width} × {height} = "
        f"{width * height} m². The path has {outer} - {width * height} = {area} m². The fence is 2 "
        f"× ({width + 2 * border} + {height + 2 * border}) = {around} m long."
    )
    return question, solution


def make_right_triangle(rng: random.Random) -> Problem:
    """Make a problem: a Pythagorean triangle."""
    larger = rng.randint(2, 7)
    smaller = rng.randint(1, larger - 1)
    scale = rng.randint(1, 3)
    legs = sorted((scale * (larger**2 - smaller**2), scale * 2 * larger * smaller))
    hypotenuse = scale * (larger**2 + smaller**2)
    question = (
        f"The legs of a right triangle are {legs[0]} and {legs[1]}. Find the hypotenuse, the area "
        "and the height over the hypotenuse."
    )
    area = Fraction(legs[0] * legs[1], 2)
    solution = (
        f"By Pythagoras, $c^2 = {legs[0]}^2 + {legs[1]}^2 = {legs[0] ** 2} + {legs[1] ** 2} = "
        f"{hypotenuse**2}$, so $c = {hypotenuse}$. The area is ${legs[0]} \\cdot {legs[1]} / 2 = "
        f"{area}$. The area is also $c h / 2$, so $h = 2 \\cdot {area} / {hypotenuse} = "
        f"{format_latex(2 * area / hypotenuse)}$."
    )
    return question, solution


def make_common_divisor(rng: random.Random) -> Problem:
    """Make a problem: Euclid's algorithm step by step."""
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
        f"Euclid's algorithm: {'; '.join(steps)}. The last remainder that is not zero is {a}, so "
        f"the greatest common divisor is {a}. The least common multiple is {larger} × {smaller} / "
        f"{a} = {larger * smaller // a}."
    )
    return question, solution


def make_chance(rng: random.Random) -> Problem:
    """Make a problem: two balls without replacement."""
    red, blue = rng.randint(2, 9), rng.randint(2, 9)
    total = red + blue
    same = Fraction(red * (red - 1) + blue * (blue - 1), total * (total - 1))
    question = (
        f"An urn holds {red} red and {blue} blue balls. Two are drawn without putting the first "
        "one back. What is the probability that they have the same colour?"
    )
    solution = (
        f"Both red: {red}/{total} × {red - 1}/{total - 1} = "
        f"{Fraction(red * (red - 1), total * (total - 1))}. Both blue: {blue}/{total} × "
        f"{blue - 1}/{total - 1} = {Fraction(blue * (blue - 1), total * (total - 1))}. Added, the "
        f"probability is {same}, about {float(same):.3f}."
    )
    return question, solution


def make_mean_and_median(rng: random.Random) -> Problem:
    """Make a problem: mean, median and range of a short list."""
    values = [rng.randint(1, 60) for _ in range(rng.choice((5, 7, 9)))]
    ordered = sorted(values)
    question = f"Find the mean, the median and the range of {', '.join(map(str, values))}."
    mean = Fraction(sum(values), len(values))
    solution = (
        f"Sorted: {', '.join(map(str, ordered))}. The sum is {sum(values)}, so the mean is "
        f"{sum(values)} / {len(values)} = {float(mean):.4g}. The value in the middle, number "
        f"{len(values) // 2 + 1} of {len(values)}, is {ordered[len(values) // 2]}. The range is "
        f"{ordered[-1]} - {ordered[0]} = {ordered[-1] - ordered[0]}."
    )
    return question, solution


def make_derivative(rng: random.Random) -> Problem:
    """Make a problem: derivative and tangent of a cubic."""
    a, b, c, at = (
        rng.randint(2, 6),
        draw_nonzero(rng, 8),
        draw_nonzero(rng, 9),
        draw_nonzero(rng, 3),
    )
    value, slope = a * at**3 + b * at**2 + c * at, 3 * a * at**2 + 2 * b * at + c
    question = (
        f"Let $f(x) = {a}x^3 {format_signed(b, 'x^2')} {format_signed(c, 'x')}$. Find the "
        f"tangent line at $x = {at}$."
    )
    solution = (
        f"$f'(x) = {3 * a}x^2 {format_signed(2 * b, 'x')} {format_signed(c)}$, so $f'({at}) = "
        f"{slope}$. Also $f({at}) = {value}$. The tangent is $y = {slope}(x {format_signed(-at)}) "
        f"{format_signed(value)}$, that is $y = {slope}x {format_signed(value - slope * at)}$."
    )
    return question, solution


EXERCISES: tuple[Callable[[random.Random], Problem], ...] = (
    make_fraction_sum, make_linear_equation, make_quadratic, make_two_equations,
    make_percent_change, make_progression, make_rectangle, make_right_triangle, make_common_divisor,
    make_chance, make_mean_and_median, make_derivative,
)  # fmt: skip
