"""The folder of a run of `spikelora_finetuning.py`: its checkpoints, and what an earlier run has left in it."""

import shutil
import sys
from pathlib import Path

from options import Options
from spikelora import SpikeLoraConfig

# As they are moved into place; the last makes the adapter loadable.
ADAPTER_FILES = ("sparsity.json", "sparsity.png", "adapter_model.safetensors", "README.md", "adapter_config.json")


def last_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that was written completely; the Trainer writes its state last."""
    complete = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def prepare_folder(folder: Path, options: Options, now: SpikeLoraConfig) -> Path | None:
    """Make the output folder; return the checkpoint to go on from, which has to be of a run with the adapter `now`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink(missing_ok=True)
    except OSError as error:
        sys.exit(f"--output_dir {folder} cannot be written: {error}")
    found = last_checkpoint(folder)
    if options.resume_from_checkpoint is None:
        if found and not (folder / "metrics.json").exists():
            sys.exit(
                f"{folder} holds checkpoints of a run that did not end: go on with --resume_from_checkpoint, or choose "
                "another --output_dir"
            )
        return None
    if options.resume_from_checkpoint.lower() not in ("last", "true"):
        found = Path(options.resume_from_checkpoint)
        if not (found / "trainer_state.json").exists():
            sys.exit(f"--resume_from_checkpoint {found} is not a checkpoint of a run: it has no trainer_state.json")
    if found is None:
        print(f"{folder} has no checkpoint yet: starting from the beginning")
        return None
    begun = SpikeLoraConfig.from_pretrained(found)
    for name in ("r", "lora_alpha", "lora_dropout", "use_rslora", *SpikeLoraConfig.__annotations__):
        if getattr(begun, name) != getattr(now, name):
            sys.exit(
                f"{found} was trained with {name} {getattr(begun, name)}, not {getattr(now, name)}: go on with the "
                "same flags, or begin anew in another --output_dir"
            )
    return found


def clear_results(folder: Path) -> None:
    """Remove the results of a finished run, beginning with the file that makes its adapter loadable."""
    if not (folder / "metrics.json").exists():
        return
    for name in (*ADAPTER_FILES[::-1], "trainer_state.json"):
        (folder / name).unlink(missing_ok=True)
    for checkpoint in (*folder.glob("checkpoint-*"), *folder.glob("lora/checkpoint-*")):
        shutil.rmtree(checkpoint)
    (folder / "metrics.json").unlink()
