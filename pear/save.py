"""The trained model's files: a plain transformers folder, whole or not at all."""

import os
import shutil
from pathlib import Path

from peft import PeftModel
from trl import SFTTrainer

from pear.folders import sync_files
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


# What an earlier run may have left in the folder, and transformers would load beside or instead of the new files.
STALE = ("model*.safetensors", "model.safetensors.index.json", "adapter_config.json", "adapter_model*", "adapter")


def _move_in(source: Path, target: Path) -> None:
    """Replace the model in `target` by the one in `source`.

    The old config goes first and the new one comes last, and without a config a folder is no model: a kill in between
    leaves no mixture of two models that would load.
    """
    sync_files(source)
    for path in (target / "config.json", *(path for pattern in STALE for path in target.glob(pattern))):
        _remove(path)
    for path in sorted(source.iterdir(), key=lambda path: path.name == "config.json"):
        _remove(target / path.name)
        os.replace(path, target / path.name)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
