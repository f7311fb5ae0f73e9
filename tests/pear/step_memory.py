"""Peak memory of one real training step on a CPU, in this process: `python step_memory.py CONFIG.json TOKENS`.

Prints the resident bytes that a second step reached above what was there before it, weights and optimizer included
there; the loss is transformers' own.
"""

import ctypes
import gc
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bench.memory import resident


def main(config: str, tokens: int) -> None:
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config), dtype=torch.float32)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.train()

    def step(tokens: int) -> None:
        ids = torch.randint(model.config.vocab_size, (1, tokens))
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad(set_to_none=True)

    step(64)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    step(tokens)
    print(resident("VmHWM") - before)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
