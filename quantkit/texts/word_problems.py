"""Seeded word problems of two to five steps with worked solutions: shopping, travel, work, units.

Every function takes a `random.Random` and returns (question, solution). The answers are whole or
have at most two decimals.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from fractions import Fraction

Problem = tuple[str, str]

NAMES = (
    "Amara", "Bjorn", "Chen", "Dalia", "Elena", "Farid", "Grace", "Hiro", "Ines", "Jamal",
    "Kavya", "Liam", "Marta", "Nadia", "Omar", "Priya", "Quinn", "Rafael", "Sofia", "Tariq",
    "Uma", "Viktor", "Wen", "Yusuf",
)  # fmt: skip
GOODS = (
    "notebooks", "lamps", "shirts", "mugs", "plants", "tickets", "bottles of juice",
    "loaves of bread", "paintbrushes", "calculators", "cushions", "torches",
)  # fmt: skip
CROPS = ("tomatoes", "potatoes", "apples", "carrots", "strawberries", "onions", "grapes", "pears")
CITIES = (
    "Lisbon",
    "Oslo",
    "Nairobi",
    "Lima",
    "Kyoto",
    "Porto",
    "Quebec",
    "Hanoi",
    "Zagreb",
    "Tunis",
)


def format_money(amount: int | Fraction) -> str:
    """Format dollars, with cents only if there are any."""
    return f"${amount}" if Fraction(amount).denominator == 1 else f"${float(amount):.2f}"


def make_shopping(rng: random.Random) -> Problem:
    """Make a problem: two kinds of goods, a discount in percent, change from a note."""
    name = rng.choice(NAMES)
    many, others = rng.sample(GOODS, 2)
    count, price = rng.randint(2, 9), rng.randint(3, 24)
    second, cost = rng.randint(2, 7), rng.randint(2, 18)
    percent = rng.choice((5, 10, 15, 20, 25, 30))
    total = count * price + second * cost
    off = Fraction(total * percent, 100)
    due = total - off
    paid = (int(due) // 50 + 1) * 50
    question = (
        f"{name} buys {count} {many} at {format_money(price)} each and {second} {others} at "
        f"{format_money(cost)} each. The shop takes {percent}% off the total. {name} pays with "
        f"{format_money(paid)}. How much change should {name} receive?"
    )
    solution = (
        f"The {many} cost {count} × {format_money(price)} = {format_money(count * price)}. The "
        f"{others} cost {second} × {format_money(cost)} = {format_money(second * cost)}. Together "
        f"that is {format_money(total)}. A discount of {percent}% is {format_money(off)}, so the "
        f"price is {format_money(total)} - {format_money(off)} = {format_money(due)}. The change "
        f"is {format_money(paid)} - {format_money(due)} = {format_money(paid - due)}."
    )
    return question, solution


def make_travel(rng: random.Random) -> Problem:
    """Make a problem: two legs at different speeds and a rest; arrival time by the clock."""
    start, end = rng.sample(CITIES, 2)
    hours, speed = rng.randint(1, 3), rng.choice((48, 54, 60, 72, 84, 90))
    minutes, slower = rng.choice((20, 30, 40, 50)), rng.choice((30, 36, 42, 48))
    rest, leave = rng.choice((10, 15, 25, 35)), rng.randint(6, 11)
    first, second = hours * speed, slower * minutes // 60
    total = hours * 60 + minutes + rest
    clock = f"{(leave * 60 + total) // 60}:{(leave * 60 + total) % 60:02d}"
    question = (
        f"A bus leaves {start} for {end} at {leave}:00. It drives for {hours} hours at {speed} "
        f"km/h, stops for {rest} minutes, and then drives for {minutes} minutes at {slower} km/h. "
        "How far does it travel, and when does it arrive?"
    )
    solution = (
        f"In the first part it covers {hours} × {speed} = {first} km. In the second part it covers "
        f"{slower} × {minutes}/60 = {second} km. The distance is {first} + {second} = "
        f"{first + second} km. The trip takes {hours * 60} + {rest} + {minutes} = {total} minutes, "
        f"that is {total // 60} h {total % 60} min, so the bus arrives at {clock}."
    )
    return question, solution


def format_decimal(value: int | Fraction) -> str:
    """Format a number with at most two decimals and no trailing zero."""
    return str(value) if Fraction(value).denominator == 1 else f"{float(value):.2f}".rstrip("0")


def make_workers(rng: random.Random) -> Problem:
    """Make a problem: work in worker-days; some of the workers leave."""
    people, days = rng.choice(((6, 10), (8, 9), (12, 10), (10, 12), (9, 8), (15, 8)))
    worked = rng.randint(2, days // 2)
    work = people * days
    left = work - people * worked
    remaining = rng.choice([count for count in range(2, people) if left % count == 0])
    question = (
        f"{people} workers can finish a wall in {days} days, all at the same pace. After {worked} "
        f"days {people - remaining} of them are called away. How many more days do the others need?"
    )
    solution = (
        f"The whole wall takes {people} × {days} = {work} worker-days. In {worked} days "
        f"{people * worked} of them are done, so {work} - {people * worked} = {left} worker-days "
        f"remain. There are {remaining} workers left, and {left} / {remaining} = "
        f"{left // remaining}. They need {left // remaining} more days."
    )
    return question, solution


def make_harvest(rng: random.Random) -> Problem:
    """Make a problem: fractions of a harvest, the rest packed in boxes."""
    name, crop = rng.choice(NAMES), rng.choice(CROPS)
    below, next_below = rng.choice((3, 4, 5, 6)), rng.choice((2, 3, 4))
    size = rng.choice((5, 8, 10, 12))
    left = below * next_below * rng.randint(8, 60)
    kept = left - left // below
    sold = kept // next_below
    rest = kept - sold
    full, loose = divmod(rest, size)
    question = (
        f"{name} harvests {left} kg of {crop}. One part in {below} is lost to frost. Of what "
        f"remains, 1/{next_below} is sold at the market, and the rest is packed into boxes of "
        f"{size} kg. How many full boxes are there, and how many kilograms are left over?"
    )
    solution = (
        f"The frost takes {left} / {below} = {left // below} kg, which leaves {kept} kg. The "
        f"market takes {kept} / {next_below} = {sold} kg, which leaves {kept} - {sold} = {rest} "
        f"kg. Dividing by {size}, {rest} = {full} × {size} + {loose}. There are {full} full boxes "
        f"and {loose} kg left over."
    )
    return question, solution


def make_interest(rng: random.Random) -> Problem:
    """Make a problem: compound interest over two years."""
    name = rng.choice(NAMES)
    principal, percent = 400 * rng.randint(2, 25), rng.choice((2, 5, 10, 15, 20))
    first = Fraction(principal * percent, 100)
    second = (principal + first) * percent / 100
    total = principal + first + second
    question = (
        f"{name} puts {format_money(principal)} into an account that pays {percent}% interest at "
        "the end of each year. Nothing is withdrawn. How much is in the account after two years, "
        "and how much of it is interest?"
    )
    solution = (
        f"After one year the interest is {percent}% of {format_money(principal)}, which is "
        f"{format_money(first)}, so the balance is {format_money(principal + first)}. After the "
        f"second year the interest is {percent}% of {format_money(principal + first)}, which is "
        f"{format_money(second)}. The balance is {format_money(total)}, and {format_money(total)} "
        f"- {format_money(principal)} = {format_money(first + second)} of it is interest."
    )
    return question, solution


def make_mixture(rng: random.Random) -> Problem:
    """Make a problem: two solutions are mixed; the strength of the result."""
    low, high = rng.choice((10, 15, 20)), rng.choice((30, 40, 50, 60))
    first, second = 100 * rng.randint(1, 6), 100 * rng.randint(1, 6)
    salt, more = low * first // 100, high * second // 100
    strength = Fraction(100 * (salt + more), first + second)
    question = (
        f"A chemist mixes {first} ml of a {low}% salt solution with {second} ml of a {high}% salt "
        "solution. What is the concentration of the mixture, to two decimals at most?"
    )
    solution = (
        f"The first contains {low}% of {first} = {salt} ml of salt and the second {high}% of "
        f"{second} = {more} ml. Together there are {salt + more} ml of salt in {first + second} "
        f"ml. {salt + more} / {first + second} = {format_decimal(strength)}%."
    )
    return question, solution


def make_ages(rng: random.Random) -> Problem:
    """Make a problem: one age is a multiple of another; a statement about the future gives both."""
    older, younger = rng.sample(NAMES, 2)
    times, age = rng.randint(3, 6), rng.randint(4, 12)
    years = age * (times - 2)
    question = (
        f"{older} is {times} times as old as {younger}. In {years} years {older} will be twice as "
        f"old as {younger}. How old are they now?"
    )
    solution = (
        f"Let {younger} be x years old, so that {older} is {times}x. In {years} years: {times}x + "
        f"{years} = 2(x + {years}), which gives {times}x - 2x = {2 * years} - {years}, so "
        f"{times - 2}x = {years} and x = {age}. {younger} is {age} and {older} is {times * age}. "
        f"Check: {times * age + years} = 2 × {age + years}."
    )
    return question, solution


def make_units(rng: random.Random) -> Problem:
    """Make a problem: a conversion of units in the middle of a rate."""
    litres, per_minute = rng.choice((240, 360, 480, 600, 900)), rng.choice((4, 5, 6, 8, 12))
    leak = rng.randint(1, per_minute - 1)
    gain = per_minute - leak
    minutes = Fraction(litres, gain)
    hours, rest = divmod(minutes, 60)
    seconds = round((rest - int(rest)) * 60)
    question = (
        f"A tank of {litres / 1000:g} cubic metres is filled at {per_minute} litres a minute while "
        f"{leak * 60} litres an hour leak out of it. How long does it take to fill the empty tank? "
        "Give hours, minutes and seconds."
    )
    solution = (
        f"{litres / 1000:g} cubic metres are {litres} litres. The leak is {leak * 60} / 60 = "
        f"{leak} litres a minute, so the tank gains {per_minute} - {leak} = {gain} litres a "
        f"minute. It takes {litres} / {gain} minutes, which is {hours} h {int(rest)} min {seconds} "
        "s."
    )
    return question, solution


def make_recipe(rng: random.Random) -> Problem:
    """Make a problem: a recipe scaled by a fraction, in grams and kilograms."""
    name = rng.choice(NAMES)
    people, guests = rng.choice((4, 6, 8)), rng.choice((10, 12, 14, 18, 20))
    flour, sugar = 60 * rng.randint(2, 9), 24 * rng.randint(1, 6)
    factor = Fraction(guests, people)
    question = (
        f"A cake for {people} people needs {flour} g of flour and {sugar} g of sugar. {name} bakes "
        f"for {guests} people and has 1.5 kg of flour. How much flour and sugar are needed, and is "
        "the flour enough?"
    )
    need, sweet = flour * factor, sugar * factor
    verdict = "is enough" if need <= 1500 else "is not enough"
    gap = f"{format_decimal(abs(1500 - need))} g {'are left' if need <= 1500 else 'are missing'}"
    solution = (
        f"The factor is {guests}/{people} = {factor}. Flour: {flour} × {factor} = "
        f"{format_decimal(need)} g. Sugar: {sugar} × {factor} = {format_decimal(sweet)} g. 1.5 kg "
        f"are 1500 g, so the flour {verdict}: {gap}."
    )
    return question, solution


def make_survey(rng: random.Random) -> Problem:
    """Make a problem: percentages of a percentage, and two groups that overlap."""
    people = 100 * rng.randint(2, 12)
    tea, coffee = rng.choice((40, 45, 55, 60)), rng.choice((60, 65, 70))
    both = tea + coffee - rng.choice((75, 80, 85, 90, 95))
    neither = 100 - (tea + coffee - both)
    question = (
        f"Of {people} people asked, {tea}% drink tea, {coffee}% drink coffee and {both}% drink "
        "both. How many people drink exactly one of the two, and how many drink neither?"
    )
    only_tea, only_coffee = tea - both, coffee - both
    one = only_tea + only_coffee
    solution = (
        f"Only tea: {tea}% - {both}% = {only_tea}%. Only coffee: {coffee}% - {both}% = "
        f"{only_coffee}%. Exactly one: {one}% of {people} = {one * people // 100} people. At least "
        f"one: {tea}% + {coffee}% - {both}% = {100 - neither}%. Neither: {neither}% of {people} = "
        f"{neither * people // 100} people."
    )
    return question, solution


WORD_PROBLEMS: tuple[Callable[[random.Random], Problem], ...] = (
    make_shopping, make_travel, make_workers, make_harvest, make_interest, make_mixture, make_ages,
    make_units, make_recipe, make_survey,
)  # fmt: skip
