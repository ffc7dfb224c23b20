"""Dataset formats: from a row as it is in the data to a row as TRL knows it. Plain Python, no ML stack.

The layouts are TRL's: `messages: list[{role, content}]`; `prompt` and `completion` (both strings, or both lists of
messages), with `label` (true or false) where one answer is judged; `text`; or `prompt`, `chosen` and `rejected` (lists
of messages). Each row also says why it can't be trained on, in `dropped` ('' when it can).
"""

import json
import re
import unicodedata
from collections.abc import Mapping
from functools import partial
from typing import Any

from recipe_runner.problems.words import misspelt, suggest
from recipe_runner.recipe.sections import DatasetSection

Turns = list[dict[str, Any]]  # of a conversation: role and content

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
# Keys of a turn that say something, and have no place in a row of TRL's that is made here.
LOST_KEYS = (
    *("tool_calls", "tool_call_id", "tool_responses", "tool_results", "function_call", "functions", "tools"),
    *("reasoning_content", "reasoning_details", "reasoning", "thinking", "thought", "thoughts", "think"),
    *("name", "refusal", "prefix", "context", "documents", "citations", "attachments"),
    *("images", "image", "image_url", "videos", "video", "audios", "audio"),
    *("mask", "loss_weight", "train_detail"),
)
SWITCHES = ("train", "training", "trainable", "loss")  # false: a turn is not learned (axolotl, ms-swift)
TURN_KEYS = ("role", "content", "from", "value", "weight", *SWITCHES)  # that are read
USUAL_KEYS = frozenset(TURN_KEYS[:4])
KNOWN_KEYS = frozenset(TURN_KEYS + LOST_KEYS)


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
    dropped = next((f"with an empty {role}" for role in ("instruction", "output") if _is_blank(values[role])), "")
    before = _context(row, dataset.system, where)
    if dataset.template is not None:
        if before:
            raise RowError(f"{where} has a system prompt or a history, but dataset.template has no place for them")
        prompt, completion = _fill_template(dataset.template, values, where)
        return {"prompt": prompt, "completion": completion, "dropped": dropped}
    question = _join(values["instruction"], values["input"])
    return {
        "prompt": [*before, {"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": values["output"]}],
        "dropped": dropped,
    }


def _context(row: dict[str, Any], default: str | None, where: str) -> list[dict[str, str]]:
    """What the model sees before a row's own turns: a system prompt (the row's, else the default) and its history."""
    system = _text(row.get("system"), f"{where}: column 'system'")
    system = system if system.strip() else default or ""
    turns = [{"role": "system", "content": system}] if system else []
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise RowError(f"{where}: column 'history': expected a list of [question, answer], found {_kind(history)}")
    for question, answer in history:
        for role, text in (("user", question), ("assistant", answer)):
            turns.append({"role": role, "content": _text(text, f"{where}: column 'history'")})
    return turns


def _with_context(
    prompt: list[dict[str, str]], row: dict[str, Any], dataset: DatasetSection, where: str
) -> list[dict[str, str]]:
    """A prompt in turns after what the model sees before it."""
    own_system = any(turn["role"] == "system" for turn in prompt[:1])
    before = _context(row, None if own_system else dataset.system, where)
    if own_system and before and before[0]["role"] == "system":
        if before[0]["content"] != prompt[0]["content"]:
            raise RowError(f"{where} has a system turn, and another text in the column of the system prompt")
        before = before[1:]
    return [*prompt[:own_system], *before, *prompt[own_system:]]


def _join(text: str, more: str) -> str:
    return "\n\n".join(part for part in (text, more) if part.strip())


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
    messages = [_turn(turn, dataset, f"{where}, turn {number}") for number, turn in enumerate(turns, 1)]
    learned = [_is_learned(turn, f"{where}, turn {number}") for number, turn in enumerate(turns, 1)]
    messages = _with_context(messages, row, dataset, where)
    learned = [True] * (len(messages) - len(learned)) + learned
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    dropped = ""
    if not turns:
        dropped = "without turns"
    elif dataset.train_on == "all":
        if not all(learned):
            raise RowError(f"{where}: a turn of weight 0, but train_on: all learns every turn; set train_on: assistant")
    elif dataset.train_on == "completion":
        if messages[-1]["role"] != "assistant":
            dropped = "that do not end with an assistant turn"
        elif not learned[-1]:
            dropped = "whose last turn has weight 0"
        elif len(messages) == 1:
            dropped = "without a turn before the answer"
        answers = [len(messages) - 1]
    elif not answers:
        dropped = "without an assistant turn"
    elif not any(learned[number] for number in answers):
        dropped = "whose assistant turns all have weight 0"
    if not dropped and any(learned[number] and _is_blank(messages[number]["content"]) for number in answers):
        dropped = "with an empty answer"
    if dataset.train_on == "completion":
        return {"prompt": messages[:-1], "completion": messages[-1:], "dropped": dropped}
    muted = [place for place, number in enumerate(answers) if not learned[number]]  # of the assistant turns
    return {"messages": messages, "dropped": dropped} | ({"muted": muted} if muted else {})


def _is_learned(turn: dict[str, Any], where: str) -> bool:
    """Whether a turn may be in the loss: OpenAI's `weight: 0` says no, and so do the switches of other tools."""
    learned = True
    if turn.keys() <= USUAL_KEYS:
        return learned
    for key, values in (("weight", (0, 1)), *((switch, (False, True)) for switch in SWITCHES)):
        if (value := turn.get(key)) is not None:
            if value not in values:
                raise RowError(f"{where}: {key} is {value}, and can only be {values[0]} or {values[1]} here")
            learned = learned and bool(value)
    return learned


