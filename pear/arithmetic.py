"""chain_sum for models trained from nothing: a small tokenizer, and worked solutions in two styles to learn from."""

import re
from collections.abc import Sequence
from random import Random

from transformers import PreTrainedTokenizerFast

from pear.tasks import load_task
from pear.word_tokenizer import word_tokenizer

LARGEST = 99  # absolute value of the numbers that are a token: enough for 11 terms of one digit
STYLES = ("pairs", "checked")
_SYMBOLS = ["+", "-", "=", ",", ";", "answer"]
_PROBLEM = re.compile(r"-?\d+( [+-] -?\d+)+", re.ASCII)


def make_tokenizer(largest: int = LARGEST) -> PreTrainedTokenizerFast:
    """One token a number, from -largest to largest, or symbol: "-5" is a number, "3 - 5" is three words.

    encode(decode(ids)) == ids. A prompt's "=" and the first number of what follows need no space between them.
    """
    return word_tokenizer([*map(str, range(-largest, largest + 1)), *_SYMBOLS], pattern=r"-?\d+|[a-z]+|\S")


def train_problems(
    min_terms: int = 6, max_terms: int = 8, digits: int = 1, size: int = 20000, seed: int = 0, largest: int = LARGEST
) -> list[str]:
    """`size` different expressions of chain_sum's train split ("3 + 8 - 5 + 2"); none is ever a test problem.

    They are `load_task`'s train problems of the same seed, so the terms are as reasoning-gym draws them: 0 to 9 for one
    digit, 10 to 99 for two; the first is never negated, but a running total may be below 0.

    Raises:
        ValueError: fewer than two terms, a size or seed that `load_task` refuses, or totals the tokenizer may not know
    """
    if min_terms < 2:
        raise ValueError(f"min_terms must be at least 2, got {min_terms}: one term leaves nothing to work out")
    if max_terms < min_terms:
        raise ValueError(f"max_terms must be at least min_terms={min_terms}, got {max_terms}")
    if digits < 1:
        raise ValueError(f"digits must be at least 1, got {digits}")
    if (reached := max_terms * (10**digits - 1)) > largest:
        raise ValueError(
            f"largest={largest}: {max_terms} terms with digits={digits} can reach {reached}; take fewer of them, "
            "or a larger `largest`, here and in make_tokenizer"
        )
    config = dict(min_terms=min_terms, max_terms=max_terms, min_digits=digits, max_digits=digits)
    problems = load_task("chain_sum", "train", size, seed, **config)
    return [problem.entry["metadata"]["expression"] for problem in problems]


def worked_example(rng: Random, problems: Sequence[str], style: str) -> tuple[str, str]:
    """A prompt and a right solution of one of `problems`, summed from left to right.

    "pairs" writes one step after another: `3 + 8 = 11 , 11 - 5 = 6 , 6 + 2 = 8 ; answer 8`: 6n - 4 tokens for n terms.
    "checked" undoes each step too: `3 + 8 = 11 , 11 - 8 = 3 ; 11 - 5 = 6 , 6 + 5 = 11 ; answer 6`: 12n - 10 tokens.
    """
    if style not in STYLES:
        raise ValueError(f"style must be one of {', '.join(STYLES)}, got {style!r}")
    problem = rng.choice(problems)
    if not _PROBLEM.fullmatch(problem):
        raise ValueError(f"problems must be sums and differences of two terms or more, as '3 + 8 - 5', got {problem!r}")
    first, *rest = problem.split()
    total, steps = int(first), []
    for op, term in zip(rest[::2], rest[1::2], strict=True):
        after = total + int(term) if op == "+" else total - int(term)
        check = f" , {after} {'-' if op == '+' else '+'} {term} = {total}" if style == "checked" else ""
        steps.append(f"{total} {op} {term} = {after}{check}")
        total = after
    return f"{problem} =", f"{(' ; ' if style == 'checked' else ' , ').join(steps)} ; answer {total}"
