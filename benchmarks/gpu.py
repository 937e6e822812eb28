"""All checks and measurements that need a GPU, in one command of at most 8 minutes: `make gpu`.

Values come first: a wrong one ends it with status 1. Then it measures what the speed goals are about. It needs torch,
triton, transformers and PEFT, no other package and no network. `--dry` runs all of it on a CPU with tiny sizes, except
the peak of memory, which torch records only for a GPU; its figures mean nothing. One file of more than 300 lines,
because it must run without what the other benchmarks need.
"""

import argparse
import copy
import csv
import datetime
import platform
import pydoc_data.topics
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, AutoTokenizer

from spikelora import SpikeLoraConfig
from spikelora.method.neuron import spike_gate
from spikelora.method.ops.adapter import Adapter
from spikelora.method.ops.linear import spike_linear

from .check import TOLERANCE, CheckError, check_methods, relative_error
from .models import BASE, LORA, OURS, VOCABULARY, Method, base_model, methods

RESULTS = Path(__file__).parent / "results"
MODEL = Path(__file__).parents[1] / "examples" / "spikelora_finetuning" / "model"
BUDGET = 8 * 60  # seconds, after which no further model is begun
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Error of the norm relative to float64, by the dtype of a result: its own rounding, and that of the activations.
ROUNDING = {F32: 1e-5, F16: 2e-3, BF16: 1.5e-2}
ALPHA, SCALING = 2.0, 0.5
PROMPT = 64
TRAINING, INFERENCE, DECODE, COMPILED, MEMORY = (
    "training step",
    "inference",
    "decode",
    "compiled training step",
    "memory",
)
GOALS = {TRAINING: 0.90, INFERENCE: 0.95, DECODE: 1.00, COMPILED: 1.00, MEMORY: 0.80}
OVERHEAD = 0.5  # of a training step


class Size(NamedTuple):
    """A model, and the batch that it is timed with."""

    style: str
    hidden: int
    layers: int = 3
    batch: int = 4
    length: int = 512


class Run:
    """The options, and the rows of the tables that are written."""

    def __init__(self, dry: bool) -> None:
        self.dry, self.started = dry, time.perf_counter()
        self.device = torch.device("cpu" if dry else "cuda")
        self.name = "a CPU, dry" if dry else torch.cuda.get_device_name()
        self.tables: dict[str, list[dict[str, object]]] = {"checks": [], "times": [], "launches": [], "training": []}
        self.rounds = 2 if dry else 15

    def say(self, text: str) -> None:
        print(f"[{time.perf_counter() - self.started:5.0f} s] {text}", flush=True)

    def check(self, what: str, error: float, limit: float) -> None:
        """Note an error; one above its limit, or NaN, ends the run."""
        self.tables["checks"].append({"what": what, "error": error, "limit": limit})
        if not error <= limit:
            raise CheckError(f"{what}: relative error {error:.3g}, where {limit:g} is allowed")

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--dry", action="store_true", help="on a CPU; written is to --output alone")
    parser.add_argument("--output", type=Path, help="folder for the tables (default: benchmarks/results/<device>)")
    options = parser.parse_args(arguments)
    if not options.dry and not torch.cuda.is_available():
        print("There is no CUDA GPU here; `--dry` runs every line on a CPU.", file=sys.stderr)
        return 2
    # PEFT 0.21 uses names of checkpointing that transformers 5 deprecates.
    warnings.filterwarnings("ignore", message=".*is deprecated and will be removed in v6", category=FutureWarning)
    run = Run(options.dry)
    run.say(f"{run.name}, Python {platform.python_version()}, {_versions()}")
    try:
        for step in (kernels, moving, compiled, speed, host, finetuning):
            run.say(f"{step.__name__}: {step.__doc__}")
            step(run)
    except CheckError as error:
        print(f"A result is wrong: {error}", file=sys.stderr)
        return 1
    finally:
        folder = options.output or (None if options.dry else RESULTS / run.name.lower().replace(" ", "_"))
        if folder:
            write(run, folder)
    run.say("done")
    return 0


