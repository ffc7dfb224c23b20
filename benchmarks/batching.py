"""Real (unpadded) tokens a second, and held-out loss: a recipe's batching against the defaults of others, in turn.

    python benchmarks/batching.py DATA.json [--rows 80] [--pairs 1] [--llamafactory PYTHON]

DATA holds rows of instruction, input and output. All train the same LoRA on SmolLM2-135M for one epoch over the same
rows, on a CPU; only the batches differ: TRL's and LLaMA-Factory's are 8 random rows, padded; the recipe packs documents
into rows of 768 tokens, two a step (of Alpaca's first thousand the longest has 751), and keeps activations, as the
shelf's recipes for this model do; the others compute them twice, as is their default. The first 40 rows are held out,
one at a time. LLaMA-Factory runs by a Python of its own, with the base in bfloat16 and nothing held out; the recipe
beside it has its base in bfloat16, too, and in float32 beside TRL. Times are those of the steps.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
SAME = {"learning_rate": 5e-4, "lr_scheduler_type": "constant", "num_train_epochs": 1, "logging_steps": 1}
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
PACKED = {"packing": True, "max_length": 768, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
PACKED |= {"activation_checkpointing": False}  # as in all recipes of the shelf for this model


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("data", type=Path)
    arguments.add_argument("--rows", type=int, default=80)
    arguments.add_argument("--pairs", type=int, default=1)
    arguments.add_argument("--llamafactory", help="a Python that has LLaMA-Factory")
    arguments.add_argument(
        "--worker", choices=["trl", "recipe", "recipe-bfloat16", "llamafactory"], help=argparse.SUPPRESS
    )
    options = arguments.parse_args()
    if options.worker:
        way = work_llamafactory if options.worker == "llamafactory" else work
        print(json.dumps(way(options.worker, read_rows(options.data, options.rows))))
        return
    pythons = {"recipe": sys.executable, "trl": sys.executable}
    if options.llamafactory:
        pythons = {"recipe-bfloat16": sys.executable, "llamafactory": options.llamafactory}
    ours, theirs = pythons
    ratios: list[float] = []
    for number in range(1, options.pairs + 1):
        found = {}
        for worker, python in pythons.items():
            command = [python, __file__, str(options.data), "--rows", str(options.rows), "--worker", worker]
            environment = os.environ | {"DISABLE_VERSION_CHECK": "1"}
            answer = subprocess.run(command, capture_output=True, text=True, env=environment)
            if answer.returncode:
                sys.exit(answer.stderr)
            found[worker] = json.loads(answer.stdout.splitlines()[-1])
            told = ", ".join(f"{name} {value:,.4g}" for name, value in found[worker].items())
            print(f"round {number}: {worker:<16} {told}", flush=True)
        ratios.append(found[theirs]["seconds"] / found[ours]["seconds"])
    print(f"{statistics.median(ratios):.2f} times as fast as {theirs} (median of rounds)")


def read_rows(data: Path, count: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Rows that are held out, and rows to train on."""
    rows = json.loads(data.read_text(encoding="utf-8"))
    return rows[:40], rows[40 : 40 + count]


def make_clock() -> Any:
    """A callback that times the steps of a training."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        began, seconds, steps = 0.0, 0.0, 0

        def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.began = time.monotonic()

        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.seconds, self.steps = time.monotonic() - self.began, state.global_step

    return Clock()


def work(worker: str, rows: tuple[list[dict[str, str]], list[dict[str, str]]]) -> dict[str, float]:
    """Trains one way for an epoch, and measures."""
    held_out, train = rows
    clock = make_clock()
    with tempfile.TemporaryDirectory() as folder:
        dtype = {"dtype": "bfloat16"} if worker == "recipe-bfloat16" else {}
        trainer = build_trl(train, Path(folder)) if worker == "trl" else build_recipe(train, Path(folder), dtype)
        trainer.add_callback(clock)
        trainer.train()
        tokens = int(trainer.state.log_history[-2]["num_tokens"])
        loss = evaluate(trainer, held_out)
    return {
        "seconds": clock.seconds,
        "steps": clock.steps,
        "tokens_per_second": tokens / clock.seconds,
        "held_out_loss": loss,
    }


def work_llamafactory(_: str, rows: tuple[list[dict[str, str]], list[dict[str, str]]]) -> dict[str, float]:
    """Trains by LLaMA-Factory for an epoch, and measures."""
    from llamafactory.train.tuner import run_exp

    clock = make_clock()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "rows.json").write_text(json.dumps(rows[1]), encoding="utf-8")
        (Path(folder) / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}), "utf-8")
        settings = SAME | {
            "model_name_or_path": str(MODEL),
            "stage": "sft",
            "do_train": True,
            "finetuning_type": "lora",
            "lora_rank": LORA["r"],
            "lora_alpha": LORA["lora_alpha"],
            "lora_target": "all",
            "dataset_dir": folder,
            "dataset": "rows",
            "template": "chatml",
            "output_dir": f"{folder}/out",
            "save_strategy": "no",
            "report_to": "none",
        }
        run_exp(settings, [clock])
    return {"seconds": clock.seconds, "steps": clock.steps}


def build_trl(rows: list[dict[str, str]], folder: Path) -> Any:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    from recipe_runner.launch.process import set_up_process

    set_up_process()  # the same warnings are quiet on both sides

    data = Dataset.from_list([{"prompt": prompt(row), "completion": completion(row)} for row in rows])
    config = SFTConfig(str(folder), bf16=False, save_strategy="no", **SAME)
    lora = LoraConfig(task_type="CAUSAL_LM", **LORA)
    return SFTTrainer(str(MODEL), config, train_dataset=data, peft_config=lora)


def build_recipe(rows: list[dict[str, str]], folder: Path, dtype: dict[str, str]) -> Any:
    from recipe_runner.launch.process import set_up_process
    from recipe_runner.recipe.resolve import load_recipe
    from recipe_runner.training import prepare, trainers

    set_up_process()

    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    recipe = {
        "schema_version": 1,
        "name": "bench",
        "stage": "sft",
        "model": {"name_or_path": str(MODEL), **dtype},
        "peft": {"method": "lora", **LORA},
        "dataset": {"format": "instruction", "train": {"source": "rows.json"}},
        "training": {"save_strategy": "no", **SAME, **PACKED},
    }
    (folder / "bench.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    resolved = load_recipe(str(folder / "bench.yaml"))
    prepared = prepare.prepare(resolved, None)
    prepared.config.output_dir = str(folder)
    return trainers.build_trainer(resolved, prepared)


def prompt(row: dict[str, str]) -> list[dict[str, str]]:
    text = "\n\n".join(filter(None, (row["instruction"], row.get("input", ""))))
    return [{"role": "user", "content": text}]


def completion(row: dict[str, str]) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": row["output"]}]


def evaluate(trainer: Any, rows: list[dict[str, str]]) -> float:
    """Mean loss of an answer's token over rows, each alone."""
    import torch

    tokenizer, model = trainer.processing_class, trainer.model.eval()
    total, count = 0.0, 0
    for row in rows:
        whole = tokenizer.apply_chat_template(prompt(row) + completion(row), return_dict=False)[:1024]
        start = len(tokenizer.apply_chat_template(prompt(row), add_generation_prompt=True, return_dict=False))
        if start >= len(whole):
            continue
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([whole])).logits[0, start - 1 : -1]
        total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(whole[start:]), reduction="sum"))
        count += len(whole) - start
    return total / count


if __name__ == "__main__":
    main()
