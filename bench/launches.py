"""Every kind of launch that the package makes, recorded on tensors of device "meta": the list of kernels to compile.

A kernel's code depends on dtypes, options, the tile, and whether a size is 1 or a multiple of 16; on nothing else of a
shape. So one large head represents all heads whose sizes are multiples of 16, and one of odd sizes the others.
"""

import contextlib
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from pear_kernels.backends.triton import launch, tiles, values
from pear_kernels.backends.triton.head import Head, scale_and_round
from pear_kernels.backends.triton.logits_head import LogitsHead
from pear_kernels.backends.triton.pear_weights import PEARWeights
from pear_kernels.backends.triton.product import exp_product
from pear_kernels.engine.head import TopKRows, VocabularyRows
from pear_kernels.engine.packing import Pack
from pear_kernels.options import DIVERGENCES, DivergenceOptions, PEAROptions

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ROWS, VOCABULARY = 8192, 151936
TOP_K = 32
ODD_ROWS, ODD_VOCABULARY, ODD_HIDDEN_SIZE = 1001, 50257, 1000
ALL = {"bias": True, "temperature": 0.7, "softcap": 30.0, "entropy": True}
CHECKED = (  # the columns of calls whose values are checked: of scoring, PEAR, a weighting, GRPO, and all there are
    "target",
    "target cu_seqlens behavior_logprobs",
    "target cu_seqlens ref_logprobs",
    "target cu_seqlens old_logprobs ref_logprobs sampler_logprobs sequence_advantages",
    " ".join(values.COLUMNS),
)
ONE_BY_ONE = [{"bias": True}, {"temperature": 0.7}, {"softcap": 30.0}, {"entropy": True}]


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launches(arch: int) -> list[launch.Launch]:
    """All launches on a GPU of sm_<arch>, for every entry of tiles.json."""
    with recording(arch) as recorded:
        for dtype in (BF16, FP16, FP32):
            for entry in tiles.table()[tiles.recorded_architecture][str(dtype).removeprefix("torch.")]:
                for options in ({}, ALL):
                    head(dtype, ROWS, VOCABULARY, entry["hidden_size"], second_pass=dtype == BF16, **options)
            head(dtype, ODD_ROWS, ODD_VOCABULARY, ODD_HIDDEN_SIZE, second_pass=False, **ALL)
        for options in ONE_BY_ONE:
            head(BF16, ROWS, VOCABULARY, 4096, second_pass=False, **options)
        with float32_products_in_tf32():
            head(FP32, ROWS, VOCABULARY, 4096, second_pass=False)
        for dtype in (FP16, FP32):  # rounded to bfloat16, as autocast does
            head(BF16, ROWS, VOCABULARY, 4096, hidden_dtype=dtype)
        for level, static in itertools.product(("token", "block", "sequence"), (False, True)):
            weights(PEAROptions(level=level), static=static)
        for level, clip_blocks in itertools.product(("block", "sequence"), (False, True)):
            weights(PEAROptions(level=level, clip_blocks=clip_blocks), block_ids=True)
        weights(PEAROptions(level="block", center=True), block_ids=True)
        for given in CHECKED:
            check(given.split())
    return recorded


@contextlib.contextmanager
def recording(arch: int) -> Iterator[list[launch.Launch]]:
    before = launch.recorder, tiles.recorded_architecture
    launch.recorder, tiles.recorded_architecture = [], f"sm_{arch}"
    try:
        yield launch.recorder
    finally:
        launch.recorder, tiles.recorded_architecture = before


