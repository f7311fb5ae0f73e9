"""PEAR in transformers' own `Trainer`, without padding: `patch_causal_lm` makes the model's loss PEAR's.

    python examples/transformers_trainer.py

Needs torch, transformers and accelerate. The rows of a batch stand behind one another in a single row, as
transformers' collator for flash-attention makes it. At the end the first step is compared with an unpatched model on
full logits, in float64, sequence by sequence: so packing, gradient accumulation and the loss are all in question.
"""

import copy
import sys
import tempfile

import torch
from transformers import (
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from pear_kernels import patch_causal_lm
from pear_kernels.reference import naive_weights

PROMPT, LENGTH, ROWS, STEPS = 6, 32, 8, 10

torch.manual_seed(0)
torch.set_num_threads(1)  # products this small are slower on several
config = LlamaConfig(
    vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=512, initializer_range=0.2, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
model = LlamaForCausalLM(config)

# The policy that writes the data: the model with somewhat other weights.
behavior = copy.deepcopy(model)
for parameter in behavior.parameters():
    parameter.data.add_(0.02 * torch.randn_like(parameter))
ids = behavior.generate(
    torch.randint(512, (ROWS, PROMPT)), do_sample=True, top_k=0, max_new_tokens=LENGTH - PROMPT, pad_token_id=0
)
labels = ids.clone()  # unshifted, as transformers has them
labels[:, :PROMPT] = -100

# Its log-probs, unshifted too: row t is about token t. A patched model returns those of its labels in any case.
with torch.no_grad():
    behavior_logprobs = patch_causal_lm(behavior)(input_ids=ids, labels=labels).log_probs  # (B, T)
columns = {"input_ids": ids, "labels": labels, "behavior_logprobs": behavior_logprobs}
lengths = torch.randint(PROMPT + 4, LENGTH + 1, (ROWS,)).tolist()
rows = [{name: x[i, :length].tolist() for name, x in columns.items()} for i, length in enumerate(lengths)]


class PackWithBehavior(DataCollatorWithFlattening):
    """Rows to one row (1, T), with `cu_seq_lens_q`, which tells PEAR's sums where a sequence ends."""

    def __call__(self, features, *args, **kwargs):
        batch = super().__call__(features, *args, **kwargs)
        behavior_logprobs = [x for row in features for x in row["behavior_logprobs"]]
        return batch | {"behavior_logprobs": torch.tensor([behavior_logprobs])}


class FirstStep(TrainerCallback):
    """The gradients of the first step, over its micro-batches."""

    gradients: list[torch.Tensor] | None = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.gradients is None:
            self.gradients = [p.grad.clone() for p in model.parameters()]


# What the first step should be: G_t * NLL_t of the unpatched model's logits, over all tokens of the step.
model64 = copy.deepcopy(model).double()
naive_loss = 0.0
for row in rows:
    input_ids, row_labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
    counted = row_labels[1:] != -100
    log_p = model64(input_ids[None]).logits[0, :-1].log_softmax(-1)  # (T - 1, V)
    log_p = log_p.gather(-1, input_ids[1:, None])[counted, 0]
    weights = naive_weights(log_p.detach(), torch.tensor(row["behavior_logprobs"])[1:][counted].double())
    naive_loss = naive_loss - (weights * log_p).sum() / (sum(lengths) - ROWS * PROMPT)
wanted = torch.autograd.grad(naive_loss, list(model64.parameters()))

patch_causal_lm(model, level="token", gamma=0.999)
first = FirstStep()


def nll() -> float:
    """Unweighted: PEAR's own loss may rise while training goes well, as its weights do."""
    with torch.no_grad():
        log_probs = model(input_ids=ids, labels=labels).log_probs
    return -sum(log_probs[i, :length].sum().item() for i, length in enumerate(lengths)) / (sum(lengths) - ROWS * PROMPT)


before = nll()
with tempfile.TemporaryDirectory() as folder:
    trainer = Trainer(
        model,
        TrainingArguments(
            folder, per_device_train_batch_size=ROWS // 2, gradient_accumulation_steps=2, max_steps=STEPS,
            learning_rate=2e-3, max_grad_norm=0.0, logging_steps=1, save_strategy="no", report_to="none", use_cpu=True,
            disable_tqdm=True,
        ),
        data_collator=PackWithBehavior(return_flash_attn_kwargs=True),
        train_dataset=rows,
        callbacks=[first],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
after = nll()


def check(what: str, got: list[torch.Tensor], wanted: list[torch.Tensor], tolerance: float = 1e-4) -> None:
    got, wanted = (torch.cat([x.detach().flatten() for x in tensors]) for tensors in (got, wanted))
    difference = ((got - wanted).norm() / wanted.norm()).item()
    print(f"{what}: relative difference {difference:.1e}")
    if not difference <= tolerance:
        sys.exit(f"{what} differ by {difference:.1e}, more than {tolerance:.0e}")


check("loss, the Trainer's and naive", [torch.tensor(float(trainer.state.log_history[0]["loss"]))], [naive_loss])
check("gradients, the Trainer's and naive", first.gradients, wanted)
print(f"nll: {before:.3f} at first, {after:.3f} at last")
if not after < 0.9 * before:
    sys.exit("training did not lower the nll")
