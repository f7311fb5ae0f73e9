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
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self, TypeAlias, TypedDict, TypeVar

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

KEYWORD_ONLY = inspect.Parameter.KEYWORD_ONLY
F = TypeVar("F", bound=Callable[..., Any])


# ---- checks of one field


class Rule(NamedTuple):
    """What must hold of a value, or else "NAME must `text`, got VALUE`remedy`"."""

    holds: Callable[[Any], bool]
    text: str
    remedy: str = ""


Rules: TypeAlias = tuple[Rule, ...]  # the first one that does not hold is the error


def rule(holds: Callable[[Any], bool], text: str, remedy: str = "") -> Rules:
    return (Rule(holds, text, remedy),)


def or_none(rules: Rules, text: str | None = None) -> Rules:
    """One rule that also None keeps."""
    (first,) = rules
    return rule(lambda value: value is None or first.holds(value), text or first.text, first.remedy)


def one_of(choices: Sequence[str], words: str = "be one of") -> Rules:
    return rule(lambda value: value in choices, f"{words} {', '.join(map(repr, choices))}")


def check(name: str, value: Any, rules: Rules) -> None:
    for holds, text, remedy in rules:
        if not holds(value):
            raise ValueError(f"{name} must {text}, got {value!r}{remedy}")


def is_number(value: Any, kind: type = numbers.Real) -> bool:
    """A number of Python's or NumPy's, or what stands for one while `torch.compile` traces."""
    return isinstance(value, (kind, torch.SymInt, torch.SymFloat)) and not isinstance(value, bool)


def is_integer(value: Any, least: int = 1) -> bool:
    return is_number(value, numbers.Integral) and value >= least


def is_positive(value: Any) -> bool:
    """A finite number above 0. Comparisons trace where `math.isfinite` does not, and are false for NaN."""
    return is_number(value) and 0 < value < math.inf


def are_two(value: Any, kind: Callable[[Any], bool] = is_number) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(map(kind, value))


COUNT = rule(is_integer, "be an integer of at least 1")
POSITIVE = rule(is_positive, "be a positive number")
AT_LEAST_0 = rule(lambda value: is_number(value) and 0 <= value < math.inf, "be a number of at least 0")
FINITE = rule(lambda value: is_number(value) and -math.inf < value < math.inf, "be a finite number")
FLAG = rule(lambda value: isinstance(value, bool), "be True or False")
TWO = rule(are_two, "be two numbers (low, high)")
BOUNDS = TWO + rule(lambda value: value[0] <= value[1], "be (low, high) with low <= high", ": swap the two")
BACKEND = or_none(one_of(BACKENDS), "be 'triton' or 'torch', or unset to go by the device")


# ---- the groups


class Options:
    """Base of all groups: what a NamedTuple has, with fields that are given by name only, and checked."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    rules: ClassVar[Mapping[str, Rules]] = {}  # by the fields' names

    def __post_init__(self) -> None:
        """Lists become tuples, so that an object is constant and can be hashed; then each field is checked."""
        for name, rules in self.rules.items():
            value = getattr(self, name)
            if isinstance(value, list):
                value = tuple(value)
                object.__setattr__(self, name, value)
            check(name, value, rules)

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


Objects: TypeAlias = Options | Sequence[Options]  # one object, or several of different classes


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
        gradient_tolerance: share of the gradient's mass, sum_t |c_t| (1 - p_t), that may be left out of dX and dW, from
            0 to below 1; c_t is dL/d(-log p_t). 0: all three products. Otherwise products 2 and 3 are taken of the
            tokens and columns that matter, `stats` adds "gradient_kept", the share of their work that was done, and
            "gradient_left_out", that of the mass, never above the tolerance. (`linear_logprobs` has no `stats`.)
            Loss and log-probs stay exact. An error with a gradient in every logit: an entropy's, or a teacher's. The
            bound and what to expect of it are in docs/engine.md.
    """

    temperature: float = 1.0
    softcap: float | None = None
    ignore_index: int = -100
    workspace_bytes: int | None = None
    backend: str | None = None
    gradient_tolerance: float = 0.0

    rules = {
        "temperature": POSITIVE,
        "softcap": or_none(POSITIVE, "be a positive number, or None for a head without one"),
        # options travel to the ops as float64, which holds these integers exactly
        "ignore_index": rule(
            lambda value: is_integer(value, -(2**53)) and value <= 2**53, "be an integer of at most 2**53 in size"
        ),
        "workspace_bytes": or_none(COUNT, "be a positive integer of bytes, or None"),
        "backend": BACKEND,
        "gradient_tolerance": rule(lambda value: is_number(value) and 0 <= value < 1, "be a number from 0 to below 1"),
    }


