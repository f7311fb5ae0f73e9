"""`pear import`: log-probs from elsewhere, checked and written as scored rows.

A source (vllm, sglang, openai, columns) reads a record into `Generation`s, `rows` makes scored rows of them, `client`
and `live` ask a server. docs/import.md is the user's side.
"""

from pear.importing.run import SOURCES, import_logprobs
from pear.importing.vllm import from_vllm

__all__ = ["SOURCES", "from_vllm", "import_logprobs"]
