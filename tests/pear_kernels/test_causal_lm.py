"""What patch_causal_lm makes of a model beside the plain loss: PEAR's, packs, adapters, compilation, refusals."""

import copy
import inspect
import pickle
import types
import typing

import peft
import pytest
import torch
from causal_lms import VOCABULARY, batch, gradients, make_lm
from torch import Tensor, nn

from pear_kernels import patch_causal_lm, unpatch_causal_lm
from pear_kernels.huggingface import causal_lm
from pear_kernels.huggingface.positions import position_limit
from pear_kernels.losses import pear, weighted
from pear_kernels.reference import naive_pear_loss, naive_weighted_loss

LENGTHS = [4, 1, 6, 3]


def column(shape=(2, 9), seed: int = 2) -> Tensor:
    """Log-probs that some policy might have."""
    return -3 * torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def naive(model, rows: dict[str, Tensor], columns: dict[str, Tensor], **options):
    """(loss, log-probs in one row) from the unpatched model's logits, as heads with an identity for a matrix."""
    inputs = {name: rows[name] for name in ("input_ids", "attention_mask") if name in rows}
    logits = model(**inputs).logits[:, :-1].flatten(0, 1)
    rest = {name: value[:, 1:].flatten() for name, value in columns.items()}
    target, count = rows["labels"][:, 1:].flatten(), rows["labels"].shape[1] - 1
    bounds = torch.arange(0, len(target) + 1, count)
    eye = torch.eye(VOCABULARY, dtype=logits.dtype)
    loss = naive_weighted_loss if "weighting" in options else naive_pear_loss
    value, logprobs, _ = loss(logits, eye, target, cu_seqlens=bounds, **rest, **options)
    return value, logprobs


# ---- losses


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"level": "token", "gamma": 0.9},
        {"level": "block", "block_size": 2, "log_ratio_clip": (-0.5, 0.5)},
        {"level": "sequence", "workspace_bytes": 4096},
        {"center": True, "reduction": "sequence_mean"},
    ],
)
@pytest.mark.parametrize("family", ["Gemma2", "Phi", "Qwen2"])  # a soft cap, a bias, a tied head
def test_behavior_logprobs_make_the_loss_pears(family, options):
    model = make_lm(family)
    columns = {"behavior_logprobs": column()}
    plain = {name: value for name, value in options.items() if name != "workspace_bytes"}
    expected, logprobs = naive(model, batch(), columns, **plain)
    expected.backward()
    gradients_before = gradients(model)
    output = patch_causal_lm(model, **options)(**batch(), **columns)
    output.loss.backward()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-9)
    torch.testing.assert_close(output.log_probs[:, 1:].flatten(), logprobs.float())
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, gradients_before[name], rtol=1e-7, atol=1e-10, msg=name)


@pytest.mark.parametrize("pears", [False, True])
@pytest.mark.parametrize("family", ["Gemma2", "Phi", "Qwen2"])
def test_gradient_tolerance_changes_nothing_but_gradients(family, pears):
    """Loss and log-probs bit for bit; gradients of that loss, near the exact ones. 0 is the loss without it."""
    columns, found = {"behavior_logprobs": column()} if pears else {}, {}
    for tolerance in (None, 0.0, 0.05):
        model = make_lm(family)
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(30)  # logits of a confident model
        patch_causal_lm(model, **({} if tolerance is None else {"gradient_tolerance": tolerance}))
        output = model(**batch(), **columns)
        output.loss.backward()
        found[tolerance] = output, gradients(model)
    exact, expected = found[0.0]
    for tolerance, (output, own) in found.items():
        assert output.loss.item() == exact.loss.item() and torch.equal(output.log_probs, exact.log_probs)
        for name, gradient in own.items():
            if tolerance is None:
                assert torch.equal(gradient, expected[name]), name
            else:
                assert (gradient - expected[name]).norm() <= 0.1 * expected[name].norm(), name
    assert any(not torch.equal(gradient, expected[name]) for name, gradient in found[0.05][1].items())
    with pytest.raises(ValueError, match="gradient_tolerance must be a number from 0 to below 1, got 1"):
        patch_causal_lm(make_lm(family), gradient_tolerance=1)


