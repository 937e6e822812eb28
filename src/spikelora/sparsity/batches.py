"""Running a model over calibration data, and which modules were reached."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from spikelora.errors import SpikeLoraError
from spikelora.sparsity.observe import Gated, Observer, gates, names, observing


def repeatable(batches: Iterable[Mapping[str, Any]]) -> Iterable[Mapping[str, Any]]:
    """Batches that can be used more than once.

    Raises:
        SpikeLoraError: for anything that is not a collection of batches, such as a single batch.
    """
    if isinstance(batches, Mapping | str) or not isinstance(batches, Iterable):
        raise SpikeLoraError(
            f"`batches` must be a list of batches, or another iterable of them, got a {type(batches).__name__}. Put a "
            "single batch into a list."
        )
    return list(batches) if isinstance(batches, Iterator) else batches


@torch.no_grad()
def run(model: nn.Module, batches: Iterable[Mapping[str, Any]], observer: Observer, title: str) -> None:
    """Run a model in evaluation mode over batches of its keyword arguments, and show the observer all activations.

    Raises:
        SpikeLoraError: if there is no spiking adapter, no batch, or no token that reaches an adapter.
    """
    device = gates(model)[0].gate.tau.device
    batches = repeatable(batches)
    modes = {module: module.training for module in model.modules()}
    all_configs: list[Any] = [getattr(module, "config", None) for module in modes]
    configs = {id(config): config for config in all_configs if getattr(config, "use_cache", False)}.values()
    n_batches = n_tokens = 0

    def count_and_see(gated: Gated, a: Tensor, mask: Tensor | None) -> None:
        nonlocal n_tokens
        n_tokens += a.shape[0] if mask is None else int(mask.sum())
        observer(gated, a, mask)

    model.eval()
    for config in configs:
        config.use_cache = False  # as trainers do; with a cache transformers takes texts packed in one row for one text
    try:
        with observing(model, count_and_see):
            for batch in tqdm(batches, desc=title, unit="batch", leave=False):
                n_batches += 1
                if not isinstance(batch, Mapping):
                    raise SpikeLoraError(
                        f"`batches` must give the model's keyword arguments, got a {type(batch).__name__}. Give dicts "
                        f"such as `{{'input_ids': ..., 'attention_mask': ...}}`."
                    )
                inputs = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in batch.items()}
                sizes = [v.numel() for v in inputs.values() if isinstance(v, Tensor)]
                if any(sizes) or not sizes:  # models fail on batches without any token
                    _call(model, inputs, n_batches)
    finally:
        for module, mode in modes.items():
            module.training = mode
        for config in configs:
            config.use_cache = True
    if not n_batches:
        raise SpikeLoraError("`batches` is empty. Give at least one, and a list if it is used more than once.")
    if not n_tokens:
        raise SpikeLoraError(
            "`batches` has no token that reaches an active spiking adapter, or all are padding. Give data that the "
            "adapted modules see, with the attention mask of its training."
        )


def _call(model: nn.Module, inputs: Mapping[str, Any], number: int) -> None:
    try:
        model(**inputs)
    except (SpikeLoraError, torch.OutOfMemoryError):  # programs that meet the second try a smaller batch
        raise
    except Exception as error:
        kinds = (f"{v.dtype} {tuple(v.shape)}" if isinstance(v, Tensor) else type(v).__name__ for v in inputs.values())
        entries = ", ".join(f"`{name}` as {kind}" for name, kind in zip(inputs, kinds, strict=True))
        raise SpikeLoraError(
            f"The model could not be run with batch {number} of `batches`, whose entries are {entries or 'none'} "
            f"({type(error).__name__}: {error}). Give the arguments of its forward as tensors, such as a tokenizer's "
            'with `return_tensors="pt"`, or look for the cause in the model.'
        ) from error


def warn_of_unreached(model: nn.Module, reached: Iterable[Gated], outcome: str) -> None:
    """Warn of the modules that no calibration data reached, if their adapter ran in other modules."""
    reached = list(reached)
    adapters = {gated.adapter for gated in reached}
    unreached = {g.module for g in gates(model) if g.adapter in adapters} - {gated.module for gated in reached}
    if unreached:
        warnings.warn(
            f"No calibration data reached {', '.join(sorted(unreached))}: {outcome}.", RuntimeWarning, stacklevel=3
        )


def by_module(values: Mapping[Gated, Any]) -> dict[str, Any]:
    return dict(zip(names(values), values.values(), strict=True))
