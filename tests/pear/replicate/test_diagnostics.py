"""Movement and weights, against loops over full logits, flattened vectors, draws, and the formulas written naively."""

import copy
import math
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import make_model

from pear.generate import encode_prompt, generate
from pear.io import write_jsonl
from pear.replicate.diagnostics import (
    ROWS,
    SAMPLES,
    cosine,
    health,
    kl_and_entropy,
    movement,
    norm,
    update,
    weights_of,
)
from pear.replicate.results import POSITIONS
from pear.tasks import load_task
from pear_kernels.reference import naive_weights


@pytest.fixture
def compact(tokenizer):
    """A tokenizer that words problems briefly."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.init_kwargs["prompt_format"] = "compact"
    return tokenizer


# ---- KL and entropy


def rows_of_ids(count: int, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Prompts and completions of 1 to 9 random tokens, of the tiny tokenizer's 400."""
    generator = torch.Generator().manual_seed(seed)

    def tokens() -> list[int]:
        length = int(torch.randint(1, 10, (), generator=generator))
        return torch.randint(3, 259, (length,), generator=generator).tolist()

    return [(tokens(), tokens()) for _ in range(count)]


def log_softmax(logits: list[float]) -> list[float]:
    largest = max(logits)
    total = math.log(sum(math.exp(x - largest) for x in logits))
    return [x - largest - total for x in logits]


def slow_kl_and_entropy(new, old, rows) -> tuple[float, float]:
    """One row and one token at a time, without padding, sums in Python's floats."""
    kls, entropies = [], []
    for prompt, completion in rows:
        with torch.no_grad():
            p_logits, q_logits = (
                m(torch.tensor([prompt + completion])).logits[0].double().tolist() for m in (new, old)
            )
        for t in range(len(completion)):  # position len(prompt) - 1 + t predicts the completion's token t
            log_p = log_softmax(p_logits[len(prompt) - 1 + t])
            log_q = log_softmax(q_logits[len(prompt) - 1 + t])
            kls.append(sum(math.exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True)))
            entropies.append(-sum(math.exp(a) * a for a in log_p))
    return sum(kls) / len(kls), sum(entropies) / len(entropies)


@pytest.mark.parametrize("rows", [rows_of_ids(1), rows_of_ids(ROWS + 3, seed=1)], ids=["one", "two batches"])
def test_kl_and_entropy_are_those_of_a_loop_over_full_logits(tokenizer, rows):
    new, old = make_model(tokenizer, seed=1), make_model(tokenizer, seed=2)
    kl, entropy = slow_kl_and_entropy(new, old, rows)
    assert kl_and_entropy(new, old, rows) == pytest.approx((kl, entropy), rel=1e-5)
    assert kl > 0.1 and 0 < entropy < math.log(len(tokenizer))
    backward, _ = slow_kl_and_entropy(old, new, rows)  # the other direction is another number
    assert abs(backward - kl) > 0.01
    assert kl_and_entropy(old, new, rows)[0] == pytest.approx(backward, rel=1e-5)


def test_a_model_is_no_distance_from_itself(tokenizer):
    model = make_model(tokenizer, seed=1)
    kl, entropy = kl_and_entropy(model, copy.deepcopy(model), rows_of_ids(20))
    assert kl == 0 and entropy > 1


def test_the_order_of_rows_and_who_shares_a_batch_change_nothing(tokenizer):
    new, old, rows = make_model(tokenizer, seed=1), make_model(tokenizer, seed=2), rows_of_ids(40)
    whole = kl_and_entropy(new, old, rows)
    assert kl_and_entropy(new, old, rows[::-1]) == pytest.approx(whole, rel=1e-5)
    parts = [(kl_and_entropy(new, old, [row]), len(row[1])) for row in rows]
    tokens = sum(n for _, n in parts)
    for i in range(2):
        assert whole[i] == pytest.approx(sum(found[i] * n for found, n in parts) / tokens, rel=1e-5)


