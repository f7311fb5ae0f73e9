"""Problems, splits and rewards: against an evaluator of our own, and against answers known as right, wrong or junk."""

import ast
import operator
from fractions import Fraction
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pear.tasks as tasks
from pear.countdown import STYLES, train_problems, worked_example
from pear.tasks import TASKS, Problem, countdown_identity, countdown_prompt, extract_answer, load_task, reward, split_of


def countdown(numbers: list[int], target: int) -> Problem:
    entry = {"question": "", "answer": "", "metadata": {"numbers": numbers, "target": target}}
    return Problem("countdown", "", countdown_prompt(numbers, target), countdown_identity(numbers, target), entry)


# ---- rewards


@pytest.mark.parametrize(
    "text",
    [
        "3*7*2",
        "(3 * 7) * 2",
        "2*3*7.",
        "3 * 7 = 21 , 21 * 2 = 42 ; answer ( 3 * 7 ) * 2",
        "Let me think: 3 + 7 = 10.\nThe answer is `3*7*2`.",
        "<answer>3*7*2</answer> and then some",
        "<answer>3+7+2</answer> no: <answer>3*7*2",
        "Final answer: $7*3*2$",
        "2*7*3\n\n",
    ],
)
def test_right_answers(text):
    assert reward(countdown([3, 7, 2], 42), text) == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   \n ",
        "42",  # uses none of the numbers
        "3*7*2 = 42",  # not what the question asks for
        "3*7+2",  # another result
        "3*7*2*1",  # a number too many
        "3*7+7+7+7",  # one too often
        "7*6",  # right result, wrong numbers
        "21*2",
        "3 7 2",
        "3*7*",
        "(3*7*2",
        "3(7)(2)",
        "()(3*7*2)",
        "3*7*2 is my answer",
        "answer",
        "x*3*7*2",
        "3*7*2#",
        "3*7*2/(1-1)",
        "0/0",
        "½",
        "٣*٧*٢",  # digits to Python, not what anyone asked for
        "(" * 5000 + "3*7*2" + ")" * 5000,
        "3*7*" + "2" * 5000,
        "\x00",
        "🙂",
    ],
)
def test_wrong_answers_and_junk(text, recwarn):
    assert reward(countdown([3, 7, 2], 42), text) == 0
    assert not [w for w in recwarn if w.category is SyntaxWarning]


@pytest.mark.parametrize("text", ["9**9**9**9", "2**3*7", "7//2*3", "9**(9**9)", "factorial(99999)*3", "3!*7"])
def test_powers_and_calls_never_reach_the_scorer(text, monkeypatch):
    def scorer(answer, entry):
        raise AssertionError(f"the scorer was given {answer!r}")

    monkeypatch.setattr(tasks, "_scorer", lambda dataset: scorer)
    assert reward(countdown([3, 7, 2], 42), text) == 0


def test_code_in_an_answer_is_not_run(tmp_path):
    # sympy's parse_expr, which countdown's scorer uses, would run this.
    target = tmp_path / "made"
    assert reward(countdown([3, 7, 2], 42), f"__import__('pathlib').Path('{target}').touch()") == 0
    assert not target.exists()


_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant):
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp):
        return -_value(node.operand)
    return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))


@given(
    used=st.lists(st.integers(1, 10), min_size=3, max_size=3),
    ops=st.lists(st.sampled_from("+-*/"), min_size=2, max_size=2),
    left=st.booleans(),
    given_numbers=st.none() | st.lists(st.integers(1, 10), min_size=3, max_size=3),
    target=st.none() | st.integers(1, 50),
)
def test_reward_agrees_with_exact_fractions(used, ops, left, given_numbers, target):
    a, b, c = used
    text = f"({a} {ops[0]} {b}) {ops[1]} {c}" if left else f"{a} {ops[0]} ({b} {ops[1]} {c})"
    try:
        value = _value(ast.parse(text, mode="eval").body)
    except ZeroDivisionError:
        value = None
    if target is None:  # aim at the value where that is a target there can be
        target = int(value) if value is not None and value.denominator == 1 and 1 <= value <= 50 else 1
    numbers = used[::-1] if given_numbers is None else given_numbers
    right = value == target and sorted(numbers) == sorted(used)
    assert reward(countdown(numbers, target), text) == int(right)


@pytest.mark.parametrize("style", STYLES)
def test_worked_examples_are_right_and_of_the_train_split(style):
    rng = Random(0)
    for _ in range(100):
        prompt, completion = worked_example(rng, train_problems(), style)
        numbers, target = prompt.removesuffix(" :").split(" = ")
        numbers, target = [int(n) for n in numbers.split()], int(target)
        assert split_of(countdown_identity(numbers, target)) == "train"
        assert reward(countdown(numbers, target), completion) == 1
        assert reward(countdown(numbers, target + 1), completion) == 0
        for step in completion.split(" ; answer ")[0].replace(",", ";").split(" ; "):  # each of its equations holds
            left, right = step.split(" = ")
            assert _value(ast.parse(left, mode="eval").body) == int(right), completion


