"""The trained model's files: a plain transformers folder, whole or not at all; and what is left if that fails."""

import contextlib
import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.logging import get_logger
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils.hub import hf_api

from pear import run_identity
from pear.adapters import CONFIG, WEIGHTS, MergeError, can_merge, difference, logits, merge, rounding
from pear.checkpoints import is_whole, step_of
from pear.folders import sync_files
from pear.io import DISK_FULL, DataError, WriteError, disk_error, write_error
from pear.shown import one_line, say

logger = get_logger(__name__)

RESCUED = "rescued"  # folder within output_dir; rescued-2 and so on where there is one already
READ_BACK = 2 << 30  # bytes of weights up to which a saved model is loaded again and compared
# Uploaded beside the model's own files, where there are any.
RECORDS = ("README.md", "run.json", "curves.png", "eval/*.json")


class Saved(NamedTuple):
    """What `save_final` did."""

    files: list[str]  # the model's, relative to output_dir; of the main process
    in_memory: bool  # whether trainer.model still computes what was trained: an attempt to merge can use it up


def train(trainer: Trainer, checkpoint: str | None) -> None:
    """`trainer.train`, whose failure between two checkpoints does not cost what was trained since the last.

    Raises:
        whatever training raised, with a note of where the weights are
    """
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except Exception as error:
        if disk_error(error) is not None or trainer.state.global_step <= step_of(checkpoint):
            raise
        if (kept := _rescue_between_checkpoints(trainer)) is None:
            raise
        said = _what_failed(f"training failed after step {trainer.state.global_step}", error, kept)
        if isinstance(error, DataError):  # printed without a traceback
            raise DataError(said) from error
        error.add_note(said)
        logger.warning(said)
        raise


def save_final(trainer: Trainer, merge_adapter: bool = True) -> Saved:
    """Write the trained model and its tokenizer to `output_dir` as a plain transformers folder.

    An adapter is merged into plain weights and kept in `adapter/`; on quantised or sharded weights it stays an adapter.
    Files are made in a folder beside and moved in when all are whole.

    What is written computes what was trained: one row's logits are compared before and after merging, and, up to 2 GiB
    of weights, with those of the written folder. An adapter that cannot be merged so is the result itself.

    Raises:
        WriteError: the disk is full: what `output_dir` held is as it was, and an adapter that was written already is
            kept. Or saving failed otherwise: the trained weights are in a folder that the message names.
    """
    output_dir = Path(trainer.args.output_dir)
    temporary = output_dir / ".final.tmp"
    is_main = trainer.args.should_save
    files: list[str] = []
    in_memory = True
    try:
        if is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        trainer.accelerator.wait_for_everyone()
        with _held_back_interrupt(output_dir) as interrupted:
            if merge_adapter and not _sharded(trainer) and can_merge(trainer.model):
                in_memory = _save_merged(trainer, temporary)
            else:
                trainer.save_model(str(temporary), _internal_call=True)
                if is_main and not _sharded(trainer) and not isinstance(trainer.model, PeftModel):
                    _check_written(temporary, trainer.model, _autocast(trainer))
            trainer.accelerator.wait_for_everyone()
            if is_main:
                files = sorted(str(path.relative_to(temporary)) for path in temporary.rglob("*") if path.is_file())
                if (record := getattr(trainer, "run_identity", None)) is not None:
                    run_identity.write(temporary, record)
                _move_in(temporary, output_dir)
    except BaseException as error:
        cause = disk_error(error)
        insisted = isinstance(error, _Insisted)
        full = cause is not None and cause.errno in DISK_FULL
        kept = _rescue(trainer, temporary, write=not full and not insisted, whole=files) if is_main else None
        if cause is not None:
            what = "model" if kept and (kept / "config.json").is_file() else "adapter"
            said = "Checkpoints in it are whole." + (f" The {what}, whole, is in {kept}." if kept else "")
            raise write_error(output_dir, cause, kept=said) from error
        if not is_main:
            raise
        said = _what_failed(f"the model could not be saved to {output_dir}", error, kept)
        if not isinstance(error, Exception):
            logger.warning(said)
            raise
        raise WriteError(said) from error
    finally:
        if is_main:
            shutil.rmtree(temporary, ignore_errors=True)
    trainer.accelerator.print(one_line(f"Model saved to {output_dir}"))
    for number in interrupted:
        signal.raise_signal(number)  # the model is saved, and its own handler may have it
    return Saved(files, in_memory)


def _sharded(trainer: Trainer) -> bool:
    """Whether no process has all of the weights."""
    parallel = trainer.accelerator.parallelism_config
    tensors = parallel is not None and parallel.tp_enabled
    return trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or tensors


