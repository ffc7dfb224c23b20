"""`rewards`: what judges the answers that a model is trained on, tried on real rows before the first step."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from trl.data_utils import apply_chat_template

from recipe_runner.problems.errors import first_line, user_error
from recipe_runner.problems.problem import KeyPath, Problem, as_warning
from recipe_runner.recipe.recipe import Recipe
from recipe_runner.training.reward_functions import build_known, check_values, load_function, write_value
from recipe_runner.training.reward_models import load_model
from recipe_runner.training.samples import answer_in_training, can_answer

TRIED_ROWS, TRIED_TOKENS = 4, 64  # rows that the model answers before the first step, and the tokens of an answer
# Texts of many kinds: a reward that gives all of them, and what the model says, the same tells nothing apart.
PROBES = ("", "Yes.", '{"a": 1}', "<think>\nOne and one.\n</think>\nTwo.", "The answer is \\boxed{2}.", "word " * 200)


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
            judge, tokenizer, name = load_model(reward, config, (*path, "model"))
        elif reward.function:
            name = reward.function.rpartition(":")[2]
            judge = load_function(reward.function, (*path, "function"))
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
    tried += [(row, text) for row in rows for name in columns if (text := write_value(row[name]))]
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
    return check_values(reward.name, found, completions, reward.path)


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
