"""Time of a training step: the runner against a plain TRL script with the same settings, in turn.

    python benchmarks/steps.py dpo [--steps 12] [--pairs 4] [--processes 1]

Trains QLoRA (dpo: DPOTrainer on the help desk's pairs) or LoRA (sft: SFTTrainer on tickets) of SmolLM2-135M on a CPU.
Both sides must log the same losses, or the comparison is off. The first steps, which warm up, are not counted.
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
WARM_UP = 2
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "float32",
}
TRAINING = {
    "learning_rate": 1e-4,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "max_length": 256,
    "activation_checkpointing": False,
}
DATA = {"dpo": "replies_train.jsonl", "sft": "tickets_train.jsonl"}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("stage", choices=["dpo", "sft"])
    arguments.add_argument("--steps", type=int, default=12)
    arguments.add_argument("--pairs", type=int, default=4)
    arguments.add_argument("--processes", type=int, default=1)
    arguments.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.worker:
        train_plainly(options.stage, options.steps, options.worker)
        return
    ratios = []
    for number in range(options.pairs):
        order = ("trl", "recipe") if number % 2 == 0 else ("recipe", "trl")
        found = {side: measure(side, options) for side in order}
        if any(abs(a - b) > 1e-3 * abs(a) for a, b in zip(found["trl"][1], found["recipe"][1], strict=True)):
            sys.exit(f"the losses differ: {found['trl'][1]} {found['recipe'][1]}")
        seconds = {side: statistics.median(found[side][0]) for side in found}
        ratios.append(seconds["recipe"] / seconds["trl"])
        told = ", ".join(f"{side} {value:.3f} s a step" for side, value in sorted(seconds.items()))
        print(f"pair {number + 1}: {told}; ratio {ratios[-1]:.3f}", flush=True)
    print(f"median ratio of {options.pairs} pairs: {statistics.median(ratios):.3f} (the same losses on both sides)")


def measure(side: str, options: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Seconds of each counted step, and the losses of all."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if side == "trl":
            command = [__file__, options.stage, "--steps", str(options.steps), "--worker", str(folder)]
        else:
            command = ["-m", "recipe_runner", str(write_recipe(options.stage, options.steps, folder))]
        launcher = [sys.executable]
        if options.processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.processes)]
        threads = str(max(1, (os.cpu_count() or 1) // options.processes))
        environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": threads}
        answer = subprocess.run([*launcher, *command], capture_output=True, text=True, env=environment, cwd=ROOT)
        if answer.returncode:
            sys.exit(answer.stderr)
        (file,) = folder.rglob("metrics.jsonl")
        logged = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    steps = [entry for entry in logged if "loss" in entry]
    times = [entry["time"] for entry in steps]
    return [after - before for before, after in zip(times[WARM_UP:], times[WARM_UP + 1 :], strict=False)], [
        entry["loss"] for entry in steps
    ]


def write_recipe(stage: str, steps: int, folder: Path) -> Path:
    form = "preference" if stage == "dpo" else "instruction"
    recipe = {
        "schema_version": 1,
        "name": "bench",
        "stage": stage,
        "model": {"name_or_path": str(MODEL)},
        "peft": {"method": "lora", **LORA},
        "dataset": {"format": form, "train": {"source": str(ROOT / "recipes" / "data" / DATA[stage])}},
        "training": TRAINING | {"max_steps": steps},
        "run": {"output_dir": str(folder)},
    }
    if stage == "dpo":
        recipe["quantization"] = NF4
    file = folder / "bench.yaml"
    file.write_text(json.dumps(recipe), encoding="utf-8")
    return file


def train_plainly(stage: str, steps: int, folder: Path) -> None:
    """What one would write with TRL alone."""
    from recipe_runner.launch.process import set_up_process

    set_up_process()  # the same warnings are quiet on both sides
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig, TrainerCallback
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    from recipe_runner.model.quantization import keep_4bit_weights_trainable

    class Log(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if args.process_index == 0:
                with (folder / "metrics.jsonl").open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps({"time": time.time(), **logs}) + "\n")

    rows = [
        json.loads(line) for line in (ROOT / "recipes" / "data" / DATA[stage]).read_text(encoding="utf-8").splitlines()
    ]
    config_class, trainer_class = (DPOConfig, DPOTrainer) if stage == "dpo" else (SFTConfig, SFTTrainer)
    trainer = trainer_class(
        str(MODEL),
        args=config_class(str(folder), max_steps=steps, bf16=False, seed=42, data_seed=42, **TRAINING),
        train_dataset=Dataset.from_list([as_turns(row) for row in rows]),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA),
        quantization_config=BitsAndBytesConfig(**NF4) if stage == "dpo" else None,
    )
    keep_4bit_weights_trainable(trainer.model)  # a bug of bitsandbytes on some CPUs: not what is compared
    trainer.add_callback(Log())
    trainer.train()
    trainer.save_model(str(folder / "adapter"))


def as_turns(row: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    if "chosen" in row:
        return {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
    return {
        "prompt": [{"role": "user", "content": f"{row['instruction']}\n\n{row['input']}"}],
        "completion": [{"role": "assistant", "content": row["output"]}],
    }


if __name__ == "__main__":
    main()
