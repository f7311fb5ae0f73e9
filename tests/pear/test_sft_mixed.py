"""`pear sft` on rows of several tokenizers and of nobody, and with the options against collapse."""

import copy
import itertools
import json
import math
import shutil

import pytest
import torch
from mixed_rows import (
    CLIP,
    byte_row,
    naive,
    nobodys_row,
    other_tokenizer,
    rows_of_every_kind,
    texts,
    token_row,
    weights_by_hand,
    without,
)
from tiny import make_model
from training import OPTIONS, assert_close, batch_of, gradients, make_config

from pear.health import block_sums
from pear.io import DataError
from pear.pipeline import fine_tune
from pear.runs import read_run
from pear.score import score
from pear.scored import load_scored
from pear.seal import write_scored
from pear.sft import PEARSFTTrainer, main
from pear_kernels import pear_weights
from pear_kernels.options import DEFAULTS

MIXED = {
    "token": {"level": "token"},
    "block": {"level": "block", "block_size": 3, "clip_blocks": True},
    "sequence": {"level": "sequence"},
}
LAYOUTS = {"padded": {}, "packing": {"packing": True}, "padding_free": {"padding_free": True}}


@pytest.fixture(scope="module")
def rows(tokenizer):
    """Two of them with tokens that have no ratio: in the middle, and at both ends."""
    made = rows_of_every_kind(tokenizer)
    made[2], made[10] = without(made[2], 4, 5), without(made[10], 0, 1, -3, -1)
    return made


@pytest.fixture
def make_trainer(tokenizer, tmp_path):
    """make_trainer(rows, **options): rows are sealed and read; `teacher` and `columns` as in `pear sft`."""

    def make(rows, teacher=None, columns=(), **options) -> PEARSFTTrainer:
        options = {"log_ratio_clip": list(CLIP), "max_length": 128} | options
        args = make_config(options.pop("output_dir", tmp_path / "run"), **options)
        write_scored(tmp_path / "scored.jsonl", rows)
        data = load_scored(tmp_path / "scored.jsonl", tokenizer, columns=columns, options=args.pear_options())
        trainer = PEARSFTTrainer(
            make_model(tokenizer), args, teacher=teacher, train_dataset=data, processing_class=tokenizer
        )
        trainer.loaded = data
        trainer.model.train()
        return trainer

    return make


def backward(trainer, size: int = 5, tokens: int = 100) -> float:
    """The loss of all rows, in micro-batches; gradients are left in the model."""
    total, n = 0.0, len(trainer.train_dataset)
    for first in range(0, n, size):
        batch = batch_of(trainer, range(first, min(first + size, n)))
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(tokens))
        loss.backward()
        total += loss.item()
    return total


# ---------------------------------------------------------------------------------------------------------------------
# The loss


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("level", MIXED)
def test_loss_and_gradients_are_those_of_full_logits(tokenizer, rows, make_trainer, level, layout):
    trainer = make_trainer(rows, **MIXED[level], **LAYOUTS[layout], pad_to_multiple_of=8)
    assert (len(trainer.train_dataset) < len(rows)) == (layout == "packing")
    loss = backward(trainer)
    plain = make_model(tokenizer)
    total, seen = naive(plain, trainer.loaded, trainer.args.pear_options(), clip_blocks=True)
    (total / 100).backward()
    assert loss == pytest.approx(total.item() / 100, rel=2e-5)
    assert_close(gradients(trainer.model), gradients(plain), 1e-4)
    stats = trainer._read_stats("train")
    weights = torch.tensor(seen["weights"], dtype=torch.float64)
    assert stats["pear/tokens"] == seen["tokens"]
    for name, expected in (
        ("nll", seen["nll"] / seen["tokens"]),
        ("ratio_tokens", seen["ratio_tokens"] / seen["tokens"]),
        ("log_ratio_mean", seen["log_ratio"] / seen["tokens"]),
        ("weight_mean", weights.mean().item()),
        ("effective_sample_size", (weights.sum() ** 2 / len(weights) / weights.square().sum()).item()),
    ):
        assert stats[f"pear/{name}"] == pytest.approx(expected, rel=1e-4), name
    assert 0 < stats["pear/ratio_clipped_low"] < 1 and weights.std() > 0.1
    ids = [
        [k for k, bit in zip(row["block_ids"], row["completion_mask"], strict=True) if bit] for row in trainer.loaded
    ]
    assert -1 in ids[2][1:-1] and ids[2][0] == 0 and ids[10][0] == ids[10][-1] == -1 and max(ids[10]) > 3


