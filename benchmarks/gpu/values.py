"""What `make gpu` compares: layers and models on the device, by value. Each check ends the run if a value is wrong."""

import pydoc_data.topics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from spikelora import SpikeLoraConfig
from spikelora.method.neuron import spike_gate
from spikelora.method.ops import linear
from spikelora.method.ops.adapter import Adapter

from ..check import CheckError, relative_error
from ..models import LORA, OURS, base_model
from .run import BF16, F16, F32, MODES, Run

MODEL = Path(__file__).parents[2] / "examples" / "spikelora_finetuning" / "model"
# Error of the norm relative to float64, by the dtype of a result: its own rounding, and that of the activations.
ROUNDING = {F32: 1e-5, F16: 2e-3, BF16: 1.5e-2}
ALPHA, SCALING, THRESHOLD, TAU = 2.0, 0.5, 0.1, 2.0
RAGGED = (333, 1000, 520)  # tokens, in, out: no multiple of a block; its tokens are summed in spans
ONE_TOKEN = (1, 1024, 4096)  # the smallest block; its features are summed in spans
ALIGNED = (2048, 4096, 1024)  # multiples of 16, for which Triton makes other kernels; most models have them
LEAVES = ("x", "A", "B", "v_threshold", "tau")


class Case(NamedTuple):
    """A layer that is compared."""

    dtype: torch.dtype  # of the base
    adapter: torch.dtype
    r: int
    size: tuple[int, int, int] = RAGGED
    straight_through: bool = False
    dropout: float = 0.0
    branch: bool = False  # the adapter alone, after the base has run
    autocast: bool = False
    transposed: bool = False  # x

    def __str__(self) -> str:
        base, adapter = (str(dtype).removeprefix("torch.") for dtype in self[:2])
        special = self._asdict().items() - {**self._asdict(), **self._field_defaults}.items()
        return f"{base} base, {adapter} adapter, r {self.r}" + "".join(f", {name} {value}" for name, value in special)


# Triton compiles a kernel anew for other dtypes, other blocks, and sizes that are 1 or multiples of 16: at 0.6 s each
# these take a minute. What makes kernels of its own therefore stands here for few pairs of dtypes; the last four lines
# make two.
EXACT, USUAL = (F32, F32, 8), (BF16, F32, 8)
CASES = [
    *(Case(*pair, 8) for pair in ((F32, F32), (BF16, F32), (BF16, BF16), (F16, F32), (F16, F16))),
    *(Case(*layer, size=ALIGNED) for layer in (EXACT, USUAL)),
    *(Case(*layer, straight_through=True) for layer in (EXACT, USUAL)),
    Case(*USUAL, size=ONE_TOKEN),
    Case(BF16, F32, 1),  # Triton makes a constant of it
    Case(F32, F32, 256),  # four blocks of ranks, in the type that takes the most shared memory
    *(Case(*layer, dropout=0.1) for layer in (EXACT, USUAL)),
    *(Case(*layer, branch=True) for layer in (EXACT, USUAL)),
    Case(*USUAL, transposed=True),
    Case(*EXACT, autocast=True),
]


def kernels(run: Run) -> None:
    """a layer's output and gradients by value, against the reference in float64"""
    for case in CASES:
        run.say(f"  {case}: {_compare(run, case):.1e}")
    run.say(f"  the layers take {run.backend}")


