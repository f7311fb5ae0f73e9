"""A patched model under DDP, FSDP and tensor parallelism in two processes, beside the same model in one."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from causal_lm_processes import CASES, LOSSES, WORLD, alone, everything

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each process found; started once, since starting is most of its time."""
    folder = tmp_path_factory.mktemp("sharded")
    mp.start_processes(everything, (str(folder),), nprocs=WORLD, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.xdist_group("sharded causal lm")
def test_two_processes_have_the_loss_and_the_step_of_one(ranks):
    for name in CASES:
        for loss, pear in LOSSES.items():
            one = alone(name, pear)
            for rank, found in enumerate(ranks):
                two = found[name, loss]
                assert two["loss"].item() == pytest.approx(one["loss"].item(), rel=1e-12), (name, loss)
                torch.testing.assert_close(two["log_probs"], one["log_probs"][rank : rank + 1], rtol=1e-6, atol=1e-7)
                assert two["parameters"].keys() == one["parameters"].keys()
                for key, expected in one["parameters"].items():
                    torch.testing.assert_close(two["parameters"][key], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.xdist_group("sharded causal lm")
def test_a_weight_that_nothing_gathers_is_an_error_that_names_fsdp(ranks):
    for found in ranks:
        assert "FSDP has sharded or flattened it" in found["past the wrapper"]
