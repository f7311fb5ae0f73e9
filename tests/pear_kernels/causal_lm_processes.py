"""Run by test_causal_lm_sharded.py as two processes on a CPU: a patched model under DDP, FSDP, tensor parallelism."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from causal_lms import VOCABULARY, batch, gradients, make_lm

from pear_kernels import patch_causal_lm

WORLD = 2
CASES = {  # name -> options of the model
    "ddp": {},
    "fsdp2": {},
    "fsdp2, tied": {"tie_word_embeddings": True},
    "fsdp2, head a unit": {},
    "fsdp2, head a unit that stays whole": {},
    "fsdp1": {},
    "fsdp1, head a unit": {},
    "fsdp1, original parameters": {},
    "fsdp1, original parameters, head a unit": {},
    "tensor parallel": {},
}
LOSSES = {"cross-entropy": False, "pear": True}  # with behaviour log-probs
PEAR = {"level": "block", "block_size": 2}


def inputs(pear: bool) -> dict:
    """Two rows of one length, and how many of their tokens count."""
    found = batch()
    del found["attention_mask"]
    if pear:
        found["behavior_logprobs"] = -3 * torch.rand(2, 9, generator=torch.Generator().manual_seed(2))
    return found


def count(found: dict) -> int:
    return int((found["labels"][:, 1:] != -100).sum())


def wrapped(name: str, model: torch.nn.Module) -> torch.nn.Module:
    """The model as its case wants it, to be called in place of it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    if name == "ddp":  # what takes the output apart and puts it together again
        return torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    layers, unit = model.model.layers, "head a unit" in name
    if name.startswith("fsdp2"):
        options = {"mesh": init_device_mesh("cpu", (WORLD,))}
        for layer in layers:
            fully_shard(layer, **options)
        if unit:
            fully_shard(model.lm_head, reshard_after_forward="stays whole" not in name, **options)
        fully_shard(model, **options)
        return model
    options = {"device_id": torch.device("cpu"), "use_orig_params": "original" in name}
    for i, layer in enumerate(layers):
        layers[i] = FullyShardedDataParallel(layer, **options)
    if unit:
        model.lm_head = FullyShardedDataParallel(model.lm_head, **options)
    return FullyShardedDataParallel(model, **options)


def tensor_parallel(folder: str, rank: int) -> torch.nn.Module:
    """Loaded from the folder by transformers' own plan: the head's rows are shared among the processes."""
    from transformers import LlamaForCausalLM
    from transformers.distributed import DistributedConfig

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    plan = DistributedConfig(tp_plan="auto")
    model = LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager", distributed_config=plan
    )
    assert model.lm_head.weight.to_local().shape[0] < VOCABULARY
    return model.eval()


def stepped(name: str, pear: bool, rank: int, folder: str) -> dict:
    """Loss, log-probs of this rank's row, and the parameters after one step of SGD with the gradients of all ranks."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    parallel = name == "tensor parallel"  # where all processes have the same rows
    model = tensor_parallel(folder, rank) if parallel else make_lm("Llama", torch.float64, **CASES[name])
    patch_causal_lm(model, **(PEAR if pear else {}))
    call, found = model if parallel else wrapped(name, model), inputs(pear)
    row = found if parallel else {key: value[rank : rank + 1] for key, value in found.items()}
    optimizer = torch.optim.SGD(call.parameters(), lr=1.0)
    for _ in range(2):  # the second call finds what the first one left
        optimizer.zero_grad()
        output = call(**row, num_items_in_batch=count(found) / (1 if parallel else WORLD))  # FSDP averages
        output.loss.backward()
    optimizer.step()
    if name.startswith("fsdp1"):
        with FullyShardedDataParallel.summon_full_params(call):
            parameters = {key.replace("_fsdp_wrapped_module.", ""): p.clone() for key, p in call.named_parameters()}
    else:
        parameters = {key.removeprefix("module."): p for key, p in call.named_parameters()}
        parameters = {key: p.full_tensor() if hasattr(p, "full_tensor") else p for key, p in parameters.items()}
    loss = output.loss.detach().clone()
    dist.all_reduce(loss)  # all the same, or shares of one that were divided by less
    return {
        "loss": loss / WORLD,
        "log_probs": output.log_probs[rank : rank + 1] if parallel else output.log_probs,
        "parameters": {key: p.detach() for key, p in parameters.items()},
    }


def alone(name: str, pear: bool) -> dict:
    """What one process has."""
    model = patch_causal_lm(make_lm("Llama", torch.float64, **CASES[name]), **(PEAR if pear else {}))
    output = model(**inputs(pear))
    output.loss.backward()
    moved = gradients(model)
    parameters = {key: p.detach() - moved[key] for key, p in model.named_parameters()}
    return {"loss": output.loss.detach(), "log_probs": output.log_probs, "parameters": parameters}


def unsharded_call() -> str:
    """What a model says whose head FSDP1 flattened and whose own forward is called, past the wrapper."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = patch_causal_lm(make_lm("Llama"))
    head = FullyShardedDataParallel(model.lm_head, device_id=torch.device("cpu"), use_orig_params=True)
    model.lm_head = head.module
    try:
        model(**inputs(False))
    except ValueError as error:
        return str(error)
    return "no error"


def everything(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    if rank == 0:
        make_lm("Llama").save_pretrained(folder)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    found = {}
    for name in CASES:
        for loss, pear in LOSSES.items():
            found[name, loss] = stepped(name, pear, rank, folder)
    found["past the wrapper"] = unsharded_call()
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
