"""What the tests of other people's programs share: an environment with autoload, and the example's small model."""

from pathlib import Path

import pytest
import torch
from environment import Environment
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from spikelora import SpikeLoraConfig

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="session")
def examples():
    return EXAMPLES


@pytest.fixture(scope="session")
def base():
    """The folder of the example's small language model."""
    return EXAMPLES / "spikelora_finetuning" / "model"


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    environment = Environment(tmp_path_factory.mktemp("environment") / "with_autoload")
    environment.autoload("on")
    return environment


@pytest.fixture(scope="session")
def adapter(tmp_path_factory, base):
    """A spiking adapter on the small model whose B is not 0, so that its gates matter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(model, SpikeLoraConfig(v_threshold=0.2, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder
