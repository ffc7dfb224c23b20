"""Training on a GPU: speed and memory of the shipped recipes with full-size random models, in Markdown.

    python benchmarks/gpu.py speed  [--steps 20] [--minutes 8]   # recipes, variants; a plain TRL script, in turn
    python benchmarks/gpu.py memory [--steps 4] [--jobs 4]       # peak memory of set-ups, beside what is planned
    python benchmarks/gpu.py align  [--steps 4]                  # KTO, reward model, RLOO, GRPO, distillation
    python benchmarks/gpu.py first  [--steps 6]                  # the longest batch first: its time, memory and traces

A model is built from its configuration on the device, with random weights, so nothing is downloaded: time and memory
don't depend on what a model knows. Rows are made of the shelf's own texts. Gradients are accumulated over two batches
instead of the recipes' own number, which changes neither. A set-up that would start after --minutes is left out, and
the table says so. `--tiny` takes two narrow layers: the same way on a CPU, as a test.

Tokens are those of batches without padding. A step's time is the median after the first three. Model FLOPs of a token
(arXiv 2204.02311, appendix B, without the attention): 2 for each weight of a matrix forward, 2 for the gradient of its
input, and 2 for the gradient of the weight where it is trained; 2 more where DPO's reference passes. What activation
checkpointing computes twice is not counted. Stops are the times a step that the host waits for the GPU, as PyTorch's
sync debug mode counts them, in runs of their own with four batches a step, as counting takes time.

With `memory` each set-up has a process of its own, `--jobs` of them at a time: what one allocates does not depend on
the others, but its speed does. What is planned is what the run itself kept; `--json` keeps what is needed to plan it
again (scripts/make_plan_accuracy.py).
"""

import argparse
import contextlib
import copy
import gc
import hashlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = 3
GIB = 2**30
PEAK_FLOPS = {
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}  # data sheets: dense bf16
LLAMA = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}
PHI3 = {
    "model_type": "phi3",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32064,
    "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
    "sliding_window": 2047,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 16,
    "vocab_size": 4000,
}
MODELS = {"Phi-3-mini": PHI3, "Llama-3.2-1B": LLAMA}  # others are called as in recipes/models.json


@dataclass(frozen=True)
class Setup:
    """What is trained: a shelf recipe with changed keys (section.key; None takes a key or a section away)."""

    name: str
    recipe: str
    changes: dict[str, Any] = field(default_factory=dict)
    model: str = "Phi-3-mini"
    sides: tuple[str, ...] = ("recipe",)


PAIR = ("recipe", "trl")
RANDOM = {"training.train_sampling_strategy": None}
SPEED = (
    Setup("chat, as shipped", "phi3_chat_qlora", sides=PAIR),
    Setup("DPO, in random order", "phi3_dpo_qlora", RANDOM, sides=PAIR),
    Setup("DPO, as shipped (by length)", "phi3_dpo_qlora"),
    Setup("chat, batch 8", "phi3_chat_qlora", {"training.per_device_train_batch_size": 8}, sides=PAIR),
    Setup("chat, optimizer not paged", "phi3_chat_qlora", {"training.optim": "adamw_8bit"}),
    Setup("chat, no double quantization", "phi3_chat_qlora", {"quantization.bnb_4bit_use_double_quant": False}),
    Setup("chat, bf16 instead of NF4", "phi3_chat_qlora", {"quantization": None}),
    Setup("chat, no checkpointing", "phi3_chat_qlora", {"training.activation_checkpointing": False}),
    Setup("instruct, as shipped", "phi3_instruct_qlora"),
    Setup("text, as shipped", "phi3_text_qlora"),
)
FULL: dict[str, Any] = {"quantization": None, "peft": None, "training.learning_rate": 1e-5}
NO_CHECKPOINTING = {"training.activation_checkpointing": False}


