"""Packs: each row alone against the same row in a pack, by family and attention; what cannot pack is refused."""

import importlib.util

import pytest
import torch
import transformers
from training import assert_close, gradients, make_config
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations import flex_attention as flex
from transformers.masking_utils import flash_attention_mask
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from pear import attention
from pear.attention import attention_for, check_packs, choose_attention
from pear.io import DataError

VOCABULARY = 96
LENGTHS = (11, 13, 9)  # longer than the windows below
SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    initializer_range=0.3, attention_dropout=0.0,
)  # fmt: skip
LAYERS = ["sliding_attention", "full_attention"]
MIXTURE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
FAMILIES = {
    "Llama": {},
    "Qwen2": dict(use_sliding_window=True, sliding_window=5, layer_types=LAYERS),
    "Qwen3": dict(head_dim=16),
    "Qwen3Moe": dict(head_dim=16, **MIXTURE),
    "Mistral": dict(sliding_window=5),
    "Gemma2": dict(head_dim=8, sliding_window=5, layer_types=LAYERS, attn_logit_softcapping=5.0),
    "Gemma3": dict(head_dim=8, sliding_window=5, layer_types=LAYERS),
    "Phi3": {},
    "Olmo3": dict(sliding_window=5, layer_types=LAYERS),
    "Cohere2": dict(sliding_window=5, layer_types=LAYERS),
    "SmolLM3": dict(no_rope_layers=[1, 0]),
    "Granite": {},
    "GPT2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "DeepseekV3": dict(
        num_key_value_heads=4, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, q_lora_rank=16, kv_lora_rank=16,
        n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=16,
        first_k_dense_replace=1,
    ),
}  # fmt: skip
TEXT = {"Gemma3": "Gemma3TextConfig"}  # where the config of the language model is called otherwise


def make(family: str, implementation: str | None = None, dtype: torch.dtype = torch.float64, **options):
    config_class = getattr(transformers, TEXT.get(family, f"{family}Config"))
    model_class = getattr(transformers, family + ("LMHeadModel" if family == "GPT2" else "ForCausalLM"))
    sizes = SIZES if family != "GPT2" else {"vocab_size": VOCABULARY, "initializer_range": 0.3}
    config = config_class(**sizes | FAMILIES.get(family, {}) | options)
    torch.manual_seed(0)
    experts = (
        {"experts_implementation": "eager"} if dtype == torch.float64 else {}
    )  # the other products have no float64
    return model_class._from_config(config, attn_implementation=implementation, **experts).to(dtype).eval()


def rows(first: int = 0) -> list[torch.Tensor]:
    """Rows of LENGTHS; `first` is the seed of the first one alone."""
    seeds = [first + 10, 1, 2]
    return [
        torch.randint(3, VOCABULARY, (n,), generator=torch.Generator().manual_seed(seed))
        for seed, n in zip(seeds, LENGTHS, strict=True)
    ]


def pack(rows: list[torch.Tensor]) -> dict:
    """As TRL's collator lays it out, which `pear sft` uses."""
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    return {k: v for k, v in collator([{"input_ids": row.tolist()} for row in rows]).items() if k != "labels"}


def hidden(model, **inputs) -> torch.Tensor:  # (T, D)
    return model.base_model(**inputs, use_cache=False).last_hidden_state[0]


def varlen_by_hand(
    module, query, key, value, attention_mask, scaling=None, sliding_window=None, softcap=None, **kwargs
):
    """What flash-attn's varlen kernel does, from the bounds that it gets: a loop over the rows, full scores in each."""
    assert attention_mask is None  # (a mask of flash-attn's is one of padding)
    bounds = kwargs.get("cu_seq_lens_q")
    if bounds is None:  # a row alone
        bounds = torch.tensor([0, query.shape[2]])
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)  # (B, H, T, D)
    found = []
    for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        q, k, v = (x[:, :, begin:end] for x in (query, key, value))
        scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        back = torch.arange(end - begin)[:, None] - torch.arange(end - begin)
        hidden_from = back < 0 if sliding_window is None else (back < 0) | (back >= sliding_window)
        found.append(scores.masked_fill(hidden_from, -torch.inf).softmax(-1) @ v)
    return torch.cat(found, dim=2).transpose(1, 2), None


AttentionInterface.register("varlen_by_hand", varlen_by_hand)
AttentionMaskInterface.register("varlen_by_hand", flash_attention_mask)


