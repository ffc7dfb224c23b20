"""Time of a training step: the runner against a plain TRL script with the same settings, in turn.

    python benchmarks/steps.py dpo [--steps 12] [--pairs 4] [--processes 1]

Trains QLoRA (dpo: on the help desk's pairs) or LoRA (sft: on tickets; kto and reward: on the pairs' answers; grpo: on
tickets, judged by their length) of SmolLM2-135M on a CPU. Both sides must log the same losses (grpo: rewards, as its
losses are near 0), or the comparison is off. The first steps, which warm up, are not counted.
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
PAIRS, TICKETS = "replies_train.jsonl", "tickets_train.jsonl"
DATA = {"dpo": PAIRS, "sft": TICKETS, "kto": PAIRS, "reward": PAIRS, "grpo": TICKETS}
FORMATS = {"dpo": "preference", "sft": "instruction", "kto": "unpaired_preference", "reward": "preference"}
FORMATS["grpo"] = "prompt"
GENERATING = {"max_completion_length": 24, "num_generations": 4, "per_device_train_batch_size": 8}
MOST, SCORES = 16, "reward"  # tokens of an answer that is rewarded in full; what is compared of grpo


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("stage", choices=list(DATA))
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
        entry[SCORES if options.stage == "grpo" else "loss"] for entry in steps
    ]


def options_of(stage: str) -> dict[str, Any]:
    """The options of the trainer."""
    if stage == "grpo":
        return {key: value for key, value in TRAINING.items() if key != "max_length"} | GENERATING
    return TRAINING


def read_rows(stage: str) -> list[dict[str, Any]]:
    """The rows of a stage, as a recipe takes them."""
    text = (ROOT / "recipes" / "data" / DATA[stage]).read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    if stage == "kto":
        sides = (("chosen", True), ("rejected", False))
        return [{"prompt": row["prompt"], "completion": row[of], "label": good} for row in rows for of, good in sides]
    if stage == "grpo":
        return [{"prompt": f"{row['instruction']}\n\n{row['input']}"} for row in rows]
    return rows


def write_recipe(stage: str, steps: int, folder: Path) -> Path:
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in read_rows(stage)), encoding="utf-8")
    recipe = {
        "schema_version": 1,
        "name": "bench",
        "stage": stage,
        "model": {"name_or_path": str(MODEL)},
        "peft": {"method": "lora", **LORA},
        "dataset": {"format": FORMATS[stage], "train": {"source": str(data)}},
        "training": options_of(stage) | {"max_steps": steps},
        "run": {"output_dir": str(folder)},
    }
    if stage == "dpo":
        recipe["quantization"] = NF4
    if stage == "grpo":
        recipe["rewards"] = [{"name": "length", "max": MOST}]
    file = folder / "bench.yaml"
    file.write_text(json.dumps(recipe), encoding="utf-8")
    return file


def train_plainly(stage: str, steps: int, folder: Path) -> None:
    """What one would write with TRL alone."""
    from recipe_runner.launch.process import set_up_process

    set_up_process()  # the same warnings are quiet on both sides
    import trl
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig, TrainerCallback

    from recipe_runner.model.quantization import keep_4bit_weights_trainable

    class Log(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if args.process_index == 0:
                with (folder / "metrics.jsonl").open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps({"time": time.time(), **logs}) + "\n")

    def length(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return [min(1.0, MOST / len(ids)) for ids in completion_ids]

    name = {"reward": "Reward"}.get(stage, stage.upper())
    config_class, trainer_class = getattr(trl, f"{name}Config"), getattr(trl, f"{name}Trainer")
    head = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]} if stage == "reward" else {"task_type": "CAUSAL_LM"}
    trainer = trainer_class(
        str(MODEL),
        args=config_class(str(folder), max_steps=steps, bf16=False, seed=42, data_seed=42, **options_of(stage)),
        train_dataset=Dataset.from_list([as_turns(row) for row in read_rows(stage)]),
        peft_config=LoraConfig(**head, **LORA),
        quantization_config=BitsAndBytesConfig(**NF4) if stage == "dpo" else None,
        **({"reward_funcs": length} if stage == "grpo" else {}),
    )
    keep_4bit_weights_trainable(trainer.model)  # a bug of bitsandbytes on some CPUs: not what is compared
    trainer.add_callback(Log())
    trainer.train()
    trainer.save_model(str(folder / "adapter"))


def as_turns(row: dict[str, Any]) -> dict[str, Any]:
    if "label" in row:
        answer = [{"role": "assistant", "content": row["completion"]}]
        return {"prompt": [{"role": "user", "content": row["prompt"]}], "completion": answer, "label": row["label"]}
    if "prompt" in row and "chosen" not in row:
        return {"prompt": [{"role": "user", "content": row["prompt"]}]}
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
