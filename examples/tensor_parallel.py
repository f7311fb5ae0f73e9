"""A vocabulary-sharded head (tensor parallelism): each of two processes holds half of the vocabulary's rows.

    python examples/tensor_parallel.py

Needs torch alone. The file starts its two processes itself, over gloo on a CPU; with GPUs it is torchrun that does, and
NCCL. Each process makes logits of its own rows only; what they tell each other is two numbers a token, and the sum of
the hidden states' gradient. At the end loss, gradients and trained weights are compared with those of one process, and
the two ways to give a shard with each other: a DTensor, or plain rows and their group.
"""

import copy
import os
import socket
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

WORLD, VOCABULARY, WIDTH, PROMPT, LENGTH, ROWS, STEPS = 2, 511, 64, 6, 24, 8, 8


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.trunk = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Hidden states (B, T, D) of ids (B, T): what stands before the LM head, which is never called."""
        return self.trunk(self.embed(ids))[0]


def main(rank: int, port: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    from pear_kernels import linear_logprobs, linear_pear_loss

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(WORLD), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)  # products this small are slower on several
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (WORLD,), mesh_dim_names=("tp",))

    # ---- the same in both processes: model, data, and the policy that wrote it
    torch.manual_seed(0)
    model = Student()
    model.head.weight.data.mul_(8)  # distributions that are not flat
    behavior = copy.deepcopy(model).requires_grad_(False)
    for parameter in behavior.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    ids = torch.randint(VOCABULARY, (ROWS, LENGTH))
    target = ids.roll(-1, dims=1)  # what hidden[t] predicts is the token at t + 1, an id of the whole vocabulary
    target[:, : PROMPT - 1] = target[:, -1] = -100
    behavior_logprobs = linear_logprobs(behavior(ids), behavior.head.weight, target, bias=behavior.head.bias)

    def train(model: Student, optimizer: torch.optim.Optimizer):
        """Losses of all steps, gradients of the first, and the unweighted nll of each."""
        losses, nll, first = [], [], []
        for at in range(STEPS):
            optimizer.zero_grad()
            out = linear_pear_loss(model(ids), model.head.weight, target, behavior_logprobs, bias=model.head.bias)
            out.loss.backward()
            losses.append(out.loss.detach())
            nll.append(-out.logprobs.sum().item() / (target != -100).sum().item())
            if at == 0:
                first = [whole(p.grad) for p in model.parameters()]
            optimizer.step()
        return losses, first, nll

    # ---- one process, the whole head
    alone, start = copy.deepcopy(model), copy.deepcopy(model)
    losses, first, _ = train(alone, torch.optim.AdamW(alone.parameters(), lr=1e-2))

    # ---- two processes: the head's weight and bias become DTensors, Shard(0), and nothing else in the call changes.
    # The trunk is a copy in each, and stays one: the gradient of hidden states is the same in both, to the last bit.
    parallelize_module(model, mesh, {"head": ColwiseParallel()})
    sharded_losses, sharded_first, nll = train(model, torch.optim.AdamW(model.parameters(), lr=1e-2))

    # ---- the same by hand: rows of the weight as a plain tensor, and the group that shares the vocabulary
    begin, end = ((VOCABULARY + 1) // WORLD * rank, min((VOCABULARY + 1) // WORLD * (rank + 1), VOCABULARY))
    rows, bias = (x.detach()[begin:end].clone().requires_grad_() for x in (start.head.weight, start.head.bias))
    hidden = start(ids)
    out = linear_pear_loss(hidden, rows, target, behavior_logprobs, bias=bias, group=mesh.get_group())
    out.loss.backward()

    # ---- the same?
    check("losses of all steps, two processes and one", sharded_losses, losses)
    check("gradients of the first step, two processes and one", sharded_first, first)
    check("weights after the last step, two processes and one", map(whole, model.parameters()), alone.parameters())
    check("loss, plain rows and DTensor", [out.loss], sharded_losses[:1])
    head_gradients = [first[-2][begin:end], first[-1][begin:end]]
    check("this rank's gradients of the head, plain rows and one process", [rows.grad, bias.grad], head_gradients)
    both = [torch.empty_like(torch.stack(sharded_losses)) for _ in range(WORLD)]
    dist.all_gather(both, torch.stack(sharded_losses))
    if not torch.equal(*both):
        sys.exit("the two processes have different losses")
    if rank == 0:
        print(f"nll: {nll[0]:.3f} at first, {nll[-1]:.3f} at last")
    if not nll[-1] < 0.9 * nll[0]:
        sys.exit("training did not lower the nll")
    dist.destroy_process_group()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def check(what: str, got, wanted, tolerance: float = 1e-4) -> None:
    got, wanted = (torch.cat([x.detach().flatten() for x in tensors]) for tensors in (got, wanted))
    difference = ((got - wanted).norm() / wanted.norm()).item()
    if dist.get_rank() == 0:
        print(f"{what}: relative difference {difference:.1e}")
    if not difference <= tolerance:
        sys.exit(f"{what} differ by {difference:.1e}, more than {tolerance:.0e}")


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(main, (port,), nprocs=WORLD)
