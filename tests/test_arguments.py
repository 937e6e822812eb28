"""A wrong argument of a public function ends in a `SpikeLoraError` that names it."""

import functools
import inspect

import pytest
import torch
from conftest import spiking, tiny_opt
from peft import LoraConfig, get_peft_model
from torch import nn

import spikelora
from spikelora import (
    SparsityCallback,
    SparsityControlCallback,
    SparsityMeter,
    SpikeLoraConfig,
    SpikeLoraError,
    calibrate_thresholds,
    from_lora,
    operations,
    prune_ranks,
    to_lora,
)

IDS = torch.arange(3, 31).view(2, 14)
BATCHES = [{"input_ids": IDS}]
NO_MODELS = [None, "opt-125m", 3, {}, [nn.Linear(2, 2)]]
NO_BATCHES = [
    None,
    3,
    "text",
    {"input_ids": IDS},
    [],
    [IDS],
    ["text"],
    [None],
    [{}],
    [{"input_ids": IDS.tolist()}],
    [{"input_ids": "text"}],
    [{"ids": IDS}],
]
NO_SHARES = [None, "0.9", True, 0, 1, float("nan"), [0.9]]
# By function and argument the values that it has to refuse.
TABLE = {
    (calibrate_thresholds, "model"): NO_MODELS,
    (calibrate_thresholds, "batches"): NO_BATCHES,
    (calibrate_thresholds, "target_sparsity"): NO_SHARES,
    (calibrate_thresholds, "target_scope"): [None, "model", 1],
    (prune_ranks, "model"): NO_MODELS,
    (prune_ranks, "batches"): NO_BATCHES,
    (to_lora, "model"): NO_MODELS,
    (to_lora, "batches"): NO_BATCHES,
    (from_lora, "model"): NO_MODELS,
    (from_lora, "batches"): NO_BATCHES,
    (from_lora, "target_sparsity"): NO_SHARES,
    (operations, "model"): NO_MODELS,
    (operations, "report"): [None, {}, 0.9, "sparsity.json"],
    (operations, "tokens_per_pass"): [None, 0, 1.0, True, "1"],
    (operations, "weight_pj"): [None, -1, "1", True, float("nan"), float("inf")],
    (operations, "activation_pj"): [None, -1, "1", True, float("nan"), float("inf")],
    (SparsityMeter, "model"): NO_MODELS,
    (SparsityMeter, "training"): ["yes", 2, []],
    (SparsityMeter, "adapters"): ["other", ["default", "other"], 3],
    (SparsityCallback, "trainer"): [None, "trainer", nn.Linear(2, 2)],
    (SparsityControlCallback, "warmup_ratio"): [None, -0.1, 1.1, "0.1", True, float("nan")],
    (SparsityControlCallback, "gain"): [None, 0, 1.1, "0.1", True, float("nan")],
    (SpikeLoraConfig, "v_threshold"): [None, "0.1", True, float("nan"), float("inf")],
    (SpikeLoraConfig, "tau"): [None, "2", True, 1, 0, float("nan")],
    (SpikeLoraConfig, "surrogate"): [None, "step", 1],
    (SpikeLoraConfig, "surrogate_alpha"): [None, "2", True, 0, -1, float("nan")],
    (SpikeLoraConfig, "learn_threshold"): [None, "yes", 1],
    (SpikeLoraConfig, "learn_tau"): [None, "yes", 1],
    (SpikeLoraConfig, "threshold_pattern"): [["fc1"], {"fc1": "0.1"}, {"(": 0.1}, {"fc1": None}],
    (SpikeLoraConfig, "target_sparsity"): ["0.9", True, 0, 1],
    (SpikeLoraConfig, "target_scope"): [None, "model", 1],
    (SpikeLoraConfig, "target_tolerance"): [None, "0.1", 0, 1],
}
CASES = [
    pytest.param(*key, value, id=f"{key[0].__name__} {key[1]} {n}")
    for key in TABLE
    for n, value in enumerate(TABLE[key])
]


@functools.cache
def right(function):
    """Arguments that a function takes; no test changes them."""
    if function in (SpikeLoraConfig, SparsityControlCallback, SparsityCallback):
        return {}
    if function is from_lora:
        return {"model": get_peft_model(tiny_opt(), LoraConfig(r=2, target_modules="all-linear")), "batches": BATCHES}
    model = spiking(tiny_opt())
    if function is SparsityMeter:
        return {"model": model}
    if function is operations:
        with SparsityMeter(model) as meter:
            model(IDS)
        return {"model": model, "report": meter.report()}
    return {"model": model, "batches": BATCHES}


@pytest.mark.filterwarnings("ignore:.*attention_mask")
@pytest.mark.parametrize(("function", "argument", "value"), CASES)
def test_a_wrong_value_is_named(function, argument, value):
    arguments = right(function) | {argument: value}
    model = arguments.get("model")
    state = {name: t.clone() for name, t in model.state_dict().items()} if isinstance(model, nn.Module) else {}
    with pytest.raises(SpikeLoraError, match="adapter" if argument == "model" else argument) as caught:
        function(**arguments)
    assert argument != "model" or type(value).__name__ in str(caught.value)
    assert all(torch.equal(model.state_dict()[name], t) for name, t in state.items())


@pytest.mark.parametrize("function", [calibrate_thresholds, prune_ranks, to_lora, from_lora, operations, SparsityMeter])
def test_a_model_without_an_adapter_is_named(function):
    with pytest.raises(SpikeLoraError, match="This Linear has no"):
        function(**right(function) | {"model": nn.Linear(2, 2)})


def test_every_argument_of_ours_is_in_the_table():
    listed = {}
    for function, argument in TABLE:
        listed.setdefault(function, set()).add(argument)
    own = set(inspect.signature(SpikeLoraConfig).parameters) - set(inspect.signature(LoraConfig).parameters)
    for function, arguments in listed.items():
        expected = own if function is SpikeLoraConfig else set(inspect.signature(function).parameters)
        assert arguments == expected, function.__name__
    # What is given back, raised, or made by PEFT with what `LoraModel` takes.
    others = {
        "Ledger",
        "LoraApproximation",
        "ModuleSparsity",
        "Sparsity",
        "SparsityReport",
        "SpikeLoraError",
        "SpikeLoraModel",
    }
    assert {function.__name__ for function in listed} == set(spikelora.__all__) - others
