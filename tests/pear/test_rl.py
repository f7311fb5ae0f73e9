"""`pear rl`: loss, gradients and whole runs against TRL's own GRPOTrainer on full logits; kills, full disks, faults."""

import copy
import errno
import importlib.util
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from rl_training import GROUP, LIMIT, TIMES, by_ids, make_grpo_trainer, prompts, rollouts
from safetensors import SafetensorError
from tiny import forbid_logits, make_model
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM
from trl import GRPOConfig, GRPOTrainer
from typer.testing import CliRunner

import pear.rl
from pear.checkpoints import resume_from
from pear.cli import app
from pear.fused_head import add_fused_head
from pear.generate import encode_prompt
from pear.io import DataError, WriteError, read_jsonl
from pear.rl import PEARGRPOTrainer, check_prompts, data_dataset
from pear.runs import read_run
from pear.save import save_final


@pytest.fixture(scope="module")
def policy(save_model) -> str:
    return str(save_model(seed=0))


@pytest.fixture
def make_trainer(tokenizer, policy, tmp_path):
    def make(ours=True, model=None, **options):
        options.setdefault("output_dir", tmp_path / "run")
        return make_grpo_trainer(policy if model is None else model, tokenizer, ours, **options)

    return make


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_close(a: dict, b: dict, tolerance: float) -> None:
    """Each tensor's error, relative to the whole (a single one may be all but zero)."""
    assert a.keys() == b.keys() and a
    size = max(x.norm().item() for x in b.values())
    for name in a:
        error = (a[name] - b[name]).norm().item()
        assert error <= tolerance * max(b[name].norm().item(), 0.1 * size), f"{name}: error {error:.1e} of {size:.1e}"


def assert_same_weights(a, b) -> None:
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


def without_times(log: list[dict]) -> list[dict]:
    return [{key: value for key, value in entry.items() if key not in TIMES} for entry in log]


# ---------------------------------------------------------------------------------------------------------------------
# The loss of one micro-batch


def full_logits(trainer):
    """TRL's method, from the logits of a model that nothing has patched, in float64 from the logits on."""

    def found(model, input_ids, attention_mask, logits_to_keep, **_):
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1][:, -logits_to_keep:].double()
        logprobs = (logits / trainer.temperature).log_softmax(-1)
        picked = logprobs.gather(-1, input_ids[:, -logits_to_keep:, None])[..., 0]
        return picked, -(logprobs.exp() * logprobs).sum(-1).float(), None  # in float64 a quantile is none of them

    return found


def make_batch(model, tokenizer, temperature: float, old=True, ratio=None, tools=False, drop=None) -> dict:
    """Left-padded prompts, right-padded completions; old, reference and sampler near the policy, none equal to it."""
    rng = torch.Generator().manual_seed(5)
    width, lengths, starts = 9, torch.tensor([9, 4, 1, 7]), torch.tensor([0, 2, 3, 1])
    prompt_ids, completion_ids = (torch.randint(5, 300, (4, n), generator=rng) for n in (5, width))
    prompt_mask = (torch.arange(5) >= starts[:, None]).long()
    mask = (torch.arange(width) < lengths[:, None]).long()
    if drop is not None:
        mask[drop] = 0
    completion_ids = completion_ids.where(torch.arange(width) < lengths[:, None], tokenizer.pad_token_id)
    inputs = {
        "prompt_ids": prompt_ids.where(prompt_mask == 1, tokenizer.pad_token_id), "prompt_mask": prompt_mask,
        "completion_ids": completion_ids, "completion_mask": mask,
        "advantages": torch.tensor([1.2, -0.8, 0.5, -1.7]),
    }  # fmt: skip
    ids = torch.cat([inputs["prompt_ids"], completion_ids], dim=1)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.cat([prompt_mask, mask], dim=1)).logits[:, 4:-1]
    here = (logits / temperature).log_softmax(-1).gather(-1, completion_ids[..., None])[..., 0]

    def near(spread: float) -> torch.Tensor:
        return here + spread * torch.randn(here.shape, generator=rng)

    inputs["ref_per_token_logps"] = near(0.5)
    before = near(0.4)
    if old:
        inputs["old_per_token_logps"] = before
    inputs["sampling_per_token_logps"] = before + 0.3 * torch.randn(here.shape, generator=rng)
    if tools:
        inputs["tool_mask"] = (torch.rand(mask.shape, generator=rng) < 0.7).long()
    if ratio == "token":
        inputs["importance_sampling_ratio"] = 2 * torch.rand(mask.shape, generator=rng)
    elif ratio == "sequence":
        inputs["importance_sampling_ratio"] = torch.tensor([[0.5], [1.5], [0.0], [0.9]])
    inputs["num_items_in_batch"] = (mask * inputs.get("tool_mask", 1)).sum() + 13  # of the whole generation
    return inputs


