"""What a saved adapter has to hold, so that nothing loads but the adapter that was trained; and what its card says."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from huggingface_hub import ModelCard
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from spikelora.errors import SpikeLoraError
from spikelora.gate import MIN_TAU

_REMEDY = "Load the adapter that training saved."
# The names of A in a file, and those of the B that goes with it; a parameter of an embedding has no `weight`.
_UP = {".lora_A.weight": ".lora_B.weight", ".lora_embedding_A": ".lora_embedding_B"}

_CARD_HEADING = "## SpikeLoRA"
_CARD_TEXT = f"""{_CARD_HEADING}

This adapter is spiking (`peft_type: SPIKELORA`): its low-rank activations pass through the gate of a leaky
integrate-and-fire neuron. Install `spikelora` and import it before loading; without the import, loading ends in
`KeyError: 'SPIKELORA'`.

```python
import spikelora  # registers the method with PEFT
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/to/this/adapter")
```
"""


def check_weights(folder: Path, needed: bool) -> dict[str, Tensor]:
    """The weights in a local adapter folder, none where there is no file and none is needed.

    Raises:
        SpikeLoraError: where they are missing, damaged or incomplete.
    """
    readers = {
        SAFETENSORS_WEIGHTS_NAME: load_file,
        WEIGHTS_NAME: lambda path: torch.load(path, map_location="cpu", weights_only=True),
    }
    for name, read in readers.items():
        if (folder / name).exists():
            try:
                tensors = read(folder / name)
            except (SafetensorError, UnpicklingError, OSError, RuntimeError, EOFError) as error:
                raise SpikeLoraError(f"{folder / name} is damaged ({error}); copy or save it again.") from error
            check_tensors(tensors)
            return tensors
    if needed:
        raise SpikeLoraError(
            f"{folder} holds the configuration of a saved adapter but neither {SAFETENSORS_WEIGHTS_NAME} nor "
            f"{WEIGHTS_NAME}; copy the whole folder."
        )
    return {}


def check_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Raise a `SpikeLoraError` unless every module in the file is whole: A, B and a neuron in range.

    Args:
        tensors: by their names in the file, which are without the adapter's name, such as `fc1.lora_gate.tau`.
    """
    modules = low_rank_names(tensors)
    if not modules:
        raise SpikeLoraError(f"The adapter's file has no `lora_A` at all. {_REMEDY}")
    for module, (_, up) in modules.items():
        for part in (up, f"{module}.lora_gate.v_threshold", f"{module}.lora_gate.tau"):
            if part not in tensors:
                raise SpikeLoraError(
                    f"The adapter's file has no `{part.removeprefix(f'{module}.')}` for `{module}`: it was not saved "
                    f"by SpikeLoRA, or is damaged. {_REMEDY}"
                )
        for symbol, lowest in (("v_threshold", -torch.inf), ("tau", MIN_TAU)):
            value = tensors[f"{module}.lora_gate.{symbol}"]
            if value.shape != (1,) or not torch.isfinite(value).all() or value.float() < lowest:
                raise SpikeLoraError(
                    f"`{symbol}` of `{module}` in the adapter's file is {value.tolist()}; a threshold is one finite "
                    f"number and tau is one above 1. {_REMEDY}"
                )


def low_rank_names(tensors: Iterable[str]) -> dict[str, tuple[str, str]]:
    """The names of A and B in an adapter's file by their modules; B may be missing."""
    return {
        name.removesuffix(down): (name, name.removesuffix(down) + up)
        for name in tensors
        for down, up in _UP.items()
        if name.endswith(down)
    }


def say_how_to_load(folder: Path) -> None:
    """Add to the model card in the folder, where there is one, what to install and import."""
    card_file = folder / "README.md"
    if not card_file.exists():
        return
    card = ModelCard.load(card_file)
    card.data["tags"] = sorted({*(card.data.get("tags") or []), "lora", "spikelora"})
    if _CARD_HEADING not in card.text:
        card.text = f"{card.text.rstrip()}\n\n{_CARD_TEXT}"
    card.save(card_file)
