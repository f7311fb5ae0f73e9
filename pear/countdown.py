"""Countdown for models trained from nothing: a small tokenizer, and worked solutions in two styles to learn from."""

import itertools
from collections.abc import Sequence
from functools import cache
from random import Random
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from pear.tasks import TASKS, countdown_identity, countdown_prompt, split_of
from pear.word_tokenizer import word_tokenizer

Numbers = tuple[int, int, int]
LARGEST = 100  # of the numbers a worked solution may pass through; each is one token
STYLES = ("forward", "backward")
_SYMBOLS = ["+", "-", "*", "/", "(", ")", "=", ":", ",", ";", "answer"]


class Way(NamedTuple):
    """One way to reach the target: two of the numbers give `inner`, and the third then gives the target."""

    goal: str  # "42 / 2 = 21": what the first step must give, if the second is ( ) * 2
    first: str  # "3 * 7 = 21"
    second: str  # "21 * 2 = 42"
    expression: str  # "( 3 * 7 ) * 2"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a number (0 to LARGEST) or symbol. Spaces only separate, so encode(decode(ids)) == ids."""
    return word_tokenizer([*map(str, range(LARGEST + 1)), *_SYMBOLS], pattern=r"\d+|[a-z]+|\S")


def _apply(a: int, op: str, b: int) -> int | None:
    """a op b where that is a whole number from 0 to LARGEST, else None."""
    if op == "/":
        result = a // b if b and a % b == 0 else -1
    else:
        result = {"+": a + b, "-": a - b, "*": a * b}[op]
    return result if 0 <= result <= LARGEST else None


# The second step, the third number c, and how to ask for what the first step must give.
_SECOND = (
    ("{inner} + {c}", "{target} - {c}"),
    ("{inner} - {c}", "{target} + {c}"),
    ("{inner} * {c}", "{target} / {c}"),
    ("{inner} / {c}", "{target} * {c}"),
    ("{c} - {inner}", "{c} - {target}"),
    ("{c} / {inner}", "{c} / {target}"),
)


@cache
def goals(numbers: Numbers, target: int) -> list[list[tuple[str, list[Way]]]]:
    """What the first step could be asked to give ("42 / 2 = 21"), and the ways that give it; none for most.

    A list for each of the three numbers, of the goals in which that number is the one left for the second step.
    """
    found = []
    for k in range(3):
        c, (a, b) = numbers[k], numbers[:k] + numbers[k + 1 :]
        found.append([])
        for second, question in _SECOND:
            question = question.format(c=c, target=target)
            x, op, y = question.split()
            if (inner := _apply(int(x), op, int(y))) is None or (inner == 0 and second == "{c} / {inner}"):
                continue
            goal = f"{question} = {inner}"
            ways = []
            for p, op, q in [(a, "+", b), (a, "*", b), (a, "-", b), (b, "-", a), (a, "/", b), (b, "/", a)]:
                if _apply(p, op, q) == inner:
                    last = second.format(inner=inner, c=c)
                    expression = second.format(inner=f"( {p} {op} {q} )", c=c)
                    ways.append(Way(goal, f"{p} {op} {q} = {inner}", f"{last} = {target}", expression))
            found[k].append((goal, ways))
    return found


@cache
def train_problems() -> list[tuple[Numbers, int]]:
    """(numbers, target) of every problem of the train split that `goals` can solve; none is ever a test problem."""
    config = TASKS["countdown"].config
    values = range(config["min_value"], config["max_value"] + 1)
    targets = range(config["min_target"], config["max_target"] + 1)
    return [
        (numbers, target)
        for numbers in itertools.combinations_with_replacement(values, 3)
        for target in targets
        if split_of(countdown_identity(numbers, target)) == "train"
        and any(ways for each in goals(numbers, target) for _, ways in each)
    ]


def worked_example(rng: Random, problems: Sequence[tuple[Numbers, int]], style: str) -> tuple[str, str]:
    """A prompt, its numbers in random order, and a right solution of one of `problems` ((numbers, target) each).

    "forward" goes straight to the target: `3 * 7 = 21 , 21 * 2 = 42 ; answer ( 3 * 7 ) * 2`.
    "backward" asks what the first step would have to give, until two of the numbers give it (the number left for the
    second step is taken in random order, its goals in a fixed one):
    `42 - 2 = 40 ; 42 + 2 = 44 ; 42 / 2 = 21 , 3 * 7 = 21 ; answer ( 3 * 7 ) * 2`.
    """
    if style not in STYLES:
        raise ValueError(f"style must be one of {', '.join(STYLES)}, got {style!r}")
    numbers, target = rng.choice(problems)
    numbers = tuple(rng.sample(numbers, 3))
    asked = [goal for each in rng.sample(goals(numbers, target), 3) for goal in each]
    hit = next(i for i, (_, ways) in enumerate(asked) if ways)
    way = rng.choice(asked[hit][1])
    if style == "forward":
        steps = f"{way.first} , {way.second}"
    else:
        steps = " ; ".join([goal for goal, _ in asked[:hit]] + [f"{way.goal} , {way.first}"])
    return countdown_prompt(numbers, target), f"{steps} ; answer {way.expression}"