@dataclass(frozen=True, kw_only=True)
class PEAROptions(Options):
    """How log-probs become PEAR weights G (arXiv 2602.01058, section 3; `formulas.pear_weights` has the formulas).

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

    rules = {
        "level": one_of(LEVELS),
        "block_size": rule(is_integer, "be an integer of at least 1 (response tokens a block)"),
        "gamma": rule(lambda value: is_number(value) and 0 < value <= 1, "be in (0, 1]"),
        "log_ratio_clip": BOUNDS,
        "log_weight_clip": BOUNDS + rule(lambda value: value[1] < math.inf, "have a finite upper end"),
        "clip_blocks": FLAG,
        "center": FLAG,
        "clip_length": or_none(COUNT, "be an integer of at least 1 (tokens with a log-ratio), or None"),
        "normalize": or_none(one_of(NORMALIZE, "be None or one of")),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
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

    rules = {
        "negative_lambda": AT_LEAST_0,
        "logprob_floor": rule(
            lambda value: is_number(value) and value <= 0,
            "be a log-prob, at most 0 (-inf for no bound)",
            ": wrong tokens below it are not pushed further",
        ),
    }


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

    rules = {
        "weighting": or_none(one_of(WEIGHTINGS)),
        "iw_tau": FINITE,
        "iw_max": AT_LEAST_0,
        "psft_clip": AT_LEAST_0,
        "asft_kl": AT_LEAST_0,
        "idft_clip": TWO
        + rule(lambda value: 0 <= value[0] <= value[1] < math.inf, "be (low, high) with 0 <= low <= high"),
    }


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

    rules = {
        "objective": one_of(OBJECTIVES),
        "beta": AT_LEAST_0,
        "clip_low": AT_LEAST_0 + rule(lambda value: value <= 1, "be at most 1", ": ratios are kept above 1 - clip_low"),
        "clip_high": AT_LEAST_0,
        "sapo_temperatures": rule(
            lambda value: are_two(value, is_positive),
            "be two positive numbers, for positive and for negative advantages",
        ),
        "sampler_clip": or_none(POSITIVE, "be a positive number, or None for no cap"),
        "sampler_level": rule(lambda value: value in ("token", "sequence"), "be 'token' or 'sequence'"),
        "entropy_coef": FINITE,
        "max_length": or_none(COUNT, "be an integer of at least 1 (tokens), or None"),
        "unbiased_kl": FLAG,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        # not by a rule, whose text would be made in every call, and be a reason to compile for each clip_high
        if self.dual_clip is not None and not (is_positive(self.dual_clip) and self.dual_clip >= 1 + self.clip_high):
            raise ValueError(
                f"dual_clip must be a number of at least 1 + clip_high = {1 + self.clip_high:g}, or None, got "
                f"{self.dual_clip!r}: it is what a ratio counts for at most where the advantage is negative"
            )


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

    rules = {
        "divergence": one_of(DIVERGENCES),
        "js_beta": rule(
            lambda value: is_number(value) and 0 < value < 1,
            "lie between 0 and 1",
            ": for either end take divergence 'forward' or 'reverse'",
        ),
        "distill_temperature": POSITIVE,
        "nll_coef": AT_LEAST_0,
    }


@dataclass(frozen=True, kw_only=True)
class TeacherOptions(Options):
    """A teacher's own LM head, from the fields of `Teacher`, which `checks` checks by their names there."""

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

    rules = {
        "valid_tokens": or_none(rule(lambda value: is_integer(value, 0), "be an integer of at least 0, or None")),
        "denominator": or_none(POSITIVE, "be a positive number"),
    }


@dataclass(frozen=True, kw_only=True)
class Reduction(Options):
    """The divisor of a loss. The paper gives none; the default is this package's.

    Attributes:
        reduction: "mean": the call's valid tokens; "sum": 1; "sequence_mean": the mean over sequences with a valid
            token of their token means.
    """

    reduction: str | None = "mean"

    rules = {"reduction": one_of(REDUCTIONS)}


@dataclass(frozen=True, kw_only=True)
class PolicyReduction(Reduction):
    """The divisor of a policy loss.

    Attributes:
        reduction: as in `Reduction`, or "constant_length": all sequences (empty ones too) times `max_length`. None: the
            objective's own.
    """

    reduction: str | None = None

    rules = {"reduction": or_none(one_of(POLICY_REDUCTIONS))}


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
    gradient_tolerance: float


class ReductionKeywords(TypedDict, total=False):
    reduction: str


class WeightsKeywords(TypedDict, total=False):  # of `pear_weights`: `PEAROptions`
    level: str
    block_size: int
    gamma: float
    log_ratio_clip: tuple[float, float]
    log_weight_clip: tuple[float, float]
    clip_blocks: bool
    center: bool
    clip_length: int | None
    normalize: str | None


class PEARKeywords(WeightsKeywords, ReductionKeywords, HeadKeywords, total=False):  # of `linear_pear_loss`
    negative_lambda: float
    logprob_floor: float


class WeightingConstants(ReductionKeywords, HeadKeywords, total=False):  # of `LinearWeightedLoss`
    iw_tau: float
    iw_max: float
    psft_clip: float
    asft_kl: float
    idft_clip: tuple[float, float]


class WeightingKeywords(WeightingConstants, total=False):  # of `linear_weighted_loss`
    weighting: str | None


class PolicyKeywords(HeadKeywords, total=False):  # of `linear_policy_loss`
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


class DistillKeywords(WeightsKeywords, ReductionKeywords, HeadKeywords, total=False):  # of `linear_distill_loss`
    divergence: str
    js_beta: float
    distill_temperature: float
    nll_coef: float


class PlanKeywords(TypedDict, total=False):  # of `plan`, beside `level`: those that change what a call costs
    center: bool
    normalize: str | None
    workspace_bytes: int | None
    backend: str | None
    gradient_tolerance: float


# ---- keywords and objects of a call


def takes(*classes: type[Options]) -> Callable[[F], F]:
    """Decorator of a function with `**keywords`, typed by a TypedDict, which are fields of `classes`.

    The signature that `help` and `inspect` show has these keywords, with their defaults.
    """

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        shown = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        typed = typing.get_args(function.__annotations__["keywords"])[0].__annotations__
        for field in (field for cls in classes for field in cls.__dataclass_fields__.values() if field.name in typed):
            shown.append(inspect.Parameter(field.name, KEYWORD_ONLY, default=field.default, annotation=field.type))
        function.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
        function.option_classes = classes  # type: ignore[attr-defined]
        return function

    return decorate


def gather(
    name: str,
    classes: tuple[type[Options], ...],
    options: Objects,
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
            if name == "gradient_tolerance" and not value:
                fields.append(f"{name}=0.0")  # no number: another pass, with other statistics, is meant
            elif all(map(is_number, several)):
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