BATCH, LENGTH, OPTIMIZER = "training.per_device_train_batch_size", "training.max_length", "training.optim"
ADAMW = {OPTIMIZER: "adamw_torch"}
PLAIN: dict[str, Any] = {"quantization": None}
INT8 = {"quantization": {"load_in_8bit": True}}
QWEN, GEMMA, SMOL = "Qwen/Qwen3-1.7B", "google/gemma-3-1b-it", "HuggingFaceTB/SmolLM2-360M-Instruct"
DORA = PLAIN | {"peft.use_dora": True}
PREFIX = PLAIN | NO_CHECKPOINTING | {"peft": {"method": "prefix_tuning", "num_virtual_tokens": 30}}
FEW_TOKENS = {"training.max_completion_length": 64, BATCH: 8}
MEMORY = tuple(
    Setup(name, recipe, changes, model)
    for name, recipe, changes, model in (
        ("QLoRA r 64", "phi3_text_qlora", {}, "Llama-3.2-1B"),
        ("QLoRA, not double", "phi3_text_qlora", {"quantization.bnb_4bit_use_double_quant": False}, "Llama-3.2-1B"),
        ("QLoRA, length 512", "phi3_text_qlora", {LENGTH: 512}, "Llama-3.2-1B"),
        ("QLoRA, length 4096", "phi3_text_qlora", {LENGTH: 4096}, "Llama-3.2-1B"),
        ("QLoRA, batch 4", "phi3_text_qlora", {BATCH: 4}, "Llama-3.2-1B"),
        ("QLoRA, no checkpointing", "phi3_text_qlora", NO_CHECKPOINTING, "Llama-3.2-1B"),
        (
            "QLoRA, instructions, not packed, batch 4",
            "phi3_instruct_qlora",
            {"training.packing": None, BATCH: 4},
            "Llama-3.2-1B",
        ),
        ("QLoRA, Phi-3-mini", "phi3_text_qlora", {}, "Phi-3-mini"),
        (
            "QLoRA, Phi-3-mini, batch 2, no checkpointing",
            "phi3_text_qlora",
            NO_CHECKPOINTING | {BATCH: 2},
            "Phi-3-mini",
        ),
        ("QLoRA, Qwen3-1.7B, batch 2", "phi3_text_qlora", {BATCH: 2}, QWEN),
        ("QLoRA, Gemma 3 1B", "phi3_text_qlora", {}, GEMMA),
        ("LoRA on 8 bits", "phi3_text_qlora", INT8, "Llama-3.2-1B"),
        ("LoRA on 8 bits, no checkpointing", "phi3_text_qlora", INT8 | NO_CHECKPOINTING, "Llama-3.2-1B"),
        ("LoRA r 64", "phi3_text_qlora", PLAIN, "Llama-3.2-1B"),
        ("LoRA, no checkpointing", "phi3_text_qlora", PLAIN | NO_CHECKPOINTING, "Llama-3.2-1B"),
        ("LoRA, batch 4, AdamW", "phi3_text_qlora", PLAIN | ADAMW | {BATCH: 4}, "Llama-3.2-1B"),
        ("LoRA, Qwen3-1.7B, no checkpointing", "phi3_text_qlora", PLAIN | NO_CHECKPOINTING, QWEN),
        ("LoRA, Gemma 3 1B, no checkpointing", "phi3_text_qlora", PLAIN | NO_CHECKPOINTING, GEMMA),
        ("DoRA", "phi3_text_qlora", DORA, "Llama-3.2-1B"),
        ("prefix of 30, SmolLM2-360M", "phi3_text_qlora", PREFIX | {"training.packing": None}, SMOL),
        ("full bf16, AdamW", "phi3_text_qlora", FULL | ADAMW, "Llama-3.2-1B"),
        ("full bf16, 8-bit", "phi3_text_qlora", FULL | {OPTIMIZER: "adamw_8bit"}, "Llama-3.2-1B"),
        ("full bf16, Adafactor", "phi3_text_qlora", FULL | {OPTIMIZER: "adafactor"}, "Llama-3.2-1B"),
        ("full float32, AdamW", "phi3_text_qlora", FULL | ADAMW | {"model.dtype": "float32"}, "Llama-3.2-1B"),
        ("full bf16, no checkpointing", "phi3_text_qlora", FULL | ADAMW | NO_CHECKPOINTING, "Llama-3.2-1B"),
        ("full bf16, Gemma 3 1B", "phi3_text_qlora", FULL | ADAMW, GEMMA),
        ("full bf16, SmolLM2-360M, batch 8", "phi3_text_qlora", FULL | ADAMW | {BATCH: 8}, SMOL),
        ("DPO QLoRA", "phi3_dpo_qlora", {}, "Llama-3.2-1B"),
        ("DPO QLoRA, no checkpointing", "phi3_dpo_qlora", NO_CHECKPOINTING, "Llama-3.2-1B"),
        ("DPO LoRA", "phi3_dpo_qlora", PLAIN, "Llama-3.2-1B"),
        ("DPO full", "phi3_dpo_qlora", FULL | ADAMW, "Llama-3.2-1B"),
        ("KTO QLoRA", "phi3_kto_qlora", {}, "Llama-3.2-1B"),
        ("KTO LoRA, Qwen3-1.7B", "phi3_kto_qlora", PLAIN, QWEN),
        ("reward QLoRA", "phi3_reward_qlora", {}, "Llama-3.2-1B"),
        ("reward full", "phi3_reward_qlora", FULL | ADAMW, "Llama-3.2-1B"),
        ("GRPO LoRA, 64 new tokens", "phi3_grpo_qlora", PLAIN | FEW_TOKENS, "Llama-3.2-1B"),
        ("GRPO QLoRA, 64 new tokens", "phi3_grpo_qlora", FEW_TOKENS, "Llama-3.2-1B"),
    )
)

