"""From the measurements to one table and one picture, with each target beside its figure and never loosened."""

import argparse
import json
from pathlib import Path
from statistics import median, quantiles

from bench import machine
from bench.peers import OURS, PEERS
from bench.shapes import SHAPES, Shape
from pear.io import write_json, write_text

# What was asked for on a CPU before anything was measured: the case, and its figures.
CASE, LONG_CASE = "cpu-4k", "cpu-16k"
TIME_TO_NAIVE, TIME_TO_BARE, TIME_TO_UNWEIGHTED = 0.80, 1.25, 1.03
MEMORY_TO_NAIVE, MEMORY_GROWTH = 0.15, 1.05
FLOAT32_ERROR, BF16_LOGPROB_ERROR = 5e-6, 5e-4
PEAR = [name for name, peer in PEERS.items() if peer.package == OURS and peer.level]
OWN = [name for name, peer in PEERS.items() if peer.package == OURS]


class Speed:
    """Seconds of each peer in each round of one case; ratios are taken within a round."""

    def __init__(self, benchmarks: list[dict], case: str):
        self.seconds: dict[str, dict[int, float]] = {}  # wall clock
        self.cpu_seconds: dict[str, dict[int, float]] = {}  # of the process, all threads together
        for entry in benchmarks:
            about = entry["extra_info"]
            if about["case"] == case and about["turn"] > 0:  # round 0 warms up
                self.seconds.setdefault(about["peer"], {})[about["turn"]] = entry["stats"]["min"]
                self.cpu_seconds.setdefault(about["peer"], {})[about["turn"]] = about["cpu_seconds"]

    def of(self, peer: str) -> list[float]:
        return list(self.seconds[peer].values())

    def ratio(self, peer: str, to: str) -> float | None:
        return median_ratio(self.seconds.get(peer, {}), self.seconds.get(to, {}))

    def cpu_ratio(self, peer: str, to: str) -> float | None:
        return median_ratio(self.cpu_seconds.get(peer, {}), self.cpu_seconds.get(to, {}))


def median_ratio(mine: dict[int, float], other: dict[int, float]) -> float | None:
    ratios = [mine[turn] / other[turn] for turn in mine if turn in other]
    return median(ratios) if ratios else None


def number(value: float | None, style: str = ".2f") -> str:
    return "" if value is None else format(value, style)


def describe(shape: Shape) -> str:
    dtype = str(shape.dtype).removeprefix("torch.")
    return f"N={shape.tokens}, D={shape.hidden}, V={shape.vocabulary}, {dtype}, {shape.device}"


