"""axolotl with SpikeLoRA: a plugin that brings `adapter: spikelora`, with the neuron's fields in a block `spikelora`.

    PYTHONPATH=examples/tools axolotl train run.yaml

with `plugins: [axolotl_spikelora.SpikeLoraPlugin]` in the file. `lora_r`, `lora_target_modules` and the like mean what
they mean there. Where `lora_model_dir` names a saved adapter, its own configuration counts, and so its neuron.
"""

from dataclasses import fields
from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from axolotl.loaders.adapter import load_lora
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import BaseModel

from spikelora import SparsityControlCallback, SpikeLoraConfig, SpikeLoraError

NAME = "spikelora"
KERNEL = "axolotl's kernels compute with `lora_A` and `lora_B` alone, past the gate. Leave it at false"
QUANTISED = "axolotl quantises for its own adapters alone, and would load this base as it is. Leave it at false"
SHARDED = "axolotl saves parameters alone there, and the gate's numbers are none. Train with DDP"
REFUSED = {
    "merge_lora": "a gated update is not a weight. Load the adapter, or approximate it by `spikelora.to_lora`",
    "lora_on_cpu": "it is not handed on to PEFT. Leave it out",
    **dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel"), KERNEL),
    **dict.fromkeys(("load_in_4bit", "load_in_8bit"), QUANTISED),
    **dict.fromkeys(("fsdp", "fsdp_config"), SHARDED),
}


class Arguments(BaseModel):
    spikelora: dict[str, Any] | None = None


def spiking(config: LoraConfig, neuron: dict[str, Any] | None) -> SpikeLoraConfig:
    """The configuration that axolotl has made of its keys, with a neuron."""
    shared = {known.name: getattr(config, known.name) for known in fields(LoraConfig) if known.init}
    # None is what axolotl has for a key that is not in the file, such as `lora_fan_in_fan_out`.
    shared = {name: value for name, value in shared.items() if name != "peft_type" and value is not None}
    return SpikeLoraConfig(**shared, **(neuron or {}))


class SpikeLoraPlugin(BasePlugin):
    def get_input_args(self):
        return f"{__name__}.{Arguments.__name__}"

    def get_adapter_capabilities(self):
        return [AdapterCapabilities(name=NAME)]

    def register(self, cfg):
        if cfg.adapter != NAME:
            if cfg.spikelora:
                raise SpikeLoraError(
                    f"The block `{NAME}` has a neuron, and `adapter: {cfg.adapter}` has none. Set `adapter: {NAME}`, "
                    "or leave the block out."
                )
            return
        for name, reason in REFUSED.items():
            if cfg[name]:
                raise SpikeLoraError(f"`{name}` cannot be combined with `adapter: {NAME}`: {reason}.")
        spiking(LoraConfig(), cfg.spikelora)  # what is wrong in the block is said before the model is loaded

    def load_adapter(self, model, cfg, inference=False, config_only=False):
        if cfg.adapter != NAME:
            return None
        if cfg.lora_model_dir:
            config = SpikeLoraConfig.from_pretrained(cfg.lora_model_dir)
        else:
            config = spiking(load_lora(model, cfg, config_only=True)[1], cfg.spikelora)
        if config_only:
            return None, config
        dtype = cfg.peft_autocast_adapter_dtype
        options = {} if dtype is None else {"autocast_adapter_dtype": dtype}
        if cfg.lora_model_dir:
            model = PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference, **options)
        else:
            model = get_peft_model(model, config, **options)
        model.print_trainable_parameters()
        return model, config

    def add_callbacks_post_trainer(self, cfg, trainer):
        configs = getattr(trainer.model, "peft_config", {}).values()
        has_target = any(isinstance(each, SpikeLoraConfig) and each.target_sparsity is not None for each in configs)
        return [SparsityControlCallback()] if has_target else []
