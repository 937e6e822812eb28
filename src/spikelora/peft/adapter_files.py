"""What a saved adapter must contain, so that only the adapter that was trained loads; and what its card says."""

import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from spikelora.errors import SpikeLoraError
from spikelora.method.parameters import MIN_TAU

_REMEDY = "Load the adapter that training saved."
# The names of A in a file, each with the name of its B; an embedding's parameters have no `weight`.
_UP = {".lora_A.weight": ".lora_B.weight", ".lora_embedding_A": ".lora_embedding_B"}
# A base model may have its own modules whose names begin like that.
_OWN = re.compile(r"\.lora_(A|B|embedding_A|embedding_B|gate|magnitude_vector)(\.|$)")
_NAMED = 3  # numbers in one warning
_NEURON = {".lora_gate.v_threshold": -torch.inf, ".lora_gate.tau": MIN_TAU}  # and their lowest values

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


# What the rooms above this one add to a card: Markdown about its folder, empty where there is nothing to say.
card_sections: list[Callable[[Path], str]] = []
_ADDED = re.compile(r"\n*<!-- spikelora: .*?<!-- spikelora: end -->", re.DOTALL)


def as_path(name: str, value: Any) -> Path:
    """The path that an argument of this name is given as; a `SpikeLoraError` where it is none."""
    try:
        return Path(value)
    except TypeError as error:
        raise SpikeLoraError(f"`{name}` must be text or a path, got {value!r}. Give an adapter's folder.") from error


def check_weights(folder: Path, needed: bool) -> dict[str, Tensor]:
    """The weights in a local adapter folder; empty if there is no file and none is needed.

    Raises:
        SpikeLoraError: if they are missing, damaged or incomplete, or if the folder has any as a pickle.
    """
    refuse_pickle(folder)
    file = folder / SAFETENSORS_WEIGHTS_NAME
    if file.exists():
        tensors = read_weights(file)
        check_tensors(tensors)
        return tensors
    if needed:
        raise SpikeLoraError(
            f"{folder} holds the configuration of a saved adapter but no {SAFETENSORS_WEIGHTS_NAME}. Copy the whole "
            "folder."
        )
    return {}


def refuse_pickle(folder: Path) -> None:
    """Raise a `SpikeLoraError` if the folder also has the weights as a pickle, which a loader may choose."""
    if (folder / WEIGHTS_NAME).exists():
        raise SpikeLoraError(
            f"{folder / WEIGHTS_NAME} is a pickle, which SpikeLoRA never loads. Delete it and, where it is all there "
            f"is, save the adapter again as {SAFETENSORS_WEIGHTS_NAME}, which PEFT does unless `safe_serialization` "
            "is False."
        )


def holds_gates(folder: Path) -> bool:
    """Whether the weights in a local folder have gates, by their names; False if they cannot be read."""
    try:
        with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, framework="pt") as file:
            return any(".lora_gate." in name for name in file.keys())  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError):
        return False


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors in a file; a `SpikeLoraError` where it cannot be read."""
    try:
        return load_file(file)
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError, AttributeError) as error:
        raise SpikeLoraError(f"{file} is damaged ({error}). Copy or save it again.") from error


def check_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Raise a `SpikeLoraError` unless every module in the file is whole: A and B of one rank, a neuron in range.

    Args:
        tensors: by their names in the file, without the adapter's name, such as `fc1.lora_gate.tau`.
    """
    modules = low_rank_names(tensors)
    if not modules:
        raise SpikeLoraError(f"The adapter's file has no `lora_A` at all. {_REMEDY}")
    known = {name + end for name in modules for end in (*_UP, *_UP.values(), *_NEURON)}
    for name, tensor in tensors.items():
        if not _OWN.search(name) and name.rpartition(".lora_")[0] not in modules:
            continue
        if name not in known:
            raise SpikeLoraError(f"The adapter's file has `{name}`, but no `lora_A` that it belongs to. {_REMEDY}")
        if not tensor.is_floating_point():
            raise SpikeLoraError(f"`{name}` in the adapter's file is in {tensor.dtype}, not a float. {_REMEDY}")
        if ".lora_gate." not in name and not tensor.isfinite().all():
            raise SpikeLoraError(
                f"`{name}` in the adapter's file holds values that are not finite numbers: it is damaged, or its "
                "training diverged. Copy it again, train with a lower learning rate, or take an earlier checkpoint."
            )
    for module, (down, up) in modules.items():
        for part in (up, *(module + symbol for symbol in _NEURON)):
            if part not in tensors:
                raise SpikeLoraError(
                    f"The adapter's file has no `{part.removeprefix(f'{module}.')}` for `{module}`: it was not saved "
                    f"by SpikeLoRA, or is damaged. {_REMEDY}"
                )
        _check_rank(module, tensors[down], tensors[up])
        for symbol, lowest in _NEURON.items():
            value = tensors[module + symbol]
            if value.shape != (1,) or not value.isfinite().all() or value.float() < lowest:
                raise SpikeLoraError(
                    f"`{symbol.removeprefix('.lora_gate.')}` of `{module}` in the adapter's file is {value.tolist()}, "
                    f"but a threshold is one finite number and tau one number above 1. {_REMEDY}"
                )
    _warn_of_rounded(tensors, modules)


