"""TRL's own SFTTrainer with PEAR's loss: the model is patched, and the trainer asks the model for its loss.

    python examples/trl_sft.py

Needs `pip install -e '.[train]'`, of which pear's own code is not used here. That has more: `pear.sft.PEARSFTTrainer`,
the trainer of `pear sft`, is a subclass of SFTTrainer too. It takes the files of `pear score` and checks them, packs,
logs log-ratios, weights and effective sample size, warns where weights collapse, and has this package's other
objectives. Use that one, or this where a trainer must stay as it is. At the end the first step is compared with an
unpatched model on full logits, in float64.
"""

import copy
import sys
import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    default_data_collator,
)
from trl import SFTConfig, SFTTrainer

from pear_kernels import patch_causal_lm
from pear_kernels.reference import naive_weights

VOCABULARY, PROMPT, LENGTH, ROWS, STEPS = 512, 6, 24, 8, 10

torch.manual_seed(0)
torch.set_num_threads(1)  # products this small are slower on several
words = {f"w{i}": i for i in range(VOCABULARY)}
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words)), pad_token="w0", eos_token="w1")
config = LlamaConfig(
    vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64, initializer_range=0.2, pad_token_id=0, eos_token_id=1, bos_token_id=None,
)  # fmt: skip
model = LlamaForCausalLM(config)

# The policy that writes the data: the model with somewhat other weights. Its log-probs are a column of the data set,
# unshifted like `labels`: row t is about token t. A patched model returns those of its labels in any case.
behavior = copy.deepcopy(model).requires_grad_(False)
for parameter in behavior.parameters():
    parameter.add_(0.02 * torch.randn_like(parameter))
ids = behavior.generate(
    torch.randint(2, VOCABULARY, (ROWS, PROMPT)), do_sample=True, top_k=0, max_new_tokens=LENGTH - PROMPT,
    min_new_tokens=LENGTH - PROMPT,
)  # fmt: skip
lengths = torch.randint(PROMPT + 4, LENGTH + 1, (ROWS, 1))
place = torch.arange(LENGTH)
labels = ids.masked_fill((place < PROMPT) | (place >= lengths), -100)  # not of the prompt, nor of what pads a row
behavior_logprobs = patch_causal_lm(behavior)(input_ids=ids, labels=labels).log_probs
columns = {"input_ids": ids, "labels": labels, "behavior_logprobs": behavior_logprobs}  # (B, T)
tokens = (labels != -100).sum().item()


class ModelsOwnLoss(SFTTrainer):
    """SFTTrainer makes its loss from log-probs. This one leaves it to the model, as transformers' Trainer does."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # `num_items_in_batch`, the tokens of all micro-batches, becomes the denominator
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)


class FirstStep(TrainerCallback):
    gradients: list[torch.Tensor] | None = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.gradients is None:
            self.gradients = [p.grad.clone() for p in model.parameters()]


# What the first step should be: G_t * NLL_t of the unpatched model's logits, over all tokens of the step.
model64 = copy.deepcopy(model).double()
log_p = model64(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]  # (B, T - 1)
naive_loss = 0.0
for row_log_p, row_labels, row_behavior in zip(log_p, labels[:, 1:], behavior_logprobs[:, 1:], strict=True):
    counted = row_labels != -100
    weights = naive_weights(row_log_p[counted].detach(), row_behavior[counted].double())
    naive_loss = naive_loss - (weights * row_log_p[counted]).sum() / tokens
wanted = torch.autograd.grad(naive_loss, list(model64.parameters()))


def nll() -> float:
    """Unweighted: PEAR's own loss may rise while training goes well, as its weights do."""
    with torch.no_grad():
        return -model(**columns).log_probs.sum().item() / tokens


patch_causal_lm(model, level="token", gamma=0.999)
before, first = nll(), FirstStep()
with tempfile.TemporaryDirectory() as folder:
    trainer = ModelsOwnLoss(
        model,
        SFTConfig(
            folder, per_device_train_batch_size=ROWS // 2, gradient_accumulation_steps=2, max_steps=STEPS,
            learning_rate=2e-3, max_grad_norm=0.0, logging_steps=1, save_strategy="no", report_to="none", use_cpu=True,
            bf16=False, disable_tqdm=True, remove_unused_columns=False, dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=Dataset.from_dict({name: x.tolist() for name, x in columns.items()}),
        data_collator=default_data_collator,
        processing_class=tokenizer,
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


check("loss, the trainer's and naive", [torch.tensor(float(trainer.state.log_history[0]["loss"]))], [naive_loss])
check("gradients, the trainer's and naive", first.gradients, wanted)
print(f"nll: {before:.3f} at first, {after:.3f} at last")
if not after < 0.9 * before:
    sys.exit("training did not lower the nll")