def test_movement_is_what_draws_estimate(compact):
    # The exact sums over the vocabulary against -log p and log p - log q of the tokens drawn: the same expectations.
    student, sft, rl = (make_model(compact, seed=seed, scale=0.15) for seed in (1, 2, 3))
    problems = load_task("countdown", "test", 60)
    found = movement(student, sft, rl, compact, problems, max_new_tokens=16, batch_size=100, seed=5)
    prompts = [problem.compact for problem in problems]
    for kl, entropy, new, old in (("sft_kl", "entropy_before", sft, student), ("rl_kl", "entropy_after", rl, sft)):
        ratios, surprises = [], []
        for prompt, completions in zip(
            prompts,
            generate(new, compact, prompts, samples=2, max_new_tokens=16, seed=77, progress=None),
            strict=True,
        ):
            start = encode_prompt(compact, prompt)
            for completion in completions:
                ids = torch.tensor([start + completion.ids])
                with torch.no_grad():
                    log_p, log_q = (
                        m(ids).logits[0, len(start) - 1 : -1].double().log_softmax(-1) for m in (new, old)
                    )  # (T, V)
                at = torch.tensor(completion.ids)[:, None]
                ratios.append((log_p - log_q).gather(1, at))
                surprises.append(-log_p.gather(1, at))
        for name, values in ((kl, torch.cat(ratios)), (entropy, torch.cat(surprises))):
            error = (values.std() / len(values) ** 0.5).item()
            assert abs(found[name] - values.mean().item()) < 4.5 * error, name
            assert error < 0.1 * found[name]  # or the line above would say little


