"""What was asked for before anything was measured, beside what was. Never loosened; what is not measured is a no."""

from typing import NamedTuple

from bench.accuracy import KINDS
from bench.figures import Figures
from bench.peers import FULL_PASS, OURS, PEERS, TOLERANT
from bench.shapes import CPU_BASE, GPU_BASE, SHAPES

GIB = 1 << 30
LONG = "128k-4k-152k"
PEAR = ["pear-token", "pear-block", "pear-sequence"]
OWN = [name for name in FULL_PASS if PEERS[name].package == OURS and not PEERS[name].needs_gpu]


class Target(NamedTuple):
    what: str
    measured: float | None
    at_most: float
    style: str = ".3f"

    @property
    def met(self) -> bool:
        return self.measured is not None and self.measured <= self.at_most

    def line(self) -> str:
        measured = "not measured" if self.measured is None else format(self.measured, self.style)
        verdict = "yes" if self.met else "**no**" if self.measured is not None else ""
        at_most = "finite" if self.at_most == float("inf") else format(self.at_most, self.style)
        return f"| {self.what} | {measured} | {at_most} | {verdict} |"


def of(device: str, figures: Figures, only: str = "") -> list[Target]:
    """All of them, or those that one question alone can answer."""
    if device == "cpu" and only == "policy":
        return policy_on_cpu(figures)
    targets = {"cpu": on_cpu, "tiny": lambda figures: []}.get(device, on_gpu)(figures)
    return [target for target in targets if not only or target.measured is not None]


def divided(value: float | None, by: float | None) -> float | None:
    return None if value is None or not by else value / by


def worst_error(figures: Figures, case: str, peer: str) -> float | None:
    found = [figures.value("accuracy", case, peer, key) for key in ("loss", "dX", "dW")]
    return None if None in found else max(found)


def on_gpu(figures: Figures) -> list[Target]:
    """For an H100; other devices are held against the same."""

    def above_workspace(case: str) -> float | None:
        """GiB above the float32 dW."""
        extra, shape = figures.bytes(case, "pear-token"), SHAPES[case]
        return None if extra is None else (extra - 4 * shape.vocabulary * shape.hidden) / GIB

    base, over = GPU_BASE, "overheads"
    errors = [figures.value("accuracy", f"bf16-{kind}-cuda", "pear-token", "logprobs") for kind in KINDS]
    rms = None if None in errors else max(errors)
    return [
        Target("8192 tokens: time / three bare products", figures.ratio("sweeps", base, "pear-token", "bare"), 1.12),
        Target("131072 tokens: time / three bare products", figures.ratio("sweeps", LONG, "pear-token", "bare"), 1.12),
        Target("8192 tokens: GiB above inputs, gradients and float32 dW", above_workspace(base), 1.1, ".2f"),
        Target("131072 tokens: GiB above inputs, gradients and float32 dW", above_workspace(LONG), 1.1, ".2f"),
        Target("time / naive loss", figures.ratio("sweeps", base, "pear-token", "naive"), 0.85),
        Target(
            "token weights: time / ours without weights", figures.ratio(over, base, "pear-token", "unweighted"), 1.01
        ),
        Target("sequence level: time / token level", figures.ratio(over, base, "pear-sequence", "pear-token"), 1.10),
        Target("frozen head: time / two products", figures.ratio(over, base, "pear-token-frozen", "bare-frozen"), 1.12),
        Target("no gradient: time / one product", figures.ratio(over, base, "score", "bare-score"), 1.08),
        Target("rms error of log-probs, bf16 inputs, the worst of four kinds", rms, 5e-4, ".1e"),
    ]


def policy_on_cpu(figures: Figures) -> list[Target]:
    """RL's loss is to cost what SFT's does: three products, and their memory."""
    share = divided(figures.bytes(CPU_BASE, "policy-grpo"), figures.bytes(CPU_BASE, "naive-grpo"))
    return [
        Target(
            "time, ours, GRPO / ours, unweighted",
            figures.ratio("policy", CPU_BASE, "policy-grpo", "unweighted"),
            1.10,
        ),
        Target("memory, ours, GRPO / naive, GRPO", share, 0.15, ".1%"),
    ]


