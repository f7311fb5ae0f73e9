"""The custom op of `pear_weights`."""

import torch
from torch import Tensor

from pear_kernels.engine.packing import pack_tokens, unpack
from pear_kernels.ops import backends
from pear_kernels.ops.call import TAGS, known_tokens, parse
from pear_kernels.options import HeadOptions, PEAROptions


@torch.library.custom_op("pear_kernels::pear_weights", mutates_args=(), tags=TAGS)
def pear_weights(
    logprobs: Tensor,  # (N,)
    mask: Tensor,  # (N,) bool
    columns: list[Tensor],  # behavior_logprobs (N,), cu_seqlens (S+1,), and block_ids (N,) where given
    numbers: Tensor,  # (k,) float64 on the CPU
    spec: str,  # `call.Spec`
) -> Tensor:
    """(N,) weights in the dtype of `logprobs`."""
    given = parse(spec)
    options, named = given.decode(numbers), dict(zip(given.columns, columns, strict=True))
    behavior, cu_seqlens, block_ids = named["behavior_logprobs"], named["cu_seqlens"], named.get("block_ids")
    backend = backends.choose(options[HeadOptions].backend, logprobs.device, logprobs.dtype)
    backend.check_values(named, mask)
    pack = pack_tokens(mask, cu_seqlens, tokens=known_tokens(options, mask, "response tokens"))
    ids = None if block_ids is None else pack.take(block_ids)
    made = backend.weights(pack.take(behavior), pack, options[PEAROptions], ids)
    made.observe(0, pack.tokens, pack.take(logprobs))
    weights, scale = made.weights(0, pack.tokens), made.rescale()
    weights = weights if scale is None else weights * scale
    return unpack(weights, pack, logprobs.numel(), logprobs.dtype)


@pear_weights.register_fake
def _(logprobs, *_):
    return logprobs.new_empty(logprobs.shape)
