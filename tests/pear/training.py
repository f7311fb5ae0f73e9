"""What the tests of `pear sft` share: options of short runs, and how gradients are compared."""

import torch

from pear.sft_config import PEARSFTConfig

OPTIONS = dict(level="token", block_size=4, gamma=0.97, log_ratio_clip=[-0.08, 0.3], log_weight_clip=[-10.0, 5.0])


def make_config(output_dir, **kwargs) -> PEARSFTConfig:
    defaults = dict(
        max_length=64, per_device_train_batch_size=4, logging_steps=1, save_strategy="no", report_to="none",
        learning_rate=1e-2, lr_scheduler_type="constant", optim="sgd", max_grad_norm=0.0, gradient_checkpointing=False,
        dataloader_pin_memory=False, disable_tqdm=True, max_steps=1, seed=7, **OPTIONS,
    )  # fmt: skip
    return PEARSFTConfig(str(output_dir), **defaults | kwargs)


def batch_of(trainer, rows):
    return trainer.data_collator([trainer.train_dataset[i] for i in rows])


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(a: dict, b: dict, tolerance: float) -> None:
    assert a.keys() == b.keys() and a
    for name in a:
        error = (a[name] - b[name]).norm() / b[name].norm().clamp(min=1e-12)
        assert error < tolerance, f"{name}: relative error {error:.1e}"
