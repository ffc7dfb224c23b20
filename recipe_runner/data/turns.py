"""Turns of a conversation: from how people write them to how TRL and chat templates know them. Plain Python.

A turn is `{role, content}`. An assistant turn may have `tool_calls`, a list of `{type, function: {name, arguments}}`,
and `reasoning_content`; a `tool` turn, the result of a call, has the `name` of its tool.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError

from recipe_runner.problems.words import misspelt, suggest
from recipe_runner.recipe.sections import DatasetSection

Turns = list[dict[str, Any]]  # of a conversation: role and content
Tools = tuple[dict[str, Any], ...]  # declared: {type: function, function: {name, description, parameters}}

# ShareGPT's names of roles, as its exports and their descendants write them -> the names chat templates know.
SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("observation", "function", "function_response", "tool_response", "ipython"), "tool"),
}
CALLS = ("function_call", "tool_call")  # roles whose content is a call, as JSON
KNOWN_ROLES = ("system", "user", "assistant", "tool", *SHAREGPT_ROLES)
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # keys of a turn's thinking, as transformers 5.23 knows them
# Keys of a turn that say something, and have no place in a row of TRL's that is made here.
LOST_KEYS = (
    *("tool_responses", "tool_results", "functions", "tools"),
    *("reasoning_details", "thought", "thoughts", "think"),
    *("name", "refusal", "prefix", "context", "documents", "citations", "attachments"),
    *("images", "image", "image_url", "videos", "video", "audios", "audio"),
    *("mask", "loss_weight", "train_detail"),
)
SWITCHES = ("train", "training", "trainable", "loss")  # false: a turn is not learned (axolotl, ms-swift)
TURN_KEYS = ("role", "content", "from", "value", "weight", *SWITCHES)  # that every turn may have
ASSISTANT_KEYS, TOOL_KEYS = ("tool_calls", "function_call", *THOUGHTS), ("tool_call_id", "name")
USUAL_KEYS = frozenset(TURN_KEYS[:4])
READ_KEYS = (*TURN_KEYS, *ASSISTANT_KEYS, *TOOL_KEYS)
IMAGE_KEYS = ("image", "path", "url")  # of a part that is an image: which
SEGMENT_KEYS = ("text", "label")  # of a piece of text
KNOWN_KEYS = frozenset(READ_KEYS + LOST_KEYS)
NESTED_KEYS = frozenset(("tool_calls", "function_call"))  # whose values are objects
# How a call begins that is spelt in the text of an answer: Hermes and Qwen, Llama, Mistral, LFM; and without tokens
# of a template's, ReAct.
SPELT_BY_TEMPLATES = re.compile(r"<tool_call\w*>?|<function=|<\|python_tag\|>|\[TOOL_CALLS\]|<\|tool_call\w*(?:\|>)?")
SPELT_CALLS = ("<tool_call", "<|python_tag|>", "[TOOL_CALLS]", "<|tool_call", "<function", "```tool_c", "Action:")
# A call as JSON in the text of an answer, as Hermes and Qwen spell it; GLM and Qwen-Coder spell others there.
SPELT_AS_JSON = re.compile(r"<tool_call>\s*([\[{].*?)\s*</tool_call>", re.DOTALL)
MARK = "\N{OBJECT REPLACEMENT CHARACTER}"  # in a text: an image stands here
# What is counted of rows.
UNDECLARED = "that call a tool which they do not declare"
UNWRAPPED = "with results of tools taken out of <tool_response> tags, which the chat template writes itself"
LISTED = "whose first turn lists the tools that they declare"
SPELLING = "that spell a call of a tool in the text of an answer, as "  # and how it begins
GOOD, BAD = "judged good", "judged bad"
FOLDED_SYSTEM, JOINED = "with a system turn put into the user turn after it", "with turns of one role joined"
SYSTEM_AS_USER = "with a system turn made a user turn: none of the user's is right after it"


# How to write what was written otherwise, for messages.
AS_CALL = 'write it as JSON: {"name": "NAME", "arguments": {"KEY": "VALUE"}}'
AS_ARGUMENTS = 'write them as one JSON object: {"KEY": "VALUE"}'
AS_TOOLS = (
    "write a list of {type: function, function: {name, description, parameters}}, whose parameters are a JSON schema of"
    " `type: object`; or leave the column out: columns: {tools: null}"
)


class RowError(Exception):
    """A row has the wrong shape; the message says which row, and what was found."""


def read_turns(turns: Sequence[Any], dataset: DatasetSection, where: str) -> tuple[Turns, list[bool]]:
    """Turns as they are in the data, as TRL knows them; and of each, whether it may be learned.

    Raises:
        RowError: A turn has the wrong shape, or is the result of a call that was not made.
    """
    messages: Turns = []
    learned: list[bool] = []
    for number, turn in enumerate(turns, 1):
        place = f"{where}, turn {number}"
        message, may = _read_turn(turn, dataset, place), _is_learned(turn, place)
        if messages and _role(turn) in CALLS and messages[-1]["role"] == "assistant":
            if learned[-1] != may:
                raise RowError(f"{place}: a call and the turn that it belongs to differ in what is learned")
            messages[-1] = join_turns(messages[-1], message)
            continue
        messages.append(message)
        learned.append(may)
    if any(message["role"] == "tool" for message in messages):
        _match_results(messages, where)
    return messages, learned


def _role(turn: Mapping[str, Any]) -> Any:
    return turn.get("role", turn.get("from"))


def _read_turn(turn: dict[str, Any], dataset: DatasetSection, where: str) -> dict[str, Any]:
    said, content = _role(turn), turn.get("content", turn.get("value"))
    if said not in KNOWN_ROLES:
        hint = suggest(str(said), list(KNOWN_ROLES)) or f"known roles: {', '.join(KNOWN_ROLES)}"
        raise RowError(
            f"{where}: {'no role' if said is None else f'unknown role {said!r}'} (keys: {', '.join(turn)}); {hint}"
        )
    role = SHAREGPT_ROLES.get(said, said)
    message = {"role": role}
    if not turn.keys() <= USUAL_KEYS:
        message |= _read_more(turn, role, dataset, where)
    if said in CALLS:
        message["tool_calls"], content = read_calls(content, where), ""
    if content is None and "tool_calls" in message:
        content = ""
    if isinstance(content, list):
        content, images = _join_parts(content, dataset, where)
        message |= {"images": images} if images else {}
    if not isinstance(content, str):
        fix = "write the text alone, or remove the row"
        raise RowError(f"{where}: expected a text as content, found {describe_value(content)}; {fix}")
    made = {"role": role, "content": content, **message}
    if twice := [
        call for call in read_spelt_calls(made, where) if call in map(_without_id, made.get("tool_calls", ()))
    ]:
        name = twice[0]["function"]["name"]
        raise RowError(
            f"{where}: the call of '{name}' is in the text and in tool_calls, and would be learned twice; take it out"
            " of the text"
        )
    return made


def _join_parts(parts: list[Any], dataset: DatasetSection, where: str) -> tuple[str, list[Any]]:
    """A content in parts, as OpenAI writes it ({type: text, text}), as one text with marks; and images in the parts.

    Raises:
        RowError: A part is neither a text nor, where the recipe has images, one.
    """
    texts, images = [], []
    for number, part in enumerate(parts, 1):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image" and dataset.images:
            texts.append(MARK)
            images += [part[key] for key in IMAGE_KEYS if part.get(key)][:1]
        else:
            fix = f"parts are read where all are {{type: text, text}}: take part {number} out, or remove the row"
            if kind in ("image", "image_url"):
                fix = (
                    "write {type: image, image: FILE}" if dataset.images else f"{fix}; dataset.images trains on images"
                )
            raise RowError(f"{where}: expected a text as content, found {describe_value(parts)}; {fix}")
    return "".join(texts), images


def read_spelt_calls(turn: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """Calls that an answer spells in its text as JSON (Hermes).

    Raises:
        RowError: One of them is no call; see `read_calls`.
    """
    if turn["role"] != "assistant" or "<tool_call>" not in turn["content"]:
        return []
    answer = turn["content"].rpartition("</think>")[2]
    texts = SPELT_AS_JSON.findall(answer)
    return [_without_id(call) for text in texts for call in read_calls(text, f"{where}: <tool_call> in the text")]


def _without_id(call: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in call.items() if key != "id"}


def _read_more(turn: dict[str, Any], role: str, dataset: DatasetSection, where: str) -> dict[str, Any]:
    """Calls, thinking, and whose result a turn is.

    Raises:
        RowError: A key has no place here, and would be lost.
    """
    own = {"assistant": ASSISTANT_KEYS, "tool": TOOL_KEYS}.get(role, ())
    said = {key: turn[key] for key in turn if key not in dataset.ignore and says_something(turn[key])}
    for key in said:
        if key in TURN_KEYS or key in own:
            continue
        if key in KNOWN_KEYS:
            fix = f"remove it, write it into the content, or list it in dataset.ignore: [{key}]"
            if not isinstance(turn.get("content", turn.get("value")), str):
                fix = "a turn without a text as content can't be trained on: write a text, or remove the row"
            raise RowError(f"{where}: the key '{key}' has no place in a turn of {role}, and would be lost; {fix}")
        if known := misspelt(key, READ_KEYS + LOST_KEYS):
            fix = f"write '{known}', or list it in dataset.ignore: [{key}]"
            raise RowError(f"{where}: unknown key '{key}', did you mean '{known}'? It would be lost; {fix}")
    more: dict[str, Any] = {}
    if role == "assistant":
        calls = [call for key in NESTED_KEYS if key in said for call in read_calls(said[key], f"{where}: {key}")]
        if calls:
            more["tool_calls"] = calls
        thought = next((said[key] for key in THOUGHTS if key in said), None)
        if thought is not None:
            if not isinstance(thought, str):
                raise RowError(f"{where}: expected a text as thinking, found {describe_value(thought)}")
            more["reasoning_content"] = thought
    elif role == "tool":
        more = {key: str(said[key]) for key in TOOL_KEYS if key in said}
    return more


def says_something(value: Any) -> bool:
    """Whether a value is more than nothing: null, an empty text, list or mapping, also one that is written as JSON."""
    return value not in (None, "", "[]", "{}", "null") and not (isinstance(value, list | dict) and not any(value))


def _is_learned(turn: dict[str, Any], where: str) -> bool:
    """Whether a turn may be in the loss: OpenAI's `weight: 0` says no, and so do the switches of other tools."""
    learned = True
    if turn.keys() <= USUAL_KEYS:
        return learned
    for key, values in (("weight", (0, 1)), *((switch, (False, True)) for switch in SWITCHES)):
        if (value := turn.get(key)) is not None:
            if value not in values:
                known = " or ".join(json.dumps(known) for known in values)
                found = f"{key} is {json.dumps(value, default=str)}, and can only be {known} here"
                fix = (
                    f"write {json.dumps(values[0])} for a turn that is not learned, {json.dumps(values[1])} for others"
                )
                raise RowError(f"{where}: {found}; {fix}")
            learned = learned and bool(value)
    return learned


