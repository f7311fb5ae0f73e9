"""From the rows of one machine to results.json, a table to read and pictures, under bench/results/<device>/."""

import argparse
import json
from pathlib import Path

from bench import machine, targets
from bench.cells import Cell
from bench.figures import Figures
from bench.objectives import BESIDE, WITH_LOGITS
from bench.peers import PEERS
from bench.shapes import SHAPES, TOP_K, sequences
from bench.store import Store, write_rows, write_text_whole

OVER = {  # what each is an overhead over
    "pear-token": ["bare", "unweighted"],
    "pear-token-0.01": ["pear-token"],
    "pear-block": ["bare", "unweighted"],
    "pear-sequence": ["bare", "pear-token"],
    "pear-token-frozen": ["bare-frozen"],
    "score": ["bare-score"],
    "naive-score": ["bare-score"],
}
REAL_VALUES = {"dX": "error of dX", "dW": "error of dW", "kept": "kept", "left_out": "left out"}
ERRORS = ("logprobs", "loss", "dX", "dW")
POLICY_TO = ("bare", "unweighted", "naive-grpo")
OBJECTIVES_TO = {  # peers that all are held against, or to each its own
    "bare": dict.fromkeys(["bare", "bare-teacher", "unweighted"], "bare")
    | {peer: "bare-teacher" if name in WITH_LOGITS else "bare" for name in BESIDE for peer in BESIDE[name]},
    "unweighted": "unweighted",
    "naive": {peer: peers[0] for peers in BESIDE.values() for peer in peers},
}


