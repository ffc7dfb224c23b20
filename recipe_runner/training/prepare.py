"""Everything that a run needs before weights are loaded, the cheapest first."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft import PeftConfig
from transformers import PreTrainedTokenizerBase
from transformers.integrations import get_available_reporting_integrations
from trl import DPOConfig, SFTConfig

from recipe_runner.data import checks, sources, store
from recipe_runner.data.store import PreparedData, PreparedSplit
from recipe_runner.launch import processes
from recipe_runner.model import base as model
from recipe_runner.model import continuation
from recipe_runner.problems.errors import UserError, first_line
from recipe_runner.problems.problem import Problem, sort_problems
from recipe_runner.recipe.recipe import Recipe
from recipe_runner.runs.folder import hash_weights
from recipe_runner.training import environment
from recipe_runner.training.environment import Precision

CONFIGS = {"pretrain": SFTConfig, "sft": SFTConfig, "dpo": DPOConfig}


@dataclass(frozen=True)
class Prepared:
    """Everything that a run needs before weights are loaded."""

    config: SFTConfig | DPOConfig
    precision: Precision
    tokenizer: PreTrainedTokenizerBase
    adapter: Path | None
    peft_config: PeftConfig | None
    data: PreparedData
    warnings: tuple[Problem, ...]

    @property
    def train(self) -> PreparedSplit:
        """The training rows."""
        return self.data.splits["train"]

    @property
    def evaluation(self) -> PreparedSplit | None:
        """The evaluation rows, when the recipe evaluates."""
        return self.data.splits.get("eval")


def prepare(recipe: Recipe, before: PreTrainedTokenizerBase | None = None) -> Prepared:
    """Checks and prepares everything but the weights, the cheapest first.

    Args:
        recipe: A resolved recipe.
        before: The tokenizer of the stage before, whose adapter is not there yet.

    Raises:
        UserError: The recipe, the data or the environment is at fault.
    """
    processes.check_launcher(recipe)
    precision = environment.choose_precision(recipe)
    model.find_model(recipe)
    config = build_config(recipe, precision)
    if config.process_index == 0:
        print(f"Preparing {recipe.values['name']} ...", flush=True)
    adapter = continuation.find_adapter(recipe)
    opened = sources.open_sources(recipe)
    tokenizer = load_tokenizer(recipe, adapter, before)
    model_config = model.load_model_config(recipe)
    if adapter:
        peft_config: PeftConfig | None = continuation.load_peft(recipe, adapter)
        continuation.check_fit(recipe, adapter, continuation.load_peft(recipe, adapter), model_config)
    elif peft_config := model.build_peft(recipe):
        model.check_targets(recipe, peft_config, model_config)
    data = store.prepare_data(recipe, opened, tokenizer, config)
    problems = find_data_problems(recipe, tokenizer, data)
    raise_errors(problems)
    if warning := processes.find_default_config():
        problems.append(warning)
    return Prepared(config, precision, tokenizer, adapter, peft_config, data, tuple(problems))


def load_tokenizer(
    recipe: Recipe, adapter: Path | None, before: PreTrainedTokenizerBase | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer, with the chat template of the recipe, else of the adapter that is trained further.

    Raises:
        UserError: It can't be loaded, or is not the one that the adapter was trained with.
    """
    saved = continuation.read_tokenizer(recipe, adapter) if adapter else before
    tokenizer = model.load_tokenizer(recipe, saved)
    if adapter and saved is not None:
        continuation.check_tokenizer(recipe, saved, tokenizer)
    return tokenizer


def find_data_problems(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, data: PreparedData) -> list[Problem]:
    """What was found in the data of all splits: errors and warnings."""
    found = [
        problem
        for split, prepared in data.splits.items()
        for problem in checks.find_problems(recipe, tokenizer, prepared.accounting, split)
    ]
    return sort_problems(found)


def raise_errors(problems: list[Problem]) -> None:
    """Ends a command for the errors among what was found.

    Raises:
        UserError: There are some.
    """
    if errors := [problem for problem in problems if problem.severity == "error"]:
        raise UserError(errors)


