"""What a head does to its raw logits: softcap and temperature. Values and derivatives, in PyTorch (Triton has its own).

    z = softcap * tanh(raw / softcap) / temperature        dz / draw = (1 - tanh(raw / softcap)^2) / temperature

The slope below leaves the factor 1 / temperature out: callers put it into a per-row scale.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Activation(NamedTuple):
    """Softcap and temperature of one head."""

    temperature: float  # divides the logits
    softcap: float | None  # bound of the logits before the temperature; None: no bound

    def apply_(self, raw: Tensor) -> Tensor | None:
        """Raw logits to activated ones, in place. Returns tanh(raw / softcap), from which `slope_of_tanh_` follows."""
        if self.softcap is None:
            if self.temperature != 1.0:
                raw.div_(self.temperature)
            return None
        tanh = torch.tanh(raw / self.softcap)
        torch.mul(tanh, self.softcap / self.temperature, out=raw)
        return tanh

    def slope(self, z: Tensor, shift: Tensor | float = 0.0) -> Tensor | None:
        """Slope at the activated logits `z + shift`; None stands for ones, where the head has no softcap."""
        return None if self.softcap is None else slope_of_tanh_((z + shift).mul_(self.temperature / self.softcap))


def slope_of_tanh_(tanh: Tensor) -> Tensor:
    """1 - tanh^2, in place."""
    return tanh.square_().neg_().add_(1.0)
