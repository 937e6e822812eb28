"""The configuration of SpikeLoRA: LoRA's, and the neuron's."""

import os
import re
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import LoraConfig, PeftType
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key

from spikelora.errors import SpikeLoraError
from spikelora.method.parameters import MIN_TAU
from spikelora.peft.adapter_files import as_path, check_weights, low_rank_names, refuse_pickle
from spikelora.peft.targets import check_scope, check_target

# Options of LoRA that contradict the gate, and what to do instead.
_REFUSED = {
    "use_dora": "DoRA renormalises a merged weight, and a gated update is not a weight. Leave `use_dora=False`",
    "target_parameters": "PEFT's wrapper of bare parameters merges the update into the weight, without the gate. "
    "Target modules through `target_modules`",
    "alora_invocation_tokens": "aLoRA brings its own forward, without the gate. Leave it at None",
    "arrow_config": "Arrow routes between linear adapters. Leave it at None",
    "use_bdlora": "BD-LoRA brings its own factors, without the gate. Leave it at None",
    "velora_config": "VeLoRA brings its own backward, without the gate. Leave it at None",
    "kasa_config": "KaSA truncates the base weight for a linear adapter. Leave it at None",
    "monteclora_config": "MonteCLoRA brings its own forward, without the gate. Leave it at None",
    "use_qalora": "QALoRA pools the input for a mergeable adapter. Leave `use_qalora=False`",
    "megatron_config": "PEFT's Megatron layers never ask for the gate. Leave it at None",
    "lora_bias": "a bias on `lora_B` would pass while every gate is silent. Leave `lora_bias=False`, "
    'or train the base\'s biases with `bias="lora_only"`',
}
_INITIALISATIONS = (True, False, "gaussian", "eva")
SURROGATES = ("atan", "straight_through")


