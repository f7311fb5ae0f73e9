"""Vocabulary-sharded heads on the kernels: a rank's columns by themselves, and two ranks with a group."""

import datetime

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from kernel_problems import DEVICE, PRODUCTS, TOLERANCE, Head
from problems import make_policy_problem, make_problem, relative_error
from shard_cases import Case, answer, attempt, extreme

from pear_kernels.backends.triton import tiles
from pear_kernels.backends.triton.logits_head import LogitsHead

V, R = 75, 21
ROWS = [slice(0, 48), slice(48, 75)]  # of each rank


def parts(logits: torch.Tensor, target: torch.Tensor, rows: slice) -> torch.Tensor:
    """Log-probs (R, 1 + columns) of the target, which comes first, and a rank's columns, where it is left out."""
    own = logits.scatter(1, target[:, None], -torch.inf)[:, rows]
    return torch.cat([logits.gather(1, target[:, None]), own], 1).log_softmax(1)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("height", [0.0, 60.0, -60.0])
@pytest.mark.parametrize("product", [*PRODUCTS, "dense"])
def test_a_softmax_of_a_ranks_columns_and_the_target(rows, height, product, monkeypatch):
    """Targets elsewhere are -1, and their logits given: far above and far below the columns that are here too."""
    if product != "dense":
        monkeypatch.setenv(tiles.VARIABLE, product)
    rng = torch.Generator().manual_seed(1)
    x, weight, bias = (
        torch.randn(R, 24, generator=rng),
        torch.randn(V, 24, generator=rng) / 2,
        torch.randn(V, generator=rng),
    )
    target = torch.arange(R) * 7 % V
    bias[target[::2]] += height
    x, weight, bias, target = (tensor.to(DEVICE) for tensor in (x, weight, bias, target))
    logits = x.double() @ weight.double().T + bias.double()
    log_p = parts(logits, target, rows)
    here = (target >= rows.start) & (target < rows.stop)
    own_target, logit = (target - rows.start).where(here, -1), logits.gather(1, target[:, None])[:, 0]
    head = (LogitsHead if product == "dense" else Head)(weight[rows], bias[rows], 1.0, None, torch.float32)
    head.reserve(R, True)
    torch.testing.assert_close(
        head.target_logits(x, own_target.clamp(min=0)).where(here, logit), logit, rtol=1e-12, atol=1e-12
    )
    if product == "dense":
        found = head.scores(x, own_target, entropy=True, logit=logit)
    else:
        found = head.softmax(x, own_target, gradient=True, entropy=True, logit=logit)
        probabilities = found.row_scale[:, None] * found.exp.double()
        for ours, exact in zip(probabilities, log_p[:, 1:].exp(), strict=True):
            assert (ours - exact).norm() <= TOLERANCE * exact.norm() + 1e-37
    # the kernels' exponents are float32: log p of -60 and what a sum has of it are good to its last digits
    torch.testing.assert_close(found.logprobs, log_p[:, 0], rtol=TOLERANCE, atol=1e-37)
    entropy = -torch.special.xlogy(log_p.exp(), log_p.exp()).sum(1)
    torch.testing.assert_close(found.entropy, entropy, rtol=1e-4, atol=1e-6)


# ---- two processes


def kernel_cases() -> dict[str, Case]:
    several = {"workspace_bytes": 16000}
    lengths = (9, 1, 0, 14)
    found = {
        "token": Case(make_problem(lengths, V=V, dtype=torch.float32, bias=True), {"softcap": 5.0, "temperature": 0.7}),
        "sequence": Case(make_problem(lengths, V=V, dtype=torch.float32), {"level": "sequence", **several}),
        "frozen": Case(make_problem(lengths, V=V, dtype=torch.float32), several, trained=("hidden",)),
        "bonus": Case(make_policy_problem(lengths, V=V, dtype=torch.float32, bias=True), {"entropy_coef": 0.3}),
    }
    for kind in ("confident", "far", "very-far"):
        found[kind] = Case(extreme(kind, torch.float32, [0, 19, 37]))
    return found


def in_a_group(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=120)
    )
    found = {}
    for name, case in kernel_cases().items():
        rows = ROWS[rank] if len(case.problem.weight) == V else slice(19 * rank, 19 * rank + 19)
        options = dict(group=dist.group.WORLD, backend="triton")
        found[name] = attempt(lambda case=case, rows=rows, options=options: answer(case, rows, **options))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(DEVICE.type != "cpu", reason="two ranks need two GPUs")
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_two_ranks_have_what_one_process_has(tmp_path):
    mp.start_processes(in_a_group, (str(tmp_path),), nprocs=2, start_method="spawn")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, case in kernel_cases().items():
        assert not any(isinstance(rank[name], str) for rank in ranks), ranks[0][name]
        whole = answer(case, backend="torch")
        for key, exact in whole.items():
            if key in ("grad_weight", "grad_bias"):
                ours = torch.cat([rank[name][key] for rank in ranks])
            else:
                ours = ranks[0][name][key]
                assert torch.equal(ours, ranks[1][name][key])
            assert exact.norm() == 0 == ours.norm() or relative_error(ours, exact) < 1e-5, (name, key)
