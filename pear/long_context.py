"""What `pear sft` looks at before it trains on long rows: their length, optimisers, liger-kernel, offloading.

Each is an option of transformers' or TRL's that is passed through; here stands what has to be true of it, said before a
model is loaded or a file written. Packs and their attention are in attention.py.
"""

import importlib.util
from typing import Any

import pyarrow.compute
from accelerate.logging import get_logger
from datasets import Dataset
from transformers import PretrainedConfig
from trl import SFTConfig

from pear.io import DataError
from pear_kernels.huggingface.positions import position_limit

logger = get_logger("pear.sft")

# Optimisers of transformers that need a package: its name, the extra of ours that installs it, names of the optimisers.
OPTIMIZERS = {
    "bitsandbytes": (
        "adamw_8bit", "adamw_bnb_8bit", "ademamix", "ademamix_8bit", "lion_32bit", "lion_8bit", "paged_adamw_32bit",
        "paged_adamw_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit", "paged_lion_32bit", "paged_lion_8bit",
        "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit",
    ),
    "torchao": ("adamw_torch_8bit", "adamw_torch_4bit"),
}  # fmt: skip


def longest_row(dataset: Dataset) -> int:
    """Tokens of the longest sequence; in a packed dataset, of the sequences in its packs. 0 of an empty one."""
    column = "seq_lengths" if "seq_lengths" in dataset.column_names else "input_ids"
    longest = 0
    for table in dataset.select_columns(column).with_format("arrow").iter(batch_size=1000):
        values = table.column(0)
        if column == "seq_lengths":
            lengths = values.combine_chunks().flatten()
        else:
            lengths = pyarrow.compute.list_value_length(values)
        longest = max(longest, pyarrow.compute.max(lengths).as_py() or 0)
    return longest


def row_limit(max_length: int | None, *configs: PretrainedConfig | None) -> int | None:
    """Tokens of the longest row to train on: `max_length`, and the positions of every model; None without a bound."""
    limits = [max_length, *(position_limit(config) for config in configs if config is not None)]
    return min((limit for limit in limits if limit is not None), default=None)


def check_context(longest: dict[str, int], config: PretrainedConfig | None, of: str = "model") -> None:
    """Raise if a row is longer than the positions of a model. (A pack may be, since positions start anew in it.)

    Args:
        longest: tokens of the longest row, by the name of its dataset
        config: the model's; None where there is none to read
        of: what the model is called in the message
    """
    limit = None if config is None else position_limit(config)
    for name, tokens in longest.items():
        if limit is not None and tokens > limit:
            raise DataError(
                f"{name} dataset: a row of {tokens} tokens, but the {of} has positions for {limit} "
                f"(max_position_embeddings of {config.model_type!r}). Set max_length to {limit} or less, and "
                "drop_long_rows if more than 1 % of the rows are longer; or give RoPE scaling in its config.json "
                "(rope_parameters: rope_type, factor, original_max_position_embeddings), if it can be trusted that far."
            )


def check_optimizer(name: str, options: str | None = None) -> None:
    """Raise if the package of an 8-bit, 4-bit or paged optimiser is missing, or its options are not name=value."""
    if options and any(part.count("=") != 1 for part in options.replace(" ", "").split(",")):
        raise DataError(f"optim_args must be name=value,name=value, got {options!r:.100}")
    for package, optimizers in OPTIMIZERS.items():
        if name in optimizers:
            _check_package(package, f"optim = {name!r}", "use adamw_torch")


def check_quantization(config: PretrainedConfig | None, asked: bool) -> None:
    """Raise if bitsandbytes is missing and weights are to be quantised (`asked`), or were, as the config says."""
    found = getattr(config, "quantization_config", None) or {}
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    if asked or method == "bitsandbytes":
        what = "load_in_4bit or load_in_8bit" if asked else "a model quantised by bitsandbytes"
        _check_package("bitsandbytes", what, "train weights that are not quantised")


def _check_package(package: str, what: str, instead: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise DataError(
            f"{what} needs the package {package}, which is not installed: pip install 'pear-kernels[{package}]'. "
            f"Or {instead}."
        )


def prepare_device_options(args: SFTConfig) -> None:
    """`use_liger_kernel` and `activation_offloading` as this device and our head can have them, in place.

    liger-kernel's norms, rotary embedding and SwiGLU may replace the trunk's; its losses may not, since they would
    replace the forward that runs our head. Without an accelerator both options are left out, with a warning.

    Raises:
        DataError: liger-kernel is not installed; a loss of liger-kernel's was asked for.
    """
    for name, why in (
        ("use_liger_kernel", "liger-kernel's kernels run on an accelerator alone"),
        ("activation_offloading", "there is no accelerator whose memory it would spare"),
    ):
        if getattr(args, name) and not has_accelerator(args):
            logger.warning(f"{name} is left out: {why}. The result is the same.")
            setattr(args, name, False)
    if args.use_liger_kernel:
        if importlib.util.find_spec("liger_kernel") is None:
            raise DataError(
                "use_liger_kernel needs the package liger-kernel, which is not installed: "
                "pip install 'pear-kernels[liger]'. Or leave the option out."
            )
        args.liger_kernel_config = liger_config(args.liger_kernel_config)


def has_accelerator(args: SFTConfig) -> bool:
    return args.device.type != "cpu"


def liger_config(given: dict[str, Any] | None) -> dict[str, Any]:
    """`liger_kernel_config` with what would replace the head turned off; DataError if it was asked for."""
    off = dict.fromkeys(("cross_entropy", "fused_linear_cross_entropy"), False)
    if asked := [name for name in off if (given or {}).get(name)]:
        raise DataError(
            f"liger_kernel_config: {' and '.join(asked)} does not go with `pear sft`, whose own pass takes the place "
            "of head and loss; leave it out"
        )
    return {**(given or {}), **off}
