"""Dataset formats: from a row as it is in the data to a row as TRL knows it. Plain Python, no ML stack.

The layouts are TRL's: `messages: list[{role, content}]`; `prompt` and `completion` (both strings, or both lists of
messages), with `label` (true or false) where one answer is judged; `text`; or `prompt`, `chosen` and `rejected` (lists
of messages). Each row also says why it can't be trained on, in `dropped` ('' when it can).
"""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from recipe_runner.problems.words import suggest
from recipe_runner.recipe.sections import DatasetSection

CLASSIC = {
    "with_input": "Instruction:\n{instruction}\n\nInput:\n{input}\n\nOutput:\n{output}",
    "without_input": "Instruction:\n{instruction}\n\nOutput:\n{output}",
}
# ShareGPT's names of roles, as its exports and their descendants write them -> the names chat templates know.
SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function": "tool",
}
KNOWN_ROLES = ("system", "user", "assistant", "tool", *SHAREGPT_ROLES)


class RowError(Exception):
    """A row has the wrong shape; the message says which row, and what was found."""


def normalise_row(row: dict[str, Any], dataset: DatasetSection, where: str) -> dict[str, Any]:
    """Brings a row (role -> value) to the layout that TRL knows; `where` is its place, for messages.

    Raises:
        RowError: The row has the wrong shape.
    """
    layouts = {"instruction": _instruction_row, "chat": _chat_row, "text": _text_row, "preference": _preference_row}
    layouts["unpaired_preference"] = _unpaired_row
    return layouts[dataset.format](row, dataset, where)


def _instruction_row(row: dict[str, Any], dataset: DatasetSection, where: str) -> dict[str, Any]:
    values = {role: _text(row.get(role), f"{where}: column '{role}'") for role in ("instruction", "input", "output")}
    dropped = next((f"with an empty {role}" for role in ("instruction", "output") if not values[role].strip()), "")
    if dataset.template is not None:
        prompt, completion = _fill_template(dataset.template, values, where)
        return {"prompt": prompt, "completion": completion, "dropped": dropped}
    question = "\n\n".join(text for text in (values["instruction"], values["input"]) if text.strip())
    system = [{"role": "system", "content": dataset.system}] if dataset.system else []
    return {
        "prompt": [*system, {"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": values["output"]}],
        "dropped": dropped,
    }


def _fill_template(template: str | Mapping[str, str], values: dict[str, str], where: str) -> tuple[str, str]:
    """Fills a plain-text template; the prompt ends where `{output}` begins."""
    if template == "classic":
        template = CLASSIC
    if not isinstance(template, str):
        template = template["with_input" if values["input"].strip() else "without_input"]
    elif "{input}" not in template and values["input"].strip():
        raise RowError(f"{where} has an input, but dataset.template has no {{input}}: it would be lost")
    prompt, completion = template.split("{output}", 1)
    fill = partial(re.sub, r"\{(instruction|input|output)\}", lambda match: values[match[1]])
    return fill(prompt), fill("{output}" + completion)


