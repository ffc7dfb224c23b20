"""A run, from top to bottom: the cheapest failure first, then the weights, then training."""

import contextlib
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from recipe_runner.data.pictures import processor_of
from recipe_runner.data.prepare import input_ids_of
from recipe_runner.files import list_runs, read_status, write_json, write_status
from recipe_runner.launch.configuration import Launch
from recipe_runner.problems.errors import Interrupted, UserError, user_error
from recipe_runner.problems.words import make_visible
from recipe_runner.recipe.recipe import Recipe
from recipe_runner.recipe.rules.adapter import alters_base
from recipe_runner.runs import folder as run_folder
from recipe_runner.runs.metrics import drop_metrics_after, measure_speed
from recipe_runner.runs.report import leave_report
from recipe_runner.stages import Stage
from recipe_runner.training import card, prepare, resume, summary, trainers, verify
from recipe_runner.training.allocation import allocate_ranks
from recipe_runner.training.callbacks import EarlyStop, Finished, Interruption, Recorder, say_progress, weigh_batches
from recipe_runner.training.completions import keep_completions, keep_prompt_order
from recipe_runner.training.environment import measure_memory, measure_parts
from recipe_runner.training.failures import explain
from recipe_runner.training.initial import keep_initial, save_converted
from recipe_runner.training.longest import LongestBatch, find_longest
from recipe_runner.training.optimizer import forget_modules, use_peft_optimizer
from recipe_runner.training.planned import check_room, record_plan
from recipe_runner.training.prepare import Prepared
from recipe_runner.training.reward_functions import FAILED
from recipe_runner.training.rewards import try_rewards
from recipe_runner.training.samples import Sampler, record_golden, record_scores, tokenizer_of
from recipe_runner.training.state import keep_state

Watch = Callable[[Any, Prepared, Path], None]  # is given the trainer, what was prepared, and the run folder


