"""A spiking adapter in a UNet of diffusers: `make tools`."""

import warnings

import pytest
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from spikelora import SpikeLoraConfig, SpikeLoraError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("diffusers")
    from diffusers import UNet2DConditionModel

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
CONFIG = {"v_threshold": 0.1, "r": 4, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}
BLOCKS = {
    "sample_size": 8,
    "block_out_channels": (8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}


def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        in_channels=3,
        out_channels=3,
        cross_attention_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **BLOCKS,
    ).eval()


def run(model):
    generator = torch.Generator().manual_seed(1)
    sample, text = torch.randn(2, 3, 8, 8, generator=generator), torch.randn(2, 5, 8, generator=generator)
    with torch.no_grad():
        return model(sample, timestep=3, encoder_hidden_states=text).sample


@pytest.fixture
def trained():
    """A small UNet with a spiking adapter after a few steps of training."""
    model = unet()
    model.requires_grad_(False)
    model.add_adapter(SpikeLoraConfig(**CONFIG))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-1)
    sample, text = torch.randn(2, 3, 8, 8), torch.randn(2, 5, 8)
    losses = []
    for _ in range(6):
        loss = model(sample, timestep=3, encoder_hidden_states=text).sample.square().mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    return model


def test_add_train_save_load(trained, tmp_path):
    config = trained.peft_config["default"]
    config.save_pretrained(tmp_path)
    save_file(get_peft_model_state_dict(trained), tmp_path / "adapter_model.safetensors")

    loaded = unet()
    assert not torch.allclose(run(loaded), run(trained), atol=1e-4)
    loaded.add_adapter(SpikeLoraConfig.from_pretrained(tmp_path))
    set_peft_model_state_dict(loaded, load_file(tmp_path / "adapter_model.safetensors"))

    assert torch.equal(run(loaded), run(trained))
    loaded.disable_adapters()
    assert torch.equal(run(loaded), run(unet()))


def test_what_would_make_it_lora_is_refused(trained, tmp_path):
    trained.save_lora_adapter(tmp_path)
    # With the metadata that diffusers writes, its LoraConfig is refused by PEFT.
    with pytest.raises(TypeError, match="`LoraConfig` class could not be instantiated"):
        unet().load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    # Without it diffusers makes a LoRA of the shapes of A and B.
    save_file(load_file(tmp_path / "pytorch_lora_weights.safetensors"), tmp_path / "bare.safetensors")
    fresh = unet()
    with pytest.raises(SpikeLoraError, match="it would run without its gates"):
        fresh.load_lora_adapter(tmp_path, prefix=None, weight_name="bare.safetensors")
    with pytest.raises(SpikeLoraError, match="cannot be merged"):
        trained.fuse_lora()
