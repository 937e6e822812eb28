"""The gate in vLLM's wrapper by itself, and what is refused by the setting of the server."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from vllm.lora.layers import BaseLayerWithLoRA, RowParallelLinearWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.lora.worker_manager import WorkerLoRAManager
from vllm.platforms import current_platform

from spikelora import SpikeLoraConfig, SpikeLoraError
from spikelora.method.neuron import spike_gate
from spikelora.method.ops.firing import firing
from spikelora.serving import adapters, gate, plugin
from spikelora.serving.changes import change_vllm
from spikelora.serving.gate import GatedWrapper

SLOTS, SLICES, RANK, FEATURES = 3, 2, 8, 16


@pytest.fixture
def wrapped():
    """A wrapper of vLLM with three slots of random adapters, and a gate before its expand."""
    torch.manual_seed(0)
    wrapper = PunicaWrapperCPU(64, 8, "cpu")
    layer = SimpleNamespace(
        lora_a_stacked=tuple(torch.randn(SLOTS, 1, RANK, FEATURES) for _ in range(SLICES)),
        lora_b_stacked=tuple(torch.randn(SLOTS, 1, FEATURES, RANK) for _ in range(SLICES)),
        tp_size=1,
        tp_rank=0,
    )
    return layer, wrapper, GatedWrapper(wrapper, layer)


def compute(layer, wrapper, kernels, slots, x):
    slots = torch.tensor(slots)
    wrapper._token_lora_indices[: len(slots)] = slots
    wrapper.indices_len[0] = len(slots)
    wrapper.is_prefill = True
    wrapper._update_prefill_metadata(slots)
    y = torch.zeros(len(slots), SLICES * FEATURES)
    kernels.add_lora_linear(y, x, layer.lora_a_stacked, layer.lora_b_stacked, 1.0, (FEATURES,) * SLICES)
    return y


def silent(v_threshold, tau):
    return firing(torch.empty(0), torch.tensor([v_threshold]), torch.tensor([tau])).silent


def test_each_token_has_the_thresholds_of_its_adapter_and_its_slice(wrapped):
    layer, wrapper, gated = wrapped
    neurons = {0: [(0.7, 2.0), (-0.4, 1.3)], 2: [(1.1, 3.0), (0.0, 2.0)]}
    for slot, pairs in neurons.items():
        gated.set_slot(slot, [silent(*pair) for pair in pairs])
    slots = [0, 0, 2, -1, 1, 2, 0, 1]
    x = torch.randn(len(slots), FEATURES)

    y = compute(layer, wrapper, gated, slots, x)

    for token, slot in enumerate(slots):
        for part in range(SLICES):
            a = layer.lora_a_stacked[part][slot, 0] @ x[token]
            if slot in neurons:
                a = spike_gate(a, *neurons[slot][part], 2.0)
            expected = torch.zeros(FEATURES) if slot == -1 else layer.lora_b_stacked[part][slot, 0] @ a
            torch.testing.assert_close(y[token].chunk(SLICES)[part], expected, rtol=1e-5, atol=1e-5)


def test_without_a_spiking_adapter_all_is_as_in_vllm(wrapped):
    layer, wrapper, gated = wrapped
    gated.set_slot(0, [0.5, 0.5])
    gated.set_slot(0, None)
    slots, x = [0, 1, 2, 2], torch.randn(4, FEATURES)
    x[1] = torch.inf

    expected = compute(layer, wrapper, wrapper, slots, x)
    torch.testing.assert_close(compute(layer, wrapper, gated, slots, x), expected, rtol=0, atol=0, equal_nan=True)
    gated.set_slot(1, [0.5, 0.5])  # the tokens of others pass the gate, and are the same to the bit
    found = compute(layer, wrapper, gated, slots, x)
    torch.testing.assert_close(found[[0, 2, 3]], expected[[0, 2, 3]], rtol=0, atol=0)


@pytest.mark.parametrize("v_threshold", [0.1, 0.0, -0.3])
def test_at_the_threshold_it_fires_as_the_neuron_does(v_threshold, wrapped):
    _, wrapper, gated = wrapped
    tau = 1.7
    gated.set_slot(0, [silent(v_threshold, tau)] * SLICES)
    middle = torch.tensor(v_threshold * tau)
    around = [middle, *(middle := middle.nextafter(torch.tensor(9.0)) for _ in range(3))]
    around += [around[0].nextafter(torch.tensor(-9.0)), torch.tensor(0.0), torch.tensor(torch.nan), torch.tensor(-9.0)]
    a = torch.stack(around)[None].repeat(2, 1)
    wrapper._token_lora_indices[:2] = 0
    parts = (a.clone(), a.clone())
    gated._gate(parts)

    for part in parts:
        torch.testing.assert_close(part, spike_gate(a, v_threshold, tau, 2.0), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("rank", [0, 1])
def test_where_each_process_has_a_part_of_the_sum_the_whole_of_it_passes_the_gate_once(rank, monkeypatch):
    layer = object.__new__(RowParallelLinearWithLoRA)
    layer.__dict__.update(lora_a_stacked=(torch.zeros(2, 1, 2, 4),), tp_size=2, tp_rank=rank)
    wrapper = SimpleNamespace(_token_lora_indices=torch.tensor([0, 1, -1]))
    gated = GatedWrapper(wrapper, layer)
    gated.set_slot(0, [0.5])
    own, other = (
        torch.tensor([[0.4, 1.0], [0.4, 1.0], [0.4, 1.0]]),
        torch.tensor([[0.2, -0.9], [0.2, -0.9], [0.2, 0.1]]),
    )
    monkeypatch.setattr(gate, "tensor_model_parallel_all_reduce", lambda part: part.add_(other))
    part = own.clone()

    gated._gate((part,))

    first = [0.6, 0.0] if rank == 0 else [0.0, 0.0]
    torch.testing.assert_close(part, torch.tensor([first, [0.4, 1.0], [0.0, 0.0]]))


def test_activations_that_are_scaled_already_are_refused(wrapped):
    layer, _, gated = wrapped
    gated.set_slot(0, [0.5, 0.5])
    with pytest.raises(SpikeLoraError, match=r"scales the activations by 0\.5 before the gate"):
        gated.add_shrink((torch.zeros(1, RANK),) * 2, torch.zeros(1, FEATURES), layer.lora_a_stacked, 0.5)


def manager(fully_sharded=False, wrapper=PunicaWrapperCPU):
    return SimpleNamespace(
        lora_config=SimpleNamespace(fully_sharded_loras=fully_sharded),
        punica_wrapper_mapping={"language_model": wrapper(8, 1, "cpu")},
    )


@pytest.fixture
def stages(monkeypatch):
    stages = SimpleNamespace(world_size=1)
    monkeypatch.setattr(adapters, "get_pp_group", lambda: stages)
    return stages


def test_settings_in_which_a_gate_could_get_lost_are_refused(stages):
    class ForeignWrapper(PunicaWrapperCPU):
        pass

    adapters._refuse_setting(manager())
    with pytest.raises(SpikeLoraError, match="`--fully-sharded-loras` splits the activations"):
        adapters._refuse_setting(manager(fully_sharded=True))
    with pytest.raises(SpikeLoraError, match="computed by ForeignWrapper of another plugin"):
        adapters._refuse_setting(manager(wrapper=ForeignWrapper))
    stages.world_size = 2
    with pytest.raises(SpikeLoraError, match="not tried with `--pipeline-parallel-size` above 1"):
        adapters._refuse_setting(manager())


@dataclass
class AnotherConfig(SpikeLoraConfig):
    two_sided: bool = field(default=False)


def test_a_configuration_that_says_more_of_the_gate_than_is_served_is_refused(monkeypatch):
    monkeypatch.setitem(SpikeLoraConfig.__annotations__, "two_sided", bool)
    adapters._refuse_unknown(AnotherConfig())
    with pytest.raises(SpikeLoraError, match="`two_sided=True` is of a gate that vLLM does not compute"):
        adapters._refuse_unknown(AnotherConfig(two_sided=True))


def test_all_of_vllm_that_is_changed_is_changed_once():
    plugin.register()
    change_vllm()
    change_vllm()
    changed = [
        type(current_platform).get_punica_wrapper,
        BaseLayerWithLoRA.set_mapping,
        LoRAModel.from_local_checkpoint,
        WorkerLoRAManager._load_adapter,
        LoRAModelManager.activate_adapter,
    ]
    for function in changed:
        function = getattr(function, "__func__", function)
        assert function.__code__.co_filename.rpartition("spikelora")[2] in ("/serving/plugin.py", "/serving/changes.py")
        assert "spikelora" not in function.__wrapped__.__code__.co_filename
