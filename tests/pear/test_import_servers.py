"""`pear import` with real servers on loopback: llama.cpp's, and `transformers serve`; and vLLM's ways of scoring."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from server_faulty import serving
from tiny import CHAT_TEMPLATE, CORPUS, make_model, make_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from pear.align import Spans, align, spans_of
from pear.cli import app
from pear.importing import import_logprobs
from pear.importing.client import Client
from pear.io import DataError, read_jsonl, write_jsonl
from pear.rows import tokenize_row
from pear.score import score
from pear.scored import load_scored
from pear.seal import check_seal

if importlib.util.find_spec("xllamacpp"):
    from server_llama import NAME, llama_server, write_gguf

needs_llama = pytest.mark.skipif(not importlib.util.find_spec("xllamacpp"), reason="needs the package xllamacpp")
KEY = "sk-loopback-1234567890"
PROMPTS = [
    {"prompt": "What is 3 plus 4? "},
    {"messages": [{"role": "user", "content": "What is 12 minus 5?"}], "label": True},
    {"prompt": [{"role": "system", "content": "Use the numbers."}, {"role": "user", "content": "Make 24."}]},
    {"prompt": "Let us think step by step."},
]


def ascii_tokenizer():
    """As tests/pear/tiny.py's, of ASCII alone: what an untrained model writes with it is UTF-8."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = [c for c in sorted(pre_tokenizers.ByteLevel.alphabet()) if c in "ĠĊ" or ord(c) < 127]
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"], initial_alphabet=alphabet,
        show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|pad|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def policy_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    tokenizer = ascii_tokenizer()
    make_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama_url(policy_folder):
    from pear.models import load_model, load_tokenizer

    write_gguf(load_model(str(policy_folder)), load_tokenizer(str(policy_folder)), policy_folder / "tiny.gguf")
    with llama_server(policy_folder / "tiny.gguf", KEY) as url:
        yield url


@pytest.fixture
def prompts(jsonl) -> Path:
    return jsonl(PROMPTS, "prompts.jsonl")


def ask_llama(url: str, data: Path, out: Path, **kwargs) -> tuple[list[dict], dict]:
    request = {"temperature": 1.0, "top_p": 1.0, "max_tokens": 60, "seed": 11}
    client = Client(url, KEY, timeout=60)
    result = import_logprobs("openai", data, out, client=client, request=request, n=2, progress=False, **kwargs)
    rows = []
    for number, row in read_jsonl(out):
        check_seal(row, f"{out}:{number}")
        rows.append(row)
    assert (result["written"], result["rejected"]) == (2 * len(PROMPTS), 0)
    return rows, result


def again(rows: list[dict], folder: Path, out: Path) -> list[list[float]]:
    """The local model's log-probs of the very ids of token rows."""
    from pear.models import load_model

    model = load_model(str(folder))
    found = []
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            logprobs = model(input_ids=ids).logits[0].double().log_softmax(-1)[:-1].gather(-1, ids[0, 1:, None])[:, 0]
        found.append([0.0, *(logprobs * torch.tensor(row["completion_mask"][1:])).tolist()])
    return found


@needs_llama
def test_a_real_servers_log_probs_are_the_local_models(llama_url, policy_folder, prompts, tmp_path):
    rows, result = ask_llama(llama_url, prompts, tmp_path / "out.jsonl", tokenizer=str(policy_folder))
    for row, local in zip(rows, again(rows, policy_folder, tmp_path), strict=True):
        np.testing.assert_allclose(row["behavior_logprobs"], local, atol=1e-4)
        assert row["behavior_policy"] == row["model"] == NAME
        assert row["behavior_sampling"]["logprobs"] == "raw" and row["behavior_sampling"]["min_p"] == 0.0
    assert [row.get("label") for row in rows] == [None, None, True, True, None, None, None, None]
    assert len({json.dumps(row["completion"]) for row in rows}) == len(rows)
    found = {entry["check"]: entry for entry in result["checks"]}
    assert found["ids are the text"]["yes"] == found["prompt tokens as the server counted"]["yes"] == len(rows)
    assert result["server"]["kind"] == "llamacpp"
    ended = result["special_tokens"].get("end_of_turn", 0)
    assert ended + result["cut_at_their_length"] == len(rows) and ended  # the end of turn has its log-prob