def real_on_cpu(figures: Figures) -> list[Target]:
    """With SmolLM2's logits for code: a tolerance pays, and its gradients are closer than the naive bf16 loss's."""
    case, exact = "real-code", "pear-token"
    ratio = {peer: figures.ratio("real", case, peer, exact) for peer in TOLERANT}
    error = {(peer, grad): figures.value("real-errors", case, peer, grad) for peer in TOLERANT for grad in ("dX", "dW")}
    fine, coarse = TOLERANT
    memory = {peer: divided(figures.bytes(case, peer), figures.bytes(case, exact)) for peer in TOLERANT}
    dense = figures.ratio("overheads", "cpu-small-4n", fine, exact)
    return [
        Target("time, gradient_tolerance 0.01 / exact", ratio[fine], 0.60),
        Target("time, gradient_tolerance 0.01 / naive", figures.ratio("real", case, fine, "naive"), 0.45),
        Target("error of dX, gradient_tolerance 0.01", error[fine, "dX"], 0.005, ".4f"),
        Target("error of dW, gradient_tolerance 0.01", error[fine, "dW"], 0.007, ".4f"),
        Target("time, gradient_tolerance 0.02 / exact", ratio[coarse], 0.55),
        Target("error of dX, gradient_tolerance 0.02", error[coarse, "dX"], 0.009, ".4f"),
        Target("error of dW, gradient_tolerance 0.02", error[coarse, "dW"], 0.009, ".4f"),
        *(Target(f"memory, {PEERS[peer].label} / exact", memory[peer], 1.10) for peer in TOLERANT),
        Target("time, gradient_tolerance 0.01 / exact, random logits", dense, 1.03),
    ]


def on_cpu(figures: Figures) -> list[Target]:
    rows = []
    for name in PEAR:
        label = PEERS[name].label
        for other, limit in (("naive", 0.80), ("bare", 1.25), ("unweighted", 1.03)):
            ratio = figures.ratio("sweeps", CPU_BASE, name, other)
            rows.append(Target(f"time, {label} / {PEERS[other].label}", ratio, limit))
        extra, longer = figures.bytes(CPU_BASE, name), figures.bytes("cpu-16k", name)
        share = divided(extra, figures.bytes(CPU_BASE, "naive"))
        rows.append(Target(f"memory, {label} / naive", share, 0.15, ".1%"))
        rows.append(Target(f"memory, {label}, N=16384 / N=4096", divided(longer, extra), 1.05))
    for kind in KINDS:
        for name in OWN:
            error = worst_error(figures, f"float32-{kind}", name)
            # far targets were only asked to be finite
            limit = float("inf") if kind == "far" else 5e-6
            rows.append(Target(f"float32 error, {PEERS[name].label}, {kind} targets", error, limit, ".1e"))
    for kind in KINDS:
        error = figures.value("accuracy", f"bf16-{kind}", "pear-token", "logprobs")
        rows.append(Target(f"rms error of log-probs, bf16 inputs, {kind} targets", error, 5e-4, ".1e"))
    return rows + policy_on_cpu(figures) + real_on_cpu(figures)


def slower_than(figures: Figures) -> list[str]:
    """Where a peer's pass takes less time than ours at token level, in words."""
    lines = []
    for case in figures.cases("sweeps"):
        ours = figures.seconds("sweeps", case, "pear-token")
        for peer in figures.peers("sweeps", case):
            theirs = figures.seconds("sweeps", case, peer)
            if peer == "bare" or PEERS[peer].package == OURS or not (ours and theirs) or theirs.middle >= ours.middle:
                continue
            both = f"{1e3 * theirs.middle:.2f} ms, ours {1e3 * ours.middle:.2f} ms"
            lines.append(f"{SHAPES[case]}: {PEERS[peer].label} takes {both}")
    return lines
