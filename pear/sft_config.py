"""The options of `pear sft`: TRL's, and those of the loss beside them."""

import os
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from trl import ModelConfig, SFTConfig

from pear.io import DataError
from pear.long_context import check_optimizer
from pear.scored import UNALIGNED
from pear_kernels.options import (
    DEFAULTS,
    DIVERGENCES,
    NEEDS_REF,
    NORMALIZE,
    WEIGHTINGS,
    DivergenceOptions,
    HeadOptions,
    LabelOptions,
    PEAROptions,
    WeightingOptions,
)

CHOICES = {"weighting": ("pear", *WEIGHTINGS), "distill": ("none", *DIVERGENCES)}
OURS = ("clip_blocks", "center", "clip_length", "normalize")  # of PEAROptions, none in the paper
# Weightings by the student as it was before training: column `ref_logprobs`.
REFERENCED = NEEDS_REF
TOP_K = ("top_k_ids", "top_k_logprobs", "top_k_temperature", "top_k_vocabulary")


@dataclass
class PEARSFTConfig(SFTConfig):
    """TRL's SFTConfig and the options of PEAR (arXiv 2602.01058); each is a flag and a YAML key.

    Without an accelerator `bf16` is off unless asked for: bfloat16 is slow and coarse on a CPU.
    """

    weighting: str = field(
        default="pear",
        metadata={
            "help": "What multiplies each token's NLL: 'pear', or 'none' (plain SFT), 'dft' (p), 'idft' (p to a power "
            "by entropy); and by the student as it was before training (data with ref_logprobs): 'iw-sft', 'psft', "
            "'asft', this one also by --teacher.",
            "choices": list(CHOICES["weighting"]),
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
    clip_blocks: bool = field(
        default=DEFAULTS.clip_blocks,
        metadata={
            "help": "Clip a block's summed log-ratio, to log_ratio_clip times its tokens, instead of each token's. "
            "Ours, off by default; level 'block' needs it for rows of another tokenizer."
        },
    )
    center: bool = field(
        default=DEFAULTS.center,
        metadata={
            "help": "Against collapse: subtract each response's mean clipped log-ratio, at levels 'token' and 'block'. "
            "Ours, off by default."
        },
    )
    clip_length: int | None = field(
        default=DEFAULTS.clip_length,
        metadata={
            "help": "Against collapse: log_ratio_clip times clip_length / T in responses of T tokens with a log-ratio, "
            "where that makes it narrower. Ours, off by default."
        },
    )
    normalize: str | None = field(
        default=DEFAULTS.normalize,
        metadata={
            "help": "Against collapse: divide the weights by their mean, over each response ('sequence', at levels "
            "'token' and 'block') or each micro-batch of a process ('batch'). Ours, off by default.",
            "choices": list(NORMALIZE),
        },
    )
    iw_tau: float = field(
        default=WeightingOptions.iw_tau,
        metadata={"help": "iw-sft: factor of a response's mean log-ratio to the student before training."},
    )
    iw_max: float = field(default=WeightingOptions.iw_max, metadata={"help": "iw-sft: the largest weight."})
    psft_clip: float = field(
        default=WeightingOptions.psft_clip,
        metadata={"help": "psft: a token whose probability rose by more than this share rests."},
    )
    asft_kl: float = field(
        default=WeightingOptions.asft_kl, metadata={"help": "asft: factor of the KL to the student before training."}
    )
    idft_clip: list[float] = field(
        default_factory=lambda: list(WeightingOptions.idft_clip),
        metadata={"help": "idft: clip of the power of p: low high."},
    )
    negatives: bool = field(
        default=False,
        metadata={"help": 'Train away from rows with "label": false; the others are right answers. With PEAR alone.'},
    )
    negative_lambda: float = field(
        default=LabelOptions.negative_lambda, metadata={"help": "negatives: factor of the wrong answers' loss."}
    )
    logprob_floor: float = field(
        default=LabelOptions.logprob_floor,
        metadata={"help": "negatives: a wrong token less likely than this log-prob is left alone."},
    )
    distill: str = field(
        default="none",
        metadata={
            "help": "Train towards a teacher's distributions by this divergence instead of the NLL; the teacher is "
            "--teacher, or the data's top_k_logprobs. With weighting 'pear' each token's is weighted, or 'none'.",
            "choices": list(CHOICES["distill"]),
        },
    )
    js_beta: float = field(default=0.5, metadata={"help": "distill js: the teacher's share in the mixture, in (0, 1)."})
    distill_temperature: float = field(
        default=1.0, metadata={"help": "distill: divides the logits of both, in the divergence."}
    )
    nll_coef: float = field(default=0.0, metadata={"help": "distill: factor of the NLL that is added."})
    log_entropy: bool = field(
        default=True,
        metadata={
            "help": "Log the mean entropy of the predictions, as TRL does; off, the head's pass is up to 4 %% faster. "
            "(Never of a teacher's top-k columns, whose pass makes no entropy.)"
        },
    )
    gradient_tolerance: float = field(
        default=HeadOptions.gradient_tolerance,
        metadata={
            "help": "Share of the gradient's mass at the head that may be left out, from 0 to below 1. 0: exact. 0.01 "
            "skips most of the work of the two gradient products on a trained model; losses stay exact. Not with "
            "distill, nor with weighting asft and --teacher."
        },
    )
    workspace_bytes: int | None = field(
        default=None, metadata={"help": "Size of the chunk of logits; changes speed and memory, not the result."}
    )
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of the longest row, and with packing of a pack. Default: the model's positions; of a pack, "
            "the longest row, at least 1024. Longer rows are never cut: more than 1 %% of them are an error, fewer are "
            "left out and counted."
        },
    )
    drop_long_rows: bool = field(
        default=False, metadata={"help": "Leave out any number of rows longer than max_length."}
    )
    strict_length: bool = field(default=False, metadata={"help": "A single row longer than max_length is an error."})

    def __post_init__(self):
        if self.bf16 is None and not torch.accelerator.is_available():
            self.bf16 = False
        super().__post_init__()
        check_optimizer(self.optim, self.optim_args)
        self.pear_options()
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise DataError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        self.weighting_options()
        HeadOptions(gradient_tolerance=self.gradient_tolerance)
        LabelOptions(negative_lambda=self.negative_lambda, logprob_floor=self.logprob_floor)
        DivergenceOptions(js_beta=self.js_beta, distill_temperature=self.distill_temperature, nll_coef=self.nll_coef)
        self._refuse_what_cannot_hold()
        self._refuse_objectives_that_do_not_go_together()

    def pear_options(self) -> PEAROptions:
        return PEAROptions(**{name: getattr(self, name) for name in PEAROptions.names()})

    def weighting_options(self) -> WeightingOptions:
        constants = (name for name in WeightingOptions.names() if name != "weighting")
        return WeightingOptions(**{name: getattr(self, name) for name in constants})

    def loss_options(self, blocks: bool = False) -> dict[str, Any]:
        """What the loss of these options is called with; its kind shows by a key (see `pear.fused_head`).

        `blocks`: together with block_ids. At level "block" they are cut to its block_size; at the others a block is a
        token, or a span of another tokenizer, so that to clip blocks there is to clip what carries a log-ratio.
        """
        options: dict[str, Any] = self.pear_options().asdict() if self.weighting == "pear" else {}
        if options and blocks and self.level != "block":
            options |= {"level": "block" if self.level == "token" else "sequence", "clip_blocks": True}
        if self.distill != "none":
            return options | {
                "divergence": self.distill,
                "js_beta": self.js_beta,
                "distill_temperature": self.distill_temperature,
                "nll_coef": self.nll_coef,
            }
        if self.negatives:
            return options | {"negative_lambda": self.negative_lambda, "logprob_floor": self.logprob_floor}
        if self.weighting == "pear":
            return options
        return self.weighting_options().asdict() | {"weighting": self.weighting}

    def more_columns(self, teacher_in_memory: bool = False) -> tuple[str, ...]:
        """What the data must hold besides `pear.scored.COLUMNS`."""
        columns = ("ref_logprobs",) if self.weighting in REFERENCED and not teacher_in_memory else ()
        columns += ("sequence_label",) if self.negatives else ()
        return columns + (TOP_K if self.distill != "none" and not teacher_in_memory else ())

    @property
    def needs_behavior(self) -> bool:
        """Whether the loss depends on a behaviour policy's log-probs; where not, rows without scores are trained on."""
        return self.weighting == "pear"

    def check_teacher(self, what: str) -> None:
        """Raise unless the loss looks at a teacher in memory; `what` is the subject of the message."""
        if self.distill == "none" and self.weighting != "asft":
            raise DataError(
                f"{what}, but distill is 'none' and weighting {self.weighting!r}, which look at none: set distill to "
                "forward, reverse or js, to train towards it; or weighting to asft, to stay near it, with the model "
                "that training starts from"
            )
        self._refuse_tolerance(self.distill == "none", f"weighting = {self.weighting!r} towards a teacher in memory")

    def _refuse_tolerance(self, is_refused: bool, other: str) -> None:
        if self.gradient_tolerance and is_refused:
            raise DataError(
                f"gradient_tolerance = {self.gradient_tolerance} does not go with {other}, whose gradient is not one "
                "number per token times the probabilities. Set gradient_tolerance to 0"
            )

    def _refuse_objectives_that_do_not_go_together(self) -> None:
        for name in OURS:
            if self.weighting != "pear" and (value := getattr(self, name)) != getattr(DEFAULTS, name):
                raise DataError(
                    f"{name} = {value!r} goes with weighting 'pear' alone, got {self.weighting!r}: it is about PEAR's "
                    "weights"
                )
        if self.negatives and self.weighting != "pear":
            raise DataError(
                f"negatives goes with weighting 'pear' alone, got {self.weighting!r}: how far to push a wrong answer "
                "away is weighted by PEAR"
            )
        if self.negatives and self.normalize == "batch":
            raise DataError(
                "normalize = 'batch' does not go with negatives: one factor for the whole micro-batch would scale "
                "wrong answers too; use 'sequence', which is of right ones alone"
            )
        self._refuse_tolerance(self.distill != "none", f"distill = {self.distill!r}")
        if self.negatives and self.distill != "none":
            raise DataError(f"negatives does not go with distill = {self.distill!r}: a teacher has no wrong answers")
        if self.distill != "none" and self.weighting not in ("pear", "none"):
            raise DataError(
                f"distill = {self.distill!r} goes with weighting 'pear' or 'none', got {self.weighting!r}, which "
                "weights an NLL and not a divergence"
            )

    def _refuse_what_cannot_hold(self) -> None:
        refused = {
            "trust_remote_code": (self.trust_remote_code, "code that comes with a model is never run"),
            "loss_type": (self.loss_type != "nll", "the loss is chosen by `weighting`, `negatives` and `distill`"),
            "label_smoothing_factor": (self.label_smoothing_factor > 0, "it needs the logits, which are never made"),
            "completion_only_loss": (
                self.completion_only_loss is False,
                "there are log-probs for the completion alone",
            ),
            "packing_strategy": (
                self.packing and self.packing_strategy != "bfd",
                "it cuts responses: what follows a cut has lost its prompt (and with 'wrapped', packed rows attend to "
                "each other), so its log-probs and weights are not the row's; use 'bfd', which packs whole rows",
            ),
            "eval_packing": (
                bool(self.eval_packing) and not self.packing,
                "TRL lays out packed rows as such only with packing on; else they attend to each other",
            ),
        }
        for name, (is_refused, why) in refused.items():
            if is_refused:
                raise DataError(f"{name} = {getattr(self, name)!r} does not go with `pear sft`: {why}")
        if self.max_length is not None and self.max_length < 2:
            raise DataError(f"max_length must be at least 2 (one token to predict another from), got {self.max_length}")
        if self.strict_length and self.drop_long_rows:
            raise DataError("strict_length and drop_long_rows are opposites: give one of them")


