"""Modules that a model never calls, because it reads their weight: an adapter on them, and its gate, would not run."""

import functools
import inspect
import re
import textwrap
import warnings
from typing import Any

from torch import nn

from spikelora.errors import SpikeLoraError

_MAMBA = {"conv1d", "dt_proj", "out_proj", "x_proj"}
_MAMBA_2 = {"conv1d", "out_proj"}
_RELATIVE_POSITIONS = {"rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"}
# By the class around them, as found in the sources of transformers 5.23 and of torch. They are linear layers and
# convolutions, some of which are called at times, and DeBERTa's embeddings of relative positions. PEFT knows Mamba's.
_READ_NOT_CALLED = {
    "BailingHybridDeltaAttention": {"conv1d"},
    "BambaMixer": _MAMBA_2,
    "ConditionalDetrMHAttentionMap": {"k_proj"},
    "DabDetrMHAttentionMap": {"k_linear"},
    "DebertaEncoder": {"rel_embeddings"},
    "DebertaV2Encoder": {"rel_embeddings"},
    "DetrMHAttentionMap": {"k_proj"},
    "FalconH1Mixer": _MAMBA_2,
    "FalconMambaMixer": _MAMBA,
    "Gemma3nTextAltUp": {"correction_coefs"},
    "Glm5NextTextLinearAttention": {"conv1d"},
    "GraniteMoeHybridMambaLayer": _MAMBA_2,
    "Inkling2ShortConvolution": {"conv1d"},
    "InklingShortConvolution": {"conv1d"},
    "JambaMambaMixer": {"conv1d", "dt_proj"},
    "KimiLinearDeltaAttention": {"conv1d"},
    "LSHSelfAttention": {"query_key", "value"},
    "LayoutLMv2Encoder": _RELATIVE_POSITIONS,
    "LayoutLMv3Encoder": _RELATIVE_POSITIONS,
    "Lfm2MoeShortConv": {"conv"},
    "Lfm2ShortConv": {"conv"},
    "Lfm3ShortConv": {"conv"},
    "LongcatFlashTopkRouter": {"classifier"},
    "Mamba2Mixer": _MAMBA_2,
    "MambaMixer": _MAMBA,
    "MaskFormerDetrMHAttentionMap": {"k_proj"},
    "MobileBertLMPredictionHead": {"decoder", "dense"},
    "NemotronHMamba2Mixer": _MAMBA_2,
    "NeoMMEForMaskedLM": {"unembedding_projection"},
    "OlmoHybridGatedDeltaNet": {"conv1d"},
    "PPDocLayoutV2ReadingOrderEncoder": _RELATIVE_POSITIONS,
    "Qwen3NextGatedDeltaNet": {"conv1d"},
    "Qwen3_5GatedDeltaNet": {"conv1d"},
    "Qwen3_5MoeGatedDeltaNet": {"conv1d"},
    "Qwen4ExpTextGatedDeltaNet": {"conv1d"},
    "SEWDTransformerEncoder": {"rel_embeddings"},
    "TDNNLayer": {"kernel"},
    "TransformerEncoderLayer": {"linear1", "linear2"},
    "WavLMAttention": {"k_proj", "out_proj", "q_proj", "v_proj"},
    "Zamba2MambaMixer": _MAMBA_2,
    "ZambaMambaMixer": {"conv1d"},
}


def check_called(parent: nn.Module, name: str) -> None:
    """Raise a `SpikeLoraError` if the module around a target is known to read its weight without calling it.

    For classes that are not listed, warn if their source says so.
    """
    child = name.rpartition(".")[2]
    parent_type: Any = type(parent)
    if any(child in _READ_NOT_CALLED.get(base.__name__, ()) for base in parent_type.__mro__):
        raise SpikeLoraError(
            f"Target module `{name}` is read by its model, not called: the gate would never run. Leave it out through "
            "`target_modules` or `exclude_modules`."
        )
    if child in _read_only(parent_type):
        warnings.warn(
            f"The source of {parent_type.__name__} reads target module `{name}` and never calls it: if so, its adapter "
            "and its gate never run. A `SparsityMeter` shows it, as a module with no token.",
            RuntimeWarning,
            stacklevel=2,
        )


@functools.cache
def _read_only(parent: Any) -> frozenset[str]:
    """The submodules whose `weight` the source of a class reads, if it uses them for nothing else."""
    read: set[str] = set()
    used: set[str] = set()
    for base in parent.__mro__:
        if base.__module__.startswith(("builtins", "torch", "transformers.modeling_utils")):
            continue
        try:
            source = textwrap.dedent(inspect.getsource(base))
        except (OSError, TypeError):  # a class without a file, such as one that was typed in
            continue
        if re.search(r"\bself\.processor\(\s*self\b", source):  # in diffusers it calls the layers of that module
            return frozenset()
        for line in source.splitlines():
            if "init" not in line:  # initialisation does not count as use
                read.update(re.findall(r"\bself\.(\w+)\.weight\b(?!\.(?:dtype|device|shape|size)\b)", line))
            used.update(re.findall(r"\bself\.(\w+)\b(?!\.|\s*=[^=])", line))
    return frozenset(read - used)