def run_recipe(recipe: Recipe, resuming: str, launch: Launch | None = None, watch: Watch | None = None) -> Path:
    """Trains by a recipe and returns the run folder.

    Args:
        recipe: A resolved recipe.
        resuming: `auto`, `never`, or the folder of a run.
        launch: What the launcher had set up when this process began.
        watch: Is given the trainer, what was prepared, and the run folder, before the first step.

    Raises:
        UserError: The recipe, the data or the environment is at fault.
        Interrupted: The user pressed Ctrl-C.
    """
    run_folder.check_writable(Path(recipe.run.output_dir))
    found = run_folder.find_resumable(recipe.home, recipe.values, resuming)
    prepared = prepare.prepare(recipe, launch)
    config = prepared.config
    found = agree(found)
    held_out = len(prepared.evaluation.dataset) if prepared.evaluation else None
    resume.check_rows(len(prepared.train.dataset), held_out, config)
    if resuming == "auto" and not found and config.process_index == 0:
        for run in list_runs(recipe.home)[-1:]:
            if read_status(run) == "damaged":
                print(f"warning[not-a-run] {run} is damaged: passed over, a new run is started", file=sys.stderr)
    if found and (
        note := resume.check_resumed(found, prepared.data.files, prepared.inputs, config, recipe.dataset.streaming)
    ):
        _say(config, note)
    for warning in prepared.warnings if config.process_index == 0 else ():
        print(recipe.place(warning), file=sys.stderr)
    made = run_folder.create_run_folder(recipe.home, recipe.text, recipe.values) if _is_new(found, config) else None
    folder = found or agree(made)
    assert folder is not None
    config.output_dir = str(folder / "checkpoints")
    lock = run_folder.lock_run(folder) if config.process_index == 0 else contextlib.nullcontext()
    with lock, _recorded(folder, config, recipe.training.said):
        if found:
            _write_status(config, folder, "running")
        if config.process_index == 0:
            write_json(folder / "environment.json", prepare.describe_run(recipe, prepared), shared=True)
        _say(config, summary.describe_start(recipe, prepared, folder))
        before = measure_memory(config.device)
        checkpoint = run_folder.last_intact_checkpoint(folder)[0] if found and recipe.dataset.streaming else None
        trainer = trainers.build_trainer(recipe, prepared, checkpoint)
        initial = (
            keep_initial(trainer, folder, found is not None)
            if alters_base(recipe.peft) and not prepared.adapter
            else None
        )
        trainers.watch_gradients(trainer, folder)
        if recipe.peft:
            keep_state(trainer)
        if recipe.peft["method"] == "adalora":
            allocate_ranks(trainer, folder, continued=prepared.adapter is not None)
        if section := recipe.training["peft_optimizer"]:
            use_peft_optimizer(trainer, section, prepared.peft_config)
        trainers.load_by_conversion(trainer)
        trainers.keep_dtypes_on_resume(trainer)
        interruption = Interruption(speaks=config.process_index == 0)
        trainer.add_callback(interruption)
        trainer.add_callback(Recorder(folder, config))
        longest_known = not recipe.stage.generates and not recipe.dataset.streaming
        if recipe.run.longest_batch_first and longest_known:
            sources = [source.source for source in recipe.dataset.sources]
            trainer.add_callback(LongestBatch(trainer, prepared.data.splits, sources))
        rows, longest = find_longest(prepared.data.splits["train"], config.per_device_train_batch_size)
        room = max(LEAST_ROOM, len(rows) * longest)
        say_progress(trainer, recipe.stage)
        if recipe.stage.shape not in ("tokens", "unpaired"):  # TRL weighs those by their tokens, and by their labels
            weigh_batches(trainer)
        early = EarlyStop(**recipe.run.early_stopping) if recipe.run.early_stopping else None
        if early:
            trainer.add_callback(early)
        if asked := recipe.run.samples:
            every, most = asked["every"], asked["max_new_tokens"]
            trainer.add_callback(Sampler(trainer, folder, prepared.samples, every, most, room))
        if recipe.stage.generates:
            keep_prompt_order(trainer)
            keep_completions(trainer, folder)
            found_flat = try_rewards(trainer, trainer.rewards, recipe.dataset.reward_columns, room)
            for problem in found_flat if config.process_index == 0 else ():
                print(recipe.place(problem), file=sys.stderr)
        if watch:
            watch(trainer, prepared, folder)
        check_room(recipe, trainer, folder)
        _train(trainer, folder, interruption, found is not None, early)
        measured = measure_memory(config.device) | {"parts": measure_parts(trainer), **measure_speed(folder)}
        if config.device.type == "cpu" and before:
            measured["before_bytes"] = before["peak_memory_bytes"]
        result = _save(trainer, folder / run_folder.result_name(bool(recipe.peft)), recipe.stage, initial)
        if recipe.stage.scores:
            record_scores(trainer, folder, prepared.golden, room)
        else:
            record_golden(trainer, folder, prepared.golden, plain_base=initial is None, room=room)
        if config.process_index == 0:
            card.write_card(recipe, folder, result, prepared.train.accounting, trainer.state.log_history)
        details = {"measured": measured} | (record_plan(recipe, prepared, config) if config.process_index == 0 else {})
        _write_status(config, folder, "completed", step=trainer.state.global_step, **details)
        forget_modules()
        if config.process_index == 0:
            leave_report(folder)
        _say(config, f"Completed: {result}")
    return folder


def _is_new(found: Path | None, config: Any) -> bool:
    """Whether this process makes the folder of a new run."""
    return found is None and config.process_index == 0


def _train(trainer: Any, folder: Path, interruption: Interruption, resumed: bool, early: EarlyStop | None) -> None:
    """Trains, from the last checkpoint of a resumed run."""
    checkpoint = _find_checkpoint(trainer, folder) if resumed else None
    before = {number: signal.signal(number, interruption) for number in SIGNALS}
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except UserError as error:
        if error.problems[0].code == FAILED and trainer.args.world_size == 1:
            _keep_checkpoint(trainer, folder)
        raise
    except Finished:
        if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint:
            trainer._load_best_model()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    whole = trainer.state.global_step >= trainer.state.max_steps or bool(early and early.stopped)
    if not interruption.requested and not whole:
        message = f"training ended after {trainer.state.global_step:,} of {trainer.state.max_steps:,} steps"
        raise user_error("training-stopped", message, "the log above may say why")
    if not getattr(trainer, "learned", True) and not interruption.requested:
        message = "every gradient was 0: nothing was learned"
        fix = "are the base's weights whole? do weights of the loss cancel it? is a teacher the model itself?"
        if trainer.rewards:
            message += ": the rewards gave all answers to a prompt the same (completions.jsonl)"
            fix = "train with stage sft before, add a reward that comes in smaller steps, or raise num_generations"
        raise user_error("nothing-learned", message, fix)
    if interruption.requested and not whole:
        message = f"Interrupted at step {trainer.state.global_step}; continue with: --resume {folder}"
        raise Interrupted(message, interruption.number)