def test_own_rows_at_level_block_are_clipped_by_token_unless_asked(tokenizer, rows, make_trainer):
    """Beside human text, which needs block_ids but no spans."""
    mine = [row for i, row in enumerate(rows) if i % 4 in (0, 3)]
    losses = []
    for clip_blocks in (False, True):
        trainer = make_trainer(mine, level="block", block_size=3, clip_blocks=clip_blocks)
        losses.append(backward(trainer))
        total, _ = naive(make_model(tokenizer), trainer.loaded, trainer.args.pear_options(), clip_blocks)
        assert losses[-1] == pytest.approx(total.item() / 100, rel=2e-5)
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_bytes_of_the_same_tokens_give_the_loss_of_tokens(tokenizer, rows, make_trainer, level):
    """The student's own tokens, told by bytes alone: every token is its own span."""
    tokens = [token_row(text, tokenizer, seed=i) for i, text in enumerate(texts(6))]
    a = make_trainer(tokens, level=level)
    b = make_trainer([byte_row(row) for row in tokens], level=level)
    assert "block_ids" not in a.loaded.column_names and "block_ids" in b.loaded.column_names
    assert a.loaded["behavior_logprobs"][:] == b.loaded["behavior_logprobs"][:]
    assert backward(a) == pytest.approx(backward(b), rel=1e-7)
    assert_close(gradients(a.model), gradients(b.model), 1e-6)
    left, right = a._read_stats("train"), b._read_stats("train")
    assert right.pop("pear/ratio_tokens") == 1
    assert left == pytest.approx(right, rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"level": "sequence"}, {"center": True}, {"normalize": "sequence"}])
def test_rows_of_nobody_give_the_gradients_of_plain_sft(make_trainer, options):
    human = [nobodys_row(text) for text in texts(6)]
    weighted, plain = make_trainer(human, **options), make_trainer(human, weighting="none")
    assert backward(weighted) == pytest.approx(backward(plain), rel=1e-6)
    assert_close(gradients(weighted.model), gradients(plain.model), 1e-5)


@pytest.mark.parametrize("level", MIXED)
def test_accumulation_is_one_big_batch(rows, make_trainer, level):
    whole = make_trainer(rows[:8], per_device_train_batch_size=8, max_steps=2, **MIXED[level])
    parts = make_trainer(
        rows[:8], per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=2, **MIXED[level]
    )
    before = copy.deepcopy(whole.model.state_dict())
    for trainer in (whole, parts):
        trainer.train()
    steps = [{name: p - before[name] for name, p in trainer.model.state_dict().items()} for trainer in (whole, parts)]
    assert_close(*steps, 1e-4)
    for a, b in zip(whole.state.log_history[:2], parts.state.log_history[:2], strict=True):
        for name in ("loss", "pear/nll", "pear/weight_mean", "pear/tokens", "pear/ratio_tokens", "pear/log_ratio_mean"):
            assert a[name] == pytest.approx(b[name], rel=1e-5), name


