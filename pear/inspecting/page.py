"""The report as one HTML page that needs nothing else: pictures, text coloured by weight, and the advice at its end."""

import base64
import hashlib
import html
import math
from collections import Counter
from typing import Any

from pear.inspecting import pictures
from pear.inspecting.finding import SEVERITIES, count, share
from pear.inspecting.statistics import LEVELS
from pear.inspecting.style import SCRIPT, SHOWN, STEPS, heat_class, style
from pear.inspecting.terminal import LEVEL_ROWS, number, settings, what, written
from pear.inspecting.text import one_line, visible

RATIO_STEPS = (0.02, 0.08, 0.3, 1.0, 3.0)  # |log-ratio| from which each step of colour starts
WEIGHT_STEPS = (0.1, 0.5, 1.5, 4.0, 8.0)  # |log G|, likewise


def page(report: dict[str, Any]) -> str:
    """The whole document. Equal reports give equal text."""
    script = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    level = report["options"]["level"]
    parts = [
        '<!doctype html><html lang="en" data-theme="light"><head><meta charset="utf-8">',
        # should some text ever get out of its place, it still could not run or load anything
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        f"style-src 'unsafe-inline'; script-src 'sha256-{script}'\">",
        '<meta name="viewport" content="width=device-width,initial-scale=1"><link rel="icon" href="data:,">',
        f"<title>{_escape(report['file'])}: PEAR weights</title><style>{style()}</style></head>",
        f'<body data-level="{level}" data-show="{level}"><main>',
        _head(report),
        _bar(level),
        _policies(report),
        _ratios(report),
        _levels(report),
        _positions(report),
        _grid(report),
        _rows(report),
        _advice(report),
        f'</main><div id="tip" role="tooltip" hidden></div><script>{SCRIPT}</script></body></html>\n',
    ]
    return "\n".join(parts)


def _escape(text: str) -> str:
    return html.escape(one_line(text))


# ---------------------------------------------------------------------------------------------------------------------
# Numbers and pictures


def _head(report: dict[str, Any]) -> str:
    counts = Counter(finding["severity"] for finding in report["advice"])
    plural = {"problem": "problem", "warning": "warning", "note": "note"}
    verdicts = [
        f'<a class="verdict {severity}" href="#advice">'
        + ("looks fine" if severity == "fine" else count(counts[severity], plural[severity]))
        + "</a>"
        for severity in SEVERITIES
        if counts[severity]
    ]
    return (
        f"<h1>What PEAR's weights will do to {_escape(report['file'])}</h1>"
        f"<p>student: <code>{_escape(report['student'])}</code><br>{_escape(what(report))}<br>"
        f"{_escape(settings(report['options']))}</p><p>{''.join(verdicts)}</p>"
        f"<p><b>{_escape(_first_sentence(report['advice'][0]['text']))}</b></p>"
    )


def _first_sentence(text: str) -> str:
    return text.partition(". ")[0].rstrip(".") + "."


def _bar(level: str) -> str:
    def radios(name: str, values: dict[str, str], checked: str) -> str:
        return "".join(
            f'<label><input type="radio" name="{name}" value="{value}"{" checked" if value == checked else ""}> '
            f"{words}</label>"
            for value, words in values.items()
        )

    return (
        '<div class="bar"><fieldset><legend>level</legend>'
        + radios("level", {name: name for name in LEVELS}, level)
        + "</fieldset><fieldset><legend>colour the text by</legend>"
        + radios("color", {"weight": "weight", "ratio": "log-ratio"}, "weight")
        + '</fieldset><button id="theme" type="button">light / dark</button></div>'
    )


def _table(head: list[str], rows: list[list[str]], caption: str = "", chosen: int | None = None) -> str:
    """Cells are HTML already; column `chosen` stands out."""
    mark = [' class="chosen"' if i == chosen else "" for i in range(len(head))]
    lines = ["<tr>" + "".join(f"<th{m}>{cell}</th>" for m, cell in zip(mark, head, strict=True)) + "</tr>"]
    lines += [
        "<tr>" + "".join(f"<td{m}>{cell}</td>" for m, cell in zip(mark, row, strict=True)) + "</tr>" for row in rows
    ]
    caption = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return f'<div class="scroll"><table>{caption}{"".join(lines)}</table></div>'