def read_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Calls of tools: one or a list, as objects or as JSON; by OpenAI's layout or `{name, arguments}`.

    Raises:
        RowError: They are no JSON, have no name, or arguments that are no JSON object.
    """
    value = _parse(value, f"{where}: the call", AS_CALL) if isinstance(value, str) else value
    calls = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(function, dict) or not isinstance(name, str) or not name:
            raise RowError(f"{where}: expected a call {{name, arguments}}, found {describe_value(call)}; {AS_CALL}")
        arguments = function.get("arguments", function.get("parameters"))
        if isinstance(arguments, str) and arguments.strip():
            arguments = _parse(arguments, f"{where}: the arguments of '{name}'", AS_ARGUMENTS)
        arguments = arguments or {}
        if not isinstance(arguments, dict):
            found = f"are no JSON object: {describe_value(arguments)}"
            raise RowError(f"{where}: the arguments of '{name}' {found}; {AS_ARGUMENTS}")
        try:
            json.dumps(arguments, allow_nan=False, default=str)
        except ValueError as error:
            found = "NaN and Infinity are no numbers of JSON's; write null, or a text"
            raise RowError(f"{where}: the arguments of '{name}': {found}") from error
        identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        calls.append({**identity, "type": "function", "function": {"name": name, "arguments": arguments}})
    return calls


def _parse(text: str, what: str, fix: str) -> Any:
    try:
        return read_json(text)
    except ValueError as error:
        raise RowError(f"{what}: no JSON ({error}): {describe_value(text)}; {fix}") from error


def read_json(text: str) -> Any:
    """What a text of JSON says, more strictly than Python reads it.

    Raises:
        ValueError: It is no JSON, has NaN or Infinity, a key twice, or half a character.
    """
    return json.loads(text, object_pairs_hook=_check_pairs, parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON's")


def _check_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key '{next(key for key in keys if keys.count(key) > 1)}' is there twice")
    for key, value in pairs:
        if any("\ud800" <= character <= "\udfff" for of in (key, value) if isinstance(of, str) for character in of):
            raise ValueError(f"key '{key}': half a surrogate pair (\\ud800 to \\udfff), which is no character")
    return made


def read_tools(value: Any, where: str) -> Tools:
    """The tools that a row declares, as objects or as JSON.

    Raises:
        RowError: They are no JSON schema of functions.
    """
    if not says_something(value):
        return ()
    try:
        return _read_schemas(value if isinstance(value, str) else json.dumps(value))
    except ValueError as error:
        raise RowError(f"{where}: {error}; {AS_TOOLS}") from error


@lru_cache(maxsize=1024)
def _read_schemas(text: str) -> Tools:
    try:
        declared = read_json(text)
    except ValueError as error:
        raise ValueError(f"no JSON ({error}): {describe_value(text)}") from error
    tools = []
    for number, tool in enumerate(declared if isinstance(declared, list) else [declared], 1):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(function, dict) or not isinstance(name, str) or not name:
            found = describe_value(tool)
            raise ValueError(f"tool {number}: expected {{name, description, parameters}}, found {found}")
        parameters = function.get("parameters") or {}
        if not isinstance(parameters, dict) or (parameters and parameters.get("type") != "object"):
            raise ValueError(f"tool {number} ('{name}'): its parameters are no JSON schema of `type: object`")
        try:
            Draft202012Validator.check_schema(parameters)
        except SchemaError as error:
            at = "".join(f".{step}" for step in error.absolute_path)
            raise ValueError(f"tool {number} ('{name}'): parameters{at} are no JSON schema: {error.message}") from error
        tools.append({"type": "function", "function": function})
    return tuple(tools)


def _match_results(messages: Turns, where: str) -> None:
    """Names the tool whose result each `tool` turn is, by the calls before it, and puts results in the calls' order.

    Few templates write which call a result belongs to: the order has to say it.

    Raises:
        RowError: A result is not that of a call.
    """
    made: list[dict[str, Any]] = []  # calls of the assistant's last turns
    waiting: list[dict[str, Any]] = []  # those of them without a result
    spelt = False  # whether the calls are spelt in the text of the answer
    places: list[tuple[int, int]] = []  # of each turn: where its run of results begins, and the place of its call
    before = ""
    for number, message in enumerate(messages, 1):
        role, call = message["role"], None
        if role == "assistant":
            follows = before == "assistant"  # one turn a call, then all results
            calls = list(message.get("tool_calls", ()))
            made, waiting = [*(made if follows else ()), *calls], [*(waiting if follows else ()), *calls]
            spelt = not waiting and any(mark in message["content"] for mark in SPELT_CALLS)
        elif role != "tool":
            waiting, spelt = [], False
        elif not spelt:
            wanted = message.get("tool_call_id")
            known = [other for other in waiting if wanted and other.get("id") == wanted]
            if wanted and not known and any("id" in other for other in waiting):
                ids = ", ".join(f"'{other['id']}'" for other in waiting if "id" in other)
                found = f"a result of the call '{wanted}', which was not made"
                raise RowError(
                    f"{where}, turn {number}: {found}; without a result are {ids}: write one as tool_call_id"
                )
            if not waiting:
                found = "the result of a tool, and no call before it that it belongs to"
                fix = "write the call into the assistant's turn before it (tool_calls), or remove the result"
                raise RowError(f"{where}, turn {number}: {found}; {fix}")
            call = (known or waiting)[0]
            waiting = [other for other in waiting if other is not call]
            message.setdefault("name", call["function"]["name"])
        begin = places[-1][0] if role == before == "tool" else number
        places.append((begin, next((at for at, other in enumerate(made) if other is call), 0)))
        before = role
    messages[:] = [message for _, message in sorted(zip(places, messages, strict=True), key=lambda of: of[0])]


def join_turns(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two turns of one role as one: texts with an empty line between, then the calls of both."""
    joined = {**first, **second}
    for key in ("reasoning_content", "content"):
        texts = [turn[key] for turn in (first, second) if turn.get(key, "").strip()]
        if key in joined:
            joined[key] = "\n\n".join(texts)
    if "images" in joined:
        joined["images"] = [*first.get("images", ()), *second.get("images", ())]
    if "tool_calls" in joined:
        joined["tool_calls"] = [*first.get("tool_calls", ()), *second.get("tool_calls", ())]
    return joined


def fold_turns(
    turns: Turns, learned: list[bool], dataset: DatasetSection, where: str
) -> tuple[Turns, list[bool], list[str]]:
    """Turns as `merge_system` and `merge_turns` make them for templates that refuse others; and what was done.

    Raises:
        RowError: Turns that would be joined differ in what is learned.
    """
    done: list[str] = []
    if dataset.merge_system and any(turn["role"] == "system" for turn in turns):
        turns, learned, done = _fold_system(turns, learned)
    if dataset.merge_turns:
        joined: Turns = []
        kept: list[bool] = []
        for turn, may in zip(turns, learned, strict=True):
            if joined and turn["role"] == joined[-1]["role"] != "tool":
                if may != kept[-1] and turn["role"] == "assistant":
                    found = "two assistant turns would be joined, of which one is not learned"
                    fix = "give both the same weight, join them in the data, or set merge_turns: false"
                    raise RowError(f"{where}: {found}; {fix}")
                joined[-1] = join_turns(joined[-1], turn)
            else:
                joined.append(turn)
                kept.append(may)
        if len(joined) < len(turns):
            done.append(JOINED)
        turns, learned = joined, kept
    return turns, learned, done


def _fold_system(turns: Turns, learned: list[bool]) -> tuple[Turns, list[bool], list[str]]:
    """Each system turn at the beginning of the user turn after it; as a user turn where there is none."""
    done: dict[str, None] = {}
    folded: Turns = []
    kept: list[bool] = []
    waiting: dict[str, Any] | None = None
    for turn, may in zip(turns, learned, strict=True):
        if turn["role"] == "system":
            own = {"role": "user", "content": turn["content"]}
            waiting = own if waiting is None else join_turns(waiting, own)
            continue
        if waiting is not None and turn["role"] == "user":
            turn = join_turns(waiting, turn)
            done[FOLDED_SYSTEM] = None
        elif waiting is not None:
            folded.append(waiting)
            kept.append(True)
            done[SYSTEM_AS_USER] = None
        waiting = None
        folded.append(turn)
        kept.append(may)
    if waiting is not None:
        folded.append(waiting)
        kept.append(True)
        done[SYSTEM_AS_USER] = None
    return folded, kept, list(done)


