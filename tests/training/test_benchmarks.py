"""The benchmark for a GPU, on a CPU with two narrow layers: the same way as with a whole model."""

import os
import subprocess
import sys
from pathlib import Path

GPU = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "gpu.py"


def test_the_runner_and_a_plain_script_have_the_same_losses():
    command = [sys.executable, str(GPU), "speed", "--tiny", "--steps", "3", "--only", "chat, as shipped"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines() if "chat" in line
    ]
    assert [row[1] for row in rows] == ["recipe", "trl"], done.stdout
    (first, second) = (row[-1].split() for row in rows)
    assert first == second
    assert all(float(row[2].replace(",", "")) > 0 for row in rows)
