"""Holds plans of memory against published peaks: docs/plan-accuracy.md, and the error bars that `plan` prints.

    python scripts/make_plan_accuracy.py [--check]
    python scripts/make_plan_accuracy.py --recipe F --sequence-length N [--batch N] [--full-logits] ...

The second form prints the plan of one case as JSON, for other tables. What decides a published peak and is no part of a
recipe are its options. Cases are in benchmarks/memory/published.json, each with its source; `fitted` ones were used to
choose a constant or to guess a setting, and do not count; nor do those that are `left_out`, which say why. What
benchmarks/gpu.py measured with this project's own stack, measured.json, has a table of its own.
"""

import argparse
import json
import math
import re
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

from recipe_runner.launch.configuration import Launch
from recipe_runner.plan import sharding
from recipe_runner.plan.accuracy import ACCURACY, kind_of
from recipe_runner.plan.device import ANY_GPU, choose_device
from recipe_runner.plan.estimate import CONTEXT, SHARED_SLACK, SLACK, work_out
from recipe_runner.plan.memory import Setting, Stack, trace
from recipe_runner.plan.setting import build_config, choose_setting, find_config
from recipe_runner.plan.step import Batch
from recipe_runner.recipe.document import dump_values
from recipe_runner.recipe.models import find_facts
from recipe_runner.recipe.recipe import Recipe
from recipe_runner.recipe.resolve import load_recipe
from recipe_runner.recipe.sections import ModelSection

ROOT = Path(__file__).resolve().parent.parent
CASES = ROOT / "benchmarks" / "memory" / "published.json"
MEASURED = ROOT / "benchmarks" / "memory" / "measured.json"
PAGE = ROOT / "docs" / "plan-accuracy.md"
GRID = re.compile(r"<!-- grid -->.*<!-- end of grid -->", re.DOTALL)
GIB = 2**30
FORMATS = {"dpo": "preference", "reward": "preference", "kto": "preference", "grpo": "prompt"}
MODEL = "The model is of Llama-3.2-1B's sizes unless the line names another, a row has 2,048 tokens."
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}


@dataclass(frozen=True)
class Compared:
    """A case with what was planned for it."""

    case: dict[str, Any]
    kind: str
    planned: int

    @property
    def error(self) -> float:
        """The plan's share above what was published."""
        return self.planned / int(self.case["bytes"]) - 1


def main() -> None:
    options = read_options()
    if options.recipe:
        print(json.dumps(plan_one(options), indent=1))
        return
    found = [compare(case) for case in json.loads(CASES.read_text(encoding="utf-8"))]
    measured = json.loads(MEASURED.read_text(encoding="utf-8"))
    table = "\n".join(write_measured(measured, compare_measured(measured)))
    page, bars = write_page(found).replace("{measured}", table), json.dumps(write_bars(found), indent=1) + "\n"
    if options.check:
        if PAGE.read_text(encoding="utf-8") != page or ACCURACY.read_text(encoding="utf-8") != bars:
            sys.exit(f"{PAGE.name} or {ACCURACY.name} is not what the plans give now: run {sys.argv[0]}")
        return
    PAGE.write_text(page, encoding="utf-8")
    ACCURACY.write_text(bars, encoding="utf-8")
    print(summarize(found))


def read_options() -> argparse.Namespace:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--check", action="store_true", help="fail where the page is out of date")
    arguments.add_argument("--recipe", help="plan this recipe alone, and print JSON")
    arguments.add_argument("--set", dest="overrides", action="append", default=[], help="KEY=VALUE of the recipe")
    arguments.add_argument("--model-config", type=Path, help="a config.json of the model")
    arguments.add_argument("--sequence-length", type=int, help="tokens of every row, as it was")
    arguments.add_argument("--batch", type=int, help="rows at a time on a device")
    arguments.add_argument("--supervised", type=int, help="tokens of a row that are learned; all without it")
    arguments.add_argument("--packed", action="store_true", help="rows are one sequence, kept apart by positions")
    arguments.add_argument("--padded", action="store_true", help="rows are padded, and a mask hides it")
    arguments.add_argument("--gpu", help="name of a GPU, or cpu")
    arguments.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="of the weights")
    arguments.add_argument("--mixed", choices=["bfloat16", "float16", "no"], help="mixed precision")
    arguments.add_argument("--full-logits", action="store_true", help="the loss is made from all logits, in float32")
    arguments.add_argument("--half-logits", action="store_true", help="they stay in the data type of the model")
    arguments.add_argument("--copied-logits", action="store_true", help="and these are copied when they are shifted")
    arguments.add_argument("--float32-casts", action="store_true", help="what is not quantized is float32")
    arguments.add_argument("--math-attention", action="store_true", help="attention keeps its weights")
    arguments.add_argument("--kept-inputs", action="store_true", help="4-bit layers keep what they are given")
    arguments.add_argument("--adapter-dtype", choices=["bfloat16", "float16", "float32"], help="of the adapter")
    arguments.add_argument("--gpus", type=int, default=1, help="devices that share the run")
    arguments.add_argument("--sharding", choices=["ddp", "fsdp", "fsdp-offload", "zero1", "zero2", "zero3"])
    return arguments.parse_args()


