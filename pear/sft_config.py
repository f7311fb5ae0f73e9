"""The options of `pear sft`: TRL's, and PEAR's beside them."""

from dataclasses import dataclass, field

import torch
from trl import SFTConfig

from pear.io import DataError
from pear_kernels.checks import check_options
from pear_kernels.weights import DEFAULTS, PEAROptions


@dataclass
class PEARSFTConfig(SFTConfig):
    """TRL's SFTConfig and the options of PEAR (arXiv 2602.01058); each is a flag and a YAML key.

    Without an accelerator `bf16` is off unless asked for: bfloat16 is slow and coarse on a CPU.
    """

    weighting: str = field(
        default="pear",
        metadata={
            "help": "'pear' weights each token's loss, 'none' is plain SFT on the same data, batches and code.",
            "choices": ["pear", "none"],
        },
    )
    level: str = field(
        default=DEFAULTS.level,
        metadata={
            "help": "What a PEAR weight sums over: the tokens, blocks or whole of a response.",
            "choices": ["token", "block", "sequence"],
        },
    )
    block_size: int = field(
        default=DEFAULTS.block_size, metadata={"help": "Response tokens in a block, at level 'block'."}
    )
    gamma: float = field(
        default=DEFAULTS.gamma, metadata={"help": "Discount in (0, 1], at levels 'token' and 'block'."}
    )
    log_ratio_clip: list[float] = field(
        default_factory=lambda: list(DEFAULTS.log_ratio_clip),
        metadata={"help": "Clip of each token's log-ratio of student and behaviour policy: low high."},
    )
    log_weight_clip: list[float] = field(
        default_factory=lambda: list(DEFAULTS.log_weight_clip),
        metadata={"help": "Clip of each weight's logarithm, last: low high."},
    )
    workspace_bytes: int | None = field(
        default=None, metadata={"help": "Size of the chunk of logits; changes speed and memory, not the result."}
    )
    strict_length: bool = field(
        default=False,
        metadata={"help": "Stop at a row longer than max_length, instead of counting it and leaving it out."},
    )

    def __post_init__(self):
        if self.bf16 is None and not torch.accelerator.is_available():
            self.bf16 = False
        super().__post_init__()
        check_options(self.pear_options())
        if self.weighting not in ("pear", "none"):
            raise DataError(f"weighting must be 'pear' or 'none', got {self.weighting!r}")
        self._refuse_what_cannot_hold()

    def pear_options(self) -> PEAROptions:
        return PEAROptions(
            self.level, self.block_size, self.gamma, tuple(self.log_ratio_clip), tuple(self.log_weight_clip)
        )

    def _refuse_what_cannot_hold(self) -> None:
        refused = {
            "trust_remote_code": (self.trust_remote_code, "code that comes with a model is never run"),
            "loss_type": (self.loss_type != "nll", "the loss is PEAR's, over the NLL"),
            "label_smoothing_factor": (self.label_smoothing_factor > 0, "it needs the logits, which are never made"),
            "assistant_only_loss": (self.assistant_only_loss, "what counts is the scored file's `completion_mask`"),
            "completion_only_loss": (
                self.completion_only_loss is False,
                "there are behaviour log-probs for the completion alone",
            ),
            "packing_strategy": (
                self.packing and self.packing_strategy != "bfd",
                "it cuts responses, and a weight looks at the whole response; use 'bfd'",
            ),
            "eval_packing": (
                bool(self.eval_packing) and not self.packing,
                "TRL lays out packed rows as such only with packing on; else they attend to each other",
            ),
        }
        for name, (is_refused, why) in refused.items():
            if is_refused:
                raise DataError(f"{name} = {getattr(self, name)!r} does not go with `pear sft`: {why}")
        if self.packing and self.max_length is None:
            raise DataError("packing needs max_length, the length of a pack; got None")


@dataclass
class DataArguments:
    """Which files and which model."""

    data: str | None = field(default=None, metadata={"help": "Training rows, as written by `pear score`."})
    eval_data: str | None = field(default=None, metadata={"help": "Rows to evaluate on, as written by `pear score`."})
    model: str | None = field(
        default=None, metadata={"help": "The student: smollm2, a transformers folder or a hub name."}
    )
    merge_adapter: bool = field(
        default=True,
        metadata={"help": "LoRA: write a plain merged model to output_dir (the adapter alone goes to adapter/)."},
    )