LOSSES = {
    "grpo": dict(loss_type="grpo"),
    "bnpo": dict(loss_type="bnpo"),
    "dr_grpo": dict(loss_type="dr_grpo"),
    "dapo": dict(loss_type="dapo"),
    "cispo": dict(loss_type="cispo", epsilon_high=1.5),
    "sapo": dict(loss_type="sapo", sapo_temperature_pos=0.8, sapo_temperature_neg=1.3),
    "sequence": dict(loss_type="grpo", importance_sampling_level="sequence"),
    "sequence dapo": dict(loss_type="dapo", importance_sampling_level="sequence"),
    "delta": dict(loss_type="grpo", delta=1.4, epsilon_high=0.25),
    "delta sequence": dict(loss_type="bnpo", delta=1.4, importance_sampling_level="sequence"),
}
BIASED = dict(beta=0.3, use_bias_correction_kl=False)
INPUTS = {  # TRL's default, use_bias_correction_kl=True, is none of GSPO's here
    "on policy": (dict(), dict(old=False)),
    "old": (dict(steps_per_generation=2, num_iterations=2), dict()),
    "cold": (dict(temperature=0.7), dict()),
    "kl": (BIASED, dict()),
    "unbiased kl": (dict(beta=0.3, use_bias_correction_kl=True), dict()),
    "kl on policy": (dict(beta=0.3, use_bias_correction_kl=True), dict(old=False)),
    "truncated": (dict(mask_truncated_completions=True), dict(drop=[0, 2])),
    "all truncated": (BIASED | dict(mask_truncated_completions=True), dict(drop=[0, 1, 2, 3])),
    "tools": (BIASED, dict(tools=True)),
    "sampler": (dict(), dict(ratio="token")),
    "sampler of sequences": (BIASED, dict(ratio="sequence")),
    "sampler, tools": (BIASED | dict(temperature=0.7), dict(ratio="token", tools=True)),
}


def losses(make_trainer, tokenizer, options: dict, batch: dict, monkeypatch):
    """(loss, gradients) of ours, of TRL's formula on our log-probs, and of TRL's on full logits; and the trainer."""
    options = dict(gradient_accumulation_steps=2) | options
    trainer = make_trainer(**options)
    plain = AutoModelForCausalLM.from_pretrained(trainer.model.config._name_or_path, dtype=torch.float32).train()
    inputs = make_batch(plain, tokenizer, trainer.temperature, **batch)
    trainer.current_gradient_accumulation_steps = 2
    trainer.use_vllm = "ratio" in batch
    found = []
    for loss_of in (trainer._compute_loss, lambda *args: GRPOTrainer._compute_loss(trainer, *args)):
        loss = loss_of(trainer.model, dict(inputs))
        loss.backward()
        found.append((loss.item(), gradients(trainer.model)))
    trainer._metrics["train"].clear()
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_get_per_token_logps_and_entropies", full_logits(trainer))
        loss = GRPOTrainer._compute_loss(trainer, plain, dict(inputs))
        loss.backward()
    found.append((loss.item(), gradients(plain)))
    return found, trainer


def assert_three_agree(found) -> None:
    (loss, ours), *others = found
    for value, theirs in others:
        assert loss == pytest.approx(value, rel=1e-5, abs=1e-5)
        if any(g.any() for g in theirs.values()):
            assert_close(ours, theirs, 1e-5)
        else:  # nothing to learn from
            assert not any(g.any() for g in ours.values())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("case", INPUTS)
def test_loss_and_gradients_are_trl_s(make_trainer, tokenizer, monkeypatch, loss, case):
    options, batch = INPUTS[case]
    found, trainer = losses(make_trainer, tokenizer, LOSSES[loss] | options, batch, monkeypatch)
    by_trl = "sequence" in loss and options.get("use_bias_correction_kl", False)
    assert bool(trainer.other_formula({})) == by_trl
    assert_three_agree(found)
    stats, as_trl = trainer._read_stats("train")
    if by_trl:
        assert not stats and not as_trl
        return
    theirs = trainer._metrics["train"]
    assert as_trl.keys() == theirs.keys()
    for name, values in theirs.items():
        assert as_trl[name] == pytest.approx(values, rel=1e-4, abs=1e-6, nan_ok=True), name
    if case == "all truncated":
        assert stats["tokens"] == 0 and all(map(math.isfinite, stats.values()))
        assert loss in ("cispo", "sapo") or math.isnan(as_trl["clip_ratio/low_min"][0]) == ("sequence" not in loss)
        return
    assert stats["entropy"] == pytest.approx(theirs["entropy"][0], rel=1e-5)
    if options.get("beta"):
        assert stats["kl_ref"] > 0
    if loss in ("grpo", "bnpo", "dr_grpo", "dapo"):
        for ours, name in (("clip_low", "low"), ("clip_high", "high")):
            assert stats[ours] == pytest.approx(theirs[f"clip_ratio/{name}_mean"][0], abs=1e-6)
        assert (stats["clip_low"] + stats["clip_high"] > 0) == (case not in ("on policy", "kl on policy"))


@pytest.mark.parametrize(
    "options, why",
    [
        (dict(loss_type="vespo"), "vespo"),
        (dict(loss_type="luspo", importance_sampling_level="sequence"), "luspo"),
        (dict(top_entropy_quantile=0.4), "top_entropy_quantile"),
        (dict(entropy_coef=0.1), "entropy bonus"),
        (dict(off_policy_mask_threshold=0.1), "off_policy_mask_threshold"),
        (dict(loss_type="cispo", epsilon_high=0.5), "below 1"),
        (dict(loss_type="cispo", epsilon_high=1.5, importance_sampling_level="sequence"), "sequence"),
        (dict(delta=1.1), "delta"),
    ],
)
def test_options_that_need_trl_s_formula_get_it(make_trainer, tokenizer, monkeypatch, caplog, options, why):
    found, trainer = losses(make_trainer, tokenizer, options, dict(), monkeypatch)
    assert why in trainer.other_formula({}) and "TRL's own formula runs on our log-probs" in caplog.text
    assert_three_agree(found)
    start = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert any(not torch.equal(p, start[name]) for name, p in trainer.model.state_dict().items())
    assert all(math.isfinite(entry["entropy"]) for entry in trainer.state.log_history[:2])


def test_no_logits_are_made_in_a_loss(make_trainer, tokenizer):
    trainer = make_trainer(beta=0.1)
    trainer.current_gradient_accumulation_steps = 1
    forbid_logits(trainer.model)
    trainer._compute_loss(trainer.model, make_batch(make_model(tokenizer), tokenizer, 1.0)).backward()


