"""Dataset formats: from a row as it is in the data to a row as TRL knows it. Plain Python, no ML stack.

The layouts are TRL's: `messages: list[{role, content}]`; `prompt` and `completion` (both strings, or both lists of
messages), with `label` (true or false) where one answer is judged; `text`; or `prompt`, `chosen` and `rejected` (lists
of messages). TRL has no layout for `segments: list[{text, label}]`, of which some are learned. Each row also says why
it can't be trained on, in `dropped` ('' when it can).
"""

import json
import re
import unicodedata
from collections.abc import Mapping
from functools import partial
from typing import Any

from recipe_runner.data.images import place_images
from recipe_runner.data.turns import (
    KNOWN_KEYS,
    LISTED,
    SEGMENT_KEYS,
    SPELLING,
    UNDECLARED,
    RowError,
    Turns,
    call_undeclared,
    describe_value,
    find_spelt_call,
    fold_turns,
    lists_tools,
    read_tools,
    read_turns,
    says_something,
)
from recipe_runner.recipe.sections import DatasetSection

CLASSIC = {
    "with_input": "Instruction:\n{instruction}\n\nInput:\n{input}\n\nOutput:\n{output}",
    "without_input": "Instruction:\n{instruction}\n\nOutput:\n{output}",
}


def normalise_row(row: dict[str, Any], dataset: DatasetSection, where: str) -> dict[str, Any]:
    """Brings a row (role -> value) to the layout that TRL knows; `where` is its place, for messages.

    Returns:
        The row; with the `tools` that it declares, if it does, and `noted`, what was found or done that is counted.

    Raises:
        RowError: The row has the wrong shape.
    """
    layouts = {"instruction": _instruction_row, "chat": _chat_row, "text": _text_row, "preference": _preference_row}
    layouts |= {"unpaired_preference": _unpaired_row, "prompt": _prompt_row, "segments": _segments_row}
    made = layouts[dataset.format](row, dataset, where)
    tools = read_tools(row.get("tools"), f"{where}: column 'tools'")
    if tools:
        made["tools"] = list(tools)
    if dataset.images and not made["dropped"]:
        place_images(made, row.get("images"), dataset, where)
    turns = turns_of(made)
    noted = [UNDECLARED] if call_undeclared(turns, tools, where) else []
    noted += [LISTED] if lists_tools(turns, tools) else []
    noted += [f"{SPELLING}{mark}" for mark in dict.fromkeys(map(find_spelt_call, turns)) if mark]
    if noted:
        made["noted"] = [*made.get("noted", ()), *noted]
    return made


def turns_of(row: dict[str, Any]) -> Turns:
    """The turns of a normalised row; none for plain text."""
    parts = (row.get(key, []) for key in ("messages", "prompt", "completion", "chosen"))
    return [turn for part in parts if isinstance(part, list) for turn in part]


def _instruction_row(row: dict[str, Any], dataset: DatasetSection, where: str) -> dict[str, Any]:
    values = {role: _text(row.get(role), f"{where}: column '{role}'") for role in ("instruction", "input", "output")}
    dropped = next((f"with an empty {role}" for role in ("instruction", "output") if _is_blank(values[role])), "")
    before = _context(row, dataset.system, where)
    if dataset.template is not None:
        if before:
            raise RowError(f"{where} has a system prompt or a history, but dataset.template has no place for them")
        text, completion = _fill_template(dataset.template, values, where)
        return {"prompt": text, "completion": completion, "dropped": dropped}
    question = {"role": "user", "content": _join(values["instruction"], values["input"], dataset)}
    answer = {"role": "assistant", "content": values["output"]}
    prompt, noted = _fold([*before, question], dataset, where)
    if dataset.train_on == "assistant":
        return {"messages": [*prompt, answer], "dropped": dropped} | noted
    return {"prompt": prompt, "completion": [answer], "dropped": dropped} | noted


def _fold(turns: Turns, dataset: DatasetSection, where: str) -> tuple[Turns, dict[str, Any]]:
    """`fold_turns` of turns that are learned alike."""
    turns, _, done = fold_turns(turns, [True] * len(turns), dataset, where)
    return turns, {"noted": done} if done else {}


def _context(row: dict[str, Any], default: str | None, where: str) -> Turns:
    """What the model sees before a row's own turns: a system prompt (the row's, else the default) and its history."""
    system = _text(row.get("system"), f"{where}: column 'system'")
    system = system if system.strip() else default or ""
    turns = [{"role": "system", "content": system}] if system else []
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise RowError(
            f"{where}: column 'history': expected a list of [question, answer], found {describe_value(history)}"
        )
    for question, answer in history:
        for role, text in (("user", question), ("assistant", answer)):
            turns.append({"role": role, "content": _text(text, f"{where}: column 'history'")})
    return turns


