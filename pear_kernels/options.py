"""Every option of the package: its default, its meaning and its check, each in this one place.

A group of options is a frozen dataclass, which checks its fields when it is made. The public functions take the fields
as keywords (typed by the `*Keywords` below, PEP 692), or objects of these classes as `options=`, or both. `encode`
turns objects into what the custom ops take: a string, which `torch.compile` guards on, and numbers, which are data to
it."""

import ast
import dataclasses
import functools
import inspect
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypedDict, TypeVar

import torch

BACKENDS = ("triton", "torch")
LEVELS = ("token", "block", "sequence")
NORMALIZE = ("sequence", "batch")
WEIGHTINGS = ("none", "dft", "iw-sft", "psft", "asft", "idft")
NEEDS_REF = ("iw-sft", "psft", "asft")  # the weightings that are made of ref_logprobs
OBJECTIVES = ("ppo", "grpo", "dapo", "bnpo", "dr_grpo", "gspo", "gspo_token", "cispo", "sapo", "reinforce")
DIVERGENCES = ("forward", "reverse", "js")
REDUCTIONS: tuple[str, ...] = ("mean", "sum", "sequence_mean")
POLICY_REDUCTIONS = (*REDUCTIONS, "constant_length")

F = TypeVar("F", bound=Callable[..., Any])


# ---- checks of one field


def is_number(value: Any, kind: type = numbers.Real) -> bool:
    """A number of Python's or NumPy's, or what stands for one while `torch.compile` traces."""
    return isinstance(value, (kind, torch.SymInt, torch.SymFloat)) and not isinstance(value, bool)


def is_count(value: Any) -> bool:
    """An integer of at least 1."""
    return is_number(value, numbers.Integral) and value >= 1


def positive(value: Any) -> bool:
    """A finite number above 0. Comparisons trace where `math.isfinite` does not."""
    return is_number(value) and 0 < value < math.inf


def listed(choices: Iterable[str]) -> str:
    return ", ".join(map(repr, choices))


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {listed(choices)}, got {value!r}")


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def check_finite(name: str, value: Any) -> None:
    if not (is_number(value) and -math.inf < value < math.inf):
        raise ValueError(f"{name} must be a finite number, got {value!r}")


def check_at_least_0(name: str, value: Any) -> None:
    if not (is_number(value) and 0 <= value < math.inf):
        raise ValueError(f"{name} must be a number of at least 0, got {value!r}")


def check_bounds(name: str, value: Any) -> tuple[Any, Any]:
    if not isinstance(value, (tuple, list)) or len(value) != 2 or not all(map(is_number, value)):
        raise ValueError(f"{name} must be two numbers (low, high), got {value!r}")
    return value[0], value[1]


def check_backend(backend: str | None, name: str = "backend") -> str | None:
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"{name} must be 'triton' or 'torch', or unset to go by the device, got {backend!r}")
    return backend


# ---- the groups


class Options:
    """Base of all groups: what a NamedTuple has, with fields that are given by name only."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def __post_init__(self) -> None:
        """Lists become tuples, so that an object is constant and can be hashed."""
        for name in self.names():
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))

    def replace(self, **changes: Any) -> Self:
        """A copy with other values in these fields, checked again."""
        return dataclasses.replace(self, **changes)

    def asdict(self) -> dict[str, Any]:
        """Values by their fields' names."""
        return {name: getattr(self, name) for name in self.names()}

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The fields' names, in order."""
        return tuple(cls.__dataclass_fields__)


