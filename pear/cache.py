"""A key-value cache for sampling that writes into room kept ready, where transformers' own copies everything each step.

`DynamicCache` grows by concatenation: each token copies all keys and values so far, which for small models with many
rows is most of the time of sampling. Here each layer keeps a buffer, doubled when it is full; what attention sees is a
view of its filled part, with the same numbers.
"""

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

ROOM = 64  # positions that a layer has room for at first, beyond its prompt


class GrowingLayer(DynamicLayer):
    """Keys and values (B, H, T, head_dim) of one layer: the first T positions of a buffer."""

    _buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if not self._has_room(end):
            self._buffers = tuple(
                new.new_empty(*new.shape[:-2], max(2 * start, end + ROOM), new.shape[-1])
                for new in (key_states, value_states)
            )
            if start:
                for buffer, old in zip(self._buffers, (self.keys, self.values), strict=True):
                    buffer[..., :start, :] = old
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., start:end, :] = new
        self.keys, self.values = (buffer[..., :end, :] for buffer in self._buffers)
        return self.keys, self.values

    def _has_room(self, length: int) -> bool:
        """False also where rows were selected or repeated since, which leaves keys that are no view of the buffer."""
        if self._buffers is None or self._buffers[0].shape[-2] < length:
            return False
        return all(
            view.data_ptr() == buffer.data_ptr() and view.shape[:-2] == buffer.shape[:-2]
            for buffer, view in zip(self._buffers, (self.keys, self.values), strict=True)
        )

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._buffers = None  # the rows that left would hold memory until the next update

    def reset(self) -> None:
        super().reset()
        self._buffers = None


def growing_cache(model: PreTrainedModel) -> DynamicCache | None:
    """A new cache for `model.generate(past_key_values=)`; None for a model whose state is not all keys and values.

    Sliding windows stay transformers' own. States of convolutions and recurrences cannot be selected by rows, and
    models of text and images keep positions outside of the cache.
    """
    config = model.config
    if not model._supports_default_dynamic_cache() or config.is_encoder_decoder:
        return None
    if config.get_text_config(decoder=True) is not config:
        return None
    cache = DynamicCache(config=config)
    if not cache.layers:  # made one by one as they are met, by a configuration that does not name its layers
        return None
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
        return None
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