@contextlib.contextmanager
def float32_products_in_tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def head(
    dtype: torch.dtype,  # of the products
    rows: int,
    vocabulary: int,
    hidden_size: int,
    *,
    bias: bool = False,
    temperature: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    hidden_dtype: torch.dtype | None = None,  # of the caller's tensors, if it is not that of the products
    second_pass: bool = True,  # of exp_product, too: minutes of compiling, if in all cases
) -> None:
    """Everything that the engine calls on a head, with both variants of product 1 where the dtype has both."""
    begin = len(launch.recorder)
    weight = meta(vocabulary, hidden_size, dtype=hidden_dtype or dtype)
    hidden = meta(rows, hidden_size, dtype=hidden_dtype or dtype)
    target, index = (meta(rows, dtype=torch.int64) for _ in range(2))
    head_bias = meta(vocabulary, dtype=hidden_dtype or dtype) if bias else None
    grad_weight = meta(vocabulary, hidden_size, dtype=FP32)
    grad_bias = meta(vocabulary, dtype=FP32) if bias else None
    for product in tiles.PRODUCTS if dtype != FP16 else ("plain",):
        made = Head(weight, head_bias, temperature, softcap, dtype)
        made.choice = made.choice._replace(product=product)
        x = made.as_operand(hidden)
        made.reserve(rows, False)
        made.softmax(x, target, gradient=False, entropy=entropy)
        made.reserve(rows, True)
        found = made.softmax(x, target, gradient=True, entropy=entropy)
        made.write_grad_hidden_(hidden, index, found.exp, found.row_scale.float(), target, found.target_mass)
        made.add_grad_weight_(grad_weight, found.exp, x, found.row_scale.float(), True)
        for grad in [grad_bias] if bias else [meta(vocabulary, dtype=FP32)]:  # or the columns' mass
            made.add_grad_bias_(grad, found.exp, found.row_scale.float())
        made.compact_(found.exp, None, meta(vocabulary // 5, dtype=torch.int64))
        if made.compute_dtype != FP32:
            scale_and_round(grad_weight, meta(dtype=FP32), dtype)
        for grad in [grad_weight, None] if bias else [grad_weight]:  # a frozen weight's bias may be trained
            made.subtract_targets_(grad, grad_bias, hidden, index, target, found.row_scale.float())
    if entropy:
        logits_head(dtype, weight, head_bias, hidden, target, index, temperature, softcap)
    if not second_pass:
        launch.recorder[begin:] = [found for found in launch.recorder[begin:] if not is_second_pass(found)]


def logits_head(
    dtype: torch.dtype,
    weight: Tensor,
    bias: Tensor | None,
    hidden: Tensor,
    target: Tensor,
    index: Tensor,
    temperature: float,
    softcap: float | None,
) -> None:
    """Everything that the engine calls on a `LogitsHead`, with each kind of teacher and without one."""
    made, teacher = (LogitsHead(weight, bias, temperature, softcap, dtype) for _ in range(2))
    x, rows = made.as_operand(hidden), len(hidden)
    ids, top = meta(rows, TOP_K, dtype=torch.int64), meta(rows, TOP_K, dtype=torch.float64)
    factor = meta(rows, dtype=torch.float64)
    for which in (made, teacher):
        which.reserve(rows, True)
    scores = made.scores(x, target, entropy=True)
    dz, row_scale = made.gradient(scores, factor, factor)
    made.write_grad_hidden_(hidden, index, dz, row_scale.float(), target, None)
    # the code depends on dz's dtype in one store only: each kind is compiled for one dtype
    for kind, soft in itertools.product(DIVERGENCES if dtype == BF16 else ["js"], (1.0, 2.0)):
        options = DivergenceOptions(divergence=kind, distill_temperature=soft)
        in_memory = VocabularyRows(options, teacher.log_softmax(x, soft))
        for rows_of in (in_memory, TopKRows(options, ids, top, factor)):
            made.gradient(made.scores(x, target, teacher=rows_of), factor, None, factor)


def is_second_pass(found: launch.Launch) -> bool:
    return found.kernel is exp_product and found.args[exp_product.arg_names.index("redo")] is not None


def weights(options: PEAROptions, *, static: bool = False, block_ids: bool = False) -> None:
    """A walk of two chunks."""
    tokens = meta(2 * ROWS, dtype=torch.int64)
    counts = meta(2 * ROWS, dtype=torch.bool) if static else None
    pack = Pack(tokens, 2 * ROWS, meta(9, dtype=torch.int64), counts)
    walk = PEARWeights(
        meta(2 * ROWS, dtype=FP32), pack, options, meta(2 * ROWS, dtype=torch.int32) if block_ids else None
    )
    for begin in (ROWS, 0):
        walk.observe(begin, begin + ROWS, meta(ROWS, dtype=torch.float64))
        walk.weights(begin, begin + ROWS)
    walk.sums(walk.logprobs, walk.weights(0, 2 * ROWS))


def check(names: list[str]) -> None:
    """The checks of these columns' values: eight sequences, each number of a dtype that callers pass."""
    by_sequence = {"sequence_advantages": 8, "sequence_scale": 8, "cu_seqlens": 9, "denominator": 1}
    dtypes = {"target": torch.int64, "cu_seqlens": torch.int32, "block_ids": torch.int32}
    columns = {name: meta(by_sequence.get(name, ROWS), dtype=dtypes.get(name, FP32)) for name in names}
    values.check_values(columns, meta(ROWS, dtype=torch.bool), VOCABULARY, -100)
