"""One function for many numbers, by several processes, with the results in their order."""

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, TypeVar

from recipe_runner.problems.errors import user_error
from recipe_runner.problems.problem import KeyPath

Result = TypeVar("Result")
QUOTA = Path("/sys/fs/cgroup/cpu.max")  # microseconds of CPU in each period of microseconds, of a container
AHEAD = 2  # results that may wait for their turn, for each worker: what bounds the memory
# A fork costs milliseconds and shares what is imported; a fresh process imports for seconds. Only Linux forks safely.
METHOD = "fork" if sys.platform == "linux" else "spawn"

_task: Callable[[int], Any] | None = None  # of a worker


def count_workers(asked: int | None) -> int:
    """How many processes prepare rows.

    Those asked for, but no more than there are cores for this process; else these cores, shared with the other
    processes of a launch on this machine.
    """
    cores, sharing = count_cores(), os.environ.get("LOCAL_WORLD_SIZE", "")
    return min(asked, cores) if asked else max(1, cores // max(1, int(sharing) if sharing.isdecimal() else 1))


def count_cores() -> int:
    """Cores that this process may use: by its affinity, and by the quota of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if QUOTA.exists():
        quota, period = QUOTA.read_text(encoding="ascii").split()
        cores = cores if quota == "max" else min(cores, max(1, int(quota) // int(period)))
    return cores


@contextlib.contextmanager
def work_in_order(
    task: Callable[[int], Result],
    numbers: Sequence[int],
    workers: int,
    method: str = METHOD,
    fix: str = "",
    path: KeyPath = (),
) -> Iterator[Iterator[Result]]:
    """The results of a function for some numbers, in their order; all workers end with the context.

    Args:
        task: The function.
        numbers: What it is called with.
        workers: Processes; with 1, this one does all.
        method: How they are started: see `multiprocessing.get_context`.
        fix: What to do where a worker was ended from outside.
        path: The key that is meant.

    Raises:
        UserError: A worker was ended from outside; or what the function raises, of the first number that fails.
    """
    workers = min(workers, len(numbers))
    if workers <= 1:
        yield map(task, numbers)
        return
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context(method), _begin, (task,))
    try:
        yield _collect(pool, numbers, workers * AHEAD)
    except BrokenProcessPool as error:
        message = f"one of the {workers} processes that shared the work was ended from outside"
        raise user_error("worker-ended", message, fix, path=path) from error
    finally:
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        pool.shutdown(cancel_futures=True)


def _collect(pool: ProcessPoolExecutor, numbers: Sequence[int], most: int) -> Iterator[Any]:
    waiting: deque[Future[Any]] = deque()
    for number in numbers:
        with _without_interrupts():  # which would end a worker that is being started with a traceback
            waiting.append(pool.submit(_work, number))
        if len(waiting) > most:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Lets Ctrl-C wait; a worker that is started here never gets it."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(task: Callable[[int], Any]) -> None:
    """Sets up a worker: Ctrl-C is left to the process that started it, and no worker outlives that one."""
    global _task
    _task = task
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.freeze()  # what the processes share stays untouched, and shared
    parent = multiprocessing.parent_process()
    assert parent
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


def _work(number: int) -> Any:
    assert _task
    return _task(number)
