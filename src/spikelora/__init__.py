"""SpikeLoRA: low-rank adaptation gated by trainable spiking neurons, as a method of Hugging Face PEFT.

Importing the package registers the method with PEFT, so that `get_peft_model`, `PeftModel.from_pretrained` and the
trainers of transformers and TRL take a `SpikeLoraConfig` like any other configuration.
"""

import importlib
from typing import TYPE_CHECKING, Any

from spikelora import _versions as _versions  # the first, as it looks at the versions of what the others import
from spikelora._registration import register
from spikelora.config import SpikeLoraConfig
from spikelora.errors import SpikeLoraError
from spikelora.integrations import guard_trainers
from spikelora.sparsity import ModuleSparsity, Sparsity, SparsityMeter, SparsityReport
from spikelora.tuner import SpikeLoraModel

if TYPE_CHECKING:
    from spikelora.account import Ledger, operations
    from spikelora.adapt import calibrate_thresholds, prune_ranks
    from spikelora.convert import LoraApproximation, from_lora, to_lora
    from spikelora.holding import SparsityControlCallback
    from spikelora.watching import SparsityCallback

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


# Imported when first asked for: training and loading need none of them, and the callbacks bring transformers' Trainer,
# which takes longer to import than all the rest.
_LATER = {
    "Ledger": "account",
    "LoraApproximation": "convert",
    "SparsityCallback": "watching",
    "SparsityControlCallback": "holding",
    "calibrate_thresholds": "adapt",
    "from_lora": "convert",
    "operations": "account",
    "prune_ranks": "adapt",
    "to_lora": "convert",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