# ---------------------------------------------------------------------------------------------------------------------
# Log-probs for TRL


def capped(tokenizer):
    return Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, final_logit_softcapping=3.0, initializer_range=0.3,
        )
    )  # fmt: skip


def scaled(tokenizer):
    return GraniteForCausalLM(
        GraniteConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, logits_scaling=2.5, initializer_range=0.3,
        )
    )  # fmt: skip


@pytest.mark.parametrize("make", [make_model, capped, scaled])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_full_logits(tokenizer, make, temperature):
    torch.manual_seed(1)
    model = make(tokenizer).eval()
    ids = torch.randint(5, 300, (3, 12), generator=torch.Generator().manual_seed(2))
    labels = ids.masked_fill(torch.arange(12) < torch.tensor([[0], [4], [11]]), -100)
    exact = (model(input_ids=ids).logits[:, :-1].double() / temperature).log_softmax(-1)
    add_fused_head(model, temperature=temperature, entropy=True)
    output = model(input_ids=ids, labels=labels, fused_lm_head=True)
    scored = labels[:, 1:] != -100
    assert torch.equal(output.label_mask, scored)
    expected = exact.gather(-1, ids[:, 1:, None])[..., 0]
    assert torch.allclose(output.log_probs[scored].double(), expected[scored], atol=1e-5)
    entropy = -(exact.exp() * exact).sum(-1)
    assert torch.allclose(output.entropy[scored].double(), entropy[scored], atol=1e-5)
    assert not output.log_probs[~scored].any()