def test_blocks_of_any_length():
    model, ids = make_lm("Llama"), torch.tensor([[0, 0, 0, 0, 1, 1, -1, 5, 5], [0, 1, 1, 1, 2, 2, 3, 3, 3]])
    columns = {"behavior_logprobs": column(), "block_ids": ids}
    expected, _ = naive(model, batch(), columns, level="block", gamma=0.9)
    output = patch_causal_lm(model, level="block", gamma=0.9)(**batch(), **columns)
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-9)


def test_auxiliary_losses_of_experts_are_added_to_pears():
    """In place, by the model's forward. (Its routers and softmax round to float32 on the way back.)"""
    model = make_lm("Mixtral")
    columns = {"behavior_logprobs": column()}
    expected, _ = naive(model, batch(), columns)
    auxiliary = model(**batch()).aux_loss
    (expected + 0.5 * auxiliary).backward()
    gradients_before = gradients(model)
    output = patch_causal_lm(model)(**batch(), **columns)
    output.loss.backward()
    assert output.loss.item() == pytest.approx((expected + 0.5 * auxiliary).item(), rel=1e-9)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, gradients_before[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weighting", ["dft", "iw-sft", "psft", "asft", "idft"])
def test_any_weighting(weighting):
    model = make_lm("Llama")
    columns = {"ref_logprobs": column()} if weighting in ("iw-sft", "psft", "asft") else {}
    expected, _ = naive(model, batch(), columns, weighting=weighting)
    output = patch_causal_lm(model, weighting=weighting)(**batch(), **columns)
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-9)


def test_num_items_divides_pears_loss_too_and_steps_add_up():
    """Two steps of a row each, with the tokens of both, are one step of both rows."""
    model = patch_causal_lm(make_lm("Llama"))
    rows, behavior = batch(), column()
    whole = model(**rows, behavior_logprobs=behavior)
    whole.loss.backward()
    expected = gradients(model)
    count = (rows["labels"][:, 1:] != -100).sum()
    for number in (count, int(count)):
        losses = []
        for i in range(2):
            row = {name: value[i : i + 1] for name, value in rows.items()}
            losses.append(model(**row, behavior_logprobs=behavior[i : i + 1], num_items_in_batch=number).loss)
            losses[-1].backward()
        assert sum(losses).item() == pytest.approx(whole.loss.item(), rel=1e-12)
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12)


def pack() -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """A pack (1, T) and the sequences in it, each (1, t); every token is labelled, first ones too."""
    ids = torch.randint(3, VOCABULARY, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(4))
    whole = {"input_ids": ids, "labels": ids, "behavior_logprobs": column(ids.shape)}
    parts = [{name: part for name, part in zip(whole, columns, strict=True)} for columns in zip(
        *(value.split(LENGTHS, dim=1) for value in whole.values()), strict=True
    )]  # fmt: skip
    whole["position_ids"] = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    return whole, parts


@pytest.mark.parametrize("bounds", ["cu_seq_lens_q", "position_ids"])
@pytest.mark.parametrize("pear", [True, False])
def test_a_pack_is_its_sequences(pear, bounds):
    """Attention keeps them apart by `position_ids`; first tokens are no targets, and sums along a sequence stop."""
    options = {"level": "token", "gamma": 0.9} if pear else {}
    model = patch_causal_lm(make_lm("Llama", attn_implementation="sdpa"), **options)
    whole, parts = pack()
    if bounds == "cu_seq_lens_q":
        whole |= {"cu_seq_lens_q": torch.tensor([0, *LENGTHS]).cumsum(0).int(), "max_length_q": max(LENGTHS)}
    elif not pear:  # as the unpatched model has it, only the labels say what counts there
        whole["labels"] = whole["labels"].masked_fill(whole["position_ids"] == 0, -100)
    if not pear:
        for row in (whole, *parts):
            del row["behavior_logprobs"]
    count = sum(LENGTHS) - len(LENGTHS)
    losses = [model(**part, num_items_in_batch=count) for part in parts]
    output = model(**whole)
    assert output.loss.item() == pytest.approx(sum(part.loss for part in losses).item(), rel=1e-9)
    torch.testing.assert_close(output.log_probs, torch.cat([part.log_probs for part in losses], dim=1))


