"""Countdown for models trained from nothing: a small tokenizer, and worked solutions in two styles to learn from."""

import itertools
from functools import cache
from random import Random
from typing import NamedTuple

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pear.tasks import TASKS, countdown_identity, countdown_prompt, split_of

LARGEST = 100  # of the numbers a worked solution may pass through; each is one token
STYLES = ("direct", "search")
_SYMBOLS = ["+", "-", "*", "/", "(", ")", "=", ":", ",", ";", "answer"]


class Attempt(NamedTuple):
    steps: str  # "3 * 7 = 21 , 21 * 2 = 42"
    expression: str  # "( 3 * 7 ) * 2"
    result: int


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a number (0 to LARGEST) or symbol. Spaces only separate, so encode(decode(ids)) == ids.

    Its `prompt_format` tells `pear eval` to word problems compactly for models that have this tokenizer.
    """
    special = ["<pad>", "<eos>", "<unk>"]
    words = special + [str(n) for n in range(LARGEST + 1)] + _SYMBOLS
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d+|[a-z]+|\S"), behavior="removed", invert=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", prompt_format="compact"
    )


def _apply(a: int, op: str, b: int) -> int | None:
    """a op b where that is a whole number from 0 to LARGEST, else None."""
    if op == "/":
        result = a // b if b and a % b == 0 else -1
    else:
        result = {"+": a + b, "-": a - b, "*": a * b}[op]
    return result if 0 <= result <= LARGEST else None


@cache
def attempts(numbers: tuple[int, int, int]) -> list[Attempt]:
    """Every way to join three numbers in two steps, through whole numbers from 0 to LARGEST."""
    found = []
    for i, j in itertools.permutations(range(3), 2):
        a, b, c = numbers[i], numbers[j], numbers[3 - i - j]
        for first, second in itertools.product("+-*/", repeat=2):
            if first in "+*" and j < i or (inner := _apply(a, first, b)) is None:
                continue
            pair = f"( {a} {first} {b} )"
            if (result := _apply(inner, second, c)) is not None:
                steps = f"{a} {first} {b} = {inner} , {inner} {second} {c} = {result}"
                found.append(Attempt(steps, f"{pair} {second} {c}", result))
            if second in "-/" and (result := _apply(c, second, inner)) is not None:
                steps = f"{a} {first} {b} = {inner} , {c} {second} {inner} = {result}"
                found.append(Attempt(steps, f"{c} {second} {pair}", result))
    return found


@cache
def train_problems() -> list[tuple[tuple[int, int, int], int]]:
    """(numbers, target) of every problem of the train split that `attempts` can solve; none is ever a test problem."""
    config = TASKS["countdown"].config
    values = range(config["min_value"], config["max_value"] + 1)
    problems = []
    for numbers in itertools.combinations_with_replacement(values, 3):
        for target in sorted({attempt.result for attempt in attempts(numbers)}):
            if config["min_target"] <= target <= config["max_target"]:
                if split_of(countdown_identity(numbers, target)) == "train":
                    problems.append((numbers, target))
    return problems


def worked_example(rng: Random, style: str, max_wrong: int = 3) -> tuple[str, str]:
    """A prompt of the train split and a right solution of it.

    "direct" goes straight there: `3 * 7 = 21 , 21 * 2 = 42 ; answer ( 3 * 7 ) * 2`.
    "search" first makes up to `max_wrong` attempts that come out elsewhere.
    """
    numbers, target = rng.choice(train_problems())
    numbers = tuple(rng.sample(numbers, 3))
    right = rng.choice([attempt for attempt in attempts(numbers) if attempt.result == target])
    tried = [right]
    if style == "search":
        wrong = [attempt for attempt in attempts(numbers) if attempt.result != target]
        tried = rng.sample(wrong, min(rng.randint(0, max_wrong), len(wrong))) + tried
    elif style != "direct":
        raise ValueError(f"style must be one of {', '.join(STYLES)}, got {style!r}")
    steps = " ; ".join(attempt.steps for attempt in tried)
    return countdown_prompt(numbers, target), f"{steps} ; answer {right.expression}"
