"""Processes that prepare rows: how many, and how they end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROWS = 30_000  # prepared in seconds, so that there is time to interfere


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A text file of many lines."""
    file = tmp_path_factory.mktemp("texts") / "lines.txt"
    file.write_text("".join(f"line {number}: {'some words and more of them ' * 20}\n" for number in range(ROWS)))
    return file


@pytest.fixture
def preparing(small_recipe, texts, tmp_path):
    """Starts a preview of many rows with two workers, in a session of its own; returns it with its workers."""
    started = []

    def preparing():
        data = {"train": {"source": str(texts)}, "workers": 2}
        recipe = small_recipe("pretrain", dataset=data, training={"packing": False, "max_length": 2000})
        command = [sys.executable, "-m", "recipe_runner", "preview", str(recipe)]
        environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        process = subprocess.Popen(command, env=environment, preexec_fn=heed_ctrl_c, **options)
        started.append(process)
        began = time.monotonic()
        while len(workers := children(process.pid)) < 2:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() - began < 120
            time.sleep(0.02)
        return process, workers

    yield preparing
    for process in started:
        with process:  # which closes its pipes
            process.kill()


def heed_ctrl_c():
    """What a shell starts in the background ignores Ctrl-C, and so would what the tests start there."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def children(pid):
    """Process ids of a process's children."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for_end(workers):
    """Waits until none of some processes is left."""
    began = time.monotonic()
    while any(Path(f"/proc/{worker}").exists() and not is_zombie(worker) for worker in workers):
        assert time.monotonic() - began < 10, "a worker goes on"
        time.sleep(0.02)


def is_zombie(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def leftovers(folder):
    """What a preparation left in the store, but for lock files."""
    return [file.name for file in (folder / "home" / "recipe-runner" / "prepared").iterdir() if file.suffix != ".lock"]


def test_a_worker_that_is_killed_ends_the_run_and_leaves_nothing(preparing, tmp_path):
    process, workers = preparing()
    os.kill(workers[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "error[worker-ended] dataset.workers: one of the 2 processes that shared the work was ended" in errors
    assert "Traceback" not in errors
    wait_for_end(workers)
    assert leftovers(tmp_path) == []


def test_ctrl_c_ends_all_workers_at_once(preparing, tmp_path):
    process, workers = preparing()
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in errors
    wait_for_end(workers)
    assert leftovers(tmp_path) == []


def test_no_worker_outlives_a_run_that_is_killed(preparing):
    process, workers = preparing()
    process.kill()
    process.wait()
    wait_for_end(workers)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_results_come_in_order_and_the_first_failure_is_told(method):
    from recipe_runner.problems.errors import UserError
    from recipe_runner.workers import work_in_order

    with work_in_order(square, range(9), 3, method) as results:
        assert list(results) == [number**2 for number in range(9)]
    with work_in_order(square, range(10, 20), 2, method) as results:
        assert [next(results) for _ in range(3)] == [100, 121, 144]
        with pytest.raises(UserError, match="13") as caught:
            next(results)
    assert caught.value.problems[0].code == "odd"


def square(number):
    from recipe_runner.problems.errors import user_error

    if number > 12:
        raise user_error("odd", str(number))
    return number**2


def test_workers_are_the_cores_shared_among_the_processes_of_a_launch(monkeypatch, tmp_path):
    from recipe_runner import workers

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert workers.count_workers(None) == 8
    assert [workers.count_workers(asked) for asked in (1, 5, 99)] == [1, 5, 8]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert workers.count_workers(None) == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert workers.count_workers(None) == 1
    monkeypatch.setattr(workers, "QUOTA", tmp_path / "cpu.max")
    for quota, cores in (("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1)):
        (tmp_path / "cpu.max").write_text(f"{quota}\n")
        assert workers.count_cores() == cores