def kernels(run: Run) -> None:
    """a layer's output and gradients by value, against the reference in float64"""
    sizes = [(5, 24, 40)] if run.dry else [(1, 1024, 4096), (333, 1000, 520), (2048, 4096, 1024)]
    for dtype, adapter_dtype in ((F32, F32), (BF16, F32), (BF16, BF16), (F16, F32), (F16, F16)):
        for r in (8,) if run.dry else (1, 8, 64):
            worst = max(_layer_error(run, *size, r, dtype, adapter_dtype, False) for size in sizes)
            if r == 8:  # the other gradient is a kernel of its own, which takes equally long to compile
                worst = max(worst, *(_layer_error(run, *size, r, dtype, adapter_dtype, True) for size in sizes))
            what = f"{_short(dtype)} base, {_short(adapter_dtype)} adapter, r {r}"
            run.check(what, worst, max(ROUNDING[dtype], ROUNDING[adapter_dtype]))
            run.say(f"  {what}: {worst:.1e}")


def _layer_error(
    run: Run, n: int, n_in: int, n_out: int, r: int, dtype: torch.dtype, adapter: torch.dtype, straight_through: bool
) -> float:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int, by: float, dtype: torch.dtype) -> Tensor:
        return (torch.randn(*shape, generator=generator) * by).to(run.device, dtype)

    x, grad_y = randn(n, n_in, by=1, dtype=dtype), randn(n, n_out, by=1, dtype=dtype)
    weight, bias = randn(n_out, n_in, by=n_in**-0.5, dtype=dtype), randn(n_out, by=1, dtype=dtype)
    A, B = randn(r, n_in, by=n_in**-0.5, dtype=adapter), randn(n_out, r, by=r**-0.5, dtype=adapter)
    neuron = [torch.tensor([value], device=run.device) for value in (0.1, 2.0)]
    leaves = [t.requires_grad_() for t in (x, A, B, *neuron)]
    y = spike_linear(x, weight, bias, Adapter(A, B, *neuron, ALPHA, straight_through, SCALING, 0.0))
    results = [y, *torch.autograd.grad(y, leaves, grad_y)]
    # The reference gates the activations in the adapter's dtype: one that is rounded over the threshold is another
    # spike. In float32 this is unlikely.
    exact = [t.detach().double().requires_grad_() for t in leaves]
    a = exact[0] @ exact[1].T
    a = a + (a.detach().to(adapter).double() - a.detach())
    gated = spike_gate(a, exact[3], exact[4], ALPHA, straight_through)
    reference = F.linear(exact[0], weight.double(), bias.double()) + SCALING * gated @ exact[2].T
    references = [reference, *torch.autograd.grad(reference, exact, grad_y.double())]
    return max(relative_error(result, wanted) for result, wanted in zip(results, references, strict=True))


def moving(run: Run) -> None:
    """a model that goes to the device and back, and between dtypes, keeps its thresholds and its logits"""
    model = get_peft_model(base_model("OPT", 64, 2, F32, torch.device("cpu")), _config(learn_threshold=True)).eval()
    tokens = torch.arange(3, 35)[None]
    with torch.no_grad():
        before = model(tokens).logits
        there = model.to(run.device)(tokens.to(run.device)).logits
        run.check("logits on the device", relative_error(there.cpu(), before), 1e-4)
        again = model.to("cpu")(tokens).logits
        run.check("logits after the way back", relative_error(again, before), 0.0)
        model.to(run.device, BF16)(tokens.to(run.device))
    gates = [p for name, p in model.state_dict().items() if "lora_gate" in name]
    run.check("thresholds that are not float32", float(sum(p.dtype != F32 for p in gates)), 0.0)


def compiled(run: Run) -> None:
    """torch.compile: whole graphs, the values of eager, and no other graph for another threshold"""
    modes = ("default",) if run.dry else ("default", "reduce-overhead")
    layer = _layer(run, learn_threshold=False)
    x = torch.randn(48, 64, generator=torch.Generator().manual_seed(0)).to(run.device)
    for mode in modes:
        torch._dynamo.reset()
        body = torch.compile(layer, mode=mode, fullgraph=True, backend="aot_eager" if run.dry else "inductor")
        run.check(f"compiled, {mode}", relative_error(body(x).clone(), layer(x)), 1e-4)
        with torch.no_grad():
            layer.lora_gate["default"].v_threshold.mul_(3)
        with torch._dynamo.config.patch(error_on_recompile=True):
            run.check(f"compiled, {mode}, another threshold", relative_error(body(x).clone(), layer(x)), 1e-4)