FIRST = tuple(
    Setup(name, recipe, changes, "Llama-3.2-1B", ("with", "without"))
    for name, recipe, changes in (
        ("QLoRA, paged 8-bit", "phi3_text_qlora", {}),
        ("LoRA r 64, AdamW", "phi3_text_qlora", {"quantization": None, OPTIMIZER: "adamw_torch"}),
        ("full bf16, AdamW", "phi3_text_qlora", FULL | {OPTIMIZER: "adamw_torch"}),
        ("full bf16, 8-bit", "phi3_text_qlora", FULL | {OPTIMIZER: "adamw_8bit"}),
        ("instruct, batch 4, not packed", "phi3_instruct_qlora", {"training.packing": None, BATCH: 4}),
        ("DPO QLoRA", "phi3_dpo_qlora", {}),
    )
)
STOPS = (
    Setup("stops: chat", "phi3_chat_qlora", {}, "Llama-3.2-1B", PAIR),
    Setup("stops: DPO, in random order", "phi3_dpo_qlora", RANDOM, "Llama-3.2-1B", PAIR),
)
BRIEF = {"training.max_completion_length": 256}
ALIGN = tuple(
    Setup(name, recipe, changes)
    for name, recipe, changes in (
        ("KTO, as shipped", "phi3_kto_qlora", {}),
        ("KTO, LoRA", "phi3_kto_qlora", PLAIN),
        ("reward model, as shipped", "phi3_reward_qlora", {}),
        ("reward model, LoRA", "phi3_reward_qlora", PLAIN),
        ("GRPO, 256 new tokens", "phi3_grpo_qlora", BRIEF),
        ("GRPO, LoRA, 256 new tokens", "phi3_grpo_qlora", BRIEF | PLAIN),
        ("RLOO, 256 new tokens", "phi3_rloo_qlora", BRIEF),
        ("distillation, 256 new tokens", "phi3_distillation_qlora", BRIEF),
    )
)
GENERATING = ("grpo", "rloo", "distillation")  # of whose recipes no FLOPs are told: most are generation's
SETUPS = {"speed": SPEED, "memory": MEMORY, "align": ALIGN, "first": FIRST + STOPS}
STEPS = {"speed": 20, "memory": 4, "align": 4, "first": 6}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("what", choices=[*SETUPS, "worker"])
    arguments.add_argument("files", nargs="*", type=Path, help=argparse.SUPPRESS)
    arguments.add_argument("--steps", type=int)
    arguments.add_argument("--minutes", type=float, default=8)
    arguments.add_argument("--only", default="", help="set-ups whose names hold this")
    arguments.add_argument("--jobs", type=int, default=1, help="set-ups at a time, where only memory is measured")
    arguments.add_argument("--json", type=Path, help="a file for all that was measured, a line each")
    arguments.add_argument("--tiny", action="store_true", help="two narrow layers instead of the whole model")
    options = arguments.parse_args()
    if options.what == "worker":
        for file in options.files:
            work(file)
        return
    start = time.monotonic()
    setups = [setup for setup in SETUPS[options.what] if options.only in setup.name]
    steps = options.steps or STEPS[options.what]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = {model: build_model(model, folder / model, options.tiny) for model in {s.model for s in setups}}
        write_rows(folder)
        if options.what == "align":
            build_judges(folder, options.tiny)
        print(f"{device_name()}; {steps} steps, {time.monotonic() - start:.0f} s to build the models\n")
        if options.what == "memory":
            compare_memory(setups, steps, folder, options.jobs, start + options.minutes * 60, options.json)
            return
        print("| set-up | by | tokens/s | MFU | allocated, GiB | reserved, GiB | first and last loss | beside |")
        print("|---|---|---|---|---|---|---|---|", flush=True)
        jobs = [(setup, side, write_job(setup, side, steps, folder)) for setup in setups for side in setup.sides]
        alone = [
            job for job in jobs if job[0].sides != ("recipe",)
        ]  # a process each; others share one, by fours: less waiting
        shared = [job for job in jobs if job[0].sides == ("recipe",)]
        groups = [[job] for job in alone] + [shared[i : i + 4] for i in range(0, len(shared), 4)]
        for group in groups:
            if time.monotonic() - start > options.minutes * 60:
                print(f"| {group[0][0].name} | {group[0][1]} | left out: {options.minutes:g} minutes are over ||||||")
                continue
            answer = start_worker([file for _, _, file in group])
            for setup, side, file in group:
                print(row(setup, side, file, weights[setup.model], answer), flush=True)
                if options.json and file.with_suffix(".result").exists():
                    found = json.loads(file.with_suffix(".result").read_text(encoding="utf-8"))
                    entry = {"set_up": setup.name, "by": side, "recipe": setup.recipe, "changes": setup.changes}
                    with options.json.open("a", encoding="utf-8") as stream:
                        stream.write(json.dumps(entry | {"device": device_name()} | found) + "\n")


