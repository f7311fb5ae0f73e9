"""accelerate with FSDP2, in two processes: every parameter in shards, the head's too, and the loss of one process.

    python examples/fsdp2.py

Needs torch, transformers and accelerate. The file starts its two processes itself, over gloo on a CPU; with GPUs it is
`accelerate launch` that does, and NCCL. `patch_causal_lm` comes before `prepare`: the loss is then computed within the
model's forward, where FSDP holds the head whole, and its gradient goes through the head's own hooks. At the end loss,
gradients and trained weights are compared with those of one process.
"""

import copy
import os
import socket
import sys

import torch
import torch.multiprocessing as mp

WORLD, PROMPT, LENGTH, ROWS, STEPS = 2, 6, 24, 8, 8


def main(rank: int, port: int) -> None:
    from accelerate import Accelerator
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
    from transformers import LlamaConfig, LlamaForCausalLM

    from pear_kernels import patch_causal_lm

    job = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in job.items()})  # as torchrun and accelerate launch do
    torch.set_num_threads(1)  # products this small are slower on several

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
    )  # fmt: skip
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    # On GPUs the line above is all. On a CPU accelerate knows only data parallelism, so it is told here.
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin

    # ---- the same in both processes: model, data, and the policy that writes it
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=511, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, initializer_range=0.2, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    behavior = copy.deepcopy(model).requires_grad_(False)
    for parameter in behavior.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    ids = behavior.generate(
        torch.randint(511, (ROWS, PROMPT)), do_sample=True, top_k=0, max_new_tokens=LENGTH - PROMPT, pad_token_id=0
    )
    labels = ids.clone()  # unshifted, as transformers has them
    labels[:, :PROMPT] = -100
    labels[0, LENGTH - 9 :] = -100  # the processes have unequal numbers of tokens
    behavior_logprobs = patch_causal_lm(behavior)(input_ids=ids, labels=labels).log_probs
    batch = {"input_ids": ids, "labels": labels, "behavior_logprobs": behavior_logprobs}
    tokens = (labels != -100).sum()

    # ---- one process, the whole batch
    alone = patch_causal_lm(copy.deepcopy(model))
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.05)
    losses, first = [], []
    for at in range(STEPS):
        optimizer.zero_grad()
        output = alone(**batch, num_items_in_batch=tokens)
        output.loss.backward()
        losses.append(output.loss.detach())
        if at == 0:
            first = [p.grad.clone() for p in alone.parameters()]
        optimizer.step()

    # ---- two processes, half of it each
    patch_causal_lm(model)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.05))
    share = slice(rank * ROWS // WORLD, (rank + 1) * ROWS // WORLD)
    rows = {name: x[share] for name, x in batch.items()}
    sharded_losses, nll = [], []
    for at in range(STEPS):
        optimizer.zero_grad()
        # FSDP averages gradients over processes: what divides is the mean number of tokens of a process, the same in
        # each, so that the mean is the loss of the whole batch.
        output = model(**rows, num_items_in_batch=tokens / WORLD)
        accelerator.backward(output.loss)
        sharded_losses.append(accelerator.reduce(output.loss.detach(), reduction="mean"))
        nll.append(accelerator.reduce(-output.log_probs.sum() / tokens).item())
        if at == 0:
            sharded_first = [p.grad.full_tensor() for p in model.parameters()]
        optimizer.step()
    trained = [p.full_tensor() for p in model.parameters()]
    head = model.get_output_embeddings().weight

    # ---- the same?
    if accelerator.is_main_process:
        print(f"the head's {tuple(head.shape)} weight, here {tuple(head.to_local().shape)} of it")
        check("losses of all steps, two processes and one", sharded_losses, losses)
        check("gradients of the first step, two processes and one", sharded_first, first)
        check("weights after the last step, two processes and one", trained, list(alone.parameters()))
        print(f"nll: {nll[0]:.3f} at first, {nll[-1]:.3f} at last")
        if not nll[-1] < 0.9 * nll[0]:
            sys.exit("training did not lower the nll")
    accelerator.end_training()


def check(what: str, got: list[torch.Tensor], wanted: list[torch.Tensor], tolerance: float = 1e-4) -> None:
    got, wanted = (torch.cat([x.detach().flatten() for x in tensors]) for tensors in (got, wanted))
    difference = ((got - wanted).norm() / wanted.norm()).item()
    print(f"{what}: relative difference {difference:.1e}")
    if not difference <= tolerance:
        sys.exit(f"{what} differ by {difference:.1e}, more than {tolerance:.0e}")


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(main, (port,), nprocs=WORLD)