def test_experts_have_their_auxiliary_loss_in_trls_output(tokenizer):
    """With its gradient, for TRL's own formula; and no part of it where router logits are not asked for."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_experts=4,
        num_experts_per_tok=2, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).eval()
    ids = torch.randint(5, 300, (2, 8))
    expected = model(input_ids=ids, output_router_logits=True).aux_loss
    (of_router,) = torch.autograd.grad(expected, model.model.layers[0].mlp.gate.weight)
    add_fused_head(model)
    output = model(input_ids=ids, labels=ids, fused_lm_head=True, output_router_logits=True)
    assert torch.equal(output.aux_loss, expected)
    assert torch.equal(torch.autograd.grad(output.aux_loss, model.model.layers[0].mlp.gate.weight)[0], of_router)
    plain = model(input_ids=ids, labels=ids, fused_lm_head=True)
    assert plain.aux_loss is None and torch.equal(plain.log_probs, output.log_probs)


@pytest.mark.parametrize("tied", [False, True])
def test_head_in_float32(make_trainer, tokenizer, monkeypatch, tied):
    """A bfloat16 model whose head alone is float32: TRL's own run of it agrees."""
    plain = make_model(tokenizer, "qwen2", tied).to(torch.bfloat16)
    options = dict(cast_lm_head_to_fp32=True, temperature=0.7)
    ours = make_trainer(model=copy.deepcopy(plain), **options)
    theirs = make_trainer(ours=False, model=copy.deepcopy(plain), **options)
    batch = make_batch(make_model(tokenizer), tokenizer, 0.7)
    monkeypatch.setattr(theirs, "_get_per_token_logps_and_entropies", full_logits(theirs))
    found = []
    for trainer in (ours, theirs):
        assert trainer.model.lm_head.weight.dtype == torch.float32
        trainer.current_gradient_accumulation_steps = 1
        loss = trainer._compute_loss(trainer.model, dict(batch))
        loss.backward()
        found.append((loss.item(), gradients(trainer.model)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5, abs=1e-5)
    if not tied:
        heads = [{"head": gradients["lm_head.weight"]} for _, gradients in found]
        assert_close(*heads, 1e-5)
    assert_close(found[0][1], found[1][1], 0.02)  # through bfloat16


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs


def test_two_runs_are_bitwise_equal_and_the_global_seed_does_not_matter(make_trainer, tmp_path):
    runs = []
    for place in ("a", "b"):
        trainer = make_trainer(output_dir=tmp_path / place, optim="adamw_torch", steps_per_generation=2, max_steps=3)
        torch.manual_seed(len(runs))  # as other code in the process may leave it
        trainer.train()
        runs.append(trainer)
    assert_same_weights(runs[0].model, runs[1].model)
    assert without_times(runs[0].state.log_history) == without_times(runs[1].state.log_history)
    other = make_trainer(output_dir=tmp_path / "c", optim="adamw_torch", steps_per_generation=2, max_steps=3, seed=8)
    other.train()
    assert (tmp_path / "c/samples/00000000.jsonl").read_text() != (tmp_path / "a/samples/00000000.jsonl").read_text()


def test_gradient_tolerance_is_logged_and_only_gradients_change(make_trainer, tokenizer, monkeypatch):
    """The logged shares are means over tokens of all micro-batches; evaluation, without gradients, logs neither."""
    seen, compute = [], PEARGRPOTrainer._compute_loss

    def computed(self, model, inputs):
        loss = compute(self, model, inputs)
        seen.append((inputs["completion_mask"].sum().item(), self._policy_stats["train"][-1]))
        return loss

    monkeypatch.setattr(PEARGRPOTrainer, "_compute_loss", computed)
    options = dict(rollout_func=rollouts, gradient_accumulation_steps=2, loss_type="dapo")
    runs = {}
    for tolerance in (None, 0.0, 0.05):
        seen.clear()
        given = {} if tolerance is None else {"gradient_tolerance": tolerance}
        runs[tolerance] = make_trainer(model=make_model(tokenizer, scale=1.0), **options, **given)
        runs[tolerance].train()
    log, exact = runs[0.05].state.log_history, runs[0.0].state.log_history
    place = len(pear.rl.MEANS)  # of a row: gradient_kept, gradient_left_out
    for i, entry in enumerate(log[:2]):
        step = seen[2 * i : 2 * i + 2]
        for k, name in enumerate(("gradient_kept", "gradient_left_out")):
            mean = sum(tokens * row[place + k].item() for tokens, row in step) / sum(tokens for tokens, _ in step)
            assert entry[f"pear/{name}"] == pytest.approx(mean, rel=1e-5)
        assert 0 < entry["pear/gradient_left_out"] <= 0.05 and 0 < entry["pear/gradient_kept"] < 0.6
    assert log[0]["loss"] == exact[0]["loss"] and log[0]["pear/entropy"] == exact[0]["pear/entropy"]
    assert not any("gradient_kept" in key or "gradient_left_out" in key for entry in exact for key in entry)
    assert_same_weights(runs[0.0].model, runs[None].model)
    heads = [runs[tolerance].model.lm_head.weight for tolerance in (0.0, 0.05)]
    assert not torch.equal(*heads)
    monkeypatch.undo()
    assert not any("gradient_kept" in name for name in runs[0.05].evaluate(prompts(2)))


def test_lora_trains_the_adapter_alone(make_trainer, policy, tokenizer, tmp_path):
    """Its KL term is against the model without the adapter; what is left is a plain model, and the adapter."""
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = make_trainer(
        peft_config=lora, learning_rate=0.3, beta=0.1, num_iterations=2, rollout_func=rollouts, max_steps=4
    )
    trainer.train()
    kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[-1] > 1e-5
    start = AutoModelForCausalLM.from_pretrained(policy)
    base = {name.replace(".base_layer", ""): p for name, p in trainer.model.get_base_model().named_parameters()}
    for name, p in start.named_parameters():
        assert torch.equal(p, base[name]), name
    ids = torch.tensor([tokenizer("What is 3 plus 4?")["input_ids"]])
    with torch.no_grad():
        before = start(input_ids=ids).logits
        trained = trainer.model.eval()(input_ids=ids).logits
        save_final(trainer)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run")(input_ids=ids).logits
        adapted = peft.PeftModel.from_pretrained(start, tmp_path / "run" / "adapter")(input_ids=ids).logits
    assert torch.allclose(merged, trained, atol=1e-4) and torch.allclose(adapted, trained, atol=1e-4)
    assert not torch.allclose(merged, before, atol=1e-3)


def test_evaluation_in_a_run(make_trainer, tokenizer):
    trainer = make_trainer(loss_type="dapo", per_device_eval_batch_size=GROUP)
    trainer.eval_dataset = prompts(2)
    metrics = trainer.evaluate(prompts(2))
    logged = trainer.state.log_history[-1]
    assert math.isfinite(metrics["eval_loss"]) and logged["eval_pear/tokens"] > 0 and "eval_pear/pass@1" in logged
    trainer.train()
    assert "eval_pear/tokens" not in trainer.state.log_history[-2]


# ---------------------------------------------------------------------------------------------------------------------
# What generation may leave


def test_groups_with_equal_rewards_teach_nothing(make_trainer):
    trainer = make_trainer(reward=lambda prompts, **_: [0.5] * len(prompts), num_iterations=2)
    start = copy.deepcopy(trainer.model)
    trainer.train()
    assert_same_weights(trainer.model, start)
    for entry in trainer.state.log_history[:2]:
        assert entry["loss"] == 0 and entry["grad_norm"] == 0
        assert all(math.isfinite(value) for value in entry.values())
    assert trainer.state.log_history[0]["frac_reward_zero_std"] == 1


@pytest.mark.parametrize("logprobs", [False, True])
def test_an_empty_completion(make_trainer, tokenizer, tmp_path, logprobs):
    def with_empty(prompts, trainer):
        output = rollouts(prompts, trainer)
        output["completion_ids"][1] = []
        output["logprobs"] = [[-1.0] * len(ids) for ids in output["completion_ids"]] if logprobs else None
        return output

    trainer = make_trainer(rollout_func=with_empty)
    trainer.train()
    assert [entry["pear/empty_completions"] for entry in trainer.state.log_history[:2]] == [1, 1]
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    row = [row for _, row in read_jsonl(tmp_path / "run/samples/00000000.jsonl")][1]
    assert row["completion"] == "" and row["tokens"] == 1 and row["ended"]


def test_rollouts_are_drawn_as_asked_whatever_the_folder_recommends(make_trainer, tokenizer):
    trainer = make_trainer()
    given = [tokenizer("What is 2 plus 4?").input_ids] * GROUP, None, {}, GROUP
    torch.manual_seed(3)
    expected, _ = trainer._generate_single_turn(*given)
    own = trainer.model.generation_config
    own.num_beams, own.min_length, own.suppress_tokens = 3, 99, sorted({ids[0] for ids in expected})
    torch.manual_seed(3)
    assert trainer._generate_single_turn(*given)[0] == expected
    assert trainer.model.generation_config is own
    with torch.no_grad():
        trainer.model.get_output_embeddings().weight.fill_(float("nan"))
    with pytest.raises(DataError, match="logits are not finite"):
        trainer._generate_single_turn(*given)


def test_completions_cut_at_the_limit(make_trainer, tokenizer, tmp_path):
    rare = make_model(tokenizer)  # the end of the sequence has no chance
    with torch.no_grad():
        rare.lm_head.weight[tokenizer.eos_token_id] = 0
        rare.model.norm.weight.mul_(3)
    trainer = make_trainer(model=rare, mask_truncated_completions=True)
    start = copy.deepcopy(trainer.model)
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["completions/clipped_ratio"] == 1 and first["pear/tokens"] == 0 and first["loss"] == 0
    assert_same_weights(trainer.model, start)
    rows = [row for _, row in read_jsonl(tmp_path / "run/samples/00000000.jsonl")]
    assert {(row["tokens"], row["ended"]) for row in rows} == {(LIMIT, False)}


def test_samples_are_what_was_drawn(make_trainer, tokenizer, tmp_path):
    drawn = []

    def kept(prompts, trainer):
        drawn.append(rollouts(prompts, trainer))
        return drawn[-1]

    trainer = make_trainer(rollout_func=kept, steps_per_generation=2, max_steps=4, keep_samples=6)
    trainer.train()
    names = sorted(os.listdir(tmp_path / "run/samples"))
    assert names == ["00000000.jsonl", "00000002.jsonl"] and len(drawn) == 2
    for step, name, output in zip((0, 2), names, drawn, strict=True):
        rows = [row for _, row in read_jsonl(tmp_path / "run/samples" / name)]
        assert len(rows) == 6 and all(row["step"] == step and row["fault"] is None for row in rows)
        for row, prompt, ids in zip(rows, output["prompt_ids"], output["completion_ids"], strict=False):
            assert row["prompt"] == tokenizer.decode(prompt)
            assert row["completion"] == tokenizer.decode(ids, skip_special_tokens=True)
            assert row["tokens"] == len(ids) and row["rewards"] == {"by_ids": pytest.approx(sum(ids) % 7 / 7)}


def test_pass_at_k_of_the_rollouts(make_trainer):
    def one_of_the_first_group(prompts, **_):
        return [1.0] + [0.0] * (len(prompts) - 1)

    trainer = make_trainer(reward=one_of_the_first_group, per_device_train_batch_size=2 * GROUP, max_steps=1)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["pear/pass@1"] == 1 / (2 * GROUP) and logged[f"pear/pass@{GROUP}"] == 1 / 2


def test_a_reward_that_raises_does_not_end_a_run(make_trainer, tokenizer, tmp_path, caplog):
    def picky(prompts, completions, completion_ids, **_):
        if any(len(ids) == 4 for ids in completion_ids):  # the second rollout of the first generation
            raise ZeroDivisionError("four tokens")
        return by_ids(prompts, completions, completion_ids)

    def drawn(prompts, trainer):
        output = rollouts(prompts, trainer)
        lengths = [3, 4, 5, 6] if trainer._step == 0 else [3, 5, 6, 7]
        output["completion_ids"] = [([7 + i] * 8)[:n] for i, n in enumerate(lengths)]
        return output

    trainer = make_trainer(reward=picky, rollout_func=drawn)
    trainer.train()
    assert [entry["pear/reward_faults"] for entry in trainer.state.log_history[:2]] == [1, 0]
    bad = tokenizer.decode([8] * 4)
    assert "reward 'picky' raised ZeroDivisionError: four tokens. Prompt: 'What is" in caplog.text
    assert f"completion: {bad!r}. It scores 0." in caplog.text
    rows = [row for _, row in read_jsonl(tmp_path / "run/samples/00000000.jsonl")]
    assert [row["fault"] is not None for row in rows] == [False, True, False, False]
    assert [row["rewards"]["picky"] for row in rows] == pytest.approx([21 % 7 / 7, 0, 45 % 7 / 7, 60 % 7 / 7])
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_a_reward_that_always_raises_ends_the_run(make_trainer):
    def broken(prompts, **_):
        raise KeyError("solution")

    with pytest.raises(DataError, match="10 completions in a row could not be judged.*'broken' raised KeyError"):
        make_trainer(reward=broken, max_steps=4).train()


def test_tool_tokens_of_a_rollout_are_left_out(make_trainer):
    """`env_mask` of a rollout function: tokens of the environment count nowhere."""

    def with_tools(prompts, trainer):
        output = rollouts(prompts, trainer)
        return output | {"env_mask": [[1] + [0] * (len(ids) - 1) for ids in output["completion_ids"]]}

    trainer = make_trainer(rollout_func=with_tools)
    trainer.train()
    assert [entry["pear/tokens"] for entry in trainer.state.log_history[:2]] == [GROUP, GROUP]


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


RESUMED = dict(
    steps_per_generation=2, num_iterations=2, beta=0.1, max_steps=7, optim="adamw_torch", lr_scheduler_type="linear",
    save_strategy="steps", save_steps=1, logging_steps=2,
    data=prompts(3),  # two for each generation, and one is left over: an epoch is four steps
)  # fmt: skip


@pytest.fixture
def unbroken(make_trainer, tmp_path):
    trainer = make_trainer(output_dir=tmp_path / "whole", **RESUMED)
    trainer.train()
    return trainer


def test_resume_is_exact_at_every_step(make_trainer, unbroken, tmp_path):
    """In the middle of a generation as between two, in the middle of what a log line averages; samples stay single."""
    whole = tmp_path / "whole"
    samples = {path.name: path.read_text() for path in (whole / "samples").iterdir()}
    assert len(samples) == 2
    for step in range(1, 7):
        there = tmp_path / f"from-{step}"
        shutil.copytree(whole / f"checkpoint-{step}", there / f"checkpoint-{step}")
        resumed = make_trainer(output_dir=there, **RESUMED)
        torch.manual_seed(step)
        resumed.train(resume_from_checkpoint=resume_from(True, str(there)))
        assert_same_weights(resumed.model, unbroken.model)
        ours, theirs = (without_times(t.state.log_history) for t in (resumed, unbroken))
        assert [{k: v for k, v in e.items() if k != "train_loss"} for e in ours] == [
            {k: v for k, v in e.items() if k != "train_loss"} for e in theirs
        ]
        for path in (there / "samples").iterdir() if (there / "samples").is_dir() else ():
            assert path.read_text() == samples[path.name]
        shutil.rmtree(there)


def test_resume_with_gradient_accumulation(make_trainer, tmp_path):
    options = RESUMED | dict(gradient_accumulation_steps=2, steps_per_generation=4, max_steps=5, data=prompts(4))
    whole = make_trainer(output_dir=tmp_path / "a", **options)
    whole.train()
    shutil.copytree(tmp_path / "a/checkpoint-3", tmp_path / "b/checkpoint-3")
    resumed = make_trainer(output_dir=tmp_path / "b", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b/checkpoint-3"))
    assert_same_weights(resumed.model, whole.model)


@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
def test_a_half_written_checkpoint_is_passed_over(make_trainer, unbroken, tmp_path, damage):
    folder = tmp_path / "whole"
    state = folder / "checkpoint-7" / "trainer_state.json"
    if damage == "missing":
        state.unlink()
    else:
        os.truncate(state, 0 if damage == "empty" else state.stat().st_size // 2)
    assert resume_from("true", str(folder)) == str(folder / "checkpoint-6")
    with pytest.raises(DataError, match="checkpoint-7 is not a whole checkpoint"):
        resume_from(str(folder / "checkpoint-7"), str(folder))
    resumed = make_trainer(output_dir=folder, **RESUMED)
    resumed.train(resume_from_checkpoint=resume_from(True, str(folder)))
    assert_same_weights(resumed.model, unbroken.model)
    assert resume_from(True, str(folder)) == str(folder / "checkpoint-7")  # written anew


def test_no_checkpoint_to_go_on_from_is_said(tmp_path, caplog):
    assert resume_from(False, str(tmp_path)) is None and not caplog.messages
    assert resume_from("true", str(tmp_path)) is None
    assert caplog.messages == [f"{tmp_path} has no whole checkpoint to go on from: training starts at the beginning"]


def test_a_checkpoint_of_another_program_is_named(make_trainer, tmp_path):
    options = RESUMED | dict(max_steps=2)
    make_trainer(ours=False, output_dir=tmp_path / "trl", **options).train()
    with pytest.raises(DataError, match="checkpoint-2 has no rollouts-0.json"):
        make_trainer(output_dir=tmp_path / "run", **options | dict(max_steps=3)).train(
            resume_from_checkpoint=str(tmp_path / "trl/checkpoint-2")
        )


def no_space() -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("file", ["weights", "rollouts"])
def test_disk_full_in_a_checkpoint(make_trainer, unbroken, tmp_path, monkeypatch, file):
    """A sentence; the checkpoint before is whole and resumes to the same end; the broken one is gone."""
    trainer = make_trainer(**RESUMED)
    with monkeypatch.context() as patch:
        if file == "weights":
            original = type(trainer.model).save_pretrained

            def fails(self, folder, *args, **kwargs):
                original(self, folder, *args, **kwargs)
                if "checkpoint-4" in str(folder):
                    no_space()

            patch.setattr(type(trainer.model), "save_pretrained", fails)
        else:
            original_file = pear.rl.save_file

            def fails_there(tensors, path):
                original_file(tensors, path)
                if "checkpoint-4" in path:
                    no_space()

            patch.setattr(pear.rl, "save_file", fails_there)
        with pytest.raises(WriteError, match="checkpoint-4: the disk is full.*Earlier checkpoints are whole") as error:
            trainer.train()
    assert error.value.errno == errno.ENOSPC
    run = tmp_path / "run"
    assert sorted(p.name for p in run.glob("checkpoint-*")) == [f"checkpoint-{step}" for step in (1, 2, 3)]
    resumed = make_trainer(**RESUMED)
    resumed.train(resume_from_checkpoint=resume_from(True, str(run)))
    assert_same_weights(resumed.model, unbroken.model)


def test_disk_full_in_samples_is_a_sentence(make_trainer, monkeypatch):
    def fails(path, rows):
        from pear.io import write_error

        raise write_error(path, OSError(errno.ENOSPC, "No space left on device"))

    monkeypatch.setattr(pear.rl, "write_jsonl", fails)
    with pytest.raises(WriteError, match=r"could not write .*00000000\.jsonl: the disk is full"):
        make_trainer().train()


# ---------------------------------------------------------------------------------------------------------------------
# The command


COMMAND = """
import os, signal, sys, torch
torch.set_num_threads(1)
import pear.rl as rl
class Reward(rl.TaskReward):
    def __call__(self, prompts, completions, completion_ids, **columns):  # a model of noise is never right
        super().__call__(prompts, completions, **columns)
        return [sum(ids) % 7 / 7 for ids in completion_ids]
rl.TaskReward = Reward
if os.environ.get("KILL_IN"):
    name, count = os.environ["KILL_IN"].split(":")
    original, seen = getattr(rl.PEARGRPOTrainer, name), []
    def killed(*args, **kwargs):
        seen.append(1)
        if len(seen) == int(count):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    setattr(rl.PEARGRPOTrainer, name, killed)
from pear.cli import app
app()
"""


def argv(model, out, *more) -> list[str]:
    flags = (
        f"rl --model {model} --task chain_sum --problems 8 --output_dir {out} --max_steps 2 --report_to none "
        f"--logging_steps 1 --per_device_train_batch_size {GROUP} --num_generations {GROUP} --dtype float32 "
        f"--max_completion_length {LIMIT} --disable_tqdm true --save_strategy no --dataloader_pin_memory false "
        "--gradient_checkpointing false"
    )
    return [*flags.split(), *more]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_runs_end_as_the_unbroken_one(policy, tmp_path):
    """SIGKILL in a step and in the middle of a checkpoint, and the same command again until it is through."""
    more = (
        "--max_steps 6 --problems 3 --save_strategy steps --save_steps 1 --steps_per_generation 2 --num_iterations 2 "
        "--learning_rate 1e-2 --resume_from_checkpoint true"
    ).split()

    def run(out: Path, kill: str = "") -> int:
        env = os.environ | {"KILL_IN": kill, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        line = [sys.executable, "-c", COMMAND, *argv(policy, out, *more)]
        done = subprocess.run(line, capture_output=True, env=env, timeout=240)
        assert done.returncode == (-9 if kill else 0), done.stderr.decode()[-3000:]
        return len(list(out.glob("checkpoint-*")))

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(whole)
    rng = random.Random(0)
    kills = [f"training_step:{rng.randint(2, 3)}", "_save_rng_state:2", f"_compute_loss:{rng.randint(1, 2)}"]
    found = [run(broken, kill) for kill in kills]
    assert found == sorted(found) and 1 <= found[0] and found[-1] < 6
    run(broken)
    assert (broken / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert (broken / "model.safetensors").read_bytes() != (Path(policy) / "model.safetensors").read_bytes()
    logs = [without_times(read_run(folder).log) for folder in (broken, whole)]
    for log in logs:
        del log[-1]["train_loss"]  # of the steps of the last call alone
    assert logs[0] == logs[1] and len(logs[0]) == 7
    kept = [{path.name: path.read_text() for path in (folder / "samples").iterdir()} for folder in (broken, whole)]
    assert kept[0] == kept[1] and len(kept[0]) == 2


def test_command_line_leaves_a_model_and_its_record(policy, tmp_path, tokenizer):
    """With pass@k before and after; a rerun from its checkpoint does not evaluate `before` again."""
    out = tmp_path / "out"
    more = "--eval_problems 2 --eval_samples 4 --k 2 --save_strategy steps --save_steps 1".split()
    run = CliRunner().invoke(app, argv(policy, out, *more))
    assert run.exit_code == 0, run.output
    assert type(AutoModelForCausalLM.from_pretrained(out)) is type(make_model(tokenizer))
    found = set(os.listdir(out))
    assert {"config.json", "model.safetensors", "tokenizer.json", "run.json", "curves.png", "samples", "eval"} <= found
    record = read_run(out)
    assert record.kind == "rl" and record.settings["start"] == policy and record.settings["num_generations"] == GROUP
    assert record.before["k"] == 2 and len(record.after["problems"]) == 2 and record.before["split"] == "test"
    assert sum("loss" in entry for entry in record.log) == 2
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    text = json.loads((out / "run.json").read_text())
    assert text["versions"]["trl"]
    rates = [f"pass@{k} {100 * record.before[f'pass@{k}']:.1f} %" for k in (1, 2)]
    for words in ("2 steps: reward", *rates, f"model: {out}", f"next: pear eval --model {out}"):
        assert words in run.output
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert lines == text["log"]

    before = (out / "eval" / "before.json").stat().st_mtime_ns
    run = CliRunner().invoke(app, argv(policy, out, *more, "--resume_from_checkpoint", "true", "--max_steps", "3"))
    assert run.exit_code == 0, run.output
    assert (out / "eval" / "before.json").stat().st_mtime_ns == before
    assert [entry["step"] for entry in read_run(out).log if "loss" in entry] == [1, 2, 3]
    assert f"Going on from {out}/checkpoint-2: step 2 of 3" in run.output
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in lines if "loss" in entry] == [1, 2, 3]


LORA_HEAD = ["--use_peft", "--lora_target_modules", "lm_head"]


@pytest.mark.parametrize(
    "line, message",
    [
        (["--task", "countdown"], "no model given: pass --model"),
        (["--model", "M"], "give either --task, .*or --data"),
        (["--model", "M", "--task", "countdown", "--data", "x.jsonl", "--reward", "math"], "give either --task"),
        (["--model", "M", "--task", "sudoku"], "unknown task 'sudoku'; the tasks are"),
        (["--model", "M", "--task", "countdown", "--problems", "0"], "size must be at least 1, got 0"),
        (
            ["--model", "M", "--task", "countdown", "--eval_problems", "2", "--k", "9", "--eval_samples", "4"],
            "k must lie between 1 and eval_samples = 4, got 9",
        ),
        (["--model", "M", "--data", "D", "--reward", "math"], r"rows\.jsonl:1: no `solution`.*'answer', 'prompt'"),
        (["--model", "M", "--data", "none.jsonl", "--reward", "math"], "none.jsonl: no such file"),
        (["--model", "M", "--data", "D"], "--data needs --reward: math"),
        (["--model", "M", "--task", "countdown", "--reward", "math"], "--reward math goes with --data"),
        (["--model", "M", "--data", "D", "--reward", "math", "--eval_problems", "3"], "--eval_problems draws"),
        (["--model", "./none", "--task", "countdown"], "model './none': no such folder"),
        (["--model", "M", "--task", "countdown", "--gama", "1"], "--gama"),
        (["--model", "M", "--data", "E", "--reward", "math", *LORA_HEAD], "adapter to `lm_head` is not supported"),
        (["--model", "M", "--task", "countdown", "--keep_samples", "-1"], "keep_samples must be 0 or more, got -1"),
        (
            ["--model", "M", "--task", "countdown", "--gradient_tolerance", "1.5"],
            "gradient_tolerance must be a number from 0 to below 1, got 1.5",
        ),
        (
            ["--model", "M", "--data", "E", "--reward", "math", "--gradient_tolerance", "0.1", "--entropy_coef", "0.1"],
            "gradient_tolerance = 0.1 does not go with an entropy bonus: TRL's own formula",
        ),
        (["--model", "M", "--task", "countdown", "--trust_remote_code", "true"], "code of a model's is never run"),
        (["--model", "M", "--task", "countdown", "--resume_from_checkpoint", "gone"], "gone is not a whole checkpoint"),
    ],
)
def test_command_line_says_what_is_wrong(policy, jsonl, tmp_path, line, message):
    data = jsonl([{"prompt": "What is 3 plus 4?", "answer": "7"}], "rows.jsonl")
    whole = jsonl([{"prompt": "What is 3 plus 4?", "solution": "7"}] * 8, "whole.jsonl")
    line = [{"M": policy, "D": str(data), "E": str(whole)}.get(word, word) for word in line]
    out = tmp_path / "out"
    run = CliRunner().invoke(app, ["rl", *line, "--output_dir", str(out), "--report_to", "none", "--max_steps", "1"])
    assert run.exit_code == 1, run.output
    told = run.stderr.rstrip().split("\n")[-1]  # after the progress bars of what was loaded
    assert told.startswith("error: ") and "Traceback" not in run.stderr
    assert re.search(message, told), told
    assert not (out / "model.safetensors").exists()


def test_numbers_as_solutions(jsonl):
    """0 is a solution; and they are text to the reward, whatever they were in the file."""
    data = data_dataset(
        str(jsonl([{"prompt": "1 - 1?", "solution": 0}, {"prompt": "a?", "solution": "b"}])), "solution"
    )
    assert data["solution"][:] == ["0", "b"]


def test_prompts_of_two_kinds(jsonl, caplog):
    chat = [{"role": "user", "content": "1 + 1?"}]
    rows = [{"prompt": chat, "solution": 2, "tools": tools} for tools in (None, [{"type": "function"}])]
    assert len(data_dataset(str(jsonl(rows)), "solution")) == 2
    assert "`tools` and `chat_template_kwargs` of rows are not used (line 2)" in caplog.text
    data = jsonl([{"prompt": "1 - 1?", "solution": 0}, {"prompt": chat, "solution": 2}])
    with pytest.raises(DataError, match=r"data\.jsonl:2: `prompt` must be text in all rows, or a list of messages"):
        data_dataset(str(data), "solution")
    assert data_dataset(str(jsonl([{"prompt": chat, "solution": 2}])), "solution")["prompt"][0] == chat


@pytest.mark.parametrize("prompt", [7, {"role": "user"}, ["a"], [{"role": 1}], [{"content": "a"}]])
def test_prompts_of_other_types(jsonl, prompt):
    with pytest.raises(DataError, match=r"data\.jsonl:1: `prompt(\[0\])?` must be (text or a list of|a message with)"):
        data_dataset(str(jsonl([{"prompt": prompt, "solution": 1}])), "solution")
    for answer in (["4"], {"a": 4}, True):  # math-verify would read none of them, and judge nothing
        with pytest.raises(DataError, match=r"data\.jsonl:1: `solution` must be text or a number, got"):
            data_dataset(str(jsonl([{"prompt": "2 + 2?", "solution": answer}])), "solution")


def test_prompts_are_never_cut(tokenizer, caplog):
    """256 positions, of prompts and completions; and text is told from chats."""
    config = make_model(tokenizer).config
    chat = [{"role": "user", "content": "What is 3 plus 4?"}]
    tokens = len(encode_prompt(tokenizer, chat))
    check_prompts([chat], tokenizer, config, 256 - tokens)
    assert not caplog.text
    check_prompts([chat, chat], tokenizer, config, 257 - tokens)
    assert (
        f"2 of 2 prompts with max_completion_length = {257 - tokens} are longer than the 256 positions" in caplog.text
    )
    with pytest.raises(DataError, match=r"prompt 2 of 2 has \d+ tokens, but the model has positions for 256"):
        check_prompts(["a", "word " * 400], tokenizer, config, 1)
    caplog.clear()
    check_prompts(["What is 3 plus 4?", "And 5?"], tokenizer, config, 1)
    assert "2 of 2 prompts are text, and the tokenizer has a chat template" in caplog.text


@pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="package math-verify is not installed")
def test_reward_math(policy, jsonl, tmp_path):
    data = jsonl([{"prompt": f"What is {n} plus 4?", "solution": n + 4} for n in range(4)])
    flags = argv(policy, tmp_path / "out", "--data", str(data), "--reward", "math")
    del flags[flags.index("--task") : flags.index("--output_dir")]  # --problems with it
    run = CliRunner().invoke(app, flags)
    assert run.exit_code == 0, run.output
    log = read_run(tmp_path / "out").log
    assert log[0]["rewards/math_reward/mean"] == 0 and log[0]["pear/reward_faults"] == 0


@pytest.mark.skipif(importlib.util.find_spec("math_verify") is not None, reason="package math-verify is installed")
def test_reward_math_without_its_package(policy, jsonl, tmp_path):
    data = jsonl([{"prompt": "What is 3 plus 4?", "solution": "7"}])
    line = ["rl", "--model", policy, "--data", str(data), "--reward", "math", "--output_dir", str(tmp_path / "out")]
    run = CliRunner().invoke(app, line)
    assert run.exit_code == 1 and "--reward math needs the package math-verify" in run.stderr
    assert not (tmp_path / "out").exists()


def test_too_few_prompts_for_a_generation(make_trainer):
    """TRL's sampler would leave them all out, and the run end at once."""
    with pytest.raises(DataError, match="3 prompts are too few: one generation takes 4, .*= 16 in groups of 4"):
        make_trainer(data=prompts(3), steps_per_generation=4)


def test_arguments_of_the_trainer(tokenizer, policy, tmp_path):
    with pytest.raises(TypeError, match="args must be a PEARGRPOConfig, got GRPOConfig"):
        PEARGRPOTrainer(policy, by_ids, GRPOConfig(str(tmp_path), bf16=False), train_dataset=prompts())
