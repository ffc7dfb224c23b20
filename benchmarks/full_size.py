"""Trains shipped recipes for some steps at the real size of their models, with random weights: memory and speed.

    python benchmarks/full_size.py --seconds 500 --output results.json recipes/phi3_chat_qlora.yaml ...

For a GPU: no model and no data is fetched. The model is built from the facts in recipes/models.json, in bfloat16; rows
are made up, as long as the recipe's rows are packed or cut. Each recipe is trained in a process of its own.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from recipe_runner.model.tiny import fill_padding
from recipe_runner.problems.words import align
from recipe_runner.recipe.models import find_facts
from recipe_runner.recipe.recipe import Recipe
from recipe_runner.recipe.resolve import load_recipe
from recipe_runner.runs.metrics import read_metrics
from recipe_runner.smoke.rows import WORDS
from recipe_runner.smoke.stand_in import make_tokenizer, read_config

STEPS = 6
GIB = 1 << 30


def make_rows(recipe: Recipe, count: int, words: int) -> list[dict[str, Any]]:
    """Rows of about as many words as are wanted, in the layout of the recipe's first source."""

    def text(number: int, length: int) -> str:
        return " ".join(WORDS[(number * 7 + place * 11 + place // 20) % len(WORDS)] for place in range(length))

    names = {role: column for role, column in recipe.dataset.train[0].columns.items() if column}
    rows = []
    for number in range(count):
        ask, answer, other = text(number, words // 3), text(number + 1, words), text(number + 2, words)
        turns = [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]
        cells = {"instruction": ask, "input": "", "output": answer, "messages": turns, "text": answer, "prompt": ask}
        cells |= {"chosen": answer, "rejected": other}
        wanted = {"chat": ["messages"], "text": ["text"], "preference": ["prompt", "chosen", "rejected"]}
        roles = wanted.get(recipe.dataset.format, ["instruction", "input", "output"])
        rows.append({names.get(role, role): cells[role] for role in roles})
    return rows


def build_model(recipe: Recipe, folder: Path) -> None:
    """A random model of the real size, in bfloat16."""
    facts = find_facts(recipe.model.name_or_path)
    config = read_config(recipe.model, facts).get_text_config()
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    fill_padding(model)
    model.save_pretrained(folder)
    tokenizer, stops = make_tokenizer(recipe.model, facts, [" ".join(WORDS)] * 50)
    tokenizer.save_pretrained(folder)
    ends = [tokenizer.convert_tokens_to_ids(token) for token in sorted(stops)]
    GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id).save_pretrained(folder)
    del model
    torch.cuda.empty_cache()


def train(file: Path, recipe: Recipe, model: Path, folder: Path) -> dict[str, Any]:
    """Memory and speed of some steps."""
    length = recipe.training["max_length"] or 1024
    of_step = recipe.training["per_device_train_batch_size"] * recipe.training["gradient_accumulation_steps"]
    words = int(min(length, 1024) * 0.5)
    count = of_step * STEPS * (max(1, length // (words * 4 // 3)) if recipe.training["packing"] else 1)
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in make_rows(recipe, count, words)))
    columns = {role: column for role, column in recipe.dataset.train[0].columns.items() if column}
    source = {"source": str(rows)} | ({"columns": columns} if columns else {})
    sets = {
        "model.name_or_path": str(model), "dataset.train": source, "dataset.eval": None, "training.max_steps": STEPS,
        "training.eval_strategy": "no", "training.save_strategy": "no", "training.logging_steps": 1,
        "run.output_dir": str(folder / "runs"), "dataset.max_dropped": 0.9,
    }  # fmt: skip
    arguments = [part for key, value in sets.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    done = subprocess.run(
        [sys.executable, "-m", "recipe_runner", "train", str(file), *arguments], capture_output=True, text=True
    )
    runs = sorted((folder / "runs").glob("*/*"))
    if done.returncode or not runs:
        return {"error": (done.stderr.strip().splitlines() or ["no word"])[-1][-300:]}
    logged = [entry for entry in read_metrics(runs[-1]) if "loss" in entry]
    first, last = logged[1], logged[-1]  # the first step also warms up
    seconds = last["time"] - first["time"]
    return {
        "peak_gib": json.loads((runs[-1] / "status.json").read_text())["measured"]["peak_memory_bytes"] / GIB,
        "tokens_per_second": (last["num_tokens"] - first["num_tokens"]) / seconds,
        "seconds_per_step": seconds / (last["step"] - first["step"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="+", type=Path)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no recipe after so long")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    began, found, built = time.monotonic(), {}, ""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    with tempfile.TemporaryDirectory() as place:
        model = Path(place) / "model"
        for file in options.recipes:
            if time.monotonic() - began > options.seconds:
                print(f"{file.stem}: no time left", flush=True)
                continue
            recipe, start = load_recipe(str(file)), time.monotonic()
            try:
                if recipe.model.name_or_path != built:
                    shutil.rmtree(model, ignore_errors=True)
                    build_model(recipe, model)
                    built = recipe.model.name_or_path
                folder = Path(place) / file.stem
                folder.mkdir()
                found[file.stem] = train(file, recipe, model, folder)
                shutil.rmtree(folder)
            except Exception as error:
                found[file.stem] = {"error": f"{type(error).__name__}: {error}"[:300]}
            found[file.stem]["whole_seconds"] = time.monotonic() - start
            print(file.stem, json.dumps(found[file.stem]), flush=True)
            if options.output:
                options.output.write_text(json.dumps({"device": device, "steps": STEPS, "recipes": found}, indent=1))
    rows = [["recipe", "peak GiB", "tokens/s", "s/step"]]
    for name, of in found.items():
        numbers = [
            f"{of[key]:.2f}" if key in of else "-" for key in ("peak_gib", "tokens_per_second", "seconds_per_step")
        ]
        rows.append([name, *numbers])
    print(f"\n{device}, {STEPS} steps\n" + "\n".join(align(rows)))


if __name__ == "__main__":
    main()
