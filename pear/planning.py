"""What a training step needs of a GPU's memory, by part, and the longest context that fits: `pear plan`.

Only the model's config is read. A step's memory is highest at one of four moments, and each is a sum of parts:

    forward         weights + optimizer states + what the trunk holds
    head            the same at the end of the trunk's forward pass + what the loss holds
    backward        weights + optimizer states + gradients so far + what the trunk holds
    optimizer step  weights + optimizer states + gradients + the optimizer's own copies

    weights             4 or 2 bytes a parameter (tied ones once), adapters in their own dtype
    gradients           as the parameters that are trained, each from when the backward pass has made it
    optimizer states    see `OPTIMIZERS`
    hidden states       (layers + 1, N, D): what checkpointing keeps, and drops layer by layer in the backward pass
    activations         all else that the trunk holds: where layers are checkpointed, one layer's, made again
    head                `naive_head_bytes`, or `pear_kernels.plan` and, under autocast, its operands' copies

What the trunk holds is counted from the model's own code (`pear.tracing`); N is the tokens of a micro-batch, without
padding, all of which count in the loss.
"""

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from pear.adapters import check_targets, has_own_targets
from pear.fused_head import check_model
from pear.io import DataError
from pear.models import check_architecture, load_config
from pear.shapes import GPUS, shape_of
from pear.tracing import GRADIENTS, OTHER, STATES, Trace, model_without_data, trace
from pear.tracing_liger import liger_layers
from pear_kernels import plan as plan_head
from pear_kernels.huggingface.positions import position_limit

LOSSES = {"naive": "naive loss", "ours": "ours"}
PARTS = ("weights", "gradients", "optimizer states", "hidden states", "activations", "head")
USABLE = 0.96  # of a card's memory; the rest is the driver's, CUDA's, and lost between the allocator's blocks
OFFLOADED_STAY = 6  # hidden states on the device at once: TRL's stash of 5 that are on their way, and the next
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MOST_TOKENS = 1 << 28  # where a search ends


# ---- optimizers


def _adam(parameter: Tensor, embedding: bool) -> float:
    return 2 * parameter.nbytes  # torch's states have the parameter's dtype


