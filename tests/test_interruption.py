"""A process that is killed while it saves leaves an adapter that was saved before, the new one, or a clear error."""

import os
import random
import runpy
import shutil
import signal
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_opt
from peft import PeftModel
from test_save_load import TOKENS, trained

from spikelora import SpikeLoraError
from spikelora.report.cli import _new_folder

TARGETS = {"target_modules": ["q_proj", "fc1"]}
SCRIPT = Path(__file__).parents[1] / "examples" / "spikelora_finetuning" / "spikelora_finetuning.py"


def fork(write):
    """Run a function in a fork of this process, and return the fork's id."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch has threads, which the fork does not use
        child = os.fork()
    if child == 0:
        try:
            write()
        finally:
            os._exit(0)
    return child


def kills(writers, count=36):
    """Let writers begin in turn, and kill each after a random part of the time that one takes; yield after each."""
    writers[0]()  # here, so that the forks need not import anything
    durations = []
    for _ in range(3):
        begun = time.perf_counter()
        os.waitpid(fork(writers[0]), 0)
        durations.append(time.perf_counter() - begun)
    longest, killed = min(durations), 0
    chance = random.Random(0)
    for number in range(count):
        child = fork(writers[number % len(writers)])
        time.sleep(chance.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        if os.WIFSIGNALED(os.waitpid(child, 0)[1]):
            killed += 1
        else:  # it had ended: the machine has become faster
            longest *= 0.8
        yield
    assert killed > count // 4, "most writers had ended before they were killed"


def logits(folder):
    """What the adapter in a folder gives; nothing where it is refused, with the model as it was."""
    base = tiny_opt()
    try:
        return PeftModel.from_pretrained(base, folder)(TOKENS).logits
    except ValueError as error:
        if not isinstance(error, SpikeLoraError) and "Can't find 'adapter_config.json'" not in str(error):
            raise
        assert torch.equal(base(TOKENS).logits, tiny_opt()(TOKENS).logits)
        return None


def is_one_of(found, *expected):
    return any(torch.equal(found, logits) for logits in expected)


@pytest.mark.compatibility(
    "Reliability",
    "a process killed while it saves over an adapter",
    note="the old adapter, the new one, or an error; if both have the same rank, the weights of one may meet the "
    "`lora_alpha` of the other, so a folder of its own is safer",
)
@pytest.mark.parametrize("options", [{"v_threshold": 0.7}, {"r": 2, "lora_alpha": 1}], ids=str)
def test_a_save_over_an_adapter_that_is_killed(options, tmp_path):
    models = [trained(tiny_opt(), **TARGETS), trained(tiny_opt(), **TARGETS | options)]
    expected = [model(TOKENS).logits for model in models]
    folder = tmp_path / "adapter"
    for _ in kills([lambda model=model: model.save_pretrained(folder) for model in models]):
        found = logits(folder)
        assert found is None or is_one_of(found, *expected)
    models[1].save_pretrained(folder)  # what was left is no hindrance
    assert torch.equal(logits(folder), expected[1])


@pytest.mark.compatibility("Reliability", "`spikelora calibrate` or `to-lora` killed", note="a whole folder or none")
def test_a_command_that_is_killed_leaves_a_whole_folder_or_none(tmp_path):
    model = trained(tiny_opt(), **TARGETS)
    expected = model(TOKENS).logits
    output = tmp_path / "output"

    def command():
        shutil.rmtree(output, ignore_errors=True)
        with _new_folder(output) as partial:
            model.save_pretrained(partial)

    for _ in kills([command]):
        if output.exists():
            assert torch.equal(logits(output), expected)
            shutil.rmtree(output)


@pytest.mark.compatibility("Reliability", "the example killed while it saves", note="the old adapter or the new one")
def test_the_example_killed_while_it_saves(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)  # as where a script is run
    script = runpy.run_path(str(SCRIPT))
    save = script["save"]
    monkeypatch.setitem(save.__globals__, "check_reload", lambda *arguments: "")  # has tests of its own, and is slow
    tokenizer = SimpleNamespace(save_pretrained=lambda folder: None)
    options, report = script["Options"](), SimpleNamespace(to_dict=dict)
    # As `prepare_folder` sees to, both have the configuration that the folder's run began with.
    models = [trained(tiny_opt(), **TARGETS), trained(tiny_opt(), **TARGETS)]
    with torch.no_grad():
        for name, parameter in models[1].named_parameters():
            if "lora_" in name:
                parameter *= 1.5
    expected = [model(TOKENS).logits for model in models]
    folder = tmp_path / "run"
    folder.mkdir()
    trainers = [SimpleNamespace(model=model, save_model=model.save_pretrained) for model in models]
    for _ in kills(
        [lambda trainer=trainer: save(trainer, tokenizer, {}, report, options, folder) for trainer in trainers]
    ):
        assert is_one_of(logits(folder), *expected)
