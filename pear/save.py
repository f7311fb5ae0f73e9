"""The trained model's files: a plain transformers folder, whole or not at all."""

import contextlib
import os
import shutil
from pathlib import Path

from peft import PeftModel
from trl import SFTTrainer

from pear.io import disk_error, write_error


def save_final(trainer: SFTTrainer, merge_adapter: bool = True) -> None:
    """Write the trained model and its tokenizer to `output_dir` as a plain transformers folder.

    A LoRA model is merged into plain weights, and its adapter is kept in `adapter/`; quantised or sharded ones stay
    adapters. Files are made in a folder beside and moved in when all are whole.

    Raises:
        WriteError: the disk is full; what `output_dir` held is as it was.
    """
    output_dir = Path(trainer.args.output_dir)
    temporary = output_dir / ".final.tmp"
    is_main = trainer.args.should_save
    try:
        if is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        trainer.accelerator.wait_for_everyone()
        model = trainer.model
        sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        quantised = getattr(model, "hf_quantizer", None) is not None
        mergeable = isinstance(model, PeftModel) and not sharded and not quantised
        if mergeable and merge_adapter:
            trainer.save_model(str(temporary / "adapter"), _internal_call=True)
            if is_main:
                merged = model.merge_and_unload()
                merged.save_pretrained(temporary)
                trainer.processing_class.save_pretrained(temporary)
        else:
            trainer.save_model(str(temporary), _internal_call=True)
        trainer.accelerator.wait_for_everyone()
        if is_main:
            _move_in(temporary, output_dir)
    except Exception as error:
        if (cause := disk_error(error)) is None:
            raise
        raise write_error(output_dir, cause, kept="Checkpoints in it are whole.") from error
    finally:
        if is_main:
            shutil.rmtree(temporary, ignore_errors=True)
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    trainer.accelerator.print(f"Model saved to {output_dir}")


def _move_in(source: Path, target: Path) -> None:
    """Replace `target`'s files by `source`'s, each whole; the config comes last, as without it a folder is no model."""
    for path in sorted(source.iterdir(), key=lambda path: path.name == "config.json"):
        destination = target / path.name
        if destination.is_dir():
            shutil.rmtree(destination)
        with contextlib.suppress(FileNotFoundError):
            os.replace(path, destination)
