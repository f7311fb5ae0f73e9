"""The tile and the variant of product 1 for an architecture, a dtype and a hidden size: a lookup in tiles.json.

`python -m pear_kernels.backends.triton.autotune` makes the table offline, on the GPU it is for; nothing is tuned during
training. An entry whose `measured` is null was chosen from the compiler's figures alone.
"""

import functools
import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch

TABLE = Path(__file__).with_name("tiles.json")
VARIABLE = "PEAR_KERNELS_PRODUCT"
PRODUCTS = ("fused", "plain")

Table: TypeAlias = dict[str, dict[str, list[dict[str, Any]]]]  # entries by architecture and dtype

# architecture of tensors of device "meta": launches can be recorded for a GPU that is not in this machine
recorded_architecture = "sm_90"


class Tile(NamedTuple):
    """The block of logits that one program computes, and how it is compiled."""

    rows: int
    vocabulary: int
    depth: int  # of the hidden size, per step of the inner loop
    parts: int  # 2: E is stored in two halves, which takes half the shared memory
    warps: int
    stages: int  # of the inner loop's software pipeline
    persistent: bool  # one program per multiprocessor, which loads its next tile while it stores one


class Choice(NamedTuple):
    """An entry of the table."""

    product: str  # "fused" (exp in the product's epilogue) or "plain" (cuBLAS, then a row kernel)
    softmax: Tile  # of exp_product with E
    logprobs: Tile  # of exp_product with sums only

    def plain(self, gradient: bool, dtype: torch.dtype) -> bool:
        """Whether cuBLAS computes the logits of a pass.

        For float32 also without a gradient: no tensor core has a float32 product (on an H100, tf32x3 was biased by
        9e-8 of a logit), and passes with and without a gradient must give the same log-probs.
        """
        return self.product == "plain" and (gradient or dtype == torch.float32)


# small tiles for Triton's interpreter, so that small problems have several
INTERPRETED = Choice("fused", Tile(16, 32, 16, 2, 4, 1, True), Tile(16, 32, 16, 1, 4, 1, False))


def architecture(device: torch.device) -> str:
    """The table's key: "sm_80", also for later GPUs without wgmma or tcgen05, "sm_90" or "sm_100"."""
    if device.type == "meta":
        return recorded_architecture
    if device.type != "cuda":
        return "interpreter"
    major, _ = torch.cuda.get_device_capability(device)
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


@functools.cache
def table() -> Table:
    return json.loads(TABLE.read_text())


def choose(arch: str, dtype: torch.dtype, hidden_size: int) -> Choice:
    """The entry of the nearest hidden size. PEAR_KERNELS_PRODUCT, if set, replaces its product."""
    product = os.environ.get(VARIABLE) or None
    if product not in (None, *PRODUCTS):
        raise ValueError(f"{VARIABLE} must be 'fused' or 'plain', or unset to go by the table, got {product!r}")
    if arch == "interpreter":
        choice = INTERPRETED
    else:
        entries = table()[arch][str(dtype).removeprefix("torch.")]
        entry = min(entries, key=lambda entry: abs(math.log(entry["hidden_size"] / hidden_size)))
        choice = Choice(entry["product"], Tile(**entry["softmax"]), Tile(**entry["logprobs"]))
    if product is not None:
        choice = choice._replace(product=product)
    if dtype == torch.float16:  # E leaves float16's range unless the anchor is the row's maximum
        choice = choice._replace(product="plain")
    return choice
