"""SpikeLoRA: low-rank adaptation gated by trainable spiking neurons, as a method of Hugging Face PEFT.

Importing the package registers the method with PEFT. Then `get_peft_model`, `PeftModel.from_pretrained` and the
trainers of transformers and TRL take a `SpikeLoraConfig` like any other configuration.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

# First, because it checks the versions of what the others import.
from spikelora.peft import versions as _versions  # noqa: F401  # isort: skip
from spikelora.errors import SpikeLoraError
from spikelora.peft.adapter_files import card_sections
from spikelora.peft.config import SpikeLoraConfig
from spikelora.peft.registration import register
from spikelora.peft.trainers import guard_trainers
from spikelora.peft.tuner import SpikeLoraModel
from spikelora.sparsity.meter import ModuleSparsity, Sparsity, SparsityMeter, SparsityReport

if TYPE_CHECKING:
    from spikelora.conversion.lora import LoraApproximation, from_lora, to_lora
    from spikelora.conversion.pruning import prune_ranks
    from spikelora.sparsity.account import Ledger, operations
    from spikelora.sparsity.calibration import calibrate_thresholds
    from spikelora.sparsity.holding import SparsityControlCallback
    from spikelora.sparsity.watching import SparsityCallback

__all__ = [
    "Ledger",
    "LoraApproximation",
    "ModuleSparsity",
    "Sparsity",
    "SparsityCallback",
    "SparsityControlCallback",
    "SparsityMeter",
    "SparsityReport",
    "SpikeLoraConfig",
    "SpikeLoraError",
    "SpikeLoraModel",
    "calibrate_thresholds",
    "from_lora",
    "operations",
    "prune_ranks",
    "to_lora",
]
__version__ = "0.1.0"

register()
guard_trainers()


# Imported when first asked for: training and loading need none of them. The callbacks bring transformers' Trainer,
# which takes longer to import than all the rest.
_LATER = {
    "Ledger": "sparsity.account",
    "LoraApproximation": "conversion.lora",
    "SparsityCallback": "sparsity.watching",
    "SparsityControlCallback": "sparsity.holding",
    "calibrate_thresholds": "sparsity.calibration",
    "from_lora": "conversion.lora",
    "operations": "sparsity.account",
    "prune_ranks": "conversion.pruning",
    "to_lora": "conversion.lora",
}


def _sparsity_section(folder: Path) -> str:
    from spikelora.report.card import sparsity_section

    return sparsity_section(folder)


card_sections.append(_sparsity_section)

if not TYPE_CHECKING:  # a type checker that saw it would accept every name

    def __getattr__(name: str) -> Any:
        if name not in _LATER:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
