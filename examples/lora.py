"""LoRA with peft: the head is frozen, so the loss takes two matrix products of the vocabulary's size instead of three.

    python examples/lora.py

Needs torch, transformers and peft. At the end the first step's gradients, those of the adapters, are compared with an
unpatched model's on full logits, in float64.
"""

import copy
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from pear_kernels import linear_logprobs, patch_causal_lm, plan
from pear_kernels.reference import naive_weights

VOCABULARY, WIDTH, PROMPT, LENGTH, ROWS, STEPS = 512, 64, 6, 24, 8, 15

torch.manual_seed(0)
torch.set_num_threads(1)  # products this small are slower on several
config = LlamaConfig(
    vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64, initializer_range=0.2, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
base = LlamaForCausalLM(config)

# The policy that writes the data: the model with somewhat other weights. Its log-probs are made before training, from
# hidden states and head, without logits.
behavior = copy.deepcopy(base).requires_grad_(False)
for parameter in behavior.parameters():
    parameter.add_(0.02 * torch.randn_like(parameter))
ids = behavior.generate(
    torch.randint(VOCABULARY, (ROWS, PROMPT)), do_sample=True, top_k=0, max_new_tokens=LENGTH - PROMPT, pad_token_id=0
)
labels = ids.clone()  # unshifted, as transformers has them
labels[:, :PROMPT] = -100
hidden = behavior.model(ids).last_hidden_state[:, :-1]
behavior_logprobs = linear_logprobs(hidden, behavior.lm_head.weight, labels[:, 1:])
behavior_logprobs = torch.cat([torch.zeros(ROWS, 1), behavior_logprobs], dim=1)  # unshifted: row t is about token t

# The head stays out of `target_modules`: the loss reads its weight, which would not hold the adapter. (It is refused.)
adapters = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
model = get_peft_model(base, adapters)
for name, parameter in model.named_parameters():  # peft starts B at 0, where A has no gradient to compare
    if "lora_B" in name:
        parameter.data.normal_(std=0.05)
trained = [p for p in model.parameters() if p.requires_grad]

# What the first step should be: G_t * NLL_t of the unpatched model's logits.
model64 = copy.deepcopy(model).double()
log_p = model64(input_ids=ids).logits[:, PROMPT - 1 : -1].log_softmax(-1).gather(-1, ids[:, PROMPT:, None])[..., 0]
weights = [naive_weights(*pair) for pair in zip(log_p.detach(), behavior_logprobs[:, PROMPT:].double(), strict=True)]
naive_loss = -(torch.stack(weights) * log_p).mean()
wanted = torch.autograd.grad(naive_loss, [p for p in model64.parameters() if p.requires_grad])

patch_causal_lm(model)  # the PeftModel or its base: either way the base's forward
optimizer = torch.optim.AdamW(trained, lr=1e-2)
history = []
for at in range(STEPS):
    optimizer.zero_grad()
    output = model(input_ids=ids, labels=labels, behavior_logprobs=behavior_logprobs)
    output.loss.backward()
    if at == 0:
        first_loss, first = output.loss.detach(), [p.grad.clone() for p in trained]
    history.append(-output.log_probs.sum().item() / (labels != -100).sum().item())
    optimizer.step()


def check(what: str, got: list[torch.Tensor], wanted: list[torch.Tensor], tolerance: float = 1e-4) -> None:
    got, wanted = (torch.cat([x.detach().flatten() for x in tensors]) for tensors in (got, wanted))
    difference = ((got - wanted).norm() / wanted.norm()).item()
    print(f"{what}: relative difference {difference:.1e}")
    if not difference <= tolerance:
        sys.exit(f"{what} differ by {difference:.1e}, more than {tolerance:.0e}")


check("loss, ours and naive", [first_loss], [naive_loss])
check("gradients of the adapters, ours and naive", first, wanted)

if model.get_output_embeddings().weight.grad is not None:
    sys.exit("the frozen head got a gradient")
for trained_head in (False, True):  # as the code counts that plans each call
    call = plan((labels != -100).sum().item(), VOCABULARY, WIDTH, train_head=trained_head, device="cpu")
    what = "trained" if trained_head else "frozen"
    print(f"head {what}: {call.products:g} products, {call.grad_head_bytes / 2**20:g} MiB for the head's gradient")
    if call.products != (3 if trained_head else 2):
        sys.exit(f"a {what} head takes {call.products:g} products")
print(f"nll: {history[0]:.3f} at first, {history[-1]:.3f} at last")
if not history[-1] < 0.9 * history[0]:
    sys.exit("training did not lower the nll")
