"""Worked sums: against reasoning-gym's problems and scorer, sums taken in another way, and tokens counted by hand."""

import re
from collections import Counter
from random import Random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import pear.countdown
from pear.arithmetic import LARGEST, STYLES, make_tokenizer, train_problems, worked_example
from pear.models import load_tokenizer
from pear.tasks import extract_answer, load_task, reward, split_of
from pear.word_tokenizer import word_tokenizer

TOKENIZER = make_tokenizer()
ALL_NINES, ALL_TAKEN = " + ".join("9" * 8), " - ".join("09999999")  # the farthest that one digit can go


@st.composite
def expressions(draw, largest: int = 9) -> str:
    """Two to eight terms from 0 to `largest`."""
    terms = draw(st.lists(st.integers(0, largest), min_size=2, max_size=8))
    signs = draw(st.lists(st.sampled_from("+-"), min_size=len(terms) - 1, max_size=len(terms) - 1))
    return str(terms[0]) + "".join(f" {sign} {term}" for sign, term in zip(signs, terms[1:], strict=True))


def value(expression: str) -> int:
    """The sum of the signed terms, all at once."""
    return sum(map(int, re.findall(r"[+-]?\d+", expression.replace(" ", ""))))


# ---- worked examples


def test_the_two_styles():
    solutions = {style: worked_example(Random(0), ["3 + 8 - 5 + 2"], style) for style in STYLES}
    assert solutions == {
        "pairs": ("3 + 8 - 5 + 2 =", "3 + 8 = 11 , 11 - 5 = 6 , 6 + 2 = 8 ; answer 8"),
        "checked": (
            "3 + 8 - 5 + 2 =",
            "3 + 8 = 11 , 11 - 8 = 3 ; 11 - 5 = 6 , 6 + 5 = 11 ; 6 + 2 = 8 , 8 - 2 = 6 ; answer 8",
        ),
    }
    assert worked_example(Random(0), ["3 - 9"], "pairs") == ("3 - 9 =", "3 - 9 = -6 ; answer -6")
    assert worked_example(Random(0), ["3 - 9"], "checked") == ("3 - 9 =", "3 - 9 = -6 , -6 + 9 = 3 ; answer -6")


@given(expressions(largest=99))
def test_checked_is_pairs_with_each_step_undone(problem):
    prompt, solution = worked_example(Random(0), [problem], "checked")
    *parts, answer = solution.split(" ; ")
    steps = [part.split(" , ")[0] for part in parts]
    assert (prompt, " , ".join(steps) + " ; " + answer) == worked_example(Random(0), [problem], "pairs")
    for step, check in (part.split(" , ") for part in parts):
        before, _, term, _, after = step.split(" ")
        left, right = check.split(" = ")
        assert value(left) == int(right) == int(before) and left.split(" ")[::2] == [after, term]


@given(expressions(largest=99))
def test_pairs_take_each_term_once_and_each_holds(problem):
    prompt, solution = worked_example(Random(0), [problem], "pairs")
    steps, answer = solution.split(" ; answer ")
    carried, taken = problem.split(" ")[0], []
    for step in steps.split(" , "):
        left, right = step.split(" = ")
        first, *rest = left.split(" ")
        assert first == carried and right == str(value(left))
        carried, taken = right, taken + rest
    assert taken == problem.split(" ")[1:] and prompt == f"{problem} ="
    assert carried == answer == str(value(problem))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("split", ["train", "test"])
def test_reasoning_gym_finds_the_answers_right(style, split):
    answers = []
    for problem in load_task("chain_sum", split, 200, min_terms=6, max_terms=8, min_digits=1, max_digits=1):
        prompt, solution = worked_example(Random(0), [problem.entry["metadata"]["expression"]], style)
        assert prompt == problem.prompt("compact")
        read = TOKENIZER.decode(TOKENIZER(solution)["input_ids"])
        assert reward(problem, read) == reward(problem, f"{prompt} {read}") == 1
        answers.append(int(extract_answer(read)))
        assert reward(problem, re.sub(r"\S+$", str(answers[-1] + 1), read)) == 0
        assert answers[-1] == 0 or reward(problem, re.sub(r"\S+$", str(-answers[-1]), read)) == 0
    assert min(answers) < 0 < max(answers) and 0 in answers


def test_examples_are_drawn_from_all_problems():
    problems = ["1 + 2", "3 - 4", "5 + 6"]
    rng = Random(0)
    prompts = Counter(worked_example(rng, problems, "pairs")[0] for _ in range(600))
    assert sorted(prompts) == [f"{problem} =" for problem in problems] and min(prompts.values()) > 150


def test_bad_examples_are_named():
    with pytest.raises(ValueError, match="style must be one of pairs, checked, got 'forward'"):
        worked_example(Random(0), ["1 + 2"], "forward")
    for bad in ["3", "3 * 2", "3+2", "3 + 2 =", "3 + x", ""]:
        with pytest.raises(ValueError, match=re.escape(f"got {bad!r}")):
            worked_example(Random(0), [bad], "pairs")


# ---- problems


def test_problems_are_different_and_of_the_train_split():
    problems = train_problems(size=3000, seed=1)
    assert len(set(problems)) == 3000
    assert {split_of(problem.replace(" ", "")) for problem in problems} == {"train"}
    test = load_task("chain_sum", "test", 1000, 1, min_terms=6, max_terms=8, min_digits=1, max_digits=1)
    assert not {f"{problem} =" for problem in problems} & {problem.compact for problem in test}
    assert train_problems(size=100, seed=1) == problems[:100]
    assert not set(train_problems(size=100, seed=2)) & set(problems)


