"""Log-probs that a sampler renormalised after top-p or top-k: what `pear inspect` and `pear import` make of them."""

import json
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inspected import TEXT_IDS, advice, make_data

from pear.importing import import_logprobs, sampling
from pear.io import read_jsonl, write_jsonl
from pear_kernels.options import PEAROptions

WORDS = 60


def policies(rng, sharpness: float, noise: float):
    """Next-token distributions (WORDS, WORDS) by the token before: of a policy, and of a student near it."""
    logits = sharpness * rng.standard_normal((WORDS, WORDS))
    near = logits + noise * rng.standard_normal(logits.shape)
    return (np.exp(x - np.log(np.exp(x).sum(-1, keepdims=True))) for x in (logits, near))


def kept(p: np.ndarray, top_p: float = 1.0, top_k: int = WORDS) -> np.ndarray:
    """(WORDS,) bool: what top-k, then top-p keeps, by a loop."""
    found, total = np.zeros(WORDS, bool), 0.0
    order = np.argsort(-p)[:top_k]
    for token in order:
        found[token] = True
        total += p[token]
        if total >= top_p * p[order].sum():
            break
    return found


def drawn(rng, p, student, rows=30, length=60, **cut):
    """Rows of (raw log-prob, renormalised log-prob, the student's log-prob, mass that was kept); (length, 4) each."""
    masks = np.array([kept(row, **cut) for row in p])
    found = []
    for _ in range(rows):
        state, values = int(rng.integers(WORDS)), []
        for _ in range(length):
            mass = p[state][masks[state]].sum()
            token = rng.choice(WORDS, p=np.where(masks[state], p[state], 0) / mass)
            raw = math.log(p[state][token])
            values.append((raw, raw - math.log(mass), math.log(student[state][token]), mass))
            state = token
        found.append(np.array(values))
    return found


CUTS = {"top-p": dict(top_p=0.8), "top-k": dict(top_k=20), "both": dict(top_p=0.9, top_k=20)}


@pytest.mark.parametrize("sharpness", [1.2, 2.5])  # nucleus of dozens; of one token at many places
@pytest.mark.parametrize("cut", CUTS)
def test_inspect_suspects_renormalised_log_probs_and_not_raw_ones(cut, sharpness):
    rng = np.random.default_rng(3)
    p, student = policies(rng, sharpness, noise=0.03)
    rows = drawn(rng, p, student, **CUTS[cut])
    student_logprobs = [row[:, 2] for row in rows]
    found = advice(make_data([row[:, 1] for row in rows]), student_logprobs)
    mass = float(np.concatenate(rows)[:, 3].mean())
    if -math.log(mass) < 0.015:
        pytest.skip("next to nothing was cut off")
    finding = found["renormalised"]
    assert finding.severity == "warning" and "fine" not in found
    assert "pi / pi_b is" in finding.text and "--center true" in finding.text
    raw = advice(make_data([row[:, 0] for row in rows]), student_logprobs)
    assert "renormalised" not in raw


def test_exact_zeros_tell_of_top_p_whatever_the_student_is():
    rng = np.random.default_rng(0)
    p, _ = policies(rng, 4.0, 0.0)
    student = np.full((WORDS, WORDS), 1 / WORDS)
    rows = drawn(rng, p, student, top_p=0.8)
    found = advice(make_data([row[:, 1] for row in rows]), [row[:, 2] for row in rows])["renormalised"]
    zeros = sum(int((row[:, 1] > -1e-6).sum()) for row in rows)
    assert f"{zeros} of 1800 behaviour log-probs are exactly 0" in found.text and "pi / pi_b" not in found.text
    assert "renormalised" not in advice(make_data([row[:, 0] for row in rows]), [row[:, 2] for row in rows])
    told = make_data([row[:, 1] for row in rows], sampling={"top_p": 0.8, "logprobs": "processed", "kept_mass": 0.9})
    found = advice(told, [row[:, 2] for row in rows])
    assert "renormalised" not in found and "sampling kept 0.900 (-0.105 nats)" in found["sampling"].text


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.3, 3.0), st.floats(0.0, 1.5), st.sampled_from([{}, *CUTS.values()]))
def test_raw_log_probs_are_never_suspected(seed, sharpness, noise, cut):
    rng = np.random.default_rng(seed)
    p, student = policies(rng, sharpness, noise)
    rows = drawn(rng, p, student, rows=12, length=40, **cut)
    assert "renormalised" not in advice(make_data([row[:, 0] for row in rows]), [row[:, 2] for row in rows])


def test_every_ratio_outside_the_clip_is_not_fine():
    rng = np.random.default_rng(0)
    behavior = [-1.0 - rng.random(12) for _ in range(20)]
    found = advice(make_data(behavior), [b - 0.5 + 0.05 * rng.standard_normal(12) for b in behavior])
    assert "fine" not in found
    finding = found["clipped"]
    assert finding.severity == "warning" and "(100.0% below, 0.0% above)" in finding.text
    assert "position alone" in finding.text
    alone, centred = finding.options
    assert alone.flags == "--log_ratio_clip -0.6 0.3" and centred.flags == f"{alone.flags} --center true"
    assert all("of the ratios inside the clip" in option.effect for option in finding.options)
    both = [b + np.where(np.arange(12) % 2, 0.5, -0.5) for b in behavior]
    found = advice(make_data(behavior), both)
    assert "fine" not in found and any("signs of the ratios alone" in each.text for each in found.values())
    within = advice(make_data(behavior), both, PEAROptions(log_ratio_clip=(-0.6, 0.6)))
    assert not any("outside log_ratio_clip" in each.text for each in within.values())


