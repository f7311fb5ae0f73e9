"""Each failure that people met, constructed, is named; data with none of them is called fine."""

import argparse
import json
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inspected import END, TEXT_IDS, TOKENIZER, advice, make_case, make_data, policy_logprobs, shifted

from pear.inspecting.finding import SEVERITIES, listed, share
from pear.inspecting.statistics import summarize
from pear.inspecting.suspicions import FLOORS
from pear_kernels.options import DEFAULTS, PEAROptions

WORRYING = ("problem", "warning")


def pair(seed=0, rows=24, lengths=(80, 160), mean=0.0, spread=0.05, **everywhere):
    """Data of a policy and a student near it."""
    rng = np.random.default_rng(seed)
    behavior = policy_logprobs(rng, rows, lengths)
    return make_data(behavior, **everywhere), shifted(behavior, rng, mean, spread)


def worrying(found):
    return {kind for kind, finding in found.items() if finding.severity in WORRYING}


# ---------------------------------------------------------------------------------------------------------------------
# Healthy data


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(6, 24),
    length=st.integers(20, 300),
    mean=st.floats(-0.004, 0.004),
    spread=st.floats(0.005, 0.05),
    level=st.sampled_from(["token", "block"]),
    high=st.sampled_from([0.08, 0.3]),
)
def test_no_false_alarm(seed, rows, length, mean, spread, level, high):
    rng = np.random.default_rng(seed)
    behavior = policy_logprobs(rng, rows, (max(1, length // 2), length))
    student = shifted([b - 0.1 for b in behavior], rng, mean, spread)  # away from 0, where noise has one side
    found = advice(
        make_data([b - 0.1 for b in behavior]), student, PEAROptions(level=level, log_ratio_clip=(-0.08, high))
    )
    assert not worrying(found), {kind: finding.text for kind, finding in found.items()}
    assert list(found) == ["fine"] and "Looks fine" in found["fine"].text


def test_one_row_and_one_token_are_no_failure():
    assert not worrying(advice(make_data([[-0.5]]), [[-0.52]]))


def test_twenty_equal_rows_are_no_failure():
    """Log-probs that repeat look neither floored nor rounded."""
    rng = np.random.default_rng(1)
    behavior = policy_logprobs(rng, 1, 60) * 20
    student = [b - 0.002 + 0.03 * np.cos(np.arange(60)) for b in behavior]
    assert not worrying(advice(make_data(behavior), student))


# ---------------------------------------------------------------------------------------------------------------------
# What weights do


def test_a_surer_teacher_collapses_the_weights_to_the_floor():
    """method.md: at -0.08 a token the floor, e^-10, comes after 123 tokens with gamma."""
    data, student = pair(lengths=(1500, 2000), rows=6, mean=-0.6, spread=0.2)
    found = advice(data, student)
    floor = found["floor"]
    assert floor.severity == "problem" and list(found) == ["floor"]
    for words in ("on the floor", "exp(-10)", "delta is negative almost everywhere", "teacher", "after 124 tokens"):
        assert words in floor.text, floor.text
    exact = summarize(make_case(data, student).tokens, DEFAULTS)
    assert exact.floor > 0.9 and f"{share(exact.floor)} of the tokens will sit on the floor" in floor.text
    names = [option.flags.split()[0] for option in floor.options]
    assert {"--center", "--clip_length", "--log_ratio_clip"} <= set(names)
    # what does not help is not offered, and said to be in vain
    assert "--level" not in names and "--gamma" not in names
    assert "--level block (" in floor.text and "--normalize sequence (" in floor.text


def test_each_option_states_what_it_would_do():
    data, student = pair(lengths=(300, 400), rows=8, mean=-0.3, spread=0.2)
    case = make_case(data, student)
    parse = {
        "--center": lambda words: {"center": True},
        "--clip_length": lambda words: {"clip_length": int(words[0])},
        "--log_ratio_clip": lambda words: {"log_ratio_clip": tuple(map(float, words))},
    }
    options = advice(data, student)["floor"].options
    assert len(options) == 3
    for option in options:
        flag, *words = option.flags.split()
        then = summarize(case.tokens, DEFAULTS.replace(**parse[flag](words)))
        assert (option.trains, option.ess) == (then.trains, then.ess)
        assert f"{share(then.trains)} of the tokens train (now {share(case.summary.trains)})" in option.effect
        assert f"effective sample size {share(then.ess)}" in option.effect
        assert then.trains > 0.5 > case.summary.trains


def test_the_clips_that_are_named_can_be_typed():
    """argparse takes -5e-05 for the name of an option, so no number is written with an exponent."""
    data, student = pair(rows=8, lengths=(900, 1000), mean=-0.3, spread=0.1)
    options = PEAROptions(log_ratio_clip=(-0.0001, 0.0004), log_weight_clip=(-0.15, 5.0))
    finding = advice(data, student, options)["floor"]
    told = " ".join([finding.text, *(option.flags for option in finding.options)])
    parser = argparse.ArgumentParser()
    parser.add_argument("--log_ratio_clip", type=float, nargs=2)
    (flags,) = re.findall(r"--log_ratio_clip \S+ \S+", told)
    low, high = parser.parse_args(flags.split()).log_ratio_clip
    assert -1e-4 < low < 0 < high


def test_drift_to_the_ceiling():
    """method.md: at +0.01 the ceiling comes after 556 tokens with gamma."""
    rng = np.random.default_rng(0)
    behavior = [b - 0.2 for b in policy_logprobs(rng, 6, (3000, 3500))]
    student = [b + 0.01 for b in behavior]
    found = advice(make_data(behavior), student)
    text = found["ceiling"].text
    assert found["ceiling"].severity == "problem" and "after 556 tokens" in text and "delta is positive" in text
    flags = [option.flags for option in found["ceiling"].options]
    assert "--center" in flags and any(flag.startswith("--gamma 0.9") for flag in flags)


def test_long_responses_of_which_only_the_end_trains():
    """delta is 0 on average; gamma alone takes the front."""
    rng = np.random.default_rng(0)
    behavior = [b - 0.2 for b in policy_logprobs(rng, 4, (4000, 4500))]
    student = [b + rng.choice([-0.001, 0.001], len(b)) for b in behavior]
    found = advice(make_data(behavior), student, PEAROptions(gamma=0.995))
    finding = found.get("last_tokens") or found["floor"]
    assert "gamma" in finding.text and any(option.flags.startswith("--gamma") for option in finding.options)
    mild = advice(make_data(behavior), student, PEAROptions(gamma=0.997, log_weight_clip=(-20.0, 5.0)))
    assert mild["last_tokens"].severity == "warning" and "the last tenth of each response" in mild["last_tokens"].text


def test_a_few_rows_that_carry_everything():
    rng = np.random.default_rng(0)
    behavior = [b - 0.5 for b in policy_logprobs(rng, 20, 60)]
    means = np.full(20, -0.02)
    means[3] = 0.25
    student = [b + mean for b, mean in zip(behavior, means, strict=True)]
    found = advice(make_data(behavior), student, PEAROptions(level="sequence"))
    assert "in 1 of 20 rows" in found["few"].text and found["few"].severity == "warning"


# ---------------------------------------------------------------------------------------------------------------------
# Log-probs that are wrong


def test_behavior_policy_that_is_the_student():
    rng = np.random.default_rng(0)
    behavior = policy_logprobs(rng, 8, 50)
    found = advice(make_data(behavior), [b.astype(np.float64) for b in behavior])
    assert found["copy"].severity == "problem" and "PEAR does nothing" in found["copy"].text
    # in half precision rounding alone moves log-probs
    rounded = [torch.from_numpy(b).bfloat16().float().numpy() for b in behavior]
    assert "copy" in advice(make_data(behavior), rounded, half=True)
    assert "copy" not in advice(make_data(behavior), rounded, half=False)
    # nor does it count what was stored rounded
    assert "copy" in advice(make_data(rounded), [b.astype(np.float64) for b in behavior])
    near = [b - 0.04 for b in behavior]
    assert not {"copy"} & advice(make_data(behavior), near, half=True).keys()


def test_one_of_two_policies_is_the_student():
    rng = np.random.default_rng(0)
    behavior = policy_logprobs(rng, 9, 50)
    student = [
        b.astype(np.float64) if i < 3 else np.minimum(b - 0.04 + 0.05 * np.sin(np.arange(50)), 0)
        for i, b in enumerate(behavior)
    ]
    found = advice(make_data(behavior, {i: {"policy": "self"} for i in range(3)}), student)
    assert found["copy"].severity == "warning" and "(self; 33% of the tokens" in found["copy"].text


def test_log_probs_that_are_all_zero():
    data, student = pair(mean=-0.02)
    for i in (2, 5):
        data.rows[i] = data.rows[i]._replace(behavior_logprobs=np.zeros_like(data.rows[i].behavior_logprobs))
    finding = advice(data, student)["zeros"]
    assert finding.severity == "problem" and "2 rows of 24" in finding.text and "lines 3, 6" in finding.text
    assert "greedy" in finding.text
    assert "without --model it keeps log-probs that are sealed" in finding.text and "--fallback none" in finding.text
    everything = [np.zeros(900)] * 6
    found = advice(make_data(everything), policy_logprobs(np.random.default_rng(0), 6, 900))
    assert "repair them first" in found["floor"].text and not found["floor"].options


@pytest.mark.parametrize("eps", [1e-6, 1e-8, 1e-10, 1e-12])
def test_log_probs_with_an_epsilon(eps):
    """log(softmax + 1e-10), found in the wild: nothing lies below -23.03."""
    data, student = pair(rows=20)
    for row, values in zip(data.rows, student, strict=True):
        row.behavior_logprobs[::11] = values[::11] = np.linspace(-40, -30, len(values[::11]))
        row.behavior_logprobs[:] = np.log(np.exp(row.behavior_logprobs.astype(np.float64)) + eps)
    finding = advice(data, student)["floored"]
    assert (
        finding.severity == "problem"
        and f"{math.log(eps):.2f}" in finding.text
        and f"1e-{-math.log10(eps):.0f}" in finding.text
    )


@pytest.mark.parametrize("filler", [-9999.0, -100.0])
def test_fillers_of_servers(filler):
    data, student = pair()
    for row in data.rows:
        row.behavior_logprobs[5] = filler
    assert f"a filler of {filler:g}" in advice(data, student)["floored"].text
    assert all(math.isfinite(value) for value in FLOORS.values())


@pytest.mark.parametrize(
    ("name", "narrow"),
    [
        ("bfloat16", lambda x: torch.from_numpy(x).bfloat16().float().numpy()),
        ("float16", lambda x: x.astype(np.float16).astype(np.float32)),
        ("2 decimals", lambda x: np.round(x, 2)),
    ],
)
def test_log_probs_that_went_through_a_narrow_format(name, narrow):
    data, student = pair()
    for row in data.rows:
        row.behavior_logprobs[:] = narrow(row.behavior_logprobs)
    found = advice(data, student)
    kind = "rounded" if "decimals" in name else "half_precision"
    assert name in found[kind].text and worrying(found) == {kind}


def test_one_policy_of_several_was_stored_in_half_precision():
    data, student = pair(rows=12)
    for i in (0, 1, 2, 3):
        row = data.rows[i]
        row.behavior_logprobs[:] = torch.from_numpy(row.behavior_logprobs).bfloat16().float().numpy()
        data.rows[i] = row._replace(policy="server")
    found = advice(data, student)
    assert worrying(found) == {"half_precision"} and found["half_precision"].text.startswith("server: ")


@pytest.mark.parametrize("lag", [-2, -1, 1, 2])
def test_log_probs_of_a_neighbouring_token(lag):
    data, student = pair(rows=10)
    for row in data.rows:
        row.behavior_logprobs[:] = np.roll(row.behavior_logprobs, lag)
    finding = advice(data, student)["shifted"]
    assert finding.severity == "problem"
    assert f"{abs(lag)} token{'s' if abs(lag) > 1 else ''} too {'late' if lag > 0 else 'early'}" in finding.text


def test_template_tokens_that_the_student_does_not_know():
    """Scored with <think> in the template, which the student never saw: its first tokens are far off."""
    data, student = pair(mean=-0.002)
    for row, values in zip(data.rows, student, strict=True):
        row.input_ids[2] = TEXT_IDS[40]
        values[0] = -14.0
        values[-1] = row.behavior_logprobs[-1] - 11.0
    finding = advice(data, student)["template"]
    first = repr(TOKENIZER.convert_ids_to_tokens(TEXT_IDS[40]))
    assert finding.severity == "warning" and "first token" in finding.text and "last token" in finding.text
    assert f"({first} in 100%)" in finding.text and "template" in finding.text


def test_a_special_token_in_the_middle():
    data, student = pair(rows=8, mean=-0.002)
    marker = TOKENIZER.convert_tokens_to_ids("<|im_start|>")
    for row, values in zip(data.rows, student, strict=True):
        row.input_ids[2 + 30] = marker
        values[30] = row.behavior_logprobs[30] - 9.0
    assert "'<|im_start|>' (8 times)" in advice(data, student)["template"].text


def test_a_student_that_is_far_off_everywhere_has_no_template_trouble():
    data, student = pair(mean=-8.0, spread=3.0)
    found = advice(data, student)
    assert "template" not in found and worrying(found) == {"last_tokens"}


def test_rows_that_somebody_else_wrote():
    data, student = pair(rows=30, mean=-0.003)
    student[4] = student[4] - 6
    student[20] = student[20] - 7
    finding = advice(data, student)["outliers"]
    assert "lines 5, 21" in finding.text and "2 rows of 30" in finding.text


def test_text_likelier_to_the_student_than_to_who_wrote_it():
    """E[log pi - log pi_b] under pi_b is minus a KL divergence: exactly so for two distributions and samples of one."""
    rng = np.random.default_rng(0)
    policy, student = (rng.dirichlet(np.full(50, 0.5), 1)[0] for _ in range(2))
    drawn = {
        "its own": [rng.choice(50, 40, p=policy) for _ in range(20)],
        "another's": [rng.choice(50, 40, p=student) for _ in range(20)],
    }
    for who, rows in drawn.items():
        data = make_data([np.log(policy[row]) for row in rows])
        found = advice(data, [np.log(student[row]) for row in rows])
        assert ("too_likely" in found) == (who == "another's")
    assert found["too_likely"].severity == "warning" and "teacher (+" in found["too_likely"].text
    estimated = data._replace(rows=[row._replace(estimated=True) for row in data.rows])
    assert "too_likely" not in advice(estimated, [np.log(student[row]) for row in rows])


def test_sampling_that_bends_the_ratios_and_estimates():
    data, student = pair(rows=10)
    for i in range(4):
        data.rows[i] = data.rows[i]._replace(sampling={"temperature": 0.6, "top_p": 0.95})
    data.rows[9] = data.rows[9]._replace(estimated=True, policy="gpt2")
    found = advice(data, student)
    assert "4 rows of 10" in found["sampling"].text and "temperature 0.6, top_p 0.95 (4 rows)" in found["sampling"].text
    assert found["sampling"].severity == "warning" and found["estimated"].severity == "note"
    assert "gpt2" in found["estimated"].text


def test_sampling_that_log_probs_tell_of():
    data, student = pair(rows=4)
    tempered = {"temperature": 0.6, "logprobs": "processed"}
    rows = [row._replace(sampling=tempered) for row in data.rows]
    assert "sampling" not in advice(data._replace(rows=rows), student)


def test_a_first_word_the_student_would_not_choose_is_only_noted():
    data, student = pair(mean=-0.002)
    for values in student:
        values[0] = -9.0
    found = advice(data, student)
    assert found["template"].severity == "note" and "fine" in found


def test_human_text_beside_a_collapsed_teacher():
    """Weights of 1 drown the others, and say nothing about them."""
    data, student = pair(rows=12, lengths=(900, 1000), mean=-0.3, spread=0.1)
    nobody = np.full(1000, -1, np.int32)
    rows = [
        row._replace(policy=None, spans=nobody[: len(row.behavior_logprobs)]) if i < 6 else row
        for i, row in enumerate(data.rows)
    ]
    found = advice(data._replace(rows=rows), student)
    assert found["floor"].severity == "problem" and "6 other rows are not counted" in found["floor"].text
    alone = advice(data._replace(rows=rows[6:]), student[6:])["floor"]
    assert alone.options == found["floor"].options and alone.text[:40] == found["floor"].text[:40]
    finding = found["some_without_policy"]
    assert finding.severity == "warning" and "of all weight" in finding.text
    assert "At levels token and block, --normalize sequence" in finding.text  # level sequence refuses it


def test_rows_without_a_policy():
    def human(row):
        return row._replace(policy=None, spans=np.full(len(row.behavior_logprobs), -1, np.int32))

    data, student = pair(rows=10)
    some = data._replace(rows=[human(row) if i < 5 else row for i, row in enumerate(data.rows)])
    found = advice(some, student)
    assert found["some_without_policy"].severity == "note" and "5 rows of 10" in found["some_without_policy"].text
    assert "fine" in found
    every = data._replace(rows=[human(row) for row in data.rows])
    found = advice(every, student)
    assert worrying(found) == {"no_policy"} and "plain SFT" in found["no_policy"].text


def test_rows_that_do_not_align():
    data, student = pair(rows=10)
    found = advice(
        data._replace(unaligned={7: "the text does not round-trip", 9: "the text does not round-trip"}), student
    )
    assert found["unaligned"].severity == "problem" and "2 rows of 12" in found["unaligned"].text
    assert "lines 7, 9" in found["unaligned"].text and "does not round-trip (2)" in found["unaligned"].text
    spans = np.full(len(student[0]), -1, np.int32)
    spans[::3] = np.arange(len(spans[::3]))
    rows = [data.rows[0]._replace(spans=spans, aligned=True), *data.rows[1:]]
    finding = advice(data._replace(rows=rows), student, DEFAULTS.replace(clip_blocks=True))["few_shared"]
    assert finding.severity == "warning" and "--roles" in finding.text and "line 1" in finding.text


def test_wrong_answers():
    data, student = pair(rows=12)
    wrong = {"right": False}
    few = data._replace(rows=[row._replace(**wrong) if i < 4 else row for i, row in enumerate(data.rows)])
    assert advice(few, student)["negatives_present"].severity == "note"
    refused = advice(few, student, DEFAULTS.replace(normalize="batch"))["negatives_present"]
    assert "refuses --normalize batch beside --negatives" in refused.text
    many = data._replace(rows=[row._replace(**wrong) if i else row for i, row in enumerate(data.rows)])
    assert "--negative_lambda" in advice(many, student)["negatives"].text
    loud = [values + (0.06 if i else 0.0) for i, values in enumerate(np.array(s) - 0.5 for s in student)]
    quiet = many._replace(rows=[row._replace(behavior_logprobs=row.behavior_logprobs - 0.5) for row in many.rows])
    finding = advice(quiet, loud)["negatives"]
    assert finding.severity == "problem" and "push harder than the right ones pull" in finding.text


# ---------------------------------------------------------------------------------------------------------------------
# Wording


def test_worst_first_and_too_long_rows_are_told():
    data, student = pair(rows=10, mean=-0.5)
    data.rows[0] = data.rows[0]._replace(sampling={"top_k": 20})
    found = advice(data._replace(too_long=[12, 15]), student)
    order = [SEVERITIES.index(finding.severity) for finding in found.values()]
    assert order == sorted(order) and "lines 12, 15" in found["too_long"].text
    assert "fine" not in found
    json.dumps([finding._asdict() for finding in found.values()], allow_nan=False)


@given(st.floats(0, 1))
def test_shares_are_never_rounded_to_all_or_nothing(value):
    assert (share(value) == "0%") == (value == 0) and (share(value) == "100%") == (value == 1)


def test_lines_are_listed_as_people_read_them():
    assert listed([4]) == "line 4" and listed(list(range(1, 13))).endswith("9, 10, ...")
    assert END not in TEXT_IDS