def _keep_checkpoint(trainer: Any, folder: Path) -> None:
    """Saves what was trained before a reward failed: answers are judged between two steps."""
    last = run_folder.last_checkpoint(folder)
    if trainer.state.global_step > (run_folder.step_of(last) if last else 0):
        trainer._save_checkpoint(trainer.model, trial=None)
        trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)
    if run_folder.last_checkpoint(folder):
        print(f"A checkpoint is kept; continue with: --resume {folder}", file=sys.stderr)


def _find_checkpoint(trainer: Any, folder: Path) -> Path | None:
    """The checkpoint that a run goes on from; what was written after it is put aside, and said."""
    checkpoint: Path | None = None
    failure = None
    if trainer.is_world_process_zero():
        try:
            checkpoint, damage = run_folder.last_intact_checkpoint(folder)
        except UserError as error:
            failure = error
        else:
            for found in damage:
                print(f"warning[checkpoint-damaged] {found}; going on from {checkpoint}", file=sys.stderr)
            if checkpoint:
                drop_metrics_after(folder, run_folder.step_of(checkpoint))
            run_folder.put_aside_after(folder, checkpoint)
    checkpoint, failure = agree((checkpoint, failure))
    if failure:
        raise failure
    return checkpoint


def _save(trainer: Any, result: Path, stage: Stage, initial: Path | None) -> Path:
    """Saves the adapter or the model, with tokenizer and chat template, and checks that it can be used.

    It gets its name when it is whole: what is half written (a full disk, a kill) is never taken for a result.
    """
    first, partial = trainer.is_world_process_zero(), result.with_name(f"{result.name}.partial")
    _forget_batches(trainer)
    if first:
        shutil.rmtree(partial, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    config = trainer.accelerator.unwrap_model(trainer.model).config
    cache, config.use_cache = config.use_cache, True  # which transformers 5.23's Trainer turns off: for training only
    try:
        trainer.save_model(str(partial))
    finally:
        config.use_cache = cache
    trainer.accelerator.wait_for_everyone()
    gathered = verify.gather_sharded(trainer)
    if first:
        model = trainer.accelerator.unwrap_model(trainer.model)
        if initial:
            save_converted(model, partial, initial)
        (partial / "training_args.bin").unlink(missing_ok=True)  # a pickle, with paths; the recipe says it all
        shutil.rmtree(partial / "ref", ignore_errors=True)  # DPO's frozen copy of the adapter it began with
        if not stage.scores:
            model.generation_config.save_pretrained(partial)  # where it stops
        shutil.rmtree(result, ignore_errors=True)
        partial.rename(result)
        tried = trainer.first_rows.with_format(None).select(range(min(verify.ROWS, len(trainer.first_rows))))
        verify.verify_saved(trainer, result, [input_ids_of(stage, row) for row in tried], gathered, initial)
    return result


def _forget_batches(trainer: Any) -> None:
    """Takes back how TRL's vision collator cut and padded its last batch: it would be saved as the tokenizer's way."""
    tokenizer = tokenizer_of(trainer)
    if processor_of(tokenizer):
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()


LEAST_ROOM = 512  # tokens that answers may take at a time, however short the rows are

# Ctrl-C, a scheduler, a terminal that is closed.
SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))


@contextlib.contextmanager
def _recorded(folder: Path, config: Any, said: Mapping[str, Any]) -> Iterator[None]:
    """Leaves the right status in the run folder, whatever happens."""
    try:
        yield
    except (Interrupted, KeyboardInterrupt):
        _write_status(config, folder, "interrupted")
        if config.process_index == 0:
            leave_report(folder)
        raise
    except BaseException as error:
        explained = explain(error, folder, config, said)
        try:
            _write_status(config, folder, "failed", error=str(explained or error) or type(error).__name__)
        except OSError as another:  # what went wrong first is what is said
            print(f"the status can't be written, either: {another}", file=sys.stderr)
        else:
            if config.process_index == 0:
                leave_report(folder)
        if explained:
            raise explained from error
        raise


def _write_status(config: Any, folder: Path, status: str, **details: Any) -> None:
    if config.process_index == 0:
        checkpoint = run_folder.last_checkpoint(folder)
        write_status(folder, status, checkpoint=str(checkpoint) if checkpoint else None, **details)


def agree(value: Any) -> Any:
    """The first process decides, on a folder or a checkpoint: disks don't show the same to all at the same time."""
    decided = [value]
    broadcast_object_list(decided)
    return decided[0]


def _say(config: Any, text: str) -> None:
    if config.process_index == 0:
        print(make_visible(text), flush=True)