@pytest.mark.parametrize("options", [{}, {"level": "token"}, {"reduction": "sequence_mean"}, {"weighting": "dft"}])
@pytest.mark.parametrize(
    "more", [[0, 4, 5, 11, 14, 14], [0, 4, 5, 11, 14, 14, 14], [0, 0, 4, 4, 5, 11, 14], [0, 4, 5, 11, 11, 14]]
)
def test_empty_sequences_of_a_pack_change_nothing(options, more):
    """Ones at the end fill up bounds of a fixed length; others may be what filters left."""
    model = patch_causal_lm(make_lm("Llama", attn_implementation="sdpa"), **options)
    whole, _ = pack()
    if "level" not in options:
        del whole["behavior_logprobs"]
    expected, found = (model(**whole, cu_seq_lens_q=torch.tensor(bounds).int()) for bounds in ([0, 4, 5, 11, 14], more))
    assert found.loss.item() == expected.loss.item() and torch.equal(found.log_probs, expected.log_probs)
    assert (found.log_probs[0, [0, 4, 5, 11]] == 0).all() and (found.log_probs < 0).sum() == 10


def test_labels_that_are_shifted_already():
    """As context parallelism gives them."""
    model = patch_causal_lm(make_lm("Llama"))
    rows = batch()
    expected = model(**rows)
    shifted = torch.nn.functional.pad(rows["labels"], (0, 1), value=-100)[:, 1:]
    output = model(**rows, shift_labels=shifted)
    assert output.loss.item() == expected.loss.item()
    torch.testing.assert_close(output.log_probs[:, :-1], expected.log_probs[:, 1:])


def test_no_token_that_counts_is_a_loss_of_zero():
    model = patch_causal_lm(make_lm("Mixtral"))
    rows = batch()
    for count in (None, 0, torch.tensor(0)):
        output = model(**rows | {"labels": torch.full_like(rows["labels"], -100)}, num_items_in_batch=count)
        assert output.loss.item() == pytest.approx(0.5 * output.aux_loss.item()) and not output.log_probs.any()


# ---- the patch itself


def test_a_second_patch_replaces_the_options_and_unpatching_undoes_it():
    model = make_lm("Granite")
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    inputs = {**batch(), "behavior_logprobs": column()}
    losses = []
    for options in ({"gamma": 0.9}, {"level": "sequence"}, {"gamma": 0.9}):
        patch_causal_lm(model, **options)
        losses.append(model(**inputs).loss.item())
    assert losses[0] == losses[2] != losses[1]
    patch_causal_lm(model, weighting="dft")
    assert model(**batch()).loss.item() not in losses
    assert unpatch_causal_lm(model) is model
    for name, module in model.named_modules():
        assert module.__dict__.keys() == before[name].keys(), name
    assert model(**batch()).logits is not None
    assert unpatch_causal_lm(model) is model


def test_a_deep_copy_is_a_patched_model_of_its_own():
    model = patch_causal_lm(make_lm("Llama"), gamma=0.9)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.mul_(2)
    inputs = {**batch(), "behavior_logprobs": column()}
    expected = patch_causal_lm(make_lm("Llama"), gamma=0.9)
    with torch.no_grad():
        expected.lm_head.weight.mul_(2)
    assert twin(**inputs).loss.item() == expected(**inputs).loss.item() != model(**inputs).loss.item()
    unpatch_causal_lm(twin)
    assert model(**inputs).logits is None and twin(**batch()).logits is not None
    assert len(model._forward_hooks) == 1 and not twin._forward_hooks


def test_a_patched_model_is_not_pickled_into_an_unpatched_one():
    """The copy would have transformers' forward, which takes `behavior_logprobs` and forgets them."""
    model = patch_causal_lm(make_lm("Llama"))
    with pytest.raises(TypeError, match="a patched model cannot be pickled.*unpatch_causal_lm first"):
        pickle.dumps(model)
    again = pickle.loads(pickle.dumps(unpatch_causal_lm(model)))
    assert again(**batch()).loss.item() == model(**batch()).loss.item()


