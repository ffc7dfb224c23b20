"""Reward functions: TRL's and ours by name, and the user's own file."""

import copy
import importlib.util
import json
import re
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from trl import rewards as shipped

from recipe_runner.data.turns import describe_value
from recipe_runner.model.scorers import NO_JSON, parse_json, read_json_text, same_json
from recipe_runner.problems.errors import first_line, user_error
from recipe_runner.problems.limits import TooSlow, time_limit
from recipe_runner.problems.problem import KeyPath
from recipe_runner.recipe.rules.packages import is_installed
from recipe_runner.recipe.sections import RewardSection

PATTERN_SECONDS = 5  # for one answer
FAILED = "reward-failed"
LARGEST = 1e30  # that a reward may be: sums of squares of more are no float32
QUOTED = 200  # characters of an answer in a message


Call = Callable[..., list[float | None]]


def load_function(named: str, path: KeyPath) -> Call:
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
        return check_values(name, found, completions, path)

    return judge


def check_values(name: str, found: Any, completions: list[Any], path: KeyPath) -> list[float | None]:
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
            message = f"{name} gives {describe_value(value)} for the answer {quote(text_of(completion))}"
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
            return f"on the answer {quote(text_of(completion))} to {quote(text_of(prompt))}"
    return f"on {len(prompts)} answers at once; none of them alone"


def _is_column(value: Any, prompts: list[Any]) -> bool:
    return isinstance(value, list) and len(value) == len(prompts)


def quote(text: str) -> str:
    """An answer in a message."""
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
        "exact_match": lambda: by_text(lambda text, right: float(text.strip() == write_value(right).strip()), column),
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


def write_value(value: Any) -> str:
    """A value as an answer would say it."""
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
