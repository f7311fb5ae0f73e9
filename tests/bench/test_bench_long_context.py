"""The longest row: how it is looked for, that a stopped search goes on, and that both losses do the same step."""

import json
import math
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import long_context, machine
from bench.long_context import Rules, TinyRig, Trial, is_closed, limits, next_tokens
from bench.store import Store
from pear_kernels import linear_logprobs

RULES, SMALL = Rules(), Rules(16, 32, (64, 128))
FACTS = {"device": "tiny", "versions": "torch 0", "source": "0", "commit": "abc", "cpu": "a cpu", "threads": 1}
FACTS["capacity"] = TinyRig.capacity


def search(memory, seconds, capacity, rules=RULES, usable=0.98):
    """Trials of a search on a card of `capacity` bytes, where a row's memory and time are functions of its tokens."""
    trials = []
    while (tokens := next_tokens(trials, int(usable * capacity), rules, seconds)) is not None:
        assert tokens not in [trial.tokens for trial in trials] and tokens % rules.multiple == 0 < tokens
        fits = memory(tokens) <= capacity
        trials.append(Trial(tokens, fits, memory(tokens) if fits else None, seconds(tokens) if fits else None))
        assert len(trials) < 40
    return trials


@settings(deadline=None, max_examples=200)
@given(
    static=st.floats(0.05, 0.8),
    a_token=st.floats(1e-6, 2e-4),
    second=st.floats(0.2, 5.0),
    second_static=st.floats(0.0, 0.8),
)
def test_search_ends_at_a_row_that_fits_with_one_that_does_not_right_above(static, a_token, second, second_static):
    capacity = 10**9

    def memory(tokens):  # of two moments of a step the larger
        return int(capacity * max(static + a_token * tokens, second_static + second * a_token * tokens))

    trials = search(memory, lambda tokens: 1e-9 * tokens, capacity)
    low, high = limits(trials)
    assert is_closed(trials, RULES)
    assert high - low <= max(RULES.multiple, low / RULES.resolution)
    assert low == 0 or memory(low) <= capacity
    assert memory(int(high)) > capacity
    assert len(trials) <= 16, [trial.tokens for trial in trials]


def test_search_of_one_line_takes_few_tries():
    """As of a card of 80 GB: 14 GB of states, 285 kB a token."""
    trials = search(lambda tokens: int(14e9 + 285e3 * tokens), lambda tokens: 1e-9 * tokens**2, 83e9)
    assert len(trials) <= 6, [trial.tokens for trial in trials]


@pytest.mark.parametrize("linear", [0.0, 1e-4])
def test_no_row_is_tried_that_takes_longer_than_the_limit(linear):
    def seconds(tokens):
        return linear * tokens + 1.2e-9 * tokens**2

    trials = search(lambda tokens: int(5e9 + 150e3 * tokens), seconds, 83e9)
    assert not is_closed(trials, RULES) and limits(trials)[1] == math.inf
    longest = limits(trials)[0]
    assert seconds(longest) <= RULES.step_seconds
    assert seconds(1.25 * longest) > RULES.step_seconds, "a longer one would have done"


def test_time_is_predicted_as_it_was_measured():
    """Rows that were measured on an H100, a prediction from the shorter one: two seconds became two minutes."""
    work = partial(long_context.step_flops, long_context.SHAPES["qwen3-0.6b"])
    measured = [Trial(4096, True, 1, 0.20), Trial(41984, True, 2, 2.02)]
    assert 100 < long_context.predicted_seconds(measured, 348160, work) < 140  # 120.05
    work = partial(long_context.step_flops, long_context.SHAPES["qwen3-8b"])
    assert 8 < long_context.predicted_seconds([Trial(15360, True, 1, 2.02)], 47104, work) < 12  # 9.65


def test_an_error_ends_the_search():
    assert next_tokens([Trial(4096, True, 10, 1.0), Trial(8192, False, error="no")], 100, RULES, float) is None


@pytest.mark.parametrize("lora", [False, True])
def test_both_losses_make_the_same_step(lora, monkeypatch):
    """On-policy PEAR weights are 1 where nothing is discounted, so that ours is transformers' own loss."""
    monkeypatch.setattr(long_context, "linear_pear_loss", partial(long_context.linear_pear_loss, gamma=1.0))
    rig = TinyRig("qwen3-0.6b" + long_context.LORA * lora)
    if lora:  # whose B is 0 at first, and then the gradient of A too
        with torch.no_grad():
            for name, parameter in rig.model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.1)
    ids, _ = rig.batch(48)
    trained = [parameter for parameter in rig.model.parameters() if parameter.requires_grad]
    naive = rig.loss("naive", ids, ids)
    of_naive = torch.autograd.grad(naive, trained)
    with torch.no_grad():
        hidden = rig.causal_lm.model(input_ids=ids).last_hidden_state
        behavior = linear_logprobs(hidden[:, :-1], rig.causal_lm.lm_head.weight, ids[:, 1:])
    ours = rig.loss("pear", ids, torch.nn.functional.pad(behavior, (1, 0)))
    assert math.isclose(ours.item(), naive.item(), rel_tol=1e-6)
    assert len(trained) == 16 if lora else len(trained) == 24
    for mine, theirs in zip(torch.autograd.grad(ours, trained), of_naive, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)