def _turn(turn: dict[str, Any], dataset: DatasetSection, where: str) -> dict[str, str]:
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if role not in KNOWN_ROLES:
        hint = suggest(str(role), list(KNOWN_ROLES)) or f"known roles: {', '.join(KNOWN_ROLES)}"
        raise RowError(
            f"{where}: {'no role' if role is None else f'unknown role {role!r}'} (keys: {', '.join(turn)}); {hint}"
        )
    unusual = [key for key in turn if key not in USUAL_KEYS]
    for key in unusual:
        if key in LOST_KEYS and key not in dataset.ignore and says_something(turn[key]):
            fix = f"remove it, write it into the content, or list it in dataset.ignore: [{key}]"
            if not isinstance(content, str):
                fix = "a turn without a text as content can't be trained on: write a text, or remove the row"
            raise RowError(f"{where}: the key '{key}' has no place in this format, and would be lost; {fix}")
    for key in unusual:
        if key in KNOWN_KEYS:
            continue
        if (known := misspelt(key, TURN_KEYS + LOST_KEYS)) and key not in dataset.ignore and says_something(turn[key]):
            fix = f"write '{known}', or list it in dataset.ignore: [{key}]"
            raise RowError(f"{where}: unknown key '{key}', did you mean '{known}'? It would be lost; {fix}")
    if not isinstance(content, str):
        raise RowError(f"{where}: expected a text as content, found {_kind(content)}")
    return {"role": SHAREGPT_ROLES.get(role, role), "content": content}


def says_something(value: Any) -> bool:
    """Whether a value is more than nothing: null, an empty text, list or mapping, also one that is written as JSON."""
    return value not in (None, "", "[]", "{}", "null") and not (isinstance(value, list | dict) and not any(value))


def _preference_row(row: dict[str, Any], dataset: DatasetSection, where: str) -> dict[str, Any]:
    """A pair. Texts become turns; without a prompt, the turns that both answers begin with are the prompt."""
    chosen, rejected = (
        _turns(row.get(role), "assistant", dataset, f"{where}: column '{role}'") for role in ("chosen", "rejected")
    )
    prompt = _prompt_turns(row, dataset, where)
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
    prompt = _with_context(prompt, row, dataset, where)
    for role, turns in (("chosen", chosen), ("rejected", rejected)):
        _refuse_muted(row.get(role), len(turns), f"{where}: column '{role}'")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "dropped": dropped}


def _prompt_turns(row: dict[str, Any], dataset: DatasetSection, where: str) -> list[dict[str, str]]:
    """The turns of the prompt, with the text of the column `input` below its question."""
    prompt = _turns(row.get("prompt"), "user", dataset, f"{where}: column 'prompt'")
    more = _text(row.get("input"), f"{where}: column 'input'")
    if not more.strip():
        return prompt
    if row.get("prompt") is None:
        raise RowError(f"{where} has an input, and no prompt; name the column of the prompt: columns: {{prompt: NAME}}")
    if not isinstance(row["prompt"], str):
        raise RowError(f"{where} has an input, but its prompt is no text that it could follow: it would be lost")
    return [{"role": "user", "content": _join(row["prompt"], more)}]


def _unpaired_row(row: dict[str, Any], dataset: DatasetSection, where: str) -> dict[str, Any]:
    """One answer to a prompt, and whether it is a good one. Texts become turns."""
    prompt = _prompt_turns(row, dataset, where)
    completion = _turns(row.get("completion"), "assistant", dataset, f"{where}: column 'completion'")
    label = row.get("label")
    if not isinstance(label, bool):
        raise RowError(f"{where}: column 'label': expected true or false, found {_kind(label)}")
    _refuse_muted(row.get("completion"), len(completion), f"{where}: column 'completion'")
    dropped = "" if prompt else "with an empty prompt"
    dropped = dropped if _says(completion) else "with an empty completion"
    if not dropped and completion[0]["role"] != "assistant":
        dropped = "whose answer does not continue its prompt"
    prompt = _with_context(prompt, row, dataset, where)
    return {"prompt": prompt, "completion": completion, "label": label, "dropped": dropped}


def _turns(value: Any, role: str, dataset: DatasetSection, where: str) -> list[dict[str, str]]:
    """Turns of a text, of one turn, or of turns."""
    if value is None or isinstance(value, str):
        return [{"role": role, "content": value}] if value else []
    turns = [value] if isinstance(value, dict) else value
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise RowError(f"{where}: expected a text, a turn or a list of turns, found {_kind(value)}")
    return [_turn(turn, dataset, f"{where}, turn {number}") for number, turn in enumerate(turns, 1)]


def _refuse_muted(value: Any, answer: int, where: str) -> None:
    """Refuses a turn that is not to be learned among the last ones, those of the answer: it would be learned."""
    turns = value if isinstance(value, list) else [value]
    for number, turn in list(enumerate(turns, 1))[len(turns) - answer :]:
        if isinstance(turn, dict) and not _is_learned(turn, f"{where}, turn {number}"):
            raise RowError(f"{where}, turn {number}: weight 0, but all turns of an answer are learned here; remove it")


def _says(turns: list[dict[str, str]]) -> bool:
    return bool(turns) and not _is_blank(turns[-1]["content"])


def _is_blank(text: str) -> bool:
    """Whether a text shows nothing: spaces, and characters without width."""
    return all(character.isspace() or unicodedata.category(character) in ("Cf", "Cc") for character in text)


def _text_row(row: dict[str, Any], dataset: DatasetSection, where: str) -> dict[str, Any]:
    text = _text(row["text"], f"{where}: column 'text'")
    return {"text": text, "dropped": "with an empty text" if _is_blank(text) else ""}


def _text(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, int | float):
        return json.dumps(value)  # as JSON writes it: true, 1.5
    raise RowError(f"{where}: expected a text, found {_kind(value)}")


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
