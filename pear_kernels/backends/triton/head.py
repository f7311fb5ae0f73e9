"""The engine's operations on an NVIDIA GPU: Triton kernels for epilogues and row work, cuBLAS for plain products.

`pear_kernels.backends.torch.head` explains the arithmetic. Three points differ here. E has the operands' dtype, because
the gradient products read it twice; everything else comes from float32 accumulators. The target's part of the gradient
is kept separately in float32 (`target_mass`), so it is not rounded with E. And there is no host sync: the device alone
finds the rows that need another anchor and recomputes their tiles.
"""

from collections.abc import Iterator
from typing import TypeAlias

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from pear_kernels.backends.triton import gradients, rows, tiles
from pear_kernels.backends.triton.formulas import MAX_EXPONENT
from pear_kernels.backends.triton.launch import launch
from pear_kernels.backends.triton.product import exp_product
from pear_kernels.engine.head import Kept, Softmax, padded_vocabulary, triton_row_bytes

ALIGNMENT = 16  # bytes: descriptors and vector loads begin at multiples of it
CACHED_BYTES = 24 << 20  # most bytes of x that row tiles processed together have, so that they stay in the L2 cache
ROW_BLOCK = 1024  # columns per step of a row kernel
TILE_BYTES = 64 << 20  # of float32 rows of dW, where a part of the columns is kept
FLOAT16_PEAK = 1024.0  # largest entry of a float16 operand after scaling: far from float16's largest and smallest
TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# (R,) float64 each: log p, row scale, target mass, top1, and the entropy or None
RowResults: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]


