"""A tokenizer and models small enough to make anew in every test."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from pear_kernels.huggingface.treatment import ROW

CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "What is 3 plus 4? It is 7. What is 12 minus 5? It is 7 again.",
    "Use the numbers 3, 7 and 21 to make 24: 3 + 21 = 24, and 7 is left over.",
    "Let us think step by step. First we add, then we multiply, and the answer is there.",
]

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tokenizer(corpus: list[str] = CORPUS, vocab_size: int = 400) -> PreTrainedTokenizerBase:
    """Byte-level BPE with ChatML, eos `<|im_end|>` and a pad token of its own."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False
    )
    backend.train_from_iterator(corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|pad|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(
    tokenizer: PreTrainedTokenizerBase, kind: str = "llama", tied: bool = False, seed: int = 0, scale: float = 0.3
) -> PreTrainedModel:
    """Two layers, 32 wide; `scale` is the spread of the weights, wide enough for distributions that are not flat."""
    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    }[kind]
    config = config_class(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        initializer_range=scale,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(seed)
    return model_class(config).eval()


def forbid_logits(model: PreTrainedModel) -> None:
    """From now on the head may make no logits, but for the short row that is compared when a model is patched."""

    def check(_module, _inputs, output):
        assert output.shape[-1] == 1 or output.shape[:-1].numel() <= ROW, f"logits of {tuple(output.shape)}"

    model.get_output_embeddings().register_forward_hook(check)
