"""Tokens per second of vLLM with spiking adapters, as a share of those with LoRA adapters of the same A and B.

Two processes of vLLM are asked in turn: one with the plugin for the spiking adapters, one without it for the others.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from adapters import OPT, answers, decoder, text, train, without_gate
from engine import WITHOUT, Engine

from spikelora import SpikeLoraConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--model", choices=("opt", "llama"), default="opt")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), options.model, options.rounds)
    print("adapters | LoRA, tokens/s | spiking, tokens/s | ratio, median (quartiles)")
    for row in rows:
        print("{adapters:>8} | {lora:>14.0f} | {spiking:>17.0f} | {ratio:.3f} ({low:.3f} to {high:.3f})".format(**row))
    if options.output:
        options.output.write_text(
            json.dumps({"model": options.model, "rounds": options.rounds, "rows": rows}, indent=1)
        )


def measure(folder: Path, family: str, rounds: int) -> list[dict[str, float]]:
    base = OPT if family == "opt" else decoder(folder / "base", family, hidden_size=512, intermediate_size=1536)
    config = SpikeLoraConfig(r=8, target_modules="all-linear", init_lora_weights=False, v_threshold=0.3)
    spiking = train(base, folder / "spiking", config, steps=0)
    lora = without_gate(spiking, folder / "lora")
    prompts = text()[:8, :32].tolist()
    settings = {"max_loras": 8, "max_lora_rank": 8}
    with (
        Engine(base, folder / "a.txt", WITHOUT, **settings) as plain,
        Engine(base, folder / "b.txt", **settings) as ours,
    ):
        sides = {"lora": (plain, lora), "spiking": (ours, spiking)}
        for engine, adapter in sides.values():  # what is timed is what it says it is
            found = engine.ask([[prompt, ["a", 1, str(adapter)]] for prompt in prompts[:2]])
            assert [tokens for tokens, _ in found] == answers(base, adapter, prompts[:2])
        return [row(sides, prompts, n, rounds) for n in (1, 4, 8)]


def row(sides, prompts, n: int, rounds: int) -> dict[str, float]:
    """Medians with n adapters among eight requests of 32 tokens and 32 new ones each."""
    rates: dict[str, list[float]] = {side: [] for side in sides}
    for round_ in range(rounds + 1):
        for side in sorted(sides, reverse=bool(round_ % 2)):
            engine, adapter = sides[side]
            requests = [[p, [str(i % n), i % n + 1, str(adapter)]] for i, p in enumerate(prompts)]
            start = time.perf_counter()
            answered = engine.ask(requests, logprobs=None, max_tokens=32)
            if round_:  # in the first, slots are filled
                rates[side].append(sum(len(t) for t, _ in answered) / (time.perf_counter() - start))
    ratios = sorted(s / p for s, p in zip(rates["spiking"], rates["lora"], strict=True))
    low, _, high = statistics.quantiles(ratios, n=4)
    medians = {side: statistics.median(values) for side, values in rates.items()}
    return {"adapters": n, **medians, "ratio": statistics.median(ratios), "low": low, "high": high}


if __name__ == "__main__":
    main()
