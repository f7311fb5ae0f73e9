"""patch_causal_lm against the unpatched model, family by family."""

import pytest
import torch
from causal_lms import FAMILIES, SMALL, VOCABULARY, batch, gradients, make_lm

from pear_kernels import patch_causal_lm


def cross_entropy(logits, labels, vocab_size, num_items_in_batch=None, **_):
    """transformers' ForCausalLMLoss, which would round to float32."""
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), shifted.flatten(), reduction="sum")
    return loss / ((shifted != -100).sum() if num_items_in_batch is None else num_items_in_batch)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_unpatched_model(family):
    """In float64, with padding, labels that do not count, and auxiliary losses of experts; generation stays."""
    model, expected = make_lm(family), {}
    ids = batch()["input_ids"]
    tokens = model.generate(ids, max_new_tokens=3, do_sample=False)
    model.loss_function = cross_entropy
    for count in (None, 37):
        output = model(**batch(), num_items_in_batch=count)
        output.loss.backward()
        expected[count] = (output, gradients(model))
    del model._loss_function
    with torch.no_grad():
        logits = model(input_ids=ids).logits

    assert patch_causal_lm(model) is model
    head = model.get_output_embeddings()
    hook = head.register_forward_hook(lambda _, __, z: z.shape[-1] > 1 and pytest.fail("it made logits") or None)
    for count, (before, gradients_before) in expected.items():
        output = model(**batch(), num_items_in_batch=count)
        output.loss.backward()
        found = gradients(model)
        assert isinstance(output, type(before)) and output.logits is None
        assert output.keys() - {"log_probs"} == before.keys() - {"logits"}
        assert output.loss.item() == pytest.approx(before.loss.item(), rel=1e-9)
        if "aux_loss" in before:
            assert before.aux_loss > 0 and torch.equal(before.aux_loss, output.aux_loss)
        assert found.keys() == gradients_before.keys()
        largest = max(gradient.abs().max().item() for gradient in gradients_before.values())
        for name, gradient in gradients_before.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-10 * largest, msg=name)
        assert head.weight.grad is None and any(gradient is not None for gradient in found.values())
    hook.remove()

    labels = batch()["labels"][:, 1:]
    logprobs = before.logits[:, :-1].log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    assert output.log_probs.dtype == torch.float32 and not output.log_probs.requires_grad
    torch.testing.assert_close(output.log_probs[:, 1:], logprobs.masked_fill(labels == -100, 0).float())
    assert (output.log_probs[:, 0] == 0).all()
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, logits)
    assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), tokens)


def test_families_with_experts_have_an_auxiliary_loss_to_add():
    """Else the test before would pass without it."""
    with_loss = [family for family in FAMILIES if "router_aux_loss_coef" in FAMILIES[family]]
    found = [family for family in with_loss if "aux_loss" in make_lm(family)(**batch())]
    assert {"Mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe", "GraniteMoe", "Phimoe", "GptOss"} <= set(found)


def test_a_model_that_sees_images():
    """Llava: image features among the hidden states, labels under them that do not count."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    image = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = LlavaConfig(vision_config=image, text_config=LlamaConfig(**SMALL), image_token_index=130)
    model = LlavaForConditionalGeneration(config).double().eval()
    ids = torch.randint(3, 130, (2, 12))
    ids[:, 2:6] = 130  # (8 / 4)^2 patches
    inputs = {
        "input_ids": ids,
        "pixel_values": torch.randn(2, 3, 8, 8, dtype=torch.float64),
        "labels": ids.masked_fill(ids == 130, -100),
    }
    model.loss_function = cross_entropy
    before = model(**inputs)
    before.loss.backward()
    gradients_before = gradients(model)
    del model._loss_function
    output = patch_causal_lm(model)(**inputs)
    output.loss.backward()
    assert output.logits is None and torch.equal(output.image_hidden_states, before.image_hidden_states)
    assert output.loss.item() == pytest.approx(before.loss.item(), rel=1e-9)
    found = gradients(model)
    assert found.keys() == gradients_before.keys() and any("vision" in name for name in found)
    for name, gradient in gradients_before.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-11)


VISION = dict(depth=1, num_heads=2, patch_size=4, in_channels=3, spatial_merge_size=2, temporal_patch_size=1)
SEEING = {  # what a vision tower of each kind is called with, besides
    "Qwen2VL": {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
    "Qwen2_5_VL": {"hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 32, "fullatt_block_indexes": [0]},
    "Qwen3VL": {
        "hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 32, "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    },
    "Qwen3VLMoe": {
        "hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 32, "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    },
}  # fmt: skip


@pytest.mark.parametrize("family", SEEING)
def test_qwens_that_see_images_on_text(family):
    """Loss, gradients and log-probs of text alone, by positions in three dimensions, against the model's own logits."""
    import transformers

    torch.manual_seed(0)
    kind = getattr(transformers, f"{family}Config")
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
    text = {**SMALL, "head_dim": 8, "rope_parameters": rope}
    more = {"attn_implementation": "eager"}
    if family == "Qwen3VLMoe":
        text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
        more["experts_implementation"] = "eager"
    del text["attn_implementation"]
    ids = {"image_token_id": 130, "video_token_id": 129, "vision_start_token_id": 128, "vision_end_token_id": 127}
    config = kind(text_config=text, vision_config={**VISION, **SEEING[family]}, **ids, **more)
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config).double().eval()
    inputs = batch()
    inputs |= {name: inputs[name].clamp(max=126) for name in ("input_ids", "labels")}  # text: no ids of images
    before = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
    expected = cross_entropy(before, inputs["labels"], VOCABULARY)
    expected.backward()
    gradients_before = gradients(model)
    output = patch_causal_lm(model)(**inputs)
    output.loss.backward()
    assert output.logits is None and output.loss.item() == pytest.approx(expected.item(), rel=1e-9)
    found = gradients(model)
    assert found.keys() == gradients_before.keys() and len(found) > 10
    for name, gradient in gradients_before.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-11, msg=name)
    labels = inputs["labels"][:, 1:]
    logprobs = before[:, :-1].log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(output.log_probs[:, 1:], logprobs.masked_fill(labels == -100, 0).float())
