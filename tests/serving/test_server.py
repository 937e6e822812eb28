"""`vllm serve` on the loopback, asked by OpenAI's client: adapters given at the start and at run time, and refusals."""

import asyncio
import json
import shutil
import subprocess
import time
from contextlib import closing
from os import environ
from pathlib import Path
from socket import socket
from sys import executable

import pytest
import requests
import torch
from adapters import NEW_TOKENS, OPT, answers, decoder, tokens, train
from engine import ENVIRONMENT
from openai import AsyncOpenAI
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from spikelora import SpikeLoraConfig

PROMPTS = tokens()
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    configs = {
        "mine": SpikeLoraConfig(r=8, use_rslora=True, target_modules="all-linear", learn_threshold=True),
        "other": SpikeLoraConfig(r=4, target_modules=["v_proj", "fc1"], v_threshold=0.3),
        "plain": LoraConfig(r=8, target_modules="all-linear"),
    }
    return {name: train(OPT, folder / name, config) for name, config in configs.items()}


@pytest.fixture(scope="module")
def url(adapters, tmp_path_factory):
    """A server that has `mine` and `plain` from its start, with room for three adapters."""
    with closing(socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(executable).with_name("vllm"), "serve", OPT, "--served-model-name", "base", "--dtype", "float32"]
    command += ["--host", "127.0.0.1", "--port", port, "--max-model-len", 128, "--enforce-eager", "--enable-lora"]
    command += ["--max-loras", 3, "--max-lora-rank", 16, "--lora-modules"]
    command += [f"{name}={adapters[name]}" for name in ("mine", "plain")]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with log.open("w") as output:
        process = subprocess.Popen(
            [str(word) for word in command],
            env=environ | ENVIRONMENT | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"},
            stdout=output,
            stderr=output,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait(process, url, log)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=60)


def wait(process, url, log):
    for _ in range(600):
        time.sleep(1)
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            if requests.get(f"{url}/health", timeout=5).ok:
                return
        except requests.ConnectionError:
            continue
    raise TimeoutError(log.read_text()[-4000:])


def ask(url, *asked):
    """The tokens of greedy completions, for pairs of model and prompt asked at once."""

    async def all_at_once():
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            return await asyncio.gather(
                *(
                    client.completions.create(
                        model=model,
                        prompt=prompt,
                        max_tokens=NEW_TOKENS,
                        temperature=0,
                        extra_body={"ignore_eos": True, "return_token_ids": True},
                    )
                    for model, prompt in asked
                )
            )

    return [completion.choices[0].token_ids for completion in asyncio.run(all_at_once())]


def post(url, route, **body):
    return requests.post(f"{url}/v1/{route}_lora_adapter", json=body, timeout=120)


def test_adapters_of_the_start_and_of_run_time(url, adapters):
    expected = {name: answers(OPT, adapters.get(name), PROMPTS) for name in ("base", *adapters)}

    def check(*names):
        asked = [(name, prompt) for prompt in PROMPTS for name in names]
        for (name, prompt), found in zip(asked, ask(url, *asked), strict=True):
            assert found == expected[name][PROMPTS.index(prompt)], name

    check("base", "mine", "plain")
    assert post(url, "load", lora_name="other", lora_path=str(adapters["other"])).status_code == 200
    check("base", "mine", "plain", "other")
    assert post(url, "unload", lora_name="mine").status_code == 200
    check("base", "plain", "other")
    missing = requests.post(f"{url}/v1/completions", json={"model": "mine", "prompt": "The"}, timeout=60)
    assert missing.status_code == 404
    # Under another name, and another adapter under the name of the first; with four, slots are exchanged.
    assert post(url, "load", lora_name="again", lora_path=str(adapters["mine"])).status_code == 200
    assert post(url, "load", lora_name="mine", lora_path=str(adapters["plain"])).status_code == 200
    expected |= {"again": expected["mine"], "mine": expected["plain"]}
    check("again", "mine")
    check("base", "other", "again")
    assert post(url, "load", lora_name="mine", lora_path=str(adapters["mine"]), load_inplace=True).status_code == 200
    expected["mine"] = expected["again"]
    check("base", "mine", "plain", "other")


