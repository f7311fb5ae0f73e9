"""What `pear sft` logs of its loss: means over tokens of all micro-batches and processes, and warnings in words."""

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from accelerate import Accelerator

from pear.sft_config import REFERENCED, PEARSFTConfig
from pear_kernels.objectives.labelled import WRONG_STATS
from pear_kernels.objectives.pear import STATS

COUNTS = ("seen", "tokens", "wrong_tokens", "all_tokens")
LARGEST = ("weight_max",)
ESS = "effective_sample_size"

# What TRL's SFTTrainer logs too, by its names: those of the losses' statistics.
AS_IN_TRL = {"mean_token_accuracy": "token_accuracy", "entropy": "entropy"}

EXPLODED = 20.0  # a mean weight: the gradient is so many times that of plain SFT
EVERY = 0.99  # a share of tokens that is as good as all
MOST = 0.5  # a share of tokens above which a warning is due
FEW = 0.05  # an effective sample size below which one is
NEAR_ZERO = 1e-3  # a weight below it is as good as none
# A behaviour policy this close to the student is the student. In half precision, rounding alone moves log-probs more.
COPY_MAX_RATIO = {"full": 1e-3, "half": 0.25}
COPY_DIVERGENCE = {"full": 1e-6, "half": 1e-3}  # likewise of a teacher
OTHER_REFERENCE = 0.2  # nats a token from a reference that is the student itself; neither rounding nor dropout does it


def names_logged(args: PEARSFTConfig, teacher_in_memory: bool = False, blocks: bool = False) -> tuple[str, ...]:
    """The statistics that say something about the loss of these options; `blocks`: the data has block_ids."""
    names: tuple[str, ...] = ("nll", "log_ratio_mean")
    if args.weighting == "pear":
        names = STATS + (WRONG_STATS if args.negatives else ())
    elif args.weighting != "none":
        names += ("ref_log_ratio_mean",) if args.weighting in REFERENCED and not teacher_in_memory else ()
        names += ("weight_mean", "weight_max", "weight_zero")
        names += ("weight_floor", "weight_ceiling") if args.weighting == "iw-sft" else ()
        names += (ESS,)
    names += ("ratio_tokens",) if blocks else ()
    return names + (("divergence",) if args.distill != "none" else ()) + (() if "tokens" in names else ("tokens",))


def block_sums(
    values: torch.Tensor,  # (B, T)
    block_ids: torch.Tensor,  # (B, T)
    counted: torch.Tensor,  # (B, T) bool
    cu_seqlens: torch.Tensor | None = None,  # (S+1,) of a pack, B = 1
) -> torch.Tensor:
    """(B T + 1,): the sum of each block's counted values, in some order, and zeros."""
    if cu_seqlens is None:
        sequence = torch.arange(len(values), device=values.device)[:, None]
    else:
        sequence = torch.bucketize(torch.arange(values.shape[1], device=values.device), cu_seqlens[1:], right=True)
    key = torch.where(counted, (sequence << 31) + block_ids, -1).flatten()
    latest = key.cummax(0).values
    before = torch.cat([latest.new_full((1,), -1), latest[:-1]])
    place = (key > before).cumsum(0)  # uncounted tokens may join any block: they add nothing
    values = torch.where(counted, values, 0).flatten()
    return values.new_zeros(len(values) + 1).index_add(0, place, values)


class Statistics:
    """Means of micro-batches, kept as tensors on their device until they are read."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._rows: list[torch.Tensor] = []

    def add(self, values: dict[str, torch.Tensor]) -> None:
        """0-d tensors: the COUNTS, and means over `tokens` (`wrong_*`: `wrong_tokens`; `loss`: `all_tokens`)."""
        self._names = tuple(values)
        self._rows.append(torch.stack([value.detach().float() for value in values.values()]))

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Over all tokens, of every process, since the last call; means of no tokens are left out. This one waits."""
        if not self._rows:
            return {}
        columns = dict(zip(self._names, torch.stack(self._rows).cpu().double().unbind(1), strict=True))  # (rows,) each
        self._rows.clear()
        if ESS in columns:
            # share = (sum w)^2 / (n sum w^2), so the mean of w^2 is mean^2 / share; as means, like the others
            tiny = torch.finfo(torch.float64).tiny
            columns[ESS] = columns["weight_mean"].square() / columns[ESS].clamp(min=tiny)
        sums = torch.stack([_total(name, columns) for name in columns])
        if accelerator.num_processes > 1:
            everywhere = accelerator.gather(sums[None].to(accelerator.device))  # (processes, names)
            largest = torch.tensor([name in LARGEST for name in columns], device=everywhere.device)
            sums = torch.where(largest, everywhere.amax(0), everywhere.sum(0))
        totals = dict(zip(columns, sums.tolist(), strict=True))
        found = {name: total for name, total in totals.items() if name in COUNTS + LARGEST}
        for name in totals.keys() - found.keys():
            if (tokens := totals[_counted_by(name)]) > 0:
                found[name] = totals[name] / tokens
        if ESS in found:
            found[ESS] = found["weight_mean"] ** 2 / found[ESS] if found[ESS] else 0.0
        return found


