"""Code that finds its device by itself, on a device other than the CPU: a GPU, or a stand-in for one."""

import pytest
import torch
from conftest import tiny_opt
from peft import LoraConfig, PeftModel, get_peft_model

from spikelora import SpikeLoraConfig

OPTIONS = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def adapter_devices(model, adapter_name):
    return {p.device.type for name, p in model.named_parameters() if f".{adapter_name}." in name}


@pytest.mark.compatibility("Many adapters", "`low_cpu_mem_usage`")
@pytest.mark.parametrize("config", [LoraConfig(**OPTIONS), SpikeLoraConfig(**OPTIONS)], ids=["LoRA", "SpikeLoRA"])
@pytest.mark.parametrize("base_on", ["cpu", "device"])
def test_what_is_loaded_goes_to_the_base(config, base_on, device, tmp_path):
    """PEFT loads a file to the device that it finds, which need not be the base's."""
    get_peft_model(tiny_opt(), config).save_pretrained(tmp_path)
    base = tiny_opt().to(base_on if base_on == "cpu" else device)
    model = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=True)
    model.load_adapter(tmp_path, "second", low_cpu_mem_usage=True)
    assert adapter_devices(model, "default") == adapter_devices(model, "second") == {base.device.type}
    model.set_adapter("second")
    tokens = torch.arange(3, 31).view(2, 14).to(base.device)
    assert model(tokens).logits.isfinite().all()


@pytest.mark.parametrize("config", [LoraConfig(**OPTIONS), SpikeLoraConfig(**OPTIONS)], ids=["LoRA", "SpikeLoRA"])
def test_beside_an_adapter_on_the_meta_device_nothing_moves(config, device, tmp_path):
    """PEFT's mover leaves all adapters of a layer where one of them has no values yet; ours are left as LoRA's are."""
    get_peft_model(tiny_opt(), config).save_pretrained(tmp_path)
    model = get_peft_model(tiny_opt(), config, low_cpu_mem_usage=True)
    model.load_adapter(tmp_path, "second", low_cpu_mem_usage=True)
    assert adapter_devices(model, "default") == {"meta"}
    assert adapter_devices(model, "second") == {device.type}