def number(value: float | None, style: str = ".2f") -> str:
    return "" if value is None else format(value, style)


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Markdown; all columns but the first to the right."""
    lines = [f"| {' | '.join(head)} |", "| --- |" + " ---: |" * (len(head) - 1)]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def times(
    figures: Figures,
    question: str,
    case: str,
    beside: dict[str, list[str]] | None = None,
    to: tuple[str, ...] | dict[str, str | dict[str, str]] = ("bare", "naive"),
    memory_to: tuple[str, ...] = ("bare",),
    values: dict[str, str] | None = None,
) -> list[str]:
    """Every peer of a case: quantiles, memory, and its ratios to the peers `to` or, each to its own, to `beside`.

    A peer of `to` stands for a column, in which a dict may name another for each row. `values` are further columns, by
    their keys, from rows of the question "<question>-errors".
    """
    on_cpu = SHAPES[case].device == "cpu"
    head, rows = ["", "ms", "20 to 80 %", "samples", "extra memory, MiB", *(f"of {name}" for name in memory_to)], []

    def other(column: str, peer: str) -> str | None:
        named = to[column] if isinstance(to, dict) else column
        return named.get(peer) if isinstance(named, dict) else named

    def memory_ratio(column: str, peer: str) -> float | None:
        mine, others = figures.bytes(case, peer), figures.bytes(case, other(column, peer))
        return mine and others and mine / others

    if beside:
        head += ["beside"]
    else:
        of = [f"of {name}" for name in to]
        head += [*of, *[f"CPU time, {of[0]}", *of[1:]] * on_cpu]
    head += (values or {}).values()
    for peer in sorted(figures.peers(question, case), key=list(PEERS).index):
        found = figures.seconds(question, case, peer)
        if found is None:
            continue
        extra = figures.bytes(case, peer)
        row = [PEERS[peer].label, f"{1e3 * found.middle:.2f}", f"{1e3 * found.low:.2f} to {1e3 * found.high:.2f}"]
        row += [str(found.samples), number(extra and extra / 2**20, ".0f")]
        row += [number(memory_ratio(name, peer)) for name in memory_to]
        if beside:
            ratios = {name: figures.ratio(question, case, peer, name) for name in beside.get(peer, [])}
            row.append("; ".join(f"{ratio:.3f} of {PEERS[name].label}" for name, ratio in ratios.items() if ratio))
        else:
            for what in ["seconds", "cpu_seconds"][: 1 + on_cpu]:
                row += [number(figures.ratio(question, case, peer, other(name, peer), what), ".3f") for name in to]
        row += [number(figures.value(f"{question}-errors", case, peer, key), ".2g") for key in values or {}]
        rows.append(row)
    missing = [f"- {PEERS[peer].label}: {why}" for peer, why in figures.not_run(question, case).items()]
    return table(head, rows) + ([""] + missing if missing else [])


def accuracy(figures: Figures) -> list[str]:
    """Every peer in one table for each dtype, and the probabilities that the kinds of targets have."""
    lines = []
    for dtype in ("float32", "bf16"):
        cases = [case for case in figures.cases("accuracy") if case.startswith(dtype)]
        kinds = [case.split("-")[1] for case in cases]
        peers = list(dict.fromkeys(peer for case in cases for peer in figures.peers("accuracy", case)))
        rows, spans, missing = [], {}, []
        for peer in sorted(peers, key=list(PEERS).index):
            values = [[figures.value("accuracy", case, peer, key) for key in ERRORS] for case in cases]
            if all(value is None for of_case in values for value in of_case):
                missing.append(f"- {PEERS[peer].label}: {figures.not_run('accuracy', cases[0]).get(peer, '')}")
                continue
            cells = [number(value, ".0e") or "" for of_case in values for value in of_case]
            rows.append([PEERS[peer].label, *cells])
            for case, kind in zip(cases, kinds, strict=True):
                spans.setdefault(kind, [figures.value("accuracy", case, peer, key) for key in ("span", "one_minus_p")])
        if not cases:
            continue
        head = ["", *(f"{kind}: log p" if key == "logprobs" else key for kind in kinds for key in ERRORS)]
        lines += ["", f"### {dtype} inputs", "", *table(head, rows)]
        if missing:
            lines += ["", *missing]
        described = [
            f"{kind}: log p from {logp[0]:.3g} to {logp[1]:.3g}, 1 - p from {gap[0]:.2g} to {gap[1]:.2g}"
            for kind, (logp, gap) in spans.items()
            if logp and gap
        ]
        lines += ["", "; ".join(described) + "."]
    return lines


def largest(figures: Figures) -> list[str]:
    lines = []
    for case in figures.cases("largest"):
        shape = SHAPES[case.removeprefix("N-")]
        for peer in figures.peers("largest", case):
            tokens, card = (figures.value("largest", case, peer, key) for key in ("tokens", "card_bytes"))
            why = figures.not_run("largest", case).get(peer)
            told = f"{tokens} tokens in {card / 2**30:.0f} GiB" if tokens is not None else f"not measured, {why}"
            lines.append(f"- {PEERS[peer].label}, D={shape.hidden}, V={shape.vocabulary}: {told}")
    return lines


def policy(figures: Figures) -> list[str]:
    lines = ["", "## Policy losses", "", "Forward and backward of RL's loss on the pack of an SFT step. Ours and TRL's"]
    lines += ["give the entropy too; an entropy bonus has the three products of the others."]
    for case in figures.cases("policy"):
        shape = SHAPES[case]
        lengths = sequences(shape, 0).diff()
        padded = len(lengths) * int(lengths.max())
        lines += ["", f"### {shape}", "", *times(figures, "policy", case, to=POLICY_TO)]
        lines += [
            "",
            f"Liger's takes rows of one length: with padding {padded} tokens, {padded / shape.tokens:.2f} times",
        ]
        lines += ["the pack's, all of which go through its products."]
    return lines


def objectives(figures: Figures) -> list[str]:
    lines = ["", "## Other weights, wrong sequences, distillation", ""]
    lines += ["Forward and backward on the pack of an SFT step. Ratios are to the bare products (with the teacher's"]
    lines += ["logits, where it is in memory), to our unweighted pass, and to the naive version of the same objective,"]
    lines += [
        "which has full logits in float32 and autograd. (Of given weights, iw-SFT, PSFT and ASFT: to naive DFT, the"
    ]
    lines += ["same with another factor.) The reference policy is the behaviour policy."]
    for case in figures.cases("objectives"):
        shape = SHAPES[case]
        lengths = sequences(shape, 0).diff()
        wrong = lengths[3::4]
        lines += ["", f"### {shape}", ""]
        lines += times(figures, "objectives", case, to=OBJECTIVES_TO, memory_to=("bare", "naive"))
        lines += ["", f"The teacher's D is {shape.hidden // 2}; the offline one has its {TOP_K} most likely tokens."]
        lines += [f"Wrong are {len(wrong)} of {len(lengths)} sequences, {int(wrong.sum())} of {shape.tokens} tokens."]
        lines += ["Liger's JSD is eager on a CPU and without its hard loss; TRL's GKD is given full logits."]
    return lines


def real(figures: Figures) -> list[str]:
    lines = ["", "## A trained model's logits", ""]
    lines += ["Forward and backward on SmolLM2's hidden states and head, for two texts, and on inputs fitted to them"]
    lines += [
        "(`bench/fitted.py`). Beside each time stand the relative errors of dX and dW that the same peer makes on"
    ]
    lines += ["the same inputs, against its own loss in float64, and the share of products 2 and 3 that it keeps."]
    for case in dict.fromkeys(figures.cases("real") + figures.cases("real-errors")):
        lines += ["", f"### {SHAPES[case]}", ""]
        if case in figures.cases("real"):
            lines += times(figures, "real", case, values=REAL_VALUES)
            continue
        missing = figures.not_run("real-errors", case)
        rows = [
            [PEERS[peer].label, *(number(figures.value("real-errors", case, peer, key), ".2g") for key in REAL_VALUES)]
            for peer in sorted(figures.peers("real-errors", case), key=list(PEERS).index)
            if peer not in missing
        ]
        lines += table(["", *REAL_VALUES.values()], rows)
        lines += ["", *(f"- {PEERS[peer].label}: {why}" for peer, why in missing.items())] if missing else []
    return lines


def text(facts: dict, figures: Figures, left: list[Cell], pictures: list[str], only: str = "") -> str:
    lines = ["# Benchmarks", "", *(f"- {name}: {value}" for name, value in facts.items())]
    if left:
        lines += ["", f"**Not complete: {len(left)} of {len(left) + len(figures.rows)} cells are not measured yet.**"]
    asked = targets.of(facts["device"], figures, only)
    if asked:
        lines += ["", "## Targets", "", "| figure | measured | at most | |", "| --- | ---: | ---: | --- |"]
        lines += [target.line() for target in asked]
    checks = [row for row in figures.rows if row["question"] == "checks"]
    if checks:
        lines += ["", "## Checks", "", *(f"- {row['peer']}: {row.get('said') or row['skipped']}" for row in checks)]
    if pictures:
        lines += ["", *(f"![{name}]({name})" for name in pictures)]
    lines += ["", "## How to read", "", "Times are medians over all rounds and their 20 and 80 % quantiles;"]
    lines += ["ratios are medians of the ratios within a round around the peers. Extra memory is the peak above inputs"]
    lines += ["and gradients in their dtype."]
    if figures.cases("sweeps"):
        lines += ["", "## Forward and backward", "", "Peers compute PEAR's token level where they can be made to."]
        for case in figures.cases("sweeps"):
            lines += ["", f"### {SHAPES[case]}", "", *times(figures, "sweeps", case)]
        slower = targets.slower_than(figures)
        lines += ["", "Where another library's pass takes less time than ours at token level:", ""]
        lines += [f"- {line}" for line in slower] or ["- nowhere in these tables"]
    if figures.cases("overheads"):
        lines += ["", "## Overheads"]
    for case in figures.cases("overheads"):
        lines += ["", f"### {SHAPES[case]}", "", *times(figures, "overheads", case, OVER)]
    if figures.cases("policy"):
        lines += policy(figures)
    if figures.cases("objectives"):
        lines += objectives(figures)
    if figures.cases("real") or figures.cases("real-errors"):
        lines += real(figures)
    if figures.cases("accuracy"):
        lines += ["", "## Error against float64", "", "Root mean square of log-probs; relative error of loss, dX, dW."]
        lines += accuracy(figures)
    if figures.cases("largest"):
        lines += ["", "## The most tokens that fit, forward and backward", "", *largest(figures)]
    return "\n".join(lines) + "\n"


def write(store: Store, results: Path, left: list[Cell], only: str = "", note: str = "") -> Path:
    """report.md, results.json and, where matplotlib is, pictures, in `results`/<device>/, which it returns.

    Of one question (`only`): <question>.md and <question>.json, beside the report of all, and no pictures.
    """
    figures = Figures(store.rows)
    folder = results / machine.folder_name(store.facts)
    folder.mkdir(parents=True, exist_ok=True)
    facts = {**store.facts, "commit": ", ".join(sorted({row["commit"] for row in store.rows.values()}))}
    if note:
        facts["note"] = note
    drawn = []
    if not only:
        try:
            from bench import pictures

            drawn = pictures.draw(figures, folder)
        except ImportError as error:
            facts["pictures"] = f"none, {error}"
    about = {name: facts[name] for name in ("device", "versions")}
    rows = {name: {**row, **about} for name, row in store.rows.items()}
    write_rows(folder / f"{only or 'results'}.json", facts, rows)
    write_text_whole(folder / f"{only or 'report'}.md", text(facts, figures, left, drawn, only))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the report of a results.json anew.")
    parser.add_argument("folder", type=Path, help="one that holds a results.json")
    parser.add_argument("--only", default="", metavar="QUESTION", help="of its QUESTION.json")
    arguments = parser.parse_args()
    folder, only = arguments.folder, arguments.only
    kept = json.loads((folder / f"{only or 'results'}.json").read_text())
    figures = Figures(kept["rows"])
    drawn = []
    if not only:
        from bench import pictures

        drawn = pictures.draw(figures, folder)
    write_text_whole(folder / f"{only or 'report'}.md", text(kept["machine"], figures, [], drawn, only))


if __name__ == "__main__":
    main()