# ---------------------------------------------------------------------------------------------------------------------
# Import


def as_source(source, rows, p_of):
    """Records with the most likely 20 log-probs beside each; `p_of` (rows, length, WORDS) is what they are of."""
    letters = [chr(0x4E00 + i) for i in range(WORDS)]
    for tokens, places in zip(rows, p_of, strict=True):
        text = "".join(letters[t] for t in tokens)
        top = [np.argsort(-p)[:20] for p in places]
        own = [float(np.log(p[t])) for p, t in zip(places, tokens, strict=True)]
        listed = [
            [(letters[k], float(np.log(p[k]))) for k in ks if p[k] > 0] for ks, p in zip(top, places, strict=True)
        ]
        if source == "chat":
            content = [
                {"token": letters[t], "logprob": value, "top_logprobs": [{"token": a, "logprob": b} for a, b in more]}
                for t, value, more in zip(tokens, own, listed, strict=True)
            ]
            choice = {"message": {"role": "assistant", "content": text}, "logprobs": {"content": content}}
        else:
            logprobs = {"tokens": list(text), "token_logprobs": own, "top_logprobs": [dict(more) for more in listed]}
            choice = {"text": text, "logprobs": logprobs}
        asked = {"prompt": "Q"} if source == "text" else {"messages": [{"role": "user", "content": "Q"}]}
        yield asked | {"response": {"model": "m", "choices": [choice]}}


@pytest.mark.parametrize("source", ["chat", "text"])
@pytest.mark.parametrize("cut", [dict(top_p=0.8), dict(top_k=15)])
def test_import_estimates_the_kept_mass(tmp_path, source, cut):
    rng = np.random.default_rng(0)
    p, _ = policies(rng, 2.0, 0.0)
    states = rng.integers(WORDS, size=(4, 30))
    masks = {s: kept(p[s], **cut) for s in set(states.flat)}
    places = [[p[s] for s in row] for row in states]
    narrowed = [[np.where(masks[s], p[s], 0) / p[s][masks[s]].sum() for s in row] for row in states]
    tokens = [[int(rng.choice(WORDS, p=q)) for q in row] for row in narrowed]
    mass = float(np.mean([p[s][masks[s]].sum() for s in states.flat]))

    def run(p_of, **how):
        write_jsonl(tmp_path / "d.jsonl", as_source(source, tokens, p_of))
        result = import_logprobs(
            "openai", tmp_path / "d.jsonl", tmp_path / "s.jsonl", settings=cut, progress=False, resume=False, **how
        )
        assert result["written"] == 4, (tmp_path / "s.jsonl.rejects.jsonl").read_text()
        return [row for _, row in read_jsonl(tmp_path / "s.jsonl")], " ".join(result["warnings"])

    rows, said = run(places, logprobs_of="raw")
    (told,) = re.findall(r"sampling kept (\S+) of the probability on average", said)
    assert float(told) == pytest.approx(mass, abs=2e-3)  # at a few places 20 tokens are no 0.8
    assert np.mean([row["behavior_sampling"]["kept_mass"] for row in rows]) == pytest.approx(mass, abs=2e-3)
    rows, said = run(narrowed)
    assert "--logprobs_of raw, tempered or processed" in said  # asked
    assert "add up to 1 at all 120 places, so they were renormalised" in said
    rows, said = run(narrowed, logprobs_of="processed")
    assert "add up to 1" not in said and f"renormalised over what {next(iter(cut))} kept" in said
    assert "kept_mass" not in rows[0]["behavior_sampling"]


def test_import_suspects_exact_zeros(tmp_path):
    rng = np.random.default_rng(0)
    p, student = policies(rng, 4.0, 0.0)
    rows = drawn(rng, p, student, rows=8, top_p=0.8)
    for column, suspected in ((1, True), (0, False)):
        record = {"prompt": "Q", "completion": "a" * 60, "tokens": ["a"] * 60}
        write_jsonl(tmp_path / "d.jsonl", [record | {"logprobs": row[:, column].tolist()} for row in rows])
        result = import_logprobs(
            "jsonl", tmp_path / "d.jsonl", tmp_path / "s.jsonl", policy="p", columns_named={"tokens": "tokens"},
            progress=False,
        )  # fmt: skip
        said = " ".join(result["warnings"])
        assert ("look renormalised over what top-p kept" in said) == suspected
        assert "does not tell how they were sampled" in said and "--logprobs_of" in said


@settings(max_examples=100)
@given(st.integers(0, 10**6), st.floats(0.1, 1.0), st.integers(1, 30))
def test_kept_mass_is_that_of_a_loop(seed, top_p, top_k):
    p = np.random.default_rng(seed).dirichlet(np.full(WORDS, 0.3))
    told = {"top_p": top_p, "top_k": top_k, "logprobs": "raw"}
    listed = tuple(np.log(np.sort(p)[::-1][:30] + 1e-300).tolist())
    assert sampling.kept(listed, told) == pytest.approx(p[kept(p, top_p, top_k)].sum(), abs=1e-9)
    assert sampling.kept(listed, told | {"temperature": 0.7}) is None
    assert sampling.kept(listed[: top_k - 1], told) is None
    assert len(TEXT_IDS) > WORDS and json.dumps(told)
