"""What a folder holds of an adapter, read from its files without the base model."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from peft import LoraConfig, PeftConfig, PeftType
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from torch import Tensor

from spikelora.errors import SpikeLoraError
from spikelora.peft.adapter_files import check_weights, low_rank_names, read_weights, refuse_pickle
from spikelora.peft.config import SpikeLoraConfig

PREFIX = "base_model.model."


@dataclass(frozen=True)
class AdaptedModule:
    """One adapted module as its tensors are in the file.

    Attributes:
        name: its name in the model that was adapted.
        r: rank, the rows of `lora_A`.
        scaling: `lora_alpha / r`, or `lora_alpha / sqrt(r)` with rsLoRA.
        v_threshold: firing threshold, in the units of `a / tau`; NaN in a LoRA.
        tau: membrane time constant; NaN in a LoRA.
        norm_A: Frobenius norm of `lora_A.weight`.
        norm_B: Frobenius norm of `lora_B.weight`, in which scaling is not included.
    """

    name: str
    r: int
    scaling: float
    v_threshold: float
    tau: float
    norm_A: float
    norm_B: float

    @property
    def is_untrained(self) -> bool:
        """Whether B is all 0, as it starts."""
        return self.norm_B == 0


@dataclass(frozen=True)
class Adapter:
    """A sound adapter.

    Attributes:
        folder: its folder.
        config: its configuration; a `SpikeLoraConfig`, or that of a LoRA next to which a run is shown.
        modules: in the order of their layers.
        parameters: count of the numbers in its tensors, modules saved whole among them.
        n_bytes: size of the file of its tensors.
        dtypes: names of the dtypes of A and B.
    """

    folder: Path
    config: LoraConfig
    modules: list[AdaptedModule]
    parameters: int
    n_bytes: int
    dtypes: list[str]


def read_adapter(folder: Path, spiking: bool = True) -> Adapter:
    """Read an adapter and check all of it.

    Args:
        folder: where it lies.
        spiking: whether it has to be a spiking one; else it may be a LoRA, which has no gates.

    Raises:
        SpikeLoraError: if it is of another method, damaged or incomplete, with the file, field or module and the
            remedy.
    """
    config: PeftConfig = SpikeLoraConfig.from_pretrained(folder) if spiking else PeftConfig.from_pretrained(folder)
    if isinstance(config, SpikeLoraConfig):
        tensors = check_weights(folder, needed=True)
    elif isinstance(config, LoraConfig):
        refuse_pickle(folder)
        tensors = read_weights(folder / SAFETENSORS_WEIGHTS_NAME)
    else:
        found = PeftType(config.peft_type).value
        raise SpikeLoraError(
            f"{folder} holds a {found} adapter, which is neither SpikeLoRA nor LoRA. Give the folder of either."
        )
    names = low_rank_names(tensors)
    if not names or any(up not in tensors for _, up in names.values()):
        raise SpikeLoraError(f"The adapter's file in {folder} lacks `lora_A` or `lora_B`. Copy or save it again.")
    modules = [_module(*item, tensors, config) for item in names.items()]
    modules.sort(key=lambda module: natural(module.name))
    low_rank = [tensors[name] for pair in names.values() for name in pair]
    return Adapter(
        folder=folder,
        config=config,
        modules=modules,
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        n_bytes=(folder / SAFETENSORS_WEIGHTS_NAME).stat().st_size,
        dtypes=sorted({str(tensor.dtype).removeprefix("torch.") for tensor in low_rank}),
    )


def _module(name: str, low_rank: tuple[str, str], tensors: Mapping[str, Tensor], config: LoraConfig) -> AdaptedModule:
    module = name.removeprefix(PREFIX)
    a, b = (tensors[part].float() for part in low_rank)
    r = a.shape[0]
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, module), config.lora_alpha)
    v_threshold, tau = (tensors.get(f"{name}.lora_gate.{symbol}") for symbol in ("v_threshold", "tau"))
    return AdaptedModule(
        name=module,
        r=r,
        scaling=alpha / (math.sqrt(r) if config.use_rslora else r),
        v_threshold=math.nan if v_threshold is None else v_threshold.item(),
        tau=math.nan if tau is None else tau.item(),
        norm_A=a.norm().item(),
        norm_B=b.norm().item(),
    )


def natural(name: str) -> list[tuple[bool, int, str]]:
    """A key for names of modules that sorts `layers.10` after `layers.9`."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]
