"""pass@k against enumeration of all subsets; evaluation against counts made by hand."""

import itertools
import json
import math
from fractions import Fraction

import pytest
from conftest import make_model
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from transformers import AutoTokenizer

import pear.eval
from pear.countdown import make_tokenizer
from pear.eval import evaluate, pass_at_k, prompt_format, run, table
from pear.generate import Completion
from pear.io import DataError
from pear.tasks import load_task


@given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(case):
    n, c, k = case
    subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(1000, 1, 100), (10_000, 3, 1000), (10_000, 9_000, 1), (4096, 40, 64)])
def test_pass_at_k_of_many_samples_agrees_with_exact_binomials(n, c, k):
    exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
    assert pass_at_k(n, c, k) == pytest.approx(float(exact), rel=1e-10)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 0, 5), (4, 0, 0), (4, 5, 1), (4, -1, 1)])
def test_pass_at_k_refuses_what_has_no_meaning(n, c, k):
    with pytest.raises(ValueError, match="must lie between"):
        pass_at_k(n, c, k)


@pytest.fixture(scope="module")
def small():
    tokenizer = make_tokenizer()
    return make_model(tokenizer), tokenizer


def test_evaluate_counts_and_averages(small, monkeypatch):
    problems = load_task("countdown", "test", 4)
    right = [0, 1, 3, 4]  # of 4 samples each

    def generate(model, tokenizer, prompts, **options):
        assert prompts == [p.compact for p in problems]
        return [
            [Completion(p.entry["answer"] if i < c else "1+1", [5] * (i + 1), i > 0) for i in range(4)]
            for p, c in zip(problems, right, strict=True)
        ]

    monkeypatch.setattr(pear.eval, "generate", generate)
    result = evaluate(*small, problems, k=2, samples=4)
    assert [p["correct"] for p in result["problems"]] == right
    assert result["pass@1"] == pytest.approx(8 / 16)
    assert result["pass@2"] == pytest.approx((0 + 3 / 6 + 1 + 1) / 4)
    values = [0, 0.25, 0.75, 1]
    spread = sum((v - 0.5) ** 2 for v in values) / 3
    assert result["pass@1_stderr"] == pytest.approx((spread / 4) ** 0.5)
    assert result["finished"] == pytest.approx(3 / 4)
    assert result["mean_tokens"] == pytest.approx(2.5)
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_evaluate_from_end_to_end_repeats_by_seed(small):
    options = dict(k=2, samples=3, size=5, max_new_tokens=12, progress=None)
    first, again = evaluate(*small, "countdown", **options), evaluate(*small, "countdown", **options)
    assert first == again
    assert [p["prompt"] for p in first["problems"]] == [p.compact for p in load_task("countdown", "test", 5)]
    other = evaluate(*small, "countdown", **options, seed=1)
    assert [p["example"] for p in other["problems"]] != [p["example"] for p in first["problems"]]


def test_run_writes_json_and_prints_a_table(small, tmp_path, capsys):
    model, tokenizer = small
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    out = tmp_path / "deep" / "eval.json"
    name = str(tmp_path / "model")
    result = run(name, k=2, samples=2, size=3, out=out, max_new_tokens=8, progress=None)
    assert json.loads(out.read_text()) == result
    assert result["model"] == name and result["split"] == "test" and result["prompt_format"] == "compact"
    assert "pass@2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(k=8, samples=4), "k must lie between 1 and samples=4, got 8"),
        (dict(k=0), "k must lie between 1 and samples=16, got 0"),
        (dict(task="sudoku-for-cats"), "unknown task.*countdown"),
        (dict(size=0), "size must be at least 1, got 0"),
    ],
)
def test_run_refuses_before_loading_any_model(options, message):
    with pytest.raises(ValueError, match=message):
        run("./there-is-no-such-model", **options)


def test_no_problems(small):
    with pytest.raises(ValueError, match="no problems"):
        evaluate(*small, [], k=1, samples=1)


def test_prompt_format_travels_with_the_tokenizer(small, tokenizer, tmp_path):
    made = make_tokenizer()
    for folder in ("first", "second"):
        made.save_pretrained(tmp_path / folder)
        made = AutoTokenizer.from_pretrained(tmp_path / folder)
    assert prompt_format(made) == "compact"
    assert prompt_format(tokenizer) == "question"
    made.init_kwargs["prompt_format"] = "haiku"
    with pytest.raises(ValueError, match="'haiku'; known are question, compact"):
        prompt_format(made)


def test_table_shows_every_model_with_its_error():
    result = {"pass@1": 0.5, "pass@1_stderr": 0.021, "pass@8": 1.0, "pass@8_stderr": None, "finished": 1.0}
    result |= {"mean_tokens": 20.25, "size": 7, "samples": 16}
    console = Console(width=120, record=True)
    console.print(table({"base": result, "pear": result}))
    text = console.export_text()
    assert text.count("50.0 % ± 2.1") == 2 and "pass@8" in text and "20.2" in text
    assert "16 samples of each of 7 problems" in text and max(map(len, text.splitlines())) < 80


def test_a_scorer_that_fails_names_its_problem(tokenizer, model, monkeypatch):
    def scorer(answer, entry):
        raise KeyError("metadata")

    monkeypatch.setattr("pear.tasks._scorer", lambda dataset: scorer)
    monkeypatch.setattr("pear.tasks.extract_answer", lambda text: "7")
    with pytest.raises(DataError, match="task 'chain_sum', problem 0 .*: its scorer raised KeyError: 'metadata'"):
        evaluate(model, tokenizer, "chain_sum", k=1, samples=2, size=2, max_new_tokens=4, progress=None)
