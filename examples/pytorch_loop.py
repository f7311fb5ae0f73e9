"""PEAR in a plain PyTorch loop: any module that gives hidden states, and the weight of its LM head.

    python examples/pytorch_loop.py

Needs torch alone. Hidden states and the head's weight go to `linear_pear_loss`, so that the logits of a batch are never
made. At the end the first step's gradients are compared with those of the naive loss, on full logits.
"""

import copy
import sys

import torch
from torch import nn

from pear_kernels import linear_logprobs, linear_pear_loss
from pear_kernels.reference import naive_pear_loss

VOCABULARY, WIDTH, LENGTH, PROMPT, ROWS, MICRO, STEPS = 512, 64, 24, 6, 16, 4, 20


class Decoder(nn.Module):
    """Token ids (B, T) to hidden states (B, T, D): what stands before the LM head."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        return self.layers(self.tokens(ids) + self.positions.weight[: ids.shape[1]], mask=causal, is_causal=True)


torch.manual_seed(0)
torch.set_num_threads(1)  # products this small are slower on several
model = Decoder()

# The policy that writes the data: here the model with somewhat other weights. Sequences end at different lengths.
model.head.weight.data.mul_(4)  # distributions that are not flat
behavior = copy.deepcopy(model).requires_grad_(False)
for parameter in behavior.parameters():
    parameter.add_(0.05 * torch.randn_like(parameter))
ids = torch.randint(VOCABULARY, (ROWS, PROMPT))  # (B, P), growing to (B, T)
while ids.shape[1] < LENGTH:
    logits = behavior.head(behavior(ids)[:, -1])
    ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1)], dim=1)
lengths = torch.randint(PROMPT + 4, LENGTH + 1, (ROWS, 1))

# What hidden[t] predicts is the token at t + 1. Prompt and padding are no targets: -100.
target = ids.roll(-1, dims=1)
place = torch.arange(1, LENGTH + 1)  # of the token that is predicted
target[(place < PROMPT) | (place >= lengths)] = -100

# Its log-probs are made once, before training: one product, nothing kept.
behavior_logprobs = linear_logprobs(behavior(ids), behavior.head.weight, target)  # (B, T), 0 where target is -100

# What the first step's gradients should be: the paper's formula on full logits, in float64. It takes a pack, no batch.
model64 = copy.deepcopy(model).double()
naive_loss, _, _ = naive_pear_loss(
    model64(ids).flatten(0, 1),
    model64.head.weight,
    target.flatten(),
    behavior_logprobs.flatten(),
    cu_seqlens=torch.arange(0, ROWS * LENGTH + 1, LENGTH),
)
naive_gradients = torch.autograd.grad(naive_loss, list(model64.parameters()))

optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
tokens = (target != -100).sum()
for at in range(STEPS):
    optimizer.zero_grad()
    loss = nll = 0.0
    # Gradient accumulation: with all micro-batches' tokens as denominator, the sum is the loss of the whole batch,
    # however unequal they are. (A mean of means would not be.)
    for rows in torch.arange(ROWS).split(MICRO):
        out = linear_pear_loss(
            model(ids[rows]), model.head.weight, target[rows], behavior_logprobs[rows], denominator=tokens
        )
        out.loss.backward()
        loss += out.loss.item()
        nll -= out.logprobs.sum().item() / tokens.item()  # unweighted: PEAR's own loss may rise, as its weights do
    if at == 0:
        first_loss, first_nll, gradients = loss, nll, [p.grad.clone() for p in model.parameters()]
    if at % 5 == 0 or at == STEPS - 1:
        print(f"step {at:2d}  loss {loss:.4f}  nll {nll:.4f}  mean weight {out.stats['weight_mean'].item():.3f}")
    optimizer.step()


def check(what: str, got: list[torch.Tensor], wanted: list[torch.Tensor], tolerance: float = 1e-5) -> None:
    got, wanted = (torch.cat([x.detach().flatten() for x in tensors]) for tensors in (got, wanted))
    difference = ((got - wanted).norm() / wanted.norm()).item()
    print(f"{what}: relative difference {difference:.1e}")
    if not difference <= tolerance:
        sys.exit(f"{what} differ by {difference:.1e}, more than {tolerance:.0e}")


check("loss, ours and naive", [torch.tensor(first_loss)], [naive_loss])
check("gradients, ours and naive", gradients, naive_gradients)
print(f"nll: {first_nll:.3f} at first, {nll:.3f} at last")
if not nll < 0.9 * first_nll:
    sys.exit("training did not lower the nll")
