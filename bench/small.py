"""One small pass of everything on the GPU: what compute-sanitizer watches, since it makes kernels many times slower.

`compute-sanitizer --tool memcheck python -m bench.small`. The shapes have tails in every direction: tokens, vocabulary
and hidden size that are no multiple of a tile, several chunks, a sequence that a chunk's edge cuts.
"""

import torch

from bench.peers import ours_with
from bench.shapes import Shape, make_inputs
from pear_kernels import linear_logprobs, linear_pear_loss


def main() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        x = make_inputs(Shape(333, 72, 1003, dtype, "cuda", sequences=3))
        for level in ("token", "block", "sequence"):
            x.clear()
            out = linear_pear_loss(
                x.hidden,
                x.weight,
                x.target,
                x.behavior_logprobs,
                cu_seqlens=x.cu_seqlens,
                level=level,
                workspace_bytes=1 << 18,
            )
            out.loss.backward()
        for variant in ("fused", "plain"):
            ours_with(variant)(x)
        linear_logprobs(x.hidden.detach(), x.weight.detach(), x.target, return_entropy=True)
        torch.cuda.synchronize()
        finite = all(bool(tensor.isfinite().all()) for tensor in (out.loss, x.hidden.grad, x.weight.grad))
        print(f"{dtype}: loss {out.loss.item():.4f}, all finite: {finite}")


if __name__ == "__main__":
    main()