def _adam_bnb_8bit(parameter: Tensor, embedding: bool) -> float:
    """Two bytes and a float32 for each 256; float32 for embeddings, as transformers asks for, and for small ones."""
    count = parameter.numel()
    return 8 * count if embedding or count < 4096 else 2 * (count + 4 * -(-count // 256))


def _adam_ao(bits: int, block: int) -> Callable[[Tensor, bool], float]:
    def count(parameter: Tensor, embedding: bool) -> float:
        n = parameter.numel()
        return 2 * parameter.nbytes if n < 4096 or n % block else 2 * (n * bits / 8 + 4 * n / block)

    return count


def _adafactor(parameter: Tensor, embedding: bool) -> float:
    """float32 for each row and each column; for each element of a vector."""
    *more, rows, columns = parameter.shape if parameter.dim() > 1 else (parameter.numel(), 0)
    return 4 * int(np.prod(more, dtype=np.int64)) * (rows + columns)


def _nothing(parameter: Tensor, embedding: bool) -> float:
    return 0


OPTIMIZERS: dict[str, Callable[[Tensor, bool], float]] = {  # transformers' name -> bytes of a parameter's states
    "adamw_torch_fused": _adam,
    "adamw_torch": _adam,
    "adamw_8bit": _adam_bnb_8bit,
    "adamw_bnb_8bit": _adam_bnb_8bit,
    "adamw_torch_8bit": _adam_ao(8, 256),
    "adamw_torch_4bit": _adam_ao(4, 128),
    "paged_adamw_8bit": _nothing,  # the host's, where the GPU has no room
    "paged_adamw_32bit": _nothing,
    "adafactor": _adafactor,
    "sgd": _nothing,
}
COPIES_IN_STEP = {"adamw_torch"}  # goes over all parameters at once, with a copy of their size


# ---- the head


def naive_head_bytes(tokens: int, vocabulary: int) -> int:
    """Most that transformers' loss holds: three float32 of (N, V), when the gradient of the logits is made.

    Forward: logits (N, V) in the model's dtype, their float32 copy (none if they are float32), and `log_softmax`
    (N, V) float32, which is kept. Backward: that, the gradient of it, and the gradient of the logits, float32 (N, V)
    each.
    """
    return 12 * tokens * vocabulary


def our_head_bytes(
    tokens: int,
    vocabulary: int,
    hidden_size: int,
    *,
    dtype: torch.dtype,
    train_head: bool = True,
    bias: bool = False,
    workspace_bytes: int | None = None,
    device: str = "cuda",
) -> int:
    """Most that `linear_pear_loss` at token level holds, gradients of hidden states and head included.

    Arguments as those of `pear_kernels.plan`, whose docstring says what of it is what.
    """
    planned = plan_head(
        tokens,
        vocabulary,
        hidden_size,
        dtype=dtype,
        train_head=train_head,
        bias=bias,
        workspace_bytes=workspace_bytes,
        device=device,
    )
    return planned.peak_bytes


# ---- a step


class Peak(NamedTuple):
    moment: str
    parts: dict[str, int]  # of PARTS, bytes

    @property
    def total(self) -> int:
        return sum(self.parts.values())


class Step(NamedTuple):
    """A model's training step, whatever its length."""

    model: PreTrainedModel  # without data, adapters inside
    held: Trace
    dtype: torch.dtype  # that the head's operands have
    weights: int  # bytes
    gradients: int  # of all, bytes
    states: int  # of the optimizer, bytes
    step_copies: int  # of the optimizer, bytes
    layers: int
    offload: bool
    accumulates: bool  # gradients of earlier micro-batches are there throughout
    workspace_bytes: int | None

    def peak(self, loss: str, tokens: int) -> Peak:
        """Of a step on micro-batches of `tokens` tokens, with the loss of `LOSSES`."""
        held = self.held.at(tokens)
        if self.offload:  # of each moment's hidden states so many stay
            one = self.held.a_token[:, STATES].max() / (self.layers + 1) * tokens
            held[:, STATES] = np.minimum(held[:, STATES], OFFLOADED_STAY * one)
        if self.accumulates:
            held[:, GRADIENTS] = self.gradients
        totals, end = held.sum(1), self.held.head
        forward, backward = int(totals[:end].argmax()), end + int(totals[end:].argmax())
        moments = [("head", held[end + row], of_head) for row, of_head in self.head(loss, tokens)]
        moments += [("forward", held[forward], 0), ("backward", held[backward], 0)]
        peaks = [self._parts(moment, kinds, of_head) for moment, kinds, of_head in moments]
        all_gradients = np.array([self.gradients, 0, self.step_copies])
        peaks.append(self._parts("optimizer step", all_gradients, 0))
        return max(peaks, key=lambda peak: peak.total)

    def _parts(self, moment: str, kinds: np.ndarray, head: int) -> Peak:
        held = [int(kinds[kind]) for kind in (GRADIENTS, STATES, OTHER)]
        values = (self.weights, held[0], self.states, held[1], held[2], head)
        return Peak(moment, dict(zip(PARTS, values, strict=True)))

    def head(self, loss: str, tokens: int) -> list[tuple[int, int]]:
        """Bytes of the head at its moments, each with the row of `held`, from `held.head` on, that goes with it."""
        head, bias = (getattr(self.model.get_output_embeddings(), name, None) for name in ("weight", "bias"))
        if loss == "naive":
            # in the forward pass autocast's copies are there, in the backward pass not any more
            copies = 0 if self.dtype == torch.float32 else self.dtype.itemsize
            forward = tokens * head.shape[0] * (8 + copies)
            return [(-1, forward), (0, naive_head_bytes(tokens, head.shape[0]))]
        ours = our_head_bytes(
            tokens,
            *head.shape,
            dtype=self.dtype,
            train_head=head.requires_grad,
            bias=bias is not None,
            workspace_bytes=self.workspace_bytes,
        )
        if head.dtype != self.dtype:  # autocast's copies of hidden states and weight
            ours += self.dtype.itemsize * (head.numel() + tokens * head.shape[1])
        return [(-1, ours)]

    def longest(self, loss: str, capacity: int, batch: int = 1) -> int:
        """Most tokens of a row, `batch` rows a micro-batch, whose step takes at most `capacity` bytes; 0: none."""
        low, high = 0, 1
        while high * batch <= MOST_TOKENS and self.peak(loss, high * batch).total <= capacity:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            fits = self.peak(loss, middle * batch).total <= capacity
            low, high = (middle, high) if fits else (low, middle)
        return low


class Setup(NamedTuple):
    """The options of `pear sft` that decide over memory, with its defaults."""

    dtype: str = "float32"  # of the weights
    bf16: bool = True  # autocast
    optim: str = "adamw_torch_fused"
    gradient_checkpointing: bool = True
    activation_offloading: bool = False
    gradient_accumulation_steps: int = 1
    per_device_train_batch_size: int = 1
    use_liger_kernel: bool = False
    use_peft: bool = False
    lora_r: int = 16
    lora_target_modules: tuple[str, ...] = ()  # none: PEFT's own for the model
    workspace_bytes: int | None = None


def step_of(config: PretrainedConfig, setup: Setup) -> Step:
    """Traces the model of `config`.

    Raises:
        DataError: an option that is not planned, a model without a linear head, or one that cannot be traced.
    """
    for name in ("gradient_accumulation_steps", "per_device_train_batch_size", "lora_r"):
        if getattr(setup, name) < 1:
            raise DataError(f"{name} must be 1 or more, got {getattr(setup, name)}")
    if not setup.use_peft and (setup.lora_r != Setup().lora_r or setup.lora_target_modules):
        raise DataError("lora_r and lora_target_modules do nothing without use_peft; give it too, or leave them out")
    if setup.workspace_bytes is not None and setup.workspace_bytes < 1:
        raise DataError(f"workspace_bytes must be 1 or more, got {setup.workspace_bytes}")
    if setup.dtype not in DTYPES:
        raise DataError(f"dtype must be one of {', '.join(DTYPES)}, got {setup.dtype!r}")
    if setup.optim not in OPTIMIZERS:
        raise DataError(f"optim {setup.optim!r} is not planned; those that are: {', '.join(OPTIMIZERS)}")
    if setup.activation_offloading and not setup.gradient_checkpointing:
        raise DataError(
            "activation_offloading without gradient_checkpointing is not planned: it would move everything that is "
            "saved; leave gradient_checkpointing on"
        )
    dtype, autocast = DTYPES[setup.dtype], torch.bfloat16 if setup.bf16 else None
    model = model_without_data(config, dtype, setup.gradient_checkpointing)
    check_model(model)
    if setup.use_peft:
        _add_adapter(model, setup)
    with liger_layers(model) if setup.use_liger_kernel else contextlib.nullcontext():
        held = trace(model, autocast=autocast)
    embeddings = {
        weight for module in model.modules() if isinstance(module, nn.Embedding) for weight in [module.weight]
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = sum(parameter.nbytes for parameter in trained)
    return Step(
        model,
        held,
        autocast or dtype,
        weights=sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]),
        gradients=gradients,
        states=int(sum(OPTIMIZERS[setup.optim](parameter, parameter in embeddings) for parameter in trained)),
        step_copies=gradients if setup.optim in COPIES_IN_STEP else 0,
        layers=config.get_text_config().num_hidden_layers,
        offload=setup.activation_offloading,
        accumulates=setup.gradient_accumulation_steps > 1,
        workspace_bytes=setup.workspace_bytes,
    )


def _add_adapter(model: PreTrainedModel, setup: Setup) -> None:
    from peft import LoraConfig, get_peft_model

    targets = list(setup.lora_target_modules) or None
    if targets == ["all-linear"]:
        targets = "all-linear"
    check_targets(model.config, targets)
    try:
        get_peft_model(model, LoraConfig(r=setup.lora_r, target_modules=targets, task_type="CAUSAL_LM"))
    except ValueError as error:
        raise DataError(f"lora_target_modules: {error}") from error
    check_model(model)  # no adapter on its head


# ---- the command


def config_of(name: str) -> PretrainedConfig:
    """Of a folder, a hub name, `smollm2`, or one of `SHAPES` (with or without an owner), which needs no network."""
    if not Path(name).is_dir() and (known := shape_of(name)) is not None:
        return AutoConfig.for_model(**known)
    config = load_config(name)
    check_architecture(config, name)
    if getattr(config, "quantization_config", None):
        raise DataError(f"model {name!r}: quantised weights are not planned; give the model that was quantised")
    return config


def parse_gpu(text: str | None) -> int:
    """Bytes of "80GB", "79.6 GiB", "81920MiB", "80" or "NVIDIA H100"; None: of the GPU that is here.

    On a card's name a GB has 2^30 bytes. A card without an amount is one of `pear.shapes.GPUS`.
    """
    if text is None:
        if not torch.cuda.is_available():
            raise DataError("no GPU here whose memory could be looked up: pass --gpu, such as --gpu 80GB or --gpu h100")
        return torch.cuda.get_device_properties(0).total_memory
    written = text.strip().lower()
    if amount := re.search(r"(?<![\w.])(\d+(?:\.\d+)?)\s*(g|gb|gib|mb|mib)\b", written):
        gibibytes = float(amount[1]) / (1024 if amount[2].startswith("m") else 1)
    elif cards := [card for card in GPUS if re.search(rf"\b(rtx)?{card}\b", written)]:
        gibibytes = GPUS[cards[0]] / 1024
    else:
        gibibytes = float(written) if re.fullmatch(r"\d+(\.\d+)?", written) else 0
    if gibibytes == 0:
        raise DataError(
            f"gpu {text!r} is neither an amount of memory (80GB, 79.6GiB, 24) nor a known card ({', '.join(GPUS)})"
        )
    return int(gibibytes * 2**30)


def plan(
    name: str,
    context: int | None = None,
    gpu: str | None = None,
    setup: Setup | None = None,
    rope_factor: float = 1.0,
) -> dict[str, Any]:
    """The step's memory with the naive loss and with ours, as `--json` prints it; bytes and tokens.

    Args:
        name: a folder, a hub name, `smollm2` or one of `SHAPES`.
        context: tokens of a row; None: each loss at its longest.
        gpu: as for `parse_gpu`.
        setup: options of training; None: the defaults of `pear sft`.
        rope_factor: the positions are so many times those that the config says, by RoPE scaling that is still to come.

    Raises:
        DataError: see `step_of`; a context of less than 2 tokens or beyond the model's positions.
    """
    if not rope_factor >= 1:
        raise DataError(f"rope_factor must be 1 or more, got {rope_factor}")
    card, setup = parse_gpu(gpu), setup or Setup()
    config = config_of(name)
    positions = position_limit(config)
    if positions is not None:
        positions = int(positions * rope_factor)
    if context is not None and context < 2:
        raise DataError(f"context must be 2 tokens or more, got {context}")
    if context is not None and positions is not None and context > positions:
        raise DataError(
            f"context {context} is longer than the model's {positions} positions (max_position_embeddings of "
            f"{config.model_type!r}): plan a shorter one, or say with rope_factor how far RoPE scaling is to stretch "
            "them (and train with that in the model's config.json: rope_parameters with rope_type, factor, "
            "original_max_position_embeddings)"
        )
    capacity = int(USABLE * card)
    step, batch = step_of(config, setup), setup.per_device_train_batch_size
    losses = {}
    for loss in LOSSES:
        by_memory = step.longest(loss, capacity, batch)
        longest = by_memory if positions is None else min(by_memory, positions)
        shown = step.peak(loss, batch * (context or max(longest, 1)))
        losses[loss] = {
            "moment": shown.moment,
            "parts": shown.parts,
            "total_bytes": shown.total,
            "head_bytes": max(of_head for _, of_head in step.head(loss, batch * (context or max(longest, 1)))),
            "fits": shown.total <= capacity,
            "longest_context": longest,
            "longest_context_by_memory": by_memory,
            "decided_by": _decided_by(step, loss, by_memory, batch, capacity, positions),
        }
    return {
        "model": name,
        "model_type": config.model_type,
        "context": context,
        "positions": positions,
        "gpu_bytes": card,
        "capacity_bytes": capacity,
        "parameters": sum(parameter.numel() for parameter in step.model.parameters()),
        "trained_parameters": sum(p.numel() for p in step.model.parameters() if p.requires_grad),
        "setup": setup._asdict(),
        "losses": losses,
        "would_fit": {} if losses["ours"]["fits"] else _would_fit(config, setup, context, capacity, positions),
    }


# Smaller setups in the order in which to try them: what each is called on the command line, and what it changes.
SMALLER = {
    "--dtype bfloat16": {"dtype": "bfloat16"},
    "--optim adamw_8bit": {"optim": "adamw_8bit"},
    "--use_peft": {"use_peft": True},
    "--use_peft --dtype bfloat16": {"use_peft": True, "dtype": "bfloat16"},
}
ALL_LINEAR = "--lora_target_modules all-linear"  # where PEFT has no choice of its own


def _would_fit(
    config: PretrainedConfig, setup: Setup, context: int | None, capacity: int, positions: int | None
) -> dict[str, int]:
    """The longest context with our loss in each of `SMALLER` that fits, `context` or a token; none: nothing does."""
    found = {}
    for options, changes in SMALLER.items():
        if "use_peft" in changes and not (setup.lora_target_modules or has_own_targets(config)):
            options, changes = f"{options} {ALL_LINEAR}", {**changes, "lora_target_modules": ("all-linear",)}
        if setup._asdict() | changes == setup._asdict():
            continue
        longest = step_of(config, setup._replace(**changes)).longest(
            "ours", capacity, setup.per_device_train_batch_size
        )
        if longest >= (context or 1):
            found[options] = longest if positions is None else min(longest, positions)
    return found


def _decided_by(step: Step, loss: str, longest: int, batch: int, capacity: int, positions: int | None) -> str:
    """What a longer context would have no room for."""
    if positions is not None and longest >= positions:
        return "the model's positions"
    peak = step.peak(loss, batch * max(longest, 1))
    if longest == 0:
        return f"{max(peak.parts, key=peak.parts.get)}: even one token a row does not fit"
    growing = {part: peak.parts[part] for part in ("hidden states", "activations", "head")}
    part = max(growing, key=growing.get)
    return "the head" if part == "head" else f"{part} ({peak.moment})"


def lines(found: dict[str, Any]) -> list[str]:
    """What `plan` found, below its table."""
    texts = []
    for loss, of in found["losses"].items():
        text = f"longest context with {LOSSES[loss]}: {of['longest_context']:,} tokens, decided by {of['decided_by']}"
        if of["longest_context"] < of["longest_context_by_memory"]:
            text += f"; the memory is enough for {of['longest_context_by_memory']:,}"
        texts.append(text)
    for options, longest in found["would_fit"].items():
        texts.append(f"would fit with {options}: {longest:,} tokens with ours")
    if not found["losses"]["ours"]["fits"] and not found["would_fit"]:
        texts.append(f"nothing smaller that was tried fits either ({', '.join(SMALLER)}): a larger --gpu is needed")
    if found["setup"]["optim"].startswith("paged_"):
        texts.append("The optimizer's paged states are counted as the host's, where they go when the GPU is full.")
    return texts


def table(found: dict[str, Any]) -> Table:
    """What `plan` found, in GiB: a column for each loss, at its moment of most memory."""
    at = "each at its longest" if found["context"] is None else f"{found['context']:,} tokens a row"
    batch = found["setup"]["per_device_train_batch_size"]
    rows = f", {batch} rows" if batch > 1 else ""
    made = Table(
        title=f"{found['model']}, {found['parameters'] / 1e9:.3g}B parameters, {at}{rows}", title_justify="left"
    )
    made.add_column("most memory of a step, GiB")
    for name in LOSSES.values():
        made.add_column(name, justify="right")
    of = found["losses"].values()
    for part in PARTS:
        made.add_row(part, *(f"{loss['parts'][part] / 2**30:,.2f}" for loss in of))
    made.add_section()
    made.add_row("together", *(f"{loss['total_bytes'] / 2**30:,.2f}" for loss in of))
    made.add_row(
        f"of {found['capacity_bytes'] / 2**30:,.2f}", *("fits" if loss["fits"] else "does not fit" for loss in of)
    )
    made.add_row("at", *(loss["moment"] for loss in of))
    made.add_row("the head alone, at its own", *(f"{loss['head_bytes'] / 2**30:,.2f}" for loss in of))
    return made
