"""One linear layer: how the cost of LoRA, the plain path and SpikeLoRA depends on tokens, rank and width."""

import copy
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from spikelora import SpikeLoraConfig
from spikelora.method.paths import Path, force_path

from .check import check_layer
from .job import Job, Row
from .measure import interleaved, repeats_for
from .models import BASE, LORA, OURS, V_THRESHOLD, fill_adapters, lora_options
from .whole_model import FEW, INFERENCE, TRAINING, time_rows

PLAIN = "plain path"


class Size(NamedTuple):
    """One layer of `width` inputs and outputs, an adapter of rank `r`, and a number of tokens."""

    tokens: int
    width: int
    r: int


TOKENS, WIDTHS, RANKS = (1, 16, 128, 512, 2048), (256, 768, 1024, 2048), (1, 8, 32, 64, 128)
MIDDLE = Size(tokens=512, width=1024, r=8)


def jobs(device: torch.device, quick: bool) -> list[Job]:
    if quick:
        middle = Size(16, 64, 8)
        sizes = [middle, middle._replace(tokens=4), middle._replace(width=32), middle._replace(r=4)]
        rounds, dtype = 3, torch.float32
    else:
        varied = [
            *(MIDDLE._replace(tokens=n) for n in TOKENS),
            *(MIDDLE._replace(width=n) for n in WIDTHS),
            *(MIDDLE._replace(r=n) for n in RANKS),
        ]
        on_gpu = device.type == "cuda"
        sizes, rounds, dtype = list(dict.fromkeys(varied)), 21, torch.bfloat16 if on_gpu else torch.float32
    # With few tokens a ratio of one round moves by a tenth.
    n_rounds = [rounds if quick or size.tokens > FEW else 10 * rounds for size in sizes]
    return [
        Job(f"one layer, {s.tokens} tokens, width {s.width}, r {s.r}", partial(_run, s, n, dtype, device))
        for s, n in zip(sizes, n_rounds, strict=True)
    ]


def layers(
    width: int,
    r: int,
    dtype: torch.dtype,
    device: torch.device,
    lora_dropout: float = 0.0,
    learn_threshold: bool = False,
) -> dict[str, nn.Module]:
    """The base layer, and LoRA's and SpikeLoRA's on copies of it, with the same A and B."""
    torch.manual_seed(0)
    base = nn.Linear(width, width).to(device, dtype).requires_grad_(False)
    options = lora_options(r) | {"target_modules": ["linear"], "task_type": None, "lora_dropout": lora_dropout}
    adapted = {}
    for name, config in (
        (LORA, LoraConfig(**options)),
        (OURS, SpikeLoraConfig(v_threshold=V_THRESHOLD, learn_threshold=learn_threshold, **options)),
    ):
        model = get_peft_model(nn.Sequential(OrderedDict(linear=copy.deepcopy(base))), config)
        fill_adapters(model)
        adapted[name] = model.base_model.model.linear
    return {BASE: base} | adapted


def _run(size: Size, rounds: int, dtype: torch.dtype, device: torch.device) -> dict[str, list[Row]]:
    built = layers(size.width, size.r, dtype, device)
    x = torch.randn(size.tokens, size.width, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    error = check_layer(built[OURS], x, dtype)
    rows = []
    for quantity, make in ((TRAINING, _training), (INFERENCE, _inference)):
        calls = {name: make(layer, x) for name, layer in built.items()}
        calls[PLAIN] = _plainly(make(built[OURS], x))
        times = interleaved(calls, rounds, device, repeats_for(calls[LORA], device))
        keys = size._asdict() | {"dtype": str(dtype).removeprefix("torch."), "quantity": quantity}
        rows += [row | {"error": error} for row in time_rows(times, keys)]
    return {"one_layer": rows}


def _training(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    """Forward, and the gradients of the input and of the trained parameters."""
    leaf, grad_y = x.clone().requires_grad_(), torch.ones_like(x)
    leaves = [leaf, *(p for p in layer.parameters() if p.requires_grad)]
    return lambda: torch.autograd.grad(layer(leaf), leaves, grad_y)


def _inference(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    return torch.inference_mode()(lambda: layer(x))


def _plainly(call: Callable[[], object]) -> Callable[[], object]:
    def forced() -> object:
        with force_path(Path.PLAIN):
            return call()

    return forced
