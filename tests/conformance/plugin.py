"""A plugin of pytest: runs PEFT's tests with LoRA, or with SpikeLoRA in its place, and records each outcome.

In LoRA's place means that `from peft import LoraConfig` gives PEFT's tests `SpikeLoraConfig`; PEFT itself, which takes
its classes from elsewhere, is left as it is. One line of JSON is written for each test, see `_Recorder.outcome`.
"""

import contextlib
import functools
import importlib
import json
import traceback
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import peft
import PIL.Image
import pytest
import transformers
from peft import LoraConfig, PeftConfig, auto
from peft.tuners.lora import LoraLayer
from peft.utils import save_and_load

# What stands for LoRA, in a test's parameters and in its body.
_lora: set[type[PeftConfig]] = {LoraConfig}
_QUOTES = [f"Quote {number}: be the change that you wish to see in the world." for number in range(32)]


def pytest_addoption(parser):
    group = parser.getgroup("conformance")
    group.addoption("--method", choices=("lora", "spikelora"), required=True, help="what LoraConfig stands for")
    group.addoption("--outcomes", type=Path, required=True, help="where to write the outcomes, as lines of JSON")
    group.addoption("--cases", type=Path, help="run only the tests in this file, one name per line")


def pytest_configure(config):
    recorder = _Recorder(config.option.outcomes)
    config.pluginmanager.register(recorder, "conformance-recorder")
    if config.option.method == "spikelora":
        recorder.substitute()
    # Offline, PEFT does not look at all.
    auto.check_file_exists_on_hf_hub = save_and_load.check_file_exists_on_hf_hub = _is_there
    # PEFT's helper goes online for what it has not seen yet. It comes before the tests, which import it by name.
    helpers = importlib.import_module("tests.testing_utils")
    helpers.hub_online_once = lambda model_id: contextlib.nullcontext()
    helpers.load_dataset_english_quotes = lambda: datasets.DatasetDict(
        train=datasets.Dataset.from_dict({"quote": _QUOTES})
    )
    helpers.load_cat_image = lambda: PIL.Image.effect_noise((64, 64), 64).convert("RGB")


def _is_there(repo_id: str, filename: str, revision: str | None = None, **kwargs: Any) -> bool:
    try:
        return isinstance(huggingface_hub.try_to_load_from_cache(repo_id, filename, revision=revision), str)
    except huggingface_hub.errors.HFValidationError:  # a folder
        return False


def pytest_make_parametrize_id(val):
    # The names of the tests are to be the same with either method.
    return "LoraConfig" if isinstance(val, type) and val in _lora else None


def pytest_collection_modifyitems(config, items):
    cases = config.option.cases and set(config.option.cases.read_text().splitlines())
    chosen = [item for item in items if (item.nodeid in cases if cases else _may_be_lora(item))]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = chosen


def _may_be_lora(item: pytest.Item) -> bool:
    """Whether no other method's configuration is what a test is parametrised with."""
    methods = _methods(item)
    return not methods or not methods.isdisjoint(_lora)


def _methods(item: pytest.Item) -> set[type[PeftConfig]]:
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    classes = (value if isinstance(value, type) else type(value) for value in values)
    return {c for c in classes if issubclass(c, PeftConfig)}


class _Recorder:
    """Counts, for each test, configurations, adapters and gates, and keeps our errors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.configs = self.adapters = self.gates = self.depth = 0
        self.errors: list[str] = []
        self.refusal: tuple[type[Exception], ...] = ()
        self.outcome: dict[str, Any] = {}
        _after(LoraConfig, "__post_init__", self._made_config)
        for layer in _subclasses(LoraLayer):
            if "update_layer" in vars(layer):
                self._count_adapters(layer)

    def substitute(self) -> None:
        """Put SpikeLoRA in LoRA's place; the package is not even imported where LoRA keeps it."""
        import spikelora
        from spikelora.method.gate import SpikeGate

        peft.LoraConfig, peft.LoraModel = spikelora.SpikeLoraConfig, spikelora.SpikeLoraModel
        _lora.clear()  # a LoraConfig that is still made comes from PEFT itself
        _lora.add(spikelora.SpikeLoraConfig)
        self.refusal = (spikelora.SpikeLoraError,)
        _after(SpikeGate, "__init__", self._made_gate)
        _after(spikelora.SpikeLoraError, "__init__", lambda error, *args: self.errors.append(str(error)))

    def _made_config(self, config: LoraConfig) -> None:
        self.configs += type(config) in _lora

    def _made_gate(self, *args: Any, **kwargs: Any) -> None:
        self.gates += 1

    def _count_adapters(self, layer: type[LoraLayer]) -> None:
        update_layer = layer.update_layer

        @functools.wraps(update_layer)
        def counting(*args, **kwargs):
            self.depth += 1  # a layer may call the one that it inherits
            try:
                result = update_layer(*args, **kwargs)
            finally:
                self.depth -= 1
            self.adapters += self.depth == 0
            return result

        layer.update_layer = counting

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.configs = not _methods(item).isdisjoint(_lora)
        self.adapters = self.gates = self.depth = 0
        self.errors.clear()
        transformers.set_seed(0)  # most tests leave the weights to chance, and a gate that stays silent with it
        self.outcome = {"test": item.nodeid, "outcome": "passed", "error": "", "refused": ""}
        result = yield
        counts = {"lora": bool(self.configs), "adapters": self.adapters, "gates": self.gates, "errors": self.errors}
        with self.path.open("a") as file:
            file.write(json.dumps(self.outcome | counts) + "\n")
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if not report.passed:
            self.outcome["outcome"] = report.outcome
            error = call.excinfo.value if call.excinfo else None
            self.outcome["error"] = f"{type(error).__name__}: {error}"[:1000]
            self.outcome["where"] = _line(error, item.path)
            self.outcome["refused"] = next((str(e) for e in _causes(error) if isinstance(e, self.refusal)), "")
        return report


def _line(error: BaseException | None, path: Path) -> int:
    """The last line of a file that an exception came through, 0 where there is none."""
    frames = traceback.walk_tb(error.__traceback__ if error else None)
    return max((line for frame, line in frames if Path(frame.f_code.co_filename) == path), default=0)


def _after(owner: type, name: str, do: Any) -> None:
    """Let a method of a class be followed by a function with its arguments."""
    method = getattr(owner, name)

    @functools.wraps(method)
    def wrapped(self, *args, **kwargs):
        method(self, *args, **kwargs)
        do(self, *args, **kwargs)

    setattr(owner, name, wrapped)


def _subclasses(cls: type) -> set[type]:
    return {cls}.union(*(_subclasses(subclass) for subclass in cls.__subclasses__()))


def _causes(error: BaseException | None) -> list[BaseException]:
    """An exception and what it was raised from, or while that was being handled."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain
