"""Vocabulary-sharded heads in two and four processes, beside one process, float64 and PyTorch's own loss_parallel.

The processes run all cases of shard_cases.py once; the tests look at what they left.
"""

import os
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from problems import make_problem, op_arguments, relative_error, workspace
from shard_cases import LENGTHS, SIZES, UPSTREAM, Case, V, answer, cases, everything

from pear_kernels import linear_topk_logprobs
from pear_kernels import sharding as shards
from pear_kernels.engine import packing
from pear_kernels.ops.loss import compute
from pear_kernels.options import HeadOptions, LabelOptions, PEAROptions, Reduction

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
NAMES = list(cases(2))


@pytest.fixture(scope="module", params=SIZES)
def ranks(request, tmp_path_factory):
    """What each rank found: name of the case -> its answers, or a traceback."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of all workers: the first to come starts the processes, for the others too
    folder, world = folder / f"shards-{request.param}", request.param
    try:
        folder.mkdir()
    except FileExistsError:
        patience = time.monotonic() + 300
        while not (folder / "done").exists() and time.monotonic() < patience:
            time.sleep(0.2)
    else:
        try:
            mp.start_processes(everything, (world, str(folder)), nprocs=world, start_method="spawn")
        finally:
            (folder / "done").touch()
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


def found(ranks, name: str) -> list:
    """The answers of each rank to this case."""
    for rank in ranks:
        assert not isinstance(rank[name], str), rank[name]
    return [rank[name] for rank in ranks]


def assert_close(ours: torch.Tensor, exact: torch.Tensor, tolerance: float) -> None:
    assert ours.shape == exact.shape
    assert (ours.double() - exact.double()).norm() <= tolerance * max(exact.double().norm().item(), 1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_ranks_agree_and_have_what_one_process_has(ranks, name):
    answers, case = found(ranks, name), cases(len(ranks))[name]
    whole = answer(case)
    tolerance = case.tolerance or TOLERANCE[case.problem.hidden.dtype]
    for key, exact in whole.items():
        if key in ("grad_weight", "grad_bias"):
            ours = torch.cat([of_rank[key] for of_rank in answers])
            assert [len(of_rank[key]) for of_rank in answers] == list(SIZES[len(ranks)])
        else:
            ours = answers[0][key]
            assert all(torch.equal(of_rank[key], ours) for of_rank in answers), f"{key} is not the same on all ranks"
        assert ours.dtype == exact.dtype
        assert_close(ours, exact, tolerance)
    assert set(answers[0]) == set(whole)


def test_it_repeats_bit_for_bit(ranks):
    for first, second in zip(found(ranks, "pear-sequence-float32"), found(ranks, "again"), strict=True):
        assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ["confident", "far", "very-far"])
def test_the_ends_of_the_softmax(ranks, kind, dtype):
    """Against full logits in float64: p within 1e-7 of 1, and targets that exp of the others leaves far behind."""
    name = f"{kind}-{str(dtype).removeprefix('torch.')}"
    problem = cases(len(ranks))[name].problem
    (loss, logprobs, _), (hidden, weight) = problem.naive()
    grads = torch.autograd.grad(UPSTREAM * loss, (hidden, weight))
    # float64 too cancels at p near 1, in the full logits that this is held to
    tolerance = 2e-6 if dtype == torch.float32 else 1e-8 if kind == "confident" else 1e-12
    for of_rank in found(ranks, name):
        for ours, exact in ((of_rank["logprobs"], logprobs), (of_rank["grad_hidden"], grads[0])):
            for row, of_row in zip(ours.double(), exact, strict=True):  # no row hides behind a larger one
                assert (row - of_row).norm() <= 10 * tolerance * of_row.norm()
    assert relative_error(torch.cat([of_rank["grad_weight"] for of_rank in found(ranks, name)]), grads[1]) < tolerance


def test_top_k_of_the_whole_vocabulary(ranks):
    problem = make_problem(bias=True)
    for k in (1, 5, 33):
        ids, logprobs = linear_topk_logprobs(
            problem.hidden, problem.weight, problem.target, k, bias=problem.options["bias"]
        )
        for of_rank in found(ranks, "top_k"):
            assert torch.equal(of_rank[f"ids{k}"], ids)
            torch.testing.assert_close(of_rank[f"logprobs{k}"], logprobs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("placement", ["shard", "replicate"])
def test_dtensors(ranks, placement):
    whole = answer(Case(make_problem(bias=True)))
    for of_rank in found(ranks, "dtensors"):
        for key, ours in of_rank[placement].items():
            assert_close(ours, whole[key], 1e-12)


def test_the_plain_loss_is_that_of_loss_parallel(ranks):
    for of_rank in found(ranks, "loss_parallel"):
        for ours, theirs in zip(of_rank["ours"], of_rank["theirs"], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_groups_within_the_world(ranks):
    for of_rank in found(ranks, "subgroups"):
        whole = answer(Case(make_problem(seed=of_rank["seed"])))
        assert_close(of_rank["grad_hidden"], whole["grad_hidden"], 1e-12)
        begin = of_rank["begin"]
        assert_close(of_rank["grad_weight"], whole["grad_weight"][begin : begin + 19], 1e-12)


def test_what_ranks_leave_out_is_a_share_of_the_whole_gradient(ranks):
    answers = found(ranks, "leaving_out")
    (first, exact), problem = answers[0].values(), make_problem(LENGTHS, seed=2)
    kept, left_out = first["stats"][-2:]
    assert 0 < left_out <= 0.1 and kept < 0.95
    for each in answers:
        assert all(torch.equal(each["found"][key], first[key]) for key in first if key != "grad_weight")
    assert_close(first["logprobs"], exact["logprobs"], 1e-12)
    grad_weight = torch.cat([each["found"]["grad_weight"] for each in answers])
    p = exact["logprobs"].exp()
    mass = UPSTREAM * (exact["second"] * (1 - p)).sum() / (problem.target >= 0).sum()
    for off, largest in (
        (first["grad_hidden"] - exact["grad_hidden"], 2 * problem.weight.norm(dim=1).max()),
        (grad_weight - exact["grad_weight"], 3 * problem.hidden.norm(dim=1).max()),
    ):
        assert 0 < off.norm(dim=1).sum() <= left_out * mass * largest * (1 + 1e-9)


def test_the_module_takes_a_group(ranks):
    for of_rank in found(ranks, "module"):
        torch.testing.assert_close(of_rank["loss"], of_rank["whole"], rtol=1e-12, atol=0)


def test_compile_keeps_one_graph(ranks):
    if len(ranks) == 2:
        assert found(ranks, "compiled") == [True, True]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "columns",
            r"weight must be a DTensor of placement Shard\(0\) or Replicate\(\).*got.*Shard\(dim=1\).*redistrib",
        ),
        ("plane", r"weight must be.*mesh of one dimension.*on one of 2.*group=mesh.get_group"),
        ("backwards", r"weight must be on a mesh that lists ranks in ascending order.*got \[.*1, 0\].*full_tensor"),
        ("tolerance", "another gradient_tolerance on rank"),
        ("both", "group must be None beside a DTensor weight"),
        ("bias", r"bias must be sharded as weight is.*got \(Replicate\(\),\).*redistribute"),
        ("bias of a plain weight", "bias must be a plain tensor where weight is one.*to_local"),
        ("hidden", r"hidden must be the same on every rank.*Shard\(dim=0\).*full_tensor"),
        ("tokens", "same call with the same tokens.*FSDP.*got another target on rank 1"),
        ("length", "same call.*got another hidden's shape on rank 1"),
        ("training", "same call.*got another requires_grad on rank 1"),
        ("workspace", "same call.*got another workspace_bytes on rank 1"),
        ("outside", rf"target must be in \[0, {V}\).*got {V} at flat position 4"),
        ("empty", r"weight must have rows on every rank, got shards of \[37, 0.*fewer ranks"),
        ("k", f"k must have a K of at least 1 and less than the vocabulary's {V} tokens, got {V}"),
        ("distill", "linear_distill_loss does not work with a vocabulary-sharded weight.*full_tensor"),
        ("reference", "reference does not work with a vocabulary-sharded weight.*full_tensor"),
        ("no group", "group must be a torch.distributed.ProcessGroup that this rank is in, got 'tp'"),
    ],
)
def test_errors_are_raised_on_every_rank(ranks, name, words):
    for of_rank in found(ranks, "errors"):
        with pytest.raises(ValueError, match=words):
            raise ValueError(of_rank[name])


def test_a_bias_of_the_whole_vocabulary_is_told_its_shape(ranks):
    for size, of_rank in zip(SIZES[len(ranks)], found(ranks, "errors"), strict=True):
        assert of_rank["whole bias"] == f"bias must have (V,) ({size},), got ({V},)"


def test_without_a_group_nothing_changes():
    problem = make_problem()
    tensors = problem.hidden, problem.weight, problem.target, None
    assert shards.local_head(*tensors, None) == (*tensors, None)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_captured_call_reads_no_value(level, monkeypatch):
    """On tensors of device "meta", where reading one raises; sizes are those of a call before."""

    class Group:
        size, rank = (lambda self: 2), (lambda self: 1)

    group = Group()
    monkeypatch.setattr(torch._C._distributed_c10d, "_resolve_process_group", lambda name: group)
    monkeypatch.setattr(shards, "gather", lambda group, values: values.new_empty(2, *values.shape))
    monkeypatch.setattr(dist, "all_reduce", lambda values, group: None)
    monkeypatch.setattr(dist, "all_to_all_single", lambda out, values, group: None)
    monkeypatch.setattr(shards, "_sizes", {})
    for module in (packing, shards):
        monkeypatch.setattr(module, "capturing", lambda: True)
    with torch.device("meta"):
        hidden, weight, bias, target = torch.randn(40, 8), torch.randn(7, 8), torch.randn(7), torch.zeros(40).long()
        bounds = torch.zeros(3, dtype=torch.int32)

        def call():
            columns = {"behavior_logprobs": torch.zeros(40), "cu_seqlens": bounds}
            head = HeadOptions(temperature=0.7, softcap=3.0, workspace_bytes=workspace(9, 30, 4), backend="torch")
            with torch.device("cpu"):
                arguments = op_arguments(
                    "linear_pear_loss", columns, PEAROptions(level=level), LabelOptions(), Reduction(), head
                )
            return compute(hidden, weight, bias, target, *arguments, "a group", [True, True, True])

        with pytest.raises(RuntimeError, match="sizes are not known yet: make the call once before it is captured"):
            call()
        shards._sizes[group] = {7: (30, 7)}
        *_, dx, dw, db = call()
        group = Group()  # after destroy_process_group, another of the same name, whose shards may differ
        with pytest.raises(RuntimeError, match="sizes are not known yet"):
            call()
    assert (dx.shape, dw.shape, db.shape) == (hidden.shape, weight.shape, bias.shape)


@pytest.mark.parametrize("height", [0.0, 25.0, -50.0, -700.0, -2000.0])
def test_one_exchange_says_what_the_whole_softmax_is(height):
    """`joint_nll` and `joint_entropy` from the parts of a distribution; its owner's has nothing but the target."""
    logits = 3 * torch.randn(64, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits[:, 0] += height
    target, *parts = logits[:, :1], logits[:, :0], logits[:, 1:5], logits[:, 5:6], logits[:, 6:]

    def nll_and_entropy(logits):
        log_p = logits.log_softmax(1)
        return -log_p[:, 0], -(log_p.exp() * log_p).sum(1)

    nll, entropy = nll_and_entropy(logits)
    of_parts = [nll_and_entropy(torch.cat([target, part], 1)) for part in parts]
    own_nll, own_entropy = (torch.stack(numbers) for numbers in zip(*of_parts, strict=True))
    ours = shards.joint_nll(own_nll)
    torch.testing.assert_close(ours, nll, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(shards.joint_entropy(ours, own_nll, own_entropy), entropy, rtol=1e-12, atol=1e-12)
