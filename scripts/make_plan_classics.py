"""The classic table of memory, planned beside what was published: a part of docs/plan.md.

python scripts/make_plan_classics.py [--check]
"""

import re
import sys
from pathlib import Path
from typing import Any

import torch
from make_plan_accuracy import make_recipe, read_config

from recipe_runner.plan.build import build
from recipe_runner.plan.device import ANY_GPU
from recipe_runner.plan.memory import Setting, trace
from recipe_runner.plan.step import Batch, Step, evaluate, measure_cache
from recipe_runner.plan.trace import Kernels, Memory

PAGE = Path(__file__).resolve().parent.parent / "docs" / "plan.md"
LLAMA_65B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 22016,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
}
PHI3 = "microsoft/Phi-3-mini-4k-instruct"
LORA = {"method": "lora", "r": 64, "lora_alpha": 16, "target_modules": "all-linear"}
COMMON = {"mixed": "bfloat16", "batch": 1, "length": 512, "gpus": 1, "checkpointing": True, "dtype": "bfloat16"}
DOUBLE = {"quantization": {"double": True}}
PAPER = "780 GB (more than; arXiv 2305.14314)"
# What is trained: in words, changes to the case, what was published.
TRAINED: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("LLaMA-65B, all weights, AdamW in float32", {"config": LLAMA_65B, "optimizer": "paged_adamw_32bit"}, PAPER),
    ("LLaMA-65B, LoRA r 64 on 16 bits", {"config": LLAMA_65B, "peft": LORA, "optimizer": "paged_adamw_32bit"}, ""),
    (
        "LLaMA-65B, QLoRA r 64 (NF4, twice)",
        {"config": LLAMA_65B, "peft": LORA, "optimizer": "paged_adamw_32bit"} | DOUBLE,
        "48 GB (fits; arXiv 2305.14314); 64 GB (course notes)",
    ),
    ("Phi-3-mini, all weights, float32", {"config": PHI3, "dtype": "float32", "optimizer": "adamw_torch_fused"}, ""),
    ("Phi-3-mini, all weights, 16 bits", {"config": PHI3, "optimizer": "adamw_torch_fused"}, ""),
    ("Phi-3-mini, LoRA r 64, 16 bits", {"config": PHI3, "peft": LORA, "optimizer": "adamw_torch_fused"}, ""),
    (
        "Phi-3-mini, QLoRA r 64 (NF4, twice)",
        {"config": PHI3, "peft": LORA, "optimizer": "paged_adamw_8bit"} | DOUBLE,
        "",
    ),
)
# What answers: in words, data type, changes to the case.
ANSWERING: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("Phi-3-mini, float32", "float32", {}),
    ("Phi-3-mini, float16", "float16", {}),
    ("Phi-3-mini, NF4, twice", "bfloat16", {"quantization": {"double": True}, "peft": LORA}),
)


def main() -> int:
    text = "\n".join(write_table())
    page = PAGE.read_text(encoding="utf-8")
    made = re.sub(
        r"(<!-- classics -->\n).*(<!-- end of classics -->)", lambda m: f"{m[1]}{text}\n{m[2]}", page, flags=re.S
    )
    if "--check" in sys.argv:
        print("docs/plan.md has the classic table" if made == page else "docs/plan.md is stale: run it")
        return int(made != page)
    PAGE.write_text(made, encoding="utf-8")
    print(text)
    return 0


def write_table() -> list[str]:
    """One row of 512 tokens trained at a time, in decimal GB as published figures are; answers to 4,096 tokens."""
    lines = [
        "| trained, a row of 512 tokens at a time | tensors, GB | of these weights | published |",
        "|---|---|---|---|",
    ]
    for name, changes, published in TRAINED:
        case = COMMON | {"id": "classic"} | changes
        batch = Batch(1, case["length"], case["length"] - 1)
        mixed = torch.bfloat16
        dtype = getattr(torch, case["dtype"])
        traced = trace(make_recipe(case), Setting(read_config(case), ANY_GPU, dtype, mixed, batch))
        whole = traced.peak.total + traced.model.needs.paged
        lines.append(f"| {name} | {whole / 1e9:,.1f} | {traced.peak.kinds['weights'] / 1e9:,.1f} | {published} |")
    lines += ["", "| answering, 4,096 tokens seen | tensors, GB | of these weights |", "|---|---|---|"]
    for name, kind, changes in ANSWERING:
        whole, weights = measure_answering(getattr(torch, kind), changes)
        lines.append(f"| {name} | {whole / 1e9:,.1f} | {weights / 1e9:,.1f} |")
    return lines


def measure_answering(dtype: torch.dtype, changes: dict[str, Any]) -> tuple[int, int]:
    """Bytes of a model that answers: its weights, the keys and values of what it has seen, and a forward pass."""
    case = COMMON | {"id": "classic", "config": PHI3, "optimizer": "sgd", "length": 4096} | changes
    built = build(make_recipe(case), read_config(case), dtype, False)
    memory = Memory()
    run = Step(built, memory, Kernels(memory, True))
    run.hold_model()
    weights = memory.live
    memory.change("activations", measure_cache(built.base.config.get_text_config(), built.number, dtype) * 4096)
    with run.watched():
        evaluate(run, Batch(1, 4096, 1))
    return max(peak.total for peak in memory.find_peaks().values()), weights


if __name__ == "__main__":
    sys.exit(main())