@dataclass(frozen=True, kw_only=True)
class HeadOptions(Options):
    """The LM head and the pass over it: logits = softcap * tanh((x W^T + b) / softcap) / temperature.

    Attributes:
        temperature: divides the logits.
        softcap: bound of the logits, for heads that have one; None: no bound.
        ignore_index: the target of tokens that do not count.
        workspace_bytes: bytes of one chunk of logits. None: the size of a float32 gradient of the head, within 128 MiB
            and 1 GiB. It changes speed and memory, not the result.
        backend: "triton", kernels for NVIDIA GPUs of compute capability 8.0 or newer, or "torch", any device. None: the
            environment variable PEAR_KERNELS_BACKEND, or else the kernels wherever they run. float64 is always computed
            by "torch".
    """

    temperature: float = 1.0
    softcap: float | None = None
    ignore_index: int = -100
    workspace_bytes: int | None = None
    backend: str | None = None

    def __post_init__(self) -> None:
        if not positive(self.temperature):
            raise ValueError(f"temperature must be a positive number, got {self.temperature!r}")
        if self.softcap is not None and not positive(self.softcap):
            raise ValueError(f"softcap must be a positive number, or None for a head without one, got {self.softcap!r}")
        # options travel to the ops as float64, which holds these integers exactly
        if not (is_number(self.ignore_index, numbers.Integral) and -(2**53) <= self.ignore_index <= 2**53):
            raise ValueError(f"ignore_index must be an integer of at most 2**53 in size, got {self.ignore_index!r}")
        if self.workspace_bytes is not None and not is_count(self.workspace_bytes):
            raise ValueError(
                f"workspace_bytes must be a positive integer of bytes, or None, got {self.workspace_bytes!r}"
            )
        check_backend(self.backend)


@dataclass(frozen=True, kw_only=True)
class PEAROptions(Options):
    """How log-probs become PEAR weights G (arXiv 2602.01058, section 3; `formulas.weights` has the formulas).

    The defaults are the paper's. The options from `clip_blocks` on are not in the paper: they are this package's,
    against weights that collapse, and off by default.

    Attributes:
        level: "token", "block" or "sequence".
        block_size: B, in response tokens, for level "block".
        gamma: discount per later token, in (0, 1]; not used at level "sequence".
        log_ratio_clip: (low, high) bounds of log pi - log pi_b of one token.
        log_weight_clip: (low, high) bounds of log G.
        clip_blocks: clip the summed log-ratio of each block, to the number of its log-ratios times log_ratio_clip,
            instead of each token's. For blocks whose log-prob is known only as a whole, such as those of another
            tokenizer. Blocks are those of block_ids, or block_size tokens; at level "token" it changes nothing.
        center: subtract from each delta its mean over the sequence (of clipped deltas; the result is not clipped
            again). Not at level "sequence", where every weight would be 1.
        clip_length: in a sequence of T log-ratios, log_ratio_clip is scaled by min(1, clip_length / T), so that log G
            cannot move further than in a sequence of clip_length log-ratios. None: no scaling.
        normalize: "sequence" or "batch": divide the weights by their mean over the response tokens of the sequence (not
            at level "sequence"), or of the call. None: neither.
    """

    level: str = "token"
    block_size: int = 4
    gamma: float = 0.999
    log_ratio_clip: tuple[float, float] = (-0.08, 0.3)
    log_weight_clip: tuple[float, float] = (-10.0, 5.0)
    clip_blocks: bool = False
    center: bool = False
    clip_length: int | None = None
    normalize: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("level", self.level, LEVELS)
        if not is_count(self.block_size):
            raise ValueError(
                f"block_size must be an integer of at least 1 (response tokens a block), got {self.block_size!r}"
            )
        if not (is_number(self.gamma) and 0 < self.gamma <= 1):
            raise ValueError(f"gamma must be in (0, 1], got {self.gamma!r}")
        for name in ("log_ratio_clip", "log_weight_clip"):
            low, high = check_bounds(name, getattr(self, name))
            if not low <= high:  # NaN compares false
                raise ValueError(
                    f"{name} must be (low, high) with low <= high, got {getattr(self, name)!r}: swap the two"
                )
        if self.log_weight_clip[1] == math.inf:
            raise ValueError(f"log_weight_clip must have a finite upper end, got {self.log_weight_clip!r}")
        for name in ("clip_blocks", "center"):
            check_flag(name, getattr(self, name))
        if self.clip_length is not None and not is_count(self.clip_length):
            raise ValueError(
                "clip_length must be an integer of at least 1 (tokens with a log-ratio), or None, got "
                f"{self.clip_length!r}"
            )
        if self.normalize is not None and self.normalize not in NORMALIZE:
            raise ValueError(f"normalize must be None or one of {listed(NORMALIZE)}, got {self.normalize!r}")
        for name, given in (("center", self.center), ("normalize", self.normalize == "sequence")):
            if self.level == "sequence" and given:
                raise ValueError(
                    f"{name} must be off at level 'sequence', got {getattr(self, name)!r}: a sequence's tokens share "
                    "one weight there, and all of them would be 1"
                )

    @property
    def coupled(self) -> bool:
        """Whether a weight depends on all tokens of its sequence."""
        return self.level == "sequence" or self.center or self.normalize == "sequence"

    @property
    def separable(self) -> bool:
        """Whether a coupled weight is a part known at once times one factor per sequence."""
        return not self.center

    @property
    def is_paper(self) -> bool:
        """Whether every option that the paper does not have is off."""
        return not (self.clip_blocks or self.center or self.clip_length or self.normalize)