def _layer(run: Run, **options: bool) -> nn.Module:
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(64, 96)), _config(target_modules=["0"], **options))
    nn.init.normal_(model.base_model.model[0].lora_B["default"].weight)
    return model.to(run.device).base_model.model[0]


def speed(run: Run) -> None:
    """times and memory beside PEFT's LoRA, bfloat16, r 8, medians of paired rounds"""
    sizes = [Size("OPT", 64, 1, 2, 32)]
    if not run.dry:
        sizes = [Size("OPT", 1024), Size("OPT", 2048), Size("Llama", 2048), Size("OPT", 4096), Size("Llama", 4096)]
    run.say("  time / LoRA's [quartiles] (overhead over the base / LoRA's), goal")
    for size in sizes:
        if time.perf_counter() - run.started > BUDGET - 120:
            run.say(f"  {size.style} {size.hidden} is left out: there is no time for it")
            continue
        built = methods(base_model(size.style, size.hidden, size.layers, BF16, run.device), 8, (BASE, LORA, OURS))
        tokens = torch.randint(3, VOCABULARY, (size.batch, size.length), generator=torch.Generator().manual_seed(0))
        tokens = tokens.to(run.device)
        error = check_methods(built, tokens[:1, :PROMPT], tokens[:1, :16], BF16)
        run.check(f"{size.style} {size.hidden}, whole model", error, TOLERANCE[BF16].worst)
        for quantity, calls in _quantities(built, tokens).items():
            _time(run, size, quantity, calls)
        _memory(run, size, built, tokens)
        _time(run, size, COMPILED, _compiled_steps(run, built, tokens))
        del built
        if not run.dry:
            torch.cuda.empty_cache()


def _quantities(built: dict[str, Method], tokens: Tensor) -> dict[str, dict[str, Callable[[], object]]]:
    return {
        TRAINING: {name: partial(m.training_step, tokens) for name, m in built.items()},
        INFERENCE: {name: partial(m.infer, tokens) for name, m in built.items()},
        DECODE: {name: m.decoder(tokens[:1, : min(PROMPT, tokens.shape[1])]) for name, m in built.items()},
    }


def _compiled_steps(run: Run, built: dict[str, Method], tokens: Tensor) -> dict[str, Callable[[], object]]:
    torch._dynamo.reset()
    steps: dict[str, Callable[[], object]] = {}
    for name, method in built.items():
        of_compiled = copy.copy(method)
        of_compiled.model = torch.compile(method.model, backend="eager" if run.dry else "inductor")
        steps[name] = partial(of_compiled.training_step, tokens)
    return steps


def _time(run: Run, size: Size, quantity: str, calls: dict[str, Callable[[], object]]) -> None:
    for call in calls.values():
        call(), call()
    order, times = random.Random(0), {name: [] for name in calls}
    for _ in range(run.rounds * (3 if quantity == DECODE else 1)):
        for name in order.sample(list(calls), len(calls)):
            run.wait()
            start = time.perf_counter()
            calls[name]()
            run.wait()
            times[name].append(time.perf_counter() - start)
    ratios = [ours / lora for ours, lora in zip(times[OURS], times[LORA], strict=True)]
    middle = {name: statistics.median(values) for name, values in times.items()}
    lower, ratio, upper = statistics.quantiles(ratios, n=4)
    overhead = (middle[OURS] - middle[BASE]) / (middle[LORA] - middle[BASE])
    # Times of a CPU at tiny sizes say nothing about the goals.
    met = None if run.dry else ratio <= GOALS[quantity] and (quantity != TRAINING or overhead <= OVERHEAD)
    row = size._asdict() | {"quantity": quantity} | {f"{name} ms": 1e3 * middle[name] for name in calls}
    row |= {"to_lora": ratio, "q25": lower, "q75": upper, "overhead": overhead, "goal": GOALS[quantity], "met": met}
    run.tables["times"].append(row)
    verdict = f"goal {GOALS[quantity]:.2f}: { {True: 'met', False: 'missed', None: 'not judged'}[met] }"
    run.say(
        f"  {size.style} {size.hidden} {quantity}: {ratio:.2f} [{lower:.2f}, {upper:.2f}] ({overhead:.2f}), {verdict}"
    )