def start_worker(files: list[Path]) -> subprocess.CompletedProcess[str]:
    """Trains what files say, in a process of its own."""
    command = [sys.executable, __file__, "worker", *map(str, files)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})


def compare_memory(setups: list[Setup], steps: int, folder: Path, jobs: int, end: float, kept: Path | None) -> None:
    """Trains set-ups, several at a time, and prints what they took beside what was planned for them.

    Args:
        setups: The set-ups.
        steps: Of each.
        folder: Of the models and the rows.
        jobs: How many are trained at a time.
        end: When the last may start, by the clock.
        kept: A file for all that is needed to plan them again, a line each.
    """

    def measure(setup: Setup) -> str:
        if time.monotonic() > end:
            return "left out: the time is over"
        file = write_job(setup, "recipe", steps, folder)
        answer, result = start_worker([file]), file.with_suffix(".result")
        found = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {"error": answer.stderr}
        if "error" in found:
            return f"failed: {' '.join(found['error'].split())[-600:]}"
        if kept:
            recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
            entry = {"set_up": setup.name, "model": setup.model, "device": device_name(), "recipe": recipe} | found
            with kept.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(entry) + "\n")
        planned, measured = found["planned"], found["memory"]
        if "failed" in planned:
            return (
                f"{found['allocated'] / GIB:.2f} | {found['reserved'] / GIB:.2f} | not planned: {planned['failed']} |"
            )
        off = planned["allocated_bytes"] / measured["peak_memory_bytes"] - 1
        cells = [found["allocated"], found["reserved"], planned["allocated_bytes"]]
        return " | ".join([*(f"{size / GIB:.2f}" for size in cells), f"{off:+.1%}"])

    print("| set-up | allocated, GiB | reserved, GiB | planned, GiB | error |")
    print("|---|---:|---:|---:|---:|", flush=True)
    with ThreadPoolExecutor(jobs) as pool:
        mixed = random.Random(0).sample(setups, len(setups))  # so that those that take most are not trained together
        found = {setup.name: pool.submit(measure, setup) for setup in mixed}
        for setup in setups:
            print(f"| {setup.name} | {found[setup.name].result()} |", flush=True)


