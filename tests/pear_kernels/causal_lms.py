"""Tiny random causal LMs of every family that `patch_causal_lm` is tested with."""

import torch
import transformers
from torch import Tensor

VOCABULARY = 131
SMALL = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    initializer_range=0.3, attn_implementation="eager",
)  # fmt: skip
HEADS = {"head_dim": 8}
EXPERTS = dict(
    num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, output_router_logits=True,
    router_aux_loss_coef=0.5, experts_implementation="eager",
)  # fmt: skip
LATENT = dict(
    num_key_value_heads=4, head_dim=8, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
    v_head_dim=16,
)  # fmt: skip
ROUTED = dict(
    n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, n_group=1, topk_group=1, n_shared_experts=1,
    first_k_dense_replace=1, experts_implementation="eager",
)  # fmt: skip
SLIDING = {**HEADS, "sliding_window": 4}
FAMILIES: dict[str, dict] = {
    "Llama": {},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": HEADS,
    "Qwen2Moe": {**EXPERTS, "shared_expert_intermediate_size": 24},
    "Qwen3Moe": {**EXPERTS, **HEADS},
    "Mistral": {"sliding_window": 4},
    "Ministral": SLIDING,
    "Mixtral": EXPERTS,
    "Gemma": HEADS,
    "Gemma2": {**SLIDING, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "Gemma3": SLIDING,
    "Phi": {},
    "Phi3": {},
    "Phimoe": EXPERTS,
    "Olmo": {},
    "Olmo2": {},
    "Olmo3": {"sliding_window": 4},
    "Olmoe": EXPERTS,
    "FlexOlmo": EXPERTS,
    "SmolLM3": {},
    "Granite": {"logits_scaling": 3.0},
    "GraniteMoe": {**EXPERTS, "logits_scaling": 3.0},
    "Glm": HEADS,
    "Glm4": HEADS,
    "Glm4Moe": {**ROUTED, **HEADS},
    "Cohere": {"logit_scale": 0.25},
    "Cohere2": {"logit_scale": 0.25, "sliding_window": 4},
    "DeepseekV2": {**LATENT, **ROUTED},
    "DeepseekV3": {**LATENT, **ROUTED},
    "Falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 48},
    "GPT2": {},
    "GPTNeoX": {},
    "GPTJ": {"rotary_dim": 8, "n_inner": 48},
    "GPTBigCode": {},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 16, "attn_implementation": "sdpa"},
    "Bloom": {},
    "StableLm": {},
    "Starcoder2": {},
    "Nemotron": {},
    "MiniCPM3": {**LATENT, "dim_model_base": 16},
    "HyperCLOVAX": {"logits_scaling": 0.5},
    "Ernie4_5": {},
    "Ernie4_5_Moe": {**EXPERTS, "moe_k": 2, "moe_num_experts": 4, "moe_layer_start_index": 1},
    "HunYuanDenseV1": HEADS,
    "HunYuanMoEV1": {**EXPERTS, **HEADS, "moe_topk": 2},
    "GptOss": {**EXPERTS, **SLIDING},
    "SeedOss": HEADS,
    "NanoChat": {"final_logit_softcapping": 2.0},
    "ModernBertDecoder": {},
    "Bert": {"is_decoder": True},
    "Electra": {"is_decoder": True, "embedding_size": 16},
    "Inkling": {  # 7 rows of its head are padding
        **HEADS, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "d_rel": 4,
        "dense_intermediate_size": 48, "mlp_layer_types": ["dense"] * 2, "model_max_length": 64,
        "logits_mup_width_multiplier": 3.0, "vocab_size": VOCABULARY + 7, "unpadded_vocab_size": VOCABULARY,
    },
    "Llama4": {**EXPERTS, **HEADS, "interleave_moe_layer_step": 2},
}  # fmt: skip
CLASSES = {"GPT2": "GPT2LMHeadModel", "Bert": "BertLMHeadModel"}
CONFIGS = {"Llama4": "Llama4TextConfig", "Inkling": "InklingTextConfig", "Gemma3": "Gemma3TextConfig"}


def make_lm(family: str, dtype: torch.dtype = torch.float64, **options) -> transformers.PreTrainedModel:
    """In evaluation mode, for no dropout; the same numbers each time."""
    torch.manual_seed(0)
    config = getattr(transformers, CONFIGS.get(family, f"{family}Config"))(**{**SMALL, **FAMILIES[family], **options})
    model = getattr(transformers, CLASSES.get(family, f"{family}ForCausalLM"))(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms are ones and biases zeros at first, which would hide what they do
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def batch() -> dict[str, Tensor]:
    """Two rows (2, 9): one with a prompt, one with padding at its end."""
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[0, :4], labels[1, 7:], mask[1, 7:] = -100, -100, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Of all parameters that have one, and none is left behind."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found
