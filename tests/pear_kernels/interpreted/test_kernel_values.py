"""The kernel that checks values: it finds what `pear_kernels.checks` finds, by the same rules."""

import dataclasses

import pytest
import torch

from pear_kernels import checks, linear_pear_loss
from pear_kernels.backends.choice import interpreting

pytest.importorskip("triton")

from pear_kernels.backends.triton import launch, values  # noqa: E402
from pear_kernels.ops import backends  # noqa: E402

# compiled, a failed assert ends the process's use of the GPU
pytestmark = pytest.mark.skipif(not interpreting(), reason="asserts of compiled kernels: test_gpu.py")

V, IGNORED = 11, -100
LENGTHS = (5, 0, 3, values.BLOCK + 9, 0)  # a sequence goes on in a second block
N = sum(LENGTHS)


@pytest.fixture(autouse=True)
def asserts(monkeypatch):
    """The interpreter drops asserts on the device unless it debugs, whatever a launch asks for."""
    from triton.runtime import interpreter

    options = dataclasses.replace(interpreter.interpreter_builder.options, debug=True)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", options)


def good_columns() -> dict[str, torch.Tensor]:
    """A value of every column that has a rule; tokens 0 and N - 1 are ignored, and hold what would break the rules."""
    place = torch.cat([torch.arange(length) for length in LENGTHS])
    columns = {
        "target": torch.arange(N) % V,
        "cu_seqlens": torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32),
        "block_ids": place // 3,
        **{name: -torch.rand(N) for name in checks.POLICY_OF},
        "advantages": torch.randn(N),
        "weights": torch.randn(N, dtype=torch.float64),
        "sequence_advantages": torch.randn(len(LENGTHS)),
        "sequence_scale": torch.rand(len(LENGTHS)),
        "denominator": torch.tensor(3),
    }
    columns["block_ids"][[2, 700]] = -1  # tokens without a log-ratio, whose log-prob is not checked
    columns["behavior_logprobs"][2] = float("nan")
    columns["old_logprobs"][1] = checks.MAX_LOGPROB / 2
    for name in (*checks.POLICY_OF, "advantages", "weights"):
        columns[name][[0, -1]] = float("nan")
    columns["target"][[0, -1]] = IGNORED
    columns["block_ids"][[0, -1]] = -7
    return columns


def changed(name: str, place: int | slice, value: float) -> dict[str, torch.Tensor]:
    columns = good_columns()
    columns[name] = columns[name].clone()
    columns[name][place] = value
    return columns


NAN, INF = float("nan"), float("inf")
BROKEN = [
    ("target", 1, V),
    ("target", N - 2, -1),
    ("cu_seqlens", 0, 1),
    ("cu_seqlens", -1, N - 1),
    ("cu_seqlens", 2, 9),
    ("block_ids", 3, -2),
    ("block_ids", 3, 2**31),
    ("block_ids", 4, 0),  # 0 after 1 within the first block of tokens
    ("block_ids", N - 2, 5),  # less than one in the block of tokens before
    *((name, place, value) for name in checks.POLICY_OF for place, value in ((1, NAN), (N - 2, INF), (3, 1.0))),
    ("behavior_logprobs", 700, NAN),  # good: it has no log-ratio
    *((name, N - 2, value) for name in ("advantages", "weights") for value in (NAN, -INF)),
    *((name, 3, value) for name in ("sequence_advantages", "sequence_scale") for value in (NAN, INF)),
    *(("denominator", (), value) for value in (0, -1)),
]


def said(check, columns: dict[str, torch.Tensor]) -> str | None:
    """The rule that a check says is broken, without the value; None where all is well."""
    try:
        check(columns, columns["target"] != IGNORED, V, IGNORED)
    except Exception as error:
        if isinstance(error, ValueError):
            return str(error).split(", got")[0]
        rule = str(error.__cause__).removeprefix("pear_kernels: ")  # of the interpreter's error
        return rule.replace("N, the number of tokens", f"N = {N}")
    return None


@pytest.mark.parametrize("name, place, value", BROKEN)
def test_what_breaks_a_rule_is_found_and_named(name, place, value):
    columns = changed(name, place, value)
    rule = said(checks.check_values, columns)
    assert (rule is None) == (name == "behavior_logprobs" and place == 700)
    assert said(values.check_values, columns) == rule


def test_good_values_pass_with_every_column_and_with_few():
    columns = good_columns()
    assert said(checks.check_values, columns) is None and said(values.check_values, columns) is None
    for few in (["target"], ["target", "cu_seqlens"], ["target", "cu_seqlens", "behavior_logprobs"]):
        part = {name: columns[name] for name in few}
        if "behavior_logprobs" in part:
            part["behavior_logprobs"] = -torch.ones(2 * N)[::2]  # not contiguous
        assert said(values.check_values, part) is None
    for bad in ("behavior_logprobs", "target"):
        part[bad] = part[bad].clone()
        part[bad][1] = 1000
        assert bad in said(values.check_values, part)


def test_bounds_outside_the_tokens_are_found_without_tokens():
    empty = torch.zeros(0, dtype=torch.bool)
    values.check_values({"cu_seqlens": torch.zeros(3, dtype=torch.int64)}, empty)
    with pytest.raises(Exception, match="cu_seqlens must begin with 0 and end at N"):
        values.check_values({"cu_seqlens": torch.tensor([0, 4])}, empty)


@pytest.mark.parametrize("setting", ["0", "1"])
def test_a_call_off_the_cpu_checks_its_values_in_one_launch(setting, monkeypatch):
    monkeypatch.setattr(backends, "off_cpu", lambda device: True)
    monkeypatch.setattr(launch, "recorder", [])
    monkeypatch.setenv(checks.VALUES_VARIABLE, setting)
    hidden, weight, target = torch.randn(6, 4), torch.randn(V, 4), torch.arange(6)
    linear_pear_loss(hidden, weight, target, -torch.ones(6), backend="triton")
    names = [launched.kernel.fn.__name__ for launched in launch.recorder]
    assert names.count("check_columns") == int(setting)
    if setting == "1":
        launched = launch.recorder[0]
        given = dict(zip(("valid", *values.COLUMNS), launched.args, strict=False))
        assert [name for name, tensor in given.items() if tensor is not None] == [
            "valid", "target", "cu_seqlens", "behavior_logprobs",
        ]  # fmt: skip
        assert launched.constexprs["debug"] and not launched.constexprs["sanitize_overflow"]
        assert len(launched.constexprs["TARGET_RULE"]) < 255