def row(setup: Setup, side: str, file: Path, weights: int, answer: subprocess.CompletedProcess[str]) -> str:
    result = file.with_suffix(".result")
    if not result.exists():
        return f"| {setup.name} | {side} | failed: {' '.join(answer.stderr.split())[-600:]} ||||||"
    found = json.loads(result.read_text(encoding="utf-8"))
    if "error" in found:
        return f"| {setup.name} | {side} | failed: {' '.join(found['error'].split())[-600:]} ||||||"
    forward = 4 if "dpo" in setup.recipe or "kto" in setup.recipe else 2
    flops = (forward + 2) * weights + (2 * weights if "peft" in setup.changes else 6 * found["adapter"])
    peak = next((peak for name, peak in PEAK_FLOPS.items() if name in device_name()), None)
    generates = any(name in setup.recipe for name in GENERATING)
    used = f"{flops * found['tokens_per_second'] / peak:.1%}" if peak and not generates else "-"
    memory = f"{found['allocated'] / GIB:.2f} | {found['reserved'] / GIB:.2f}"
    losses = f"{found['losses'][0]:.6g} {found['losses'][-1]:.6g}"
    beside = [f"{found['before'] / GIB:.2f} GiB were in use before"] if found["before"] > 0.05 * GIB else []
    if setup in STOPS:
        beside.append(f"{found['stops']:.1f} stops a step")
    if generates:
        beside.append(f"a step {found['step']:.1f} s")
    if setup in FIRST:
        beside.append(f"a step {found['step']:.2f} s; weights {found['digest']}")
    if "tried" in found:
        beside.append(f"tried in {found['tried']:.2f} s with {found['tried_allocated'] / GIB:.2f} GiB")
    speed = f"{found['tokens_per_second']:,.0f} | {used}"
    return f"| {setup.name} | {side} | {speed} | {memory} | {losses} | {'; '.join(beside)} |"


def device_name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def build_model(model: str, folder: Path, tiny: bool) -> int:
    """Writes a random model of a configuration; returns the number of weights in its matrices."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    facts = (
        facts_of(model) | (TINY | {"num_key_value_heads": 2} if tiny else {}) | {"eos_token_id": 0, "pad_token_id": 0}
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        built = AutoModelForCausalLM.from_config(AutoConfig.for_model(**facts), dtype=torch.bfloat16)
    built.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return sum(layer.weight.numel() for layer in built.modules() if isinstance(layer, torch.nn.Linear))


def facts_of(model: str) -> dict[str, Any]:
    """The configuration of a model: one of `MODELS`, or one that the shelf has facts of."""
    from recipe_runner.recipe.models import find_facts

    if facts := MODELS.get(model):
        return facts
    found = find_facts(model)
    assert found, model
    return {"model_type": found.model_type, **found.config}


def build_judges(folder: Path, tiny: bool) -> None:
    """Writes a reward model and a teacher: of the same sizes, with other random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    facts = MODELS["Phi-3-mini"] | (TINY | {"num_key_value_heads": 2} if tiny else {})
    config = AutoConfig.for_model(**facts | {"eos_token_id": 0, "pad_token_id": 0}, num_labels=1)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        judge = AutoModelForSequenceClassification.from_config(config, dtype=torch.bfloat16)
    judge.save_pretrained(folder / "judge")
    del judge
    build_tokenizer().save_pretrained(folder / "judge")
    build_model("Phi-3-mini", folder / "teacher", tiny)


def build_tokenizer() -> Any:
    """Byte pairs of the shelf's texts, with Phi-3's chat template as TRL has it for training."""
    import trl
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=4000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts(), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    template = Path(trl.__file__).parent / "chat_templates" / "phi3_training.jinja"
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    return tokenizer


def texts() -> list[str]:
    file = ROOT / "recipes" / "data" / "handbook_train.jsonl"
    return [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]


def write_rows(folder: Path) -> None:
    """Rows for each format, of lengths as in the data sets that the recipes name: some hundred tokens a turn."""
    chance, known = random.Random(1), texts()

    def some(least: int, most: int) -> str:
        return " ".join(chance.choices(known, k=chance.randint(least, most)))

    def turn(role: str, least: int, most: int) -> dict[str, str]:
        return {"role": role, "content": some(least, most)}

    def talk() -> list[dict[str, str]]:
        return [turn(*part) for _ in range(chance.randint(1, 3)) for part in (("user", 1, 3), ("assistant", 2, 8))]

    rows = {
        "phi3_chat_qlora": [{"messages": talk()} for _ in range(400)],
        "phi3_instruct_qlora": [{"instruction": some(1, 2), "input": "", "output": some(1, 5)} for _ in range(800)],
        "phi3_text_qlora": [{"text": some(20, 60)} for _ in range(300)],
        "phi3_dpo_qlora": [{"prompt": some(1, 3), "chosen": some(2, 8), "rejected": some(2, 8)} for _ in range(400)],
        "phi3_grpo_qlora": [{"question": some(1, 3), "answer": "#### 1"} for _ in range(200)],
        "phi3_rloo_qlora": [{"prompt": some(1, 3)} for _ in range(200)],
    }
    rows["phi3_kto_qlora"] = rows["phi3_reward_qlora"] = rows["phi3_dpo_qlora"]
    rows["phi3_distillation_qlora"] = rows["phi3_rloo_qlora"]
    for recipe, lines in rows.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{recipe}.jsonl").write_text(text, encoding="utf-8")


