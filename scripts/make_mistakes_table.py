"""Writes docs/mistakes.md: twelve common mistakes, and what `recipe-run validate` says of each, with its exit status.

python scripts/make_mistakes_table.py            # write
python scripts/make_mistakes_table.py --check    # exit status 1 if the committed page differs
"""

import subprocess
import sys
import tempfile
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "docs" / "mistakes.md"
RECIPE = """\
schema_version: 1
name: recipe
stage: sft
model:
  name_or_path: microsoft/Phi-3-mini-4k-instruct
quantization: {load_in_4bit: true, bnb_4bit_quant_type: nf4, bnb_4bit_compute_dtype: bfloat16}
peft: {method: lora, r: 16, target_modules: all-linear}
dataset:
  format: chat
  train: {source: HuggingFaceH4/ultrachat_200k, split: train_sft}
training:
  learning_rate: 2e-4
  max_steps: 100
"""
# What went wrong, the text as it should be, and as it is.
MISTAKES = [
    ("a misspelt key", "learning_rate:", "learning_rat:"),
    ("a name that upstream changed", "  max_steps: 100", "  max_steps: 100\n  max_seq_length: 2048"),
    ("a number in quotes", "max_steps: 100", "max_steps: '100'"),
    ("YAML 1.1's yes", "  max_steps: 100", "  max_steps: 100\n  packing: yes"),
    ("a misspelt choice", "bnb_4bit_quant_type: nf4", "bnb_4bit_quant_type: nf5"),
    ("a key twice", "  max_steps: 100", "  max_steps: 100\n  learning_rate: 1e-5"),
    ("a tab", "  max_steps: 100", "\tmax_steps: 100"),
    ("a rate without its exponent", "2e-4", "2"),
    ("a quantized base without an adapter", "peft: {method: lora, r: 16, target_modules: all-linear}\n", ""),
    ("targets of another architecture", "target_modules: all-linear", "target_modules: [q_proj, v_proj]"),
    ("evaluation without data", "  max_steps: 100", "  max_steps: 100\n  eval_strategy: epoch"),
    ("a key of another section", "  max_steps: 100", "  max_steps: 100\n  seed: 1"),
]
HEAD = """\
# Twelve mistakes

What `recipe-run validate` says of each, made on this recipe. No model, no data and no training stack is loaded for it.
This page is written by `scripts/make_mistakes_table.py`; `make lint` checks that it is true.

```yaml
"""


def main() -> int:
    text = f"{HEAD}{RECIPE}```\n\n| mistake | exit status | what is said |\n|---|---|---|\n"
    for name, right, wrong in MISTAKES:
        assert RECIPE.count(right) == 1, right
        status, said = validate(RECIPE.replace(right, wrong))
        cell = "<br>".join(f"`{line}`" for line in said.replace("|", "\\|").splitlines())
        text += f"| {name} | {status} | {cell} |\n"
    if "--check" in sys.argv:
        if PAGE.read_text(encoding="utf-8") != text:
            sys.exit("docs/mistakes.md: not what is said now; run scripts/make_mistakes_table.py")
    else:
        PAGE.write_text(text, encoding="utf-8")
    print(f"mistakes: {len(MISTAKES)}")
    return 0


def validate(text: str) -> tuple[int, str]:
    """Exit status and standard output of the command, run in the folder of the recipe."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "recipe.yaml").write_text(text, encoding="utf-8")
        command = [sys.executable, "-m", "recipe_runner", "validate", "recipe.yaml"]
        answer = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return answer.returncode, answer.stdout


if __name__ == "__main__":
    sys.exit(main())
