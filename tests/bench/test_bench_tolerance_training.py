"""`bench.tolerance_training`: its command is one of `pear sft`; its table compares each run with the exact one."""

import pytest

pytest.importorskip("trl")

from bench.tolerance_training import KEPT, LEFT_OUT, NLL, TOLERANCES, draw, evaluated_alike, report, sft
from pear.options import parse
from pear.runs import Run
from pear.sft_config import DataArguments, ModelArguments, PEARSFTConfig


def run(tmp_path, tolerance: float, end: float) -> Run:
    log = [{"step": 0, NLL: 2.0}, {"step": 1, "pear/nll": 2.5}, {"step": 2, NLL: end}]
    if tolerance:
        log[1] |= {KEPT: 0.25, LEFT_OUT: tolerance / 2}
    return Run(tmp_path, f"{tolerance:g}", "sft", {}, {}, log)


def test_table_and_picture(tmp_path):
    found = {t: run(tmp_path, t, end) for t, end in zip(TOLERANCES, (1.8, 1.8009, 1.791), strict=True)}
    found[0.05].log.append({"step": 4, NLL: 1.7})  # the others have not come as far
    found = evaluated_alike(found)
    text = report({"cpu": "some"}, found, "pear sft --seed 0", "others shared the cores")
    assert "| 0 | 1 | 2.0000 | 1.8000 | +0.000% | +0.000% | 2.5000 | 1 | 0 | 0 |" in text
    assert "| 0.01 | 1 | 2.0000 | 1.8009 | +0.050% | +0.050% | 2.5000 | 0.25 | 0.0050 | 0.0050 |" in text
    assert "| 0.05 | 1 | 2.0000 | 1.7910 | -0.500% | -0.500% |" in text and "- note: others shared the cores" in text
    draw(found, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_is_one_of_pear_sft(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command, *line = sft(0.01, 60, 2, 480)
    data, args, model = parse((DataArguments, PEARSFTConfig, ModelArguments), "pear sft", line)
    assert command == "sft" and args.gradient_tolerance == 0.01 and args.max_steps == 60 and args.eval_steps == 30
    assert data.model == "smollm2" and model.dtype == "float32" and args.output_dir == "tolerance-0.01"