@needs_llama
def test_pear_score_gives_the_same_of_the_same_text(llama_url, policy_folder, prompts, tmp_path):
    """Where the tokenizer cuts the text as the policy wrote it, all of it agrees; else the policy's own cuts stay."""
    rows, _ = ask_llama(llama_url, prompts, tmp_path / "out.jsonl", tokenizer=str(policy_folder))
    texts = [{key: row[key] for key in ("prompt", "completion")} for row in rows]
    write_jsonl(tmp_path / "texts.jsonl", texts)
    score(str(policy_folder), tmp_path / "texts.jsonl", tmp_path / "local.jsonl", progress=False)
    same = 0
    for row, (_, local) in zip(rows, read_jsonl(tmp_path / "local.jsonl"), strict=True):
        n = len(row["input_ids"])
        assert row["tokenizer"] == local["tokenizer"]
        if row["input_ids"] == local["input_ids"][:n]:
            same += 1
            count = sum(row["completion_mask"])
            np.testing.assert_allclose(row["behavior_logprobs"], local["behavior_logprobs"][:n], atol=1e-4)
            assert row["behavior_spans"]["bytes"] == local["behavior_spans"]["bytes"][:count]
    assert same


@needs_llama
def test_without_the_policys_tokenizer_a_student_with_another_one_has_ratios(llama_url, prompts, tmp_path):
    rows, result = ask_llama(llama_url, prompts, tmp_path / "out.jsonl")
    assert result["kinds"] == {"byte": len(rows)}
    tokenizer = make_tokenizer()
    for row in rows:
        behavior = Spans.from_json(row["behavior_spans"], "row")
        found = align(
            spans_of(row, tokenize_row(row, tokenizer, "row"), tokenizer), behavior, row["behavior_spans"]["logprobs"]
        )
        assert found.shared > 0.5
        total = sum(row["behavior_spans"]["logprobs"])
        assert found.behavior_logprobs.sum() + found.left_out == pytest.approx(total, abs=1e-9)
    ended = [row for row in rows if "end_of_turn" in row["behavior_spans"]["marks"].values()]
    assert ended and result["cut_at_their_length"] == len(rows) - len(ended)


@needs_llama
def test_what_is_imported_trains(llama_url, policy_folder, prompts, tmp_path):
    """Token rows give a student with the policy's tokenizer their own log-probs; byte rows give any student spans."""
    from pear.models import load_tokenizer

    rows, _ = ask_llama(llama_url, prompts, tmp_path / "tokens.jsonl", tokenizer=str(policy_folder))
    dataset = load_scored(tmp_path / "tokens.jsonl", load_tokenizer(str(policy_folder)))
    assert dataset["input_ids"][:] == [row["input_ids"] for row in rows] and "block_ids" not in dataset.column_names
    for found, row in zip(dataset["behavior_logprobs"], rows, strict=True):
        np.testing.assert_allclose(found, row["behavior_logprobs"], rtol=1e-6)

    rows, _ = ask_llama(llama_url, prompts, tmp_path / "bytes.jsonl")
    for student in (make_tokenizer(), load_tokenizer(str(policy_folder))):
        dataset = load_scored(tmp_path / "bytes.jsonl", student)
        assert len(dataset) == len(rows)
        for found, blocks, row in zip(dataset["behavior_logprobs"], dataset["block_ids"], rows, strict=True):
            told = sum(row["behavior_spans"]["logprobs"])
            assert max(blocks) > 3 and told * 1.01 <= sum(found) < told * 0.5  # of what both sides have


