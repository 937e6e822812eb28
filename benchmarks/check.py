"""Checks before timing: results and all gradients by value, against the plain path and the transcription."""

import math
from statistics import median as median_of
from typing import NamedTuple

import torch
from torch import Tensor, nn

from spikelora.method.paths import Path, force_path

from .models import OURS, TRANSCRIPTION, Method


class Tolerance(NamedTuple):
    """Limits of relative errors: of the worst result, and of the median over all results."""

    worst: float
    median: float


# Rounding now and then flips a spike near its threshold, and with it that token's part of a gradient. If few tokens
# fire, that is much of one gradient, but little of the others: a wrong factor shows in the median. A bfloat16 base
# rounds far more than the paths differ. This was measured on a CPU, for OPT- and Llama-style models of hidden sizes 64
# and 256, with three batches each. The plain path was 0.12 to 0.58 away from the same model in float64 in its worst
# result, and 0.05 to 0.40 in the median. The fused path was at most 0.065 and 0.03 away from the plain one. For one
# layer both were 0.003 away from float64, and 0.0023 from each other. So the limits leave room for the rounding of
# other products, and need no more: a layer that is 0.25 off on some device has a flipped spike, or is wrong.
TOLERANCE = {torch.float32: Tolerance(2e-2, 1e-3), torch.bfloat16: Tolerance(0.25, 0.05)}


class CheckError(Exception):
    """Raised if a method does not compute what it should; then none of its figures counts."""


def check_methods(methods: dict[str, Method], tokens: Tensor, prompt: Tensor, dtype: torch.dtype) -> float:
    """Compare the results of a training step, a forward and a decode; return the largest relative error.

    Raises:
        CheckError: if SpikeLoRA differs from its own plain path or from the transcription.
    """
    # Forced, so that figures of another path are not taken for the fused path's.
    with force_path(Path.FUSED):
        ours = _results(methods[OURS], tokens, prompt)
    with force_path(Path.PLAIN):
        plain = _results(methods[OURS], tokens, prompt)
    errors = [compare(f"{OURS} and its plain path", ours, plain, dtype)]
    if TRANSCRIPTION in methods:
        transcription = _results(methods[TRANSCRIPTION], tokens, prompt)
        errors.append(compare(f"{OURS} and the transcription", ours, transcription, dtype))
    return max(errors)


def check_layer(layer: nn.Module, x: Tensor, dtype: torch.dtype) -> float:
    """The same for a single layer of SpikeLoRA, against its own plain path.

    Raises:
        CheckError: if they differ.
    """
    with force_path(Path.FUSED):
        ours = _layer_results(layer, x)
    with force_path(Path.PLAIN):
        plain = _layer_results(layer, x)
    return compare(f"{OURS} and its plain path", ours, plain, dtype)


def compare(what: str, results: dict[str, Tensor], references: dict[str, Tensor], dtype: torch.dtype) -> float:
    """Largest relative error; both have the same tensors, of a base in `dtype`.

    Raises:
        CheckError: if an error is above its tolerance, or NaN.
    """
    if results.keys() != references.keys():
        raise CheckError(f"{what} differ in what they compute: {sorted(results.keys() ^ references.keys())}")
    errors = {name: relative_error(results[name], references[name]) for name in references}
    worst, median = worst_of(errors), median_of(errors.values())
    if not (errors[worst] <= TOLERANCE[dtype].worst and median <= TOLERANCE[dtype].median):
        raise CheckError(
            f"{what} differ by {errors[worst]:.3g} of the norm in the {worst}, by {median:.3g} in the median of "
            f"{len(errors)} results, where {TOLERANCE[dtype].worst:g} and {TOLERANCE[dtype].median:g} are allowed"
        )
    return errors[worst]


def worst_of(errors: dict[str, float]) -> str:
    """The name of the largest error. NaN is larger than any; `max` alone may miss it."""
    return max(errors, key=lambda name: (math.isnan(errors[name]), errors[name]))


def relative_error(result: Tensor, reference: Tensor) -> float:
    """`|result - reference| / |reference|`, norms over all elements; infinite if only the reference is 0."""
    difference = (result.double() - reference.double()).norm()
    return 0.0 if difference == 0 else (difference / reference.double().norm()).item()


def training_results(method: Method, tokens: Tensor) -> dict[str, Tensor]:
    """Loss and gradients, cloned: a compiled graph writes the next step's into the same memory."""
    loss = method.loss(tokens)
    loss.backward()
    gradients = {f"gradient of {name}": p.grad.clone() for name, p in method.trained().items()}
    for p in method.trained().values():
        p.grad = None
    return {"loss": loss.detach().clone()} | gradients


def _results(method: Method, tokens: Tensor, prompt: Tensor) -> dict[str, Tensor]:
    results = training_results(method, tokens)
    return results | {"logits": method.infer(tokens), "decoded logits": method.decoder(prompt)()}


def _layer_results(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output with and without gradients, and the gradients of the input, A and B for a fixed random weighting."""
    leaf = x.detach().clone().requires_grad_()
    y = layer(leaf)
    weighting = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y)
    trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad((y * weighting).sum(), [leaf, *trained.values()])
    with torch.no_grad():
        outputs = {"output": y.detach(), "output without gradients": layer(x)}
    return outputs | dict(zip(("gradient of x", *(f"gradient of {n}" for n in trained)), gradients, strict=True))
