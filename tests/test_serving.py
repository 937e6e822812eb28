"""The parts of the plugin for vLLM that can be tested without vLLM; the rest is in tests/serving."""

import importlib
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from spikelora.serving import plugin

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]


def test_the_entry_point_is_there():
    module, _, name = PROJECT["entry-points"]["vllm.general_plugins"]["spikelora"].partition(":")

    assert getattr(importlib.import_module(module), name) is plugin.register


@pytest.fixture
def vllm(monkeypatch):
    """A package of that name, as far as the plugin looks at it before a worker sets LoRA up."""

    class Platform:
        @classmethod
        def get_punica_wrapper(cls):
            return "a.name"

    package, platforms = ModuleType("vllm"), ModuleType("vllm.platforms")
    package.__version__ = "0.32.0"
    platforms.current_platform = Platform()
    monkeypatch.setitem(sys.modules, "vllm", package)
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    extra = PROJECT["optional-dependencies"]["vllm"]
    monkeypatch.setattr(plugin, "requires", lambda name: ["peft<1", *(f"{line}; extra == 'vllm'" for line in extra)])
    return package, Platform


def test_registering_twice_is_registering_once(vllm, monkeypatch):
    _, platform = vllm
    changes = ModuleType("spikelora.serving.changes")
    changes.calls = 0
    changes.change_vllm = lambda: setattr(changes, "calls", changes.calls + 1)
    monkeypatch.setitem(sys.modules, "spikelora.serving.changes", changes)
    monkeypatch.setattr(importlib.import_module("spikelora.serving"), "changes", changes, raising=False)

    plugin.register()
    plugin.register()

    assert changes.calls == 0  # nothing is changed, nor imported, before a worker asks
    assert platform.get_punica_wrapper() == "a.name"
    assert changes.calls == 1


@pytest.mark.parametrize("version", ["0.31.2", "0.33.0", "1.0.0rc1"])
def test_a_vllm_that_was_not_tested_is_left_alone(version, vllm, caplog):
    package, platform = vllm
    package.__version__ = version
    before = platform.__dict__["get_punica_wrapper"]

    plugin.register()

    assert platform.__dict__["get_punica_wrapper"] is before
    assert version in caplog.text
    assert "which refuses them" in caplog.text
