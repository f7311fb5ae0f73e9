"""The page in a real browser, and the parts of it that need none: escaping, equal bytes, terminal and JSON."""

import html
import io
import json
import re

import matplotlib.image
import numpy as np
import pytest
from browser import browser, find_browser
from families import family
from hypothesis import given, settings
from hypothesis import strategies as st
from inspected import TOKENIZER, make_data, policy_logprobs, report_of, shifted
from rich.console import Console

from pear.inspecting import terminal
from pear.inspecting.inspect import write_outputs
from pear.inspecting.page import RATIO_STEPS, page, step
from pear.inspecting.report import HEAD, TAIL
from pear.inspecting.text import one_line, token_texts, visible
from pear.word_tokenizer import word_tokenizer
from pear_kernels.options import PEAROptions

HOSTILE = [
    "</script><script>document.title='hacked'</script>",
    "<img src=x onerror=\"document.title='hacked'\">",
    "--><!-- ]]> </style></div></article>",
    "\u202eright to left\u202c and \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "tabs\tand\nlines\r\n\x00\x07\x1b[31mred\x7f\x85",
    "a\u0301e\u0301 \U0001f468\u200d\U0001f469\u200d\U0001f467 \u65e5\u672c\u8a9e \ufeff\u2028\ufffe",
    "&amp; &lt;b&gt; \"quoted\" 'single' ${js} `tick` \\n",
    "http://example.invalid/x.png url(http://example.invalid/y)",
]


def made(texts, seed=0, mean=-0.05, **everywhere):
    """A report of rows with these texts, token by token."""
    rng = np.random.default_rng(seed)
    ids = [[*TOKENIZER(text)["input_ids"], TOKENIZER.eos_token_id] for text in texts]
    behavior = [policy_logprobs(rng, 1, len(row))[0] for row in ids]
    fields = {i: {"ids": row} for i, row in enumerate(ids)}
    data = make_data(behavior, fields, **everywhere)
    return report_of(data, shifted(behavior, rng, mean, 0.3), rows=len(texts))


@pytest.fixture(scope="module")
def hostile():
    report = made(HOSTILE, policy="<script>document.title='hacked'</script>\u202e\ud800")
    report["file"], report["student"] = "<b>x</b></title>.jsonl", '"><img src=x onerror=alert(1)>'
    return report


# ---------------------------------------------------------------------------------------------------------------------
# Without a browser


def test_equal_reports_are_equal_bytes_and_both_files_are_written_or_none(tmp_path, hostile):
    again = made(HOSTILE, policy="<script>document.title='hacked'</script>\u202e\ud800")
    again["file"], again["student"] = hostile["file"], hostile["student"]
    assert page(hostile) == page(again) and json.dumps(hostile) == json.dumps(again)
    write_outputs(hostile, tmp_path / "a" / "page.html", tmp_path / "report.json")
    assert (tmp_path / "a" / "page.html").read_text() == page(hostile)
    assert json.loads((tmp_path / "report.json").read_text()) == hostile
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        write_outputs(hostile, tmp_path / "new.html", tmp_path / "folder")
    assert not (tmp_path / "new.html").exists()


def test_page_asks_for_nothing_and_holds_no_markup_of_the_data(hostile):
    text = page(hostile)
    assert text.count("<script>") == 1 and "<img" not in text and 'onerror="' not in text
    assert not re.search(r"<(link|script|img|iframe|object|form|base)[^>]*(src|href)=[\"'](?!data:,)", text)
    assert "\u202e" not in text and "\x1b" not in text and "\x00" not in text
    text.encode()  # no half of a surrogate pair is left


@settings(max_examples=20)
@given(st.text(min_size=1, max_size=30))
def test_any_text_stands_in_the_page_as_itself(text):
    """All tokens' texts together, unescaped, are the text with signs for what does not show."""
    text = text.encode("utf-8", "ignore").decode() or "x"
    report = made([text])
    shown = "".join(html.unescape(part) for part in re.findall(r"<i class=[^>]*>(.*?)</i>", page(report), re.DOTALL))
    pieces = report["rows"][0]["text"]
    assert shown == "".join(map(visible, pieces))
    assert "".join(piece for piece in pieces[:-1] if not re.fullmatch("⟨[0-9A-F ]+⟩", piece)) == text


@given(st.text(max_size=40))
def test_visible_text_keeps_what_shows_and_nothing_that_moves(text):
    found = visible(text)
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\u2028\u2029]", found)
    found.encode()
    assert "\n" not in one_line(text)
    letters = "".join(c for c in text if c.isalnum())
    assert "".join(c for c in found if c.isalnum()) == letters or "⟨U+" in found