def _policies(report: dict[str, Any]) -> str:
    rows = []
    for policy in report["data"]["policies"]:
        name = "none (weight 1)" if policy["name"] == "none" else policy["name"]
        extra = "".join(
            f' <span class="dim">({policy[key]} {word})</span>'
            for key, word in (("estimated_rows", "estimated"), ("aligned_rows", "aligned by bytes"))
            if policy[key]
        )
        rows.append(
            [
                _escape(name) + extra,
                str(policy["rows"]),
                str(policy["tokens"]),
                share(policy["ratio_tokens"] / policy["tokens"]),
                number(policy["log_ratio_mean"]),
                number(policy["weight_mean"]),
            ]
        )
    head = ["behaviour policy", "rows", "tokens", "with a ratio", "mean log-ratio", "mean weight"]
    data = report["data"]
    left_out = f"{len(data['too_long'])} rows left out as too long, {len(data['unaligned'])} that cannot be aligned"
    notes = "".join(f"<p>{html.escape(note[:1].upper() + note[1:])}.</p>" for note in data.get("notes", ()))
    return (
        f"<h2>Who wrote it</h2>{_table(head, rows, left_out if data['too_long'] or data['unaligned'] else '')}{notes}"
    )


def _ratios(report: dict[str, Any]) -> str:
    found = report["log_ratio"]
    if not found["tokens"]:
        return "<h2>Log-ratios</h2><p>No token has one.</p>"
    quantiles = "; ".join(f"{100 * float(key):g}%: {number(value)}" for key, value in found["quantiles"].items())
    summary = report["summary"]
    return (
        "<h2>Log-ratios, before their clip</h2><p>Left of 0 the student finds a token less likely than the policy that "
        "wrote it. What lies beyond the dashed lines counts as no more than they say.</p>"
        f"<figure>{pictures.ratios(report)}<figcaption>mean {found['mean']:+.4f}, after the clip "
        f"{summary['delta_mean']:+.4f} a token; quantiles {quantiles}</figcaption></figure>"
    )


def _levels(report: dict[str, Any]) -> str:
    chosen = report["options"]["level"]
    rows = [
        [name, *(written(report["levels"][level]["summary"][key], how) for level in LEVELS)]
        for name, key, how in LEVEL_ROWS
    ]
    head = ["weights G", *(f"{level} (chosen)" if level == chosen else level for level in LEVELS)]
    return f"<h2>Weights</h2>{_table(head, rows, report['trains'], 1 + LEVELS.index(chosen))}"


def _positions(report: dict[str, Any]) -> str:
    by_position = "".join(pictures.by_position(report, level) for level in LEVELS)
    along = "".join(pictures.along(report, level) for level in LEVELS)
    return (
        "<h2>Weights by position</h2><p>The last token of a response is at the right. The line is the median, the "
        "bands hold the middle 50% and 80% of the tokens there; dotted is weight 1, as in plain SFT, dashed are floor "
        f'and ceiling.</p><figure><div class="three">{by_position}</div></figure>'
        "<p>The share of all weight in each twentieth of the responses; dotted is the share of the tokens, which is "
        f'that of plain SFT.</p><figure><div class="three">{along}</div></figure>'
    )


def _grid(report: dict[str, Any]) -> str:
    parts = []
    for level in LEVELS:
        cells = [cell for cell in report["grid"] if cell["level"] == level]
        gammas = list(dict.fromkeys(cell["gamma"] for cell in cells))
        rows = []
        for clip in dict.fromkeys(tuple(cell["log_ratio_clip"]) for cell in cells):
            mine = [cell for cell in cells if tuple(cell["log_ratio_clip"]) == clip]
            row = "".join(_cell(report, cell) for cell in mine)
            rows.append(f"<tr><td>{clip[0]:g} {clip[1]:g}</td>{row}</tr>")
        names = "".join(
            f'<th class="cell">{f"gamma {gamma:g}" if level != "sequence" else ""}</th>' for gamma in gammas
        )
        parts.append(
            f'<div class="at-{level}"><div class="scroll"><table><tr><th>clip</th>{names}</tr>{"".join(rows)}</table>'
            "</div></div>"
        )
    return (
        "<h2>Other gammas and clips</h2><p>The median of log G as above, the last token at the right, for the level "
        "chosen in the bar; below it, the share of tokens that train and the effective sample size. The frame marks "
        f"the setting that was asked for.</p>{''.join(parts)}"
    )


def _cell(report: dict[str, Any], cell: dict[str, Any]) -> str:
    options, summary = report["options"], cell["summary"]
    same_gamma = cell["gamma"] == options["gamma"] or cell["level"] == "sequence"
    chosen = same_gamma and cell["log_ratio_clip"] == options["log_ratio_clip"]
    return (
        f'<td class="cell{" chosen" if chosen else ""}">{pictures.cell(report, cell)}{share(summary["trains"])} '
        f'<span class="dim">({share(summary["ess"])})</span></td>'
    )