@pytest.mark.parametrize("task", ["chain_sum", "basic_arithmetic"])
def test_number_tasks(task):
    for problem in load_task(task, "test", 5):
        answer = problem.entry["answer"]
        assert reward(problem, answer) == 1
        assert reward(problem, f"{problem.compact} {answer}") == 1  # "12 + 7 = 19"
        assert reward(problem, f"I add them.\nThe answer is {answer}.") == 1
        assert reward(problem, str(int(answer) + 1)) == 0
        assert reward(problem, f"{answer} apples") == 0
        assert reward(problem, "") == 0


@pytest.mark.parametrize("error", [ValueError, ZeroDivisionError, SyntaxError, RecursionError])
def test_a_scorer_that_chokes_on_junk_means_wrong(error, monkeypatch):
    def scorer(answer, entry):
        raise error("junk")

    monkeypatch.setattr(tasks, "_scorer", lambda dataset: scorer)
    assert reward(countdown([3, 7, 2], 42), "3*7*2") == 0


@pytest.mark.parametrize("error", [KeyError, AttributeError, TypeError])
def test_a_bug_of_ours_is_not_a_wrong_answer(error, monkeypatch):
    def scorer(answer, entry):
        raise error("metadata")

    monkeypatch.setattr(tasks, "_scorer", lambda dataset: scorer)
    with pytest.raises(error):
        reward(countdown([3, 7, 2], 42), "3*7*2")
    with pytest.raises(TypeError, match="text must be"):
        reward(countdown([3, 7, 2], 42), None)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is 5.\nThe answer is 6.", "6"),
        ("**Answer:** 12", "12"),
        ("answer 1 + 2", "1 + 2"),
        ("I have no answer\n7 + 8", "7 + 8"),
        ("one\ntwo\n\n", "two"),
        ("<answer>\n 9 \n</answer>\nThe answer is 3", "9"),
        ("", ""),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


# ---- problems and splits


@pytest.mark.parametrize("task", sorted(TASKS))
def test_train_and_test_never_meet(task):
    train = [p for seed in (0, 1) for p in load_task(task, "train", 60, seed)]
    test = [p for seed in (0, 1, 2) for p in load_task(task, "test", 30, seed)]
    assert not {p.identity for p in train} & {p.identity for p in test}
    assert not {p.compact for p in train} & {p.compact for p in test}


def test_problems_of_one_draw_differ_and_repeat_by_seed():
    first, again, other = (load_task("countdown", "test", 60, seed) for seed in (3, 3, 4))
    assert [p.question for p in first] == [p.question for p in again]
    assert len({p.identity for p in first}) == 60
    assert [p.compact for p in first] != [p.compact for p in other]
    assert [p.compact for p in first[:20]] == [p.compact for p in load_task("countdown", "test", 20, 3)]


@given(st.permutations([3, 7, 2, 9]), st.integers(1, 99))
def test_reordered_numbers_stay_in_one_split(numbers, target):
    assert split_of(countdown_identity(numbers, target)) == split_of(countdown_identity([2, 3, 7, 9], target))


def test_problems_to_learn_from_never_meet_test_problems():
    known = {countdown_identity(numbers, target) for numbers, target in train_problems()}
    assert len(known) == len(train_problems()) > 1500
    assert not known & {p.identity for p in load_task("countdown", "test", 200)}


def test_test_share_is_near_a_fifth():
    share = sum(split_of(f"problem {i}") == "test" for i in range(5000)) / 5000
    assert abs(share - 0.2) < 4 * (0.2 * 0.8 / 5000) ** 0.5


def test_prompts():
    problem = load_task("countdown", "test", 1)[0]
    numbers, target = problem.entry["metadata"]["numbers"], problem.entry["metadata"]["target"]
    assert problem.prompt("compact") == f"{numbers[0]} {numbers[1]} {numbers[2]} = {target} :"
    assert "arithmetic expression" in problem.prompt() and str(target) in problem.prompt("question")
    with pytest.raises(ValueError, match="question, compact"):
        problem.prompt("short")


def test_configuration_can_be_overridden():
    assert all(
        len(p.entry["metadata"]["numbers"]) == 4
        for p in load_task("countdown", "train", 5, min_numbers=4, max_numbers=4)
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("count_down",), "unknown task 'count_down'.*basic_arithmetic, chain_sum, countdown"),
        (("countdown", "valid"), "split must be 'train' or 'test', got 'valid'"),
        (("countdown", "test", 0), "size must be at least 1, got 0"),
        (("countdown", "test", 5, -1), "seed must be 0 or more, got -1"),
    ],
)
def test_errors_name_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_task(*arguments)


def test_a_problem_space_that_runs_dry_says_so():
    with pytest.raises(ValueError, match=r"size=150: only \d+ different test problems of 'chain_sum'"):
        load_task("chain_sum", "test", 150, min_terms=2, max_terms=2, min_digits=1, max_digits=1)
