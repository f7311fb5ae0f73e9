"""The whole way as a user goes it: two policies and a person wrote the data, one of them with other tokens and another
chat template; `pear score`, `pear inspect` and `pear sft` must agree with a plain computation on full logits."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from tiny import CORPUS, make_model, make_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from pear.cli import app
from pear.io import read_jsonl, write_jsonl
from pear.models import load_model, load_tokenizer

GAMMA, LOW, HIGH = 0.97, -0.3, 0.4
SHAPES: set[tuple[int, int]] = set()  # tokens of student and policy in the spans that were met, 2 for more than one
TEMPLATE = (
    "{% for message in messages %}{{ '[' + message['role'] + ']<s>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]<s>' }}{% endif %}"
)
ANSWERS = [
    "It is 7. An anjump brownjumps.",
    "Add 3 and 21: 24! Ångström, naïve café.",
    "Let us think, then: 5 \U0001f98a\n\nThe answer is 5.",
]


def other_tokenizer() -> PreTrainedTokenizerFast:
    """SentencePiece-like: pieces with ▁, byte fallback, another eos, a template that ends with it."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    corpus = [
        " ".join(CORPUS),
        "nj nj nj nj nj nj nju nju nju nju answer answers thinking then, Let's think about the answer it is",
    ]
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    backend.train_from_iterator(corpus, trainer)
    state = json.loads(backend.to_str())
    state["added_tokens"] = state["added_tokens"][:3]  # bytes are pieces like any other
    backend = Tokenizer.from_str(json.dumps(state))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>", unk_token="<unk>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("any-policy")
    for seed, (name, tokenizer) in enumerate(
        {"student": make_tokenizer(), "same": make_tokenizer(), "other": other_tokenizer()}.items()
    ):
        if name == "other":
            tokenizer.pad_token = "<unk>"
        make_model(tokenizer, seed=seed, scale=0.12).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = []
    for i, answer in enumerate(ANSWERS):
        for policy in ("same", "other", None):
            row = {"prompt": [{"role": "user", "content": f"Say {i}, please."}],
                   "completion": [{"role": "assistant", "content": answer}]}  # fmt: skip
            rows.append(row | ({"behavior_policy": str(folder / policy)} if policy else {}))
    write_jsonl(folder / "data.jsonl", rows)
    return folder


def run(*arguments) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, f"{result.output}\n{result.exception}"
    return result.output


def completion_logprobs(name, row) -> tuple[list[bytes], list[float]]:
    """Bytes of each completion token (none for structural ones) and its log-prob, from full logits in float64."""
    model, tokenizer = load_model(str(name), dtype=torch.float64), load_tokenizer(str(name))
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
    ids = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=True)["input_ids"]
    assert ids[: len(prompt)] == prompt
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    logprobs = logits.log_softmax(-1)[range(len(prompt) - 1, len(ids) - 1), ids[len(prompt) :]].tolist()
    # bytes by elimination: what decoding one more token adds, where that is whole characters; else hex pieces
    parts, answer, at = [], row["completion"][0]["content"].encode(), 0
    for token in ids[len(prompt) :]:
        piece = tokenizer.convert_ids_to_tokens(token)
        if piece.startswith("<0x"):
            part = bytes([int(piece[3:5], 16)])
        elif piece.startswith("<") or at == len(answer):
            part = b""  # end of turn, and the template's line break
        elif "other" in str(name):
            part = piece.replace("▁", " ").encode()
        else:
            part = tokenizer.backend_tokenizer.decoder.decode([piece]).encode()
            if "�".encode() in part:  # a part of a character: byte-level pieces have a character a byte
                part = answer[at : at + len(piece)]
        assert answer[at : at + len(part)] == part
        at += len(part)
        parts.append(part)
    assert at == len(answer)
    return parts, logprobs


def boundaries(parts: list[bytes]) -> list[int]:
    return [sum(map(len, parts[: i + 1])) for i in range(len(parts))]


