"""Running the pending runs of a study, one or several at once; other processes may work on the same folder."""

import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from itertools import cycle, islice
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from . import models
from .store import Store
from .study import Run, Study, StudyError
from .tasks import TASKS, TaskError
from .train import processes, train, versions

ROOT = Path(__file__).resolve().parents[1]


def prepare(study: Study, runs: list[Run], store: Store) -> None:
    """Check the results, and what some runs of a study need, before anything runs; reading has checked the study.

    Raises:
        StudyError: with the line of the study, of the results or of the data.
    """
    store.check()
    n = processes().num_processes
    if any(run.batch_size % n for run in runs):
        raise StudyError(
            f"{study.path}: `batch_size` is of all {n} processes together, and cannot be shared out to them"
        )
    for task, with_test in dict.fromkeys((run.task, bool(run.test)) for run in runs):
        try:
            TASKS[task].load(with_test)
        except TaskError as error:
            raise StudyError(f"{study.where('task')}: the task `{task}` cannot be used: {error}") from error
    for model, task in dict.fromkeys((run.model, run.task) for run in runs):
        try:
            models.check(model, TASKS[task])
        except models.ModelError as error:
            raise StudyError(f"{study.where('model')}: {error}") from error


def run_pending(runs: list[Run], store: Store, workers: int, retry: bool) -> Counter[str]:
    """Train the runs that have no result. Returns how many were `done`, `failed`, `there` or trained `elsewhere`."""
    # If several processes train together, the first decides run by run, as results may come from elsewhere meanwhile.
    together = processes().num_processes > 1
    pending = [run for run in runs if together or store.is_pending(run, retry)]
    outcomes = Counter(there=len(runs) - len(pending))
    with tqdm(total=len(pending), unit="run", disable=None if processes().is_main_process else True) as bar:
        for outcome in _outcomes(pending, store, 1 if together else min(workers, len(pending)), retry):
            outcomes[outcome] += 1
            bar.set_postfix({name: outcomes[name] for name in ("failed", "elsewhere") if outcomes[name]}, refresh=False)
            bar.update()
    return outcomes


def _outcomes(runs: list[Run], store: Store, workers: int, retry: bool) -> Iterator[str]:
    if workers <= 1:
        yield from (run_one(run, store, retry, bar=True) for run in runs)
        return
    pool = worker_pool(workers)
    try:
        for future in as_completed([pool.submit(run_one, run, store, retry) for run in runs]):
            yield future.result()
    except BrokenProcessPool as error:
        raise StudyError(
            "A worker was killed, as systems do that run out of memory. What was finished is kept: run the study "
            "again, perhaps with fewer --workers."
        ) from error
    except BaseException:  # such as an interruption: do not wait for the runs in training
        for worker in multiprocessing.active_children():
            worker.kill()
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def worker_pool(workers: int) -> ProcessPoolExecutor:
    """Processes of one thread each, which take the visible GPUs in turn."""
    # For libraries that read it when they are imported; one process imports them for all workers.
    os.environ["OMP_NUM_THREADS"] = "1"
    # A process that has begun to use CUDA cannot be forked. Imports may ask whether there is a GPU; with this variable
    # torch answers without CUDA.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    gpus = context.SimpleQueue()
    for gpu in islice(cycle(_visible_gpus()), workers):
        gpus.put(gpu)
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker, initargs=(gpus,))


def _visible_gpus() -> list[str]:
    """The GPUs as `CUDA_VISIBLE_DEVICES` names them, perhaps by UUID; without it by number."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(n) for n in range(count)]


def _begin_worker(gpus: "SimpleQueue[str]") -> None:
    """Let a worker see one GPU, and end with its parent; otherwise it would wait for ever and hold its claim.

    An interruption from the keyboard also reaches workers. They ignore it, and their parent ends them.
    """
    if not gpus.empty():
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus.get()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tqdm.set_lock(threading.RLock())  # tqdm's own is one for all processes: a killed one would leave it locked

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_one(run: Run, store: Store, retry: bool, bar: bool = False) -> str:
    """Train one run and record its result or error, unless it has a result or another process is training it.

    Under `accelerate launch` the first process claims and records, and all train.
    """
    state = processes()
    with store.claim(run) if state.is_main_process else nullcontext(True) as is_mine:
        verdict = ["elsewhere" if not is_mine else "" if store.is_pending(run, retry) else "there"]
        if state.num_processes > 1:
            broadcast_object_list(verdict)
        if verdict[0]:
            return verdict[0]
        try:
            line = train(run, bar)
            if state.is_main_process:
                store.put(run, line)
            return "done"
        except Exception as error:  # whatever it is: the other runs go on, and this one can be retried
            if state.is_main_process:
                text = f"{type(error).__name__}: {error}".replace(str(ROOT), ".")[:1000]
                store.put(run, {"status": "failed", "error": text, "versions": versions(), "where": {}})
            if state.num_processes > 1:  # the others would wait for this one; now the launcher ends them all
                raise
            return "failed"
