"""What a run loads: packages that take a second to import wait until they are used."""

import subprocess
import sys

import pytest
from shared import LORA, NF4

RUN = """
import sys
from recipe_runner.cli import main
try:
    main()
finally:
    for name in ("bitsandbytes", "deepspeed"):
        print(name, any(module.startswith(f"{name}.") for module in sys.modules))
"""


@pytest.mark.parametrize("quantized", [False, True])
def test_what_is_not_used_is_not_loaded(small_recipe, quantized):
    """Neither bitsandbytes nor DeepSpeed, which PEFT and accelerate import wherever they are installed."""
    recipe = small_recipe(peft=LORA, quantization=NF4 if quantized else None, training={"max_steps": 1})
    done = subprocess.run([sys.executable, "-c", RUN, str(recipe)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Completed" in done.stdout
    assert f"bitsandbytes {quantized}\ndeepspeed False\n" in done.stdout