def test_attention_has_no_mask_of_length_squared(monkeypatch):
    seen = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def spy(*args, attn_mask=None, is_causal=False, **kwargs):
        seen.append((attn_mask, is_causal))
        return attention(*args, attn_mask=attn_mask, is_causal=is_causal, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    for head in long_context.HEADS:
        TinyRig("qwen3-0.6b").step(head, 32)
    assert len(seen) == 2 * 2 * 2  # heads, layers, and each layer once more in the backward pass
    assert set(seen) == {(None, True)}


def measured(folder, *, stop_after=math.inf, rules=SMALL):
    """Tokens of the tries that this run made itself, and the store after it."""
    made = []

    class Rig(TinyRig):
        def step(self, head, tokens):
            if len(made) == stop_after:
                raise KeyboardInterrupt
            made.append((head, tokens))

    store = Store(folder, FACTS)
    try:
        long_context.measure_all(store, ["qwen3-0.6b"], "transformers", rules, Rig, time.time() + 100)
    except KeyboardInterrupt:
        pass
    return made, store


def test_a_stopped_search_goes_on_where_it_was(tmp_path):
    whole, store = measured(tmp_path / "whole")
    first, _ = measured(tmp_path / "parts", stop_after=4)
    rest, parts = measured(tmp_path / "parts")
    assert len(first) == 4 and first + rest == whole
    assert {name: row["fits"] for name, row in parts.rows.items()} == {k: row["fits"] for k, row in store.rows.items()}
    again, _ = measured(tmp_path / "parts")
    assert again == []


def test_longest_rows_are_those_of_the_stand_in_memory(tmp_path):
    _, store = measured(tmp_path)
    for head, lines in TinyRig.lines.items():
        fitting = min((TinyRig.capacity - at_zero) // a_token for at_zero, a_token in lines)
        trials = long_context.trials_of(store, long_context.Case("qwen3-0.6b", "transformers", head))
        low, high = limits(trials)
        assert low <= fitting < high and high - low <= max(16, fitting / 32)
    naive = limits(long_context.trials_of(store, long_context.Case("qwen3-0.6b", "transformers", "naive")))[0]
    ours = long_context.trials_of(store, long_context.Case("qwen3-0.6b", "transformers", "pear"))
    assert naive in [trial.tokens for trial in ours], "both losses are to be compared there"


def test_the_deadline_ends_it_and_says_so(tmp_path):
    store = Store(tmp_path, FACTS)
    assert not long_context.measure_all(store, ["qwen3-0.6b"], "transformers", RULES, TinyRig, time.time() - 1)
    assert store.rows == {}


def test_an_error_is_kept_until_asked_to_retry(tmp_path):
    def broken(_):
        raise RuntimeError("no such library")

    store = Store(tmp_path, FACTS)
    assert long_context.measure_all(store, ["qwen3-0.6b"], "transformers", SMALL, broken, time.time() + 100)
    assert [row["error"] for row in store.rows.values()] == ["no model to try it on: RuntimeError: no such library"] * 2
    again, _ = measured(tmp_path)
    assert again == []
    Store(tmp_path, FACTS).forget_errors()
    again, store = measured(tmp_path)
    assert again[0] == ("naive", 64) and not any("error" in row for row in store.rows.values())


def test_the_report_has_the_figures_that_were_stored(tmp_path):
    rows = {}

    def add(head, tokens, fits, gib=None, seconds=None):
        row = {"model": "qwen3-4b", "trunk": "transformers", "head": head, "commit": "abc", "tokens": tokens}
        row |= {"fits": True, "bytes": int(gib * 2**30), "seconds": seconds} if fits else {"fits": False}
        rows[f"{head}/{tokens}"] = row

    add("naive", 20480, True, 76.5, 3.25)
    add("naive", 21504, False)
    add("pear", 20480, True, 41.5, 2.75)
    add("pear", 102400, True, 77.25, 44.5)
    folder = long_context.write(FACTS, rows, RULES, False, tmp_path)
    text = (folder / "long_context.md").read_text()
    line = "| qwen3-4b | 20480 | > 102400 | 5.0 | 76.5 | 41.5 | 3.25 | 2.75 | 77.2 | 44.50 |"
    assert line in text, "no longer row was seen to fail, so there is a >"
    add("pear", 131072, False)
    folder = long_context.write(FACTS, rows, RULES, True, tmp_path)
    text = (folder / "long_context.md").read_text()
    assert line.replace("> 102400", "102400 to 131072") in text, "a row was seen to fail, so time alone did not end it"
    add("pear", 104448, False)
    folder = long_context.write(FACTS, rows, RULES, True, tmp_path)
    text = (folder / "long_context.md").read_text()
    assert line.replace("> ", "") in text and "Not complete" in text and "out of memory" in text
    assert json.loads((folder / "long_context.json").read_text())["rows"] == rows
    assert (folder / "long_context.png").stat().st_size > 10_000


def test_the_command_on_a_cpu(tmp_path):
    command = [sys.executable, "-m", "bench.long_context", "--device", "tiny", "--out", str(tmp_path)]
    command += ["--models", "qwen3-0.6b"]
    stopped = subprocess.run([*command, "--minutes", "0"], cwd=machine.ROOT, capture_output=True, text=True)
    assert stopped.returncode == long_context.RUN_ME_AGAIN, stopped.stderr
    done = subprocess.run(command, cwd=machine.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| qwen3-0.6b | 800 | 2928 | 3.7 |" in done.stdout
