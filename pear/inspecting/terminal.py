"""The report as tables in a terminal; it ends with the advice."""

from typing import Any

from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from pear.inspecting.finding import share
from pear.inspecting.text import one_line

STYLES = {"problem": "bold red", "warning": "bold yellow", "note": "bold cyan", "fine": "bold green"}
NONE = "–"
LEVEL_ROWS = (  # of the table: name, key of a summary, how it is written
    ("mean weight", "weight_mean", "number"),
    ("mean log G", "log_weight_mean", "number"),
    ("on the floor", "floor", "share"),
    ("on the ceiling", "ceiling", "share"),
    ("effective sample size", "ess", "share"),
    ("tokens that will train", "trains", "share"),
    ("tokens with half the weight", "half", "share"),
    ("weight on the last tenth of each", "last_tenth", "share"),
)


def show(report: dict[str, Any], console: Console) -> None:
    for part in (_what, _policies, _ratios, _levels, _grid, _rows):
        console.print(part(report))
        console.print()
    for note in report["data"].get("notes", ()):
        console.print(Text(one_line(f"{note[:1].upper()}{note[1:]}."), style="yellow"), soft_wrap=True)
        console.print()
    console.print(_advice(report))


def number(x: float | None) -> str:
    return NONE if x is None else f"{x:.3g}"


def written(x: float | None, how: str) -> str:
    return NONE if x is None else share(x) if how == "share" else number(x)


def settings(options: dict[str, Any]) -> str:
    """The options in a line, those that are off left out."""
    low, high = options["log_ratio_clip"]
    floor, ceiling = options["log_weight_clip"]
    text = f"level {options['level']}"
    text += f" of {options['block_size']}" if options["level"] == "block" else ""
    text += f", gamma {options['gamma']:g}" if options["level"] != "sequence" else ""
    text += f", log-ratios clipped to [{low:g}, {high:g}], log G to [{floor:g}, {ceiling:g}]"
    text += ", by whole blocks" if options["clip_blocks"] else ""
    text += ", centred" if options["center"] else ""
    text += f", clip_length {options['clip_length']}" if options["clip_length"] else ""
    return text + (f", normalised by {options['normalize']}" if options["normalize"] else "")


def what(report: dict[str, Any]) -> str:
    """Which data and which student, in a line."""
    data = report["data"]
    text = (
        f"{data['rows']} of {data['rows_in_file']} rows"
        if data["rows"] != data["rows_in_file"]
        else f"{data['rows']} rows"
    )
    return (
        f"{text}, {data['tokens']} response tokens, {data['tokens'] - data['ratio_tokens']} of them without a ratio; a "
        f"response has {data['median_length']:g} tokens (median; the longest {data['longest']})"
    )


def _what(report: dict[str, Any]) -> Text:
    return Text(
        f"{one_line(report['file'])} for the student {one_line(report['student'])}\n"
        f"{what(report)}\n{settings(report['options'])}"
    )


def _policies(report: dict[str, Any]) -> Table:
    table = Table(title="who wrote it", title_justify="left")
    table.add_column("behaviour policy")
    for name in ("rows", "tokens", "with a ratio", "mean log-ratio", "mean weight"):
        table.add_column(name, justify="right")
    for policy in report["data"]["policies"]:
        name = one_line(policy["name"]) if policy["name"] != "none" else "none (weight 1)"
        extra = [
            f"{policy[key]} {word}"
            for key, word in (("estimated_rows", "estimated"), ("aligned_rows", "by bytes"))
            if policy[key]
        ]
        table.add_row(
            Text(name + (f" ({', '.join(extra)})" if extra else "")),
            str(policy["rows"]),
            str(policy["tokens"]),
            share(policy["ratio_tokens"] / policy["tokens"]),
            number(policy["log_ratio_mean"]),
            number(policy["weight_mean"]),
        )
    return table


def _ratios(report: dict[str, Any]) -> Group | Text:
    found, summary, (low, high) = report["log_ratio"], report["summary"], report["options"]["log_ratio_clip"]
    if not found["tokens"]:
        return Text("no token has a log-ratio")
    clipped = (
        f"after it, delta: {summary['delta_mean']:+.4f} on average; {share(summary['clipped_low'])} lie below {low:g}, "
        f"{share(summary['clipped_high'])} above {high:g}"
    )
    table = Table(title="log pi - log pi_b of a token, before its clip", title_justify="left")
    quantiles = {"least": "0.0", "5%": "0.05", "median": "0.5", "95%": "0.95", "largest": "1.0"}
    for name in ("mean", *quantiles):
        table.add_column(name, justify="right")
    table.add_row(number(found["mean"]), *(number(found["quantiles"][key]) for key in quantiles.values()))
    return Group(table, Text(clipped))


def _levels(report: dict[str, Any]) -> Table:
    table = Table(title="weights G", title_justify="left", caption=report["trains"], caption_justify="left")
    table.add_column("")
    for level in report["levels"]:
        chosen = level == report["options"]["level"]
        table.add_column(f"{level}{' (chosen)' if chosen else ''}", justify="right", style="bold" if chosen else None)
    for name, key, how in LEVEL_ROWS:
        table.add_row(name, *(written(level["summary"][key], how) for level in report["levels"].values()))
    return table


def _grid(report: dict[str, Any]) -> Table:
    level = report["options"]["level"]
    cells = [cell for cell in report["grid"] if cell["level"] == level]
    gammas = list(dict.fromkeys(cell["gamma"] for cell in cells))
    table = Table(title=f"tokens that will train (effective sample size), level {level}", title_justify="left")
    table.add_column("log_ratio_clip")
    for gamma in gammas:
        table.add_column(f"gamma {gamma:g}" if level != "sequence" else "", justify="right")
    for clip in dict.fromkeys(tuple(cell["log_ratio_clip"]) for cell in cells):
        mine = {cell["gamma"]: cell["summary"] for cell in cells if tuple(cell["log_ratio_clip"]) == clip}
        chosen = list(clip) == report["options"]["log_ratio_clip"]
        table.add_row(
            f"{clip[0]:g} {clip[1]:g}" + (" (chosen)" if chosen else ""),
            *(f"{share(mine[gamma]['trains'])} ({share(mine[gamma]['ess'])})" for gamma in gammas),
        )
    return table


def _rows(report: dict[str, Any]) -> Table:
    table = Table(
        title="rows to look at",
        title_justify="left",
        caption="their text, coloured by weight: --html",
        caption_justify="left",
    )
    for name in ("line", "tokens", "mean weight", "mean log-ratio", "train"):
        table.add_column(name, justify="right")
    table.add_column("chosen for")
    for row in report["rows"]:
        numbers = (number(row["mean_weight"]), number(row["mean_log_ratio"]), share(row["trains"]))
        table.add_row(str(row["line"]), str(row["tokens"]), *numbers, "; ".join(row["reasons"]))
    return table


def _advice(report: dict[str, Any]) -> Group:
    parts: list[Any] = []
    for finding in report["advice"]:
        head = Text(f"{finding['severity']}: ", style=STYLES[finding["severity"]])
        parts.append(head + Text(one_line(finding["text"]), style="default"))
        for option in finding["options"]:
            parts.append(
                Padding(
                    Text(f"{option['flags']}: ", style="bold") + Text(option["effect"], style="not bold"), (0, 0, 0, 4)
                )
            )
    return Group(*parts)
