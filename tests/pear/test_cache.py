"""The growing cache against transformers' own, which concatenates; and which models it is for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_model
from transformers import (
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import pear.cache
from pear.cache import GrowingLayer, growing_cache

STEPS = st.one_of(
    st.tuples(st.just("update"), st.sampled_from([1, 1, 1, 2, 3, 9])),
    st.tuples(st.just("crop"), st.integers(0, 12)),
    st.tuples(st.just("select"), st.lists(st.integers(0, 99), min_size=1, max_size=6)),
    st.tuples(st.just("reorder"), st.permutations(range(100))),
    st.tuples(st.just("repeat"), st.integers(1, 3)),
    st.tuples(st.just("reset"), st.integers(1, 4)),
)


def apply(layer: DynamicLayer, name: str, argument, rows: int, new: list[torch.Tensor]):
    if name == "update":
        return layer.update(*new)
    if name == "crop":
        layer.crop(-argument)
    elif name == "select":
        layer.batch_select_indices(torch.tensor([i % rows for i in argument]))
    elif name == "reorder":
        layer.reorder_cache(torch.tensor([i for i in argument if i < rows]))
    elif name == "repeat":
        layer.batch_repeat_interleave(argument)
    else:
        layer.reset()
    return layer.keys, layer.values


@pytest.mark.parametrize("room", [1, 4, 64])
@settings(max_examples=150)
@given(rows=st.integers(1, 4), steps=st.lists(STEPS, max_size=25), seed=st.integers(0, 999))
def test_it_holds_what_transformers_own_layer_holds(room, rows, steps, seed):
    rng = torch.Generator().manual_seed(seed)
    ours, theirs = GrowingLayer(), DynamicLayer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pear.cache, "ROOM", room)
        for name, argument in [("update", 2), *steps, ("update", 1)]:
            length = argument if name == "update" else 0
            new = [torch.randn(rows, 2, length, width, generator=rng) for width in (3, 5)]  # unequal heads, as in MLA
            found, expected = (apply(layer, name, argument, rows, new) for layer in (ours, theirs))
            if name == "reset":
                assert found == expected == (None, None)
                rows = argument
            else:
                for mine, other in zip((*found, ours.keys, ours.values), 2 * expected, strict=True):
                    assert (mine is None and other is None) or torch.equal(mine, other)
            if theirs.is_initialized:
                rows = len(theirs.keys)
            assert ours.get_seq_length() == theirs.get_seq_length()
            assert ours.get_mask_sizes(3) == theirs.get_mask_sizes(3)


def test_a_token_is_written_in_place():
    layer = GrowingLayer()
    layer.update(torch.zeros(2, 1, 5, 3), torch.zeros(2, 1, 5, 3))
    where = set()
    for _ in range(pear.cache.ROOM):
        keys, values = layer.update(torch.ones(2, 1, 1, 3), torch.ones(2, 1, 1, 3))
        where.add((keys.data_ptr(), values.data_ptr()))
    assert len(where) == 1
    keys, _ = layer.update(torch.ones(2, 1, 1, 3), torch.ones(2, 1, 1, 3))  # no room is left
    assert keys.shape == (2, 1, 6 + pear.cache.ROOM, 3)
    assert keys.data_ptr() not in {key for key, _ in where}


TEXT = dict(
    vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, pad_token_id=0, eos_token_id=1, bos_token_id=None,
)  # fmt: skip


def test_sliding_windows_stay_transformers_own(tokenizer):
    assert [type(layer) for layer in growing_cache(make_model(tokenizer)).layers] == 2 * [GrowingLayer]
    model = Gemma2ForCausalLM(Gemma2Config(**TEXT, sliding_window=6))
    assert [type(layer) for layer in growing_cache(model).layers] == [DynamicSlidingWindowLayer, GrowingLayer]


MAMBA = dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=8)
OTHERS = {
    "convolutions": lambda: Lfm2ForCausalLM(Lfm2Config(**TEXT, layer_types=["conv", "full_attention"])),
    "states": lambda: MambaForCausalLM(MambaConfig(vocab_size=40, hidden_size=16, state_size=4, num_hidden_layers=2)),
    "states beside attention": lambda: FalconH1ForCausalLM(FalconH1Config(**TEXT, **MAMBA)),
    "an encoder": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4)
    ),
    "images": lambda: Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config=TEXT | dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 1, 1])),
            vision_config=dict(depth=1, hidden_size=16, num_heads=2, intermediate_size=16, out_hidden_size=32),
        )
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_models_whose_state_is_not_all_keys_and_values_have_none(kind):
    assert growing_cache(OTHERS[kind]()) is None