def speed_and_memory_table(speed: Speed, memory: dict[tuple[str, str], dict], case: str) -> list[str]:
    lines = [
        "| | time, s | 20 to 80% | of naive | of bare | CPU time, of naive | of bare | extra memory, MiB | of naive |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    skipped = []
    for name, peer in PEERS.items():
        if name not in speed.seconds:
            skipped.append(f"- {peer.label}: not run, {peer.unavailable(SHAPES[case]) or 'no measurement'}")
            continue
        times = speed.of(name)
        low, *_, high = quantiles(times, n=5) if len(times) > 1 else times * 2
        ratios = [way(name, to) for way in (speed.ratio, speed.cpu_ratio) for to in ("naive", "bare")]
        extra = memory.get((case, name), {}).get("bytes")
        naive = memory.get((case, "naive"), {}).get("bytes")
        lines.append(
            f"| {peer.label} | {median(times):.3f} | {low:.3f} to {high:.3f} | {' | '.join(map(number, ratios))} "
            f"| {number(extra and extra / 2**20, '.0f')} | {number(extra and naive and extra / naive, '.1%')} |"
        )
    return lines + ([""] + skipped if skipped else [])


def targets(speed: Speed, memory: dict[tuple[str, str], dict], accuracy: dict) -> list[tuple[str, float, float, str]]:
    """(what, measured, at most, format) of every figure that was asked for."""

    def extra(case: str, peer: str) -> float:
        return memory.get((case, peer), {}).get("bytes") or float("nan")

    rows = []
    for name in PEAR:
        label = PEERS[name].label
        for other, limit in (("naive", TIME_TO_NAIVE), ("bare", TIME_TO_BARE), ("unweighted", TIME_TO_UNWEIGHTED)):
            if (ratio := speed.ratio(name, other)) is not None:
                rows.append((f"time, {label} / {PEERS[other].label}", ratio, limit, ".3f"))
        rows.append((f"memory, {label} / naive", extra(CASE, name) / extra(CASE, "naive"), MEMORY_TO_NAIVE, ".1%"))
        growth = extra(LONG_CASE, name) / extra(CASE, name)
        rows.append((f"memory, {label}, N=16384 / N=4096", growth, MEMORY_GROWTH, ".3f"))
    for kind in dict.fromkeys(row["targets"] for row in accuracy["errors"]):
        for name in OWN:
            found = [row for row in accuracy["errors"] if row["targets"] == kind and row["peer"] == name]
            if found:
                worst = max(found[0][key] for key in ("loss", "dX", "dW"))
                rows.append((f"float32 error, {PEERS[name].label}, {kind} targets", worst, FLOAT32_ERROR, ".1e"))
    for row in accuracy["bf16_logprobs"]:
        if row["peer"] == "ours":
            rows.append(("rms error of log-probs, bf16 inputs", row["rms"], BF16_LOGPROB_ERROR, ".1e"))
    far = accuracy["far_targets"]
    worst = max(far[key] for key in ("loss", "dX", "dW")) if far["finite"] else float("nan")
    rows.append(("no NaN at z_v - z_y = 200: float32 error, ours, unweighted", worst, float("inf"), ".1e"))
    return rows


def target_table(rows: list[tuple[str, float, float, str]]) -> list[str]:
    lines = ["| figure | measured | at most | |", "| --- | ---: | ---: | --- |"]
    for what, value, limit, style in rows:
        verdict = "yes" if value <= limit else "**no**"  # NaN is a no
        bound = "finite" if limit == float("inf") else format(limit, style)
        lines.append(f"| {what} | {value:{style}} | {bound} | {verdict} |")
    return lines


def accuracy_table(accuracy: dict) -> list[str]:
    kinds = list(dict.fromkeys(row["targets"] for row in accuracy["errors"]))
    lines = [
        "| | " + " | ".join(f"{kind}: loss | dX | dW" for kind in kinds) + " |",
        "| --- |" + " ---: |" * (3 * len(kinds)),
    ]
    for name in dict.fromkeys(row["peer"] for row in accuracy["errors"]):
        cells = []
        for kind in kinds:
            row = next(row for row in accuracy["errors"] if row["peer"] == name and row["targets"] == kind)
            cells += [f"{row[key]:.0e}" for key in ("loss", "dX", "dW")]
        lines.append(f"| {PEERS[name].label} | " + " | ".join(cells) + " |")
    spans = {row["targets"]: (row["logprobs"], row["one_minus_p"]) for row in accuracy["errors"]}
    described = [
        f"{kind}: log p from {logprobs[0]:.3g} to {logprobs[1]:.3g}, 1 - p from {gap[0]:.2g} to {gap[1]:.2g}"
        for kind, (logprobs, gap) in spans.items()
    ]
    rms = ", ".join(f"{row['peer']} {row['rms']:.1e}" for row in accuracy["bf16_logprobs"])
    return [*lines, "", "; ".join(described) + ".", "", f"Rms error of log-probs with bf16 inputs: {rms}."]


def picture(speed: Speed, memory: dict[tuple[str, str], dict], case: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name in PEERS if name in speed.seconds][::-1]
    labels = [PEERS[name].label for name in names]
    colors = ["#c0562f" if name in OWN else "#8a94a6" for name in names]
    naive = memory[case, "naive"]["bytes"]
    panels = (
        ("time, of naive", [speed.ratio(name, "naive") for name in names], TIME_TO_NAIVE, "{:.2f}"),
        (
            "extra peak memory, of naive",
            [memory[case, name]["bytes"] / naive for name in names],
            MEMORY_TO_NAIVE,
            "{:.0%}",
        ),
    )
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.45 * len(names) + 1.6), sharey=True, layout="constrained")
    for axis, (title, values, limit, style) in zip(axes, panels, strict=True):
        bars = axis.barh(labels, values, color=colors)
        axis.bar_label(bars, [style.format(value) for value in values], padding=3, fontsize=9)
        axis.axvline(limit, color="#222222", linestyle="--", linewidth=1, label=f"target {style.format(limit)}")
        axis.set_title(title, fontsize=11)
        axis.set_xlim(0, 1.15 * max(values))
        axis.spines[["top", "right"]].set_visible(False)
    bare = TIME_TO_BARE * speed.ratio("bare", "naive")
    axes[0].axvline(bare, color="#4c72b0", linestyle=":", linewidth=1.2, label=f"target {TIME_TO_BARE} of bare")
    for axis in axes:
        axis.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.05), ncols=2)
    figure.suptitle(f"Forward and backward, {describe(SHAPES[case])}", fontsize=12)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write(raw: Path, results: Path) -> Path:
    """From the JSON files in `raw`: report.md, report.png, results.json in `results`/<machine>/, which it returns."""
    speed_json = json.loads((raw / "speed.json").read_text())
    memory_json = json.loads((raw / "memory.json").read_text())
    accuracy = json.loads((raw / "accuracy.json").read_text())
    facts = speed_json["machine_info"]["pear"]
    memory = {(row["case"], row["peer"]): row for row in memory_json["rows"]}
    folder = results / machine.folder_name(facts)
    folder.mkdir(parents=True, exist_ok=True)

    lines = ["# Benchmarks", "", *(f"- {name}: {value}" for name, value in facts.items())]
    kept = {"machine": facts, "speed": {}, "memory": memory_json["rows"], "accuracy": accuracy}
    for case in dict.fromkeys(entry["extra_info"]["case"] for entry in speed_json["benchmarks"]):
        shape, speed = SHAPES[case], Speed(speed_json["benchmarks"], case)
        kept["speed"][case] = {"seconds": speed.seconds, "cpu_seconds": speed.cpu_seconds}
        rounds = max(len(times) for times in speed.seconds.values())
        lines += [
            "",
            f"## Forward and backward: {describe(shape)}",
            "",
            f"Medians over {rounds} interleaved rounds; ratios are medians of the ratios within a round. Extra memory",
            "is the peak above inputs and gradients, each in a process of its own.",
            "",
            *speed_and_memory_table(speed, memory, case),
        ]
        if case == CASE:
            lines += ["", "![time and memory](report.png)", "", "## Targets", ""]
            lines += target_table(targets(speed, memory, accuracy))
        if case == CASE or CASE not in {entry["extra_info"]["case"] for entry in speed_json["benchmarks"]}:
            picture(speed, memory, case, folder / "report.png")
    lines += ["", "## Relative error against float64", "", *accuracy_table(accuracy)]

    write_text(folder / "report.md", "\n".join(lines) + "\n")
    write_json(folder / "results.json", kept)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("raw", type=Path, help="folder with speed.json, memory.json and accuracy.json")
    parser.add_argument("--results", type=Path, default=machine.ROOT / "bench" / "results")
    arguments = parser.parse_args()
    folder = write(arguments.raw, arguments.results)
    print((folder / "report.md").read_text())
    print(f"written to {folder}")


if __name__ == "__main__":
    main()