class Head:
    """An LM head: logits = softcap * tanh((x W^T + b) / softcap) / temperature, where each of these is given."""

    dtype = torch.float32  # of accumulators and of the head's gradients
    separate_target = True
    workspace: Tensor | None = None  # (rows, padded V); None in passes that store no logits

    def __init__(
        self,
        weight: Tensor,  # (V, D)
        bias: Tensor | None,  # (V,)
        temperature: float,
        softcap: float | None,
        compute_dtype: torch.dtype,  # operands are rounded to it, as autocast does
    ):
        self.compute_dtype = compute_dtype
        self.weight = self.as_operand(weight)
        self.bias = None if bias is None else self.as_operand(bias)
        self.inverse_temperature = 1.0 / temperature
        self.softcap = 1.0 if softcap is None else float(softcap)
        self.activation = {"SOFTCAP": softcap is not None, "TEMPERATURE": temperature != 1.0}
        self.vocabulary, self.hidden_size = self.planned = weight.shape
        self.architecture = tiles.architecture(weight.device)
        self.choice = tiles.choose(self.architecture, compute_dtype, self.hidden_size)
        self.padded = padded_vocabulary(self.vocabulary)
        aligned = self.hidden_size * compute_dtype.itemsize % ALIGNMENT == 0
        self.descriptors = self.architecture != "sm_80" and aligned
        # the switch that cuBLAS obeys; torch.set_float32_matmul_precision sets it too
        exact = compute_dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"
        self.precision = "tf32x3" if exact else "tf32"

    def _is_plain(self, gradient: bool) -> bool:
        """Whether a pass stores float32 logits, which cuBLAS computes."""
        return self.choice.plain(gradient, self.compute_dtype)

    def row_bytes(self, gradient: bool) -> int:
        plain = self._is_plain(gradient)
        tile = (self.choice.softmax if gradient else self.choice.logprobs).vocabulary
        itemsize = self.compute_dtype.itemsize
        return triton_row_bytes(self.planned[0], self.hidden_size, itemsize, gradient=gradient, plain=plain, tile=tile)

    def reserve(self, rows: int, gradient: bool) -> None:
        device = self.weight.device
        self.workspace = None  # freed before the new one is allocated
        plain = self._is_plain(gradient)
        if gradient or plain:
            dtype = self.dtype if plain else self.compute_dtype
            self.workspace = torch.empty(rows, self.padded, dtype=dtype, device=device)
        if gradient:
            self.grad_rows = torch.empty(rows, self.hidden_size, dtype=self.dtype, device=device)
            self.scaled_rows = torch.empty(rows, self.hidden_size, dtype=self.compute_dtype, device=device)

    def as_operand(self, x: Tensor) -> Tensor:
        """Operand of a product: rounded to the compute dtype, contiguous and aligned; copied only if it is not."""
        x = x.to(self.compute_dtype).contiguous()
        return x.clone() if x.data_ptr() % ALIGNMENT else x

    # ---- first product

    def softmax(
        self, x: Tensor, target: Tensor, *, gradient: bool, entropy: bool = False, logit: Tensor | None = None
    ) -> Softmax:
        if logit is None:
            of_target = self._target_logits(x, target)
        else:  # a shard, whose target_mass is not used; target -1, on another shard, matches no column
            of_target = logit, torch.ones_like(logit), logit.float()
        logprobs, row_scale, target_mass, top1 = (torch.empty_like(of_target[0]) for _ in range(4))
        entropies = torch.empty_like(logprobs) if entropy else None
        out = logprobs, row_scale, target_mass, top1, entropies
        product = self._plain if self._is_plain(gradient) else self._fused
        exp = product(x, target, *of_target, out, gradient)
        # without a gradient nothing reads `exp`
        exp_sum = None if self.activation["SOFTCAP"] else target_mass
        return Softmax(exp, row_scale, logprobs, entropies, target_mass, top1, exp_sum)  # type: ignore[arg-type]

    def target_logits(self, x: Tensor, target: Tensor) -> Tensor:
        return self._target_logits(x, target)[0]

    def _target_logits(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(R,) each: the target's logit and d logit / d raw, float64, and that logit as the anchor, float32."""
        R = len(x)
        logit, slope = (torch.empty(R, dtype=torch.float64, device=x.device) for _ in range(2))
        anchor = torch.empty(R, dtype=torch.float32, device=x.device)
        launch(
            rows.target_logits, (-(-R // 4),),
            x, self.weight, self.bias, target, logit, slope, anchor,
            R, self.hidden_size, self.softcap, self.inverse_temperature,
            **self.activation, BLOCK_R=4, BLOCK_D=256,
        )  # fmt: skip
        return logit, slope, anchor

    def _fused(
        self, x: Tensor, target: Tensor, logit: Tensor, slope: Tensor, anchor: Tensor, out: RowResults, gradient: bool
    ) -> Tensor | None:
        """exp_product and `finish`, twice: the second pass recomputes tiles in which exp would have overflowed."""
        R, V, device = len(x), self.vocabulary, x.device
        tile = self.choice.softmax if gradient else self.choice.logprobs
        row_tiles, tile_count = -(-R // tile.rows), -(-V // tile.vocabulary)
        *_, entropies = out
        sums, maxima = (torch.empty(tile_count, R, dtype=torch.float32, device=device) for _ in range(2))
        exp_logs = None if entropies is None else torch.empty_like(sums)
        redo = torch.zeros(row_tiles + 1, dtype=torch.int32, device=device)
        exp = self.workspace[:R, :V] if gradient and self.workspace is not None else None
        group = max(1, CACHED_BYTES // (tile.rows * self.hidden_size * x.itemsize))
        for again in (False, True):
            # the second pass rarely has work: few programs, which read one number and return
            persistent = tile.persistent and not again
            programs = row_tiles * tile_count
            if persistent or again:
                programs = min(programs, self._multiprocessors())
            launch(
                exp_product, (programs,),
                self._blocks(x, self.hidden_size, tile.rows, tile.depth),
                self._blocks(self.weight, self.hidden_size, tile.vocabulary, tile.depth),
                self._blocks(exp, self.padded, tile.rows, tile.vocabulary // tile.parts), self.padded,
                self.bias, target, anchor, redo if again else None, sums, maxima, exp_logs,
                R, V, self.hidden_size, group, self.softcap, self.inverse_temperature,
                **self.activation, BLOCK_R=tile.rows, BLOCK_V=tile.vocabulary, BLOCK_D=tile.depth, PARTS=tile.parts,
                PERSISTENT=persistent, DESCRIPTORS=self.descriptors, PRECISION=self.precision,
                INTERPRETED=self.architecture == "interpreter",
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
            launch(
                rows.finish, (-(-R // 8),),
                sums, maxima, exp_logs, logit, slope, anchor, redo, *out,
                R, tile_count, self.inverse_temperature, MAX_EXPONENT,
                AGAIN=again, TILE_ROWS=tile.rows, BLOCK_R=8, BLOCK_T=64,
            )  # fmt: skip
        return exp

    def _plain(
        self, x: Tensor, target: Tensor, logit: Tensor, slope: Tensor, _: Tensor, out: RowResults, gradient: bool
    ) -> Tensor | None:
        """cuBLAS's product, then one kernel over its rows; E overwrites the logits."""
        logits, narrow = self._logits(x)
        exp = narrow if gradient else None
        max_exponent = float("-inf") if self.compute_dtype == torch.float16 else MAX_EXPONENT
        launch(
            rows.softmax_rows, (len(x),),
            logits, exp, logits.stride(0), 0 if exp is None else exp.stride(0), self.bias, target, logit, slope,
            *out, self.vocabulary, self.softcap, self.inverse_temperature, max_exponent,
            **self.activation, BLOCK_V=ROW_BLOCK, num_warps=8,
        )  # fmt: skip
        return exp

    def _logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x W^T in float32 (R, V), and the front part of the same rows in the compute dtype."""
        logits, narrow = self._views(len(x))
        multiply(logits, x, self.weight.t())
        return logits, narrow

    def _views(self, rows: int) -> tuple[Tensor, Tensor]:
        """The workspace as float32 logits (R, V), and the front part of its rows in the compute dtype."""
        assert self.workspace is not None  # made by `reserve`
        logits = self.workspace[:rows]
        return logits[:, : self.vocabulary], logits.view(self.compute_dtype)[:, : self.vocabulary]

    def _blocks(self, matrix: Tensor | None, stride: int, rows: int, columns: int) -> Tensor | TensorDescriptor | None:
        """A row-major matrix as exp_product takes it. (`stride` is given because a single row may report any.)"""
        if matrix is None or not self.descriptors:
            return matrix
        return TensorDescriptor(matrix, list(matrix.shape), [stride, 1], [rows, columns])

    def _multiprocessors(self) -> int:
        device = self.weight.device
        return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4

    # ---- second and third product

    def write_grad_hidden_(
        self,
        into: Tensor,
        index: Tensor,
        factor: Tensor,
        row_scale: Tensor,
        target: Tensor,
        target_mass: Tensor | None,
        kept: Kept | None = None,
    ) -> None:
        product = self.grad_rows[: len(factor)]
        if kept is None:
            multiply(product, factor, self.weight)
        else:
            part = product if kept.rows is None else product.new_empty(len(kept.rows), product.shape[1])
            for tile in self._tiles(kept):
                multiply(part, kept.exp[:, tile], self.weight[kept.columns[tile]], add=tile.start > 0)
            if kept.rows is not None:
                product.zero_().index_copy_(0, kept.rows, part)
            product.addr_(kept.rest, kept.mean)
        launch(
            gradients.write_grad_hidden, (len(factor),),
            product, self.weight, row_scale, target, target_mass, index, into, self.hidden_size, BLOCK_D=ROW_BLOCK,
        )  # fmt: skip

    def add_grad_weight_(
        self, grad: Tensor, factor: Tensor, x: Tensor, row_scale: Tensor, first: bool, kept: Kept | None = None
    ) -> None:
        if kept is not None and first:
            grad.zero_()
            first = False
        if kept is not None and kept.rows is not None:
            x, row_scale = x[kept.rows], row_scale[kept.rows]
        scaled = self.scaled_rows[: len(x)]
        unit = self._unit(x, row_scale)
        if unit is not None:
            row_scale = row_scale * unit
            if not first:
                grad.mul_(unit)
        launch(gradients.scale_rows, (len(x),), x, row_scale, scaled, self.hidden_size, BLOCK_D=ROW_BLOCK)
        if kept is None:
            multiply(grad, factor.t(), scaled, add=not first)
        else:
            for tile in self._tiles(kept):
                columns = kept.columns[tile]
                part = grad.new_empty(len(columns), grad.shape[1])
                multiply(part, kept.exp[:, tile].t(), scaled)
                grad.index_add_(0, columns, part)  # each column once, so its order does not matter
        if unit is not None:
            grad.div_(unit)

    def _tiles(self, kept: Kept) -> Iterator[slice]:
        """The columns kept, so many at a time that a copy of their rows of W is small beside the workspace."""
        step = max(128, TILE_BYTES // (self.hidden_size * self.dtype.itemsize))
        for begin in range(0, len(kept.columns), step):
            yield slice(begin, min(begin + step, len(kept.columns)))

    def scaled(self, row_scale: Tensor) -> Tensor:
        return row_scale

    def compact_(self, factor: Tensor, rows: Tensor | None, columns: Tensor) -> Tensor:
        launch(
            gradients.compact_columns, (len(factor),),
            factor, factor.stride(0), columns, len(columns), BLOCK_K=ROW_BLOCK,
        )  # fmt: skip
        kept = factor[:, : len(columns)]
        return kept if rows is None else kept[rows]

    def mean_row(self, mass: Tensor) -> Tensor:
        total = torch.empty(1, self.hidden_size, dtype=self.dtype, device=mass.device)
        part = (mass / mass.amax().clamp(min=torch.finfo(mass.dtype).tiny)).to(self.compute_dtype)
        multiply(total, part[None], self.weight)
        return total[0] / part.sum(dtype=self.dtype).clamp(min=torch.finfo(self.dtype).tiny)

    def _unit(self, x: Tensor, row_scale: Tensor) -> Tensor | None:
        """float16: a power of two () that scales a chunk's c x, which may exceed float16's range, to its middle.

        dW is accumulated in that unit and divided by it again, which rounds nothing and costs two passes over dW per
        chunk. None for the other dtypes, which have float32's range.
        """
        if self.compute_dtype != torch.float16:
            return None
        peak = (row_scale.abs() * x.abs().amax(1).float()).amax()
        return (FLOAT16_PEAK / peak.clamp(2.0**-60, 2.0**60)).log2().floor().exp2()

    def add_grad_bias_(self, grad: Tensor, factor: Tensor, row_scale: Tensor) -> None:
        launch(
            gradients.add_grad_bias, (-(-self.vocabulary // 128),),
            factor, factor.stride(0), row_scale, grad, len(factor), self.vocabulary, BLOCK_R=16, BLOCK_V=128,
        )  # fmt: skip

    def subtract_targets_(
        self,
        grad_weight: Tensor | None,
        grad_bias: Tensor | None,
        hidden: Tensor,
        index: Tensor,
        target: Tensor,
        scale: Tensor,
    ) -> None:
        """Sorts tokens by target, so that one program adds all tokens of a target, in an order that repeats."""
        hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
        targets, order = torch.sort(target, stable=True)
        stops = torch.searchsorted(targets, targets, right=True)
        launch(
            gradients.subtract_targets, (len(target), -(-self.hidden_size // 256) if grad_weight is not None else 1),
            hidden, hidden.stride(0), index, order, targets, stops, scale, grad_weight, grad_bias, self.hidden_size,
            ROUNDED=TRITON_DTYPES[self.compute_dtype], BLOCK_N=8, BLOCK_D=256,
        )  # fmt: skip


def scale_and_round(gradient: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * upstream, rounded to `dtype`, in one pass; `gradient` is contiguous."""
    out = torch.empty_like(gradient, dtype=dtype)
    launch(
        gradients.scale_and_round, (-(-gradient.numel() // 4096),),
        gradient, upstream, out, gradient.numel(), BLOCK=4096, num_warps=8,
    )  # fmt: skip
    return out


def multiply(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> None:
    """out = a b, or out += a b, by cuBLAS: float32 sums and result, whatever the operands' dtype."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=1 if add else 0, out=out)
    elif a.is_cuda:
        torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, beta=1 if add else 0, alpha=1, out=out)
    else:  # Triton's interpreter runs on a CPU, which has no such product
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=1 if add else 0, out=out)