@pytest.mark.parametrize("adapted", [False, True])
def test_a_patch_that_was_peeled_off_is_told_and_put_on_again(adapted):
    """accelerate's `unwrap_model(model, keep_fp32_wrapper=False)` follows `__wrapped__` further than its own."""
    base = model = make_lm("Llama")
    if adapted:
        model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"])).double()
    patch_causal_lm(model, gamma=0.9)
    inputs = {**batch(), "behavior_logprobs": column()}
    expected = model(**inputs)
    base.forward = types.MethodType(base.forward.__wrapped__, base)
    with pytest.raises(ValueError, match=f"{type(model).__name__} is patched, but its forward.*use_liger_kernel"):
        model(**inputs)
    assert patch_causal_lm(model, gamma=0.9)(**inputs).loss.item() == expected.loss.item()
    assert unpatch_causal_lm(model)(**batch()).logits is not None
    assert "_pear_patch" not in base.__dict__ and not model._forward_hooks


def test_options_are_replaced_under_accelerates_mixed_precision_too(monkeypatch):
    """Which wraps the forward, and shows what it wraps."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    monkeypatch.setattr(AcceleratorState, "_shared_state", {})  # a process has one, and its precision is for good
    model = patch_causal_lm(make_lm("Llama", torch.float32), gamma=0.5)
    model = Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    inputs = {**batch(), "behavior_logprobs": column()}
    other = model(**inputs).loss.item()
    patch_causal_lm(model, gamma=0.9)
    with torch.autocast("cpu", torch.bfloat16):
        expected = patch_causal_lm(make_lm("Llama", torch.float32), gamma=0.9)(**inputs).loss.item()
    assert model(**inputs).loss.item() == expected != other


def test_a_loss_that_was_set_since_is_no_other_loss_silently():
    model = patch_causal_lm(make_lm("Llama"))
    model.loss_function = lambda logits, **_: logits.sum()
    with pytest.raises(ValueError, match="LlamaForCausalLM.*makes its loss by <lambda>"):
        model(**batch())


def test_a_head_that_came_since_is_looked_at_too():
    model = patch_causal_lm(make_lm("Llama"))
    assert model(**batch()).logits is None
    model.lm_head = normalizing_head().lm_head
    with pytest.raises(ValueError, match="LlamaForCausalLM: the LM head is a .*Normalizing, whose forward is its own"):
        model(**batch())


@pytest.mark.parametrize("name", ["behavior_logprobs", "cu_seq_lens_q"])
def test_a_list_is_no_tensor(name):
    with pytest.raises(TypeError, match=f"{name} must be a tensor, got list: have the collator"):
        patch_causal_lm(make_lm("Llama"))(**batch(), **{name: [0, 9]})


def test_an_output_is_pickled_as_the_unpatched_models():
    with torch.no_grad():
        output = patch_causal_lm(make_lm("Llama"))(**batch(), output_hidden_states=True)
    for again in (pickle.loads(pickle.dumps(output)), copy.deepcopy(output)):
        assert type(again) is type(output) and again.keys() == output.keys() and again.logits is None
        assert again.loss == output.loss and torch.equal(again.log_probs, output.log_probs)
        assert torch.equal(again.hidden_states[-1], output.hidden_states[-1])


def test_outputs_as_tuples_and_inputs_by_position():
    model = patch_causal_lm(make_lm("Llama"))
    rows = batch()
    expected = model(**rows)
    found = model(rows["input_ids"], rows["attention_mask"], labels=rows["labels"], return_dict=False)
    assert found[0].item() == expected.loss.item() and torch.equal(found[-1], expected.log_probs)
    assert expected.to_tuple()[0] is expected.loss and expected["log_probs"] is expected.log_probs


def test_the_signature_has_the_columns_so_that_trainers_keep_them():
    names = inspect.signature(make_lm("Llama").forward).parameters.keys()
    found = inspect.signature(patch_causal_lm(make_lm("Llama")).forward).parameters
    assert found.keys() - names == {"behavior_logprobs", "block_ids", "ref_logprobs"} and names <= found.keys()


def test_a_trained_step_in_bfloat16_autocast_with_checkpointing():
    """The unpatched model under the same autocast, whose logits are rounded to bfloat16."""
    found = []
    for patched in (False, True):
        model = make_lm("Llama", torch.float32).train()
        model.gradient_checkpointing_enable()
        if patched:
            patch_causal_lm(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**batch()).loss
        loss.backward()
        found.append((loss.item(), gradients(model)))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-2)
    for name, gradient in found[0][1].items():
        assert (found[1][1][name] - gradient).norm() <= 0.05 * gradient.norm(), name


def test_compiled_in_one_graph():
    """(`aot_eager` traces as inductor does, and needs no compiler.)"""
    model = patch_causal_lm(make_lm("Gemma2", torch.float32))
    inputs = {**batch(), "behavior_logprobs": column()}
    del inputs["attention_mask"]
    expected = []
    for columns in (inputs, {name: inputs[name] for name in ("input_ids", "labels")}):
        output = model(**columns)
        output.loss.backward()
        expected.append((output, gradients(model)))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for columns, (before, gradients_before) in zip(
        (inputs, {name: inputs[name] for name in ("input_ids", "labels")}), expected, strict=True
    ):
        output = compiled(**columns)
        output.loss.backward()
        assert type(output) is type(before) and output.logits is None
        torch.testing.assert_close(output.loss, before.loss)
        torch.testing.assert_close(output.log_probs, before.log_probs)
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, gradients_before[name], rtol=1e-4, atol=1e-6)


def test_what_a_patch_compares_leaves_no_trace():
    """The row runs in evaluation mode: flags of modules, buffers, attributes and random states are as before."""

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.last = None

        def forward(self, x):
            self.calls += 1
            self.last = x
            return nn.functional.dropout(x + 0 * torch.rand(()), 0.5, self.training)

    model = make_lm("Llama", attention_dropout=0.5).train()
    model.model.layers[0].eval()  # as where a part is frozen
    model.model.norm = nn.Sequential(model.model.norm, Counting())
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    values = {name: buffer.clone() for name, buffer in model.named_buffers()}
    state = torch.get_rng_state()
    patch_causal_lm(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(buffer, values[name]) for name, buffer in model.named_buffers())
    unpatch_causal_lm(model)
    for name, module in model.named_modules():
        assert module.__dict__.keys() == before[name].keys(), name
        assert all(module.__dict__[key] is value for key, value in before[name].items()), name


# ---- adapters


@pytest.mark.parametrize("first", ["patch", "adapter"])
@pytest.mark.parametrize("saved", [None, ["lm_head"]])
def test_adapters(first, saved):
    """LoRA below the head, and a trained copy of the head, whichever comes first; the PeftModel is what is called."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], modules_to_save=saved)
    found = []
    for patched in (False, True):
        torch.manual_seed(3)
        model = make_lm("Llama", torch.float64)
        if patched and first == "patch":
            patch_causal_lm(model)
        model = peft.get_peft_model(model, config, autocast_adapter_dtype=False).eval()
        if patched and first == "adapter":
            assert patch_causal_lm(model) is model
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1)
        inputs = batch()
        output = model(**inputs)
        output.loss.backward()
        assert (output.logits is None) == patched
        found.append((output.loss.item(), gradients(model)))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)
    assert found[1][1].keys() == found[0][1].keys()
    assert any("lm_head" in name for name in found[1][1]) == bool(saved)
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("first", ["patch", "adapter"])
def test_an_adapter_on_the_head_is_refused(first):
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    model = make_lm("Llama")
    if first == "patch":
        model = peft.get_peft_model(patch_causal_lm(model), config)
        with pytest.raises(ValueError, match="LlamaForCausalLM: a PEFT adapter on the LM head.*target modules"):
            model(**batch())
    else:
        with pytest.raises(ValueError, match="LlamaForCausalLM: a PEFT adapter on the LM head.*target modules"):
            patch_causal_lm(peft.get_peft_model(model, config))