@needs_llama
def test_the_command_asks_a_real_server(llama_url, policy_folder, prompts, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    out = tmp_path / "out.jsonl"
    arguments = ["import", "--source", "openai", "--url", llama_url, "--server_model", NAME, "--data", str(prompts),
                 "--out", str(out), "--tokenizer", str(policy_folder), "--max_tokens", "5", "--seed", "3",
                 "--temperature", "0.7"]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output + result.stderr
    assert "4 rows of 4 records: 4 token rows; " in result.output and "temperature 0.7" in result.output
    assert len(list(read_jsonl(out))) == 4
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong-0987654321")
    result = CliRunner().invoke(app, [*arguments, "--no_resume"])
    assert result.exit_code == 1 and "answered 401" in result.stderr and "0987654321" not in result.stderr


@needs_llama
def test_a_real_server_that_cannot_score_a_given_text_is_named(llama_url, policy_folder, jsonl, tmp_path):
    data = jsonl([{"prompt": "What is 3 plus 4? ", "completion": "It is 7."}])
    for tokenizer in (None, str(policy_folder)):
        with pytest.raises(DataError, match=r"no log-probs of a text that it is given.*data.jsonl:1"):
            import_logprobs(
                "openai",
                data,
                tmp_path / "out.jsonl",
                client=Client(llama_url, KEY),
                tokenizer=tokenizer,
                progress=False,
            )
    assert not (tmp_path / "out.jsonl").exists()


# ---------------------------------------------------------------------------------------------------------------------
# transformers serve: real, and without log-probs


@pytest.mark.slow
@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("fastapi", "uvicorn", "openai"))), reason="transformers[serving]"
)
def test_transformers_serve_gives_no_log_probs_and_that_is_said(policy_folder, jsonl, tmp_path):
    import socket

    from server_llama import wait_for

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).parent / "transformers"), "serve", str(policy_folder), "--host", "127.0.0.1",
               "--port", str(port), "--device", "cpu"]  # fmt: skip
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process)
        client = Client(f"http://127.0.0.1:{port}/v1", retries=1, delay=0.01)
        data = jsonl(PROMPTS[:2])
        with pytest.raises(DataError, match=r"log-probs"):
            import_logprobs(
                "openai", data, tmp_path / "out.jsonl", client=client, server_model=str(policy_folder),
                request={"max_tokens": 4}, jobs=1, progress=False,
            )  # fmt: skip
    finally:
        process.kill()
        process.wait()
    assert not (tmp_path / "out.jsonl").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Texts that a server scores: vLLM's prompt_logprobs, others' echo. No vLLM installs here: its answers, of a real model


@pytest.fixture(scope="module")
def scorer(policy_folder):
    """respond(body, chat) as vLLM's /v1/completions does it, with the log-probs of the policy's own model."""
    from pear.models import load_model, load_tokenizer

    model, tokenizer = load_model(str(policy_folder)), load_tokenizer(str(policy_folder))

    def respond(body: dict, chat: bool) -> dict:
        assert not chat and body["max_tokens"] == 1
        ids = body["prompt"]
        if isinstance(ids, str):
            ids = tokenizer(ids)["input_ids"]
        with torch.no_grad():
            logprobs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        following = int(logprobs[-1].argmax())
        values = [None, *(logprobs[t, i].item() for t, i in enumerate(ids[1:])), logprobs[-1, following].item()]
        tokens = [tokenizer.decode([i]) for i in (*ids, following)]
        choice = {"index": 0, "finish_reason": "length", "text": tokens[-1]}
        if body.get("prompt_logprobs") is not None:
            entries = [None] + [
                {str(i): {"logprob": v, "rank": 9, "decoded_token": s}}
                for i, v, s in zip(ids[1:], values[1:], tokens[1:], strict=False)
            ]
            choice |= {"prompt_logprobs": entries, "prompt_token_ids": ids, "logprobs": None}
        elif body.get("echo"):
            choice |= {"text": "".join(tokens), "logprobs": {"tokens": tokens, "token_logprobs": values}}
        usage = {"prompt_tokens": len(ids), "completion_tokens": 1, "total_tokens": len(ids) + 1}
        return {"model": body["model"], "choices": [choice], "usage": usage}

    return respond


SCORE = [
    {"prompt": "What is 3 plus 4?", "completion": " It is 7."},
    {"messages": [*PROMPTS[2]["prompt"], {"role": "assistant", "content": "3 + 21 = 24"}], "label": False},
    {"prompt": "Let us think step by step.", "completion": " First we add"},
]


