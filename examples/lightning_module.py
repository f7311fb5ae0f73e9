"""PEAR in Lightning: `LinearPEARLoss` is an nn.Module without parameters, set up once and called in training_step.

    python examples/lightning_module.py

Needs torch and lightning. At the end the first step's gradients are compared with those of the naive loss, on full
logits.
"""

import copy
import sys

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pear_kernels import LinearPEARLoss, linear_logprobs
from pear_kernels.reference import naive_pear_loss

VOCABULARY, WIDTH, LENGTH, PROMPT, ROWS, BATCH, EPOCHS = 512, 64, 24, 6, 32, 16, 6


class Student(LightningModule):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.trunk = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.loss = LinearPEARLoss(level="token", gamma=0.999)
        self.nll: list[float] = []  # of each step
        self.first: list[torch.Tensor] | None = None  # gradients

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Hidden states (B, T, D) of ids (B, T): what stands before the LM head, which is never called."""
        return self.trunk(self.embed(ids))[0]

    def training_step(self, batch: list[torch.Tensor], _) -> torch.Tensor:
        ids, target, behavior_logprobs = batch
        # Lightning divides by accumulate_grad_batches, if there is one. Micro-batches of unequal numbers of tokens then
        # need `denominator`: the mean number of tokens of a micro-batch, instead of each one's own.
        out = self.loss(self(ids), self.head.weight, target, behavior_logprobs, bias=self.head.bias)
        nll = -out.logprobs.sum() / (target != -100).sum()
        self.nll.append(nll.item())
        self.log_dict({"loss": out.loss.detach(), "nll": nll, "weight_mean": out.stats["weight_mean"]})
        return out.loss

    def on_before_optimizer_step(self, optimizer) -> None:
        if self.first is None:
            self.first = [p.grad.clone() for p in self.parameters()]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


seed_everything(0, verbose=False)
torch.set_num_threads(1)  # products this small are slower on several
student = Student()
student.head.weight.data.mul_(8)  # distributions that are not flat

# The policy that writes the data: the student with somewhat other weights. Its log-probs are made before training.
behavior = copy.deepcopy(student).requires_grad_(False)
for parameter in behavior.parameters():
    parameter.add_(0.05 * torch.randn_like(parameter))
ids = torch.randint(VOCABULARY, (ROWS, PROMPT))  # (B, P), growing to (B, T)
while ids.shape[1] < LENGTH:
    logits = behavior.head(behavior(ids)[:, -1])
    ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1)], dim=1)
target = ids.roll(-1, dims=1)  # what hidden[t] predicts is the token at t + 1
target[:, : PROMPT - 1] = target[:, -1] = -100  # tokens of the prompt are no targets, and nothing follows the last
behavior_logprobs = linear_logprobs(behavior(ids), behavior.head.weight, target, bias=behavior.head.bias)

# What the first step's gradients should be: the paper's formula on full logits, in float64. It takes a pack, no batch.
student64 = copy.deepcopy(student).double()
naive_loss, _, _ = naive_pear_loss(
    student64(ids[:BATCH]).flatten(0, 1),
    student64.head.weight,
    target[:BATCH].flatten(),
    behavior_logprobs[:BATCH].flatten(),
    bias=student64.head.bias,
    cu_seqlens=torch.arange(0, BATCH * LENGTH + 1, LENGTH),
)
wanted = torch.autograd.grad(naive_loss, list(student64.parameters()))

trainer = Trainer(
    accelerator="cpu",
    devices=1,
    max_epochs=EPOCHS,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(student, DataLoader(TensorDataset(ids, target, behavior_logprobs), batch_size=BATCH))

first, wanted = (torch.cat([x.flatten() for x in tensors]) for tensors in (student.first, wanted))
difference = ((first - wanted).norm() / wanted.norm()).item()
print(f"gradients, ours and naive: relative difference {difference:.1e}")
if not difference <= 1e-5:
    sys.exit(f"gradients differ by {difference:.1e}, more than 1e-5")
print(f"nll: {student.nll[0]:.3f} at first, {student.nll[-1]:.3f} at last")
if not student.nll[-1] < 0.9 * student.nll[0]:
    sys.exit("training did not lower the nll")