def _memory(run: Run, size: Size, built: dict[str, Method], tokens: Tensor) -> None:
    if run.dry:
        return
    peaks = {}
    for name in (LORA, OURS):
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()  # by all methods
        built[name].training_step(tokens)
        own = sum(p.numel() * p.element_size() for p in built[name].model.parameters())
        peaks[name] = torch.cuda.max_memory_allocated() - held + own
    ratio = peaks[OURS] / peaks[LORA]
    row = size._asdict() | {"quantity": MEMORY, "to_lora": ratio, "goal": GOALS[MEMORY], "met": ratio <= GOALS[MEMORY]}
    run.tables["times"].append(row)
    run.say(f"  {size.style} {size.hidden} peak memory of a step: {ratio:.2f}, goal {GOALS[MEMORY]:.2f}")


def host(run: Run) -> None:
    """launches of a training step and what the host takes for it, one small model"""
    built = methods(base_model("OPT", 256, 3, BF16, run.device), 8, (BASE, LORA, OURS))
    tokens = torch.randint(3, VOCABULARY, (1, 32), generator=torch.Generator().manual_seed(0)).to(run.device)
    activities = [ProfilerActivity.CPU] if run.dry else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    for name, method in built.items():
        step = partial(method.training_step, tokens)
        step(), step()
        run.wait()
        start = time.perf_counter()
        for _ in range(run.rounds):
            step()
        enqueued = (time.perf_counter() - start) / run.rounds
        run.wait()
        with profile(activities=activities) as record:
            step()
            run.wait()
        launched = sum("LaunchKernel" in event.name for event in record.events())
        run.tables["launches"].append({"method": name, "launches": launched, "host_ms": 1e3 * enqueued})
        run.say(f"  {name}: {launched} launches, {1e3 * enqueued:.2f} ms")


def finetuning(run: Run) -> None:
    """the small model of the example, trained on Python's own reference with LoRA and with SpikeLoRA"""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    texts = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    ids = tokenizer("\n".join(texts))["input_ids"]
    rows = torch.tensor(ids[: len(ids) // 128 * 128]).view(-1, 128).to(run.device)
    held_out, steps = rows[:32], 4 if run.dry else 150
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
            batch = rows[torch.randint(32, len(rows), (16,), generator=generator).to(run.device)]
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        run.wait()
        row = {"method": name, "steps": steps, "before": before, "after": _loss(model, held_out)}
        run.tables["training"].append(row | {"seconds": time.perf_counter() - started})
        run.say(f"  {name}: held-out loss {before:.3f} -> {row['after']:.3f} in {steps} steps")
        if not row["after"] < before:
            raise CheckError(f"the training with {name} did not lower the loss: {before:.3f} -> {row['after']:.3f}")


@torch.no_grad()
def _loss(model: nn.Module, rows: Tensor) -> float:
    return model(input_ids=rows, labels=rows).loss.item()


def write(run: Run, folder: Path) -> None:
    """One CSV file for each table, each row with device, versions and date."""
    folder.mkdir(parents=True, exist_ok=True)
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    machine = {"device": run.name, "python": platform.python_version(), "versions": _versions(), "date": date}
    for name, rows in run.tables.items():
        if rows:
            columns = dict.fromkeys(column for row in rows for column in row) | machine
            with (folder / f"gpu_{name}.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, list(columns))
                writer.writeheader()
                writer.writerows(row | machine for row in rows)
    run.say(f"written to {folder}")


def _config(**options: object) -> SpikeLoraConfig:
    return SpikeLoraConfig(**({"target_modules": "all-linear", "init_lora_weights": False} | options))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _versions() -> str:
    names = ("torch", "triton", "transformers", "peft")
    return ", ".join(f"{name} {version(name)}" for name in names)


if __name__ == "__main__":
    sys.exit(main())