def _compare(run: Run, case: Case) -> float:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int, by: float, dtype: torch.dtype) -> Tensor:
        return (torch.randn(*shape, generator=generator) * by).to(run.device, dtype)

    n, n_in, n_out = map(min, case.size, (5, 24, 40)) if run.dry else case.size
    r = case.r
    x, grad_y = randn(n, n_in, by=1, dtype=case.dtype), randn(n, n_out, by=1, dtype=case.dtype)
    x = x.T.contiguous().T if case.transposed else x
    weight, bias = randn(n_out, n_in, by=n_in**-0.5, dtype=case.dtype), randn(n_out, by=1, dtype=case.dtype)
    A, B = randn(r, n_in, by=n_in**-0.5, dtype=case.adapter), randn(n_out, r, by=r**-0.5, dtype=case.adapter)
    leaves = [x, A, B, *(torch.tensor([value], device=run.device) for value in (THRESHOLD, TAU))]
    dtypes = (BF16, BF16) if case.autocast else (case.dtype, case.adapter)
    backend = linear._backend(x.to(dtypes[0]), A.to(dtypes[1]))
    if not backend.__name__.endswith(f".{run.backend}"):
        raise CheckError(f"{case}: the layer takes {backend.__name__} instead of {run.backend}")
    expected = _expected(case, leaves, weight, bias, grad_y, dtypes)
    kept: dict[object, object] = getattr(backend, "_compiled", {})
    worst = 0.0
    for way, n_learned in (("fixed numbers", 3), ("learned numbers", 5), ("no gradient", 0)):
        of_way = [t.detach().requires_grad_(k < n_learned) for k, t in enumerate(leaves)]
        for again in (False, True):  # the first compiles kernels and keeps them, the second starts those that are kept
            before = len(kept)
            with torch.set_grad_enabled(n_learned > 0):
                y = _layer_output(case, of_way, weight, bias)
            gradients = torch.autograd.grad(y, of_way[:n_learned], grad_y.to(y.dtype)) if n_learned else ()
            results = {"output": y} | {f"gradient of {name}": g for name, g in zip(LEAVES, gradients, strict=False)}
            errors = {name: relative_error(result, expected[name]) for name, result in results.items()}
            what = f"{case}, {way}{', kept kernels' if again else ''}"
            worst = max(worst, run.check(what, errors, max(ROUNDING[dtype] for dtype in dtypes)))
            if (again and len(kept) > before) or (backend.__name__.endswith(".triton_backend") and not kept):
                raise CheckError(f"{what}: its kernels were not kept")
    return worst


def _layer_output(case: Case, leaves: list[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    x, A, B, *neuron = leaves
    adapter = Adapter(A, B, *neuron, ALPHA, case.straight_through, SCALING, case.dropout)
    torch.manual_seed(0)  # of dropout
    with torch.autocast(x.device.type, BF16, enabled=case.autocast):
        if case.branch:
            return linear.spike_branch(F.linear(x, weight, bias), x, adapter, in_place=True)
        return linear.spike_linear(x, weight, bias, adapter)


def _expected(
    case: Case, leaves: list[Tensor], weight: Tensor, bias: Tensor, grad_y: Tensor, dtypes: tuple[torch.dtype, ...]
) -> dict[str, Tensor]:
    """Output and all gradients in float64, from operands in the dtypes in which the layer computes."""
    dtype, adapter = dtypes
    torch.manual_seed(0)
    mask = torch.native_dropout(leaves[0], case.dropout, True)[1].double() / (1 - case.dropout) if case.dropout else 1
    cast = [t.to(of) for t, of in zip(leaves, (dtype, adapter, adapter, F32, F32), strict=True)]
    x, A, B, *neuron = exact = [t.detach().double().requires_grad_() for t in cast]
    # The activations are gated in the adapter's dtype: one that is rounded over the threshold is another spike. In
    # float32 this is unlikely.
    a = (x * mask) @ A.T
    a = a + (a.detach().to(adapter).double() - a.detach())
    gated = spike_gate(a, *neuron, ALPHA, case.straight_through)
    y = F.linear(x, weight.to(dtype).double(), bias.to(dtype).double()) + SCALING * gated @ B.T
    gradients = torch.autograd.grad(y, exact, grad_y.to(dtype).double())
    return {"output": y} | {f"gradient of {name}": g for name, g in zip(LEAVES, gradients, strict=True)}


def moving(run: Run) -> None:
    """a model that goes to the device and back, and between dtypes, keeps its thresholds and its logits"""
    model = get_peft_model(base_model("OPT", 64, 2, F32, torch.device("cpu")), _config(learn_threshold=True)).eval()
    tokens = torch.arange(3, 35)[None]
    with torch.no_grad():
        before = model(tokens).logits
        there = model.to(run.device)(tokens.to(run.device)).logits
        run.check("on the device", {"logits": relative_error(there.cpu(), before)}, 1e-4)
        again = model.to("cpu")(tokens).logits
        run.check("after the way back", {"logits": relative_error(again, before)}, 0.0)
        model.to(run.device, BF16)(tokens.to(run.device))
    gates = [p for name, p in model.state_dict().items() if "lora_gate" in name]
    run.check("after a cast", {"thresholds' dtype": float(sum(p.dtype != F32 for p in gates))}, 0.0)


def compiled(run: Run) -> None:
    """torch.compile: whole graphs, eager's values in training, and no other graph for another threshold"""
    layer = _layer(run)
    for mode in MODES:
        torch._dynamo.reset()
        body = torch.compile(layer, mode=mode, fullgraph=True)
        for step in range(3):  # the second records a CUDA graph with reduce-overhead, the third replays it
            leaves = _leaves(run, layer, step)
            with torch._dynamo.config.patch(error_on_recompile=step > 0):
                results = _training_step(body, leaves)
            run.check(f"compiled, {mode}, step {step}", _errors(results, _training_step(layer, leaves)), 1e-4)


def captured(run: Run) -> None:
    """a CUDA graph of an eager layer, replayed with another input and another threshold"""
    layer = _layer(run)
    leaves = _leaves(run, layer, 0)
    calls = {
        "inference": torch.no_grad()(lambda: [layer(leaves[0])]),
        "training step": lambda: _training_step(layer, leaves),
    }
    for what, call in calls.items():
        results, replay = _capture(run, call)
        for step in (1, 2):
            with torch.no_grad():
                leaves[0].copy_(_leaves(run, layer, step)[0])
            replay()
            run.check(f"captured, {what}, replay {step}", _errors(results, call()), 1e-5)


def _capture(run: Run, call: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], object]]:
    """The results of a call, and what computes them anew in place."""
    if run.dry:
        results = call()
        return results, lambda: [result.copy_(new) for result, new in zip(results, call(), strict=True)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is allocated or compiled at first must not be captured
        call(), call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return results, graph.replay


def _layer(run: Run) -> nn.Module:
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(64, 96)), _config(target_modules=["0"]))
    nn.init.normal_(model.base_model.model[0].lora_B["default"].weight)
    return model.to(run.device).base_model.model[0]