def _counted_by(name: str) -> str:
    if name == "loss":  # of an evaluation's batch: a mean over right and wrong answers
        return "all_tokens"
    return "wrong_tokens" if name in WRONG_STATS else "tokens"


def _total(name: str, columns: dict[str, torch.Tensor]) -> torch.Tensor:
    """(): of what is counted, the sum; of means, their sums over tokens; of a maximum, the largest."""
    if name in COUNTS:
        return columns[name].sum()
    if name in LARGEST:
        return columns[name].max()
    return (columns[name] * columns[_counted_by(name)]).sum()


def clipped_in_words(low: float, high: float, log_ratio_clip: Sequence[float]) -> str | None:
    """What it means that nearly all log-ratios are clipped: `low` and `high` are shares of those that there are."""
    if low + high < EVERY:
        return None
    side = "low" if low > high else "high"
    left = (
        f"of a token's position alone, whatever the student's log-probs (all at the {side} end)"
        if max(low, high) >= EVERY
        else "of positions and of the signs of the ratios alone, whatever their size"
    )
    return (
        f"{low + high:.1%} of the log-ratios lie outside log_ratio_clip = [{log_ratio_clip[0]:g}, "
        f"{log_ratio_clip[1]:g}] ({low:.1%} below, {high:.1%} above), so the weights are a function {left}."
    )