@pytest.mark.parametrize("first", ["patch", "adapter"])
def test_trained_tokens_of_a_tied_head(first):
    """PEFT wraps the head, whose weight then holds the tokens' new rows."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[5, 6, 7])
    model = make_lm("Qwen2")
    if first == "patch":
        patch_causal_lm(model)
    model = peft.get_peft_model(model, config).double()
    if first == "adapter":
        patch_causal_lm(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens" in name:
                parameter.add_(column(parameter.shape))
    found = []
    for _ in range(2):  # patched, and not
        output = model(**batch())
        output.loss.backward()
        found.append((output.loss.item(), gradients(model)))
        unpatch_causal_lm(model)
    assert output.logits is not None and found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert any("trainable_tokens" in name for name in found[1][1])
    for name, gradient in found[1][1].items():
        torch.testing.assert_close(found[0][1][name], gradient, rtol=1e-5, atol=1e-7)


# ---- refusals


class QuantizedLinear(nn.Linear):
    """As bitsandbytes' Linear4bit: two weights in a byte, (V * D / 2, 1)."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        data = torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(data, requires_grad=False)
        self.weight.quant_state = "nf4"


def test_a_quantized_head_is_refused_with_the_option_that_keeps_it_out():
    model = make_lm("Llama")
    model.lm_head = QuantizedLinear(model.lm_head)
    with pytest.raises(ValueError, match=r'LlamaForCausalLM.*uint8.*llm_int8_skip_modules=\["lm_head"\]'):
        patch_causal_lm(model)
    assert not hasattr(model, "_pear_patch") and "forward" not in model.__dict__ and not model._forward_hooks


