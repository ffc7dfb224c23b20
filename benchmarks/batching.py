"""Real (unpadded) tokens a second, and held-out loss: a recipe's batching against the defaults of others, in turn.

    python benchmarks/batching.py DATA.json [--tokens 8000] [--pairs 1] [--llamafactory PYTHON]

DATA holds rows of instruction, input and output. All train the same LoRA on SmolLM2-135M on the same rows, on a CPU in
float32, until they have seen the same number of real tokens; only the batches differ: TRL's and LLaMA-Factory's are 8
random rows, padded; the recipe packs documents into rows of 768 tokens, two a step (of Alpaca's first thousand the
longest has 751). 40 rows are held out, one at a time (not with LLaMA-Factory, which runs by a Python of its own).
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
SAME = {"learning_rate": 5e-4, "lr_scheduler_type": "constant", "max_steps": 10_000, "logging_steps": 1}
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
PACKED = {"packing": True, "max_length": 768, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("data", type=Path)
    arguments.add_argument("--tokens", type=int, default=8000)
    arguments.add_argument("--pairs", type=int, default=1)
    arguments.add_argument("--llamafactory", help="a Python that has LLaMA-Factory")
    arguments.add_argument("--worker", choices=["trl", "recipe", "llamafactory"], help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.worker:
        way = work_llamafactory if options.worker == "llamafactory" else work
        print(json.dumps(way(options.worker, options.data, options.tokens)))
        return
    pythons = {"recipe": sys.executable, "trl": sys.executable}
    pythons |= {"llamafactory": options.llamafactory} if options.llamafactory else {}
    ratios: dict[str, list[float]] = {worker: [] for worker in list(pythons)[1:]}
    for number in range(1, options.pairs + 1):
        found = {}
        for worker, python in pythons.items():
            command = [python, __file__, str(options.data), "--tokens", str(options.tokens), "--worker", worker]
            environment = os.environ | {"DISABLE_VERSION_CHECK": "1"}
            answer = subprocess.run(command, capture_output=True, text=True, env=environment)
            if answer.returncode:
                sys.exit(answer.stderr)
            found[worker] = json.loads(answer.stdout.splitlines()[-1])
            told = ", ".join(f"{name} {value:,.4g}" for name, value in found[worker].items())
            print(f"round {number}: {worker:<12} {told}", flush=True)
        for worker, series in ratios.items():
            series.append(found["recipe"]["tokens_per_second"] / found[worker]["tokens_per_second"])
    for worker, series in ratios.items():
        print(f"median ratio to {worker}: {statistics.median(series):.2f}")


def work(worker: str, data: Path, tokens: int) -> dict[str, float]:
    """Trains one way until so many tokens were seen, and measures."""
    rows = json.loads(data.read_text(encoding="utf-8"))
    held_out, rows = rows[:40], rows[40:]
    with tempfile.TemporaryDirectory() as folder:
        trainer = (build_trl if worker == "trl" else build_recipe)(rows, Path(folder))
        stop = make_stop(tokens)
        trainer.add_callback(stop)
        trainer.train()
        seconds = stop.ended - stop.began
        return {
            "tokens_per_second": stop.seen / seconds,
            "tokens": stop.seen,
            "steps": trainer.state.global_step,
            "seconds": seconds,
            "held_out_loss": evaluate(trainer, held_out),
        }


def work_llamafactory(_: str, data: Path, tokens: int) -> dict[str, float]:
    """Trains by LLaMA-Factory until so many tokens that are no padding were seen, and measures."""
    from llamafactory.train.tuner import run_exp
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        began = seconds = seen = steps = 0

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.began = time.monotonic()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.seen, self.steps = state.num_input_tokens_seen, state.global_step
            self.seconds = time.monotonic() - self.began
            control.should_training_stop = self.seen >= tokens

    with tempfile.TemporaryDirectory() as folder:
        rows = json.loads(data.read_text(encoding="utf-8"))[40:]
        (Path(folder) / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
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
            "include_num_input_tokens_seen": "non_padding",
        }
        stop = Stop()
        run_exp(settings, [stop])
    measured = {"tokens": stop.seen, "steps": stop.steps, "seconds": stop.seconds}
    return {"tokens_per_second": stop.seen / stop.seconds} | measured


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


def build_recipe(rows: list[dict[str, str]], folder: Path) -> Any:
    from recipe_runner.launch.process import set_up_process
    from recipe_runner.recipe.resolve import load_recipe
    from recipe_runner.training import prepare, trainers

    set_up_process()

    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    recipe = {
        "schema_version": 1,
        "name": "bench",
        "stage": "sft",
        "model": {"name_or_path": str(MODEL)},
        "peft": {"method": "lora", **LORA},
        "dataset": {"format": "instruction", "train": {"source": "rows.json"}},
        "training": {"save_strategy": "no", **SAME, **PACKED},
    }
    (folder / "bench.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    resolved = load_recipe(str(folder / "bench.yaml"))
    prepared = prepare.prepare(resolved, None)
    prepared.config.output_dir = str(folder)
    return trainers.build_trainer(resolved, prepared)


def make_stop(tokens: int) -> Any:
    """A callback that ends training after so many real tokens, as TRL counts them, and times it."""
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        seen, began, ended = 0, 0.0, 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.began = time.monotonic()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            self.seen = int((logs or {}).get("num_tokens", self.seen))
            if self.seen >= tokens and not self.ended:
                self.ended = time.monotonic()
                control.should_training_stop = True

    return Stop()


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
