"""Published shapes of models, by name: what `pear plan` and the bench know without a network.

Numbers are those of each model's config.json on the hub. This file imports nothing of the package, so
that the bench may read it where the trainer's requirements are not installed.
"""

import re


def _model(
    family: dict, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, more: dict | None = None
) -> dict:
    return {
        **family,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        **(more or {}),
    }


def _rope(theta: float, **more) -> dict:
    return {"rope_type": "default", "rope_theta": theta, **more}


TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}

_LLAMA3 = {
    "model_type": "llama",
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
_QWEN25 = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_parameters": _rope(1_000_000.0),
}
_QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_parameters": _rope(1_000_000.0),
}
_GEMMA3 = {  # the text model, without the images' part of 4b and above
    "model_type": "gemma3_text",
    "vocab_size": 262208,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "sliding_window": 1024,
    **TIED,
}
_MISTRAL = {
    "model_type": "mistral",
    "max_position_embeddings": 32768,
    "sliding_window": None,
    "rms_norm_eps": 1e-5,
    "rope_parameters": _rope(1_000_000.0),
    **UNTIED,
}
_PHI = {"model_type": "phi3", "rms_norm_eps": 1e-5, "rope_parameters": _rope(250_000.0), "pad_token_id": 0}
_SMOLLM3 = {
    "model_type": "smollm3",
    "vocab_size": 128256,
    "max_position_embeddings": 65536,
    "rms_norm_eps": 1e-6,
    "rope_parameters": _rope(5_000_000.0),
    **TIED,
}
_SMOLLM2 = {"model_type": "llama", "vocab_size": 49152, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, **TIED}

_LONG = {"max_position_embeddings": 131072}
_QWEN25_LARGE = UNTIED | {"vocab_size": 152064}
_GEMMA3_1B = {"vocab_size": 262144, "sliding_window": 512, "max_position_embeddings": 32768}
_NEMO = {"vocab_size": 131072, "head_dim": 128, **_LONG}
_PHI4 = UNTIED | {"vocab_size": 100352, "max_position_embeddings": 16384}
_PHI4_MINI = TIED | {"vocab_size": 200064, "rope_parameters": _rope(10_000.0, partial_rotary_factor=0.75), **_LONG}

SHAPES: dict[str, dict] = {  # what config.json says, in transformers' names
    "qwen3-0.6b": _model(_QWEN3, 1024, 3072, 28, 16, 8, TIED),
    "qwen3-1.7b": _model(_QWEN3, 2048, 6144, 28, 16, 8, TIED),
    "qwen3-4b": _model(_QWEN3, 2560, 9728, 36, 32, 8, TIED),
    "qwen3-8b": _model(_QWEN3, 4096, 12288, 36, 32, 8, UNTIED),
    "qwen3-14b": _model(_QWEN3, 5120, 17408, 40, 40, 8, UNTIED),
    "qwen3-32b": _model(_QWEN3, 5120, 25600, 64, 64, 8, UNTIED),
    "qwen2.5-0.5b": _model(_QWEN25, 896, 4864, 24, 14, 2, TIED),
    "qwen2.5-1.5b": _model(_QWEN25, 1536, 8960, 28, 12, 2, TIED),
    "qwen2.5-3b": _model(_QWEN25, 2048, 11008, 36, 16, 2, TIED),
    "qwen2.5-7b": _model(_QWEN25, 3584, 18944, 28, 28, 4, _QWEN25_LARGE),
    "qwen2.5-14b": _model(_QWEN25, 5120, 13824, 48, 40, 8, _QWEN25_LARGE),
    "qwen2.5-32b": _model(_QWEN25, 5120, 27648, 64, 40, 8, _QWEN25_LARGE),
    "llama-3.2-1b": _model(_LLAMA3, 2048, 8192, 16, 32, 8, TIED | {"head_dim": 64}),
    "llama-3.2-3b": _model(_LLAMA3, 3072, 8192, 28, 24, 8, TIED | {"head_dim": 128}),
    "llama-3.1-8b": _model(_LLAMA3, 4096, 14336, 32, 32, 8, UNTIED),
    "llama-3.1-70b": _model(_LLAMA3, 8192, 28672, 80, 64, 8, UNTIED),
    "gemma-3-1b": _model(_GEMMA3, 1152, 6912, 26, 4, 1, _GEMMA3_1B),
    "gemma-3-4b": _model(_GEMMA3, 2560, 10240, 34, 8, 4),
    "gemma-3-12b": _model(_GEMMA3, 3840, 15360, 48, 16, 8),
    "gemma-3-27b": _model(_GEMMA3, 5376, 21504, 62, 32, 16, {"head_dim": 128}),
    "mistral-7b-v0.3": _model(_MISTRAL, 4096, 14336, 32, 32, 8, {"vocab_size": 32768}),
    "mistral-nemo-12b": _model(_MISTRAL, 5120, 14336, 40, 32, 8, _NEMO),
    "mistral-small-24b": _model(_MISTRAL, 5120, 32768, 40, 32, 8, _NEMO | {"max_position_embeddings": 32768}),
    "phi-4": _model(_PHI, 5120, 17920, 40, 40, 10, _PHI4),
    "phi-4-mini": _model(_PHI, 3072, 8192, 32, 24, 8, _PHI4_MINI),
    "smollm2-135m": _model(_SMOLLM2, 576, 1536, 30, 9, 3),
    "smollm2-360m": _model(_SMOLLM2, 960, 2560, 32, 15, 5),
    "smollm2-1.7b": _model(_SMOLLM2, 2048, 8192, 24, 32, 32),
    "smollm3-3b": _model(_SMOLLM3, 2048, 11008, 36, 16, 4),
}


def shape_of(name: str) -> dict | None:
    """The shape of `SHAPES` that a hub name means, owner and suffix (-Instruct, -it, -Base) left aside, or None."""
    if name.count("/") > 1:
        return None
    last = name.rsplit("/")[-1].lower().removeprefix("meta-")
    return SHAPES.get(last) or SHAPES.get(re.sub(r"-(instruct|it|base|pt|chat)\b.*", "", last))


GPUS = {  # MiB of memory, as nvidia-smi lists it
    "t4": 15360,
    "l4": 23034,
    "a10": 23028,
    "a10g": 23028,
    "3090": 24576,
    "4090": 24564,
    "5090": 32607,
    "l40s": 46068,
    "a6000": 49140,
    "a100": 81920,
    "h100": 81559,
    "h200": 143771,
    "b200": 183359,
}