def write_job(setup: Setup, side: str, steps: int, folder: Path) -> Path:
    """The shelf's recipe with the set-up's changes, on local rows and a local model."""
    recipe = yaml.safe_load((ROOT / "recipes" / f"{setup.recipe}.yaml").read_text(encoding="utf-8"))
    recipe["model"] = {"name_or_path": str(folder / setup.model), "dtype": "bfloat16", "attn_implementation": "sdpa"}
    columns = recipe["dataset"]["train"]["columns"]
    recipe["dataset"]["train"] = {"source": str(folder / f"{setup.recipe}.jsonl"), "columns": columns}
    for key in ("eval", "ignore"):
        recipe["dataset"].pop(key, None)
    for judge in recipe.get("rewards", ()):
        judge |= {"model": str(folder / "judge")} if "model" in judge else {}
        judge |= {"function": str(ROOT / "recipes" / judge["function"])} if "function" in judge else {}
    if "grpo" in setup.recipe:  # of random answers, which are all as long and all wrong, this one differs
        recipe["rewards"].append({"name": "repetition_penalty", "ngram_size": 1})
    if "distillation" in setup.recipe:
        recipe["model"]["teacher"] = str(folder / "teacher")
    kept = (
        "eval_strategy",
        "eval_steps",
        "eval_packing",
        "save_steps",
        "save_total_limit",
        "num_train_epochs",
        "warmup_steps",
    )
    recipe["training"] = {key: value for key, value in recipe["training"].items() if key not in kept}
    batches = 4 if setup in STOPS else 2
    recipe["training"] |= {"gradient_accumulation_steps": batches, "max_steps": steps, "logging_steps": 1}
    recipe["training"]["save_strategy"] = "no"
    recipe["training"]["lr_scheduler_type"] = "constant"
    for key, value in setup.changes.items():
        section, _, name = key.partition(".")
        place = recipe[section] if name else recipe
        if value is None:
            place.pop(name or section, None)
        else:
            place[name or section] = value
    job = folder / f"{''.join(c if c.isalnum() else '_' for c in setup.name)}_{side}"
    recipe["name"] = job.name
    allowed = {"allow_code": True} if "allow_code" in recipe["run"] else {}
    recipe["run"] = allowed | {"output_dir": str(job), "seed": 42, "longest_batch_first": side != "without"}
    file = job.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return file


def work(file: Path) -> None:
    """Trains what a file says, in this process, and writes what it took beside it."""
    import torch

    cuda = torch.cuda.is_available()
    gc.collect()
    before = 0
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start = time.monotonic()
    tried = watch_longest()
    try:
        train = train_plainly if file.stem.endswith("_trl") else train_recipe
        with count_stops(wanted=file.stem.startswith("stops")) as stops:
            adapter = train(file)
        (metrics,) = file.with_suffix("").rglob("metrics.jsonl")
        kept = [json.loads(status.read_text(encoding="utf-8")) for status in file.with_suffix("").rglob("status.json")]
        logged = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
        steps = [entry for entry in logged if "loss" in entry]
        pairs = list(zip(steps[WARM_UP:], steps[WARM_UP + 1 :], strict=False)) or [(steps[0], steps[-1])]
        speeds = [(b["num_tokens"] - a["num_tokens"]) / (b["time"] - a["time"]) for a, b in pairs]
        found: dict[str, Any] = {
            "tokens_per_second": statistics.median(speeds),
            "step": statistics.median(b["time"] - a["time"] for a, b in pairs),
            "losses": [entry["loss"] for entry in steps],
            "stops": len(stops) / len(steps),
            "digest": digest(file.with_suffix("")),
            "adapter": adapter,
            "before": before,
            "allocated": torch.cuda.max_memory_allocated() if cuda else 0,
            "reserved": torch.cuda.max_memory_reserved() if cuda else 0,
            "seconds": time.monotonic() - start,
            **tried,
            **{name: kept[0][key] for name, key in (("planned", "planned"), ("memory", "measured")) if kept},
        }
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}"}
    file.with_suffix(".result").write_text(json.dumps(found), encoding="utf-8")