# ---------------------------------------------------------------------------------------------------------------------
# Rows of a pack are what they are alone


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "varlen_by_hand"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_pack_are_what_they_are_alone(family, implementation):
    """Hidden states and every parameter's gradient, in float64; and all attentions are one function."""
    if family == "Gemma2" and implementation == "sdpa":
        pytest.skip("Gemma 2 has no sdpa: scaled_dot_product_attention has no soft cap")
    model = make(family, implementation)
    direction = torch.randn(sum(LENGTHS), model.config.hidden_size, dtype=torch.float64)

    packed = hidden(model, **pack(rows()))
    (packed * direction).sum().backward()
    packed_gradients = gradients(model)
    plain = make(family, "eager")  # which sees rows as a user without packs has them
    alone = torch.cat([hidden(plain, input_ids=row[None]) for row in rows()])
    (alone * direction).sum().backward()

    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)  # norms and positions are in float32 inside
    assert_close(packed_gradients, gradients(plain), 1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "varlen_by_hand"])
@pytest.mark.parametrize("family", FAMILIES)
def test_another_first_row_changes_no_bit_of_the_others(family, implementation):
    if family == "Gemma2" and implementation == "sdpa":
        pytest.skip("Gemma 2 has no sdpa: scaled_dot_product_attention has no soft cap")
    model = make(family, implementation)
    with torch.no_grad():
        one, other = (hidden(model, **pack(rows(first)))[LENGTHS[0] :] for first in (0, 1))
    if "Moe" in family or family == "DeepseekV3":  # experts get other batches, which may round otherwise
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    else:
        assert torch.equal(one, other)


@pytest.fixture
def flex_without_compiler(monkeypatch):
    """Flex attention on a CPU, forward only; compiled it takes a minute."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    monkeypatch.setattr(flex.WrappedFlexAttention, "__init__", lambda self, training: None)
    monkeypatch.setattr(flex.WrappedFlexAttention, "__call__", lambda self: flex_attention)
    monkeypatch.setattr(
        "transformers.masking_utils.create_block_mask",
        lambda *args, **kwargs: create_block_mask(*args, **kwargs | {"_compile": False}),
    )


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Gemma2", "SmolLM3", "DeepseekV3"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_rows_of_a_pack_are_what_they_are_alone_by_flex_attention(family, flex_without_compiler):
    model, plain = make(family, "flex_attention", torch.float32), make(family, "eager", torch.float32)
    with torch.no_grad():
        packed = hidden(model, **pack(rows()))
        other = hidden(model, **pack(rows(first=1)))
        alone = torch.cat([hidden(plain, input_ids=row[None]) for row in rows()])
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(packed[LENGTHS[0] :], other[LENGTHS[0] :], rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# The trial


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["Llama", "Qwen3Moe", "Gemma2", "GPT2", "DeepseekV3"])
def test_the_trial_passes_what_keeps_rows_apart(family, dtype):
    model = make(family, dtype=dtype).train()
    check_packs(model, range(3, 40))
    assert model.training and all(p.grad is None for p in model.parameters())


STATES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCABULARY)


@pytest.mark.parametrize(
    "family, options",
    [("Falcon", {}), ("OPT", dict(word_embed_proj_dim=32, ffn_dim=48)), ("Bloom", {}), ("Mamba", dict(state_size=4))],
)
def test_the_trial_refuses_models_whose_rows_touch(family, options):
    """And they do touch: the second row's states are others when the first row is another."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**STATES | options)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        one, other = (hidden(model, **pack(rows(first)))[LENGTHS[0] :] for first in (0, 1))
    assert not torch.allclose(one, other)
    with pytest.raises(DataError, match=f"{family}ForCausalLM .*'{family.lower()}'.*reach into each other"):
        check_packs(model, range(3, 40))


@pytest.mark.parametrize("family", ["Qwen3Next", "Lfm2"])
def test_the_trial_refuses_layers_whose_kernels_are_missing(family):
    """By their name where transformers asks for it (5.23), by what they do where it does not (5.17)."""
    if importlib.util.find_spec("causal_conv1d"):
        pytest.skip("causal-conv1d is installed")
    linear = dict(linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)
    options = {
        "Qwen3Next": dict(layer_types=["linear_attention", "full_attention"], head_dim=8, **linear, **MIXTURE),
        "Lfm2": dict(layer_types=["conv", "full_attention"]),
    }
    config = getattr(transformers, f"{family}Config")(**SIZES | options[family])
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with pytest.raises(DataError, match=f"{family}ForCausalLM .*(causal_conv1d|reach into each other).*Turn both off"):
        check_packs(model, range(3, 40))


