"""linear_policy_loss against the loss of TRL's GRPOTrainer itself, run on materialised logits."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from trl.trainer.grpo_trainer import GRPOTrainer

from pear_kernels import linear_policy_loss

B, T, D, V = 4, 9, 16, 53
LENGTHS = torch.tensor([9, 4, 1, 7])
LOW, HIGH, BETA, CAP = 0.15, 0.25, 0.3, 1.1
TEMPERATURE = 0.9
MAX_LENGTH = 20
SAPO = (0.8, 1.3)


class Trainer:
    """What GRPOTrainer._compute_loss reads of its trainer; a model is a pair of hidden states and a head."""

    def __init__(self, **options):
        self.loss_type = "grpo"
        self.importance_sampling_level = "token"
        self.beta = 0.0
        self.epsilon_low, self.epsilon_high = LOW, HIGH
        self.max_completion_length = MAX_LENGTH
        self.use_vllm = False
        self.vllm_importance_sampling_correction = True
        self.entropy_coef = 0.0
        delta, unbiased_kl = options.pop("delta", None), options.pop("unbiased_kl", False)
        for name, value in options.items():
            assert hasattr(self, name)
            setattr(self, name, value)
        self.args = SimpleNamespace(
            delta=delta, use_bias_correction_kl=unbiased_kl, sapo_temperature_pos=SAPO[0], sapo_temperature_neg=SAPO[1],
            steps_per_generation=1,
        )  # fmt: skip
        self.accelerator = SimpleNamespace(
            num_processes=1, sync_gradients=True, gather=lambda x: x, reduce=lambda x, reduction: x
        )
        self.model = SimpleNamespace(training=True)
        self.current_gradient_accumulation_steps = 1
        self.aux_loss_enabled = self.use_adaptive_entropy = False
        self._entropy_bonus_enabled = self.entropy_coef != 0
        self.top_entropy_quantile = 1.0
        self.off_policy_mask_threshold = None
        self._metrics = {"train": defaultdict(list)}

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, **_):
        hidden, weight = model
        logprobs = torch.log_softmax(hidden @ weight.T / TEMPERATURE, -1)
        ids = input_ids[:, -logits_to_keep:]
        return logprobs.gather(-1, ids[..., None])[..., 0], -(logprobs.exp() * logprobs).sum(-1), None

    def loss(self, hidden, weight, inputs):
        return GRPOTrainer._compute_loss(self, (hidden, weight), inputs)

    def metric(self, name):
        (value,) = self._metrics["train"][name]
        return value


CASES = {  # TRL's options, ours
    "grpo": ({}, {}),
    "ppo": ({}, dict(objective="ppo")),  # one policy term, and the mean of GRPO
    "bnpo": (dict(loss_type="bnpo"), dict(objective="bnpo")),
    "dr_grpo": (dict(loss_type="dr_grpo"), dict(objective="dr_grpo", max_length=MAX_LENGTH)),
    "dapo": (dict(loss_type="dapo"), dict(objective="dapo")),
    # TRL's epsilon_high is here the cap itself
    "cispo": (dict(loss_type="cispo", epsilon_high=1 + HIGH), dict(objective="cispo")),
    # TRL takes the mean of a sequence first
    "sapo": (dict(loss_type="sapo"), dict(objective="sapo", reduction="sequence_mean")),
    "gspo": (dict(importance_sampling_level="sequence"), dict(objective="gspo")),
    "delta": (dict(delta=1.3), dict(dual_clip=1.3)),
    "delta in gspo": (dict(importance_sampling_level="sequence", delta=1.3), dict(objective="gspo", dual_clip=1.3)),
    "unbiased KL": (dict(unbiased_kl=True), dict(unbiased_kl=True)),
    "entropy bonus": (dict(loss_type="bnpo", entropy_coef=0.2), dict(objective="bnpo", entropy_coef=0.2)),
}


@pytest.fixture(scope="module")
def batch():
    rng = torch.Generator().manual_seed(0)

    def near(logprobs, noise):
        return (logprobs + noise * torch.randn(B, T, generator=rng)).clamp(max=0)

    hidden, weight = torch.randn(B, T, D, generator=rng), 0.5 * torch.randn(V, D, generator=rng)
    ids = torch.randint(V, (B, T), generator=rng)
    logprobs = torch.log_softmax(hidden @ weight.T / TEMPERATURE, -1).gather(-1, ids[..., None])[..., 0]
    old = near(logprobs, 0.4)
    return SimpleNamespace(
        hidden=hidden, weight=weight, ids=ids, mask=torch.arange(T) < LENGTHS[:, None], old=old,
        ref=near(logprobs, 0.5), sampler=near(old, 0.2), advantages=torch.tensor([1.2, -0.8, 0.5, -1.7]),
        by_token=torch.randn(B, T, generator=rng),
    )  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("beta", [0.0, BETA])
@pytest.mark.parametrize("old, sampled", [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("by_token", [False, True])
def test_loss_and_gradients(batch, case, beta, old, sampled, by_token):
    theirs, ours = CASES[case]
    advantages = batch.by_token if by_token else batch.advantages
    inputs = dict(
        prompt_ids=torch.zeros(B, 2).long(), prompt_mask=torch.ones(B, 2).long(), completion_ids=batch.ids,
        completion_mask=batch.mask.long(), advantages=advantages, num_items_in_batch=batch.mask.sum(),
        ref_per_token_logps=batch.ref, importance_sampling_ratio=(batch.old - batch.sampler).exp().clamp(max=CAP),
    )  # fmt: skip
    if old:
        inputs["old_per_token_logps"] = batch.old
    trainer = Trainer(beta=beta, use_vllm=sampled, **theirs)
    leaves = [x.clone().requires_grad_() for x in (batch.hidden, batch.weight)]
    loss = trainer.loss(*leaves, inputs)
    expected = torch.autograd.grad(3.7 * loss, leaves)

    leaves = [x.clone().requires_grad_() for x in (batch.hidden, batch.weight)]
    out = linear_policy_loss(
        *leaves, batch.ids.where(batch.mask, -100), batch.old if old else None, advantages, ref_logprobs=batch.ref,
        beta=beta, sampler_logprobs=batch.sampler if sampled else None, sampler_clip=CAP, temperature=TEMPERATURE,
        clip_low=LOW, clip_high=HIGH, sapo_temperatures=SAPO, workspace_bytes=6 * V * 4, **ours,
    )  # fmt: skip
    assert out.loss.item() == pytest.approx(loss.item(), rel=1e-5, abs=1e-5)
    for gradient, exact in zip(torch.autograd.grad(3.7 * out.loss, leaves), expected, strict=True):
        assert (gradient - exact).norm() < 1e-5 * exact.norm()

    assert out.stats["entropy"].item() == pytest.approx(trainer.metric("entropy"), rel=1e-5)
    if beta and not ours.get("unbiased_kl"):  # of which TRL's statistic is the term with its ratio
        assert out.stats["kl_ref"].item() == pytest.approx(trainer.metric("kl"), rel=1e-5)
    if trainer.loss_type not in ("cispo", "sapo") and trainer.importance_sampling_level == "token":
        for ours_name, name in (("clip_low", "low"), ("clip_high", "high")):
            share = trainer.metric(f"clip_ratio/{name}_mean")
            assert out.stats[ours_name].item() == pytest.approx(share, rel=1e-5)
            assert bool(share) == old
