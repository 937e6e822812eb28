"""Two processes: sparsity is that of both, and thresholds stay the same in both."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
METER = """
model = by_hand()
with SparsityMeter(model) as meter:
    if rank == 0:  # the other has nothing to do
        model(X)
    model(X[:1])
report = meter.report()
print(json.dumps([report.tokens, report.sparsity, report.modules["0"].firing_rates]))
"""
CONTROL = """
from test_callbacks import SparsityCallback, SparsityControlCallback, gates, make_trainer, spiking
model = spiking(target_sparsity=0.9, target_tolerance=0.5)
trainer = make_trainer(folder, model, [SparsityControlCallback()], ddp_backend="gloo", use_cpu=True)
trainer.add_callback(SparsityCallback(trainer))
trainer.train()
sparsity = [logs["sparsity"] for logs in trainer.state.log_history if "sparsity" in logs]
print(json.dumps([[gated.gate.v_threshold.item() for gated in gates(model)], sparsity]))
"""


def in_two_processes(code, folder):
    """What each process prints, as JSON, in its last line."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    start = (
        "import json, os, sys, torch\n"
        f"sys.path.insert(0, {str(TESTS)!r})\n"
        f"rank, folder = int(os.environ['RANK']), {str(folder)!r}\n"
        "torch.distributed.init_process_group('gloo')\n"
        "from test_sparsity import X, SparsityMeter, by_hand\n"
    )
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", start + code],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    printed = [process.communicate(timeout=300) for process in processes]
    assert all(process.returncode == 0 for process in processes), [error[-2000:] for _, error in printed]
    return [json.loads(output.splitlines()[-1]) for output, _ in printed]


def test_the_meter_adds_up_all_processes(tmp_path):
    first, second = in_two_processes(METER, tmp_path)

    # All rows of X in one process, and the first row, which has one spike, in both.
    assert first == second == [4 + 1 + 1, pytest.approx(1 - 5 / 18), [4 / 6, 1 / 6, 0.0]]


def test_control_keeps_the_thresholds_alike_and_the_callback_logs_one_sparsity(tmp_path):
    first, second = in_two_processes(CONTROL, tmp_path)

    assert first == second
    thresholds, logged = first
    assert len(set(thresholds)) == len(thresholds) == 12
    assert len(logged) == 2