def _with_context(prompt: Turns, row: dict[str, Any], dataset: DatasetSection, where: str) -> Turns:
    """A prompt in turns after what the model sees before it."""
    own_system = any(turn["role"] == "system" for turn in prompt[:1])
    before = _context(row, None if own_system else dataset.system, where)
    if own_system and before and before[0]["role"] == "system":
        if before[0]["content"] != prompt[0]["content"]:
            raise RowError(f"{where} has a system turn, and another text in the column of the system prompt")
        before = before[1:]
    return [*prompt[:own_system], *before, *prompt[own_system:]]


def _join(text: str, more: str, dataset: DatasetSection) -> str:
    return dataset.input_separator.join(part for part in (text, more) if part.strip())


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
        found = describe_value(turns)
        raise RowError(f"{where}: expected a list of turns {{role, content}} or {{from, value}}, found {found}")
    messages, learned = read_turns(turns, dataset, where)
    messages = _with_context(messages, row, dataset, where)
    learned = [True] * (len(messages) - len(learned)) + learned
    messages, learned, done = fold_turns(messages, learned, dataset, where)
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    last_only = dataset.train_on in ("last", "completion")
    dropped = ""
    if not turns:
        dropped = "without turns"
    elif dataset.train_on == "all":
        if not all(learned):
            raise RowError(f"{where}: a turn of weight 0, but train_on: all learns every turn; set train_on: assistant")
    elif last_only:
        if messages[-1]["role"] != "assistant":
            dropped = "that do not end with an assistant turn"
        elif not learned[-1]:
            dropped = "whose last turn has weight 0"
        elif len(messages) == 1:
            dropped = "without a turn before the answer"
        elif dataset.train_on == "completion":
            _refuse_long_completion(messages, where)
        answers = [len(messages) - 1]
    elif not answers:
        dropped = "without an assistant turn"
    elif not any(learned[number] for number in answers):
        dropped = "whose assistant turns all have weight 0"
    if not dropped and any(learned[number] and not _says(messages[number : number + 1]) for number in answers):
        dropped = "with an empty answer"
    noted = {"noted": done} if done else {}
    if last_only:
        return {"prompt": messages[:-1], "completion": messages[-1:], "dropped": dropped} | noted
    muted = [place for place, number in enumerate(answers) if not learned[number]]  # of the assistant turns
    return {"messages": messages, "dropped": dropped} | noted | ({"muted": muted} if muted else {})


def _refuse_long_completion(messages: Turns, where: str) -> None:
    """Refuses an answer of several turns: what stands between the assistant's would be learned as well.

    Raises:
        RowError: More than one turn follows the last one that is not the model's or a tool's.
    """
    asked = max((at for at, turn in enumerate(messages) if turn["role"] not in ("assistant", "tool")), default=-1)
    if len(messages) - asked > 2:
        raise RowError(
            f"{where}: {len(messages) - asked - 1} turns follow the last question, and train_on: completion would learn"
            " all of them, results of tools as well; set train_on: last (the last turn) or assistant (all of its turns)"
        )