def plan_one(options: argparse.Namespace) -> dict[str, Any]:
    """The plan of a recipe, with the settings of the command line, as JSON values."""
    recipe = load_recipe(options.recipe, options.overrides)
    device = choose_device(options.gpu, None)
    config = find_config(recipe.model, options.model_config, recipe.stage.scores)
    chosen = choose_setting(recipe, config, device, {})
    doubled = 2 if recipe.stage.shape in ("pairs", "scored_pairs") else 1
    rows = options.batch * doubled if options.batch else chosen.train.rows
    length = options.sequence_length or chosen.train.length
    flat = options.packed or (chosen.train.flat and not options.padded)
    batch = Batch(rows, length, options.supervised or length - 1, flat, options.padded, chosen.train.answer)
    stack = Stack(
        full_logits=options.full_logits,
        float32_logits=not options.half_logits,
        copied_logits=options.copied_logits,
        float32_casts=options.float32_casts,
        math_attention=options.math_attention,
        kept_inputs=options.kept_inputs,
        adapter_dtype=getattr(torch, options.adapter_dtype) if options.adapter_dtype else None,
    )
    mixed = chosen.mixed if options.mixed is None else None if options.mixed == "no" else getattr(torch, options.mixed)
    dtype = getattr(torch, options.dtype) if options.dtype else chosen.dtype
    setting = Setting(config, device, dtype, mixed, batch, None, chosen.continued, stack)
    launch = make_launch(options.sharding, options.gpus)
    return work_out(recipe, setting, {}, launch).as_json()


