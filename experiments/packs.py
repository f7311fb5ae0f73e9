"""Which architectures of transformers keep the rows of a pack apart? Each as a tiny random model, by what they compute.

    python -m experiments.packs > experiments/results/packs.md

Every causal language model that transformers knows is made small by rule (two layers, or one of each type of layer), as
far as its config allows. A pack of three rows goes through it with everything that TRL's collator gives; "apart" means
that hidden states are those of each row alone, and that other tokens in the first row leave the other rows as they are.
`check_packs`, by which `pear sft` decides, must say the same of each. It takes a minute on a CPU core.
"""

import contextlib
import logging
import signal
import sys
import warnings

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from pear.attention import check_packs
from pear.io import DataError

VOCABULARY, SECONDS, PARAMETERS = 120, 40, 6_000_000
LENGTHS = (9, 12, 7)
SMALL = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "lru_width", "embedding_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "n_inner", "ffn_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layers", "n_layer"), 2),
    **dict.fromkeys(("num_attention_heads", "n_heads", "n_head", "num_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "linear_num_value_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok", "linear_num_key_heads", "index_n_heads"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("head_dim", "linear_key_head_dim", "linear_value_head_dim", "v_head_dim", "state_size"), 8),
    **dict.fromkeys(("mamba_d_state", "hidden_size_per_layer_input", "index_head_dim", "global_head_dim"), 8),
    **{"mamba_n_heads": 4, "mamba_d_head": 16, "index_topk": 4, "sliding_window": 5},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
LAYERS = {  # where the default config has one type alone
    "lfm2": ["conv", "full_attention"],
}


def small_model(name: str) -> transformers.PreTrainedModel:
    config = CONFIG_MAPPING[name]()
    text = config.get_text_config()
    latent = hasattr(text, "qk_rope_head_dim")  # its heads are of two parts: keep them, and as many keys as queries
    for option, value in SMALL.items():
        off = option in ("q_lora_rank", "sliding_window") and getattr(text, option, None) is None
        if hasattr(text, option) and not off and not (latent and option in ("head_dim", "v_head_dim")):
            with contextlib.suppress(AttributeError, NotImplementedError):  # derived from another option, or fixed
                setattr(text, option, 4 if latent and option == "num_key_value_heads" else value)
    if kinds := LAYERS.get(name) or list(dict.fromkeys(getattr(text, "layer_types", None) or ())):
        try:
            text.num_hidden_layers = max(2, len(kinds))
            text.layer_types = (kinds * 2)[: text.num_hidden_layers]
        except AttributeError:  # derived from something else there
            text.num_hidden_layers = 2
    if kinds := list(dict.fromkeys(getattr(text, "mlp_layer_types", None) or ())):
        text.mlp_layer_types = (kinds * text.num_hidden_layers)[: text.num_hidden_layers]
    kind = type(config) if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else type(text)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[kind]
    attention = "sdpa" if model_class._supports_sdpa else "eager"
    torch.manual_seed(0)
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class._from_config(config, attn_implementation=attention).parameters())
    if size > PARAMETERS:
        raise ValueError(f"still {size} parameters")
    model = model_class._from_config(config, attn_implementation=attention).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:  # wide enough that one token matters to another
                parameter.normal_(0, 0.2)
    return model


@torch.no_grad()
def apart(model: transformers.PreTrainedModel) -> bool:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(5, VOCABULARY, (n,), generator=generator) for n in LENGTHS]
    others = [torch.randint(5, VOCABULARY, LENGTHS[:1], generator=generator), *rows[1:]]
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)

    def hidden(**inputs) -> torch.Tensor:
        inputs.pop("labels", None)
        return model.base_model(**inputs, use_cache=False).last_hidden_state[0]

    packed, changed = (hidden(**collator([{"input_ids": r.tolist()} for r in pack])) for pack in (rows, others))
    alone = torch.cat([hidden(input_ids=row[None]) for row in rows])
    one_by_one = ((packed - alone).norm(dim=-1) / alone.norm(dim=-1)).max() < 1e-3
    return bool(one_by_one and torch.allclose(packed[LENGTHS[0] :], changed[LENGTHS[0] :], atol=1e-4))


def verdict(name: str) -> tuple[str, str]:
    """(apart, together, kernel or not made, the reason)."""
    try:
        model = small_model(name)
        model.base_model(input_ids=torch.arange(5, 12)[None], use_cache=False).last_hidden_state  # noqa: B018
    except Exception as error:
        return "not made", f"{type(error).__name__}: {' '.join(str(error).split()):.90}"
    try:
        check_packs(model, range(5, 40))
        said = None
    except DataError as error:
        said = str(error)
    if said is not None and "reach into" not in said and "start anew" not in said:
        return "kernel", f"{said.split('): ')[1]:.90}"
    if apart(model) != (said is None):
        raise AssertionError(f"{name}: check_packs says {said!r}, and the states say otherwise")
    return ("apart", "") if said is None else ("together", "")


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    found: dict[str, list[tuple[str, str]]] = {"apart": [], "together": [], "kernel": [], "not made": []}

    def too_long(*_) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    signal.signal(signal.SIGALRM, too_long)
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        signal.alarm(SECONDS)
        kind, why = verdict(name)
        signal.alarm(0)
        found[kind].append((name, why))
        print(f"{name}: {kind} {why}", file=sys.stderr)
    heads = {
        "apart": "keep rows apart",
        "together": "do not: rows of a pack reach into each other, and `pear sft` refuses packs",
        "kernel": "ask for a kernel that is not installed here",
        "not made": "could not be made small, or are no decoder, and nothing is known",
    }
    print("# Packs, by architecture\n")
    print("By `python -m experiments.packs`, which says what is asked and how; `check_packs` said the same of each.")
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, CPU, sdpa or else eager.")
    for kind, head in heads.items():
        print(f"\n## {len(found[kind])} {head}\n")
        if kind in ("apart", "together"):
            print(", ".join(name for name, _ in found[kind]))
        else:
            print("| | |\n| --- | --- |")
            for name, why in found[kind]:
                print(f"| {name} | {why.replace('|', ' ')} |")


if __name__ == "__main__":
    main()
