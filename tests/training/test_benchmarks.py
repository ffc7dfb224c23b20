"""The benchmark for a GPU, on a CPU with two narrow layers: the same way as with a whole model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

GPU = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "gpu.py"


def run(*arguments):
    """The table's rows: set-up, by, tokens/s, MFU, allocated, reserved, first and last loss, what is said beside."""
    command = [sys.executable, str(GPU), *arguments, "--tiny", "--steps", "3"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_runner_and_a_plain_script_have_the_same_losses():
    rows = run("speed", "--only", "chat, as shipped")
    assert [row[1] for row in rows] == ["recipe", "trl"]
    ours, plain = ([float(loss) for loss in row[6].split()] for row in rows)
    assert ours == pytest.approx(plain, rel=1e-4)
    assert all(float(row[2].replace(",", "")) > 0 for row in rows)


def test_the_trial_of_the_longest_batch_is_timed_and_leaves_the_same_weights():
    rows = run("first", "--only", "LoRA r 64")
    assert [row[1] for row in rows] == ["with", "without"]
    (tried, plain) = (row[7].split("; ") for row in rows)
    assert tried[1] == plain[1]
    assert tried[1].startswith("weights ")
    assert tried[2].startswith("tried in ")
    assert len(plain) == 2