@pytest.mark.parametrize("packing", [False, True])
def test_resume_is_exact(rows, make_trainer, tmp_path, packing):
    options = dict(
        max_steps=4, per_device_train_batch_size=1, gradient_accumulation_steps=2, optim="adamw_torch", packing=packing,
        lr_scheduler_type="linear", save_strategy="steps", save_steps=2,
    )  # fmt: skip
    whole = make_trainer(rows, output_dir=tmp_path / "a", **options)
    whole.train()
    shutil.copytree(tmp_path / "a" / "checkpoint-2", tmp_path / "b" / "checkpoint-2")
    resumed = make_trainer(rows, output_dir=tmp_path / "b", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    for (name, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_other_weightings_need_no_policy(rows, make_trainer):
    """Behaviour log-probs are for their log alone."""
    losses = []
    for data in (rows, [nobodys_row({name: row[name] for name in ("prompt", "completion")}) for row in rows]):
        trainer = make_trainer(data, weighting="dft")
        losses.append(backward(trainer))
        stats = trainer._read_stats("train")
        assert 0 <= stats["pear/ratio_tokens"] < 1
    assert losses[0] == losses[1]
    assert stats["pear/ratio_tokens"] == 0


def test_distillation_of_mixed_rows(tokenizer, rows, make_trainer):
    """Weighted by PEAR, in packs: a sum row by row from full logits."""
    teacher = make_model(tokenizer, kind="qwen2", seed=5)
    trainer = make_trainer(rows, teacher=copy.deepcopy(teacher), distill="forward", packing=True)
    loss = backward(trainer)
    student, total = make_model(tokenizer), 0.0
    for row in trainer.loaded:
        ids = torch.tensor([row["input_ids"]])
        where = [t for t, bit in enumerate(row["completion_mask"]) if bit]
        with torch.no_grad():
            own, theirs = (model(input_ids=ids).logits[0].double().log_softmax(-1) for model in (student, teacher))
        divergence = (theirs.exp() * (theirs - own)).sum(-1)
        blocks, behavior = ([row[name][t] for t in where] for name in ("block_ids", "behavior_logprobs"))
        values = [own[t - 1, row["input_ids"][t]].item() for t in where]
        weights = weights_by_hand(values, behavior, blocks, trainer.args.pear_options(), clip_blocks=True)
        total += sum(w * divergence[t - 1].item() for w, t in zip(weights, where, strict=True))
    assert loss == pytest.approx(total / 100, rel=1e-4)


def test_wrong_answers_among_mixed_rows(tokenizer, rows, make_trainer):
    """Right ones by level; wrong ones by the sum of all their log-ratios, spans clipped as such."""
    labelled = [row | {"label": i % 5 > 1} for i, row in enumerate(rows)]
    options = {"negatives": True, "negative_lambda": 0.4, "logprob_floor": -math.inf}
    trainer = make_trainer(labelled, columns=("sequence_label",), **options)
    loss = backward(trainer)
    model, options, total = make_model(tokenizer), trainer.args.pear_options(), 0.0
    for row, labelled_row in zip(trainer.loaded, labelled, strict=True):
        if labelled_row["label"]:
            total += naive(model, [row], options, clip_blocks=True)[0].item()
        else:
            found, seen = naive(model, [row], options.replace(level="sequence"), clip_blocks=True)
            total -= 0.4 * found.item()
    assert loss == pytest.approx(total / 100, rel=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Options against collapse

COLLAPSE = {
    "clip_blocks": {"clip_blocks": True, "level": "block", "block_size": 3},
    "center": {"center": True},
    "clip_length": {"clip_length": 10},
    "normalize-sequence": {"normalize": "sequence"},
    "normalize-batch": {"normalize": "batch"},
}


@pytest.mark.parametrize("mixed", [False, True], ids=["own", "mixed"])
@pytest.mark.parametrize("name", COLLAPSE)
def test_each_option_changes_the_weights_as_pear_weights_says(tokenizer, rows, make_trainer, name, mixed):
    data = rows if mixed else [token_row(text, tokenizer, seed=i) for i, text in enumerate(texts(8))]
    trainer = make_trainer(data, **COLLAPSE[name])
    without = make_trainer(data, **{k: v for k, v in COLLAPSE[name].items() if k in ("level", "block_size")}
                           | ({"clip_blocks": True} if mixed and name == "clip_blocks" else {}))  # fmt: skip
    batch = batch_of(trainer, range(len(data)))
    loss, output = trainer.compute_loss(trainer.model, batch, True, torch.tensor(100))
    plain_loss = without.compute_loss(without.model, batch_of(without, range(len(data))), False, torch.tensor(100))
    counted = batch["labels"] != -100
    options = trainer.args.loss_options(mixed)
    more = {"block_ids": batch["block_ids"]} if mixed else {}
    expected = pear_weights(output.logprobs.detach(), batch["behavior_logprobs"], counted, **options, **more)
    torch.testing.assert_close(output.weights[counted], expected[counted], rtol=1e-5, atol=1e-7)
    hand = -(expected.double() * output.logprobs.double())[counted].sum() / 100
    assert loss.item() == pytest.approx(hand.item(), rel=1e-5)
    if not (mixed and name == "clip_blocks"):
        assert loss.item() != pytest.approx(plain_loss.item(), rel=1e-3)
    if name == "normalize-batch":
        assert expected[counted].mean().item() == pytest.approx(1, rel=1e-5)
    if name == "normalize-sequence":
        for line, bit in zip(expected, counted, strict=True):
            assert line[bit].mean().item() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"center": True, "level": "sequence"}, "center"),
        ({"normalize": "sequence", "level": "sequence"}, "normalize"),
        ({"normalize": "row"}, "normalize must be None or one of 'sequence', 'batch', got 'row'"),
        ({"clip_length": 0}, "clip_length must be"),
        ({"normalize": "batch", "negatives": True}, "normalize = 'batch' does not go with negatives"),
        ({"center": True, "weighting": "dft"}, "center = True goes with weighting 'pear' alone, got 'dft'"),
        ({"clip_length": 8, "weighting": "none"}, "clip_length = 8 goes with weighting 'pear' alone"),
        ({"normalize": "batch", "weighting": "none"}, "normalize = 'batch' goes with weighting 'pear' alone"),
        ({"clip_blocks": True, "weighting": "psft"}, "clip_blocks = True goes with weighting 'pear' alone"),
    ],
)
def test_options_that_do_not_hold_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, **options)


