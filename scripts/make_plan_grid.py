"""Holds plans of memory against training on a CPU: tensors of small random models, as PyTorch's profiler counts them.

    python scripts/make_plan_grid.py [--only TEXT] [--write]

Every cell of stage x method x batch x length x checkpointing is trained for three steps by the runner. `--write` puts
the table into docs/plan-accuracy.md.
"""

import argparse
import itertools
import json
import re
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback

from recipe_runner.model.tiny import fill_padding
from recipe_runner.plan.device import CPU
from recipe_runner.plan.memory import Setting, trace
from recipe_runner.plan.step import Batch
from recipe_runner.recipe.document import dump_values
from recipe_runner.recipe.resolve import load_recipe
from recipe_runner.smoke.stand_in import learn_tokenizer
from recipe_runner.training.run import run_recipe

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "plan-accuracy.md"
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
LORA = {"method": "lora", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "LoRA": {"peft": LORA},
    "QLoRA": {"peft": LORA, "quantization": NF4 | {"bnb_4bit_compute_dtype": "float32"}},
    "DoRA": {"peft": LORA | {"use_dora": True}},
}
FORMATS = {"sft": "text", "dpo": "preference", "kto": "preference", "reward": "preference"}
MIB = 2**20


@dataclass(frozen=True)
class Cell:
    """A set-up: what is trained how, on what."""

    stage: str
    method: str
    batch: int
    length: int
    checkpointing: bool

    @property
    def name(self) -> str:
        """In a few words."""
        again = ", checkpointing" if self.checkpointing else ""
        return f"{self.stage}, {self.method}, {self.batch} x {self.length}{again}"


@dataclass(frozen=True)
class Measured:
    """Bytes of tensors at most, measured and planned."""

    cell: Cell
    bytes: int
    planned: int

    @property
    def error(self) -> float:
        """The plan's share above what was measured."""
        return self.planned / self.bytes - 1


def cells() -> Iterator[Cell]:
    """The grid."""
    for stage, method, batch, length, again in itertools.product(FORMATS, METHODS, (1, 4), (128, 512), (False, True)):
        if stage == "kto" and batch == 1:
            continue  # its KL term needs two rows
        yield Cell(stage, method, batch, length, again)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--only", default="", help="cells whose names hold this")
    arguments.add_argument("--write", action="store_true", help="put the table into the page")
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model")
        found = []
        for cell in cells():
            if options.only in cell.name:
                found.append(measure(cell, folder))
                print(f"{cell.name}: {found[-1].bytes / MIB:.1f} MiB, {found[-1].error:+.1%}", flush=True)
    print(summarize(found))
    if options.write:
        lines = ["| set-up | measured, MiB | planned, MiB | error |", "|---|---|---|---|"]
        for one in found:
            lines.append(f"| {one.cell.name} | {one.bytes / MIB:.1f} | {one.planned / MIB:.1f} | {one.error:+.1%} |")
        text = f"<!-- grid -->\n{summarize(found)}\n\n" + "\n".join(lines) + "\n<!-- end of grid -->"
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(
            re.sub(r"<!-- grid -->.*<!-- end of grid -->", lambda _: text, page, flags=re.S), encoding="utf-8"
        )


def summarize(found: list[Measured]) -> str:
    """How far the plans are off."""
    errors = [abs(one.error) for one in found]
    within = sum(error <= 0.05 for error in errors)
    told = f"median error {statistics.median(errors):.1%}, largest {max(errors):.1%}"
    return f"{len(errors)} set-ups trained on a CPU: {told}; {within} ({within / len(errors):.0%}) within 5 %."


