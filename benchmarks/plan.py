"""Times `recipe-run plan` beside a process that only imports torch, transformers and peft, in turn.

    python benchmarks/plan.py [--pairs 5] [RECIPE [ARGUMENT]...]

Prints the seconds of each pair, the median of what a plan takes beyond the imports, and its memory.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

IMPORTS = [sys.executable, "-c", "import torch, transformers, peft"]
SIZES = (["llama31_8b_chat_qlora"], ["llama31_8b_chat_qlora", "--gpu", "RTX-4090"], ["llama33_70b_chat_qlora"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    given, recipe = parser.parse_known_args()
    for arguments in [recipe] if recipe else [*SIZES, [*SIZES[2], "--gpu", "RTX-4090"]]:
        pairs = []
        for _ in range(given.pairs):
            runner = str(Path(sys.executable).with_name("recipe-run"))
            pairs.append((measure([runner, "plan", *arguments]), measure(IMPORTS)))
            print(f"plan {pairs[-1][0]:.2f} s, imports {pairs[-1][1]:.2f} s", flush=True)
        beyond = statistics.median(plan - imports for plan, imports in pairs)
        print(f"{' '.join(arguments)}: {beyond:+.2f} s beyond the imports (median of {given.pairs} pairs)")
    print(f"most memory of a process: {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20:.2f} GiB")


def measure(command: list[str]) -> float:
    """Seconds of a command."""
    begun = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