# ---------------------------------------------------------------------------------------------------------------------
# Text


def step(value: float | None, bounds: tuple[float, ...]) -> int:
    """From -STEPS to STEPS: how strongly, and in which colour, a value shows."""
    if value is None:
        return 0
    return int(math.copysign(sum(abs(value) >= bound for bound in bounds), value))


def _rows(report: dict[str, Any]) -> str:
    if not report["rows"]:
        return ""
    return (
        "<h2>Rows to look at</h2><p>Each token's background says its weight, or its log-ratio: choose in the bar. "
        "Point at a token for its numbers. A dotted line below: no ratio. Signs such as ⏎ and ⟨U+202E⟩ stand for "
        f"characters that do not show.</p>{_key()}{''.join(_row(report, row) for row in report['rows'])}"
    )


def _key() -> str:
    """The steps of colour, in words."""

    def scale(letter: str, bounds: tuple[float, ...], name: str) -> str:
        words = {0: f"within {bounds[0]:g}"}
        for i, bound in enumerate(bounds, start=1):
            words |= {i: f"+{bound:g}", -i: f"−{bound:g}"}
        spans = [f'<span class="k {heat_class(letter, i)}">{words[i]}</span>' for i in range(-STEPS, STEPS + 1)]
        return f"{name} from {''.join(spans)}"

    parts = [f'<div class="key by-ratio">{scale(SHOWN["ratio"], RATIO_STEPS, "log-ratio")}</div>']
    parts += [
        f'<div class="key by-weight at-{level}">{scale(SHOWN[level], WEIGHT_STEPS, "log G")}</div>' for level in LEVELS
    ]
    return "".join(parts)


def _row(report: dict[str, Any], row: dict[str, Any]) -> str:
    facts = [
        f"<b>line {row['line']}</b>",
        html.escape("; ".join(row["reasons"])),
        f"{row['tokens']} tokens, {share(row['trains'])} train",
        f"mean weight {number(row['mean_weight'])}",
        f"mean log-ratio {number(row['mean_log_ratio'])}",
        f"by {_escape(row['policy'])}" + (" (estimated)" if row["estimated"] else ""),
    ]
    facts += [] if row["right"] else ["a wrong answer"]
    sizes = Counter(row["span"])
    spans, before = [], -1
    for i, position in enumerate(row["position"]):
        if position != before + 1:
            spans.append(f'<span class="gap"> … {row["left_out"]} tokens left out … </span>')
        spans.append(_token(row, i, sizes))
        before = position
    return (
        f"<article><header>{''.join(f'<span>{fact}</span>' for fact in facts)}</header>"
        f'<div class="text"><span class="before">{html.escape(visible(row["before"]))}</span>{"".join(spans)}</div>'
        "</article>"
    )


def _token(row: dict[str, Any], i: int, sizes: Counter) -> str:
    ratio = row["log_ratio"][i]
    weights = [row["weight"][level][i] for level in LEVELS]
    classes = [heat_class(SHOWN["ratio"], step(ratio, RATIO_STEPS))]
    for level, weight in zip(LEVELS, weights, strict=True):
        classes.append(heat_class(SHOWN[level], step(math.log(weight) if weight else -math.inf, WEIGHT_STEPS)))
    classes += ["none"] if ratio is None else []
    numbers = [
        row["position"][i] + 1,
        _short(row["logprob"][i]),
        _short(row["behavior_logprob"][i]),
        _short(ratio),
        sizes[row["span"][i]] if row["span"][i] >= 0 else 1,
        *map(_short, weights),
    ]
    data = "|".join(map(str, numbers))
    return f'<i class="{" ".join(classes)}" data-d="{data}">{html.escape(visible(row["text"][i]))}</i>'


def _short(x: float | None) -> str:
    return "" if x is None else f"{x:.3g}"


# ---------------------------------------------------------------------------------------------------------------------
# Words


def _advice(report: dict[str, Any]) -> str:
    parts = []
    for finding in report["advice"]:
        options = "".join(
            f'<li><span class="flags">{_escape(option["flags"])}</span>: {_escape(option["effect"])}</li>'
            for option in finding["options"]
        )
        parts.append(
            f'<div class="finding {finding["severity"]}" data-kind="{finding["kind"]}"><h3>{finding["severity"]}</h3>'
            f"<p>{_escape(finding['text'])}</p>{f'<ul>{options}</ul>' if options else ''}</div>"
        )
    return f'<h2 id="advice">Advice</h2>{"".join(parts)}'