def test_a_head_of_torchao_is_refused_though_it_says_that_it_is_bfloat16():
    class Quantized(torch.Tensor):
        pass

    Quantized.__module__ = "torchao.quantization"
    model = make_lm("Llama")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().as_subclass(Quantized))
    with pytest.raises(ValueError, match="LlamaForCausalLM.*quantised heads are not supported"):
        patch_causal_lm(model)


def with_forward(change) -> nn.Module:
    """A Llama whose logits are changed before the loss."""
    from transformers import LlamaForCausalLM

    class Changed(LlamaForCausalLM):
        def forward(self, input_ids, labels=None, **kwargs):
            logits = change(self.lm_head(self.model(input_ids, **kwargs).last_hidden_state), labels)
            return self.loss_function(logits=logits, labels=labels, vocab_size=VOCABULARY)

    model = make_lm("Llama")
    model.__class__ = Changed
    return model


def no_head() -> nn.Module:
    model = make_lm("Llama")
    model.lm_head = None
    return model


def normalizing_head() -> nn.Module:
    class Normalizing(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, nn.functional.normalize(self.weight))

    model = make_lm("Llama")
    model.lm_head.__class__ = Normalizing
    return model


def other_loss() -> nn.Module:
    model = make_lm("Llama")
    model.loss_function = nn.functional.cross_entropy
    return model


def makes_its_own_loss() -> nn.Module:
    from transformers import BartConfig, BartForCausalLM

    return BartForCausalLM(BartConfig(vocab_size=VOCABULARY, d_model=16, decoder_layers=1, decoder_attention_heads=2))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: nn.Linear(2, 3), "must be a causal language model of transformers.*got Linear: patch it before"),
        (lambda: nn.DataParallel(make_lm("Llama")), "got DataParallel: patch it before"),
        (lambda: make_lm("Llama").model, "got LlamaModel|no output embeddings"),
        (no_head, "LlamaForCausalLM has no output embeddings"),
        (
            other_loss,
            "LlamaForCausalLM cannot be patched: its forward makes its loss by cross_entropy",
        ),
        (makes_its_own_loss, "BartForCausalLM cannot be patched: its forward makes its loss by itself"),
        (
            lambda: with_forward(lambda z, _: z - z.mean(-1, keepdim=True)),
            "Changed.*more to its logits than.*to linear_pear_loss",
        ),
        (lambda: with_forward(lambda z, _: -z), "Changed.*more to its logits than"),
        (lambda: with_forward(lambda z, _: z.clamp(max=1.0)), "Changed.*more to its logits than"),
        (lambda: with_forward(lambda z, _: z[:, 1:]), "Changed.*more to its logits than"),
        (lambda: with_forward(lambda z, y: z + 0 * torch.tanh(torch.ones(VOCABULARY)).sum() + z * 0.5 * z), "more to"),
        (lambda: with_forward(lambda z, y: y.neg_() * 0 + 1), "Changed.*more to its logits than"),
    ],
)
def test_what_cannot_be_patched_is_refused_by_name_and_reason(make, message):
    with pytest.raises(ValueError, match=message):
        patch_causal_lm(make())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", ["tokens", "head", "padding"])
