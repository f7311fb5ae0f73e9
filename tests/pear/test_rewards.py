"""Rewards that survive a completion they cannot judge, and the two ready ones."""

import importlib.util
import math
import re

import pytest
import torch

from pear.io import DataError
from pear.rewards import GuardedReward, TaskReward, guarded, is_right, math_reward, text_of
from pear.tasks import load_task
from pear.tasks import reward as of_task

TEXTS = ["a", "bb", "bad", "cccc"]


def lengths(prompts, completions, **_):
    if "bad" in completions:
        raise ValueError("cannot judge 'bad'")
    return [len(text) for text in completions]


def returns(*values):
    return lambda prompts, **_: list(values)


def judge(reward, completions=TEXTS, **columns):
    return reward(prompts=[f"Q{i}" for i in range(len(completions))], completions=completions, **columns)


def test_one_that_raises_costs_that_completion_alone():
    reward = GuardedReward(lengths)
    assert judge(reward) == [1, 2, 0, 4]
    (fault,) = reward.take_faults()
    assert (fault.reward, fault.row, fault.prompt, fault.completion) == ("lengths", 2, "Q2", "bad")
    text = str(fault)
    assert text == "reward 'lengths' raised ValueError: cannot judge 'bad'. Prompt: 'Q2'; completion: 'bad'"
    assert reward.take_faults() == []  # taken
    assert judge(reward, ["x"]) == [1] and reward.take_faults() == []


def test_a_long_completion_is_cut_in_the_message():
    reward = GuardedReward(returns(math.nan))
    judge(reward, ["y" * 10000])
    assert len(str(reward.take_faults()[0])) < 600


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, "good", [1.0, 2.0], {}, torch.tensor(math.nan), torch.ones(2), object()]
)
def test_what_is_no_finite_number_scores_zero(value):
    reward = GuardedReward(returns(0.25, value, None, 1))
    assert judge(reward) == [0.25, 0.0, None, 1.0]
    (fault,) = reward.take_faults()
    assert fault.row == 1 and "which is no finite number" in str(fault)


@pytest.mark.parametrize("value", [True, 1, 1.0, "1", torch.tensor(1.0), torch.ones(1)])
def test_what_is_a_number_is_taken(value):
    reward = GuardedReward(returns(value))
    (found,) = judge(reward, ["a"])
    assert found == 1.0 and type(found) is float and not reward.take_faults()


@pytest.mark.parametrize("make", [tuple, torch.tensor, iter])
def test_other_sequences_than_lists(make):
    reward = GuardedReward(lambda prompts, **_: make([1.0, 0.5, 0.0, 2.0]))
    assert judge(reward) == [1.0, 0.5, 0.0, 2.0]


def test_none_stays_none_and_is_no_fault():
    reward = GuardedReward(returns(*[None] * 30))
    assert judge(reward, ["a"] * 30) == [None] * 30 and not reward.take_faults()


def test_ten_in_a_row_end_the_run_across_batches():
    def broken(prompts, completions, **_):
        raise KeyError("column")

    reward = GuardedReward(broken)
    assert judge(reward, [f"first {i}" for i in range(4)]) == [0] * 4
    assert judge(reward, [f"second {i}" for i in range(5)]) == [0] * 5
    assert len(reward.take_faults()) == 9
    with pytest.raises(
        DataError, match="10 completions in a row.*The last: .*'broken' raised KeyError.*'third 0'"
    ) as e:
        judge(reward, [f"third {i}" for i in range(3)])
    assert isinstance(e.value.__cause__, KeyError)


def test_a_judged_one_in_between_starts_the_count_again():
    reward = GuardedReward(lambda prompts, completions, **_: [1.0 if c == "good" else math.nan for c in completions])
    for _ in range(3):
        assert judge(reward, ["bad"] * 9 + ["good"]) == [0] * 9 + [1]
    assert judge(reward, ["bad"] * 9) == [0] * 9
    assert judge(reward, ["good", *["bad"] * 9]) == [1] + [0] * 9
    assert len(reward.take_faults()) == 45
    with pytest.raises(DataError, match="returned nan, which is no finite number"):
        judge(reward, ["bad"])


def test_every_fault_is_one_line():
    class Odd:
        def __float__(self):
            raise RuntimeError("none of mine")

    def lazily(prompts, completions, **_):
        for text in completions:
            if text == "bad":
                raise RuntimeError("first line\nsecond line")
            yield 1.0

    reward = GuardedReward(lazily)
    assert judge(reward) == [1.0, 1.0, 0.0, 1.0]
    (fault,) = reward.take_faults()
    assert "reward 'lazily' raised RuntimeError: first line second line. Prompt: 'Q2'" in str(fault)
    for value in (10**400, Odd(), torch.ones(3000), {"score": 1}, 1j):
        reward = GuardedReward(returns(value))
        assert judge(reward, ["a"]) == [0.0]
        (fault,) = reward.take_faults()
        assert "no finite number" in str(fault) and len(str(fault).splitlines()) == 1 and len(str(fault)) < 600