def in_words(args: PEARSFTConfig, stats: dict[str, float]) -> dict[str, str]:
    """What is wrong with a run that logs `stats` (without their prefix), by a name for each kind of trouble."""
    found: dict[str, str] = {}
    if stats.get("tokens") == 0 and not stats.get("wrong_tokens"):
        found["no_tokens"] = (
            "No token of the last logged steps has a loss: every token is masked, so nothing trains. Look at "
            "`completion_mask` in the data, and at the weights of the rows."
        )
    if wrong := [name for name in ("nll", "divergence", "loss") if not math.isfinite(stats.get(name, 0.0))]:
        found["not_finite"] = (
            f"The {wrong[0]} is {stats[wrong[0]]}: the model's logits are not finite, so nothing is learned and its "
            "weights may be lost. Look at the model that training starts from (`pear score` refuses such a one); if "
            "it is whole, try a lower learning_rate, and bf16 or float32 in place of float16."
        )
    rated = stats.get("ratio_tokens", 1.0)
    if args.weighting == "pear" and rated > 0:
        low, high = (stats.get(f"ratio_clipped_{side}", 0.0) / rated for side in ("low", "high"))
        if (words := clipped_in_words(low, high, args.log_ratio_clip)) is not None:
            found["clipped"] = (
                f"PEAR: {words} Mean log-ratio {stats.get('log_ratio_mean', 0.0) / rated:.3f}. Check that the "
                "behaviour log-probs are of this text (`pear inspect`), take data from a closer policy, or widen "
                "log_ratio_clip; with center the mean of each response counts no more."
            )
    if (mean := stats.get("weight_mean", 0.0)) > EXPLODED:
        found["exploded"] = (
            f"The mean weight is {mean:.3g}, above {EXPLODED:g}: gradients are so many times those of plain SFT. "
            "Try normalize (sequence or batch), a lower upper end of log_weight_clip or log_ratio_clip, a smaller "
            "gamma, or iw_max for iw-sft; a clip of the gradient's norm hides this, it does not repair it."
        )
    stats = defaultdict(float, stats)  # what no token had is not there
    if args.weighting == "pear" and stats["weight_floor"] > MOST:
        found["floor"] = (
            f"PEAR: {stats['weight_floor']:.0%} of the response tokens have their weight at the floor, "
            f"exp({args.log_weight_clip[0]:g}), so most of the batch no longer trains. The behaviour policy "
            f"is more confident than the student (mean log-ratio {stats['log_ratio_mean']:.3f}). Try a lower "
            "end of log_ratio_clip nearer to 0, center, clip_length or normalize (ours), shorter responses, or data "
            "from a closer policy; `pear inspect` shows the weights before training."
        )
    if args.weighting == "iw-sft" and stats["weight_ceiling"] + stats["weight_floor"] > MOST:
        found["iw-sft"] = (
            f"iw-sft: {stats['weight_ceiling']:.0%} of the response tokens have their weight at iw_max = "
            f"{args.iw_max:g}, and {stats['weight_floor']:.0%} have one near 0 (below {NEAR_ZERO:g}): the weights no "
            f"longer tell responses apart. Try a smaller iw_tau, now {args.iw_tau:g}, or score `ref_logprobs` again, "
            "with the student as it is now."
        )
    if args.weighting == "psft" and stats["weight_zero"] > MOST:
        found["psft"] = (
            f"psft: {stats['weight_zero']:.0%} of the response tokens have become more than {args.psft_clip:.0%} "
            "likelier than under `ref_logprobs`, so most of the batch no longer trains. Score `ref_logprobs` again, "
            "with the student as it is now, or raise psft_clip."
        )
    if args.weighting in ("dft", "idft") and 0 < stats[ESS] < FEW:
        found["few"] = (
            f"{args.weighting}: effective_sample_size is {stats[ESS]:.1%}: the gradient rests on that share of the "
            "response tokens, those that the student is sure of already. Data this far from the student needs plain "
            "SFT (weighting none) first, or idft with an idft_clip nearer to 0."
        )
    if args.negatives and stats["wrong_below_floor"] > MOST:
        found["wrong_floor"] = (
            f"negatives: {stats['wrong_below_floor']:.0%} of the wrong answers' tokens are less likely than "
            f"logprob_floor = {args.logprob_floor:g} already (their mean NLL is {stats['wrong_nll']:.2f}), so there is "
            "little left to push away. Train on new wrong answers, drawn from the student as it is now, or without."
        )
    return found


def first_step_in_words(args: PEARSFTConfig, largest: dict[str, float], half: bool) -> dict[str, str]:
    """What the first optimiser step, before any update, says of whose log-probs there are; `half`: in half precision.

    `largest` are over micro-batches: `log_ratio`, the largest of a token or block, and `ratio_tokens`, 0 if no token
    has one; `divergence`, `ref_log_ratio` and `teacher_log_ratio` (asft with a teacher in memory), mean sizes.
    """
    precision, found = "half" if half else "full", {}
    if largest.get("ratio_tokens", 1.0) > 0 and largest.get("log_ratio", torch.inf) < COPY_MAX_RATIO[precision]:
        found["copy"] = (
            f"PEAR: before the first update every log-ratio is near 0 (largest {largest['log_ratio']:.1e}): the "
            "behaviour policy is a copy of the student, and only gamma is left in the weights. Score the data with the "
            "model that wrote it."
        )
    if largest.get("divergence", torch.inf) < COPY_DIVERGENCE[precision]:
        found["copy_teacher"] = (
            f"distill: before the first update the divergence is near 0 ({largest['divergence']:.1e} nats a token): "
            "the teacher is a copy of the student, which has nothing to learn from it. Name another teacher, or score "
            "the top-k log-probs with the teacher and not with the student."
        )
    if largest.get("ref_log_ratio", 0.0) > OTHER_REFERENCE:
        found["reference"] = (
            f"{args.weighting}: before the first update the student's log-probs differ from `ref_logprobs` by "
            f"{largest['ref_log_ratio']:.2f} nats a token: those are not of this student. Unless that is meant, write "
            "them by `pear score --column ref_logprobs` with the model that training starts from."
        )
    if largest.get("teacher_log_ratio", 0.0) > OTHER_REFERENCE:
        found["reference"] = (
            f"{args.weighting}: before the first update the student's log-probs differ from the teacher's by "
            f"{largest['teacher_log_ratio']:.2f} nats a token: it is not this student. Unless that is meant, give the "
            "model that training starts from as the teacher."
        )
    return found