def test_a_model_whose_logits_are_others_is_refused_by_name(wrong, dtype):
    """What the measurement cannot see, as it runs neither trunk nor head: a short row of the model itself does."""
    from transformers import LlamaForCausalLM

    class Other(LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, **kwargs):
            output = super().forward(input_ids=input_ids, **kwargs)
            if wrong == "tokens":  # a token forbids another, as constraints do
                output["logits"] = output.logits - 2 * (input_ids[..., None] == 3) * (torch.arange(VOCABULARY) == 9)
            if wrong == "padding":
                output["logits"][..., -3:] = -torch.inf
            if labels is not None:
                output["loss"] = self.loss_function(output.logits, labels, VOCABULARY)
            return output

    model = make_lm("Llama", dtype)
    model.__class__ = Other
    if wrong == "head":  # which multiplies by something else than its weight
        model.lm_head.forward = lambda x: nn.functional.linear(x, 1.2 * model.lm_head.weight)
    with pytest.raises(ValueError, match="Other cannot be patched: its forward .*(a short row|more to its logits)"):
        patch_causal_lm(model)
    assert not hasattr(model, "_pear_patch") and "_loss_function" not in model.__dict__


@pytest.mark.parametrize(
    "change, scale, softcap",
    [
        (lambda z, _: z / 3, 3.0, None),
        (lambda z, _: (z * 0.7).float(), 1 / 0.7, None),
        (lambda z, _: 5 * torch.tanh(z / 5), 1.0, 5.0),
        (lambda z, _: torch.tanh(z), 1.0, 1.0),
        (lambda z, _: 2 * torch.tanh(0.5 * z / 3), 3.0, 6.0),
        (lambda z, _: 30 * torch.tanh(z.float() / 30), 1.0, 30.0),
    ],
)
def test_scales_and_soft_caps_are_measured(change, scale, softcap):
    model = with_forward(change)
    expected = model(batch()["input_ids"], labels=batch()["labels"])
    patch_causal_lm(model)
    temperature, cap, _ = model._pear_patch.treatment
    assert temperature == pytest.approx(scale, rel=1e-6)
    assert cap is None if softcap is None else cap == pytest.approx(softcap, rel=1e-6)
    assert model._pear_patch.treatment.options().get("softcap") == cap
    assert expected.requires_grad


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"gama": 0.9}, TypeError, "gama is no option of patch_causal_lm; it takes .*gamma"),
        ({"group": None}, TypeError, "group is no option of patch_causal_lm"),  # the model's own parallelism says
        ({"temperature": 2.0}, TypeError, "temperature is no option"),
        ({"weighting": "dft", "gamma": 0.9}, TypeError, "gamma is no option"),
        ({"gamma": 2.0}, ValueError, r"gamma must be in \(0, 1\]"),
        ({"level": "word"}, ValueError, "level must be one of"),
        ({"backend": "cuda"}, ValueError, "backend must be 'triton' or 'torch'.*got 'cuda'"),
        ({"weighting": "sft"}, ValueError, "weighting must be one of"),
        ({"weighting": "psft", "psft_clip": -1.0}, ValueError, "psft_clip must be"),
    ],
)
def test_bad_options_are_refused_before_the_model_is_touched(options, error, message):
    model = make_lm("Llama")
    with pytest.raises(error, match=message):
        patch_causal_lm(model, **options)
    assert "forward" not in model.__dict__ and not hasattr(model, "_pear_patch")


def test_the_keywords_that_a_type_checker_knows_are_those_allowed():
    fields = {name for each in (*pear.CLASSES, *weighted.CLASSES) for name in each.names()}
    known = typing.get_type_hints(causal_lm.PatchKeywords).keys()
    assert known == fields - {"weighting"} | {"return_entropy"}


