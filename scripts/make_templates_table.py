"""Writes docs/templates.md: what each chat template that TRL stores does with turns, tools and thinking.

python scripts/make_templates_table.py            # write
python scripts/make_templates_table.py --check    # exit status 1 if the committed page differs
"""

import re
import sys
from pathlib import Path
from typing import Any

import trl
from jinja2 import TemplateError
from trl.chat_template_utils import has_generation_markers

from recipe_runner.data.encode import apply_template
from recipe_runner.data.thinking import EMPTY
from recipe_runner.smoke.stand_in import learn_tokenizer

PAGE = Path(__file__).resolve().parent.parent / "docs" / "templates.md"
FOLDER = Path(trl.__file__).parent / "chat_templates"
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Forecasts.", "parameters": PARAMETERS}}
CALL = {"type": "function", "id": "call00001", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
ASK, MORE = {"role": "user", "content": "Is it warm?"}, {"role": "user", "content": "And dry?"}
SYSTEM = {"role": "system", "content": "Be brief."}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "it is sunny", "name": "weather", "tool_call_id": "call00001"}
SAY = {"role": "assistant", "content": "Yes, it is."}
THOUGHT = "The sky is blue."
# Ways to write thinking: in a key of the turn, or in its text.
WAYS = {
    "key": SAY | {"reasoning_content": THOUGHT},
    "text": SAY | {"content": f"<think>\n{THOUGHT}\n</think>\n\nYes, it is."},
}
HEAD = f"""\
# Chat templates

What the chat templates that TRL {trl.__version__} stores do with turns, tools and thinking, tried by rendering. Each
can be named in a recipe: `training.chat_template_path: trl/NAME.jinja`. This page is written by
`scripts/make_templates_table.py`; `make lint` checks that it is true.

- **answers**: whether the template marks the assistant's tokens (`train_on: assistant`). Where it does not, but its
  training version does, that one is used instead, and said. *With the end of the prompt*: what the generation prompt
  ends with (of Qwen's a line break) is marked and learned, too, though a server has written it already when it asks.
- **system**: a system turn is rendered, refused (`dataset.merge_system: true` helps), or left out.
- **one role**: two user turns that follow each other; `dataset.merge_turns: true` helps where they are refused.
- **tools**: declarations, calls and results; or why not.
- **thinking**: where it is rendered, in every turn or in the last one only; whether from the key `reasoning_content` or
  from `<think>` in the text, the runner finds out. *Empty block*: answers without thinking get one
  (`dataset.thinking: mask` leaves it out of the loss).

| template | answers | system | one role | tools | thinking |
|---|---|---|---|---|---|
"""


def main() -> int:
    text = HEAD + "".join(f"| {' | '.join(describe(file))} |\n" for file in sorted(FOLDER.glob("*.jinja")))
    if "--check" in sys.argv:
        return int(not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text)
    PAGE.write_text(text, encoding="utf-8")
    return 0


def describe(file: Path) -> list[str]:
    """The cells of a template's row."""
    template = file.read_text(encoding="utf-8")
    special = ["<s>", "</s>", *dict.fromkeys(re.findall(r"<[|｜/]?[\w|｜▁]+>", template))]
    tokenizer: Any = learn_tokenizer([], list(dict.fromkeys(special)))
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.chat_template = "<s>", "</s>", template
    try:
        if "Is it warm?" not in render(tokenizer, [ASK, SAY]):
            raise TypeError
    except (TemplateError, TypeError):
        return [f"`{file.stem}`", *["-"] * 3, "takes contents in parts (images), not as text", "-"]
    training = file.with_stem(f"{file.stem}_training")
    marks = "marked" if has_generation_markers(template) else "not marked"
    if marks == "not marked" and training.is_file():
        marks = f"by `{training.stem}`"
    elif marks == "marked" and marks_prompt(tokenizer):
        marks = "marked, with the end of the prompt"
    turns = [
        try_turns(tokenizer, turns, text)
        for turns, text in (([SYSTEM, ASK, SAY], "Be brief."), ([ASK, MORE, SAY], "dry"))
    ]
    return [f"`{file.stem}`", marks, *turns, describe_tools(tokenizer), describe_thinking(tokenizer)]


def render(tokenizer: Any, turns: list[dict[str, Any]], tools: Any = None) -> str:
    return str(apply_template(tokenizer, turns, tools, tokenize=False))


def marks_prompt(tokenizer: Any) -> bool:
    """Whether a template marks as the answer what its generation prompt ends with."""
    options = {"tokenize": True, "return_dict": True}
    asked = apply_template(tokenizer, [ASK], None, add_generation_prompt=True, **options)["input_ids"]
    whole = apply_template(tokenizer, [ASK, SAY], None, return_assistant_tokens_mask=True, **options)
    begin = next((at for at, marked in enumerate(whole["assistant_masks"]) if marked), len(asked))
    return begin < len(asked) and whole["input_ids"][: len(asked)] == asked


def try_turns(tokenizer: Any, turns: list[dict[str, Any]], text: str) -> str:
    """Whether a template renders a text of some turns."""
    try:
        return "yes" if text in render(tokenizer, turns) else "left out"
    except (TemplateError, TypeError) as error:
        return f"refused: {say(error)}"


def say(error: Exception) -> str:
    """What a template refuses, in one line."""
    return " ".join(str(error).split()).replace("|", "/")[:80]


def describe_tools(tokenizer: Any) -> str:
    """Whether a template renders tools, their calls and results; or what it does not."""
    try:
        text = render(tokenizer, [ASK, CALLING, RESULT, SAY], [TOOL])
    except (TemplateError, TypeError) as error:
        return f"no: {say(error)}"
    found = {"declarations": "Forecasts." in text, "calls": "Rome" in text, "results": "it is sunny" in text}
    lost = [part for part, there in found.items() if not there]
    return f"no: {' and '.join(lost)} are left out" if lost else "yes"


def describe_thinking(tokenizer: Any) -> str:
    """Where a template renders thinking, and whether it writes an empty block without."""
    earlier = {way: THOUGHT in render(tokenizer, [ASK, answer, MORE, SAY]) for way, answer in WAYS.items()}
    last = {way: THOUGHT in render(tokenizer, [ASK, answer]) for way, answer in WAYS.items()}
    found = "in every turn" if any(earlier.values()) else "in the last turn" if any(last.values()) else "left out"
    if EMPTY.search(render(tokenizer, [ASK, SAY])):
        found += "; empty block"
    return found


if __name__ == "__main__":
    sys.exit(main())
