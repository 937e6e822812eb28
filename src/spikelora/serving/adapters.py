"""A spiking adapter on its way into vLLM: read, checked against the served model, and refused if it does not fit."""

import json
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from safetensors.torch import load_file
from torch import Tensor
from vllm.distributed import get_pp_group
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.utils import parse_fine_tuned_lora_name

from spikelora.errors import SpikeLoraError
from spikelora.method.ops.firing import firing
from spikelora.peft.adapter_files import holds_gates, low_rank_names
from spikelora.peft.config import SpikeLoraConfig
from spikelora.serving.gate import GatedWrapper

_ELSEWHERE = "Serve it with PEFT, or serve a LoRA that `spikelora.to_lora` makes of it."
# Fields of the configuration that the gate's tensors contain themselves, or that matter only in training. Any other
# field might change the forward in a way that the served gate does not know.
_KNOWN = {"v_threshold", "tau", "learn_threshold", "learn_tau", "threshold_pattern"}
_KNOWN |= {"surrogate", "surrogate_alpha", "target_sparsity", "target_scope", "target_tolerance"}


def is_spiking(folder: Path) -> bool:
    """Whether anything in an adapter's folder says that it is spiking; False if its configuration cannot be read."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
    except (OSError, ValueError):
        return False
    if not isinstance(config, dict):
        return False
    return config.get("peft_type") == "SPIKELORA" or bool(config.get("use_spikelora")) or holds_gates(folder)


def read(folder: Path, weights_mapper: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The tensors of A and B in a spiking adapter's folder, and what stays silent, by vLLM's names of modules.

    The latter is the greatest `a` in float32 that does not fire, or NaN if all fires: see `ops/firing.py`.

    Raises:
        SpikeLoraError: if the adapter is damaged, incomplete, or of a kind that vLLM cannot gate.
    """
    config = PeftConfig.from_pretrained(folder)
    if not isinstance(config, SpikeLoraConfig):
        raise SpikeLoraError(f"{folder} holds a {config.peft_type} adapter, not a SPIKELORA one. Copy it again.")
    _refuse_unknown(config)
    config.check_folder(folder, needed=True)
    tensors = load_file(folder / "adapter_model.safetensors")
    silent = {}
    for module, (down, _) in low_rank_names(tensors).items():
        if tensors[down].dim() != 2 or ".lora_embedding_" in down:
            kind = "an embedding" if ".lora_embedding_" in down else "a convolution"
            raise SpikeLoraError(f"`{module}` is {kind}, where vLLM has no place for a gate. {_ELSEWHERE}")
        gate = f"{module}.lora_gate"
        v_threshold, tau = tensors.pop(f"{gate}.v_threshold"), tensors.pop(f"{gate}.tau")
        number = firing(torch.empty(0, dtype=torch.float32, device="cpu"), v_threshold, tau)
        assert number is not None
        silent[parse_fine_tuned_lora_name(down, weights_mapper)[0]] = number.silent
    return tensors, silent


def _refuse_unknown(config: SpikeLoraConfig) -> None:
    for field in fields(config):
        if field.name not in SpikeLoraConfig.__annotations__.keys() - _KNOWN:
            continue
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if getattr(config, field.name) != default:
            raise SpikeLoraError(
                f"`{field.name}={getattr(config, field.name)!r}` is of a gate that vLLM does not compute. {_ELSEWHERE}"
            )


def fit(manager: Any, lora: Any, silent: dict[str, float]) -> dict[str, list[float]]:
    """The numbers from `read` by modules of the served model, one for each slice of a module that the adapter has.

    Args:
        manager: vLLM's `LoRAModelManager`.
        lora: the adapter as vLLM's `LoRAModel`, its modules not yet packed together.
        silent: the number of each module of the adapter.

    Raises:
        SpikeLoraError: if a module of the adapter has no place in the model, or a place without a gate.
    """
    _refuse_setting(manager)
    slices, placed = {}, set()
    for name, layer in manager.modules.items():
        # Several modules of the adapter, such as q, k and v, may be packed into one layer here.
        parts = [manager._get_lora_layer_weights(lora, part) for part in manager.packed_modules.get(name, [name])]
        if not any(parts):
            continue
        placed |= {part.module_name for part in parts if part}
        if not isinstance(layer, BaseLinearLayerWithLoRA) or not isinstance(layer.punica_wrapper, GatedWrapper):
            raise SpikeLoraError(f"`{name}` is a {type(layer).__name__} in vLLM, which has no gate. {_ELSEWHERE}")
        _check_shapes(name, layer, parts)
        numbers = [silent[part.module_name] if part else float("nan") for part in parts]
        slices[name] = numbers * layer.n_slices if len(numbers) == 1 else numbers
        if len(slices[name]) != layer.n_slices:
            raise SpikeLoraError(
                f"`{name}` has {layer.n_slices} slices in vLLM for {len(numbers)} modules of the adapter. {_ELSEWHERE}"
            )
    if lost := sorted(lora.loras.keys() - placed):
        raise SpikeLoraError(
            f"The served model has no layer that takes an adapter for {', '.join(f'`{name}`' for name in lost)}. "
            "Serve the base model that the adapter was trained on, and leave `--lora-target-modules` out."
        )
    return slices


def _refuse_setting(manager: Any) -> None:
    if manager.lora_config.fully_sharded_loras:
        raise SpikeLoraError(
            "`--fully-sharded-loras` splits the activations, and a gate needs them whole. Start vLLM without it."
        )
    if get_pp_group().world_size > 1:
        raise SpikeLoraError(
            "Spiking adapters were not tried with `--pipeline-parallel-size` above 1. Use `--tensor-parallel-size`."
        )
    for wrapper in manager.punica_wrapper_mapping.values():
        if not type(wrapper).__module__.startswith("vllm.lora.punica_wrapper."):
            raise SpikeLoraError(
                f"LoRA is computed by {type(wrapper).__name__} of another plugin, which may skip the gate. Start "
                "vLLM without that plugin."
            )


def _check_shapes(name: str, layer: Any, parts: list[Any]) -> None:
    base = layer.base_layer
    if hasattr(base, "total_num_kv_heads"):  # of q, k and v; `output_sizes` counts duplicated keys twice
        sizes = [n * base.head_size for n in (base.total_num_heads, base.total_num_kv_heads, base.total_num_kv_heads)]
    else:
        sizes = list(getattr(base, "output_sizes", [base.output_size]))
    if len(parts) == 1:
        sizes = [sum(sizes)]
    for part, size in zip(parts, sizes, strict=False):
        if part and (part.lora_a.shape[1], part.lora_b.shape[0]) != (base.input_size, size):
            raise SpikeLoraError(
                f"`{part.module_name}` goes from {part.lora_a.shape[1]} to {part.lora_b.shape[0]} features in the "
                f"adapter and from {base.input_size} to {size} in the served model. Serve the "
                "base model that it was trained on."
            )
