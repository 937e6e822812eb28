"""SpikeLoRA: low-rank adaptation gated by trainable spiking neurons, as a method of Hugging Face PEFT.

Importing the package registers the method with PEFT, so that `get_peft_model`, `PeftModel.from_pretrained` and the
trainers of transformers and TRL take a `SpikeLoraConfig` like any other configuration.
"""

from typing import TYPE_CHECKING, Any

from spikelora._registration import register
from spikelora.account import Ledger, operations
from spikelora.adapt import calibrate_thresholds, prune_ranks
from spikelora.config import SpikeLoraConfig
from spikelora.convert import LoraApproximation, from_lora, to_lora
from spikelora.errors import SpikeLoraError
from spikelora.sparsity import ModuleSparsity, Sparsity, SparsityMeter, SparsityReport
from spikelora.tuner import SpikeLoraModel

if TYPE_CHECKING:
    from spikelora.callbacks import SparsityCallback, SparsityControlCallback

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


def __getattr__(name: str) -> Any:
    # When first asked for: they bring transformers' Trainer, which takes longer to import than all the rest.
    if name in ("SparsityCallback", "SparsityControlCallback"):
        from spikelora import callbacks

        return getattr(callbacks, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
