"""The gated forward of linear layers, convolutions and embeddings; PEFT calls each of them a LoRA variant.

`y = base(x) + scaling * lora_B(gated)`, `gated = lora_gate(a)`, `a = lora_A(dropout(x))`. This is the method written
out; `paths` says when one function computes the same.
"""

from typing import Any, NoReturn

from peft import LoraConfig
from peft.tuners.lora.layer import LoraVariant
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from spikelora.errors import SpikeLoraError
from spikelora.method.gate import SpikeGate
from spikelora.method.ops.linear import spike_branch
from spikelora.method.paths import choose, returns_private


def refuse_merging(*args: Any, **kwargs: Any) -> NoReturn:
    """Raise a `SpikeLoraError`; it replaces every method that would turn an adapter into a weight."""
    raise SpikeLoraError(
        "A SpikeLoRA adapter cannot be merged, weighted or turned into a weight, as its gate depends on the input. "
        "Serve it unmerged, or make a mergeable LoRA from it with `to_lora(model, batches)`, which says what is lost."
    )


class SpikeVariant(LoraVariant):
    """The gated forward of a layer, as a LoRA variant of PEFT: `result + scaling * lora_B(gated)`."""

    @staticmethod
    def init(module: Any, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        if "lora_gate" not in module._modules:
            module.lora_gate = nn.ModuleDict()
        pattern = get_pattern_key(config.threshold_pattern.keys(), module.target_name)
        v_threshold = config.threshold_pattern.get(pattern, config.v_threshold)
        numbers = v_threshold, config.tau, config.surrogate_alpha
        straight_through = config.surrogate == "straight_through"
        gate = SpikeGate(*numbers, config.learn_threshold, config.learn_tau, straight_through)
        # By now A is where the adapter belongs. PEFT's own method would also cast A and B of a trained LoRA.
        module.lora_gate[adapter_name] = gate.to(module.low_rank(adapter_name)[0].device)

    merge_safe = merge_unsafe = unmerge = staticmethod(refuse_merging)


class SpikeLinearVariant(SpikeVariant):
    """The gated forward of linear layers."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        adapter = choose(module, active_adapter, x).adapter
        if adapter is not None:  # with other adapters, or for a part of the batch; it computes the same, see `paths`
            return spike_branch(result, x, adapter, returns_private(module.base_layer))
        a = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))
        gated = module.lora_gate[active_adapter](a)
        return result + module.lora_B[active_adapter](gated) * module.scaling[active_adapter]


class SpikeConvVariant(SpikeVariant):
    """The gated forward of convolutions: each position of the output is a token, its channels are the ranks."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        a = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))
        channels = 1 - module._kernel_dim  # counted from the end, as an input may come without a batch
        gated = module.lora_gate[active_adapter](a.movedim(channels, -1)).movedim(-1, channels)
        return result + module.lora_B[active_adapter](gated) * module.scaling[active_adapter]


class SpikeEmbeddingVariant(SpikeVariant):
    """The gated forward of embeddings: `a` is a column of A; PEFT's embeddings have no dropout."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        A, B = module.low_rank(active_adapter)
        gated = module.lora_gate[active_adapter](module._embed(x, A.T))
        update = gated @ B.T * module.scaling[active_adapter]
        embed_scale = module._get_embed_scale()  # some models' embeddings multiply by it in their forward
        return result + (update if embed_scale is None else update * embed_scale.to(update.dtype))
