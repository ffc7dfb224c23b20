"""`rewards`: what judges the answers that a model is trained on, tried on real rows before the first step."""

import contextlib
import copy
import importlib.util
import json
import math
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase
from trl import rewards as shipped
from trl.data_utils import apply_chat_template

from recipe_runner.data.turns import describe_value
from recipe_runner.files import hash_file, hash_weights
from recipe_runner.model.load import find_result, load_result, read_tokenizer
from recipe_runner.model.quantization import build_quantization
from recipe_runner.model.scorers import NO_JSON, parse_json, read_json_text, same_json
from recipe_runner.problems.errors import UserError, first_line, user_error
from recipe_runner.problems.limits import TooSlow, time_limit
from recipe_runner.problems.problem import KeyPath, Problem, as_warning
from recipe_runner.recipe.recipe import Recipe
from recipe_runner.recipe.resolve import load_recipe
from recipe_runner.recipe.rules.packages import is_installed
from recipe_runner.recipe.sections import RewardSection
from recipe_runner.runs.find import names_recipe, recipe_of, seek_run
from recipe_runner.training.resume import CODE
from recipe_runner.training.samples import answer_in_training, can_answer

PATTERN_SECONDS = 5  # for one answer
FAILED = "reward-failed"
LARGEST = 1e30  # that a reward may be: sums of squares of more are no float32
QUOTED = 200  # characters of an answer in a message
TRIED_ROWS, TRIED_TOKENS = 4, 64  # rows that the model answers before the first step, and the tokens of an answer
# Texts of many kinds: a reward that gives all of them, and what the model says, the same tells nothing apart.
PROBES = ("", "Yes.", '{"a": 1}', "<think>\nOne and one.\n</think>\nTwo.", "The answer is \\boxed{2}.", "word " * 200)

Call = Callable[..., list[float | None]]


@dataclass(frozen=True)
class Reward:
    """One of `rewards`, ready for TRL.

    Attributes:
        name: As it is logged.
        judge: A function as TRL calls it, or a reward model.
        tokenizer: Of a reward model.
        weight: In the sum.
        path: Its key in the recipe.
        known: Whether it is one by name that looks at the answer alone: it differs between some, be they rare.
    """

    name: str
    judge: Any
    tokenizer: PreTrainedTokenizerBase | None
    weight: float
    path: KeyPath
    known: bool


@dataclass(frozen=True)
class Trained:
    """A model that another one learns from: its folder or hub id, and the recipe of its run, where it has one."""

    folder: str
    recipe: Recipe | None


def find_trained(name: str, path: KeyPath) -> Trained:
    """What a recipe names beside its own model: a run (by its folder or its recipe), a folder, or a hub id.

    Raises:
        UserError: There is none.
    """
    try:
        run = seek_run(name)
        if run is None and names_recipe(name):
            raise user_error("run-not-found", f"{name} has not been run", "run it first")
        folder = str(find_result(run or Path(name))) if run or Path(name).is_absolute() else name
    except UserError as error:
        problem = error.problems[0]
        raise user_error(problem.code, problem.message, problem.suggestion, path=path) from error
    return Trained(folder, recipe_of(run) if run else None)


def _find_reward_model(name: str, path: KeyPath) -> Trained:
    """As `find_trained`, of a reward model."""
    fix = "name a run of a recipe that trains a reward model"
    if names_recipe(name) and not (recipe := load_recipe(name)).stages and not recipe.stage.scores:
        message = f"{name} is a recipe of stage {recipe.stage.name}, and trains no reward model"
        raise user_error("not-a-reward-model", message, fix, path=path)
    found = find_trained(name, path)
    if found.recipe and not found.recipe.stage.scores:
        message = f"{name} is a run of stage {found.recipe.stage.name}, and no reward model"
        raise user_error("not-a-reward-model", message, fix, path=path)
    return found


