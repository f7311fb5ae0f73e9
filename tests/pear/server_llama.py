"""A real OpenAI-compatible server for tests: llama.cpp's own, from the package xllamacpp, with a tiny model."""

import contextlib
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

NAME = "tiny-llama"

_SERVE = """
import sys, threading
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.model_alias = sys.argv[1], {sys.argv[2]}
params.hostnames, params.port = ["127.0.0.1"], 0
params.n_ctx, params.n_parallel, params.n_threads_http = 1024, 2, 4
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.cache_ram_mib, params.verbosity = 0, 1
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
if len(sys.argv) > 3:
    params.api_keys = [sys.argv[3]]
server = xllamacpp.Server(params)
print("listening", server.listening_address, flush=True)
sys.stdin.read()  # until the test closes it
"""


def write_gguf(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """A tiny Llama (tests/pear/tiny.py) and its byte-level BPE as llama.cpp reads them, in float32."""
    config = model.config
    state = {name: value.detach().float().numpy() for name, value in model.state_dict().items()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)

    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    special = {token["id"] for token in backend["added_tokens"]}
    kinds = (gguf.TokenType.NORMAL, gguf.TokenType.CONTROL)
    writer.add_token_types([kinds[token in special] for token in range(len(tokenizer))])
    writer.add_token_merges([" ".join(pair) for pair in backend["model"]["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(tokenizer.chat_template)

    def halves_apart(weight: np.ndarray, heads: int) -> np.ndarray:
        """llama.cpp turns neighbours by RoPE, transformers the two halves of a head."""
        parts = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
        return np.ascontiguousarray(parts.swapaxes(1, 2)).reshape(weight.shape)

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, value in state.items():
        if ".q_proj." in name:
            value = halves_apart(value, config.num_attention_heads)
        elif ".k_proj." in name:
            value = halves_apart(value, config.num_key_value_heads)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@contextlib.contextmanager
def llama_server(path: Path, key: str | None = None) -> Iterator[str]:
    """The server's URL, up to /v1; it ends with the block."""
    command = [sys.executable, "-c", _SERVE, str(path), NAME, *([key] if key else [])]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        for line in process.stdout:
            if line.startswith("listening "):
                url = line.split()[1] + "/v1"
                break
        else:
            raise RuntimeError(f"llama.cpp's server ended with status {process.wait()}")
        wait_for(url + "/models", process, key)
        yield url
    finally:
        process.kill()
        with process:  # closes its pipes, and waits
            pass


def wait_for(url: str, process: subprocess.Popen, key: str | None = None, seconds: float = 120) -> None:
    """Until the server answers, or raise."""
    end = time.monotonic() + seconds
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    while process.poll() is None and time.monotonic() < end:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=5).close()
            return
        time.sleep(0.1)
    raise RuntimeError(f"{url}: no answer within {seconds} s, exit status {process.poll()}")