# ---------------------------------------------------------------------------------------------------------------------
# Blocks that are not those of the options


def test_blocks_of_other_options_are_refused(tokenizer, rows, tmp_path):
    write_scored(tmp_path / "s.jsonl", [rows[0], rows[3]])
    write_scored(tmp_path / "a.jsonl", rows[:3])
    mine, aligned = (load_scored(tmp_path / name, tokenizer) for name in ("s.jsonl", "a.jsonl"))

    def train(data, **options):
        args = make_config(tmp_path / "run", **options)
        return PEARSFTTrainer(make_model(tokenizer), args, train_dataset=data, processing_class=tokenizer)

    message = r"train dataset: loaded in blocks of 1 tokens, but level and block_size ask for 3; .*options=args"
    with pytest.raises(DataError, match=message):
        train(mine, level="block", block_size=3)
    with pytest.raises(DataError, match="train dataset: there are rows of another tokenizer.*--clip_blocks true"):
        train(aligned.select([1, 2]), level="block", block_size=3)
    with pytest.raises(DataError, match="block_ids without block_tokens"):
        train(mine.remove_columns("block_tokens"))
    train(mine, level="block", block_size=3, weighting="none")
    train(mine, level="sequence")


# ---------------------------------------------------------------------------------------------------------------------
# Words


def test_human_text_alone_is_called_plain_sft_and_no_copy(make_trainer, caplog):
    make_trainer([nobodys_row(text) for text in texts(6)]).train()
    assert "train dataset: no row has a behaviour policy, so every PEAR weight is 1: this is plain SFT" in caplog.text
    assert "copy of the student" not in caplog.text


def test_copies_of_the_student_are_told_by_spans_too(tokenizer, rows, make_trainer, caplog):
    """Its own log-probs as sums over spans of two tokens: no log-ratio of a token is near 0, but each span's."""
    model, made = make_model(tokenizer), []
    for i, text in enumerate(texts(6)):
        row = token_row(text, tokenizer)
        with torch.no_grad():
            logprobs = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double().log_softmax(-1)
        where = [t for t, bit in enumerate(row["completion_mask"]) if bit]
        values = [logprobs[t - 1, row["input_ids"][t]].item() for t in where]
        pairs = list(itertools.batched(range(len(where) - 1), 2)) if hasattr(itertools, "batched") else [
            tuple(range(t, min(t + 2, len(where) - 1))) for t in range(0, len(where) - 1, 2)
        ]  # fmt: skip
        bounds = row["behavior_spans"]["bytes"]
        spans = [[bounds[pair[0]][0], bounds[pair[-1]][1]] for pair in pairs] + [bounds[-1]]
        sums = [sum(values[t] for t in pair) for pair in pairs] + [values[-1]]
        row = byte_row(row)
        row["behavior_spans"] = {"bytes": spans, "marks": {str(len(spans) - 1): "end_of_turn"}, "logprobs": sums}
        made += [row, nobodys_row(texts(6)[i])]
    make_trainer(made, packing=True).train()
    assert "every log-ratio is near 0" in caplog.text and "copy of the student" in caplog.text
    caplog.clear()
    make_trainer(rows).train()
    make_trainer(made, weighting="none").train()
    assert "copy of the student" not in caplog.text