def test_characters_of_several_tokens_show_once():
    texts = token_texts(TOKENIZER, TOKENIZER("日 é")["input_ids"])
    assert "".join(text for text in texts if not text.startswith("⟨")) == "日 é"
    assert texts[0] == "⟨E6⟩" and token_texts(TOKENIZER, [len(TOKENIZER) + 5]) == [f"⟨{len(TOKENIZER) + 5}⟩"]


@pytest.mark.parametrize("name", ["llama3", "llama2", "gemma"])
def test_tokens_of_every_family_spell_their_text(name):
    """Byte-level, SentencePiece with its leading space, and byte fallback."""
    text = "Hello wörld, 日本語 naïve  two  spaces\n\ttab 123 \U0001f98a def f(x):"
    tokenizer = family(name)
    texts = token_texts(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])
    assert "".join(part for part in texts if not re.fullmatch("⟨[0-9A-F ]+⟩", part)).removeprefix(" ") == text


def test_words_of_a_list_are_parted():
    """Tokenizers of whole words spell no spaces; their decoders put them there."""
    words = word_tokenizer(["1", "+", "2", "=", "3"], pattern=r"\S+")
    assert "".join(token_texts(words, words("1 + 2 = 3")["input_ids"])).strip() == "1 + 2 = 3"


def test_steps_of_colour_are_even_on_both_sides():
    assert [step(value, RATIO_STEPS) for value in (None, 0.0, 0.019, -0.02, 0.1, -0.5, 1.0, -50.0)] == [
        0, 0, 0, -1, 2, -3, 4, -5,
    ]  # fmt: skip


def test_terminal_ends_with_the_advice_and_markup_is_text(hostile):
    console = Console(file=io.StringIO(), width=140, color_system=None)
    hostile["advice"][0]["text"] += " [bold red]not markup[/]"
    terminal.show(hostile, console)
    printed = console.file.getvalue()
    last = hostile["advice"][-1]
    end = last["options"][-1]["effect"] if last["options"] else last["text"]
    assert " ".join(printed.split()).endswith(" ".join(end.split()))
    assert "[bold red]not markup[/]" in " ".join(printed.split())
    for words in (
        "behaviour policy",
        "effective sample size",
        "tokens that will train",
        "gamma 0.999",
        "lie below -0.08",
    ):
        assert words in printed
    assert "\x1b" not in printed and "\u202e" not in printed


