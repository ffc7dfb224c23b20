"""Time from launch to the first optimizer step: a recipe against a minimal TRL script for the same job, in turn.

    python benchmarks/startup.py [PAIRS]

Each is a process of its own. The clock runs from its start to the first loss that it prints; caches are warm (one
unmeasured run of each first). Prints every pair, the medians and their ratio.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes" / "smollm2_tickets_lora.yaml"
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


def main(pairs: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model, data = ROOT / "models" / "SmolLM2-135M-Instruct", ROOT / "recipes" / "data" / "tickets_train.jsonl"
        script = Path(folder) / "minimal_trl.py"
        script.write_text(SCRIPT.format(out=folder, model=model, data=data), encoding="utf-8")
        settings = ("max_steps=1", "logging_steps=1", "save_strategy='no'")
        overrides = [word for setting in settings for word in ("--set", f"training.{setting}")]
        ours = [sys.executable, "-m", "recipe_runner", str(RECIPE), *overrides, "--output-dir", f"{folder}/runs"]
        theirs = [sys.executable, str(script)]
        first_loss(theirs)
        first_loss(ours)
        measured = []
        for number in range(1, pairs + 1):
            measured.append((first_loss(theirs), first_loss(ours)))
            print(f"pair {number}: TRL script {measured[-1][0]:.2f} s, recipe {measured[-1][1]:.2f} s", flush=True)
    script_median, recipe_median = (statistics.median(times) for times in zip(*measured, strict=True))
    ratio = statistics.median(recipe / trl for trl, recipe in measured)
    print(f"median: TRL script {script_median:.2f} s, recipe {recipe_median:.2f} s; median ratio of pairs {ratio:.2f}")


def first_loss(command: list[str]) -> float:
    """Seconds until a process prints its first loss."""
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout
    output, seconds = [], 0.0
    for line in process.stdout:
        output.append(line)
        if not seconds and "'loss'" in line:
            seconds = time.monotonic() - began
    if process.wait() or not seconds:
        sys.exit("".join(output))
    return seconds


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
