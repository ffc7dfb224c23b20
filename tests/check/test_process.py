"""What a process sets for itself before the training stack is imported."""

import os
import subprocess
import sys

import pytest

from recipe_runner.launch.process import SPIN_COUNT


@pytest.mark.parametrize(
    ("set_before", "on_cpu", "expected"),
    [
        ({}, True, SPIN_COUNT),
        ({"GOMP_SPINCOUNT": "7"}, True, "7"),  # the person's own value
        ({"OMP_WAIT_POLICY": "ACTIVE"}, True, ""),  # also decides on it
        ({}, False, ""),  # a machine with an accelerator
    ],
)
def test_threads_give_their_core_away_soon_on_a_cpu_unless_the_person_decided(set_before, on_cpu, expected):
    code = (
        "import os, sys\nfrom recipe_runner.launch import process\n"
        "process.has_accelerator = lambda: True\n"
        f"process.set_up_process(on_cpu={on_cpu})\n"
        "assert 'torch' not in sys.modules\n"
        "print(os.environ.get('GOMP_SPINCOUNT', ''))"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "ACCELERATE"))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=kept | set_before)
    assert (done.stdout.strip(), done.stderr) == (expected, "")
