"""Reads a million rows of a stream as a run does, and says how fast, and with how much memory.

    python benchmarks/stream.py [--rows 1000000] [--folder FOLDER]

A .jsonl file is written (150 MB), then read by the reader of a run, in batches of 8 by PyTorch's data loader; then a
reader begins where one was in the middle, as a run does that is resumed.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORDS = [f"word{number}" for number in range(40)]
RECIPE = """
schema_version: 1
name: stream
description: Read only.
stage: sft
model: {{name_or_path: {model}}}
peft: {{method: lora, r: 4, lora_alpha: 8, target_modules: all-linear}}
dataset:
  format: instruction
  train: {{source: {data}, columns: {{instruction: question, output: answer}}}}
  on_overlong: truncate
  streaming: true
training: {{learning_rate: 1e-4, max_steps: 1000, per_device_train_batch_size: 8, max_length: 256, use_cpu: true}}
run: {{output_dir: runs, seed: 1}}
metadata: {{task: instruct, license: MIT, data_license: MIT, hardware: a CPU}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.read:
        read(given.read, given.rows)
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        data, recipe = Path(folder) / "rows.jsonl", Path(folder) / "stream.yaml"
        chance = random.Random(0)
        with data.open("w") as stream:
            for number in range(given.rows):
                question = f"{number}: {' '.join(chance.choices(WORDS, k=20))}"
                stream.write(json.dumps({"question": question, "answer": " ".join(chance.choices(WORDS, k=5))}) + "\n")
        recipe.write_text(RECIPE.format(model=ROOT / "models" / "SmolLM2-135M-Instruct", data=data))
        subprocess.run([sys.executable, __file__, "--read", str(recipe), "--rows", str(given.rows)], check=True)


def read(recipe_file: Path, rows: int) -> None:
    """Reads as many rows as there are, and some again from the middle."""
    from torch.utils.data import DataLoader

    from recipe_runner.data.stream import Position, Reader, stream
    from recipe_runner.recipe.resolve import load_recipe
    from recipe_runner.training.prepare import prepare

    prepared = prepare(load_recipe(str(recipe_file)), None)
    features = prepared.train.dataset.features
    reader = Reader(prepared.job, 0, 1, prepared.known, False, Position(), 0)
    before, began, seen, middle = memory(), time.monotonic(), 0, None
    for batch in DataLoader(stream([reader], features), batch_size=8, collate_fn=list):
        seen += len(batch)
        if seen == rows // 2 // 8 * 8:
            middle, following = reader.find(seen), None
        elif middle and following is None:
            following = batch
        if seen >= rows:
            break
    seconds = time.monotonic() - began
    print(f"{seen:,} rows in {seconds:.0f} s: {seen / seconds:,.0f} rows a second; {reader.now.describe()}")
    print(f"most memory: {memory():.2f} GiB, {memory() - before:.2f} GiB of it since the first row")
    began = time.monotonic()
    reader = Reader(prepared.job, 0, 1, prepared.known, False, *middle)
    again = next(iter(DataLoader(stream([reader], features), batch_size=8, collate_fn=list)))
    told = "the same rows" if again == following else "OTHER rows"
    print(f"resumed at row {rows // 2:,}: {told}, after {time.monotonic() - began:.1f} s")


def memory() -> float:
    """GiB that the process had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
