"""Scored rows by their log-probs alone, without files or models, for the tests of `pear inspect`."""

from collections.abc import Sequence

import numpy as np
from tiny import make_tokenizer

from pear.inspecting.advice import advise
from pear.inspecting.data import Data, Row
from pear.inspecting.finding import Finding
from pear.inspecting.report import make_report, special_ids
from pear.inspecting.statistics import summarize
from pear.inspecting.suspicions import view
from pear.inspecting.tokens import Tokens
from pear.inspecting.ways_out import Case
from pear_kernels.options import DEFAULTS, PEAROptions

TOKENIZER = make_tokenizer()
TEXT_IDS = [i for i in range(len(TOKENIZER)) if i not in special_ids(TOKENIZER)]
END = TOKENIZER.eos_token_id


def make_row(behavior: Sequence[float], line: int = 1, ids: Sequence[int] | None = None, **fields) -> Row:
    """A prompt of two tokens, then as many of the completion as there are log-probs, the last one the end of turn."""
    count = len(behavior)
    if ids is None:
        ids = [TEXT_IDS[(7 * line + 3 * t) % len(TEXT_IDS)] for t in range(count - 1)] + [END]
    row = Row(
        line=line,
        input_ids=np.array([TEXT_IDS[0], TEXT_IDS[1], *ids], dtype=np.int32),
        mask=np.array([0, 0] + [1] * count, dtype=bool),
        behavior_logprobs=np.array(behavior, dtype=np.float32),
        spans=None,
        aligned=False,
        policy="teacher",
        estimated=False,
        sampling={},
        right=True,
    )
    return row._replace(**fields)


def make_data(behavior: Sequence[Sequence[float]], fields: dict[int, dict] | None = None, **everywhere) -> Data:
    """Rows 1, 2, ...; `fields` are of single rows by their number from 0."""
    rows = [make_row(values, i + 1, **everywhere | (fields or {}).get(i, {})) for i, values in enumerate(behavior)]
    return Data(rows, len(rows), [], {})


def tokens_of(data: Data, student: Sequence[Sequence[float]]) -> Tokens:
    return data.tokens([np.array(values) for values in student])


def make_case(data: Data, student: Sequence[Sequence[float]], options: PEAROptions = DEFAULTS, half=False) -> Case:
    tokens = tokens_of(data, student)
    seen = view(data.rows, tokens, half, special_ids(TOKENIZER), TOKENIZER.convert_ids_to_tokens)
    return Case(data, tokens, seen, options, summarize(tokens, options), lambda o: summarize(tokens, o))


def advice(
    data: Data, student: Sequence[Sequence[float]], options: PEAROptions = DEFAULTS, **how
) -> dict[str, Finding]:
    return {finding.kind: finding for finding in advise(make_case(data, student, options, **how))}


def report_of(data: Data, student: Sequence[Sequence[float]], options: PEAROptions = DEFAULTS, rows: int = 6) -> dict:
    names = {"file": "scored.jsonl", "student": "student"}
    logprobs = [np.array(values) for values in student]
    return make_report(data, logprobs, options, TOKENIZER, names=names, rows=rows, half=False)


def policy_logprobs(rng: np.random.Generator, rows: int, length: int | tuple[int, int]) -> list[np.ndarray]:
    """Of a policy: mostly sure, now and then not; (C,) float32 each."""
    low, high = (length, length) if isinstance(length, int) else length
    return [-rng.gamma(0.35, 1.2, int(rng.integers(low, high + 1))).astype(np.float32) for _ in range(rows)]


def shifted(behavior: list[np.ndarray], rng: np.random.Generator, mean: float, spread: float) -> list[np.ndarray]:
    """A student whose log-ratios to `behavior` have this mean and spread, and no log-prob above 0."""
    return [np.minimum(b + mean + spread * rng.standard_normal(len(b)), 0.0) for b in map(np.float64, behavior)]