@st.composite
def anything(draw):
    """Rows of every kind with any log-probs, and any options that hold."""
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    size = draw(st.sampled_from([0.0, 1e-6, 0.1, 3.0, 300.0]))
    behavior, student, fields = [], [], {}
    for i in range(draw(st.integers(1, 8))):
        length = draw(st.integers(1, 25))
        behavior.append(-size * rng.exponential(size=length))
        student.append(-size * rng.exponential(size=length))
        kind = draw(st.sampled_from(["own", "spans", "human", "wrong"]))
        if kind == "spans":
            steps = rng.integers(0, 2, length)
            spans = np.where(rng.random(length) < 0.2, -1, np.cumsum(steps)).astype(np.int32)
            fields[i] = {"spans": spans, "aligned": True, "policy": "spans", "sampling": {"temperature": 0.5}}
        elif kind == "human":
            fields[i] = {"spans": np.full(length, -1, np.int32), "policy": None}
        elif kind == "wrong":
            fields[i] = {"right": False, "estimated": True}
    level = draw(st.sampled_from(["token", "block", "sequence"]))
    options = PEAROptions(
        level=level,
        block_size=draw(st.integers(1, 30)),
        gamma=draw(st.sampled_from([1e-3, 0.9, 1.0])),
        log_ratio_clip=draw(st.sampled_from([(-0.08, 0.3), (-20.0, 20.0), (0.0, 0.0)])),
        log_weight_clip=draw(st.sampled_from([(-10.0, 5.0), (-700.0, 700.0), (0.0, 0.0)])),
        center=level != "sequence" and draw(st.booleans()),
        clip_length=draw(st.sampled_from([None, 1, 100])),
        normalize=draw(st.sampled_from([None, "batch", "sequence"] if level != "sequence" else [None, "batch"])),
    )
    return make_data(behavior, fields), student, options


@settings(max_examples=20)
@given(anything())
def test_whatever_the_data_the_report_is_json_and_the_page_has_numbers(example):
    data, student, options = example
    report = report_of(data, student, options)
    assert json.loads(json.dumps(report, allow_nan=False)) == json.loads(json.dumps(report))
    shown = page(report).split("</style>")[1].split("<script>")[0]
    assert not re.search(r"\b(nan|NaN|inf|None)\b", shown)
    terminal.show(report, Console(file=io.StringIO(), width=80))


def test_long_rows_show_their_start_and_end():
    report = made(["Let us think step by step. " * 400])
    row = report["rows"][0]
    assert len(row["position"]) == HEAD + TAIL and row["left_out"] == row["tokens"] - HEAD - TAIL > 0
    assert row["position"][HEAD] - row["position"][HEAD - 1] == row["left_out"] + 1
    text = page(report)
    assert f"… {row['left_out']} tokens left out …" in text and text.count("data-d=") == HEAD + TAIL


# ---------------------------------------------------------------------------------------------------------------------
# In a browser