def watch_longest() -> dict[str, float]:
    """Gets the time and the peak memory of the longest batch's trial; the peak begins anew after it."""
    import torch

    from recipe_runner.training.longest import LongestBatch

    tried: dict[str, float] = {}
    attempt = LongestBatch.on_train_begin

    def measured(*args: Any, **kwargs: Any) -> None:
        began = time.monotonic()
        attempt(*args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            tried["tried_allocated"] = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        tried.setdefault("tried_allocated", 0)
        tried["tried"] = time.monotonic() - began

    LongestBatch.on_train_begin = measured  # type: ignore[method-assign]
    return tried


@contextlib.contextmanager
def count_stops(wanted: bool) -> Iterator[list[str]]:
    """Gets a line for each time that the host waits for the GPU in a training loop."""
    import torch
    from transformers import Trainer

    stops: list[str] = []
    loop = Trainer._inner_training_loop

    def counted(*args: Any, **kwargs: Any) -> Any:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                return loop(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode("default")
                stops.extend(f"{w.filename}:{w.lineno}" for w in caught if "synchronizing CUDA" in str(w.message))

    if wanted and torch.cuda.is_available():
        Trainer._inner_training_loop = counted
    yield stops


def digest(folder: Path) -> str:
    """Tells whether two runs made the same weights, to the last bit."""
    found = hashlib.sha256()
    for file in sorted(folder.rglob("*.safetensors")):
        found.update(file.read_bytes())
    return found.hexdigest()[:8]


def train_recipe(file: Path) -> int:
    """As `recipe-run FILE`; returns the number of the adapter's weights."""
    import io

    from recipe_runner.cli import main as recipe_run

    sys.argv = ["recipe-run", str(file)]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            recipe_run()
    except SystemExit as end:
        if end.code:
            raise RuntimeError(said.getvalue()) from None
    return count_weights(file.with_suffix(""))


def count_weights(folder: Path) -> int:
    from safetensors import safe_open

    total = 0
    for file in folder.rglob("adapter/adapter_model.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (safetensors has no iterator)
                shape = tensors.get_slice(name).get_shape()
                total += shape[0] * (shape[1] if len(shape) > 1 else 1)
    return total


def train_plainly(file: Path) -> int:
    """What one would write with TRL alone."""
    from recipe_runner.launch.process import set_up_process

    set_up_process()  # the same warnings are quiet on both sides
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig, TrainerCallback
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    from recipe_runner.model.quantization import keep_4bit_weights_trainable

    folder = file.with_suffix("")

    class Log(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            with (folder / "metrics.jsonl").open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"time": time.time(), **logs}) + "\n")

    recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
    dpo = recipe["stage"] == "dpo"
    config_class, trainer_class = (DPOConfig, DPOTrainer) if dpo else (SFTConfig, SFTTrainer)
    quantization, adapter = copy.deepcopy(recipe.get("quantization")), copy.deepcopy(recipe.get("peft"))
    rows = load_dataset("json", data_files=recipe["dataset"]["train"]["source"], split="train")
    special = {} if dpo else {"assistant_only_loss": recipe["stage"] == "sft"}
    training = {
        "bf16": torch.cuda.is_available(),
        "learning_rate": float(recipe["training"].pop("learning_rate")),
    } | recipe["training"]
    folder.mkdir()
    trainer = trainer_class(
        recipe["model"]["name_or_path"],
        args=config_class(
            str(folder),
            seed=42,
            data_seed=42,
            model_init_kwargs={"dtype": "bfloat16", "attn_implementation": "sdpa"},
            report_to="none",
            disable_tqdm=True,
            **special,
            **training,
        ),
        train_dataset=rows,
        peft_config=LoraConfig(task_type="CAUSAL_LM", **{k: v for k, v in adapter.items() if k != "method"})
        if adapter
        else None,
        quantization_config=BitsAndBytesConfig(**quantization) if quantization else None,
    )
    if quantization:
        keep_4bit_weights_trainable(trainer.model)  # a bug of bitsandbytes on some CPUs: not what is compared
    trainer.add_callback(Log())
    trainer.train()
    trainer.save_model(str(folder / "adapter"))
    return count_weights(folder)


if __name__ == "__main__":
    main()