def _preference_row(row: dict[str, Any], dataset: DatasetSection, where: str) -> dict[str, Any]:
    """A pair. Texts become turns; without a prompt, the turns that both answers begin with are the prompt."""
    (chosen, learned), (rejected, also) = (
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
    prompt, noted = _fold(_with_context(prompt, row, dataset, where), dataset, where)
    answers = {}
    for role, turns, may in (("chosen", chosen, learned), ("rejected", rejected, also)):
        answers[role] = _check_answer(turns, may, dataset, f"{where}: column '{role}'")
    return {"prompt": prompt, **answers, "dropped": dropped} | noted


def _prompt_turns(row: dict[str, Any], dataset: DatasetSection, where: str) -> Turns:
    """The turns of the prompt, with the text of the column `input` below its question."""
    prompt, _ = _turns(row.get("prompt"), "user", dataset, f"{where}: column 'prompt'")
    more = _text(row.get("input"), f"{where}: column 'input'")
    if not more.strip():
        return prompt
    if row.get("prompt") is None:
        raise RowError(f"{where} has an input, and no prompt; name the column of the prompt: columns: {{prompt: NAME}}")
    if not isinstance(row["prompt"], str):
        raise RowError(f"{where} has an input, but its prompt is no text that it could follow: it would be lost")
    return [{"role": "user", "content": _join(row["prompt"], more, dataset)}]


def _unpaired_row(row: dict[str, Any], dataset: DatasetSection, where: str) -> dict[str, Any]:
    """One answer to a prompt, and whether it is a good one. Texts become turns.

    Without a prompt, it is what stands before the last turn of a whole conversation.
    """
    prompt = _prompt_turns(row, dataset, where)
    completion, learned = _turns(row.get("completion"), "assistant", dataset, f"{where}: column 'completion'")
    if "prompt" not in row and len(completion) > 1:
        prompt, completion = completion[:-1], completion[-1:]
    label = row.get("label")
    if not isinstance(label, bool):
        fix = "write true or false, without quotes: true for a good answer"
        raise RowError(f"{where}: column 'label': expected true or false, found {describe_value(label)}; {fix}")
    dropped = "" if prompt else "with an empty prompt"
    dropped = dropped if _says(completion) else "with an empty completion"
    if not dropped and completion[0]["role"] != "assistant":
        dropped = "whose answer does not continue its prompt"
    prompt, noted = _fold(_with_context(prompt, row, dataset, where), dataset, where)
    completion = _check_answer(completion, learned, dataset, f"{where}: column 'completion'")
    return {"prompt": prompt, "completion": completion, "label": label, "dropped": dropped} | noted


def _prompt_row(row: dict[str, Any], dataset: DatasetSection, where: str) -> dict[str, Any]:
    """A prompt, which the model answers itself, and what rewards are given beside it."""
    prompt = _with_context(_prompt_turns(row, dataset, where), row, dataset, where)
    if prompt and prompt[-1]["role"] == "assistant":
        raise RowError(
            f"{where}: the prompt ends with an answer, which the model is to write itself; let it end with the"
            " question, and name the column of the right answer in dataset.reward_columns"
        )
    prompt, noted = _fold(prompt, dataset, where)
    handed = {name: row.get(name) for name in dataset.reward_columns}
    return {"prompt": prompt, "dropped": "" if _says(prompt) else "with an empty prompt"} | handed | noted


def _turns(value: Any, role: str, dataset: DatasetSection, where: str) -> tuple[Turns, list[bool]]:
    """Turns of a text, of one turn, or of turns; and of each whether it may be learned."""
    if value is None or isinstance(value, str):
        return ([{"role": role, "content": value}], [True]) if value else ([], [])
    turns = [value] if isinstance(value, dict) else value
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise RowError(f"{where}: expected a text, a turn or a list of turns, found {describe_value(value)}")
    return read_turns(turns, dataset, where)


def _check_answer(turns: Turns, learned: list[bool], dataset: DatasetSection, where: str) -> Turns:
    """An answer, all of which is learned; `learned` is of the conversation that it ends.

    Raises:
        RowError: One of its turns is not to be learned.
    """
    begin = len(learned) - len(turns)
    if muted := next((number for number, may in enumerate(learned, 1) if number > begin and not may), 0):
        raise RowError(f"{where}, turn {muted}: weight 0, but all turns of an answer are learned here; remove it")
    if any(turn["role"] == "tool" for turn in turns):
        raise RowError(f"{where}: the result of a tool in an answer would be learned; let the answer end with the call")
    return _fold(turns, dataset, where)[0]


def _says(turns: Turns) -> bool:
    """Whether the last of some turns says something, or calls a tool."""
    return bool(turns) and bool(turns[-1].get("tool_calls") or not _is_blank(turns[-1]["content"]))


def _is_blank(text: str) -> bool:
    """Whether a text shows nothing: spaces, and characters without width."""
    return all(character.isspace() or unicodedata.category(character) in ("Cf", "Cc") for character in text)


def _text_row(row: dict[str, Any], dataset: DatasetSection, where: str) -> dict[str, Any]:
    text = _text(row["text"], f"{where}: column 'text'")
    return {"text": text, "dropped": "with an empty text" if _is_blank(text) else ""}


def _segments_row(row: dict[str, Any], dataset: DatasetSection, where: str) -> dict[str, Any]:
    """Pieces of a text as they are, with what each says of itself: whether it is learned."""
    segments, where = row["segments"], f"{where}: column 'segments'"
    if not isinstance(segments, list):
        raise RowError(f"{where}: expected a list of segments {{text, label}}, found {describe_value(segments)}")
    for number, segment in enumerate(segments, 1):
        at = f"{where}, segment {number}"
        if not isinstance(segment, dict) or not isinstance(segment.get("text"), str):
            raise RowError(f"{at}: expected {{text: a text, label: true or false}}, found {describe_value(segment)}")
        if not isinstance(segment.get("label"), bool):
            raise RowError(f"{at}: label: expected true or false, found {describe_value(segment.get('label'))}")
        for key in sorted((segment.keys() & KNOWN_KEYS) - {*SEGMENT_KEYS, *dataset.ignore}):
            if says_something(segment[key]):
                fix = f"take it out, or list it in dataset.ignore: [{key}]"
                raise RowError(f"{at} has a key '{key}', which segments do not have: it would be lost; {fix}")
    made = [{"text": segment["text"], "label": segment["label"]} for segment in segments]
    learns = any(segment["text"] and (segment["label"] or dataset.train_on == "all") for segment in made)
    dropped = "" if learns else "without a segment that is learned"
    return {"segments": made, "dropped": dropped}


def _text(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, int | float):
        return json.dumps(value)  # as JSON writes it: true, 1.5
    raise RowError(f"{where}: expected a text, found {describe_value(value)}")