@dataclass(frozen=True, kw_only=True)
class LabelOptions(Options):
    """How `linear_pear_loss` pushes wrong sequences away (arXiv 2602.01058, section 3.6), where there are labels.

    Attributes:
        negative_lambda: strength of the repulsive term, at least 0. The paper gives no value; 0.1 is this package's.
        logprob_floor: a wrong token whose log-prob is at or below this is not pushed further; -inf: no bound. This
            package's, not the paper's.
    """

    negative_lambda: float = 0.1
    logprob_floor: float = -5.0

    def __post_init__(self) -> None:
        check_at_least_0("negative_lambda", self.negative_lambda)
        if not (is_number(self.logprob_floor) and self.logprob_floor <= 0):  # NaN compares false
            raise ValueError(
                f"logprob_floor must be a log-prob, at most 0 (-inf for no bound), got {self.logprob_floor!r}: wrong "
                "tokens below it are not pushed further"
            )


@dataclass(frozen=True, kw_only=True)
class WeightingOptions(Options):
    """A named weighting of `linear_weighted_loss` and its constants, whose defaults are those of their papers.

    Attributes:
        weighting: a row of the table of `linear_weighted_loss`; None: the caller gives the weights.
        iw_tau: factor of the mean log-ratio in the exponent of "iw-sft".
        iw_max: largest weight of "iw-sft".
        psft_clip: "psft" gives weight zero to tokens whose probability ratio to the reference exceeds 1 + psft_clip.
        asft_kl: factor of the KL term of "asft".
        idft_clip: (low, high) bounds of the exponent of "idft".
    """

    weighting: str | None = None
    iw_tau: float = 1.0
    iw_max: float = 16.0
    psft_clip: float = 0.28
    asft_kl: float = 0.1
    idft_clip: tuple[float, float] = (0.1, 2.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weighting is not None:
            check_choice("weighting", self.weighting, WEIGHTINGS)
        check_finite("iw_tau", self.iw_tau)
        for name in ("iw_max", "psft_clip", "asft_kl"):
            check_at_least_0(name, getattr(self, name))
        low, high = check_bounds("idft_clip", self.idft_clip)
        if not 0 <= low <= high < math.inf:
            raise ValueError(f"idft_clip must be (low, high) with 0 <= low <= high, got {self.idft_clip!r}")


@dataclass(frozen=True, kw_only=True)
class PolicyOptions(Options):
    """What turns log-probs into a policy-gradient loss (`objectives.policy` has the formulas and their papers).

    Attributes:
        objective: a row of the table of `linear_policy_loss`.
        beta: factor of the KL to the reference policy, estimated by Schulman's k3. r_ref counts for exp(80) at most
            (exp(700) in float64), in the loss and in the gradient, so that a token far from the reference leaves both
            finite.
        clip_low, clip_high: a ratio counts for no less than 1 - clip_low and no more than 1 + clip_high, by objective.
        dual_clip: what a clipped ratio counts for at most where A < 0 (arXiv 1912.09729); None: no such bound.
        sapo_temperatures: tau of "sapo" for A > 0 and for other A.
        sampler_clip: cap of w = pi_old / pi_sampler, which has no gradient; None: no cap.
        sampler_level: "token", or "sequence": w is the product over the sequence.
        entropy_coef: factor of the entropy H_t.
        max_length: the length of reduction "constant_length", in tokens; None: that of the longest sequence of the call
            (of (B, T) rows: T). Dr. GRPO wants one that is the same in every call.
        unbiased_kl: multiply the KL term by the token's r = pi / pi_old, gradient included, which makes its gradient
            that of the reverse KL (DeepSeek-V3.2, arXiv 2512.02556): r log(pi / pi_ref) in log pi, for any log-ratio.
    """

    objective: str = "grpo"
    beta: float = 0.0
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    sapo_temperatures: tuple[float, float] = (1.0, 1.05)
    sampler_clip: float | None = None
    sampler_level: str = "token"
    entropy_coef: float = 0.0
    max_length: int | None = None
    unbiased_kl: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("objective", self.objective, OBJECTIVES)
        for name in ("beta", "clip_low", "clip_high"):
            check_at_least_0(name, getattr(self, name))
        if not self.clip_low <= 1:
            raise ValueError(f"clip_low must be at most 1, got {self.clip_low!r}: ratios are kept above 1 - clip_low")
        if self.dual_clip is not None and not (positive(self.dual_clip) and self.dual_clip >= 1 + self.clip_high):
            raise ValueError(
                f"dual_clip must be a number of at least 1 + clip_high = {1 + self.clip_high:g}, or None, got "
                f"{self.dual_clip!r}: it is what a ratio counts for at most where the advantage is negative"
            )
        if self.sampler_clip is not None and not positive(self.sampler_clip):
            raise ValueError(f"sampler_clip must be a positive number, or None for no cap, got {self.sampler_clip!r}")
        if self.sampler_level not in ("token", "sequence"):
            raise ValueError(f"sampler_level must be 'token' or 'sequence', got {self.sampler_level!r}")
        taus = self.sapo_temperatures
        if not isinstance(taus, (tuple, list)) or len(taus) != 2 or not all(map(positive, taus)):
            raise ValueError(
                "sapo_temperatures must be two positive numbers, for positive and for negative advantages, got "
                f"{taus!r}"
            )
        check_finite("entropy_coef", self.entropy_coef)
        if self.max_length is not None and not is_count(self.max_length):
            raise ValueError(f"max_length must be an integer of at least 1 (tokens), or None, got {self.max_length!r}")
        check_flag("unbiased_kl", self.unbiased_kl)


@dataclass(frozen=True, kw_only=True)
class DivergenceOptions(Options):
    """What `linear_distill_loss` compares the student with (`formulas.divergence` has the formulas).

    Attributes:
        divergence: a row of the table of `linear_distill_loss`.
        js_beta: the teacher's share of the mixture of "js", between 0 and 1 (GKD, arXiv 2306.13649).
        distill_temperature: divides the logits of teacher and student in the divergence alone, on top of what either
            head does to its own. (The loss is not multiplied by its square.)
        nll_coef: factor of the NLL that is added.
    """

    divergence: str = "forward"
    js_beta: float = 0.5
    distill_temperature: float = 1.0
    nll_coef: float = 0.0

    def __post_init__(self) -> None:
        check_choice("divergence", self.divergence, DIVERGENCES)
        if not (is_number(self.js_beta) and 0 < self.js_beta < 1):
            raise ValueError(
                f"js_beta must lie between 0 and 1, got {self.js_beta!r}: for either end take divergence 'forward' or "
                "'reverse'"
            )
        if not positive(self.distill_temperature):
            raise ValueError(f"distill_temperature must be a positive number, got {self.distill_temperature!r}")
        check_at_least_0("nll_coef", self.nll_coef)


@dataclass(frozen=True, kw_only=True)
class TeacherOptions(Options):
    """A teacher's own LM head, from the fields of `Teacher`."""

    temperature: float = HeadOptions.temperature
    softcap: float | None = HeadOptions.softcap


@dataclass(frozen=True, kw_only=True)
class CallOptions(Options):
    """What changes from call to call.

    Attributes:
        valid_tokens: the number of tokens that count, from a caller who knows it; it saves the one host sync of a call.
            Another number than that of the tokens is an error.
        denominator: replaces the divisor of `Reduction`; None: no such number (a tensor goes another way).
    """

    valid_tokens: int | None = None
    denominator: float | None = None

    def __post_init__(self) -> None:
        if self.valid_tokens is not None and not (
            is_number(self.valid_tokens, numbers.Integral) and self.valid_tokens >= 0
        ):
            raise ValueError(f"valid_tokens must be an integer of at least 0, or None, got {self.valid_tokens!r}")
        if self.denominator is not None and not positive(self.denominator):
            raise ValueError(f"denominator must be a positive number, got {self.denominator!r}")


@dataclass(frozen=True, kw_only=True)
class Reduction(Options):
    """The divisor of a loss. The paper gives none; the default is this package's.

    Attributes:
        reduction: "mean": the call's valid tokens; "sum": 1; "sequence_mean": the mean over sequences with a valid
            token of their token means.
    """

    choices = REDUCTIONS

    reduction: str | None = "mean"

    def __post_init__(self) -> None:
        check_choice("reduction", self.reduction, self.choices)


@dataclass(frozen=True, kw_only=True)
class PolicyReduction(Reduction):
    """The divisor of a policy loss.

    Attributes:
        reduction: as in `Reduction`, or "constant_length": all sequences (empty ones too) times `max_length`. None: the
            objective's own.
    """

    choices = POLICY_REDUCTIONS

    reduction: str | None = None

    def __post_init__(self) -> None:
        if self.reduction is not None:
            super().__post_init__()


DEFAULTS = PEAROptions()
# Sums of log-ratios over whole sequences, without any clip: the ratios of GSPO and iw-SFT are made of these.
UNCLIPPED = PEAROptions(level="sequence", log_ratio_clip=(-math.inf, math.inf))


# ---- the same fields as keywords; a test holds them to the classes above


class HeadKeywords(TypedDict, total=False):
    temperature: float
    softcap: float | None
    ignore_index: int
    workspace_bytes: int | None
    backend: str | None


class ReductionKeywords(TypedDict, total=False):
    reduction: str


class WeightsKeywords(TypedDict, total=False):
    """Of `pear_weights`: the fields of `PEAROptions`."""

    level: str
    block_size: int
    gamma: float
    log_ratio_clip: tuple[float, float]
    log_weight_clip: tuple[float, float]
    clip_blocks: bool
    center: bool
    clip_length: int | None
    normalize: str | None


class PEARKeywords(WeightsKeywords, ReductionKeywords, HeadKeywords, total=False):
    """Of `linear_pear_loss`: the above and the fields of `LabelOptions`."""

    negative_lambda: float
    logprob_floor: float


class WeightingConstants(ReductionKeywords, HeadKeywords, total=False):
    """Of `LinearWeightedLoss`."""

    iw_tau: float
    iw_max: float
    psft_clip: float
    asft_kl: float
    idft_clip: tuple[float, float]


class WeightingKeywords(WeightingConstants, total=False):
    """Of `linear_weighted_loss`."""

    weighting: str | None


class PolicyKeywords(HeadKeywords, total=False):
    """Of `linear_policy_loss`."""

    objective: str
    beta: float
    clip_low: float
    clip_high: float
    dual_clip: float | None
    sapo_temperatures: tuple[float, float]
    sampler_clip: float | None
    sampler_level: str
    entropy_coef: float
    max_length: int | None
    unbiased_kl: bool
    reduction: str | None


class DistillKeywords(WeightsKeywords, ReductionKeywords, HeadKeywords, total=False):
    """Of `linear_distill_loss`."""

    divergence: str
    js_beta: float
    distill_temperature: float
    nll_coef: float


# ---- keywords and objects of a call


def takes(*classes: type[Options]) -> Callable[[F], F]:
    """Decorator of a function with `**keywords` and `options`: the keywords are the fields of `classes`.

    The signature that `help` and `inspect` show has them, with their defaults.
    """

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        parameters = {p.name: p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD}
        for field in (field for cls in classes for field in cls.__dataclass_fields__.values()):
            parameters.setdefault(
                field.name,
                inspect.Parameter(
                    field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type
                ),
            )
        function.__signature__ = signature.replace(parameters=[*parameters.values()])  # type: ignore[attr-defined]
        function.option_classes = classes  # type: ignore[attr-defined]
        return function

    return decorate


def gather(
    name: str,
    classes: tuple[type[Options], ...],
    options: Options | Sequence[Options],
    keywords: Mapping[str, object],
) -> tuple[Any, ...]:
    """One object of each of `classes`, from the objects and the keywords of a call of the function `name`.

    Raises:
        TypeError: an object of another class, two of one class, an unknown keyword, or a keyword beside an object whose
            field it is.
        ValueError: by the field's check.
    """
    objects = tuple(options) if isinstance(options, (tuple, list)) else (options,)
    given = tuple((key, tuple(value) if isinstance(value, list) else value) for key, value in keywords.items())
    if torch.compiler.is_compiling():
        return _gather(name, classes, objects, given, ())
    # True == 1 == 1.0 to a cache
    types = tuple(tuple(map(type, value)) if isinstance(value, tuple) else (type(value),) for _, value in given)
    try:
        hash((objects, given))
    except TypeError:  # a value that no field takes, or a NumPy array: no cache
        return _gather(name, classes, objects, given, types)
    return _cached(name, classes, objects, given, types)


def _gather(
    name: str,
    classes: tuple[type[Options], ...],
    objects: tuple[Options, ...],
    keywords: tuple[tuple[str, Any], ...],
    types: tuple[tuple[type, ...], ...],
) -> tuple[Any, ...]:
    given = {type(each): each for each in objects}
    if len(given) < len(objects) or any(type(each) not in classes for each in objects):
        wanted = ", ".join(cls.__name__ for cls in classes)
        raise TypeError(f"options of {name} must be at most one object of each of {wanted}, got {objects!r}")
    rest, found = dict(keywords), []
    for cls in classes:
        own = {field: rest.pop(field) for field in cls.names() if field in rest}
        if own and cls in given:
            raise TypeError(f"{name}: {next(iter(own))} is given, and {cls.__name__} too, whose field it is: use one")
        found.append(given[cls] if cls in given else cls(**own))
    if rest:
        raise TypeError(f"{name}() got an unexpected keyword argument {next(iter(rest))!r}")
    return tuple(found)


_cached = functools.lru_cache(maxsize=256)(_gather)


# ---- options as arguments of a custom op


def encode(options: Iterable[Options]) -> tuple[str, list[float]]:
    """`options` as a canonical string and the numbers that are left out of it, for `decode`.

    Every number is left out, also integers: `torch.compile` guards on a string, and would compile anew for each value.
    """
    parts: list[str] = []
    values: list[float] = []
    for each in options:
        fields = []
        for name in each.names():
            value = getattr(each, name)
            several = value if isinstance(value, tuple) else (value,)
            if all(map(is_number, several)):
                values += several
                fields.append(f"{name}=#{'' if several is not value else len(several)}")
            else:
                # a member of a str enum has another repr than the str that it is
                fields.append(f"{name}={''.join([value]) if isinstance(value, str) else value!r}")
        parts.append(f"{type(each).__name__}({' '.join(fields)})")
    return ";".join(parts), values


@functools.lru_cache(maxsize=256)
def decode(spec: str, values: tuple[float, ...]) -> dict[type[Options], Any]:
    """The options that `encode` made a string and numbers of, by their classes."""
    found: dict[type[Options], Any] = {}
    left = iter(values)
    for part in spec.split(";"):
        kind, _, fields = part.removesuffix(")").partition("(")
        cls = CLASSES[kind]
        own = {}
        for name, value in (field.split("=", 1) for field in fields.split()):
            if value[0] != "#":
                own[name] = ast.literal_eval(value)
            else:
                cast = int if cls.__dataclass_fields__[name].type in (int, int | None) else float
                taken = tuple(cast(next(left)) for _ in range(int(value[1:] or 1)))
                own[name] = taken if value[1:] else taken[0]
        # checked before, and a float32 number on a bound may be beyond it as a float64
        found[cls] = object.__new__(cls)
        found[cls].__dict__.update(own)
    return found


CLASSES: dict[str, type[Options]] = {
    cls.__name__: cls
    for cls in (
        HeadOptions, PEAROptions, LabelOptions, WeightingOptions, PolicyOptions, DivergenceOptions, TeacherOptions,
        CallOptions, Reduction, PolicyReduction,
    )
}  # fmt: skip