def _chat_row(row: dict[str, Any], dataset: DatasetSection, where: str) -> dict[str, Any]:
    turns = row["messages"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise RowError(f"{where}: expected a list of turns {{role, content}} or {{from, value}}, found {_kind(turns)}")
    messages = [_turn(turn, f"{where}, turn {number}") for number, turn in enumerate(turns, 1)]
    if dataset.system and not any(message["role"] == "system" for message in messages[:1]):
        messages = [{"role": "system", "content": dataset.system}, *messages]
    dropped = ""
    if not turns:
        dropped = "without turns"
    elif dataset.train_on == "completion" and messages[-1]["role"] != "assistant":
        dropped = "that do not end with an assistant turn"
    elif dataset.train_on == "assistant" and not any(message["role"] == "assistant" for message in messages):
        dropped = "without an assistant turn"
    if dataset.train_on == "completion":
        return {"prompt": messages[:-1], "completion": messages[-1:], "dropped": dropped}
    return {"messages": messages, "dropped": dropped}


def _turn(turn: dict[str, Any], where: str) -> dict[str, str]:
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if role not in KNOWN_ROLES:
        hint = suggest(str(role), list(KNOWN_ROLES)) or f"known roles: {', '.join(KNOWN_ROLES)}"
        raise RowError(
            f"{where}: {'no role' if role is None else f'unknown role {role!r}'} (keys: {', '.join(turn)}); {hint}"
        )
    if turn.get("tool_calls") or turn.get("function_call"):
        raise RowError(f"{where}: tool calls, which this format would lose; remove these rows")
    if not isinstance(content, str):
        raise RowError(f"{where}: expected a text as content, found {_kind(content)}")
    return {"role": SHAREGPT_ROLES.get(role, role), "content": content}


def _preference_row(row: dict[str, Any], dataset: DatasetSection, where: str) -> dict[str, Any]:
    """A pair. Texts become turns; without a prompt, the turns that both answers begin with are the prompt."""
    chosen, rejected = (
        _turns(row.get(role), "assistant", f"{where}: column '{role}'") for role in ("chosen", "rejected")
    )
    prompt = _turns(row.get("prompt"), "user", f"{where}: column 'prompt'")
    common = 0
    while common < min(len(chosen), len(rejected)) and chosen[common] == rejected[common]:
        common += 1
    dropped = next(
        (f"with an empty {name}" for name, turns in (("chosen", chosen), ("rejected", rejected)) if not _says(turns)),
        "",
    )
    if not dropped and chosen == rejected:
        dropped = "with equal answers"
    if prompt and chosen[: len(prompt)] == prompt == rejected[: len(prompt)]:
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]  # whole conversations beside their prompt
    elif not prompt:
        common = min(common, len(chosen) - 1, len(rejected) - 1)
        prompt, chosen, rejected = chosen[:common], chosen[common:], rejected[common:]
    if not dropped and not prompt:
        dropped = "whose answers have no prompt in common"
    if not dropped and any(turns[0]["role"] != "assistant" for turns in (chosen, rejected)):
        dropped = "whose answer does not continue its prompt"
    if dataset.system and not any(turn["role"] == "system" for turn in prompt[:1]):
        prompt = [{"role": "system", "content": dataset.system}, *prompt]
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "dropped": dropped}


def _unpaired_row(row: dict[str, Any], dataset: DatasetSection, where: str) -> dict[str, Any]:
    """One answer to a prompt, and whether it is a good one. Texts become turns."""
    prompt = _turns(row.get("prompt"), "user", f"{where}: column 'prompt'")
    completion = _turns(row.get("completion"), "assistant", f"{where}: column 'completion'")
    label = row.get("label")
    if not isinstance(label, bool):
        raise RowError(f"{where}: column 'label': expected true or false, found {_kind(label)}")
    dropped = "" if prompt else "with an empty prompt"
    dropped = dropped if _says(completion) else "with an empty completion"
    if not dropped and completion[0]["role"] != "assistant":
        dropped = "whose answer does not continue its prompt"
    if dataset.system and not any(turn["role"] == "system" for turn in prompt[:1]):
        prompt = [{"role": "system", "content": dataset.system}, *prompt]
    return {"prompt": prompt, "completion": completion, "label": label, "dropped": dropped}


def _turns(value: Any, role: str, where: str) -> list[dict[str, str]]:
    """Turns of a text, of one turn, or of turns."""
    if value is None or isinstance(value, str):
        return [{"role": role, "content": value}] if value else []
    turns = [value] if isinstance(value, dict) else value
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise RowError(f"{where}: expected a text, a turn or a list of turns, found {_kind(value)}")
    return [_turn(turn, f"{where}, turn {number}") for number, turn in enumerate(turns, 1)]


def _says(turns: list[dict[str, str]]) -> bool:
    return bool(turns) and bool(turns[-1]["content"].strip())


def _text_row(row: dict[str, Any], dataset: DatasetSection, where: str) -> dict[str, Any]:
    text = _text(row["text"], f"{where}: column 'text'")
    return {"text": text, "dropped": "" if text.strip() else "with an empty text"}


def _text(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, int | float):
        return str(value)
    raise RowError(f"{where}: expected a text, found {_kind(value)}")


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