@pytest.mark.parametrize("kind", ["vllm", "other"])
def test_a_scored_text_is_what_pear_score_makes_of_it(kind, scorer, policy_folder, jsonl, tmp_path):
    data = jsonl(SCORE)
    with serving(respond=scorer, kind=kind) as server:
        client = Client(server.url)
        kwargs = {"client": client, "policy": "it", "progress": False}
        import_logprobs("openai", data, tmp_path / "out.jsonl", tokenizer=str(policy_folder), **kwargs)
        assert all(("prompt_logprobs" in body) == (kind == "vllm") for body in server.bodies)
        assert all(body.get("temperature") == 0 for body in server.bodies)
    score(str(policy_folder), data, tmp_path / "local.jsonl", progress=False)
    rows = [row for _, row in read_jsonl(tmp_path / "out.jsonl")]
    local = [row for _, row in read_jsonl(tmp_path / "local.jsonl")]
    assert len(rows) == len(SCORE)
    for row, own in zip(rows, local, strict=True):
        np.testing.assert_allclose(row.pop("behavior_logprobs"), own.pop("behavior_logprobs"), atol=2e-5)
        for key in ("scored", "model", "behavior_policy"):
            row.pop(key), own.pop(key)
        assert row == own  # ids, mask, spans, tokenizer, text and label


def test_scored_by_echo_without_a_tokenizer(scorer, jsonl, tmp_path):
    """The bytes are told apart at the prompt's end; a chat, or a token across that end, is set aside."""
    across = {"prompt": "What is 3 pl", "completion": "us 4?"}
    with serving(respond=scorer) as server:
        data = jsonl([SCORE[0], SCORE[1], across, SCORE[2]])
        result = import_logprobs(
            "openai", data, tmp_path / "out.jsonl", client=Client(server.url, retries=0), progress=False
        )
    assert result["kinds"] == {"byte": 2}
    reasons = [row["reason"] for _, row in read_jsonl(tmp_path / "out.jsonl.rejects.jsonl")]
    assert "--tokenizer" in reasons[0] and "does not end where a token ends" in reasons[1]
    for (_, row), source in zip(read_jsonl(tmp_path / "out.jsonl"), (SCORE[0], SCORE[2]), strict=True):
        assert row["completion"] == source["completion"]
        spans = row["behavior_spans"]
        assert spans["bytes"][-1][1] == len(source["completion"]) and len(spans["logprobs"]) == len(spans["bytes"])


def test_a_server_that_cuts_the_ids_otherwise_is_noticed(scorer, policy_folder, jsonl, tmp_path):
    def respond(body, chat):
        found = scorer(body, chat)
        choice = found["choices"][0]
        choice["prompt_token_ids"] = [choice["prompt_token_ids"][0], *choice["prompt_token_ids"][2:], 3]
        choice["prompt_logprobs"] = [
            entry and {str(i): next(iter(entry.values()))}
            for i, entry in zip(choice["prompt_token_ids"], choice["prompt_logprobs"], strict=True)
        ]
        return found

    with serving(respond=respond, kind="vllm") as server:
        result = import_logprobs(
            "openai", jsonl(SCORE), tmp_path / "out.jsonl", client=Client(server.url, retries=0),
            tokenizer=str(policy_folder), progress=False,
        )  # fmt: skip
    assert result["rejected"] == 3
    assert "scored other tokens" in (tmp_path / "out.jsonl.rejects.jsonl").read_text()


@pytest.mark.parametrize("counts", [True, False])
def test_a_start_token_that_the_server_puts_in_front_is_noticed(counts, scorer, policy_folder, jsonl, tmp_path):
    """By echo there are no ids to compare; log-probs shifted by one would pass for those of the row's tokens."""

    def respond(body, chat):
        found = scorer(body | {"prompt": [1, *body["prompt"]]}, chat)
        if not counts:
            del found["usage"]
        return found

    with serving(respond=respond) as server:
        result = import_logprobs(
            "openai", jsonl(SCORE), tmp_path / "out.jsonl", client=Client(server.url, retries=0),
            tokenizer=str(policy_folder), progress=False,
        )  # fmt: skip
    assert (result["written"], result["rejected"]) == (0, 3)
    reasons = (tmp_path / "out.jsonl.rejects.jsonl").read_text()
    assert ("others beside them" if counts else "scored other tokens") in reasons
