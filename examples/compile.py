"""torch.compile with fullgraph=True: model and loss are one graph, in which the loss is one operation.

    python examples/compile.py

Needs torch alone, and a C++ compiler for torch's inductor; without one the graph is made and run, but not compiled. At
the end loss and gradients are compared with the same function uncompiled, and with the naive loss on full logits.
"""

import copy
import shutil
import sys

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from pear_kernels import linear_logprobs, linear_pear_loss
from pear_kernels.reference import naive_pear_loss

VOCABULARY, WIDTH, HEADS, LENGTH, PROMPT, ROWS, STEPS = 512, 64, 4, 24, 6, 8, 15


class Student(nn.Module):
    """One layer of attention under a linear head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids (B, T) to hidden states (B, T, D)."""
        x = self.embed(ids)
        q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=-1))
        attended = scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.norm(x + self.out(attended.transpose(1, 2).flatten(2)))

    def forward(self, ids: torch.Tensor, target: torch.Tensor, behavior_logprobs: torch.Tensor):
        out = linear_pear_loss(self.hidden(ids), self.head.weight, target, behavior_logprobs)
        return out.loss, out.logprobs


torch.manual_seed(0)
torch.set_num_threads(1)  # products this small are slower on several
model = Student()
model.head.weight.data.mul_(4)  # distributions that are not flat
behavior = copy.deepcopy(model).requires_grad_(False)  # the policy that writes the data: somewhat other weights
for parameter in behavior.parameters():
    parameter.add_(0.05 * torch.randn_like(parameter))
ids = torch.randint(VOCABULARY, (ROWS, PROMPT))  # (B, P), growing to (B, T)
while ids.shape[1] < LENGTH:
    logits = behavior.head(behavior.hidden(ids)[:, -1])
    ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1)], dim=1)
target = ids.roll(-1, dims=1)  # what hidden[t] predicts is the token at t + 1
target[:, : PROMPT - 1] = target[:, -1] = -100
behavior_logprobs = linear_logprobs(behavior.hidden(ids), behavior.head.weight, target)

# fullgraph: an error where the graph would break. The loss does not break it, as it is a custom operation whose shapes
# and gradients torch.compile knows; nor does its check of values, which is part of that operation.
backend = "inductor" if shutil.which("g++") or shutil.which("clang++") else "aot_eager"
compiled = torch.compile(model, fullgraph=True, backend=backend)
parameters = list(model.parameters())


# What loss and gradients should be: those of the same model uncompiled, and the paper's formula on full logits, in
# float64. The latter takes a pack, not a batch.
eager_loss, _ = model(ids, target, behavior_logprobs)
eager = torch.autograd.grad(eager_loss, parameters)
model64 = copy.deepcopy(model).double()
naive_loss, _, _ = naive_pear_loss(
    model64.hidden(ids).flatten(0, 1),
    model64.head.weight,
    target.flatten(),
    behavior_logprobs.flatten(),
    cu_seqlens=torch.arange(0, ROWS * LENGTH + 1, LENGTH),
)
naive = torch.autograd.grad(naive_loss, list(model64.parameters()))

optimizer = torch.optim.AdamW(parameters, lr=3e-3)
tokens = (target != -100).sum().item()
history = []
for at in range(STEPS):
    optimizer.zero_grad()
    loss, logprobs = compiled(ids, target, behavior_logprobs)
    loss.backward()
    if at == 0:
        first_loss, first = loss.detach(), [p.grad.clone() for p in parameters]
    history.append(-logprobs.sum().item() / tokens)  # unweighted: PEAR's own loss may rise, as its weights do
    optimizer.step()


def check(what: str, got: list[torch.Tensor], wanted: list[torch.Tensor], tolerance: float = 1e-5) -> None:
    got, wanted = (torch.cat([x.detach().flatten() for x in tensors]) for tensors in (got, wanted))
    difference = ((got - wanted).norm() / wanted.norm()).item()
    print(f"{what}: relative difference {difference:.1e}")
    if not difference <= tolerance:
        sys.exit(f"{what} differ by {difference:.1e}, more than {tolerance:.0e}")


print(f"compiled by {backend}, in one graph")
check("loss, compiled and eager", [first_loss], [eager_loss])
check("gradients, compiled and eager", first, eager)
check("loss, compiled and naive", [first_loss], [naive_loss])
check("gradients, compiled and naive", first, naive)
print(f"nll: {history[0]:.3f} at first, {history[-1]:.3f} at last")
if not history[-1] < 0.9 * history[0]:
    sys.exit("training did not lower the nll")