def test_lengths_terms_and_signs_turn_up_equally_often():
    problems = train_problems(size=3000)
    words = [problem.split(" ") for problem in problems]
    for drawn, different in [
        (Counter(len(each[::2]) for each in words), {6, 7, 8}),
        (Counter(term for each in words for term in each[::2]), set("0123456789")),
        (Counter(sign for each in words for sign in each[1::2]), set("+-")),
    ]:
        assert set(drawn) == different
        share = 1 / len(different)
        allowed = 4.5 * (share * (1 - share) / drawn.total()) ** 0.5
        assert all(abs(count / drawn.total() - share) < allowed for count in drawn.values()), drawn


def test_two_digits():
    problems = train_problems(2, 3, digits=2, size=300, largest=3 * 99)
    terms = {int(term) for problem in problems for term in problem.split(" ")[::2]}
    assert min(terms) >= 10 and max(terms) <= 99 and len(terms) > 80


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(min_terms=1), "min_terms must be at least 2, got 1"),
        (dict(min_terms=6, max_terms=5), "max_terms must be at least min_terms=6, got 5"),
        (dict(digits=0), "digits must be at least 1, got 0"),
        (dict(size=0), "size must be at least 1, got 0"),
        (dict(seed=-1), "seed must be 0 or more, got -1"),
        (dict(max_terms=12), "largest=99: 12 terms with digits=1 can reach 108"),
        (dict(digits=2), "largest=99: 8 terms with digits=2 can reach 792"),
        (dict(min_terms=2, max_terms=2, size=300), r"size=300: only \d+ different train problems of 'chain_sum'"),
    ],
)
def test_bad_settings_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        train_problems(**arguments)


# ---- tokenizers


@given(expressions(), st.sampled_from(STYLES))
@example(ALL_NINES, "pairs")
@example(ALL_NINES, "checked")
@example(ALL_TAKEN, "pairs")
@example(ALL_TAKEN, "checked")
def test_every_word_of_a_worked_example_is_one_token(problem, style):
    prompt, solution = worked_example(Random(0), [problem], style)
    for text in (prompt, solution, f"{prompt} {solution}"):
        ids = TOKENIZER(text)["input_ids"]
        assert TOKENIZER.convert_ids_to_tokens(ids) == text.split(" ")
        assert TOKENIZER.unk_token_id not in ids and TOKENIZER.decode(ids) == text


@given(st.lists(st.integers(0, len(TOKENIZER) - 1)))
def test_what_is_decoded_encodes_to_the_same_tokens(ids):
    assert TOKENIZER(TOKENIZER.decode(ids))["input_ids"] == ids


@pytest.mark.parametrize("number", [0, 7, -7, LARGEST, -LARGEST])
def test_a_number_is_one_token_with_its_sign(number):
    assert TOKENIZER.decode(TOKENIZER(f"3 - 5 = {number}")["input_ids"][4:]) == str(number)
    assert len(TOKENIZER(f"{number}")["input_ids"]) == 1


def test_words_that_are_unknown():
    assert TOKENIZER(f"{LARGEST + 1} {-LARGEST - 1} -0 Answers")["input_ids"] == [TOKENIZER.unk_token_id] * 5
    assert TOKENIZER.unk_token_id not in make_tokenizer(792)("792 - -792 = 5")["input_ids"]


@pytest.mark.parametrize("terms", range(2, 9))
def test_tokens_of_a_solution(terms):
    problem = " - ".join("123456789"[:terms])
    counts = [len(TOKENIZER(worked_example(Random(0), [problem], style)[1])["input_ids"]) for style in STYLES]
    assert counts == [5 * (terms - 1) + (terms - 2) + 3, 11 * (terms - 1) + (terms - 2) + 3]
    assert counts == [6 * terms - 4, 12 * terms - 10]  # as the docstring says
    if terms == 8:
        assert counts == [44, 86] and len(TOKENIZER(f"{problem} =")["input_ids"]) == 16


def test_the_tokenizer_survives_saving(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    text = "3 - 5 - 60 = -2 - 60 = -62 ; answer -62"
    assert loaded.get_vocab() == TOKENIZER.get_vocab() and loaded.decode(loaded(text)["input_ids"]) == text
    assert loaded.init_kwargs["prompt_format"] == "compact"
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.unk_token_id) == (0, 1, 2)


def test_countdowns_tokenizer_is_what_it_was(tmp_path):
    # Models that were trained with it keep their meaning: every byte of what is saved, made here as it first was.
    words = ["<pad>", "<eos>", "<unk>", *map(str, range(101)), *"+-*/()=:,;", "answer"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d+|[a-z]+|\S"), behavior="removed", invert=True)
    first = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", prompt_format="compact"
    )
    first.save_pretrained(tmp_path / "first")
    pear.countdown.make_tokenizer().save_pretrained(tmp_path / "now")
    files = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert "tokenizer.json" in files and files == sorted(path.name for path in (tmp_path / "now").iterdir())
    for name in files:
        assert (tmp_path / "now" / name).read_bytes() == (tmp_path / "first" / name).read_bytes(), name


def test_a_word_twice_is_named():
    for words in (["a", "b", "a"], ["b", "<eos>"]):
        with pytest.raises(ValueError, match="words must all be different, got '(a|<eos>)' twice"):
            word_tokenizer(words, r"\S+")