@pytest.fixture(scope="module")
def tab():
    if find_browser() is None:
        pytest.skip("no chromium or chrome on this machine")
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def opened(tab, hostile, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(page(hostile), encoding="utf-8")

    def load(**how):
        tab.open(path, **how)
        return tab

    return load


def test_nothing_is_asked_for_and_nothing_complains(opened):
    tab = opened()
    tab.point_at(".text i")
    tab.click("#theme")
    assert tab.messages == []
    assert len(tab.requests) == 1 and tab.requests[0].startswith("file:") and tab.requests[0].endswith("page.html")


def test_hostile_text_stays_text(opened, hostile):
    tab = opened()
    assert tab.ask("document.title") == f"{hostile['file']}: PEAR weights"
    assert tab.ask("document.images.length") == 0 and tab.ask("document.scripts.length") == 1
    shown = tab.ask(
        "[...document.querySelectorAll('.text')].map(e => [...e.querySelectorAll('i')].map(i => i.textContent))"
    )
    assert [texts for texts in shown] == [list(map(visible, row["text"])) for row in hostile["rows"]]
    assert any("</script>" in "".join(texts) for texts in shown) and any("⟨U+202E⟩" in "".join(t) for t in shown)


def test_heat_map_has_a_token_for_each_token(opened, hostile):
    tab = opened()
    assert tab.ask("document.querySelectorAll('.text i').length") == sum(row["tokens"] for row in hostile["rows"])
    assert tab.ask("document.querySelectorAll('svg').length") == 1 + 3 + 3 + len(hostile["grid"])
    assert tab.ask("[...document.querySelectorAll('svg')].every(s => !s.outerHTML.includes('NaN'))")


def test_choosing_what_to_colour_by_changes_colours_and_keys(opened, hostile):
    tab = opened()
    colors = "[...document.querySelectorAll('.text i')].map(e => getComputedStyle(e).backgroundColor).join()"
    by_weight = tab.ask(colors)
    visible_keys = "[...document.querySelectorAll('.key')].filter(e => e.offsetHeight).map(e => e.textContent)"
    assert [key.split(" from")[0] for key in tab.ask(visible_keys)] == ["log G"]
    tab.click("input[value=ratio]")
    by_ratio = tab.ask(colors)
    assert by_ratio != by_weight and [key.split(" from")[0] for key in tab.ask(visible_keys)] == ["log-ratio"]
    tab.click("input[value=weight]")
    assert tab.ask(colors) == by_weight
    tab.click("input[value=sequence]")
    by_sequence = tab.ask(colors)
    assert by_sequence not in (by_weight, by_ratio)
    row = "[...document.querySelector('.text').querySelectorAll('i')].map(e => getComputedStyle(e).backgroundColor)"
    assert len(set(tab.ask(row))) == 1  # one weight for the whole response
    # negative is blue, positive is orange
    tab.click("input[value=ratio]")
    flat = [ratio for shown in hostile["rows"] for ratio in shown["log_ratio"]]
    for ratio, color in zip(flat, tab.ask(colors).replace(", ", " ").split(","), strict=True):
        red, _, blue, *alpha = map(float, re.findall(r"[\d.]+", color))
        if abs(ratio) < RATIO_STEPS[0]:
            assert alpha == [0]
        else:
            assert (red > blue) == (ratio > 0), (ratio, color)


def test_the_grid_is_that_of_the_level(opened):
    tab = opened()
    shown = "['token', 'block', 'sequence'].filter(l => document.querySelector(`div.at-${l} table`).offsetHeight)"
    assert tab.ask(shown) == ["token"]
    tab.click("input[value=block]")
    assert tab.ask(shown) == ["block"]


def test_pointing_at_a_token_tells_its_numbers(opened, hostile):
    tab = opened()
    assert tab.ask("document.getElementById('tip').hidden")
    tab.point_at("article:nth-of-type(1) .text i:nth-of-type(3)")
    tip, row = tab.ask("document.getElementById('tip').innerText"), hostile["rows"][0]
    assert f"“{visible(row['text'][2])}”" in tip and "token 3" in tip
    assert f"log-ratio {row['log_ratio'][2]:.3g}" in tip and f"log π_b {row['behavior_logprob'][2]:.3g}" in tip
    for level, weights in row["weight"].items():
        assert f"weight, {level}: {weights[2]:.3g}" in tip
    box = tab.ask(
        "(({x, y, right, bottom}) => [x, y, right, bottom])(document.getElementById('tip').getBoundingClientRect())"
    )
    assert min(box) >= 0 and box[2] <= 1200 and box[3] <= 900


def test_light_and_dark(opened):
    background = "getComputedStyle(document.body).backgroundColor"
    tab = opened()
    light = tab.ask(background)
    tab.click("#theme")
    dark = tab.ask(background)
    assert sum(map(int, re.findall(r"\d+", light))) > 600 > 200 > sum(map(int, re.findall(r"\d+", dark)))
    assert opened(dark=True).ask(background) == dark
    fill = "getComputedStyle(document.querySelector('svg text')).fill"
    assert opened(dark=True).ask(fill) != opened().ask(fill)


@pytest.mark.parametrize("width", [1200, 380])
def test_the_picture_is_not_blank_and_fits_its_window(opened, width):
    tab = opened(width=width)
    picture = matplotlib.image.imread(io.BytesIO(tab.screenshot()))
    assert picture.shape[1] == width and picture[..., :3].std() > 0.05
    # wide tables scroll by themselves
    assert tab.ask("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0


def test_page_ends_with_the_advice(opened, hostile):
    tab = opened()
    last = hostile["advice"][-1]
    assert tab.ask("document.querySelector('main').lastElementChild.dataset.kind") == last["kind"]
    assert tab.ask("document.querySelectorAll('.finding').length") == len(hostile["advice"])
    assert tab.ask("document.querySelector('.verdict').getAttribute('href')") == "#advice"
