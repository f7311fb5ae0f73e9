"""What the installed TRL's GRPOTrainer trains and logs, loss type by loss type, and what ours does otherwise.

The loss types and the names of what is logged are read from TRL's source: a new one fails a test here until it is
run, or has its reason in a table. `test_policy_against_trl.py` compares `linear_policy_loss` alone, `test_rl.py` the
loss and the gradients of one micro-batch.
"""

import copy
import inspect
import math
import re
from types import SimpleNamespace

import pytest
import torch
from peft import PromptTuningConfig
from rl_training import TIMES, make_grpo_trainer, prompts, reversed_or_seeded, rollouts
from trl.trainer.grpo_trainer import GRPOTrainer

from pear import rl_metrics
from pear.io import DataError
from pear.rl import PEARGRPOTrainer

RUNS = {
    "grpo": dict(loss_type="grpo", gradient_accumulation_steps=2, num_iterations=2, epsilon=0.002),
    "dapo": dict(loss_type="dapo", gradient_accumulation_steps=2, temperature=0.7, gradient_checkpointing=True),
    "bnpo": dict(loss_type="bnpo", steps_per_generation=2, num_iterations=2, beta=0.1, use_bias_correction_kl=False),
    "unbiased kl": dict(loss_type="dr_grpo", num_iterations=2, beta=0.1, epsilon=0.002, epsilon_high=0.001),
    "sequence": dict(importance_sampling_level="sequence", num_iterations=2, delta=1.5, epsilon=1e-4),
    "sequence dapo": dict(
        loss_type="dapo", importance_sampling_level="sequence", num_iterations=2, epsilon=1e-4, eval_strategy="steps"
    ),
    "cispo": dict(loss_type="cispo", epsilon_high=1.001, steps_per_generation=4, gradient_accumulation_steps=2),
    "truncated": dict(mask_truncated_completions=True, steps_per_generation=2, num_iterations=2),
    "sapo": dict(loss_type="sapo", num_iterations=2),
    "prompt tuning": dict(
        num_iterations=2, beta=0.1, peft_config=PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    ),
    # TRL's own formula on our log-probs
    "vespo": dict(loss_type="vespo", num_iterations=2),
    "luspo": dict(loss_type="luspo", importance_sampling_level="sequence", num_iterations=2),
    "entropy bonus that adapts": dict(use_adaptive_entropy=True, entropy_target=5.0),
}
MOVED = ("clip_ratio/low_mean", "clip_ratio/high_max", "cispo_clip_ratio")  # not 0 in some run, or nothing is compared
NOT_RUN = {  # names that TRL logs and no run here does, and why
    "aux_loss": "mixtures of experts: TRL's pass makes their auxiliary loss and logs it",
    "sampling/importance_sampling_ratio/max": "vLLM",
    "sampling/importance_sampling_ratio/mean": "vLLM",
    "sampling/importance_sampling_ratio/min": "vLLM",
    "sampling/sampling_logp_difference/max": "vLLM",
    "sampling/sampling_logp_difference/mean": "vLLM",
    "tools/call_frequency": "tools, a matter of rollouts, which are TRL's",
    "tools/failure_frequency": "tools, a matter of rollouts, which are TRL's",
}
DIFFERENCES = {  # what ours does otherwise, and why; each is tested below
    "names under pear/": "statistics of ours, beside TRL's",
    "reward raises": "TRL's run ends; ours scores that completion 0, counts it, and ends after ten in a row",
    "reward is NaN": "TRL leaves the completion out without a word; ours counts it as a fault that scores 0",
    "no token returned": "TRL's run ends with an IndexError; ours takes it for a completion that ended at once",
    "too few prompts": "TRL trains no step without a word; ours refuses",
}
logged: set[str] = set()


@pytest.fixture(scope="module")
def policy(save_model) -> str:
    return str(save_model(seed=0))


