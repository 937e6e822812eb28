"""SpikeLoRA: low-rank adaptation gated by trainable spiking neurons, as a method of Hugging Face PEFT.

Importing the package registers the method with PEFT, so that `get_peft_model`, `PeftModel.from_pretrained` and the
trainers of transformers and TRL take a `SpikeLoraConfig` like any other configuration.
"""

from spikelora._registration import register
from spikelora.config import SpikeLoraConfig
from spikelora.errors import SpikeLoraError
from spikelora.tuner import SpikeLoraModel

__all__ = ["SpikeLoraConfig", "SpikeLoraError", "SpikeLoraModel"]
__version__ = "0.1.0"

register()
