"""What comes after training, measured on SmolLM2-135M: batched answers, and a merge's time and memory.

    python benchmarks/results.py generate [--pairs 3] [--model FOLDER]
    python benchmarks/results.py merge RUN

`generate` answers the held-out tickets one by one and in batches of 10, in turn, with 40 tokens each, and compares
tokens a second. `merge` merges a run in a process of its own, and prints seconds and the most memory of its own
(anonymous pages, every 20 ms) beyond what it had before the model was loaded, beside the size of the base's weights.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
ROWS = ROOT / "recipes" / "data" / "tickets_heldout.jsonl"
TOKENS = 40


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ways = arguments.add_subparsers(dest="way", required=True)
    generating = ways.add_parser("generate")
    generating.add_argument("--pairs", type=int, default=3)
    generating.add_argument("--model", type=Path, default=MODEL)
    merging = ways.add_parser("merge")
    merging.add_argument("run")
    merging.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.way == "generate":
        compare_batches(options.model, options.pairs)
    elif options.worker:
        merge(options.run)
    else:
        command = [sys.executable, __file__, "merge", options.run, "--worker"]
        sys.exit(subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}).returncode)


def compare_batches(folder: Path, pairs: int) -> None:
    import torch

    from recipe_runner.launch.process import set_up_process

    set_up_process()
    from recipe_runner.data.prompts import render_prompt
    from recipe_runner.model.answers import GREEDY, answer_all
    from recipe_runner.model.load import load_result

    gpu = torch.cuda.is_available()
    place: dict[str, Any] = {"dtype": "bfloat16", "device_map": {"": 0}} if gpu else {"dtype": "float32"}
    model, tokenizer = load_result(folder, **place)
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    prompts = [
        render_prompt([{"role": "user", "content": f"{row['instruction']}\n\n{row['input']}"}], tokenizer)
        for row in rows
    ]
    options: dict[str, Any] = GREEDY | {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS}
    ratios = []
    for number in range(1, pairs + 1):
        speeds = {}
        for size in (1, 10):
            began = time.monotonic()
            answers = answer_all(model, tokenizer, prompts, size, **options)
            speeds[size] = len(answers) * TOKENS / (time.monotonic() - began)
        ratios.append(speeds[10] / speeds[1])
        print(f"pair {number}: one by one {speeds[1]:.1f}, in tens {speeds[10]:.1f} tokens a second", flush=True)
    print(f"median ratio of pairs: {statistics.median(ratios):.2f}")


def merge(run: str) -> None:
    from recipe_runner.launch.process import set_up_process

    set_up_process(on_cpu=True)
    from recipe_runner.results.merging import merge
    from recipe_runner.results.target import find_target

    target = find_target(run)
    before, peak, done = own_memory(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        made = merge(target, Path(folder) / "merged", None, True, None)
    seconds = time.monotonic() - began
    done.set()
    watcher.join()
    size = sum(file.stat().st_size for file in Path(target.base).glob("*.safetensors"))
    print(f"merged in {seconds:.1f} s ({made.dtype}; largest logit difference {made.difference:.2g})")
    taken = peak - before
    told = f"memory {taken / 1e6:,.0f} MB, the base's weights {size / 1e6:,.0f} MB"
    print(f"{told}: {taken / size:.2f} times")


def own_memory() -> int:
    """Bytes of this process that no file backs."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))


if __name__ == "__main__":
    main()