@dataclass
class ModelArguments(ModelConfig):
    """TRL's ModelConfig, with an attention that suits packs unless one is named."""

    attn_implementation: str | None = field(
        default="auto",
        metadata={
            "help": "The attention of student and teacher. 'auto': of packs (packing, padding_free) flash-attn where "
            "it is installed and a GPU runs it, else flex attention on a GPU, else sdpa; of padded rows transformers' "
            "own choice. Or any of transformers' names: flash_attention_2, flex_attention, sdpa, eager, ..."
        },
    )


def eval_files(given: str | list[str] | dict[str, str] | None) -> dict[str, str]:
    """`--eval_data` (or a YAML file's: a path, a list or a mapping) as files by name, "" of one that has none."""
    if isinstance(given, dict):
        named = [(str(name), str(path)) for name, path in given.items()]
    else:
        words = [given] if isinstance(given, str) else list(given or [])
        named = [word.split("=", 1) if "=" in word and not os.path.exists(word) else ("", word) for word in words]
    files = dict(named)
    if len(files) < len(named) or (len(files) > 1 and "" in files):
        raise DataError(
            f"eval_data: several files need a name each, NAME=FILE, and all different; got {' '.join(map(str, given))}"
        )
    for name, path in named:
        if not path or ((name or isinstance(given, dict)) and not re.fullmatch(r"[A-Za-z0-9_-]+", name)):
            raise DataError(
                f"eval_data: {name}={path} must be NAME=FILE, the name of letters, digits, - and _, as it becomes part "
                "of eval_NAME_loss"
            )
    return files


