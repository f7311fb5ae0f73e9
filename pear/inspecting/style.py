"""The page's style sheet and script. Both stand inside the page: it asks nobody for anything."""

# Blue is low and orange is high, which most eyes can tell apart; strength says how far.
STEPS = 5  # of colour on either side
_ALPHAS = (0.10, 0.22, 0.36, 0.50, 0.66)


def style() -> str:
    return _BASE + "".join(_heat(key, letter) for key, letter in SHOWN.items())


SHOWN = {"ratio": "r", "token": "t", "block": "b", "sequence": "s"}  # what the text is coloured by, and its class


def heat_class(letter: str, step: int) -> str:
    """`step` from -STEPS to STEPS."""
    return f"{letter}{step + STEPS}"


def _heat(key: str, letter: str) -> str:
    rules = []
    for i, alpha in enumerate(_ALPHAS, start=1):
        for sign, name in ((-1, "low"), (1, "high")):
            chosen = f'[data-show="{key}"] .{heat_class(letter, sign * i)}'
            rules.append(f"{chosen}{{background:rgb(var(--{name}-rgb)/{alpha})}}")
    return "".join(rules)


_BASE = """
:root{--bg:#fbfbf9;--card:#fff;--fg:#1c1f24;--dim:#646a73;--rule:#dcdfe4;--low-rgb:38 99 181;--high-rgb:214 104 20;
--low:#2a62b0;--high:#b5540f;--mid:#9aa1ab;--ink:#333a45;--bad:#b3261e;--warn:#8a5a00;--good:#1f7a3d;color-scheme:light}
:root[data-theme="dark"]{--bg:#14161a;--card:#1b1e24;--fg:#e6e8eb;--dim:#9aa1ab;--rule:#343942;--low-rgb:70 140 235;
--high-rgb:235 130 50;--low:#7fb1f5;--high:#f0a165;--mid:#6d747f;--ink:#cfd4dc;--bad:#ff8a80;--warn:#e8b64a;
--good:#7fd49b;color-scheme:dark}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1180px;margin:0 auto;padding:18px 20px 60px}
h1{font-size:22px;margin:6px 0 2px}h2{font-size:17px;margin:34px 0 4px}h3{font-size:14px;margin:0}
p{margin:4px 0 10px;max-width:92ch}.dim,figcaption,caption{color:var(--dim);font-size:13px}
code,.flags{font-family:ui-monospace,"Cascadia Mono",Menlo,Consolas,monospace;font-size:13px}
.verdict{display:inline-block;margin:6px 8px 6px 0;padding:3px 10px;border-radius:12px;border:1px solid currentColor;
font-size:13px;text-decoration:none}
.problem{color:var(--bad)}.warning{color:var(--warn)}.note{color:var(--dim)}.fine{color:var(--good)}
table{border-collapse:collapse;font-size:13.5px;margin:6px 0}
caption{caption-side:bottom;text-align:left;padding-top:4px}
th,td{padding:3px 14px 3px 0;text-align:right;border-bottom:1px solid var(--rule);font-variant-numeric:tabular-nums}
th:first-child,td:first-child{text-align:left}th{font-weight:600}.chosen{font-weight:700}
.scroll{overflow-x:auto}
figure{margin:8px 0;padding:10px;overflow-x:auto;background:var(--card);border:1px solid var(--rule);border-radius:8px}
.three{display:grid;grid-template-columns:repeat(auto-fit,minmax(300px,1fr));gap:6px}
svg{display:block;width:100%;height:auto}figure>svg{min-width:680px}
svg text{font:11px system-ui,sans-serif;fill:var(--dim)}
svg .title{font-weight:700;font-size:12.5px;fill:var(--fg)}svg .label{font-size:11.5px}
svg .note-low{fill:var(--low);font-size:12px}svg .note-high{fill:var(--high);font-size:12px}
.cell{text-align:left}svg line,svg polyline{fill:none;stroke-width:1}
svg .grid{stroke:var(--rule)}svg .axis{stroke:var(--mid)}svg .one{stroke:var(--ink);stroke-dasharray:2 3}
svg .end-low{stroke:var(--low);stroke-width:1.4;stroke-dasharray:6 3}
svg .end-high{stroke:var(--high);stroke-width:1.4;stroke-dasharray:6 3}
svg .median{stroke:var(--ink);stroke-width:1.8}
svg .band{fill:var(--ink);opacity:.22}svg .band-wide{fill:var(--ink);opacity:.11}
svg .fill-low{fill:var(--low)}svg .fill-high{fill:var(--high)}svg .fill-mid{fill:var(--mid)}
svg .fill-weight{fill:var(--mid)}
.cell{width:150px;padding:4px 10px 4px 0;vertical-align:top;text-align:left}
.cell svg{background:var(--card);border:1px solid var(--rule);border-radius:4px}
.cell.chosen svg{border:2px solid var(--ink)}
.bar{position:sticky;top:0;z-index:2;background:var(--bg);border-bottom:1px solid var(--rule);margin:0 -20px;
padding:6px 20px;display:flex;flex-wrap:wrap;gap:4px 22px;align-items:center;font-size:13.5px}
.bar fieldset{border:0;margin:0;padding:0;display:flex;gap:12px;align-items:center}
.bar legend{float:left;color:var(--dim);padding:0}.bar label{cursor:pointer}
button{font:inherit;font-size:13px;color:inherit;background:var(--card);border:1px solid var(--rule);border-radius:6px;
padding:2px 10px;cursor:pointer}
body:not([data-level="token"]) .at-token,body:not([data-level="block"]) .at-block,
body:not([data-level="sequence"]) .at-sequence{display:none}
body:not([data-show="ratio"]) .by-ratio{display:none}body[data-show="ratio"] .by-weight{display:none}
.key{display:flex;flex-wrap:wrap;gap:2px;margin:4px 0 10px;font-size:12px;color:var(--dim)}
.key span{padding:1px 7px;border-radius:3px}.key .k{color:var(--fg)}
article{margin:14px 0;padding:10px 14px;background:var(--card);border:1px solid var(--rule);border-radius:8px}
article header{display:flex;flex-wrap:wrap;gap:2px 16px;font-size:13px}
article header span,h1,p{overflow-wrap:anywhere}
.text{margin-top:8px;max-height:420px;overflow:auto;white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:plaintext;
font:13.5px/1.75 ui-monospace,"Cascadia Mono",Menlo,Consolas,monospace}
.text i{font-style:normal;border-radius:2px}.text i.none{border-bottom:1px dotted var(--mid)}
.text i:hover{outline:1.5px solid var(--ink)}.before,.gap{color:var(--dim)}
#tip{position:fixed;z-index:3;pointer-events:none;background:var(--fg);color:var(--bg);border-radius:6px;
padding:6px 10px;font:12.5px/1.45 ui-monospace,Menlo,Consolas,monospace;max-width:340px;white-space:pre-line;
overflow-wrap:anywhere}
#tip[hidden]{display:none}
.finding{margin:10px 0;padding:10px 14px;background:var(--card);border:1px solid var(--rule);
border-left:5px solid currentColor;border-radius:6px}
.finding p,.finding li{color:var(--fg)}.finding h3{text-transform:uppercase;font-size:12px;letter-spacing:.05em}
.finding ul{margin:4px 0;padding-left:20px}
@media print{.bar{display:none}.text{max-height:none}}
"""

