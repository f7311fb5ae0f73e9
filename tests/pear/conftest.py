"""Fixtures: tiny models, a tokenizer and rows made on the spot, so that no test needs a network or a download."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import make_model, make_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return make_tokenizer()


@pytest.fixture
def model(tokenizer) -> PreTrainedModel:
    return make_model(tokenizer)


@pytest.fixture(scope="session")
def save_model(tokenizer, tmp_path_factory) -> Callable[..., Path]:
    """save_model(kind=, tied=, seed=) -> a transformers folder with model and tokenizer."""

    def save(**kwargs) -> Path:
        folder = tmp_path_factory.mktemp("model")
        make_model(tokenizer, **kwargs).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def text_rows() -> list[dict]:
    """Plain strings of several lengths."""
    return [
        {"prompt": f"What is {n} plus {n}? ", "completion": f"It is {2 * n}. " + "Let us think. " * (n % 4)}
        for n in range(1, 10)
    ]


@pytest.fixture
def chat_rows() -> list[dict]:
    """Both chat forms."""
    rows = []
    for n in range(1, 7):
        question = {"role": "user", "content": f"What is {n} times 3?" + " Think step by step." * (n % 3)}
        answer = {"role": "assistant", "content": f"The answer is {3 * n}." + " And again." * (n % 2)}
        if n % 2:
            rows.append({"prompt": [question], "completion": [answer]})
        else:
            rows.append({"messages": [{"role": "system", "content": "Be brief."}, question, answer]})
    return rows


@pytest.fixture
def jsonl(tmp_path) -> Callable[..., Path]:
    """jsonl(rows, name) -> a JSONL file; rows may be objects or raw lines."""

    def write(rows, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return path

    return write
