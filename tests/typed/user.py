"""A user's program for type checkers: `test_types.py` has it checked, and nobody runs it.

`assert_type` fails if the package loses a type on its way to the user. Each `type: ignore` marks a mistake that a
checker has to find. If the checker finds none, it calls the comment unused.
"""

from collections.abc import Iterable, Mapping
from typing import Any, assert_type

import torch
from torch import nn

import spikelora
from spikelora import (
    Ledger,
    LoraApproximation,
    ModuleSparsity,
    Sparsity,
    SparsityCallback,
    SparsityControlCallback,
    SparsityMeter,
    SparsityReport,
    SpikeLoraConfig,
    SpikeLoraError,
    SpikeLoraModel,
    calibrate_thresholds,
    from_lora,
    operations,
    prune_ranks,
    to_lora,
)

Batches = Iterable[Mapping[str, Any]]


def configure() -> SpikeLoraConfig:
    config = SpikeLoraConfig(
        r=8,
        target_modules="all-linear",
        v_threshold=0.25,
        surrogate="straight_through",
        threshold_pattern={"q_proj": 0.5},
        target_sparsity=0.9,
    )
    assert_type(config.v_threshold, float)
    assert_type(config.threshold_pattern, dict[str, float])
    assert_type(config.target_sparsity, float | None)
    config.save_pretrained("adapter")
    assert_type(SpikeLoraConfig.from_pretrained("adapter"), SpikeLoraConfig)
    return config


def measure(model: nn.Module, x: torch.Tensor) -> SparsityReport:
    with SparsityMeter(model, training=False) as meter:
        model(x)
    report = meter.report()
    assert_type(report, SparsityReport)
    assert_type(report.sparsity, float)
    assert_type(report.modules, dict[str, ModuleSparsity])
    assert_type(report.kinds["q_proj"], Sparsity)
    assert_type(report.modules["q_proj"].firing_rates, tuple[float, ...])
    assert_type(report.to_dict(), dict[str, Any])
    return report


def account(model: nn.Module, report: SparsityReport) -> str:
    ledger = operations(model, report)
    assert_type(ledger, Ledger)
    assert_type(ledger.verdict, str)
    return ledger.verdict


def adapt(model: Any, batches: Batches) -> dict[str, float]:
    thresholds = calibrate_thresholds(model, batches, target_sparsity=0.9)
    assert_type(thresholds["q_proj"], float)
    assert_type(thresholds.rounds, int)
    assert_type(prune_ranks(model, batches), dict[str, int])
    from_lora(model, batches, target_sparsity=0.8)
    approximation = to_lora(model, batches)
    assert_type(approximation, LoraApproximation)
    assert_type(approximation.errors, dict[str, float])
    approximation.save_pretrained("as-lora")
    return thresholds


def train(trainer: Any) -> None:
    trainer.add_callback(SparsityCallback(trainer))
    trainer.add_callback(SparsityControlCallback(warmup_ratio=0.1))


def is_spiking(model: nn.Module) -> bool:
    try:
        SparsityMeter(model)
    except SpikeLoraError as error:
        assert_type(error.args, tuple[Any, ...])
        return False
    return isinstance(model, SpikeLoraModel)


def mistakes(model: nn.Module) -> None:
    SpikeLoraConfig(v_threshold="high")  # type: ignore
    SparsityMeter(model, adapters=1)  # type: ignore
    calibrate_thresholds(model)  # type: ignore
    spikelora.no_such_name()  # type: ignore