def _save_merged(trainer: Trainer, folder: Path) -> bool:
    """The adapter in folder/adapter and the merged model in `folder`, or in place of it the adapter if need be.

    Returns whether trainer.model is what was trained, merged or not.
    """
    is_main = trainer.args.should_save
    trainer.save_model(str(folder / "adapter"), _internal_call=True)
    adapter = trainer.model
    try:
        merged = merge(trainer.model, _autocast(trainer))
        trainer.model = merged  # in every process: what is evaluated next is what was saved
        if is_main:
            merged.save_pretrained(folder)
            trainer.processing_class.save_pretrained(folder)
            _check_written(folder, merged, _autocast(trainer))
    except MergeError as error:
        if is_main:
            for path in list((folder / "adapter").iterdir()):
                _remove(folder / path.name)
                path.replace(folder / path.name)
            for path in (*folder.glob("model*"), folder / "adapter", folder / "config.json"):
                _remove(path)
            logger.warning(
                f"The adapter stays unmerged in {trainer.args.output_dir}: {error}. The folder works as --model "
                "all the same."
            )
        return trainer.model is not adapter
    return True


def _check_written(folder: Path, model: PreTrainedModel, autocast: AbstractContextManager | None) -> None:
    """Raise MergeError where the folder's model computes something else than `model`; large ones are not read back."""
    if sum(p.numel() * p.element_size() for p in model.parameters()) > READ_BACK or (
        getattr(model, "hf_quantizer", None) is not None
    ):
        return
    try:
        before = logits(model, autocast)
        attention = model.config._attn_implementation
        read, found = type(model).from_pretrained(
            folder, dtype=model.dtype, use_safetensors=True, attn_implementation=attention, output_loading_info=True
        )
        after = logits(read.to(model.device), autocast)
    except (RuntimeError, TypeError, ValueError) as error:
        logger.warning(f"The saved model was not read back: {_in_a_line(error)}")
        return
    if found["missing_keys"]:
        raise MergeError(f"the written model lacks {sorted(found['missing_keys'])[0]}")
    if (off := difference(before, after)) > rounding(model, autocast):
        raise MergeError(f"the written model's logits differ from the trained one's by {off:.2g} of the largest")


def _autocast(trainer: Trainer) -> AbstractContextManager | None:
    """Flash attention runs in half precision alone; everything else is compared as it is."""
    model = trainer.model
    flash = "flash" in (getattr(model.config, "_attn_implementation", None) or "")
    return trainer.accelerator.autocast() if flash and model.dtype == torch.float32 else None


class _Insisted(KeyboardInterrupt):
    """Ctrl-C a second time."""


