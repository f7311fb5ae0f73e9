"""Rows that are broken in any way: a row or a DataError with file and line, and never another exception."""

import copy
import json
import random

import pytest
import torch

from pear.importing import import_logprobs
from pear.inspecting import data as inspect_data
from pear.io import DataError, read_jsonl, write_jsonl
from pear.rl import check_prompts, data_dataset
from pear.score import score
from pear.scored import load_scored
from pear.scoring.policies import Policy
from pear.scoring.rows import read_plan
from pear.seal import write_scored

CHAT = [{"role": "user", "content": "What is 3 plus 4?"}]
ROWS = [
    {"prompt": "What is 3 plus 4? ", "completion": "It is 7.", "note": {"a": [1, 2.5, "x"]}},
    {"prompt": CHAT, "completion": [{"role": "assistant", "content": "It is 7."}], "label": True},
    {"messages": [*CHAT, {"role": "assistant", "content": "7"}], "tools": [], "chat_template_kwargs": {"a": 1}},
]
RECORDS = {
    "openai": {
        "request": {"model": "p", "messages": CHAT, "temperature": 1.0, "top_p": 1.0, "stop": ["x"]},
        "response": {
            "usage": {"prompt_tokens": 3},
            "choices": [
                {
                    "message": {"role": "assistant", "content": "ab"},
                    "logprobs": {"content": [{"token": "ab", "logprob": -0.5, "bytes": [97, 98]}]},
                }
            ],
        },
    },
    "vllm": {
        "prompt": "hi",
        "prompt_token_ids": [4, 5],
        "outputs": [{"text": "a", "token_ids": [7], "logprobs": [{"7": {"logprob": -0.5, "decoded_token": "a"}}]}],
        "sampling_params": {"temperature": 1.0},
    },
    "sglang": {
        "prompt": "hi",
        "text": "a",
        "output_ids": [7],
        "meta_info": {"output_token_logprobs": [[-0.5, 7, "a"]]},
    },
    "jsonl": {"prompt": "hi", "completion": "a", "logprobs": [-0.5], "tokens": ["a"], "behavior_policy": "p"},
}
JUNK = [
    *(None, True, 0, -1, 1.5, 1e308, float("nan"), -float("inf"), 10**400, 2**31, 2**63),
    *("", "x", "\ud83d", "a\0b", "{{ x }}", "~nosuchuser/x", "none", "x" * 3000),
    *([], {}, [[]], [None], ["a"], [1], [{}], [[1, 2], [3]], [0] * 50, [[-0.5, 7, "x"]]),
    *({"role": "user"}, {"role": 1, "content": 2}, [{"role": "assistant", "content": None}]),
    [{"type": "text", "text": "x"}],
]
KEYS = ["role", "content", "reasoning_content", "tool_calls", "label", "tools", "chat_template_kwargs", "\ud800"]
KEYS += ["prompt", "completion", "messages", "input_ids", "completion_mask", "behavior_logprobs", "behavior_spans"]
KEYS += ["behavior_policy"]


def places(value, place=()):
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*place, key)
        yield from places(value[key], (*place, key))


def broken(row: dict, rng: random.Random) -> dict:
    """The row with one to three places taken away, doubled, added or replaced."""
    row = copy.deepcopy(row)
    for _ in range(rng.choice([1, 1, 2, 3])):
        *way, last = rng.choice(list(places(row)) or [("x",)])
        inner = row
        for key in way:
            inner = inner[key]
        kind, junk = rng.random(), copy.deepcopy(rng.choice(JUNK))
        if kind < 0.15 and last in inner if isinstance(inner, dict) else kind < 0.15:
            del inner[last]
        elif kind < 0.3:
            if isinstance(inner, list):
                inner.insert(last, junk)
            else:
                inner[rng.choice(KEYS)] = junk
        else:
            inner[last] = junk
    return row