@pytest.mark.parametrize("name", RUNS)
def test_a_run_gives_the_weights_and_the_log_of_trl_s(policy, tokenizer, tmp_path, monkeypatch, name):
    trainers = []
    options = dict(max_steps=3, rollout_func=rollouts) | RUNS[name]
    if "eval_strategy" in options:
        options |= dict(eval_data=prompts(2), eval_steps=2, per_device_eval_batch_size=4)
    for ours in (True, False):
        torch.manual_seed(0)  # of new adapters
        trainer = make_grpo_trainer(policy, tokenizer, ours, output_dir=tmp_path / str(ours), **options)
        start = copy.deepcopy(trainer.model.state_dict())
        with monkeypatch.context() as patch:  # each shuffles a generation, by a seed of its own
            patch.setattr(torch, "randperm", reversed_or_seeded)
            trainer.train()
        trainers.append(trainer)
    ours, theirs = (trainer.model.state_dict() for trainer in trainers)
    for key in ours:
        moved = (theirs[key] - start[key]).norm()
        assert (ours[key] - theirs[key]).norm() <= 1e-4 * moved, key
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=5e-6)
    for a, b in zip(*(trainer.state.log_history for trainer in trainers), strict=True):
        assert all("pear/" in key for key in a.keys() - b.keys()), DIFFERENCES["names under pear/"]
        assert b.keys() <= a.keys()
        for key, value in b.items():
            if key.replace("eval_", "train_") not in TIMES:
                assert a[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key
        logged.update(key.removeprefix("eval_") for key in b)
        logged.update(f"{key} moved" for key in MOVED if b.get(key))
    logged.add(f"run {name}")


def test_the_runs_are_all_of_trl_s_loss_types_and_figures():
    source = inspect.getsource(GRPOTrainer)
    loss = inspect.getsource(GRPOTrainer._compute_loss)
    kinds = set(re.findall(r'loss_type == "(\w+)"', loss))
    for several in re.findall(r"loss_type in \[([^]]*)\]", loss):
        kinds |= set(re.findall(r"\w+", several))
    assert kinds == {"grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo"}
    assert kinds == {options.get("loss_type", "dapo") for options in RUNS.values()}
    names = {name for name in re.findall(r'_metrics\[mode\]\[f?"([^"]+)"\]', source)}
    assert len(names) > 25
    if not {f"run {name}" for name in RUNS} <= logged:
        pytest.skip("the runs above were not all in this process")
    of_rewards = {name for name in names if "{" in name}
    assert names - of_rewards - logged == NOT_RUN.keys()
    assert {f"rewards/by_ids/{what}" for what in ("mean", "std")} <= logged
    assert {f"{key} moved" for key in MOVED} <= logged


@pytest.mark.parametrize("loss_type", ["grpo", "cispo", "sapo"])
@pytest.mark.parametrize("of_sequences", [False, True])
def test_two_processes_count_as_one_with_the_rows_of_both(loss_type, of_sequences):
    rng = torch.Generator().manual_seed(0)
    lengths = torch.tensor([5, 2, 0, 3])
    mask = (torch.arange(5) < lengths[:, None]).long()
    logprobs, entropies = -torch.rand(4, 5, generator=rng), torch.rand(4, 5, generator=rng)
    inputs = {
        "advantages": torch.tensor([1.0, -1.0, 0.5, -0.5]),
        "old_per_token_logps": logprobs + 0.3 * torch.randn(4, 5, generator=rng),
        "ref_per_token_logps": logprobs + 0.3 * torch.randn(4, 5, generator=rng),
    }
    options = dict(
        loss_type=loss_type, of_sequences=of_sequences, beta=0.1, epsilon_low=0.1, epsilon_high=0.1, delta=None,
        unbiased_kl=False,
    )  # fmt: skip

    def row(rows):
        kept, some = mask[rows], {name: value[rows] for name, value in inputs.items()}
        entropy = (entropies[rows] * kept).sum() / kept.sum().clamp(min=1)
        return rl_metrics.micro_batch(logprobs[rows], entropy, kept, some, **options)

    names = rl_metrics.names(loss_type, 0.1)
    one = SimpleNamespace(gather=lambda rows: rows)
    expected = rl_metrics.read(row([0, 1, 2, 3])[None], *names, one)
    two = SimpleNamespace(gather=lambda rows: torch.cat([rows, row([2, 3])[None]]))
    found = rl_metrics.read(row([0, 1])[None], *names, two)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, abs=1e-6), name


def run(ours, policy, tokenizer, tmp_path, **options):
    trainer = make_grpo_trainer(policy, tokenizer, ours, output_dir=tmp_path / str(ours), max_steps=1, **options)
    trainer.train()
    return trainer.state.log_history[0]


def test_a_reward_that_raises(policy, tokenizer, tmp_path):
    def reward(prompts, completions, **_):
        if len(prompts) > 1 or len(completions[0]) % 2:
            raise ValueError("odd")
        return [1.0]

    with pytest.raises(ValueError, match="odd"):
        run(False, policy, tokenizer, tmp_path, reward=reward, rollout_func=rollouts)
    found = run(True, policy, tokenizer, tmp_path, reward=reward, rollout_func=rollouts)
    assert found["reward"] == 1 - found["pear/reward_faults"] / 4


def test_a_reward_that_is_nan(policy, tokenizer, tmp_path):
    def reward(prompts, completions, **_):
        return [1.0, math.nan, 1.0, 0.0]

    assert run(False, policy, tokenizer, tmp_path, reward=reward, rollout_func=rollouts)["reward"] == pytest.approx(
        2 / 3
    )
    found = run(True, policy, tokenizer, tmp_path, reward=reward, rollout_func=rollouts)
    assert (found["reward"], found["pear/reward_faults"]) == (0.5, 1)


def test_no_token_returned(policy, tokenizer, tmp_path):
    def nothing(prompts, trainer):
        found = rollouts(prompts, trainer)
        return found | {"completion_ids": [[], *found["completion_ids"][1:]]}

    with pytest.raises(IndexError):
        run(False, policy, tokenizer, tmp_path, rollout_func=nothing)
    assert run(True, policy, tokenizer, tmp_path, rollout_func=nothing)["pear/empty_completions"] == 1


def test_too_few_prompts(policy, tokenizer, tmp_path):
    few = dict(data=prompts(1), gradient_accumulation_steps=2)
    with pytest.raises(DataError, match="1 prompts are too few"):
        run(True, policy, tokenizer, tmp_path, **few)
    assert issubclass(PEARGRPOTrainer, GRPOTrainer)