def make_model(folder: Path) -> None:
    """A small random model with a tokenizer."""
    texts = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))[:6]]
    tokenizer = learn_tokenizer(texts, ["<s>", "</s>"])
    tokenizer.eos_token = tokenizer.pad_token = "</s>"
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", vocab_size=len(tokenizer), tie_word_embeddings=True, **SIZES)
    model = AutoModelForCausalLM.from_config(config)
    fill_padding(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_rows(cell: Cell, folder: Path) -> Path:
    """Rows that are longer than `max_length`, or pairs that are a little shorter."""
    text = " ".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))[:6]).split()
    words = cell.length * 2 if FORMATS[cell.stage] == "text" else cell.length // 4
    rows = []
    for number in range(24):
        part = " ".join(text[number * 40 : number * 40 + words])
        if FORMATS[cell.stage] == "text":
            rows.append({"text": part})
        else:
            rows.append({"prompt": part[: len(part) // 3], "chosen": part[len(part) // 3 :], "rejected": part[20:]})
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def measure(cell: Cell, folder: Path) -> Measured:
    """Trains a cell, and plans it for the shapes of its batches."""
    values: dict[str, Any] = {
        "schema_version": 1,
        "name": "cell",
        "stage": cell.stage,
        "model": {"name_or_path": str(folder / "model")},
        "dataset": {
            "format": FORMATS[cell.stage],
            "max_dropped": 1.0,
            "train": {"source": str(write_rows(cell, folder))},
        },
        "training": {
            "max_steps": 3,
            "max_length": cell.length,
            "per_device_train_batch_size": cell.batch,
            "learning_rate": 1e-4,
            "activation_checkpointing": cell.checkpointing,
            "save_strategy": "no",
            "use_cpu": True,
        },
        "run": {"output_dir": str(folder / "runs"), "longest_batch_first": False},
        **METHODS[cell.method],
    }
    file = folder / "cell.yaml"
    file.write_text(dump_values(values), encoding="utf-8")
    recipe = load_recipe(str(file))
    seen = Watcher()
    run_recipe(recipe, "never", None, seen.watch)
    config = AutoConfig.from_pretrained(folder / "model")
    rows, length, learned = max(seen.shapes, key=lambda shape: shape[0] * shape[1])
    batch = Batch(rows, length, -(-learned // rows), padded=seen.padded)
    traced = trace(recipe, Setting(config, CPU, torch.float32, None, batch))
    return Measured(cell, seen.peak, traced.peak.total)


class Watcher(TrainerCallback):
    """Counts the bytes of tensors while a run trains, from the profiler's events of memory."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, int, int]] = []
        self.padded = False
        self.peak = 0

    def watch(self, trainer: Any, prepared: Any, folder: Path) -> None:
        """Is given the trainer before it trains."""
        trainer.add_callback(self)
        self.reference = getattr(trainer, "ref_model", None)
        step = trainer.training_step

        def noted(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            rows, length = inputs["input_ids"].shape
            learned = inputs["labels"] != -100 if "labels" in inputs else inputs.get("completion_mask")
            count = rows * length if learned is None else int(learned[:, 1:].sum())
            self.shapes.append((rows, length, count))
            self.padded = self.padded or bool((inputs["attention_mask"] == 0).any())
            return step(model, inputs, *args, **kwargs)

        trainer.training_step = noted

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts to count: from the tensors of the model."""
        storages = {}
        others = self.reference.parameters() if self.reference is not None else ()
        for tensor in (*kwargs["model"].parameters(), *kwargs["model"].buffers(), *others):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            if state_ := getattr(tensor, "quant_state", None):
                for part in (
                    state_.absmax,
                    state_.code,
                    *((state_.state2.absmax, state_.state2.code) if state_.nested else ()),
                ):
                    storages[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
        self.static = sum(storages.values())
        self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self.profile.__enter__()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Adds up what was taken and given back, in the order of time."""
        self.profile.__exit__(None, None, None)
        events = [event for event in self.profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        live = self.peak = self.static
        for event in sorted(events, key=lambda event: event.start_ns()):
            live += event.nbytes()
            self.peak = max(self.peak, live)


if __name__ == "__main__":
    main()
