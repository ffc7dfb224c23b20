"""Rules about `rewards`, and about what trains on the model's own answers. One small function a rule."""

import re
from collections.abc import Sequence
from pathlib import Path

from recipe_runner.files import list_runs, read_status
from recipe_runner.methods import METHODS
from recipe_runner.problems.problem import Found
from recipe_runner.problems.words import suggest
from recipe_runner.recipe.library import shipped_recipes
from recipe_runner.recipe.rules.packages import is_installed
from recipe_runner.recipe.sections import DatasetSection, RewardSection, RunSection, UpstreamSection
from recipe_runner.stages import Stage

# Name -> the keys that it must have, and those that it may have.
KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "exact_match": (("column",), ()),
    "json_valid": ((), ()),
    "json_equal": (("column",), ("key",)),
    "regex": (("pattern",), ()),
    "length": (("max",), ("min",)),
    "think_format": ((), ()),
    "accuracy": (("column",), ()),
    "repetition_penalty": ((), ("ngram_size", "max_penalty")),
    "soft_overlong": (("soft_punish_cache",), ()),
}
OF_NAMES = sorted({key for needed, may in KEYS.values() for key in (*needed, *may)})


def reward_kinds(rewards: Sequence[RewardSection], dataset: DatasetSection) -> Found:
    """Each reward is of one kind, with the keys of its kind."""
    for number, reward in enumerate(rewards):
        path = ("rewards", number)
        kinds = [kind for kind in ("model", "name", "function") if getattr(reward, kind) is not None]
        if len(kinds) != 1:
            found = f"{' and '.join(kinds)} at once" if kinds else "neither model nor name nor function"
            yield path, found, "give each reward one of model, name and function"
            continue
        needed, may = KEYS[reward.name] if reward.name else ((), ())
        for key in needed:
            if getattr(reward, key) is None:
                yield (*path, "name"), f"{reward.name} needs the key {key}", f"add '{key}:'"
        for key in OF_NAMES:
            if key not in (*needed, *may) and getattr(reward, key) is not None:
                yield (*path, key), f"{reward.name or kinds[0]} has no such key", "remove it"
        if reward.tokenizer != "same" and not reward.model:
            yield (*path, "tokenizer"), "only a reward model has a tokenizer", "remove the key"
        if reward.min is not None and reward.max is not None and reward.min > reward.max:
            yield (*path, "min"), f"{reward.min} tokens at least, and {reward.max} at most", "make it smaller than max"
        if reward.column and reward.column not in dataset.reward_columns:
            fix = suggest(reward.column, dataset.reward_columns)
            fix = fix or f"add it: dataset.reward_columns: [{', '.join((*dataset.reward_columns, reward.column))}]"
            yield (*path, "column"), f"'{reward.column}' is not one of dataset.reward_columns", fix
        if reward.pattern is not None:
            try:
                re.compile(reward.pattern)
            except re.error as error:
                yield (*path, "pattern"), f"the pattern can't be read: {error}", "correct it"


def reward_weights(rewards: Sequence[RewardSection]) -> Found:
    """A weight of 0 judges nothing."""
    for number, reward in enumerate(rewards):
        if reward.weight == 0:
            yield ("rewards", number, "weight"), "0: it has no effect", "remove the reward, or give it a weight"


def reward_names(rewards: Sequence[RewardSection]) -> Found:
    """The same reward twice would be counted twice, and logged as one."""
    seen: dict[tuple[object, ...], int] = {}
    for number, reward in enumerate(rewards):
        known = (reward.model, reward.name, reward.function, reward.column, reward.key, reward.pattern)
        if known in seen:
            yield ("rewards", number), f"the same as rewards.{seen[known]}", "give one of them the weight of both"
        seen.setdefault(known, number)


def reward_code(rewards: Sequence[RewardSection], run: RunSection) -> Found:
    """A recipe's own code runs only where the recipe says so in as many words."""
    for number, reward in enumerate(rewards):
        if not reward.function:
            continue
        file = reward.function.rpartition(":")[0]
        if not run.allow_code:
            found = f"{Path(file).name}: Python code of the recipe would run while it trains"
            yield ("rewards", number, "function"), found, "read it, and set run.allow_code: true"
    if run.allow_code and not any(reward.function for reward in rewards):
        yield ("run", "allow_code"), "the recipe names no code", "remove the key"


def reward_files(rewards: Sequence[RewardSection]) -> Found:
    """The file of a function is there."""
    for number, reward in enumerate(rewards):
        file = (reward.function or "").rpartition(":")[0]
        if file and not Path(file).is_file():
            yield ("rewards", number, "function"), f"there is no file {file}", "paths are relative to the recipe"


def unused_columns(stage: Stage, dataset: DatasetSection) -> Found:
    """Columns for rewards, where nothing is rewarded."""
    if dataset.reward_columns and not stage.rewarded:
        found = f"stage {stage.name} has no rewards that could be given them"
        yield ("dataset", "reward_columns"), found, "remove the key, and list the columns in dataset.ignore if need be"