def call_undeclared(turns: Turns, tools: Tools, where: str) -> bool:
    """Whether a turn calls a tool that is not declared; for a call in the text, a list in a system prompt declares it.

    Raises:
        RowError: What an answer spells as a call is none.
    """
    names = {tool["function"]["name"] for tool in tools}
    listed = "".join(turn["content"] for turn in turns if turn["role"] == "system")
    called = {call["function"]["name"] for turn in turns for call in turn.get("tool_calls", ())}
    spelt = {call["function"]["name"] for turn in turns for call in read_spelt_calls(turn, where)}
    return bool(called - names) or any(name not in listed for name in spelt - names)


def lists_tools(turns: Turns, tools: Tools) -> bool:
    """Whether the first turn spells the schemas of the declared tools, as Hermes' system prompts do."""
    said = turns[0]["content"] if turns and tools else ""
    return '"parameters"' in said and all(f'"{tool["function"]["name"]}"' in said for tool in tools)


def find_spelt_call(turn: dict[str, Any]) -> str:
    """How a call begins that is spelt in the text of an answer, as a template writes calls; empty where none is."""
    content = turn["content"]
    if turn["role"] != "assistant" or ("<" not in content and "[" not in content):
        return ""
    found = SPELT_BY_TEMPLATES.search(content)
    return found[0] if found else ""


def describe_value(value: Any) -> str:
    """A value in a message: its type, and how it begins."""
    return "nothing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
