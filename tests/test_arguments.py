"""A wrong argument of a public function ends in a `SpikeLoraError` that names it."""

import functools
import inspect

import numpy as np
import pytest
import torch
from conftest import spiking, tiny_opt
from peft import LoraConfig, get_peft_model
from torch import nn

import spikelora
from spikelora import (
    LoraApproximation,
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
    [{"input_ids": IDS, "attention_mask": IDS.ne(0).tolist()}],
    [{"input_ids": IDS, "attention_mask": IDS[:, :9].ne(0)}],
    [{"input_ids": IDS, "attention_mask": "text"}],
    [{"input_ids": IDS, "labels": IDS.tolist()}],
    [{"input_ids": IDS, "labels": ["text", "text"]}],
    [{3: IDS}],
    [{"input_ids": IDS.float()}],
    [{"input_ids": IDS + 1000}],
    [{"input_ids": torch.arange(3, 90)[None]}],
    [{"inputs_embeds": torch.ones(2, 14, 5)}],
    [{"attention_mask": IDS.ne(0)}],
]
NO_PATHS = [None, 3, ["folder"]]
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
    (operations, "tokens_per_pass"): [None, 0, 1.0, True, "1", 10**400],
    (operations, "weight_pj"): [None, -1, "1", True, float("nan"), float("inf"), 10**400, 1e306],
    (operations, "activation_pj"): [None, -1, "1", True, float("nan"), float("inf"), 10**400, 1e306],
    (SparsityMeter, "model"): NO_MODELS,
    (SparsityMeter, "training"): [
        "yes",
        2,
        [],
        0,
        1,
        1.0,
        np.True_,
        torch.tensor(True),
        torch.tensor([1, 2]),
        np.array([1, 2]),
    ],
    (SparsityMeter, "adapters"): [
        "other",
        ["default", "other"],
        3,
        [],
        "",
        [["default"]],
        [None],
        torch.tensor(1),
        torch.tensor([1, 2]),
    ],
    (SparsityCallback, "trainer"): [None, "trainer", nn.Linear(2, 2)],
    (SparsityControlCallback, "warmup_ratio"): [None, -0.1, 1.1, "0.1", True, float("nan")],
    (SparsityControlCallback, "gain"): [None, 0, 1.1, "0.1", True, float("nan")],
    (SpikeLoraConfig, "v_threshold"): [None, "0.1", True, float("nan"), float("inf")],
    (SpikeLoraConfig, "tau"): [None, "2", True, 1, 0, float("nan")],
    (SpikeLoraConfig, "surrogate"): [None, "step", 1],
    (SpikeLoraConfig, "surrogate_alpha"): [None, "2", True, 0, -1, float("nan")],
    (SpikeLoraConfig, "learn_threshold"): [None, "yes", 1],
    (SpikeLoraConfig, "learn_tau"): [None, "yes", 1],
    (SpikeLoraConfig, "threshold_pattern"): [["fc1"], {"fc1": "0.1"}, {"(": 0.1}, {"fc1": None}, 0, False, "", []],
    (SpikeLoraConfig, "target_sparsity"): ["0.9", True, 0, 1],
    (SpikeLoraConfig, "target_scope"): [None, "model", 1],
    (SpikeLoraConfig, "target_tolerance"): [None, "0.1", 0, 1],
    (SpikeLoraConfig.save_pretrained, "save_directory"): NO_PATHS,
    (SpikeLoraConfig.from_pretrained, "pretrained_model_name_or_path"): NO_PATHS,
    (SpikeLoraConfig.from_pretrained, "subfolder"): [0, 3, ["folder"]],
    (SpikeLoraConfig.check_folder, "name_or_path"): NO_PATHS,
    (SpikeLoraConfig.check_folder, "subfolder"): [0, 3, ["folder"]],
    (SpikeLoraConfig.check_folder, "needed"): [None, "yes", 1],
    (LoraApproximation.save_pretrained, "folder"): NO_PATHS,
}
CASES = [
    pytest.param(*key, value, id=f"{key[0].__qualname__} {key[1]} {n}")
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
    if function == SpikeLoraConfig.from_pretrained:
        return {"pretrained_model_name_or_path": "folder"}
    if function in (SpikeLoraConfig.save_pretrained, SpikeLoraConfig.check_folder):
        return {"self": SpikeLoraConfig(), "name_or_path": "folder"}
    model = spiking(tiny_opt())
    if function is LoraApproximation.save_pretrained:
        return {"self": to_lora(model, BATCHES)}
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


class _Net(nn.Module):
    def __init__(self, error=None):
        super().__init__()
        self.layer, self.error = nn.Linear(4, 4), error

    def forward(self, x, y):
        if self.error is not None and len(x) == 3:
            raise self.error
        return self.layer(x) + y


@pytest.mark.parametrize(
    ("batch", "entries", "cause"),
    [
        ({"x": torch.ones(3, 4)}, "`x` as torch.float32 (3, 4)", "TypeError: _Net.forward() missing 1 required"),
        ({"y": 1, "z": None}, "`y` as int, `z` as NoneType", "TypeError: _Net.forward() got an unexpected"),
        ({"x": torch.ones(3, 5), "y": 1}, "`x` as torch.float32 (3, 5), `y` as int", "RuntimeError: mat1 and mat2"),
        ({}, "none", "TypeError: _Net.forward() missing 2 required"),
    ],
)
def test_the_batch_that_cannot_be_run_is_named_with_its_entries(batch, entries, cause):
    model = spiking(_Net(), target_modules=["layer"])
    with pytest.raises(SpikeLoraError) as caught:
        calibrate_thresholds(model, [{"x": torch.randn(30, 4), "y": 1}, batch])
    assert str(caught.value).startswith(
        f"The model could not be run with batch 2 of `batches`, whose entries are {entries} ({cause}"
    )
    assert cause.startswith(type(caught.value.__cause__).__name__)


@pytest.mark.parametrize("error", [KeyError("name"), AssertionError(), AttributeError("of the model's own code")])
def test_an_error_of_the_model_is_kept_as_the_cause(error):
    model = spiking(_Net(error), target_modules=["layer"])
    with pytest.raises(SpikeLoraError, match=f"could not be run with batch 1.*{type(error).__name__}") as caught:
        calibrate_thresholds(model, [{"x": torch.randn(3, 4), "y": 1}])
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error", [torch.cuda.OutOfMemoryError("full"), SpikeLoraError("of a layer"), KeyboardInterrupt()]
)
def test_what_is_no_fault_of_a_batch_passes_as_it_is(error):
    model = spiking(_Net(error), target_modules=["layer"])
    with pytest.raises(type(error)) as caught:
        calibrate_thresholds(model, [{"x": torch.randn(3, 4), "y": 1}])
    assert caught.value is error


def methods():
    """The methods of public classes that users call with arguments; the others are PEFT's, or for the Trainer."""
    for name in set(spikelora.__all__) - {"SpikeLoraModel", "SparsityCallback", "SparsityControlCallback"}:
        cls = getattr(spikelora, name)
        for method in vars(cls) if inspect.isclass(cls) else ():
            function = getattr(cls, method)
            if not method.startswith("_") and inspect.isroutine(function) and arguments_of(function):
                yield function


def arguments_of(function):
    parameters = inspect.signature(function).parameters
    return {name for name, p in parameters.items() if name != "self" and p.kind is not p.VAR_KEYWORD}


def test_every_argument_of_ours_is_in_the_table():
    listed = {}
    for function, argument in TABLE:
        listed.setdefault(function, set()).add(argument)
    own = set(inspect.signature(SpikeLoraConfig).parameters) - set(inspect.signature(LoraConfig).parameters)
    for function, arguments in listed.items():
        expected = own if function is SpikeLoraConfig else arguments_of(function)
        assert arguments == expected, function.__qualname__
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
    public = {getattr(spikelora, name) for name in set(spikelora.__all__) - others}
    assert set(listed) == public | set(methods())