def make_launch(kind: str | None, gpus: int) -> Launch | None:
    """A launch configuration of a kind of sharding."""
    if gpus == 1:
        return None
    values: dict[str, Any] = {"distributed_type": "MULTI_GPU", "num_processes": gpus}
    if kind and kind.startswith("fsdp"):
        values |= {"distributed_type": "FSDP", "fsdp_config": {"fsdp_offload_params": kind == "fsdp-offload"}}
    elif kind and kind.startswith("zero"):
        values |= {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": int(kind[-1])}}
    return Launch(str(kind), values)


def compare(case: dict[str, Any]) -> Compared:
    """Plans a published case."""
    recipe = make_recipe(case)
    dtype, mixed = getattr(torch, case["dtype"]), case.get("mixed")
    batch = Batch(
        case["batch"], case["length"], case["length"] - 1, case.get("packed", False), case.get("padded", False)
    )
    adapter = case.get("adapter_dtype")
    stack = Stack(
        full_logits=case.get("full_logits", False),
        float32_logits=not case.get("half_logits", False),
        copied_logits=case.get("copied_logits", False),
        float32_casts=case.get("float32_casts", False),
        math_attention=case.get("attention") == "math",
        kept_inputs=case.get("kept_inputs", False),
        adapter_dtype=getattr(torch, adapter) if adapter else None,
    )
    setting = Setting(
        read_config(case), ANY_GPU, dtype, getattr(torch, mixed) if mixed else None, batch, None, False, stack
    )
    traced = trace(recipe, setting)
    peaks = traced.peaks
    if launch := make_launch(case.get("sharding"), case["gpus"]):
        kept = sharding.Kept(
            traced.model.parameters["trainable"], traced.model.trained_bytes, setting.mixed is not None
        )
        peaks = sharding.share(peaks, launch, traced.model.layers, kept)
    allocated = max(peak.total for peak in peaks.values()) + ANY_GPU.workspace
    slack = SHARED_SLACK if launch else SLACK
    more = {"allocated": 0.0, "reserved": slack * allocated, "driver": slack * allocated + CONTEXT}
    return Compared(case, kind_of(recipe), round(allocated + more[case["figure"]]))


def read_config(case: dict[str, Any]) -> PretrainedConfig:
    """The configuration of a case's model: by the shelf's facts, or as it stands in the case."""
    if isinstance(case["config"], str):
        facts = find_facts(case["config"])
        assert facts, case["config"]
        config = build_config(ModelSection(case["config"], "main", True, False), facts)
        config.tie_word_embeddings = config.tie_word_embeddings and not case.get("untied", False)
        return config
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = AutoConfig.for_model(**case["config"])
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    return config


def make_recipe(case: dict[str, Any]) -> Recipe:
    """A recipe with the settings of a case that a recipe has."""
    training = {
        "optim": case["optimizer"],
        "learning_rate": 1e-5,
        "per_device_train_batch_size": case["batch"],
        "gradient_accumulation_steps": case.get("accumulation", 1),
        "max_length": case["length"],
        "activation_checkpointing": case["checkpointing"],
    }
    values: dict[str, Any] = {
        "schema_version": 1,
        "name": "case",
        "stage": "sft",
        "model": {"name_or_path": "someone/model"},
        "dataset": {"format": "text", "train": {"source": "someone/rows"}},
        "training": training,
    }
    if case.get("peft"):
        values["peft"] = case["peft"]
    if quantization := case.get("quantization"):
        double = {"bnb_4bit_use_double_quant": bool(quantization.get("double"))}
        storage = {"llm_int8_skip_modules": []} if quantization.get("head") else {}
        storage |= {"bnb_4bit_quant_storage": quantization["storage"]} if "storage" in quantization else {}
        values["quantization"] = NF4 | double | storage
    return load_values(values)


def load_values(values: dict[str, Any]) -> Recipe:
    """A recipe with these values."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "case.yaml"
        file.write_text(dump_values(values), encoding="utf-8")
        return load_recipe(str(file))


def compare_measured(measured: dict[str, Any]) -> list[Compared]:
    """Plans what was measured on a GPU with this stack, with the batches that were trained on."""
    found = []
    for case in measured["cases"]:
        own = case["values"]
        values = {
            "schema_version": 1,
            "name": "case",
            "model": {"name_or_path": "someone/model", "dtype": case["dtype"]},
            "dataset": {"format": FORMATS.get(own["stage"], "text"), "train": {"source": "someone/rows"}},
            **own,
        }
        values["training"] = {"learning_rate": 1e-5, **own["training"]}
        recipe = load_values(values)
        described = case | {"config": measured["models"].get(case["config"], case["config"])}
        setting = choose_setting(recipe, read_config(described), choose_device("H100-80GB", None), {})
        made = work_out(recipe, replace(setting, train=Batch(**case["batch"])), {})
        found.append(Compared(case | {"bytes": case["allocated"]}, kind_of(recipe), made.allocated))
    return found


def write_measured(measured: dict[str, Any], found: list[Compared]) -> Iterator[str]:
    """The table of what was measured with this stack."""
    errors = sorted(abs(one.error) for one in judged(found))
    within = sum(error <= 0.05 for error in errors)
    yield (
        f"{len(errors)} set-ups of models of real sizes with random weights: median error "
        f"{statistics.median(errors):.1%}, largest {errors[-1]:.1%}; {within} within 5 %. Nothing was fitted to them."
    )
    yield ""
    yield f"`{measured['made_by']}`, one {measured['device']}, {measured['stack']}, {measured['date']}. {MODEL}"
    yield ""
    yield from (f"{one.case['id']} was {one.case['left_out']}." for one in found if one.case.get("left_out"))
    yield ""
    yield "| set-up | allocated, GiB | planned, GiB | error | reserved, GiB |"
    yield "|---|---:|---:|---:|---:|"
    for one in found:
        mark = " (not counted)" if one.case.get("left_out") else ""
        taken, planned, held = (size / GIB for size in (one.case["allocated"], one.planned, one.case["reserved"]))
        yield f"| {one.case['id']}{mark} | {taken:.2f} | {planned:.2f} | {one.error:+.1%} | {held:.2f} |"


def judged(found: list[Compared]) -> list[Compared]:
    """The cases that count: those that nothing was fitted to, and whose settings are known."""
    return [one for one in found if not one.case.get("fitted") and not one.case.get("left_out")]


def write_bars(found: list[Compared]) -> dict[str, dict[str, float]]:
    """Kind -> how many cases, and the error that nine of ten are within."""
    bars = {}
    for kind in sorted({one.kind for one in judged(found)}):
        errors = sorted(abs(one.error) for one in judged(found) if one.kind == kind)
        error = max(0.05, math.ceil(100 * errors[math.ceil(0.9 * len(errors)) - 1]) / 100)
        bars[kind] = {"cases": len(errors), "within": sum(value <= error for value in errors), "error": error}
    return bars


def summarize(found: list[Compared]) -> str:
    errors = sorted(abs(one.error) for one in judged(found))
    within = sum(error <= 0.15 for error in errors)
    return (
        f"{len(errors)} published cases that nothing was fitted to: median error {statistics.median(errors):.1%}, "
        f"{within} ({within / len(errors):.0%}) within 15 %"
    )


def describe(found: list[Compared]) -> str:
    """What the summary does not say: other choices of cases, and in which direction plans are off."""

    def figures(chosen: list[Compared]) -> str:
        errors = [abs(one.error) for one in chosen]
        share = sum(error <= 0.15 for error in errors) / len(errors)
        return f"{len(errors)} | {statistics.median(errors):.1%} | {share:.0%}"

    counted = judged(found)
    own_length = [one for one in counted if one.case["group"] != "peft"]
    in_4_bits = [one for one in counted if one.case.get("quantization")]
    known = [one for one in found if not one.case.get("fitted")]
    low = sum(one.error < 0 for one in counted)
    lines = [
        f"{low} of the {len(counted)} plans are below what was published (median {_median(counted):+.1%}):",
        "the range that `recipe-run plan` prints reaches further up than down.",
        "",
        "| cases | number | median error | within 15 % |",
        "|---|---|---|---|",
        f"| that count | {figures(counted)} |",
        f"| without PEFT's table, the length of whose rows one row of it gave | {figures(own_length)} |",
        f"| of those that count, bases in 4 or 8 bits | {figures(in_4_bits)} |",
        f"| with those that are not counted | {figures(known)} |",
    ]
    return "\n".join(lines)


def _median(found: list[Compared]) -> float:
    return statistics.median(one.error for one in found)


def write_page(found: list[Compared]) -> str:
    head = (ROOT / "scripts" / "plan_accuracy_head.md").read_text(encoding="utf-8")
    page = (
        head.replace("{summary}", summarize(found)).replace("{choices}", describe(found))
        + "\n".join(write_tables(found))
        + "\n"
    )
    grid = GRID.search(PAGE.read_text(encoding="utf-8")) if PAGE.is_file() else None  # of another script
    return GRID.sub(lambda _: grid[0], page) if grid else page


def write_tables(found: list[Compared]) -> Iterator[str]:
    for group in dict.fromkeys(one.case["group"] for one in found):
        own = [one for one in found if one.case["group"] == group]
        counted = [abs(one.error) for one in judged(own)]
        told = f"median error {statistics.median(counted):.1%}" if counted else "not counted"
        yield f"\n## {group}: {len(own)} cases, {told}\n"
        notes = [one.case.get(key) for one in own for key in ("left_out", "note") if one.case.get(key)]
        yield from (f"- {note}" for note in dict.fromkeys(notes))
        yield "" if notes else f"Source: {own[0].case['source'].partition(' method_comparison')[0]}\n"
        yield "| case | figure | published, GiB | planned, GiB | error |"
        yield "|---|---|---|---|---|"
        for one in own:
            mark = " (fitted)" if one.case.get("fitted") else " (not counted)" if one.case.get("left_out") else ""
            published, planned = one.case["bytes"] / GIB, one.planned / GIB
            name = one.case["id"]
            yield f"| {name}{mark} | {one.case['figure']} | {published:.2f} | {planned:.2f} | {one.error:+.1%} |"


if __name__ == "__main__":
    main()