@pytest.fixture(scope="module")
def scored(tokenizer, tmp_path_factory):
    from tiny import make_model

    folder = tmp_path_factory.mktemp("scored")
    write_jsonl(folder / "rows.jsonl", ROWS)
    model = make_model(tokenizer)
    score(model, folder / "rows.jsonl", folder / "scored.jsonl", tokenizer=tokenizer, progress=False)
    return model, [row for _, row in read_jsonl(folder / "scored.jsonl")]


def lines(path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("seed", range(4))
def test_broken_rows_are_rows_or_one_line(seed, scored, tokenizer, tmp_path, monkeypatch):
    rng, (model, good), path = random.Random(seed), scored, tmp_path / "f.jsonl"
    policy = Policy(model, tokenizer, None, "auto", None)

    def opened(name):
        return Policy(name, None, None, "auto", torch.device("cpu"))

    told = 0

    def check(read, where: str) -> None:
        nonlocal told
        try:
            read()
        except DataError as error:
            assert where in str(error) and len(str(error)) < 2000
            told += 1

    for _ in range(40):
        lines(path, [ROWS[0], broken(rng.choice(ROWS), rng)])
        for column in ("behavior_logprobs", "ref_logprobs"):
            check(lambda column=column: read_plan(path, policy, None, column, (column,), opened), "f.jsonl:2")
        check(lambda: read_plan(path, None, "none", "behavior_logprobs", ("behavior_logprobs",), opened), "f.jsonl")
        row = broken({key: value for key, value in rng.choice(good).items() if key != "scored"}, rng)
        try:
            write_scored(path, [good[0], row])
        except ValueError:  # NaN, or half of a surrogate pair: no scored file holds them
            continue
        check(lambda: load_scored(path, tokenizer, 256), "f.jsonl")
        check(lambda: inspect_data.read(path, tokenizer), "f.jsonl")
        lines(path, [broken({"prompt": CHAT, "solution": "4"}, rng)] * 2)
        check(lambda: check_prompts(data_dataset(str(path), "solution")["prompt"], tokenizer, model.config, 8), "")
    assert told > 40  # most of what was broken was found


@pytest.mark.parametrize("source", RECORDS)
def test_broken_records_are_set_aside(source, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("pear.importing.run.load_tokenizer", lambda name: tokenizer)
    rng, path, out = random.Random(1), tmp_path / "f.jsonl", tmp_path / "out.jsonl"
    lines(path, [broken(RECORDS[source], rng) for _ in range(60)])
    named = {"tokens": "tokens"} if source == "jsonl" else None
    settings = {"tokenizer": "x", "policy": "q", "columns_named": named, "progress": False}
    result = import_logprobs(source, path, out, **settings)
    assert result["records"] == 60 and result["rejected"] > 20

    def no_constant(text):
        raise AssertionError(f"{text} is no JSON")

    for file in filter(lambda file: file.exists(), (out, tmp_path / "out.jsonl.rejects.jsonl")):
        assert all(json.loads(line, parse_constant=no_constant) for line in file.read_text().splitlines())


@pytest.mark.parametrize(
    "row, message",
    [
        ('{"prompt": "a", "completion": "b", "mine": {"x": [1, NaN]}}', "`mine.x[1]` is nan"),
        ('{"prompt": "a", "completion": "b", "mine": 1e999}', "`mine` is inf"),
        ('{"prompt": "a", "completion": "b", "behavior_policy": "~nosuchuser/x"}', "'~nosuchuser/x': no such folder"),
    ],
)
def test_what_a_scored_file_cannot_hold_is_an_error_before_the_work(row, message, scored, tokenizer, tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_text('{"prompt": "a", "completion": "b", "behavior_policy": "none"}\n' + row + "\n")
    with pytest.raises(DataError) as caught:
        score(None, path, tmp_path / "o.jsonl", progress=False, fallback="none")
    assert str(caught.value).startswith(f"{path}:2: ") and message in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["f.jsonl"]