def punished_length(rewards: Sequence[RewardSection], training: UpstreamSection) -> Found:
    """A penalty that begins before the first token punishes every answer."""
    most = training["max_completion_length"]
    for number, reward in enumerate(rewards):
        if reward.soft_punish_cache and most and reward.soft_punish_cache >= most:
            found = f"{reward.soft_punish_cache} tokens before the end of answers of up to {most}: all are punished"
            yield ("rewards", number, "soft_punish_cache"), found, f"make it smaller, {max(1, most // 4)} say"


def reward_models(rewards: Sequence[RewardSection]) -> Found:
    """A reward model is one that was trained: a completed run, or a model's folder. Hub ids are looked up later."""
    shipped = [file.stem for file in shipped_recipes()]
    for number, reward in enumerate(rewards):
        folder, place = Path(reward.model or ""), ("rewards", number, "model")
        if reward.model and "/" not in reward.model and reward.model not in shipped:
            fix = (
                suggest(reward.model, shipped)
                or "name a path (../runs/NAME), a recipe's file (NAME.yaml), or OWNER/NAME"
            )
            yield place, f"there is no folder and no shipped recipe of the name {reward.model}", fix
        if not folder.is_absolute() or folder.suffix in (".yaml", ".yml"):
            continue
        if not folder.is_dir():
            yield place, f"there is no folder {folder}", "train the reward model first, or correct the name"
        elif (folder / "status.json").is_file() and read_status(folder) != "completed":
            yield place, f"the run in {folder} is {read_status(folder)}", f"--resume {folder} continues it"
        elif runs := list_runs(folder):
            if not any(read_status(run) == "completed" for run in runs):
                yield place, f"{folder} has no completed run: the latest is {read_status(runs[-1])}", ""
        elif not any((folder / name).is_file() for name in ("adapter_config.json", "config.json", "status.json")):
            yield place, f"{folder} holds no run and no model", "name a run of stage reward, or a model"


def needed_packages(rewards: Sequence[RewardSection], training: UpstreamSection) -> Found:
    """Packages that a reward or a way to generate can't do without."""
    for number, reward in enumerate(rewards):
        if reward.name == "accuracy" and is_installed("trl") and not is_installed("math_verify"):
            found = "accuracy needs the package math-verify, which is not installed here"
            yield ("rewards", number, "name"), found, "pip install 'math-verify[antlr4_13_2]'"
    if training["use_vllm"] and is_installed("trl") and not is_installed("vllm"):
        yield ("training", "use_vllm"), "vLLM is not installed here", "pip install 'trl[vllm]', or remove the key"


def generation_batch(stage: Stage, training: UpstreamSection, run: RunSection) -> Found:
    """Answers are made in whole groups. Source: TRL 1.16, RLOOConfig.__post_init__; more processes are known later."""
    if not stage.rewarded:
        return
    device, group = training["per_device_train_batch_size"], training["num_generations"]
    steps = training["steps_per_generation"] or training["gradient_accumulation_steps"]
    size = training["generation_batch_size"] or device * steps
    if run.global_batch_size and not training["generation_batch_size"] and not training["steps_per_generation"]:
        size = run.global_batch_size
    if training["generation_batch_size"] and training["steps_per_generation"]:
        yield ("training", "generation_batch_size"), "steps_per_generation says the same", "remove one of them"
    elif group < 2:
        return  # which the schema, or TRL's own rule, has a message for
    elif size % group:
        found = f"{group} answers to a prompt (num_generations) do not divide the {size} answers of a batch"
        by_batch = size == run.global_batch_size
        says = training["generation_batch_size"] or by_batch
        found += " (run.global_batch_size)" * by_batch + f" ({device} per device x {steps})" * (not says)
        key = "run.global_batch_size" if by_batch else "per_device_train_batch_size x gradient_accumulation_steps"
        key = "generation_batch_size" if training["generation_batch_size"] else key
        yield ("training", "num_generations"), found, f"make {key} {group}, {2 * group}, ..."
    if training["eval_strategy"] != "no":
        held, batch = training["num_generations_eval"] or group, training["per_device_eval_batch_size"]
        if batch % held:
            found = f"{held} answers to a held-out prompt do not divide per_device_eval_batch_size ({batch})"
            fix = f"set num_generations_eval: 1, or per_device_eval_batch_size: {held}"
            yield ("training", "per_device_eval_batch_size"), found, fix


def generating_method(stage: Stage, peft: UpstreamSection) -> Found:
    """Virtual tokens in stages whose trainers know nothing of them.

    Source: TRL 1.16: a reward model finds the last token of a row by its padding, which embeddings do not have
    (transformers 5.23, GenericForSequenceClassification); GRPO and RLOO count tokens from the end of a row, and
    distillation takes hidden states of the base alone.
    """
    if peft and METHODS[str(peft["method"])].is_prompt and (stage.scores or stage.generates):
        found = f"{peft['method']} puts virtual tokens before a row, and TRL's trainer of stage {stage.name} knows none"
        yield ("peft", "method"), found, "take another method: lora"


def scoring_head(stage: Stage, peft: UpstreamSection) -> Found:
    """The head of a reward model is new: an adapter that trains no module of the base would leave it random."""
    if stage.scores and peft and "modules_to_save" not in peft.defaults and not METHODS[str(peft["method"])].is_prompt:
        found = f"a reward model has a new head, and PEFT 0.21 trains no module of the base beside {peft['method']}"
        yield ("peft", "method"), found, "take another method: lora"