def test_movement_counts_the_completions_of_the_newer_model(compact):
    student, sft, rl = (make_model(compact, seed=seed) for seed in (1, 2, 3))
    problems, told = load_task("countdown", "test", 3), []
    found = movement(
        student, sft, rl, compact, problems, max_new_tokens=6, batch_size=5, seed=4,
        tick=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    for name, entropy, new, old in (("sft_kl", "entropy_before", sft, student), ("rl_kl", "entropy_after", rl, sft)):
        drawn = generate(
            new, compact, [p.compact for p in problems], samples=SAMPLES, max_new_tokens=6, batch_size=5, seed=4,
            progress=None,
        )  # fmt: skip
        rows = [
            (encode_prompt(compact, problem.compact), c.ids)
            for problem, each in zip(problems, drawn, strict=True)
            for c in each
        ]
        assert (found[name], found[entropy]) == pytest.approx(slow_kl_and_entropy(new, old, rows), rel=1e-5)
    assert told == [(1, 3), (2, 3), (3, 3)]
    still = movement(student, student, student, compact, problems, max_new_tokens=6, batch_size=5, seed=4)
    for name in ("sft_kl", "rl_kl", "sft_distance", "rl_distance", "update_cosine"):
        assert still[name] == 0, name


# ---- distances


def flat(model) -> torch.Tensor:
    """All weights as one float64 vector, a matrix that two modules share once."""
    seen, parts = set(), []
    for _, module in model.named_modules():
        for weight in module._parameters.values():
            if weight is not None and weight.data_ptr() not in seen:
                seen.add(weight.data_ptr())
                parts.append(weight.detach().double().flatten())
    return torch.cat(parts)


@pytest.mark.parametrize("tied", [False, True])
def test_distances_are_those_of_flattened_vectors(compact, tied):
    a, b, c = (make_model(compact, tied=tied, seed=seed) for seed in (1, 2, 3))
    first, second = flat(b) - flat(a), flat(c) - flat(b)
    embedding = a.get_input_embeddings().weight.numel()
    assert len(first) == sum(p.numel() for p in make_model(compact).parameters()) - (embedding if tied else 0)
    assert norm(update(b, a)) == pytest.approx(first.norm().item(), rel=1e-12)
    assert cosine(update(b, a), update(c, b)) == pytest.approx(
        torch.nn.functional.cosine_similarity(first, second, dim=0).item(), rel=1e-9
    )
    found = movement(a, b, c, compact, load_task("countdown", "test", 1), max_new_tokens=2, batch_size=4, seed=0)
    assert found["sft_distance"] == pytest.approx(first.norm().item(), rel=1e-12)
    assert found["rl_distance"] == pytest.approx(second.norm().item(), rel=1e-12)
    assert found["start_norm"] == pytest.approx(flat(a).norm().item(), rel=1e-12)
    assert found["update_cosine"] == pytest.approx(cosine(update(b, a), update(c, b)), rel=1e-12)


def test_cosine_of_what_does_not_move():
    a, nothing = [torch.tensor([3.0, 4.0]), torch.ones(2, 2)], [torch.zeros(2), torch.zeros(2, 2)]
    assert cosine(a, nothing) == cosine(nothing, a) == cosine(nothing, nothing) == 0
    assert cosine(a, a) == pytest.approx(1) and cosine(a, [-2 * t for t in a]) == pytest.approx(-1)
    assert norm(a) == pytest.approx(29**0.5)


# ---- weights

floats = st.floats(-6.0, 0.0, width=32)


@st.composite
def logprobs(draw) -> tuple[list[list[float]], list[list[float]], list[list[float]]]:
    """Of one to five responses of 1 to 9 tokens: under the model, the behaviour policy and the model at the start."""
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    return tuple([[draw(floats) for _ in range(n)] for n in lengths] for _ in range(3))


def slow_weights(options: dict, now: list[float], behavior: list[float], start: list[float]) -> list[float]:
    """Of one response, a token at a time."""
    name = options.get("weighting", "pear")
    if name == "pear":
        own = {key: value for key, value in options.items() if key != "weighting"}
        return naive_weights(*(torch.tensor(each, dtype=torch.float64) for each in (now, behavior)), **own).tolist()
    ratios = [p - q for p, q in zip(now, start, strict=True)]
    if name == "none":
        return [1.0 for _ in now]
    if name == "dft":
        return [math.exp(p) for p in now]
    if name == "iw-sft":
        mean = sum(ratios) / len(ratios)
        return [min(math.exp(options.get("iw_tau", 1.0) * mean), options.get("iw_max", 16.0)) for _ in now]
    if name == "psft":
        return [math.exp(r) if math.exp(r) <= 1 + options.get("psft_clip", 0.28) else 0.0 for r in ratios]
    assert name == "asft"  # p, and the slope of the KL of two outcomes
    factor = options.get("asft_kl", 0.1)
    return [
        math.exp(p) + factor * (math.exp(q) - math.exp(p)) / -math.expm1(p) for p, q in zip(now, start, strict=True)
    ]


OPTIONS = [
    {},
    {"weighting": "pear", "level": "token", "gamma": 0.9},
    {"weighting": "pear", "level": "block", "block_size": 3, "log_ratio_clip": [-1.0, 0.5]},
    {"weighting": "pear", "level": "sequence", "log_ratio_clip": [-3, 3], "log_weight_clip": [-2.0, 1.0]},
    {"weighting": "none"},
    {"weighting": "dft"},
    {"weighting": "iw-sft"},
    {"weighting": "iw-sft", "iw_tau": 3.0, "iw_max": 2.0},
    {"weighting": "psft"},
    {"weighting": "psft", "psft_clip": 0.5},
    {"weighting": "asft"},
    {"weighting": "asft", "asft_kl": 1.0},
]


def name_of(options: dict) -> str:
    return "-".join(map(str, options.values())) or "default"


def joined(responses: list[list[float]]) -> torch.Tensor:
    return torch.tensor([x for each in responses for x in each], dtype=torch.float64)


@pytest.mark.parametrize("options", OPTIONS, ids=name_of)
@settings(max_examples=40)
@given(logprobs())
def test_weights_are_the_naive_formulas(options, found):
    if options.get("weighting") == "asft":  # a token of probability 1 has no other outcome
        found = tuple([[min(x, -1e-3) for x in each] for each in part] for part in found)
    now, behavior, start = found
    sizes = torch.tensor([len(each) for each in now])
    weights, floor, ceiling = weights_of(options, *map(joined, found), sizes)
    expected = joined([slow_weights(options, *each) for each in zip(now, behavior, start, strict=True)])
    torch.testing.assert_close(weights, expected, rtol=1e-9, atol=1e-12)
    assert weights.shape == floor.shape == ceiling.shape and floor.dtype == ceiling.dtype == torch.bool
    lowest, highest = ends_of(options)
    assert floor.tolist() == [lowest is not None and w <= lowest * (1 + 1e-6) for w in expected.tolist()]
    assert ceiling.tolist() == [highest is not None and w >= highest * (1 - 1e-6) for w in expected.tolist()]


def ends_of(options: dict) -> tuple[float | None, float | None]:
    if options.get("weighting", "pear") == "pear":
        low, high = options.get("log_weight_clip", (-10.0, 5.0))
        return math.exp(low), math.exp(high)
    return None, options.get("iw_max", 16.0) if options["weighting"] == "iw-sft" else None


def test_both_ends_of_the_clip_are_seen():
    # two responses of three tokens; at sequence level log-ratio sums of -6 and 3, clipped to -2 and 1
    options = {"weighting": "pear", "level": "sequence", "log_ratio_clip": [-2.0, 2.0], "log_weight_clip": [-2.0, 1.0]}
    now, behavior = torch.tensor([-5.0] * 3 + [-1.0] * 3), torch.tensor([-1.0] * 3 + [-2.0] * 3)
    weights, floor, ceiling = weights_of(options, now.double(), behavior.double(), now.double(), torch.tensor([3, 3]))
    assert weights.tolist() == pytest.approx([math.exp(-2)] * 3 + [math.exp(1)] * 3)
    assert floor.tolist() == [True] * 3 + [False] * 3 and ceiling.tolist() == [False] * 3 + [True] * 3


# ---- health, from files


def write_scored(folder: Path, now, behavior, start, extra: int = 1) -> tuple[Path, Path]:
    """Rows as `pear score` writes them, `extra` masked tokens (with log-probs that must not count) before each."""
    rows = {"now.jsonl": now, "data.jsonl": start}
    for name, refs in rows.items():
        write_jsonl(
            folder / name,
            [
                {
                    "completion_mask": [0] * extra + [1] * len(ref) + [0],
                    "behavior_logprobs": [-99.0] * extra + b + [-99.0],
                    "ref_logprobs": [99.0] * extra + ref + [99.0],
                }
                for ref, b in zip(refs, behavior, strict=True)
            ],
        )
    return folder / "now.jsonl", folder / "data.jsonl"


@pytest.mark.parametrize("options", OPTIONS[:2] + OPTIONS[5:8], ids=name_of)
@settings(max_examples=15)
@given(found=logprobs(), extra=st.integers(0, 3))
@example(found=tuple([[-0.5 - 0.01 * t for t in range(n)] for n in (53, 20, 7)] for _ in range(3)), extra=2)
def test_health_is_that_of_a_loop_over_the_files(options, found, extra, tmp_path_factory):
    now, behavior, start = found
    paths = write_scored(tmp_path_factory.mktemp("health"), now, behavior, start, extra)
    got = health(*paths, options)
    bins, flat_weights, ratios = [[] for _ in range(POSITIONS)], [], []
    for p, b, s in zip(now, behavior, start, strict=True):
        for t, w in enumerate(slow_weights(options, p, b, s)):
            bins[math.floor(t / len(p) * POSITIONS + 1e-9)].append(w)
            flat_weights.append(w)
            ratios.append(p[t] - b[t])
    n = len(flat_weights)
    assert [each is None for each in got["by_position"]] == [not each for each in bins]
    for each, expected in zip(got["by_position"], bins, strict=True):
        assert each is None or each == pytest.approx(sum(expected) / len(expected), rel=1e-9)
    assert got["mean"] == pytest.approx(sum(flat_weights) / n, rel=1e-9)
    assert got["effective_sample_size"] == pytest.approx(
        sum(flat_weights) ** 2 / (n * sum(w * w for w in flat_weights)), rel=1e-9
    )
    assert got["log_ratio_mean"] == pytest.approx(sum(ratios) / n, rel=1e-9, abs=1e-12)
    low, high = ends_of(options)
    assert got["floor"] == pytest.approx(sum(low is not None and w <= low * (1 + 1e-6) for w in flat_weights) / n)
    assert got["ceiling"] == pytest.approx(sum(high is not None and w >= high * (1 - 1e-6) for w in flat_weights) / n)


def test_positions_run_from_first_to_last(tmp_path):
    # 40 tokens, and at token level without clips the weight falls off to the right as the log-ratios do
    now, behavior = [[-1.0] * 40], [[-1.1] * 40]
    options = {"weighting": "pear", "level": "token", "gamma": 1.0, "log_ratio_clip": [-1.0, 1.0]}
    got = health(*write_scored(tmp_path, now, behavior, now), options)["by_position"]
    assert got == sorted(got, reverse=True)
    assert got[-1] == pytest.approx((1 + math.exp(0.1)) / 2)  # of the last two tokens
    assert got[0] == pytest.approx((math.exp(0.1 * 39) + math.exp(0.1 * 38)) / 2)


def test_rows_of_two_files_must_pair(tmp_path):
    now, data = write_scored(tmp_path, [[-1.0], [-2.0]], [[-1.0], [-2.0]], [[-1.0], [-2.0]])
    now.write_text(now.read_text().splitlines(keepends=True)[0])
    with pytest.raises(ValueError):
        health(now, data, {})