def _warn_of_rounded(tensors: Mapping[str, Tensor], modules: Iterable[str]) -> None:
    """Warn of numbers in half precision, but those that it holds as they were written, such as 0.5 and 2."""
    rounded = []
    for name in (module + symbol for module in modules for symbol in _NEURON):
        tensor = tensors[name].cpu()  # on CUDA `nextafter` may lack float16
        value = tensor.item()
        if tensor.dtype not in (torch.float16, torch.bfloat16):
            continue
        # A longer decimal says nothing: in bfloat16 nearly every number is what one of three digits rounds to.
        shorter = (float(f"{value:.{digits}g}") for digits in (1, 2))
        before = next((number for number in shorter if tensor.new_tensor(number).item() == value), None)
        if before is None:
            low, high = (_halfway(tensor, end) for end in (-torch.inf, torch.inf))
            rounded.append(f"`{name}`, which is {value:.8g} and may have been anything from {low:.6g} to {high:.6g}")
        elif before != value:
            rounded.append(f"`{name}`, which is {value:.8g} and was probably {before:g}")
    if rounded:
        more = f"; and {len(rounded) - _NAMED} more" if len(rounded) > _NAMED else ""
        warnings.warn(
            f"{len(rounded)} numbers of neurons in the adapter's file were rounded to half precision, such as "
            f"{'; '.join(rounded[:_NAMED])}{more}. Load the adapter that training saved, with these numbers in "
            "float32, or calibrate its thresholds again.",
            RuntimeWarning,
            stacklevel=2,
        )


def _halfway(tensor: Tensor, end: float) -> float:
    """The last number on the way to the end that is rounded to the one in the tensor."""
    return (tensor.item() + tensor.nextafter(torch.full_like(tensor, end)).item()) / 2


def _check_rank(module: str, A: Tensor, B: Tensor) -> None:
    # A is (r, in) and B (out, r), then the kernel's dimensions in a convolution; with groups, B is in blocks.
    has_groups = A.dim() > 2 and B.dim() == A.dim() and B.shape[1] and A.shape[0] % B.shape[1] == 0
    if not has_groups and not (A.dim() == B.dim() == 2 and A.shape[0] == B.shape[1]):
        raise SpikeLoraError(
            f"A and B of `{module}` in the adapter's file have the shapes {tuple(A.shape)} and {tuple(B.shape)}, which "
            f"are not of one rank. {_REMEDY}"
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
    """Add to the model card in the folder, if there is one, what to install and import, and `card_sections`."""
    card_file = folder / "README.md"
    if not card_file.exists():
        return
    card = ModelCard.load(card_file)
    card.data["tags"] = sorted({*(card.data.get("tags") or []), "lora", "spikelora"})
    if _CARD_HEADING not in card.text:
        card.text = f"{card.text.rstrip()}\n\n{_CARD_TEXT}"
    card.text = _ADDED.sub("", card.text)  # of an earlier save
    for text in filter(None, (section(folder) for section in card_sections)):
        card.text += f"\n\n<!-- spikelora: written at each save -->\n{text}\n<!-- spikelora: end -->"
    card.save(card_file)