def check_reward_models(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Finds the reward models and compares their tokenizers with the model's, before any weights are loaded.

    Returns:
        What the rewards are made from, in words -> its hash.

    Raises:
        UserError: One is missing, or has another tokenizer, and the recipe does not say that it may.
    """
    found: dict[str, str] = {}
    for number, reward in enumerate(recipe.rewards):
        path = ("rewards", number, "model")
        if reward.function:
            file = reward.function.rpartition(":")[0]
            found[f"{CODE}{Path(file).name}"] = hash_file(Path(file))
        if not reward.model:
            continue
        place = _find_reward_model(reward.model, path)
        if digest := hash_weights(Path(place.folder)):
            found[f"the reward model {reward.model}"] = digest
        own = read_own_tokenizer(place.folder, path)
        if not own.chat_template:
            message = f"{reward.model} has a tokenizer without a chat template: conversations can't be rendered for it"
            raise user_error("reward-tokenizer-differs", message, "take a reward model of conversations", path=path)
        if reward.tokenizer == "same" and (changed := compare_tokens(own, tokenizer) or _compare_texts(own, tokenizer)):
            message = f"{reward.model} has another tokenizer than {recipe.model.name_or_path}: {changed}"
            fix = "take a reward model of the same base; if it is meant, set tokenizer: own (conversations are then"
            fix += " rendered anew by its own chat template)"
            raise user_error("reward-tokenizer-differs", message, fix, path=path)
    return found


def read_own_tokenizer(folder: str, path: KeyPath, **place: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a model that a recipe names beside its own, at a key.

    Raises:
        UserError: It can't be read.
    """
    try:
        return read_tokenizer(folder, **place)
    except UserError as error:
        if Path(folder).is_absolute():
            problem = error.problems[0]
            raise user_error(problem.code, problem.message, problem.suggestion, path=path) from error
        message = f"{folder} is no run, no recipe that is here, and no model on the hub that can be read"
        fix = "name a run's folder (runs/NAME), a recipe's file (NAME.yaml), a model's folder or a hub id"
        raise user_error("model-not-found", message, fix, path=path) from error


def compare_tokens(own: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str:
    """How the vocabularies of two tokenizers differ; empty where they don't."""
    theirs, ours = own.get_vocab(), other.get_vocab()
    wrong = [token for token in {**theirs, **ours} if theirs.get(token) != ours.get(token)]
    return f"{len(wrong):,} tokens differ, for example {wrong[0]!r}" if wrong else ""


def _compare_texts(own: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str:
    """How two chat templates differ in what they make of a conversation; empty where they don't."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    made = [str(each.apply_chat_template(turns, tokenize=False)) for each in (own, other)]
    return "" if made[0] == made[1] else f"their chat templates render {describe_value(made[0])} and {made[1]!r}"


def build_rewards(recipe: Recipe, config: Any) -> list[Reward]:
    """The rewards of a recipe, reward models loaded.

    Raises:
        UserError: A model can't be loaded, or a file of the user's can't be run.
    """
    built: list[Reward] = []
    for number, reward in enumerate(recipe.rewards):
        path: KeyPath = ("rewards", number)
        tokenizer = None
        judge: Any
        if reward.model:
            judge, tokenizer, name = _load_model(reward, config, (*path, "model"))
        elif reward.function:
            name = reward.function.rpartition(":")[2]
            judge = _load_function(reward.function, (*path, "function"))
        else:
            name = f"{reward.name}:{reward.key}" if reward.key else str(reward.name)
            judge = build_known(reward, config, (*path, "name"))
        count = sum(other.name.partition(" ")[0] == name for other in built)
        name = f"{name} {count + 1}" if count else name
        if callable(judge) and not isinstance(judge, torch.nn.Module):
            judge.__name__ = name
        else:
            judge.config._name_or_path = name
        built.append(Reward(name, judge, tokenizer, reward.weight, path, bool(reward.name) and not reward.column))
    return built


def load_trained(found: Trained, config: Any, **place: Any) -> tuple[Any, PreTrainedTokenizerBase]:
    """A model that is not trained, as transformers' own class, its adapter in place; quantized as it was trained.

    Args:
        found: What `find_trained` found.
        config: The trainer's configuration, for the device.
        place: `revision` and `trust_remote_code` of a model on the hub.
    """
    options: dict[str, Any] = {"dtype": "auto" if config.device.type != "cpu" else "float32", **place}
    if config.device.type != "cpu":
        options["device_map"] = {"": config.device}
    if found.recipe and (quantization := build_quantization(found.recipe.quantization.said)):
        options["quantization_config"] = quantization
    loaded, tokenizer = load_result(found.folder, found.recipe.model if found.recipe else None, **options)
    model = loaded.get_base_model() if isinstance(loaded, PeftModel) else loaded
    return model.eval().requires_grad_(False), tokenizer


def _load_model(
    reward: RewardSection, config: Any, path: KeyPath
) -> tuple[torch.nn.Module, PreTrainedTokenizerBase, str]:
    """A reward model, its tokenizer, and its name."""
    found = _find_reward_model(str(reward.model), path)
    model, tokenizer = load_trained(found, config)
    if getattr(model.config, "num_labels", 0) != 1 or not hasattr(model, "score"):
        message = f"{reward.model} is no reward model: it does not give one number"
        raise user_error("not-a-reward-model", message, "name a run of a recipe that trains one", path=path)
    tokenizer.padding_side = "right"
    return model, tokenizer, found.recipe.name if found.recipe else Path(found.folder).name


def _load_function(named: str, path: KeyPath) -> Call:
    """A function of the user's own, which says of an exception on which answer it came.

    Raises:
        UserError: Its file can't be run, or has no such function.
    """
    file, _, name = named.rpartition(":")
    spec = importlib.util.spec_from_file_location(f"recipe_rewards_{Path(file).stem}", file)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the user's own code: anything may come
        _show_own_lines(error, file)
        message = f"{file} can't be run: {type(error).__name__}: {first_line(error)}"
        raise user_error("reward-function", message, "its own lines are above", path=path) from error
    function = getattr(module, name, None)
    if not callable(function):
        there = ", ".join(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise user_error("reward-function", f"{file} has no function {name}", f"it has: {there or 'none'}", path=path)

    def judge(prompts: list[Any], completions: list[Any], completion_ids: list[Any], **columns: Any) -> Any:
        given = copy.deepcopy((prompts, completions, completion_ids))  # a function may change what it is given
        try:
            found = function(prompts=given[0], completions=given[1], completion_ids=given[2], **columns)
        except (Exception, SystemExit) as error:  # the user's own code: anything may come
            if isinstance(error, TypeError) and error.__traceback__ and not error.__traceback__.tb_next:
                raise  # it was not called at all: other parameters
            _show_own_lines(error, file)
            at = _find_failing(function, prompts, completions, completion_ids, columns)
            told = f"{Path(file).name}:{name} failed: {type(error).__name__}: {first_line(error)}"
            raise user_error(FAILED, f"{told}; {at}", "its own lines are above", path=path) from error
        return _check_values(name, found, completions, path)

    return judge


def _check_values(name: str, found: Any, completions: list[Any], path: KeyPath) -> list[float | None]:
    """What a reward gave, as numbers. TRL 1.16 takes a NaN for None, and goes on.

    Raises:
        UserError: It is no list of a finite number or None for each completion.
    """
    values = found.tolist() if isinstance(found, torch.Tensor) else found
    if not isinstance(values, list | tuple) or len(values) != len(completions):
        told = f"{len(values)} values" if isinstance(values, list | tuple) else describe_value(values)
        message = f"{name} gives {told} for {len(completions)} answers"
        raise user_error(FAILED, message, "return a list with one number for each", path=path)
    for value, completion in zip(values, completions, strict=True):
        if value is not None and (not isinstance(value, int | float) or not abs(value) <= LARGEST):  # nan, too
            message = f"{name} gives {describe_value(value)} for the answer {_quote(text_of(completion))}"
            raise user_error(FAILED, message, "return a finite number, or None", path=path)
    return [value if value is None else float(value) for value in values]


def _show_own_lines(error: BaseException, file: str) -> None:
    """Writes the lines of the user's own file that led to an exception."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    text = "".join(traceback.format_list(frames)) + "".join(traceback.format_exception_only(error))
    print(f"Traceback of {file}:\n{text}", file=sys.stderr, end="")


def _find_failing(function: Call, prompts: list[Any], completions: list[Any], ids: list[Any], columns: Any) -> str:
    """On which answer a function fails, asked one by one."""
    for place, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        own = {key: [value[place]] if _is_column(value, prompts) else value for key, value in columns.items()}
        try:
            function(prompts=[prompt], completions=[completion], completion_ids=[ids[place]], **own)
        except (Exception, SystemExit):  # the one that is looked for
            return f"on the answer {_quote(text_of(completion))} to {_quote(text_of(prompt))}"
    return f"on {len(prompts)} answers at once; none of them alone"


def _is_column(value: Any, prompts: list[Any]) -> bool:
    return isinstance(value, list) and len(value) == len(prompts)


def _quote(text: str) -> str:
    return repr(text if len(text) <= QUOTED else f"{text[:QUOTED]}...")


def text_of(content: Any) -> str:
    """What a completion says, or the last turn of a prompt; plain text as it is."""
    return content if isinstance(content, str) else str(content[-1]["content"]) if content else ""


def build_known(reward: RewardSection, config: Any, path: KeyPath = ()) -> Call:
    """The function of a name. TRL's are made by TRL; the others give each answer 0 to 1.

    Raises:
        UserError: The package that it needs is not installed.
    """
    column, pattern = str(reward.column), re.compile(reward.pattern or "")

    def by_text(score: Callable[[str, Any], float], wanted: str = "") -> Call:
        def judge(completions: list[Any], **columns: Any) -> list[float | None]:
            right = columns[wanted] if wanted else [None] * len(completions)
            return [score(text_of(completion), value) for completion, value in zip(completions, right, strict=True)]

        return judge

    def by_tokens(completion_ids: list[list[int]], **columns: Any) -> Any:
        return [_rate_length(len(ids), reward.min or 0, reward.max or 0) for ids in completion_ids]

    def accuracy(completions: list[Any], **columns: Any) -> list[float | None]:
        found: list[float | None] = shipped.accuracy_reward(completions, solution=list(map(str, columns[column])))
        return found

    def penalty(made: Any) -> Call:
        return lambda completion_ids, **columns: made(completion_ids)

    cache = reward.soft_punish_cache or 0
    asked = {"ngram_size": reward.ngram_size, "max_penalty": reward.max_penalty}
    said: dict[str, Any] = {key: value for key, value in asked.items() if value is not None}
    makers: dict[str, Callable[[], Any]] = {
        "exact_match": lambda: by_text(lambda text, right: float(text.strip() == _write(right).strip()), column),
        "json_valid": lambda: by_text(lambda text, _: float(_is_json(text))),
        "json_equal": lambda: by_text(partial(_rate_json, reward.key), column),
        "regex": lambda: by_text(lambda text, _: _find_pattern(pattern, text)),
        "length": lambda: by_tokens,
        "think_format": lambda: lambda completions, **columns: shipped.think_format_reward(completions),
        "accuracy": lambda: accuracy,
        "repetition_penalty": lambda: penalty(shipped.get_repetition_penalty_reward(**said)),
        "soft_overlong": lambda: penalty(shipped.get_soft_overlong_punishment(config.max_completion_length, cache)),
    }
    if reward.name == "accuracy" and not is_installed("math_verify"):
        message = "accuracy compares answers by the package math-verify, which is not installed here"
        raise user_error("missing-package", message, "pip install 'math-verify[antlr4_13_2]'", path=path)
    judge: Call = makers[str(reward.name)]()
    return judge


def _write(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _is_json(text: str) -> bool:
    return read_json_text(text) is not NO_JSON


def _rate_json(key: str | None, text: str, right: Any) -> float:
    value, wanted = parse_json(text), parse_json(right) if isinstance(right, str) else right
    if key is None:
        there = value is not None or read_json_text(text) is None  # null is a value, too
        return float(there and same_json(value, wanted))
    both = isinstance(value, dict) and isinstance(wanted, dict) and key in value and key in wanted
    return float(both and same_json(value[key], wanted[key]))


def _find_pattern(pattern: re.Pattern[str], text: str) -> float:
    try:
        with time_limit(PATTERN_SECONDS):
            return float(pattern.search(text) is not None)
    except TooSlow as error:
        raise user_error(FAILED, f"the pattern {pattern.pattern!r}: {error}", "simplify it") from error


def _rate_length(tokens: int, least: int, most: int) -> float:
    """1 between the bounds, and outside of them less the further away: how much there is of what should be."""
    if tokens < least:
        return tokens / least
    return 1.0 if tokens <= most else most / tokens


@dataclass(frozen=True)
class Tried:
    """Answers to real prompts, to try rewards on.

    Attributes:
        rows: As the trainer reads them: the prompt, and the reward columns.
        texts: One a row.
        ids: Their tokens.
        generated: How many of them, the first, the model has made itself.
        state: Of the trainer, as functions are given it.
    """

    rows: list[dict[str, Any]]
    texts: list[str]
    ids: list[list[int]]
    generated: int
    state: Any


def try_rewards(trainer: Any, rewards: Sequence[Reward], columns: Sequence[str], room: int) -> list[Problem]:
    """Calls each reward on greedy answers to real rows, on what their columns hold, and on texts of many kinds.

    Every process has to call it. It leaves no trace: greedy answers take no random numbers.

    Raises:
        UserError: See `check_rewards`.
    """
    data, tokenizer = trainer.train_dataset, trainer.processing_class
    rows: list[dict[str, Any]] = [data[place] for place in range(min(TRIED_ROWS, len(data)))]
    prompts = data.with_format(None).select(range(len(rows)))["prompt_ids"]
    answers = []
    if can_answer(trainer):
        most = min(TRIED_TOKENS, trainer.args.max_completion_length)
        answers = answer_in_training(trainer, list(prompts), most, room)
    tried = list(zip(rows, (answer.text for answer in answers), strict=False))
    tried += [(row, text) for row in rows for name in columns if (text := _write(row[name]))]
    tried += [(rows[place % len(rows)], text) for place, text in enumerate(PROBES)]
    texts = [text for _, text in tried]
    ids = [answer.tokens for answer in answers]
    ids += [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts[len(ids) :]]
    found = Tried([row for row, _ in tried], texts, ids, len(answers), trainer.state)
    return check_rewards(rewards, found, columns, trainer.args.device)


def check_rewards(
    rewards: Sequence[Reward], tried: Tried, columns: Sequence[str], device: torch.device
) -> list[Problem]:
    """Calls each reward as the trainer will, and looks at what it gives.

    Returns:
        Warnings: of a reward that gives all answers of the model the same.

    Raises:
        UserError: One can't be called, gives something else than a number for each answer, or the same for all.
    """
    problems = []
    for reward in rewards:
        with _naming(reward):
            values = _judge(reward, tried, columns, device)
        known = [value for value in values if value is not None]
        if not known:
            message = f"{reward.name} gives no answer a number (None for all of {len(values)}): nothing can be learned"
            raise user_error("constant-reward", message, "correct it", path=reward.path)
        if len(set(known)) == 1 and not reward.known:
            message = f"{reward.name} gives {known[0]:g} to all of {len(known)} different answers, those of the data"
            message += " among them: it tells none apart"
            raise user_error("constant-reward", message, "correct it, or remove it", path=reward.path)
        first = {value for value in values[: tried.generated] if value is not None}
        if tried.generated > 1 and len(first) == 1:
            message = f"{reward.name} gives {first.pop():g} to all of the model's first {tried.generated} answers"
            fix = "there is nothing to learn from it until two answers to a prompt differ in it: train with stage sft"
            fix += " before, or add a reward that comes in smaller steps"
            problems.append(as_warning(Problem("flat-reward", message, None, reward.path, fix)))
    return problems


@contextlib.contextmanager
def _naming(reward: Reward) -> Iterator[None]:
    """Says which reward it was that can't be called as TRL does."""
    try:
        yield
    except TypeError as error:
        message = f"{reward.name} can't be called as TRL calls it: {first_line(error)}"
        fix = "it is given prompts, completions, completion_ids, the reward columns, and trainer_state, log_extra and"
        fix += " log_metric by name: take what it needs, and **kwargs for the rest"
        raise user_error("reward-function", message, fix, path=reward.path) from error


def _judge(reward: Reward, tried: Tried, columns: Sequence[str], device: torch.device) -> list[float | None]:
    """What a reward gives the answers.

    Source: TRL 1.16, GRPOTrainer._calculate_rewards.

    Raises:
        UserError: It is no list of a number or None for each.
    """
    prompts = [row["prompt"] for row in tried.rows]
    completions = [[{"role": "assistant", "content": text}] for text in tried.texts]
    if isinstance(reward.judge, torch.nn.Module):
        return _rate(reward, prompts, completions, device)
    given: dict[str, Any] = {name: [row[name] for row in tried.rows] for name in columns}
    given |= {"trainer_state": tried.state, "log_extra": _ignore, "log_metric": _ignore}
    found = reward.judge(prompts=prompts, completions=completions, completion_ids=tried.ids, **given)
    return _check_values(reward.name, found, completions, reward.path)


def _ignore(*args: Any) -> None:
    """In the place of TRL's functions that log."""


def _rate(reward: Reward, prompts: list[Any], completions: list[Any], device: torch.device) -> list[float | None]:
    """What a reward model gives, its conversations rendered as TRL renders them."""
    tokenizer: Any = reward.tokenizer
    rows = [{"messages": prompt + completion} for prompt, completion in zip(prompts, completions, strict=True)]
    texts = [apply_chat_template(row, tokenizer)["text"] for row in rows]
    batch = tokenizer(text=texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
    model = reward.judge.to(device) if not getattr(reward.judge, "hf_device_map", None) else reward.judge
    with torch.inference_mode():
        scores = model(**batch.to(device)).logits[:, 0].float().tolist()
    if not all(map(math.isfinite, scores)):
        raise user_error(
            "reward-function", f"{reward.name} gives no finite numbers", "train it again", path=reward.path
        )
    return list(scores)