SCRIPT = """
"use strict";
(() => {
  const body = document.body, root = document.documentElement, tip = document.getElementById("tip");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const theme = (name) => { root.dataset.theme = name; };
  theme(dark.matches ? "dark" : "light");
  dark.addEventListener("change", () => theme(dark.matches ? "dark" : "light"));
  const turn = () => theme(root.dataset.theme === "dark" ? "light" : "dark");
  document.getElementById("theme").addEventListener("click", turn);

  const chosen = (name) => document.querySelector(`input[name="${name}"]:checked`).value;
  const apply = () => {
    body.dataset.level = chosen("level");
    body.dataset.show = chosen("color") === "ratio" ? "ratio" : chosen("level");
  };
  for (const input of document.querySelectorAll(".bar input")) input.addEventListener("change", apply);
  apply();

  const levels = ["token", "block", "sequence"];
  const words = (token) => {
    const [position, logprob, behavior, ratio, size, ...weights] = token.dataset.d.split("|");
    const lines = ["“" + token.textContent.replaceAll("\\n", "") + "”  token " + position];
    lines.push("log π " + logprob);
    if (ratio === "") lines.push("no ratio");
    else {
      const mean = size > 1 ? " (mean of its span of " + size + " tokens)" : "";
      lines.push("log π_b " + behavior + mean, "log-ratio " + ratio + mean);
    }
    levels.forEach((level, i) => lines.push("weight, " + level + ": " + weights[i]));
    return lines.join("\\n");
  };
  document.addEventListener("pointerover", (event) => {
    const token = event.target.closest("[data-d]");
    tip.hidden = !token;
    if (token) tip.textContent = words(token);
  });
  document.addEventListener("pointermove", (event) => {
    if (tip.hidden) return;
    const x = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8);
    const below = event.clientY + 18 + tip.offsetHeight < innerHeight;
    tip.style.left = Math.max(4, x) + "px";
    tip.style.top = (below ? event.clientY + 18 : event.clientY - tip.offsetHeight - 12) + "px";
  });
})();
"""