def test_the_trial_sees_positions_that_go_on():
    model = make("GPT2", dtype=torch.float32)
    model.transformer.wpe.register_forward_pre_hook(
        lambda _module, inputs: (torch.arange(inputs[0].shape[-1]).expand_as(inputs[0]),)
    )
    with pytest.raises(DataError, match="positions do not start anew"):
        check_packs(model, range(3, 40))


def test_nothing_is_tried_where_the_weights_are_not_there():
    with torch.device("meta"):
        check_packs(transformers.FalconForCausalLM(transformers.FalconConfig(**STATES)), range(3, 40))


# ---------------------------------------------------------------------------------------------------------------------
# The choice


def config_of(family: str, **options):
    return getattr(transformers, TEXT.get(family, f"{family}Config"))(**SIZES | FAMILIES[family] | options)


BF16, F32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    "installed, family, options, device, weights, compute, name, why",
    [
        (True, "Llama", {}, "cuda", BF16, BF16, "flash_attention_2", "flash-attn is installed"),
        (True, "Llama", {}, "cuda", F32, BF16, "flash_attention_2", "flash-attn is installed"),
        (True, "Llama", {}, "cuda", F32, F32, "sdpa", "computes in bfloat16 or float16, not torch.float32"),
        (True, "Gemma3", dict(head_dim=512), "cuda", BF16, BF16, "flex_attention", "heads of 512 are too wide"),
        (False, "Llama", dict(head_dim=64), "cuda", BF16, BF16, "flex_attention", "flash-attn is not installed"),
        (False, "Llama", dict(head_dim=8), "cuda", BF16, BF16, "sdpa", "heads of 8 are too narrow"),
        (False, "Llama", dict(head_dim=64), "cuda", F32, BF16, "sdpa", "--dtype bfloat16"),
        (False, "Llama", dict(head_dim=64, attention_dropout=0.1), "cuda", BF16, BF16, "sdpa", "no dropout"),
        (True, "Llama", {}, "cpu", F32, F32, "sdpa", "block-diagonal mask"),
    ],
)
def test_choice(monkeypatch, installed, family, options, device, weights, compute, name, why):
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: installed)
    chosen = choose_attention(config_of(family, **options), device, weights, compute)
    assert chosen.name == name and why in chosen.why


def test_choice_of_a_model_without_sdpa(monkeypatch):
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_supports_sdpa", False)
    assert choose_attention(config_of("Llama"), "cpu", F32, F32).name == "eager"


def test_choice_is_said_in_a_line_and_a_name_is_kept(tmp_path, capsys):
    config = config_of("Llama")
    packed, padded = make_config(tmp_path, packing=True), make_config(tmp_path)
    assert attention_for("auto", packed, config, "float32", "model") == "sdpa"
    assert "attn_implementation of the model: sdpa (with a block-diagonal mask" in capsys.readouterr().out
    assert attention_for("eager", packed, config, "float32", "model") == "eager"
    assert attention_for("auto", padded, config, "float32", "model") is None
    assert attention_for("auto", packed, None, "float32", "model") is None
    assert capsys.readouterr().out == ""


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention", "sdpa"])
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Olmo3"])
def test_on_a_gpu_rows_of_a_pack_are_what_they_are_alone(family, implementation):
    """In bfloat16, against the mask in float64; and another first row changes no bit."""
    if implementation == "flash_attention_2" and not attention.is_flash_attn_2_available():
        pytest.skip("flash-attn is not installed")
    options = {"head_dim": 16} if family == "Llama" else {"hidden_size": 64}  # flex takes no narrower heads
    model = make(family, implementation, torch.bfloat16, **options).cuda()
    plain = make(family, "eager", **options)
    check_packs(model, range(3, 40))
    with torch.no_grad():
        inputs = [{k: v.cuda() if torch.is_tensor(v) else v for k, v in pack(rows(n)).items()} for n in (0, 1)]
        packed, other = (hidden(model, **each) for each in inputs)
        alone = torch.cat([hidden(plain, input_ids=row[None]) for row in rows()])
    assert (packed.double().cpu() - alone).norm() < 0.05 * alone.norm()
    assert torch.equal(packed[LENGTHS[0] :], other[LENGTHS[0] :])
