"""Time from launch to the first optimizer step: a recipe against a minimal TRL script for the same job, in turn.

    python benchmarks/startup.py [ROUNDS]

Each is a process of its own. The clock runs from its start to the first loss that it prints; caches are warm (one
unmeasured run of each first). The recipe is measured as it is, and without trying the longest batch, which takes as
long as a step. Prints every round, the medians and their ratios to the script.
"""

import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes" / "smollm2_tickets_lora.yaml"
FIRST_STEP = re.compile(r"'loss'|^ +1 +\d+\.\d+ ")  # a dictionary of transformers, a line of ours
SCRIPT = """
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

def to_prompt_completion(row):
    return {{
        "prompt": [{{"role": "user", "content": row["instruction"] + "\\n\\n" + row["input"]}}],
        "completion": [{{"role": "assistant", "content": row["output"]}}],
    }}

data = load_dataset("json", data_files="{data}", split="train")
data = data.map(to_prompt_completion, remove_columns=data.column_names)
config = SFTConfig(
    "{out}", learning_rate=1e-3, max_steps=1, per_device_train_batch_size=4, max_length=256, logging_steps=1,
    activation_checkpointing=False, bf16=False, save_strategy="no",
)
lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
SFTTrainer("{model}", config, train_dataset=data, peft_config=lora).train()
"""


def main(rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model, data = ROOT / "models" / "SmolLM2-135M-Instruct", ROOT / "recipes" / "data" / "tickets_train.jsonl"
        script = Path(folder) / "minimal_trl.py"
        script.write_text(SCRIPT.format(out=folder, model=model, data=data), encoding="utf-8")
        settings = ("max_steps=1", "warmup_steps=0", "save_strategy='no'", "save_steps=500", "save_total_limit=null")
        overrides = [word for setting in settings for word in ("--set", f"training.{setting}")]
        ours = [sys.executable, "-m", "recipe_runner", str(RECIPE), *overrides, "--output-dir", f"{folder}/runs"]
        commands = {
            "TRL script": [sys.executable, str(script)],
            "recipe": ours,
            "without longest": [*ours, "--set", "run.longest_batch_first=false"],
        }
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for command in list(commands.values())[:2]:
            first_loss(command)
        for number in range(1, rounds + 1):
            for name, command in commands.items():
                seconds[name].append(first_loss(command))
            told = ", ".join(f"{name} {series[-1]:.2f} s" for name, series in seconds.items())
            print(f"round {number}: {told}", flush=True)
    for name, series in seconds.items():
        ratios = [ours / theirs for ours, theirs in zip(series, seconds["TRL script"], strict=True)]
        print(f"{name:<16} median {statistics.median(series):.2f} s, {statistics.median(ratios):.2f} times the script")


def first_loss(command: list[str]) -> float:
    """Seconds until a process prints its first loss."""
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout
    output, seconds = [], 0.0
    for line in process.stdout:
        output.append(line)
        if not seconds and FIRST_STEP.search(line):
            seconds = time.monotonic() - began
    if process.wait() or not seconds:
        sys.exit("".join(output))
    return seconds


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
