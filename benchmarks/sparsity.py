"""Cost against sparsity: the up-projection alone and the forward of one layer, from 0 to 99 % silent elements."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from spikelora.method.neuron import spike_gate
from spikelora.method.ops import torch_backend

from .check import check_layer, compare
from .job import Job, Row
from .measure import interleaved, ratio, repeats_for, spread
from .models import BASE, LORA, OURS, SURROGATE_ALPHA, TAU
from .one_layer import layers

UP, LAYER = "up-projection", "layer forward"
SPARSITIES = (0.0, 0.5, 0.75, 0.9, 0.95, 0.97, 0.99)
DENSE = f"{OURS} 0"


def jobs(device: torch.device, quick: bool) -> list[Job]:
    if quick:
        return [Job("sparsity", partial(_run, 128, 64, 8, 3, device))]
    tokens, width = (4096, 4096) if device.type == "cuda" else (1024, 1024)
    return [Job(f"sparsity, r {r}", partial(_run, tokens, width, r, 25, device)) for r in (8, 64)]


def _run(tokens: int, width: int, r: int, rounds: int, device: torch.device) -> dict[str, list[Row]]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    built = layers(width, r, dtype, device)
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    with torch.no_grad():
        a = built[LORA].lora_A["default"](x.to(built[LORA].lora_A["default"].weight.dtype))
    thresholds = {s: threshold_for(s, a) for s in SPARSITIES}
    errors, rows = {}, []
    for s, threshold in thresholds.items():
        errors[s] = max(_check_up(built[OURS], a, threshold, x), _check_layer(built, x, threshold, dtype))
    shared = {"tokens": tokens, "width": width, "r": r, "dtype": str(dtype).removeprefix("torch.")}
    for quantity, calls in ((UP, _ups(built, a, x, thresholds)), (LAYER, _layers(built, x, thresholds))):
        times = interleaved(calls, rounds, device, repeats_for(calls[DENSE], device))
        for name in times.columns:
            method, _, s = name.partition(" ")
            row = shared | {"quantity": quantity, "method": method, "rounds": rounds} | times.attrs
            if s:
                spikes = a / TAU >= thresholds[float(s)]
                row |= {"sparsity": float(s), "measured_sparsity": 1 - spikes.float().mean().item()}
                row |= {"firing_tokens": spikes.any(1).float().mean().item(), "error": errors[float(s)]}
            row |= spread(times[name], "seconds") | spread(ratio(times, name, DENSE), "to_dense")
            rows.append(row | spread(ratio(times, name, LORA), "to_lora"))
    return {"sparsity": rows}


def threshold_for(sparsity: float, a: Tensor) -> Tensor:
    """Threshold `(1,)` that leaves the given share of the elements of `a` silent."""
    v = (a.float() / TAU).flatten().sort().values
    silent = round(sparsity * v.numel())
    # Between two elements: whether one on the threshold fires would depend on the last bit of its sum, which two
    # products may round differently. At 99 % of 1024 elements it is one of ten, and 0.256 of the gradient of B.
    return v[silent - 1 : silent + 1].mean().view(1) if silent else v[0].view(1) - 1


def _check_up(layer: nn.Module, a: Tensor, threshold: Tensor, like: Tensor) -> float:
    y = torch.randn(like.shape, generator=torch.Generator().manual_seed(3)).to(like)
    gated = spike_gate(a, threshold, TAU, SURROGATE_ALPHA)
    update = layer.scaling["default"] * gated @ layer.lora_B["default"].weight.detach().T
    expected = y + update.to(y.dtype)
    _up(layer, y, a, threshold)()
    return compare("the up-projection and its formula", {"y": y}, {"y": expected}, y.dtype)


def _up(layer: nn.Module, y: Tensor, a: Tensor, threshold: Tensor) -> Callable[[], object]:
    """A function that adds the layer's update into `y`, as the layer itself does on this device."""
    B, scaling = layer.lora_B["default"].weight, layer.scaling["default"]
    _, tau = layer.lora_gate["default"].neuron()
    if not y.is_cuda:
        return torch.no_grad()(partial(torch_backend.add_up_, y, a, B, threshold, tau, scaling))
    from spikelora.method.ops import triton_backend  # needs triton, which torch for CPUs does not bring

    partials = a.float().unsqueeze(0)
    arguments = (y, partials, None, None, B, B.stride()[::-1], threshold, tau, None, 1.0, scaling, 0.0, False)
    return torch.no_grad()(partial(triton_backend._expand_add_, *arguments))


def _check_layer(built: dict[str, nn.Module], x: Tensor, threshold: Tensor, dtype: torch.dtype) -> float:
    with torch.no_grad():
        built[OURS].lora_gate["default"].v_threshold.copy_(threshold)
    return check_layer(built[OURS], x, dtype)


def _ups(
    built: dict[str, nn.Module], a: Tensor, x: Tensor, thresholds: dict[float, Tensor]
) -> dict[str, Callable[[], object]]:
    """Adding an update to a result: LoRA's expression, and ours at each sparsity."""
    lora, y = built[LORA], torch.zeros_like(x)
    lora_B, scaling = lora.lora_B["default"], lora.scaling["default"]
    calls = {LORA: torch.no_grad()(lambda: (y + lora_B(a) * scaling).to(y.dtype))}
    return calls | {f"{OURS} {s:g}": _up(built[OURS], y, a, threshold) for s, threshold in thresholds.items()}


def _layers(built: dict[str, nn.Module], x: Tensor, thresholds: dict[float, Tensor]) -> dict[str, Callable[[], object]]:
    v_threshold = built[OURS].lora_gate["default"].v_threshold

    @torch.no_grad()
    def forward(threshold: Tensor) -> Tensor:
        v_threshold.copy_(threshold)
        return built[OURS](x)

    calls = {name: partial(torch.no_grad()(built[name]), x) for name in (BASE, LORA)}
    return calls | {f"{OURS} {s:g}": partial(forward, threshold) for s, threshold in thresholds.items()}