@pytest.mark.parametrize("count", [0, 3, 5])
def test_wrong_number_of_rewards(count):
    with pytest.raises(DataError, match=rf"'<lambda>' returned {count} rewards for 4 completions; it must return one"):
        judge(GuardedReward(returns(*[1.0] * count)))


@pytest.mark.parametrize("value", [None, 1.0, torch.tensor(1.0)])
def test_no_sequence_at_all(value):
    with pytest.raises(DataError, match=r"returned .*; it must return a list"):
        judge(GuardedReward(lambda prompts, **_: value))


def test_columns_of_a_row_go_with_it():
    """One by one, a column is that row's; what is no column (a state, a list of another length) is not cut."""
    seen = []
    state, table = object(), {"a": 1}

    def reward(prompts, completions, answer, pair, completion_ids, trainer_state, options, table):
        if len(prompts) > 1:
            raise RuntimeError
        seen.append((prompts, completions, answer, pair, completion_ids))
        assert trainer_state is state and options == ["x", "y"] and table == {"a": 1}
        return [answer[0]]

    columns = dict(
        answer=[7, 8, 9, 10], pair=(1, 2, 3, 4), completion_ids=[[1], [2, 3], [4], [5]], trainer_state=state,
        options=["x", "y"], table=table,
    )  # fmt: skip
    assert judge(GuardedReward(reward), **columns) == [7, 8, 9, 10]
    assert seen[1] == (["Q1"], ["bb"], [8], [2], [[2, 3]])


def test_a_stop_by_hand_is_no_fault():
    def stopped(**_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judge(GuardedReward(stopped))


def test_what_is_guarded():
    async def later(prompts, **_):
        return [1.0] * len(prompts)

    class Later:
        async def __call__(self, prompts, **_):
            return [1.0] * len(prompts)

    class Named:
        def __call__(self, prompts, **_):
            return [1.0] * len(prompts)

    model = torch.nn.Linear(1, 1)
    for kept in (later, model, "org/reward-model", (mine := Later())):
        assert guarded(kept) is kept
    assert mine is not None
    around = guarded(lengths)
    assert isinstance(around, GuardedReward) and around.__name__ == "lengths" and guarded(around) is around
    assert guarded(Named()).__name__ == "Named"
    assert guarded(TaskReward([])).__name__ == "task"


# ---- ready ones


@pytest.mark.parametrize("task", ["countdown", "chain_sum"])
def test_task_reward_is_the_task_s(task):
    problems = load_task(task, "train", 4)
    right = [problem.entry["answer"] for problem in problems]
    if task == "countdown":
        right = [problem.entry["metadata"]["expression"] for problem in problems]
    texts = [f"Let me see.\nThe answer is {answer}" for answer in right]
    texts[1] = "I cannot say."
    order = [2, 1, 0, 3]
    rows = [texts[i] for i in order]
    expected = [of_task(problems[i], texts[i]) for i in order]
    assert expected == [1, 0, 1, 1]
    reward = TaskReward(problems)
    assert reward(["?"] * 4, rows, problem=order, trainer_state=None) == expected
    chat = [[{"role": "assistant", "content": text}] for text in rows]
    assert reward(["?"] * 4, chat, problem=order, completion_ids=[[1]] * 4) == expected
    assert [is_right(value) for value in expected] == [True, False, True, True]
    assert not is_right(0.05) and not is_right(math.nan)


def test_text_of():
    assert text_of("plain") == "plain"
    assert text_of([{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]) == "a\nb"
    assert text_of([{"role": "assistant", "content": None}, {"role": "assistant"}]) == "None\nNone"


@pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="package math-verify is not installed")
def test_math_reward():
    texts = [r"It is \boxed{\frac{1}{2}}", r"It is \boxed{3}", "no idea"]
    solutions = [r"\frac{2}{4}", "4", "1"]
    assert math_reward(["?"] * 3, texts, solutions) == [1, 0, 0]
    chat = [[{"role": "assistant", "content": text}] for text in texts]
    assert math_reward(["?"] * 3, chat, solutions, trainer_state=None) == [1, 0, 0]
    assert math_reward(["?"], texts[:1], [""]) == [None]


@pytest.mark.skipif(importlib.util.find_spec("math_verify") is not None, reason="package math-verify is installed")
def test_math_reward_names_its_package():
    with pytest.raises(DataError, match="ImportError: .*math_verify"):
        judge(GuardedReward(math_reward), ["1"] * 10, solution=["1"] * 10)
    assert re.match("math_reward", GuardedReward(math_reward).__name__)
