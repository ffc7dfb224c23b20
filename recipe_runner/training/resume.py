"""Resuming: does a run go on as it began, and was it spread over processes as now?"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipe_runner.files import read_object
from recipe_runner.problems.errors import user_error
from recipe_runner.runs.folder import find_changed

CODE = "the reward function in "  # what a run is made from that may be fixed while it waits


def check_rows(rows: int, held_out: int | None, config: Any) -> None:
    """Checks that every process has a row of its own, and a whole batch where others are dropped.

    Args:
        rows: Of the training data, after packing.
        held_out: Rows of the evaluation data, if there is any.
        config: The trainer's configuration.

    Raises:
        UserError: There are too few rows.
    """
    processes = config.world_size
    sizes = [(rows, config.per_device_train_batch_size), (held_out, config.per_device_eval_batch_size)]
    for there, device in sizes if config.dataloader_drop_last else ():
        if there is not None and there < device * processes:
            message = f"{there} rows (after packing) make no whole batch of {device * processes}: all would be dropped"
            raise user_error("too-few-rows", message, "remove it", path=("training", "dataloader_drop_last"))
    if rows < processes:
        message = (
            f"{processes} processes, but {rows} rows to train on (after packing): some would train on repeated rows"
        )
        raise user_error("too-few-rows", message, "take fewer processes, or more data", path=("dataset", "train"))


def check_resumed(
    folder: Path, files: Mapping[str, str], inputs: Mapping[str, str], config: Any, streamed: bool = False
) -> str:
    """Checks that a run goes on as it began: the same model, on the same rows, in global batches of the same size.

    Args:
        folder: The run folder.
        files: Data file -> its hash.
        inputs: What else the run is made from, in words -> its hash.
        config: The trainer's configuration.
        streamed: Whether its data is.

    Returns:
        What is different and does no harm; empty when nothing is.

    Raises:
        UserError: Something that it is made from has changed, or a step would hold another number of rows.
    """
    before = read_object(folder / "environment.json")
    recorded, old, new = before.get("data_files"), before.get("processes"), describe_batches(config)
    if not isinstance(recorded, dict) or not isinstance(old, dict) or old.keys() != new.keys():
        message = f"{folder / 'environment.json'} is damaged: what the run began with can't be compared"
        raise user_error("not-a-run", message, "start a new run: --resume never")
    if changed := find_changed(recorded, files):
        fix = "revert the change, or start a new run: --resume never"
        message = f"{changed[0]} is not what the run in {folder} began with"
        raise user_error("data-changed", message, fix, path=("dataset",))
    known = before.get("inputs")
    changed = find_changed(known, inputs) if isinstance(known, dict) else []
    code = [name for name in changed if name.startswith(CODE)]
    if changed := [name for name in changed if name not in code]:
        message = f"{changed[0]} is not what the run in {folder} began with"
        fix = "revert the change, or start a new run: --resume never"
        raise user_error("model-changed", message, fix, path=("model", "name_or_path"))
    if old == new:
        return f"Resuming with {code[0]} as it is now: it has changed since the run began." if code else ""
    told = f"{old['world_size']} processes and steps of {old['global_batch_size']} rows"
    now = f"{new['world_size']} and {new['global_batch_size']}"
    if old["global_batch_size"] != new["global_batch_size"]:
        fix = f"set run.global_batch_size: {old['global_batch_size']} (and no accumulation), or start a new run"
        raise user_error("world-size-changed", f"the run began with {told}; now {now}", fix, path=("run",))
    grouped = config.train_sampling_strategy not in ("random", "sequential")
    if grouped and new["world_size"] != old["world_size"]:  # rows are ordered by the batches of a process
        message = f"the run began with {told}; now {now}: rows grouped by length would come in another order"
        raise user_error("world-size-changed", message, "launch it as before, or start a new run", path=("run",))
    if streamed:
        message = f"the run began with {told}; now {now}: each process goes on with its own part of the stream"
        raise user_error("world-size-changed", message, "launch it as before, or start a new run", path=("run",))
    if new["engine"] != old["engine"] or (new["engine"] != "ddp" and new["world_size"] != old["world_size"]):
        message = f"the run began with {old['engine']} and {told}; now {new['engine']}, {now}: its shards don't fit"
        raise user_error("world-size-changed", message, "launch it as before, or start a new run", path=("run",))
    return f"Resuming with {now}, begun with {told}: the same steps on the same rows; random numbers (dropout) differ."


def describe_batches(config: Any) -> dict[str, Any]:
    """How a run is spread over processes: what must be the same when it is resumed."""
    kind = config.distributed_state.distributed_type.value
    engine = {"DEEPSPEED": "deepspeed", "FSDP": "fsdp"}.get(kind, "ddp")
    per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps
    return {"world_size": config.world_size, "global_batch_size": per_step * config.world_size, "engine": engine}
