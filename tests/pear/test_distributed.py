"""Two processes on one CPU: shards and averages must add up to what one process computes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import make_model, make_tokenizer
from two_processes import STEPS, batch, options

from pear.fused_head import add_fused_head
from pear.score import score
from pear.sft import PEARSFTConfig, PEARSFTTrainer, load_scored

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo")


def launch(mode: str, folder: Path) -> None:
    script = Path(__file__).with_name("two_processes.py")
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script, mode, folder],
        capture_output=True, text=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]


def test_sharded_model_gives_the_gradients_of_a_whole_one(tmp_path):
    launch("sharded", tmp_path)
    for tied in (False, True):
        found = torch.load(tmp_path / f"tied-{tied}.pt")
        model = make_model(make_tokenizer(), tied=tied).train()
        add_fused_head(model)
        loss = model(**batch(), pear={}).loss
        loss.backward()
        assert found["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
        gradients = {name: p.grad for name, p in model.named_parameters()}
        assert gradients.keys() == found["gradients"].keys()
        for name, expected in gradients.items():
            torch.testing.assert_close(found["gradients"][name], expected, rtol=1e-4, atol=1e-6)


def test_two_processes_train_like_one(tokenizer, text_rows, jsonl, tmp_path):
    """Same rows a step, of unlike lengths in each process; losses, statistics and weights agree."""
    score(
        make_model(tokenizer, seed=1), jsonl(text_rows * 2), tmp_path / "scored.jsonl", tokenizer=tokenizer,
        progress=False,
    )  # fmt: skip
    launch("trainer", tmp_path)
    config = PEARSFTConfig(str(tmp_path / "one"), **options(world=1))
    one = PEARSFTTrainer(
        make_model(tokenizer),
        config,
        train_dataset=load_scored(tmp_path / "scored.jsonl", tokenizer),
        processing_class=tokenizer,
    )
    one.train()
    two = json.loads((tmp_path / "log.json").read_text())
    for a, b in zip(one.state.log_history[:STEPS], two[:STEPS], strict=True):
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=1e-4), name
    for name, weight in torch.load(tmp_path / "weights.pt").items():
        torch.testing.assert_close(weight, one.model.state_dict()[name], rtol=1e-4, atol=1e-5)
