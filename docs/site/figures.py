"""Draws the pictures of the site and of the README: `python docs/site/figures.py`, part of `make docs`.

Curves come from the package's own functions, the token from a layer of the model that is shipped with the example, and
the losses from `docs/target_sparsity.csv`.
"""

import csv
from pathlib import Path
from pydoc_data.topics import topics

import matplotlib
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import spikelora  # noqa: F401 - registers the method with PEFT, and so comes first

# isort: split
from peft import SpikeLoraConfig, get_peft_model

from spikelora.method.neuron import atan_surrogate, charge, spike_gate

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).parents[1]
EMBEDDED = DOCS.parent / "examples" / "spikelora_finetuning" / "model"
INK, BLUE, ORANGE, GREEN, GREY = "#263238", "#3f51b5", "#e65100", "#2e7d32", "#9e9e9e"
V_THRESHOLD, TAU, ALPHA = 0.1, 2.0, 2.0
STYLE = {
    "svg.hashsalt": "spikelora",  # the same bytes each time
    "svg.fonttype": "path",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


def gradient(a: Tensor, straight_through: bool) -> Tensor:
    """`d gated / d a`, as the package's own backward gives it."""
    a = a.clone().requires_grad_()
    spike_gate(a, V_THRESHOLD, TAU, ALPHA, straight_through).sum().backward()
    return a.grad


def neuron() -> plt.Figure:
    """Charge, gate, surrogates and gradients over the activation `a`."""
    a = torch.linspace(-0.6, 0.8, 1401)
    fires = TAU * V_THRESHOLD
    figure, ((charging, gating), (surrogates, gradients)) = plt.subplots(2, 2, figsize=(9, 6.4))

    charging.plot(a, charge(a, TAU), color=BLUE)
    charging.axhline(V_THRESHOLD, color=ORANGE, linestyle="--", linewidth=1)
    charging.axvspan(fires, a[-1].item(), color=ORANGE, alpha=0.1, linewidth=0)
    charging.text(-0.58, V_THRESHOLD + 0.02, "v_threshold = 0.1", color=ORANGE)
    charging.text(0.5, -0.27, "it spikes", color=ORANGE, ha="center")
    charging.set(title="1. The neuron charges", xlabel="a", ylabel="v = a / tau")

    gated = spike_gate(a, V_THRESHOLD, TAU, ALPHA)
    silent, open_ = a < fires, a >= fires
    gating.plot(a, a, color=GREY, linestyle=":", label="LoRA: a itself")
    gating.plot(a[silent], gated[silent], color=BLUE, label="SpikeLoRA: gated")
    gating.plot(a[open_], gated[open_], color=BLUE)
    gating.plot([fires], [fires], "o", color=BLUE, markersize=5)
    gating.plot([fires], [0], "o", markerfacecolor="white", markeredgecolor=BLUE, markersize=5)
    gating.legend(loc="upper left")
    gating.set(title="2. The gate opens", xlabel="a", ylabel="gated = a where it spikes, else 0")

    u = torch.linspace(-1.5, 1.5, 601)
    for alpha, style in ((1.0, ":"), (2.0, "-"), (4.0, "--")):
        surrogates.plot(u, atan_surrogate(u, alpha), style, color=GREEN, label=f"surrogate_alpha = {alpha:g}")
    surrogates.legend(loc="upper left", fontsize=9)
    surrogates.set(title="3. The surrogate for the step's slope", xlabel="u = v - v_threshold", ylabel="s'(u)")
    surrogates.set_ylim(0, 2.9)

    for straight_through, colour, name in ((False, GREEN, '"atan"'), (True, ORANGE, '"straight_through"')):
        slope = gradient(a, straight_through)
        gradients.plot(a[silent], slope[silent], color=colour, label=f"surrogate = {name}")
        gradients.plot(a[open_], slope[open_], color=colour)
    gradients.axhline(0, color=INK, linewidth=0.6)
    gradients.axvline(fires, color=GREY, linewidth=0.8, linestyle=":")
    gradients.legend(loc="upper left", fontsize=9)
    gradients.set(title="4. What training sees", xlabel="a", ylabel="d gated / d a")
    gradients.set_ylim(-0.4, 1.9)
    return figure


def one_token(steps: int = 20) -> tuple[str, dict[str, Tensor]]:
    """The tensors of a token on its way through one layer of a briefly trained adapter."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32)
    config = SpikeLoraConfig(r=8, v_threshold=V_THRESHOLD, target_modules="all-linear", use_rslora=True)
    model = get_peft_model(model, config)
    tokens = tokenizer(topics["function"], return_tensors="pt", truncation=True, max_length=128).input_ids
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    layer = model.get_base_model().model.decoder.layers[1].fc1
    seen = []
    hook = layer.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    with torch.no_grad():
        model(tokens)
        hook.remove()
        ((x, y),) = seen
        x, y = x.reshape(tokens.shape[1], -1), y.reshape(tokens.shape[1], -1)
        a, gate = layer.lora_A["default"](x), layer.lora_gate["default"]
        words = [tokenizer.decode(token) for token in tokens[0]]
        fires = gate.spikes(a).sum(-1).tolist()
        is_word = [word.strip().isalpha() and len(word.strip()) > 2 for word in words]
        place = min((abs(n - 3), i) for i, n in enumerate(fires) if is_word[i])[1]  # about three of eight ranks
        x, a, y, base = x[place], a[place], y[place], layer.base_layer(x[place])
        values = {"x": x, "a": a, "v": charge(a, TAU), "gated": gate(a), "update": y - base, "y": y}
    return words[place].strip(), values


def token() -> plt.Figure:
    """One token's way through a layer: strips for wide tensors, bars for the eight ranks."""
    text, values = one_token()
    figure = plt.figure(figsize=(10, 4.6), layout="none")
    ranks = range(len(values["a"]))
    fires = values["v"] >= V_THRESHOLD

    def strip(key: str, left: float, bottom: float, label: str) -> None:
        axes = figure.add_axes((left, bottom, 0.035, 0.34))
        limit = values[key].abs().max().item()
        axes.imshow(values[key][:, None], aspect="auto", cmap="RdBu", vmin=-limit, vmax=limit)
        axes.set(xticks=[], yticks=[])
        axes.set_title(label, fontsize=9.5)
        axes.spines[["top", "right"]].set_visible(True)

    def bars(key: str, left: float, title: str, dead: str) -> plt.Axes:
        axes = figure.add_axes((left, 0.12, 0.15, 0.34))
        axes.barh(ranks, values[key], color=[BLUE if on else dead for on in fires])
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set(ylim=(len(values["a"]) - 0.4, -0.6), yticks=[])
        axes.locator_params(axis="x", nbins=4)
        axes.set_title(title, fontsize=9.5)
        return axes

    def arrow(start: tuple[float, float], end: tuple[float, float], label: str = "") -> None:
        axes = figure.add_axes((0, 0, 1, 1), facecolor="none", zorder=-1)
        axes.axis("off")
        axes.set(xlim=(0, 1), ylim=(0, 1))
        axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": INK, "linewidth": 1.1})
        axes.text((start[0] + end[0]) / 2, max(start[1], end[1]) + 0.02, label, ha="center", fontsize=9, color=INK)

    wide, out = len(values["x"]), len(values["y"])
    strip("x", 0.03, 0.56, f"x\n{wide} values")
    strip("update", 0.845, 0.12, f"update\n{out} values")
    strip("y", 0.945, 0.56, f"y\n{out} values")
    bars("a", 0.15, "a = lora_A(x)", GREY).set_ylabel("the 8 ranks")
    axes = bars("v", 0.37, "v = a / tau", GREY)
    axes.axvline(V_THRESHOLD, color=ORANGE, linestyle="--", linewidth=1.2)
    axes.set_xlabel("orange: v_threshold", fontsize=9, color=ORANGE)
    axes = bars("gated", 0.59, "gated", GREY)
    axes.set_xlabel(f"{int((~fires).sum())} of {len(fires)} ranks are silent", fontsize=9)
    arrow((0.08, 0.73), (0.93, 0.73), f"base layer, frozen: {wide} x {out} weights")
    arrow((0.05, 0.54), (0.13, 0.29))
    arrow((0.305, 0.29), (0.36, 0.29))
    arrow((0.525, 0.29), (0.58, 0.29))
    arrow((0.745, 0.29), (0.835, 0.29), "lora_B,\nscaling")
    arrow((0.89, 0.29), (0.962, 0.54))
    figure.text(0.945, 0.38, "+", fontsize=16, color=INK)
    figure.suptitle(f"The token {text!r} in fc1 of the small model's second layer", fontsize=11)
    return figure


def loss_and_sparsity() -> plt.Figure:
    """Held-out loss over sparsity on the small model: fixed thresholds, and targets that were held."""
    with (DOCS / "target_sparsity.csv").open() as file:
        rows = list(csv.DictReader(file))
    figure, axes = plt.subplots(figsize=(7, 3.6))
    lines = (
        ("v_threshold", BLUE, "o-", "fixed v_threshold"),
        ("target_sparsity", ORANGE, "s--", "target_sparsity, held during training"),
    )
    for flag, colour, style, label in lines:
        points = [(100 * float(row["sparsity"]), float(row["loss"])) for row in rows if row["flag"] == flag]
        axes.plot(*zip(*points, strict=True), style, color=colour, label=label, markersize=5)
    for row in rows:
        if row["flag"] == "v_threshold" and float(row["value"]) in (-0.3, 0, 0.1, 0.5, 0.75, 1):
            place = 100 * float(row["sparsity"]), float(row["loss"])
            axes.annotate(row["value"], place, (-5, 7), textcoords="offset points", ha="right", color=BLUE, fontsize=9)
    before = float(rows[0]["loss_before"])
    axes.set(xlabel="silent activations, %", ylabel="loss on held-out text", xlim=(44, 101), ylim=(3.8, 4.1))
    axes.set_title(f"Most of the adapter may be silent (loss without an adapter: {before:.2f})", fontsize=10.5)
    axes.legend(loc="upper left")
    return figure


def main() -> None:
    """Write every picture to `docs/figures`."""
    (DOCS / "figures").mkdir(exist_ok=True)
    for draw in (neuron, token, loss_and_sparsity):
        with plt.rc_context(STYLE):
            figure = draw()
            figure.savefig(DOCS / "figures" / f"{draw.__name__}.svg", metadata={"Date": None})
            plt.close(figure)


if __name__ == "__main__":
    main()