@pytest.mark.parametrize(
    "options, inputs, message",
    [
        ({}, {"labels": None, "behavior_logprobs": column()}, "behavior_logprobs is given without labels"),
        ({}, {"block_ids": torch.zeros(2, 9).long()}, "block_ids is given without behavior_logprobs"),
        ({}, {"ref_logprobs": column()}, "ref_logprobs does not go with weighting=None"),
        ({"weighting": "dft"}, {"behavior_logprobs": column()}, "behavior_logprobs does not go with weighting='dft'"),
        ({"weighting": "psft"}, {}, "ref_logprobs is None"),
        ({}, {"behavior_logprobs": column((2, 8))}, "behavior_logprobs must have"),
        ({}, {"labels": batch()["labels"][:, :-1]}, r"labels must be \(B, T\) like the tokens, got \(2, 8\)"),
        ({}, {"logits_to_keep": 3}, "leave logits_to_keep out"),
        ({}, {"cu_seq_lens_q": torch.tensor([0, 9])}, "cu_seq_lens_q is of a pack"),
        ({"reduction": "sequence_mean"}, {"num_items_in_batch": 3}, "num_items_in_batch counts tokens"),
        ({"level": "token"}, {}, r"behavior_logprobs is missing.*level='token'.*weighting=\"none\""),
        ({"center": True}, {"block_ids": torch.zeros(2, 9).long()}, "block_ids is given without behavior_logprobs"),
        ({}, {"labels": batch()["labels"] + 99}, r"target must be in \[0, 131\)"),
        ({}, {"input_ids": None}, "exactly one of input_ids or inputs_embeds"),  # transformers' own
    ],
)
def test_bad_calls(options, inputs, message):
    model = patch_causal_lm(make_lm("Llama"), **options)
    with pytest.raises(ValueError, match=message):
        model(**batch() | inputs)
    columns = {"ref_logprobs": column()} if options == {"weighting": "psft"} else {}
    columns |= {"behavior_logprobs": column()} if options.keys() & {"level", "center"} else {}
    assert model(**batch() | columns).loss > 0


def test_plain_cross_entropy_of_a_model_that_has_options_of_pears():
    """As evaluation without the column has it; to train by it, one says so."""
    model = patch_causal_lm(make_lm("Llama"), level="token")
    expected = patch_causal_lm(make_lm("Llama"))(**batch()).loss.item()
    with torch.no_grad():
        assert model(**batch()).loss.item() == expected
    patch_causal_lm(model, weighting="none")
    assert model(**batch()).loss.item() == expected


def test_a_patched_model_without_data_has_shapes():
    """On the meta device, as the unpatched one: for memory and FLOPs before there are weights."""
    with torch.device("meta"):
        model = make_lm("Llama", torch.float32)
        ids = torch.zeros(1, 9, dtype=torch.long)
        inputs = {"input_ids": ids, "labels": ids, "position_ids": ids, "attention_mask": ids}
        behavior = {"behavior_logprobs": torch.zeros(1, 9)}
    patch_causal_lm(model)
    for columns in ({}, behavior, {**behavior, "cu_seq_lens_q": ids[0, :3].int()}):
        output = model(**inputs, **columns)
        assert output.loss.is_meta and output.loss.shape == () and output.log_probs.shape == (1, 9)
        output.loss.backward()
        assert all(gradient.is_meta for gradient in gradients(model).values())


def test_an_error_within_the_forward_leaves_the_head_and_the_loss_as_they_were():
    model = patch_causal_lm(make_lm("Llama"))
    expected = model(input_ids=batch()["input_ids"]).logits
    with pytest.raises(IndexError):
        model(**batch() | {"input_ids": batch()["input_ids"] + VOCABULARY})
    assert torch.equal(model(input_ids=batch()["input_ids"]).logits, expected)


# ---- positions


def test_a_context_longer_than_the_models_positions():
    model = patch_causal_lm(make_lm("Llama", max_position_embeddings=6, attn_implementation="sdpa"))
    with pytest.raises(ValueError, match="LlamaForCausalLM: a sequence of 9 tokens.*positions for 6.*RoPE"):
        model(**batch())
    whole, _ = pack()
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    assert model(**whole, cu_seq_lens_q=cu_seqlens).loss > 0 and model(**whole).loss > 0  # 14 tokens, none over 6
    whole["position_ids"] = torch.arange(14)[None]
    with pytest.raises(ValueError, match="a sequence of 14 tokens"):
        model(**whole)
    assert model(input_ids=batch()["input_ids"]).logits is not None  # without labels, as before


@pytest.mark.parametrize(
    "family, options, limit",
    [
        ("Llama", {}, 64),
        ("GPT2", {"n_positions": 48, "max_position_embeddings": 48}, 48),
        ("Llama", {"rope_parameters": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}}, 256),
        ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, None),
        ("Gemma3", {}, 64),
        ("Bloom", {}, None),
        ("Falcon", {"alibi": True}, None),
    ],
)  # fmt: skip
def test_positions_of_models(family, options, limit):
    config = make_lm(family, **options).config
    if family == "Bloom":  # ALiBi: what was passed for all families is no attribute of its own
        del config.max_position_embeddings
    assert position_limit(config) == limit