def test_sums_of_blocks():
    values = torch.arange(1.0, 13).view(2, 6)
    ids = torch.tensor([[-1, 0, 0, 1, -1, 1], [0, 0, 0, -1, 5, 5]])
    counted = (ids >= 0) & torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]]).bool()
    found = block_sums(values, ids, counted)
    assert sorted(found[found != 0].tolist()) == [5.0, 10.0, 17.0, 23.0]
    packed = block_sums(values.view(1, 12), ids.view(1, 12), counted.view(1, 12), torch.tensor([0, 6, 12]))
    assert sorted(packed[packed != 0].tolist()) == [5.0, 10.0, 17.0, 23.0]
    one = block_sums(torch.ones(1, 4), torch.zeros(1, 4).int(), torch.ones(1, 4).bool(), torch.tensor([0, 2, 4]))
    assert sorted(one[one != 0].tolist()) == [2.0, 2.0]


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_from_score_to_sft_with_several_policies(tokenizer, save_model, jsonl, tmp_path, caplog):
    """`pear score` by a teacher of another tokenizer and one of the student's, human text beside; then `pear sft`."""
    other = other_tokenizer()
    teacher = tmp_path / "teacher"
    make_model(other, seed=4).save_pretrained(teacher)
    other.save_pretrained(teacher)
    policies = [str(teacher)] * 8 + [str(save_model(seed=1))] * 4 + ["none"] * 3
    rows = [text | {"behavior_policy": policy} for text, policy in zip(texts(15), policies, strict=True)]
    scored = tmp_path / "scored.jsonl"
    score(None, jsonl(rows), scored, progress=False)
    flags = (
        f"--model {save_model(seed=0)} --data {scored} --eval_data {scored} --output_dir {tmp_path / 'out'} "
        "--max_steps 2 --report_to none --logging_steps 1 --per_device_train_batch_size 4 --disable_tqdm true "
        "--save_strategy no "
        "--dataloader_pin_memory false --center true --clip_length 200 --unaligned skip"
    )
    trainer = main(flags.split())
    assert trainer.args.pear_options() == DEFAULTS.replace(center=True, clip_length=200)
    run = read_run(tmp_path / "out")
    assert run.settings["center"] is True and run.settings["clip_length"] == 200
    assert run.settings["unaligned"] == "skip"
    entry = run.log[0]
    assert 0 < entry["pear/ratio_tokens"] <= 1 and math.isfinite(entry["loss"])
    assert "8 of 15 rows are not in the student's tokens and were aligned by their bytes" in caplog.text
    assert "3 of 15 rows have no behaviour policy" in caplog.text
    assert any("eval_pear/ratio_tokens" in entry for entry in run.log)


def test_roles_file_of_the_command(tokenizer, save_model, tmp_path):
    """Without a role for its end of turn, the policy's is left out on both sides; with one, it is matched."""
    row = byte_row(token_row(texts(1)[0], tokenizer))
    spans = json.loads(json.dumps(row["behavior_spans"]))
    last = max(spans["marks"], key=int)
    spans["marks"][last] = "<|done|>"
    row["behavior_spans"] = spans
    write_scored(tmp_path / "scored.jsonl", [row])
    (tmp_path / "roles.yaml").write_text('end_of_turn: ["<|im_end|>", "<|done|>"]\n')
    flags = (
        f"--model {save_model(seed=0)} --data {tmp_path / 'scored.jsonl'} --output_dir {tmp_path / 'out'} "
        "--max_steps 1 --report_to none --logging_steps 1 --disable_tqdm true --save_strategy no "
        "--dataloader_pin_memory false"
    ).split()
    main(flags)
    assert 0 < read_run(tmp_path / "out").log[0]["pear/ratio_tokens"] < 1
    main([*flags, "--roles", str(tmp_path / "roles.yaml"), "--overwrite_output_dir"])
    run = read_run(tmp_path / "out")
    assert run.log[0]["pear/ratio_tokens"] == 1 and run.settings["roles"].endswith("roles.yaml")
    with pytest.raises(DataError, match="none.yaml"):
        main([*flags, "--roles", str(tmp_path / "none.yaml"), "--overwrite_output_dir"])


def test_options_of_ours_are_off_unless_asked_for(tmp_path):
    assert make_config(tmp_path).pear_options().is_paper
    assert make_config(tmp_path, **OPTIONS | {"normalize": "batch"}).loss_options()["normalize"] == "batch"


def test_the_pipeline_loads_its_data_in_the_blocks_of_its_options(tokenizer, tmp_path):
    """As `pear demo` and `pear replicate` train: blocks of one token would be refused by the trainer of blocks of 3."""
    model, path = make_model(tokenizer), tmp_path / "scored.jsonl"
    told = texts(3)
    write_scored(path, [token_row(told[0], tokenizer), token_row(told[1], tokenizer), nobodys_row(told[2])])
    trained = fine_tune(
        lambda done, total: None, model, tokenizer, tmp_path / "run", path, path,
        level="block", block_size=3, max_steps=1, logging_steps=1, per_device_train_batch_size=3,
        dataloader_pin_memory=False,
    )  # fmt: skip
    assert 0 < trained.log[0]["pear/ratio_tokens"] < 1