def build_config(recipe: Recipe, precision: Precision) -> SFTConfig | DPOConfig:
    """The trainer's configuration: the recipe's `training` section, and what other sections own.

    Raises:
        UserError: TRL or transformers refuses the combination of fields.
    """
    section, base = recipe.section("training"), recipe.values["model"]
    section.pop("chat_template_path", None)  # set on the tokenizer already
    if size := recipe.values["run"].get("global_batch_size"):
        section["gradient_accumulation_steps"] = processes.derive_accumulation(recipe, size)
    processes.join_processes(section)
    init = {key: base[key] for key in ("revision", "attn_implementation", "use_safetensors") if key in base}
    owned = {
        "output_dir": os.devnull,  # replaced once the run folder exists
        "seed": recipe.values["run"]["seed"],
        "data_seed": recipe.values["run"]["seed"],
        "bf16": precision.bf16,
        "fp16": precision.fp16,
        "trust_remote_code": base["trust_remote_code"],
        "model_init_kwargs": init | {"dtype": precision.dtype},
    }
    if recipe.values["stage"] != "dpo":
        owned["dataset_kwargs"] = {"skip_prepare_dataset": True}  # prepared before the weights are loaded
    try:
        config = CONFIGS[recipe.values["stage"]](**{**section, **owned})
    except (ValueError, ImportError, TypeError) as error:
        raise recipe.error("training-refused", first_line(error), "", "training") from error
    processes.check_processes(config)
    trackers = get_available_reporting_integrations()
    for tracker in set(config.report_to) - set(trackers):
        known = f"installed trackers: {', '.join(sorted(trackers)) or 'none'}"
        raise recipe.error("tracker-missing", f"'{tracker}' is not installed", known, "training", "report_to")
    return config


def check_rows(recipe: Recipe, prepared: Prepared) -> None:
    """Checks that every process has a row of its own.

    Raises:
        UserError: There are more processes than rows.
    """
    rows, processes = len(prepared.train.dataset), prepared.config.world_size
    if rows < processes:
        message = (
            f"{processes} processes, but {rows} rows to train on (after packing): some would train on repeated rows"
        )
        raise recipe.error("too-few-rows", message, "take fewer processes, or more data", "dataset", "train")


def check_resumed(recipe: Recipe, prepared: Prepared, folder: Path) -> str:
    """Checks that a run goes on as it began: on the same rows, in global batches of the same size.

    Returns:
        What is different and does no harm; empty when nothing is.

    Raises:
        UserError: The data has changed, or a step would hold another number of rows.
    """
    try:
        before = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""  # the run ended before it was written: there is nothing to compare with
    files, recorded = prepared.data.files, before.get("data_files", {})
    if changed := [name for name, digest in files.items() if recorded.get(name, digest) != digest]:
        fix = "take the change back, or start a new run: --resume never"
        raise recipe.error("data-changed", f"{changed[0]} is not what the run in {folder} began with", fix, "dataset")
    old, new = before.get("processes"), describe_batches(prepared.config)
    if not old or old == new:
        return ""
    told = f"{old['world_size']} processes and steps of {old['global_batch_size']} rows"
    now = f"{new['world_size']} and {new['global_batch_size']}"
    if old["global_batch_size"] != new["global_batch_size"]:
        fix = f"set run.global_batch_size: {old['global_batch_size']} (and no accumulation), or start a new run"
        raise recipe.error("world-size-changed", f"the run began with {told}; now {now}", fix, "run")
    grouped = prepared.config.train_sampling_strategy not in ("random", "sequential")
    if grouped and new["world_size"] != old["world_size"]:  # rows are ordered by the batches of a process
        message = f"the run began with {told}; now {now}: rows grouped by length would come in another order"
        raise recipe.error("world-size-changed", message, "launch it as before, or start a new run", "run")
    if new["engine"] != old["engine"] or (new["engine"] != "ddp" and new["world_size"] != old["world_size"]):
        message = f"the run began with {old['engine']} and {told}; now {new['engine']}, {now}: its shards don't fit"
        raise recipe.error("world-size-changed", message, "launch it as before, or start a new run", "run")
    return f"Resuming with {now}, begun with {told}: the same steps on the same rows; random numbers (dropout) differ."


def describe_batches(config: Any) -> dict[str, Any]:
    """How a run is spread over processes: what must be the same when it is resumed."""
    kind = config.distributed_state.distributed_type.value
    engine = {"DEEPSPEED": "deepspeed", "FSDP": "fsdp"}.get(kind, "ddp")
    per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps
    return {"world_size": config.world_size, "global_batch_size": per_step * config.world_size, "engine": engine}


def describe_run(recipe: Recipe, prepared: Prepared) -> dict[str, Any]:
    """What `environment.json` holds: versions and hardware, precision, what became of the data."""
    base, adapter = recipe.values["model"]["name_or_path"], prepared.adapter
    return environment.describe_environment(recipe) | {
        "base_model": {"name_or_path": base, "weights": hash_weights(Path(base)) if Path(base).is_absolute() else None},
        "adapter": {"folder": str(adapter), "weights": hash_weights(adapter)} if adapter else None,
        "processes": describe_batches(prepared.config),
        "precision": str(prepared.precision),
        "data": {name: asdict(split.accounting) for name, split in prepared.data.splits.items()},
        "dataset_fingerprint": prepared.data.key,
        "data_files": prepared.data.files,
        "warnings": [str(problem) for problem in prepared.warnings],
    }
