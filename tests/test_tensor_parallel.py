"""transformers' tensor parallelism is refused: its layers hold parts of a weight, and a gate needs the whole of `a`."""

import pytest
from peft import get_peft_model
from processes import in_processes
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig

from spikelora import SpikeLoraConfig, SpikeLoraError


def adapting(folder):
    """What is raised for a layer that is split by its outputs, and for one that is split by its inputs."""
    raised = []
    for target in ("q_proj", "o_proj"):
        config = DistributedConfig(tp_size=2, tp_plan="auto")
        base = LlamaForCausalLM.from_pretrained(folder.parent / "base", distributed_config=config)
        try:
            get_peft_model(base, SpikeLoraConfig(target_modules=[target]))
        except SpikeLoraError as error:
            raised.append(str(error))
    return raised


@pytest.mark.compatibility(
    "Many processes", "Tensor parallelism of transformers", refused="a gate needs the whole of `a`; use FSDP2"
)
def test_a_layer_in_parts_is_refused(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes)).save_pretrained(tmp_path / "base")
    ((first, second),) = in_processes(adapting, tmp_path, 2)

    assert first == second
    for message, target, plan in zip(first, ("q_proj", "o_proj"), ("colwise", "rowwise"), strict=True):
        assert f"`model.layers.0.self_attn.{target}`" in message
        assert plan in message or "a sharded DTensor" in message  # by PEFT 0.21.0
        assert "FSDP2" in message
