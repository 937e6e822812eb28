"""What a saved adapter has to hold, so that nothing loads but the adapter that was trained; and what its card says."""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import ModelCard
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from spikelora.errors import SpikeLoraError
from spikelora.gate import MIN_TAU

_REMEDY = "Load the adapter that training saved."
NEURON = "lora_gate."
# What a module has in the file, after its name and a dot.
_LINEAR = ("lora_A.weight", "lora_B.weight")
_NEURONS = (NEURON + "v_threshold", NEURON + "tau")

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
        SpikeLoraError: where they are missing, damaged or incomplete, or where there are any as a pickle.
    """
    refuse_pickle(folder)
    file = folder / SAFETENSORS_WEIGHTS_NAME
    if file.exists():
        tensors = _read(file)
        check_tensors(tensors)
        return tensors
    if needed:
        raise SpikeLoraError(
            f"{folder} holds the configuration of a saved adapter but no {SAFETENSORS_WEIGHTS_NAME}; copy the whole "
            "folder."
        )
    return {}


def refuse_pickle(folder: Path) -> None:
    """Raise a `SpikeLoraError` where the weights in a folder are a pickle too, which a loader may choose."""
    if (folder / WEIGHTS_NAME).exists():
        raise SpikeLoraError(
            f"{folder / WEIGHTS_NAME} is a pickle, which SpikeLoRA never loads: delete it, and where it is all there "
            f"is, save the adapter again as {SAFETENSORS_WEIGHTS_NAME}, which PEFT does unless `safe_serialization` is "
            "False."
        )


def holds_gates(folder: Path) -> bool:
    """Whether the weights in a local folder are of a spiking adapter, going by their names; not where unreadable."""
    try:
        with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, framework="pt") as file:
            return any(".lora_gate." in name for name in file.keys())  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError):
        return False


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError, AttributeError) as error:
        raise SpikeLoraError(f"{file} is damaged ({error}); copy or save it again.") from error


def check_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Raise a `SpikeLoraError` unless every module in the file is whole: A and B of one rank, a neuron in range.

    Args:
        tensors: by their names in the file, which are without the adapter's name, such as `fc1.lora_gate.tau`.
    """
    modules: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        if NEURON not in name and tensor.is_floating_point() and not tensor.isfinite().all():
            raise SpikeLoraError(f"`{name}` in the adapter's file has values that are no finite numbers. {_REMEDY}")
        module, found, part = name.rpartition(".lora_")
        if found:
            modules[module]["lora_" + part] = tensor
    if not any(_LINEAR[0] in parts for parts in modules.values()):
        raise SpikeLoraError(f"The adapter's file has no `lora_A` at all. {_REMEDY}")
    for module, parts in modules.items():
        _check_module(module, parts)


def ranks(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The rank of each module in a file, the module by its name in the model that was adapted."""
    end = "." + _LINEAR[0]
    return {
        name.removeprefix("base_model.model.").removesuffix(end): len(tensor)
        for name, tensor in tensors.items()
        if name.endswith(end)
    }


def _check_module(module: str, parts: dict[str, Tensor]) -> None:
    down, up = _LINEAR
    for part in (down, up, *_NEURONS):
        if part not in parts:
            raise SpikeLoraError(
                f"The adapter's file has no `{part}` for `{module}`: it was not saved by SpikeLoRA, or is damaged. "
                f"{_REMEDY}"
            )
    for part, tensor in parts.items():
        if part not in (down, up, *_NEURONS):
            raise SpikeLoraError(
                f"The adapter's file has a `{part}` for `{module}`, which SpikeLoRA does not know. {_REMEDY}"
            )
        if not tensor.is_floating_point():
            raise SpikeLoraError(f"`{part}` of `{module}` in the adapter's file is in {tensor.dtype}. {_REMEDY}")
    shapes = tuple(parts[down].shape), tuple(parts[up].shape)
    if len(shapes[0]) < 2 or len(shapes[0]) != len(shapes[1]) or shapes[0][0] != shapes[1][1]:
        raise SpikeLoraError(
            f"`{down}` and `{up}` of `{module}` in the adapter's file have the shapes {shapes[0]} and {shapes[1]}, "
            f"which are not of one rank. {_REMEDY}"
        )
    for part, lowest in zip(_NEURONS, (-torch.inf, MIN_TAU), strict=True):
        value = parts[part]
        if value.shape != (1,) or not torch.isfinite(value).all() or value.float() < lowest:
            raise SpikeLoraError(
                f"`{part.removeprefix(NEURON)}` of `{module}` in the adapter's file is {value.tolist()}; a threshold is "
                f"one finite number and tau is one above 1. {_REMEDY}"
            )


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