@dataclass
class SpikeLoraConfig(LoraConfig):
    """Configuration of a SpikeLoRA adapter: `y = base(x) + scaling * lora_B(a * (a / tau >= v_threshold))`.

    Every option of `LoraConfig` that makes sense with a gate keeps its meaning and default; the others raise.

    Args:
        v_threshold: firing threshold of every adapted module, finite, in the units of `a / tau`. Negative values open
            the gate wider, down to plain LoRA.
        tau: membrane time constant, > 1.
        surrogate: the gradient of the gate by `a`. "atan" is the paper's surrogate gradient; "straight_through" is a
            straight-through estimator in a window below the threshold, see `spikelora.method.neuron.spike_gate`.
        surrogate_alpha: sharpness of that gradient, > 0; the larger, the narrower.
        learn_threshold: train one threshold per module.
        learn_tau: train one time constant per module, kept above 1.
        threshold_pattern: thresholds of single modules, by name or regular expression, matched like `rank_pattern`.
        target_sparsity: share of silent activations, between 0 and 1. A `SparsityControlCallback` holds it during
            training by moving the thresholds; without the callback it does nothing.
        target_scope: what has to reach the target: each "module", or the "adapter" as a whole, whose modules then
            differ in their sparsity.
        target_tolerance: how far from the target the adapter may end before the callback warns.

    Raises:
        SpikeLoraError: for a value out of range, or an option of LoRA that contradicts the gate.

    Source: de Jong, Bosman, Schreuder, "SpikeLoRA", 2025; the defaults are the paper's.
    """

    v_threshold: float = field(
        default=0.1,
        metadata={"help": "Firing threshold, finite; negative values open the gate wider, down to plain LoRA."},
    )
    # PEFT's own layers refuse a config with a truthy field marked like this, so they never build an ungated LoRA.
    tau: float = field(default=2.0, metadata={"help": "Membrane time constant, > 1.", "is_lora_variant": True})
    surrogate: str = field(
        default="atan",
        metadata={"help": 'Gradient of the gate by `a`: "atan", the paper\'s, or "straight_through".'},
    )
    surrogate_alpha: float = field(default=2.0, metadata={"help": "Sharpness of the surrogate gradient, > 0."})
    learn_threshold: bool = field(default=False, metadata={"help": "Train one threshold per module."})
    learn_tau: bool = field(default=False, metadata={"help": "Train one time constant per module, kept above 1."})
    threshold_pattern: dict[str, float] = field(
        default_factory=dict,
        metadata={"help": "Thresholds by module name or regular expression, matched like `rank_pattern`."},
    )
    target_sparsity: float | None = field(
        default=None,
        metadata={"help": "Share of silent activations that SparsityControlCallback holds, between 0 and 1."},
    )
    target_scope: str = field(
        default="module",
        metadata={"help": 'What has to reach `target_sparsity`: each "module", or the "adapter" as a whole.'},
    )
    target_tolerance: float = field(
        default=0.01, metadata={"help": "Distance from target_sparsity from which the callback warns at the end."}
    )

    def __post_init__(self) -> None:
        self.check()
        try:
            super().__post_init__()
        except ValueError as error:  # fields that contradict each other
            raise SpikeLoraError(str(error)) from error
        self.peft_type = PeftType.SPIKELORA

    def check(self) -> None:
        """Raise a `SpikeLoraError` for a value out of range or an option that contradicts the gate."""
        self._check_neuron()
        self._check_low_rank()
        self._check_refused()

    def _check_neuron(self) -> None:
        self.v_threshold = _finite("v_threshold", self.v_threshold)
        self.tau = _finite("tau", self.tau)
        if self.tau < MIN_TAU:
            raise SpikeLoraError(
                f"`tau` must be greater than 1 (in float32), got {self.tau}. Try 2.0, as in the paper."
            )
        if self.surrogate not in SURROGATES:
            raise SpikeLoraError(
                f"`surrogate` must be one of {', '.join(map(repr, SURROGATES))}, got {self.surrogate!r}. Take the "
                "first for the paper's."
            )
        self.surrogate_alpha = _finite("surrogate_alpha", self.surrogate_alpha)
        if self.surrogate_alpha <= 0:
            raise SpikeLoraError(f"`surrogate_alpha` must be greater than 0, got {self.surrogate_alpha}. Try 2.0.")
        for name in ("learn_threshold", "learn_tau"):
            if not isinstance(getattr(self, name), bool):
                raise SpikeLoraError(
                    f"`{name}` must be True or False, got {getattr(self, name)!r}. Leave it at False for a number "
                    "that stays as it is."
                )
        self.threshold_pattern = {
            key: _finite(f"threshold_pattern[{key!r}]", value)
            for key, value in _patterns("threshold_pattern", self.threshold_pattern).items()
        }
        self.target_tolerance = _finite("target_tolerance", self.target_tolerance)
        if not 0 < self.target_tolerance < 1:
            raise SpikeLoraError(f"`target_tolerance` must lie between 0 and 1, got {self.target_tolerance}. Try 0.01.")
        check_scope("target_scope", self.target_scope)
        if self.target_sparsity is not None:
            check_target("target_sparsity", self.target_sparsity)
            if self.learn_threshold:
                raise SpikeLoraError(
                    "`target_sparsity` sets the thresholds that `learn_threshold` would train. Drop one of the two."
                )
            if self.target_scope == "adapter" and self.threshold_pattern:
                raise SpikeLoraError(
                    '`target_scope="adapter"` sets one threshold for all modules, and `threshold_pattern` asks for '
                    "others in some. Drop one of the two."
                )

    def _check_low_rank(self) -> None:
        for name, rank in self._everywhere("r", "rank_pattern"):
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise SpikeLoraError(f"`{name}` must be a positive whole number, got {rank!r}. Try 8.")
        for name, alpha in self._everywhere("lora_alpha", "alpha_pattern"):
            if _finite(name, alpha) <= 0:
                raise SpikeLoraError(f"`{name}` must be greater than 0, got {alpha}. Try 16.")
        if not 0 <= _finite("lora_dropout", self.lora_dropout) < 1:
            raise SpikeLoraError(f"`lora_dropout` must be at least 0 and below 1, got {self.lora_dropout}. Try 0.05.")
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), str):
                _check_regex(name, getattr(self, name))

    def _everywhere(self, name: str, pattern_name: str) -> list[tuple[str, Any]]:
        """The value of a field and the values of its pattern, each with a name for messages."""
        patterns = _patterns(pattern_name, getattr(self, pattern_name))
        return [(name, getattr(self, name)), *((f"{pattern_name}[{key!r}]", value) for key, value in patterns.items())]

    def _check_refused(self) -> None:
        for name, reason in _REFUSED.items():
            if getattr(self, name):
                raise SpikeLoraError(f"`{name}` cannot be combined with SpikeLoRA: {reason}.")
        if self.init_lora_weights not in _INITIALISATIONS:
            raise SpikeLoraError(
                f"`init_lora_weights={self.init_lora_weights!r}` cannot be combined with SpikeLoRA, whose adapters "
                "start with B = 0 and leave the base weight as it is. Use one of "
                f"{', '.join(map(repr, _INITIALISATIONS))}."
            )

    def without_neuron(self) -> LoraConfig:
        """The same adapter as plain LoRA: a `LoraConfig` with the shared fields of this one."""
        config = LoraConfig.__new__(LoraConfig)
        config.__dict__.update({k: v for k, v in vars(self).items() if k not in SpikeLoraConfig.__annotations__})
        config.peft_type = PeftType.LORA
        return config

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save the configuration as PEFT does.

        Raises:
            SpikeLoraError: if the folder has weights as a pickle, which would not load.
        """
        refuse_pickle(as_path("save_directory", save_directory))  # PEFT writes the weights first
        super().save_pretrained(save_directory, **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> "SpikeLoraConfig":
        """Load the configuration from a folder or a hub repository, as PEFT does.

        Raises:
            SpikeLoraError: if the adapter in a local folder is of another method, damaged or incomplete.
        """
        folder = as_path("pretrained_model_name_or_path", pretrained_model_name_or_path)
        folder /= as_path("subfolder", "" if subfolder is None else subfolder)
        if folder.is_dir() and not (folder / CONFIG_NAME).exists():
            raise SpikeLoraError(
                f"{folder} has no {CONFIG_NAME}: it is not an adapter, or a part of it is missing. Give an adapter's "
                "folder, or copy the whole of it again."
            )
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if not isinstance(config, cls):
            found = PeftType(config.peft_type).value
            raise SpikeLoraError(
                f"{folder} holds a {found} adapter, not a SPIKELORA one. Load it with PEFT's own classes."
            )
        config.check_folder(pretrained_model_name_or_path, subfolder, **kwargs)
        return config

    def check_folder(
        self, name_or_path: str | os.PathLike[str], subfolder: str | None = None, needed: bool = False, **kwargs: Any
    ) -> None:
        """Raise a `SpikeLoraError` if the weights next to this configuration are not whole, or not its own.

        Args:
            name_or_path: a local folder, or a hub repository from which the weights are fetched.
            subfolder: where in there the adapter is.
            needed: whether weights have to be there. A saved adapter, whose configuration has `inference_mode` set,
                needs them; a configuration that was saved by itself does not.
            kwargs: further arguments for the hub, such as `revision`.
        """
        folder = as_path("name_or_path", name_or_path) / as_path("subfolder", "" if subfolder is None else subfolder)
        if not isinstance(needed, bool):
            raise SpikeLoraError(
                f"`needed` must be True or False, got {needed!r}. Leave it at False if `inference_mode` is to say it."
            )
        needed = needed or self.inference_mode
        if not folder.is_dir():
            if not needed:
                return
            folder = self._fetch(str(name_or_path), subfolder, kwargs)
        tensors = check_weights(folder, needed)
        for module, (down, _) in low_rank_names(tensors).items():
            pattern = self.rank_pattern or {}
            key = get_pattern_key(pattern.keys(), module.removeprefix("base_model.model."))
            rank, expected = len(tensors[down]), pattern.get(key, self.r)
            if rank != expected:
                raise SpikeLoraError(
                    f"`{module}` has rank {rank} in the weights in {folder}, and {expected} by `r` and `rank_pattern` "
                    f"in its {CONFIG_NAME}: one of the two files is of another adapter. Copy or save it again."
                )

    @classmethod
    def _fetch(cls, repository: str, subfolder: str | None, kwargs: dict[str, Any]) -> Path:
        hub_kwargs = cls._split_kwargs(kwargs)[0]
        try:
            file = hf_hub_download(repository, SAFETENSORS_WEIGHTS_NAME, subfolder=subfolder, **hub_kwargs)
        except EntryNotFoundError as error:
            raise SpikeLoraError(
                f"{repository} has no {SAFETENSORS_WEIGHTS_NAME}, or none in the cache while offline, and a pickle is "
                "never loaded. Save the adapter again: PEFT then writes safetensors."
            ) from error
        return Path(file).parent


def _finite(name: str, value: Any) -> float:
    limit = torch.finfo(torch.float32).max
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not -limit <= value <= limit:
        raise SpikeLoraError(
            f"`{name}` must be a finite number (in float32), got {value!r}. Give a plain number within that range."
        )
    return float(value)


def _patterns(name: str, patterns: Any) -> dict[str, Any]:
    """The patterns as a dict, each key a regular expression."""
    patterns = {} if patterns is None else patterns
    if not isinstance(patterns, dict):
        raise SpikeLoraError(
            f"`{name}` must map module names to values, got {patterns!r}. Give a dict, whose keys are names of "
            "modules or regular expressions."
        )
    for key in patterns:
        _check_regex(name, key)
    return patterns


def _check_regex(name: str, pattern: Any) -> None:
    try:
        re.compile(pattern)
    except (TypeError, re.error) as error:
        raise SpikeLoraError(
            f"`{name}` has {pattern!r}, which is not a regular expression ({error}). Give a module's name, or an "
            "expression that Python's `re` takes."
        ) from error
