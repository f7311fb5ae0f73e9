"""TRL's GRPOTrainer with our pass under it: `pear.rl.PEARGRPOTrainer` is a subclass that takes the same arguments.

    python examples/trl_grpo.py

Needs `pip install -e '.[train]'`. Rollouts, rewards and advantages are TRL's own; the loss comes from
`linear_policy_loss` and all log-probs from `linear_logprobs`, inside the model's forward: training makes no logits.
At the end the second step, whose ratios are no longer 1, is compared with GRPO's formula on full logits, in float64.
"""

import sys
import tempfile

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, TrainerCallback

from pear.rl import PEARGRPOTrainer
from pear.rl_config import PEARGRPOConfig  # TRL's GRPOConfig, and `workspace_bytes` and `keep_samples`
from pear.word_tokenizer import word_tokenizer

STEPS, LENGTH, CLIP = 24, 10, 0.2

torch.manual_seed(0)
torch.set_num_threads(1)  # products this small are slower on several
tokenizer = word_tokenizer([str(digit) for digit in range(10)], r"\d")  # a token a digit
config = LlamaConfig(
    vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64, initializer_range=0.1, pad_token_id=tokenizer.pad_token_id,
    eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
)  # fmt: skip
model = LlamaForCausalLM(config)
prompts = Dataset.from_list([{"prompt": f"{n} {n + 1} {n + 2}"} for n in range(8)])


def even(completions: list[str], **_) -> list[float]:
    """The reward: how many of a completion's words are even digits, of as many as there may be."""
    return [sum(word in "02468" for word in completion.split()) / LENGTH for completion in completions]


class Kept(PEARGRPOTrainer):
    """Weights, batch and loss of the second step, for the comparison below alone."""

    def compute_loss(self, model, inputs, **kwargs):
        loss = super().compute_loss(model, inputs, **kwargs)
        if self.state.global_step == 1:
            self.kept = {name: x.double() for name, x in model.state_dict().items()}, inputs, loss.detach()
        return loss


class SecondStep(TrainerCallback):
    gradients: list[torch.Tensor] | None = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            self.gradients = [p.grad.clone() for p in model.parameters()]


second = SecondStep()
with tempfile.TemporaryDirectory() as folder:
    trainer = Kept(
        model,
        even,
        PEARGRPOConfig(
            folder, loss_type="grpo", epsilon=CLIP, num_generations=8, per_device_train_batch_size=32,
            num_iterations=2, max_completion_length=LENGTH, learning_rate=1e-2, max_grad_norm=0.0, max_steps=STEPS,
            logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, keep_samples=0,
        ),
        train_dataset=prompts,
        processing_class=tokenizer,
        callbacks=[second],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()

# GRPO as TRL writes it (loss_type "grpo"): the mean over completions of their tokens' means.
weights, batch, loss = trainer.kept
model64 = LlamaForCausalLM(config).double()
model64.load_state_dict(weights)
completion, mask = batch["completion_ids"], batch["completion_mask"]  # (B, C)
logits = model64(
    input_ids=torch.cat([batch["prompt_ids"], completion], dim=1),
    attention_mask=torch.cat([batch["prompt_mask"], mask], dim=1),
).logits[:, -completion.shape[1] - 1 : -1]
log_p = logits.log_softmax(-1).gather(-1, completion[..., None])[..., 0]
ratio = (log_p - batch["old_per_token_logps"]).exp()
advantage = batch["advantages"][:, None]
token_loss = -torch.min(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
naive_loss = ((token_loss * mask).sum(1) / mask.sum(1)).mean()
wanted = torch.autograd.grad(naive_loss, list(model64.parameters()))


def check(what: str, got: list[torch.Tensor], wanted: list[torch.Tensor], tolerance: float = 1e-4) -> None:
    got, wanted = (torch.cat([x.detach().flatten() for x in tensors]) for tensors in (got, wanted))
    difference = ((got - wanted).norm() / wanted.norm()).item()
    print(f"{what}: relative difference {difference:.1e}")
    if not difference <= tolerance:
        sys.exit(f"{what} differ by {difference:.1e}, more than {tolerance:.0e}")


check("loss, ours and naive", [loss], [naive_loss])
check("gradients, ours and naive", second.gradients, wanted)
rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
print(f"reward: {rewards[0]:.3f} at first, {rewards[-1]:.3f} at last")
if not rewards[-1] > rewards[0] + 0.1:
    sys.exit("training did not raise the reward")