def changed(folder, to, tensors=None, **config):
    """A copy of an adapter with other tensors, or other fields in its configuration."""
    shutil.copytree(folder, to)
    if tensors is not None:
        save_file(tensors(load_file(to / WEIGHTS)), to / WEIGHTS)
    file = to / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return to


def without_one_gate(tensors):
    return {name: t for name, t in tensors.items() if "layers.1.fc1.lora_gate" not in name}


def with_nan(tensors):
    return {name: t * torch.nan if "0.fc2.lora_gate.v_threshold" in name else t for name, t in tensors.items()}


def without_gates(tensors):
    return {name: t for name, t in tensors.items() if "lora_gate" not in name}


CHANGED = {
    "one gate missing": ({"tensors": without_one_gate}, "has no `lora_gate.v_threshold` for `base_model"),
    "all gates missing": ({"tensors": without_gates}, "has no `lora_gate.v_threshold` for `base_model"),
    "threshold of NaN": ({"tensors": with_nan}, "a threshold is one finite number"),
    "the name of LoRA": ({"peft_type": "LORA"}, "which would run without its gate"),
    "first adapters": ({"peft_type": "LORA", "use_spikelora": True}, "an adapter of the first SpikeLoRA code"),
    "another rank": ({"r": 4}, "has rank 8 in the weights"),
    "DoRA": ({"use_dora": True}, "vLLM does not yet support DoRA"),
    "a field of the future": ({"two_sided": True}, "fields that SpikeLoraConfig does not know: two_sided"),
}
TRAINED = {
    "another base": ({"r": 4, "target_modules": ["q_proj"]}, "no layer that takes an adapter for `model.layers.0.self"),
    "a large rank": ({"r": 32, "target_modules": ["q_proj"]}, "LoRA rank 32 is greater than max_lora_rank 16"),
    "embeddings": ({"r": 4, "target_modules": ["embed_tokens"]}, "is an embedding, where vLLM has no place"),
    "the head": ({"r": 4, "target_modules": ["lm_head"]}, "no layer that takes an adapter for `lm_head`"),
    "a whole module": ({"r": 4, "target_modules": ["fc1"], "modules_to_save": ["final_layer_norm"]}, "modules_to_save"),
    "biases": ({"r": 4, "target_modules": ["fc1"], "bias": "lora_only"}, "Adapter bias is not supported"),
}


@pytest.mark.filterwarnings("ignore:.*tied:UserWarning")
def test_bad_adapters_are_refused_with_the_reason_and_the_others_served_on(url, adapters, tmp_path):
    before = ask(url, ("plain", PROMPTS[1]), ("base", PROMPTS[2]))
    bad = {name: changed(adapters["mine"], tmp_path / name, **change) for name, (change, _) in CHANGED.items()}
    for name, (options, _) in TRAINED.items():
        base = decoder(tmp_path / "llama", "llama") if name == "another base" else OPT
        bad[name] = train(base, tmp_path / name, SpikeLoraConfig(**options), steps=0)
    reasons = {name: reason for name, (_, reason) in (CHANGED | TRAINED).items()}
    bad["a smaller base"] = changed(adapters["mine"], tmp_path / "smaller", lambda ts: narrowed(ts))
    reasons["a smaller base"] = "Serve the base model that"
    bad["a damaged file"] = changed(adapters["mine"], tmp_path / "damaged")
    (bad["a damaged file"] / WEIGHTS).write_bytes(b"no tensors")
    reasons["a damaged file"] = "is damaged"
    bad["a missing folder"] = tmp_path / "nowhere"
    reasons["a missing folder"] = "No adapter found"

    for name, folder in bad.items():
        answer = post(url, "load", lora_name=name, lora_path=str(folder))
        print(f"{name}: {answer.status_code} {answer.text}")
        assert answer.status_code >= 400
        assert reasons[name] in answer.json()["error"]["message"], name

    served = {model["id"] for model in requests.get(f"{url}/v1/models", timeout=60).json()["data"]}
    assert not served & bad.keys()
    assert ask(url, ("plain", PROMPTS[1]), ("base", PROMPTS[2])) == before


def narrowed(tensors):
    """As from a model with half as many features in its feed-forward layers."""
    halves = {".fc1.lora_B.weight": 0, ".fc2.lora_A.weight": 1}
    return {
        name: next((t.chunk(2, dim)[0].contiguous() for end, dim in halves.items() if name.endswith(end)), t)
        for name, t in tensors.items()
    }
