"""The engine's operations on an NVIDIA GPU: Triton for whatever has an epilogue or works on rows, cuBLAS for products.

Where `pear_kernels.backends.torch.head` explains the arithmetic, this file differs in three points. E has the
operands' dtype, since the gradient products read it twice, and everything else comes from float32 accumulators. The
target's share of the gradient is kept apart in float32 (`target_mass`) and its rounding is not among E's. And nothing
is ever read back: rows that need another anchor are found, and their tiles made again, by the device alone.
"""

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from pear_kernels.backends.triton import gradients, rows, tiles
from pear_kernels.backends.triton.launch import launch
from pear_kernels.backends.triton.product import exp_product
from pear_kernels.engine.head import Softmax, padded_vocabulary, triton_row_bytes

ALIGNMENT = 16  # bytes, of what descriptors and vector loads begin at
MAX_EXPONENT = 40.0  # of exp, as in pear_kernels.backends.torch.head
CACHED_BYTES = 24 << 20  # of x that row tiles worked on together may have, to stay in the L2 cache
ROW_BLOCK = 1024  # columns that a row kernel takes at a time
FLOAT16_PEAK = 1024.0  # to which the largest number of a float16 operand is brought: far from its largest and smallest
TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Head:
    """An LM head: logits = softcap * tanh((x W^T + b) / softcap) / temperature, each part where it is given."""

    dtype = torch.float32  # of accumulators and gradients of the head

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
        # what cuBLAS goes by; set by torch.set_float32_matmul_precision too
        exact = compute_dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"
        self.precision = "tf32x3" if exact else "tf32"

    def row_bytes(self, gradient: bool) -> int:
        plain = self.choice.plain(gradient, self.compute_dtype)
        tile = (self.choice.softmax if gradient else self.choice.logprobs).vocabulary
        itemsize = self.compute_dtype.itemsize
        return triton_row_bytes(self.planned[0], self.hidden_size, itemsize, gradient=gradient, plain=plain, tile=tile)

    def reserve(self, rows: int, gradient: bool) -> None:
        device = self.weight.device
        self.workspace = None
        plain = self.choice.plain(gradient, self.compute_dtype)
        if gradient or plain:
            dtype = self.dtype if plain else self.compute_dtype
            self.workspace = torch.empty(rows, self.padded, dtype=dtype, device=device)
        if gradient:
            self.grad_rows = torch.empty(rows, self.hidden_size, dtype=self.dtype, device=device)
            self.scaled_rows = torch.empty(rows, self.hidden_size, dtype=self.compute_dtype, device=device)

    def as_operand(self, x: Tensor) -> Tensor:
        """Operand of a product: rounded to the compute dtype, contiguous and aligned; a copy only where it is not."""
        x = x.to(self.compute_dtype).contiguous()
        return x.clone() if x.data_ptr() % ALIGNMENT else x

    # ---- first product

    def softmax(
        self, x: Tensor, target: Tensor, *, gradient: bool, entropy: bool = False, logit: Tensor | None = None
    ) -> Softmax:
        if logit is None:
            logit, slope, anchor = self._target_logits(x, target)
        else:  # of a shard, whose target_mass nobody looks at; -1, a target elsewhere, is no column
            slope, anchor = torch.ones_like(logit), logit.float()
        logprobs, row_scale, target_mass, top1 = (torch.empty_like(logit) for _ in range(4))
        entropies = torch.empty_like(logit) if entropy else None
        out = logprobs, row_scale, target_mass, top1, entropies
        if self.choice.plain(gradient, self.compute_dtype):
            exp = self._plain(x, target, logit, slope, out, gradient)
        else:
            exp = self._fused(x, target, logit, slope, anchor, out, gradient)
        return Softmax(exp, row_scale, logprobs, entropies, target_mass, top1)

    def target_logits(self, x: Tensor, target: Tensor) -> Tensor:
        return self._target_logits(x, target)[0]

    def _target_logits(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The target's logit and d logit / d raw (R,) float64, and that logit as the anchor (R,) float32."""
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

    def _fused(self, x, target, logit, slope, anchor, out, gradient: bool) -> Tensor | None:
        """exp_product, and what its sums come to; then the same again for tiles that asked for it."""
        R, V, device = len(x), self.vocabulary, x.device
        tile = self.choice.softmax if gradient else self.choice.logprobs
        row_tiles, tile_count = -(-R // tile.rows), -(-V // tile.vocabulary)
        *_, entropies = out
        sums, maxima = (torch.empty(tile_count, R, dtype=torch.float32, device=device) for _ in range(2))
        exp_logs = None if entropies is None else torch.empty_like(sums)
        redo = torch.zeros(row_tiles + 1, dtype=torch.int32, device=device)
        exp = self.workspace[:R, :V] if gradient else None
        group = max(1, CACHED_BYTES // (tile.rows * self.hidden_size * x.itemsize))
        for again in (False, True):
            # the second look is mostly at nothing: few programs, which one number tells to leave
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
            block = 8
            launch(
                rows.finish, (-(-R // block),),
                sums, maxima, exp_logs, logit, slope, anchor, redo, *out,
                R, tile_count, self.inverse_temperature, MAX_EXPONENT,
                AGAIN=again, TILE_ROWS=tile.rows, BLOCK_R=block, BLOCK_T=64,
            )  # fmt: skip
        return exp

    def _plain(self, x, target, logit, slope, out, gradient: bool) -> Tensor | None:
        """The product by cuBLAS, then one kernel over its rows; E takes the place of the logits."""
        logits, exp = self._logits(x)
        exp = exp if gradient else None
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
        rows = self.workspace[:rows]
        return rows[:, : self.vocabulary], rows.view(self.compute_dtype)[:, : self.vocabulary]

    def _blocks(self, matrix: Tensor | None, stride: int, rows: int, columns: int):
        """A row-major matrix as exp_product takes it. (A single row may have any stride of its own.)"""
        if matrix is None or not self.descriptors:
            return matrix
        return TensorDescriptor(matrix, list(matrix.shape), [stride, 1], [rows, columns])

    def _multiprocessors(self) -> int:
        device = self.weight.device
        return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4

    # ---- second and third product

    def write_grad_hidden_(
        self, into: Tensor, index: Tensor, factor: Tensor, row_scale: Tensor, target: Tensor, target_mass: Tensor | None
    ) -> None:
        product = self.grad_rows[: len(factor)]
        multiply(product, factor, self.weight)
        launch(
            gradients.write_grad_hidden, (len(factor),),
            product, self.weight, row_scale, target, target_mass, index, into, self.hidden_size, BLOCK_D=ROW_BLOCK,
        )  # fmt: skip

    def add_grad_weight_(self, grad: Tensor, factor: Tensor, x: Tensor, row_scale: Tensor, first: bool) -> None:
        scaled = self.scaled_rows[: len(x)]
        unit = self._unit(x, row_scale)
        if unit is not None:
            row_scale = row_scale * unit
            if not first:
                grad.mul_(unit)
        launch(gradients.scale_rows, (len(x),), x, row_scale, scaled, self.hidden_size, BLOCK_D=ROW_BLOCK)
        multiply(grad, factor.t(), scaled, add=not first)
        if unit is not None:
            grad.div_(unit)

    def _unit(self, x: Tensor, row_scale: Tensor) -> Tensor | None:
        """For float16, whose range c x would leave: a power of two () that brings a chunk's c x into the middle of it.

        dW is gathered in that unit and put back, which rounds nothing and costs two passes over dW a chunk. The other
        dtypes have the range of float32.
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
        """Tokens are sorted by target, so that one program has all of a target's and no order is left to chance."""
        hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
        targets, order = torch.sort(target, stable=True)
        stops = torch.searchsorted(targets, targets, right=True)
        launch(
            gradients.subtract_targets, (len(target), -(-self.hidden_size // 256) if grad_weight is not None else 1),
            hidden, hidden.stride(0), index, order, targets, stops, scale, grad_weight, grad_bias, self.hidden_size,
            ROUNDED=TRITON_DTYPES[self.compute_dtype], BLOCK_N=8, BLOCK_D=256,
        )  # fmt: skip


def scale_and_round(gradient: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * upstream in another dtype, in one pass; `gradient` is contiguous."""
    out = torch.empty_like(gradient, dtype=dtype)
    block = 4096
    launch(
        gradients.scale_and_round, (-(-gradient.numel() // block),),
        gradient, upstream, out, gradient.numel(), BLOCK=block, num_warps=8,
    )  # fmt: skip
    return out


def multiply(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> None:
    """out = a b, or out += a b: by cuBLAS, float32 out of whatever operands, whose products are summed in float32."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=1 if add else 0, out=out)
    elif a.is_cuda:
        torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, beta=1 if add else 0, alpha=1, out=out)
    else:  # the interpreter, on a CPU, which has no such product
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=1 if add else 0, out=out)