@dataclass
class DataArguments:
    """Which files and which model."""

    data: str | None = field(
        default=None,
        metadata={
            "help": "Training rows, as written by `pear score`; for weighting none, dft and idft also without scores."
        },
    )
    eval_data: list[str] | None = field(
        default=None,
        metadata={
            "help": "Rows to evaluate on, of the same kinds: a file, or several as NAME=FILE NAME=FILE, each of which "
            "has its own eval_NAME_loss and other figures."
        },
    )
    model: str | None = field(
        default=None, metadata={"help": "The student: smollm2, a transformers folder or a hub name."}
    )
    teacher: str | None = field(
        default=None,
        metadata={
            "help": "A model held in memory beside the student. distill: the teacher; without it, the data's top-k. "
            "weighting asft: the model that training starts from, for the KL over the whole vocabulary; without it, "
            "the data's ref_logprobs."
        },
    )
    unaligned: str = field(
        default="error",
        metadata={
            "help": "Rows of another tokenizer that cannot be aligned with the student's tokens: 'error', or 'skip', "
            "which leaves them out and tells their lines.",
            "choices": list(UNALIGNED),
        },
    )
    roles: str | None = field(
        default=None,
        metadata={
            "help": "YAML of roles and the structural tokens that play them, for rows of another tokenizer; see "
            "docs/tokenizers.md."
        },
    )
    merge_adapter: bool = field(
        default=True,
        metadata={"help": "LoRA: write a plain merged model to output_dir (the adapter alone goes to adapter/)."},
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={
            "help": "Replace the model and the checkpoints that another run left in output_dir; else they are an error."
        },
    )