def _leaves(run: Run, layer: nn.Module, step: int) -> list[Tensor]:
    """An input and the trained parameters; each step has its own input and its own threshold."""
    with torch.no_grad():
        layer.lora_gate["default"].v_threshold.fill_(THRESHOLD * (step + 1))
    x = torch.randn(48, 64, generator=torch.Generator().manual_seed(step)).to(run.device)
    return [x.requires_grad_(), *(p for p in layer.parameters() if p.requires_grad)]


def _training_step(layer: Callable[[Tensor], Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """Output and gradients, cloned: a compiled graph writes the next step's into the same memory."""
    y = layer(leaves[0])
    return [t.detach().clone() for t in (y, *torch.autograd.grad(y.square().sum(), leaves))]


def _errors(results: list[Tensor], expected: list[Tensor]) -> dict[str, float]:
    names = ("output", *(f"gradient of {name}" for name in LEAVES))
    return {name: relative_error(*pair) for name, *pair in zip(names, results, expected, strict=False)}


def finetuning(run: Run) -> None:
    """the small model of the example, trained on Python's own reference with LoRA and with SpikeLoRA"""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    texts = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    ids = tokenizer("\n".join(texts))["input_ids"]
    rows = torch.tensor(ids[: len(ids) // 128 * 128]).view(-1, 128).to(run.device)
    n_held_out, n_rows, steps = (8, 8, 4) if run.dry else (32, 16, 150)
    held_out, others = rows[:n_held_out], rows[n_held_out:]
    for name in (LORA, OURS):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(MODEL)
        options = {"r": 8, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        config = LoraConfig(**options) if name == LORA else SpikeLoraConfig(**options)
        model = get_peft_model(base, config).to(run.device)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
        before, started = _loss(model, held_out), time.perf_counter()
        generator = torch.Generator().manual_seed(1)
        for _ in range(steps):
            batch = others[torch.randint(len(others), (n_rows,), generator=generator).to(run.device)]
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        run.cuda.synchronize()
        row = {"method": name, "steps": steps, "before": before, "after": _loss(model, held_out)}
        run.tables["training"].append(row | {"seconds": time.perf_counter() - started})
        run.say(f"  {name}: held-out loss {before:.3f} -> {row['after']:.3f} in {steps} steps")
        if not row["after"] < before:
            raise CheckError(f"the training with {name} did not lower the loss: {before:.3f} -> {row['after']:.3f}")


@torch.no_grad()
def _loss(model: nn.Module, rows: Tensor) -> float:
    return model(input_ids=rows, labels=rows).loss.item()


def _config(**options: object) -> SpikeLoraConfig:
    return SpikeLoraConfig(**({"target_modules": "all-linear", "init_lora_weights": False} | options))