def weights_of(folder, row) -> tuple[list[float], list[float], int]:
    """Log-probs and weights of the student's tokens in a row, and how many carry a ratio; loops over spans."""
    parts, student = completion_logprobs(folder / "student", row)
    policy = row.get("behavior_policy")
    if policy is None:
        return student, [1.0] * len(student), 0
    other_parts, other = completion_logprobs(policy, row)
    if policy.endswith("same"):
        spans = [([t], student[t] - other[t]) for t in range(len(student))]
    else:
        size = sum(map(len, parts))
        ours, theirs = boundaries(parts), boundaries(other_parts)
        spans, begin = [], 0
        for end in sorted(set(ours) & set(theirs)):
            mine = [t for t in range(len(parts)) if parts[t] and begin < ours[t] <= end]
            its = [t for t in range(len(other_parts)) if other_parts[t] and begin < theirs[t] <= end]
            spans.append((mine, sum(student[t] for t in mine) - sum(other[t] for t in its)))
            SHAPES.add((min(len(mine), 2), min(len(its), 2)))
            begin = end
        assert begin == size
        turn, other_turn = parts.index(b""), other_parts.index(b"")  # <|im_end|> and </s>; the line break is left out
        spans.append(([turn], student[turn] - other[other_turn]))
    total = sum(len(mine) for mine, _ in spans)
    weights = [1.0] * len(student)
    for k, (mine, _) in enumerate(spans):
        later = spans[k + 1 :]
        log_g = sum(min(max(ratio, len(its) * LOW), len(its) * HIGH) for its, ratio in later)
        log_g += sum(len(its) for its, _ in later) * math.log(GAMMA)
        for t in mine:
            weights[t] = math.exp(min(max(log_g, -10), 5))
    return student, weights, total  # what is left out at the end has nothing after it: weight 1


def test_scores_weights_and_loss_of_mixed_data_are_those_of_full_logits(folder):
    data, scored = folder / "data.jsonl", folder / "scored.jsonl"
    said = run("score", "--data", data, "--out", scored, "--fallback", "none")
    assert "3" in said
    rows = [row for _, row in read_jsonl(data)]
    found = [weights_of(folder, row) for row in rows]
    logprobs = [p for student, _, _ in found for p in student]
    weights = [w for _, g, _ in found for w in g]
    tokens = len(logprobs)
    assert min(weights) < 0.7 < 1.4 < max(weights)  # the case says something
    assert SHAPES == {(1, 1), (1, 2), (2, 1), (2, 2)}, SHAPES

    options = ["--gamma", GAMMA, "--log_ratio_clip", LOW, HIGH]
    run("inspect", "--data", scored, "--model", folder / "student", *options, "--json", folder / "report.json",
        "--html", folder / "page.html")  # fmt: skip
    report = json.loads((folder / "report.json").read_text())
    summary = report["summary"]
    assert summary["weight_mean"] == pytest.approx(sum(weights) / tokens, rel=1e-5)

    out = folder / "run"
    run("sft", "--model", folder / "student", "--data", scored, "--output_dir", out, "--max_steps", 1, "--gamma", GAMMA,
        "--log_ratio_clip", LOW, HIGH, "--per_device_train_batch_size", len(rows), "--logging_steps", 1,
        "--learning_rate", 1e-3, "--lr_scheduler_type", "constant", "--optim", "sgd", "--max_grad_norm", 0,
        "--report_to", "none", "--gradient_checkpointing", "false", "--disable_tqdm", "true")  # fmt: skip
    stats = json.loads((out / "run.json").read_text())["log"][0]
    assert stats["pear/tokens"] == tokens
    assert stats["pear/weight_mean"] == pytest.approx(sum(weights) / tokens, rel=1e-5)
    assert stats["pear/nll"] == pytest.approx(-sum(logprobs) / tokens, rel=1e-5)
    assert stats["pear/ratio_tokens"] == pytest.approx(sum(total for *_, total in found) / tokens, rel=1e-5)
    loss = sum(-p * w for p, w in zip(logprobs, weights, strict=True)) / tokens
    assert stats["loss"] == pytest.approx(loss, rel=1e-4)

    # one step of SGD is the gradient: autograd on full logits with the weights held fixed
    model, tokenizer = load_model(str(folder / "student"), dtype=torch.float64), load_tokenizer(str(folder / "student"))
    total = 0.0
    for row, (student, g, _) in zip(rows, found, strict=True):
        ids = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=True)["input_ids"]
        logits = model(torch.tensor([ids])).logits[0]
        picked = logits.log_softmax(-1)[range(len(ids) - len(student) - 1, len(ids) - 1), ids[-len(student) :]]
        total = total - (torch.tensor(g, dtype=torch.float64) * picked).sum() / tokens
    total.backward()
    before = load_file(folder / "student" / "model.safetensors")
    after = load_file(out / "model.safetensors")
    for name, parameter in model.named_parameters():
        step = (before[name].double() - after[name].double()) / 1e-3
        error = (step - parameter.grad).norm() / parameter.grad.norm()
        assert error < 2e-3, f"{name}: {error:.1e}"