@contextlib.contextmanager
def _held_back_interrupt(output_dir: Path) -> Iterator[list[int]]:
    """The first Ctrl-C or SIGTERM in the block only fills the list, a second one interrupts."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def hold_back(number: int, frame: Any) -> None:
        if asked:
            raise _Insisted
        asked.append(number)
        say(f"The model is being saved to {output_dir}; interrupt again to stop without it.")

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: handler for number, handler in before.items() if callable(handler)}  # else the system ends us
    for number in before:
        signal.signal(number, hold_back)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------------------------------
# When something fails


def _in_a_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()):.400}"


def _what_failed(what: str, error: BaseException, kept: Path | None) -> str:
    said = f"{what} ({_in_a_line(error)})"
    if kept is None:
        return f"{said}. What was there before is as it was."
    return f"{said}. The trained weights are whole in {kept}: give this folder as --model."


def _rescue_between_checkpoints(trainer: Trainer) -> Path | None:
    """Keep the weights of a training that failed, unless its newest checkpoint has them."""
    step, output_dir = trainer.state.global_step, Path(trainer.args.output_dir)
    if not trainer.args.should_save or is_whole(output_dir / f"{PREFIX_CHECKPOINT_DIR}-{step}"):
        return None
    return _rescue(trainer, output_dir / ".final.tmp", write=True)


def _rescue(trainer: Trainer, temporary: Path, write: bool, whole: Sequence[str] = ()) -> Path | None:
    """Keep the trained weights in a folder of their own, by the plainest means; the folder, or None.

    Args:
        temporary: what was written so far; an adapter in it is taken as it is, if it is whole
        write: whether anything may be written, as it cannot on a full disk
        whole: the model's files, where all were written; some may be in output_dir already
    """
    output_dir = Path(trainer.args.output_dir)
    names = [RESCUED, *(f"{RESCUED}-{n}" for n in range(2, 1000))]
    target = next(output_dir / name for name in names if not (output_dir / name).exists())
    try:
        if whole:  # no bytes are needed for it
            for top in sorted({Path(name).parts[0] for name in whole}):
                if not (temporary / top).exists():
                    os.replace(output_dir / top, temporary / top)
            temporary.replace(target)
            return target
        adapter = temporary / "adapter"
        if all((adapter / name).is_file() for name in (CONFIG, WEIGHTS, "tokenizer_config.json")):
            adapter.replace(target)  # no bytes are needed for it
            return target
        if not write or _sharded(trainer):
            return None
        target.mkdir(parents=True)
        _write_weights(trainer.model, target)
    except Exception as error:
        logger.warning(f"The trained weights could not be kept either: {_in_a_line(error)}")
        shutil.rmtree(target, ignore_errors=True)
        return None
    with contextlib.suppress(Exception):  # the model's own folder has it too
        trainer.processing_class.save_pretrained(target)
    return target


def _write_weights(model: torch.nn.Module, folder: Path) -> None:
    """Weights by safetensors and the config as it is, without any of the checks that `save_pretrained` makes."""
    if isinstance(model, PeftModel):
        tensors, name = get_peft_model_state_dict(model), WEIGHTS
        model.active_peft_config.save_pretrained(folder)
    else:
        tensors, name = model.state_dict(), "model.safetensors"
        config = model.config.to_dict() | {"architectures": [type(model).__name__]}
        (folder / "config.json").write_text(json.dumps(config, indent=2, default=str))
    copies = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    save_file(copies, folder / name, metadata={"format": "pt"})
    sync_files(folder)


def check_push(args: TrainingArguments) -> None:
    """Before any work: what `push_final` will need is there.

    Raises:
        DataError: a strategy that uploads checkpoints, or a repository that cannot be made or reached
    """
    if not args.push_to_hub:
        return
    if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        raise DataError(
            f"hub_strategy = {args.hub_strategy.value!r}: the finished model alone is uploaded, once, at the end. "
            "Leave it out, and upload checkpoints by `hf upload REPO output_dir/checkpoint-N`"
        )
    args.hub_strategy = HubStrategy.END
    if not args.should_save:
        return
    name = args.hub_model_id or Path(args.output_dir).absolute().name
    try:
        hf_api().create_repo(name, token=args.hub_token, private=args.hub_private_repo, exist_ok=True)
    except Exception as error:  # of many kinds: no network, no token, no right to it
        raise DataError(
            f"push_to_hub: the repository {name!r} cannot be made or reached ({_in_a_line(error)}). Log in "
            "with `hf auth login`, or leave push_to_hub out and upload the folder afterwards"
        ) from error


def push_final(trainer: Trainer, saved: Saved) -> None:
    """Upload the finished model, its model card and the run's record; no checkpoint, no rollout, no arguments of ours.

    Raises:
        WriteError: it failed; the folder is whole, and the message has the command to upload it by hand
    """
    if not trainer.is_world_process_zero():
        return
    output_dir, repository = Path(trainer.args.output_dir), trainer.hub_model_id
    try:
        trainer.create_model_card(model_name=repository.split("/")[-1])
        records = [str(path.relative_to(output_dir)) for pattern in RECORDS for path in output_dir.glob(pattern)]
        hf_api().upload_folder(
            repo_id=repository,
            folder_path=str(output_dir),
            allow_patterns=sorted({*saved.files, *records} - {"training_args.bin", "adapter/training_args.bin"}),
            commit_message="End of training",
            token=trainer.args.hub_token,
            revision=trainer.args.hub_revision,
        )
    except Exception as error:
        by_hand = f'hf upload {repository} {output_dir} . --exclude "checkpoint-*/**" --exclude "*.bin"'
        raise WriteError(f"{_in_a_line(error)}; upload it by hand: {by_hand}") from error


def evaluate_saved(trainer: Trainer, saved: Saved) -> None:
    if not saved.in_memory:
        raise DataError("the attempt to merge the adapter has used up the model in memory")
    trainer.evaluate()


def finish(trainer: Trainer, saved: Saved, extras: "Extras") -> None:
    """Upload what is to be uploaded, close trackers and process group, and raise what failed since the model is saved.

    Raises:
        WriteError: see `Extras`
    """
    if trainer.args.push_to_hub:
        with extras("the upload"):
            push_final(trainer, saved)
    if hasattr(trainer, "end"):  # transformers >= 5.18
        with extras("closing the trackers"):
            trainer.end()
    extras.close()


class Extras:
    """What follows once the model is saved: each is tried, and what failed is raised at the end, in one line."""

    def __init__(self, output_dir: str | os.PathLike, alone: bool):
        self._output_dir, self._alone = output_dir, alone
        self._failed: list[tuple[str, Exception]] = []

    @contextlib.contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        """`what` is the sentence's subject: "the evaluation"."""
        try:
            yield
        except Exception as error:
            self._failed.append((what, error))
            if not self._alone:  # other processes wait in the same step: this one has to end
                self.close()

    def close(self) -> None:
        """
        Raises:
            WriteError: something failed; it says what, and that the model is there
        """
        if not self._failed:
            return
        said = "; ".join(f"{what} failed ({_in_a_line(error)})" for what, error in self._failed)
        raise WriteError(f"The trained model is whole in {self._output_dir}, but {said}") from self._failed[0][1]


# ---------------------------------------------------------------------------------------------------------------------
# The folder


# What an earlier run may have left in the folder, and transformers would load beside or instead of the new files.
STALE = ("model*.safetensors", "model.safetensors.index.json", CONFIG, "adapter_model*", "adapter", run_identity.RECORD)


def _move_in(source: Path, target: Path) -> None:
    """Replace the model in `target` by the one in `source`.

    The old config goes first and the new one comes last, and without a config a folder is no model: a kill in between
    leaves no mixture of two models that would load.
    """
    sync_files(source)
    for path in (target / "config.json", *(path for pattern in STALE for path in target.glob(pattern))):
        _remove(path)
    for path in sorted(source.iterdir(), key=lambda path: path.name in ("config.json", CONFIG)):
        _remove(target / path.name)
        os.replace(path, target / path.name)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
