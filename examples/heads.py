"""Heads that do more than multiply: soft-capped (Gemma 2), scaled (Cohere, Granite), with a bias (Phi), tied (Qwen).

    python examples/heads.py

Needs torch and transformers. For each, the loss by hand, with the arguments that repeat what the model's own forward
does to its logits, and by `patch_causal_lm`, which measures that by itself. Both are compared with the model's own loss
and gradients in float64, and PEAR's by the patch with PEAR's by hand.
"""

import copy
import sys

import torch
from torch.nn.functional import pad
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from pear_kernels import linear_pear_loss, linear_weighted_loss, patch_causal_lm

torch.manual_seed(0)
torch.set_num_threads(1)  # products this small are slower on several
PROMPT, LENGTH, ROWS = 6, 24, 4
SIZES = dict(
    vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, pad_token_id=0, bos_token_id=1,
    eos_token_id=2,
)  # fmt: skip

gemma = Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=16, final_logit_softcapping=3.0))
cohere = CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25))
granite = GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=2.0))
phi = PhiForCausalLM(PhiConfig(**SIZES, resid_pdrop=0.0, embd_pdrop=0.0))
qwen = Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True))
phi.lm_head.bias.data.normal_()

# Of our functions: logits are `softcap * tanh((hidden @ weight.T + bias) / softcap) / temperature`.
BY_HAND = {
    "Gemma 2, soft-capped": (gemma, {"softcap": gemma.config.final_logit_softcapping}),
    "Cohere, logits multiplied": (cohere, {"temperature": 1 / cohere.config.logit_scale}),
    "Granite, logits divided": (granite, {"temperature": granite.config.logits_scaling}),
    "Phi, bias": (phi, {"bias": phi.lm_head.bias}),
    # A tied head is the embedding: its gradient is the sum of both uses, which autograd takes care of.
    "Qwen, tied": (qwen, {}),
}

ids = torch.randint(1, 512, (ROWS, LENGTH))
labels = ids.masked_fill(torch.arange(LENGTH) < PROMPT, -100)  # unshifted, as transformers has them
labels[-1, -8:] = -100  # a shorter one
target = pad(labels[:, 1:], (0, 1), value=-100)  # shifted, as our functions want: what hidden[t] predicts
behavior_logprobs = -6 - torch.rand(ROWS, LENGTH)  # unshifted
shifted = pad(behavior_logprobs[:, 1:], (0, 1))


def gradients(loss: torch.Tensor, model: torch.nn.Module) -> list[torch.Tensor]:
    return [loss, *torch.autograd.grad(loss, list(model.parameters()))]


def check(what: str, got: list[torch.Tensor], wanted: list[torch.Tensor], tolerance: float = 1e-4) -> None:
    """Of the loss and of all gradients as one vector, whichever is further off."""
    split = [(x[0].detach(), torch.cat([g.flatten() for g in x[1:]])) for x in (got, wanted)]
    difference = max(((a - b).norm() / b.norm()).item() for a, b in zip(*split, strict=True))
    print(f"{what}: relative difference {difference:.1e}")
    if not difference <= tolerance:
        sys.exit(f"{what}: loss or gradients differ by {difference:.1e}, more than {tolerance:.0e}")


for name, (model, arguments) in BY_HAND.items():
    model64 = copy.deepcopy(model).double()
    own = gradients(model64(input_ids=ids, labels=labels).loss, model64)

    def by_hand(loss, *columns, model=model, arguments=arguments, **options) -> list[torch.Tensor]:
        hidden, weight = model.model(ids).last_hidden_state, model.get_output_embeddings().weight
        return gradients(loss(hidden, weight, target, *columns, **arguments, **options).loss, model)

    check(f"{name}; by hand and the model's own loss", by_hand(linear_weighted_loss, weighting="none"), own)
    pear = by_hand(linear_pear_loss, shifted)
    patch_causal_lm(model)
    check(f"{name}; patched and its own loss", gradients(model(input_ids=ids, labels=labels).loss, model), own)
    output = model(input_ids=ids, labels=labels, behavior_logprobs=behavior_logprobs)
    check(f"{name}; PEAR, patched and by hand", gradients(output.loss, model), pear)
