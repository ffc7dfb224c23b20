"""Chat templates that mark the assistant's tokens: TRL's training versions, and a patch for templates TRL lacks."""

import re
from pathlib import Path
from typing import Any

import trl
from transformers import PreTrainedTokenizerBase

from recipe_runner.data.encode import apply_template
from recipe_runner.data.rendering import SPELT

PROBE = [
    {"role": "user", "content": "Wie geht es?"},
    {"role": "assistant", "content": "Sehr gut."},
    {"role": "user", "content": "Warum?"},
    {"role": "assistant", "content": "Darum."},
]
OUTPUT = re.compile(r"\{\{-?\s*(?P<expression>[^{}]*?\bcontent\b[^{}]*?)\s*-?\}\}")


def find_marked(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """A template that marks the assistant's tokens and renders the same text as the tokenizer's, and what it is.

    One of TRL's, else the tokenizer's own with marks put in; empty where neither is to be had.
    """
    if file := find_equivalent(tokenizer):
        return file.read_text(encoding="utf-8"), f"TRL's {file.name}"
    return mark_generation(tokenizer) or "", "a copy with {% generation %} marks"


def find_equivalent(tokenizer: PreTrainedTokenizerBase) -> Path | None:
    """The training template of TRL's that renders the same text as the tokenizer's own template, if there is one.

    TRL itself recognises templates by exact equality of their source (trl/chat_template_utils.py 1.16.0).
    """
    wanted = _render(tokenizer, str(tokenizer.chat_template))
    if not any(wanted):
        return None
    for file in sorted((Path(trl.__file__).parent / "chat_templates").glob("*_training.jinja")):
        if _render(tokenizer, file.read_text(encoding="utf-8")) == wanted:
            return file
    return None


def find_strange_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Special tokens that the template spells in a conversation, and that the vocabulary lacks."""
    text = _render(tokenizer, str(tokenizer.chat_template))[0] or ""
    return [token for token in dict.fromkeys(SPELT.findall(text)) if token not in tokenizer.get_vocab()]


def mark_generation(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The tokenizer's template with the assistant's content and end of turn inside `{% generation %}`.

    Tried for each `{{ ... content ... }}` of the template: for assistant turns, what stands before the content in it
    stays outside, the content and what follows goes inside. Only a template that renders the same text as before, and
    marks what it should, is returned.
    """
    template = str(tokenizer.chat_template)
    for output in OUTPUT.finditer(template):
        expression = output["expression"]
        variable = re.search(r"(\w+)(?:\.|\[['\"])content\b", expression)
        if not variable:
            continue
        parts = re.split(r"\s*\+\s*(?=(?:[^'\"]|'[^']*'|\"[^\"]*\")*$)", expression)
        first = next(number for number, part in enumerate(parts) if "content" in part)
        before = f"{{{{ {' + '.join(parts[:first])} }}}}" if first else ""
        inside = f"{{% generation %}}{{{{ {' + '.join(parts[first:])} }}}}{{% endgeneration %}}"
        role = f"{variable[1]}['role']"
        marked = f"{{% if {role} == 'assistant' %}}{before}{inside}{{% else %}}{output[0]}{{% endif %}}"
        patched = template[: output.start()] + marked + template[output.end() :]
        if _marks_answers(tokenizer, template, patched):
            return patched
    return None


def _render(tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[str | None, ...]:
    """What a template makes of a conversation without and with a system prompt; None where it refuses it."""
    texts: list[str | None] = []
    for turns in (PROBE, [{"role": "system", "content": "Kurz."}, *PROBE]):
        try:
            texts.append(str(apply_template(tokenizer, turns, chat_template=template, tokenize=False)))
        except Exception:  # a template is a program, and this one may be made for other turns
            texts.append(None)
    return tuple(texts)


def _marks_answers(tokenizer: PreTrainedTokenizerBase, template: str, patched: str) -> bool:
    """Whether a patched template renders the same text, and marks each answer with a token that ends the turn."""
    rendered = _render(tokenizer, patched)
    if not rendered[0] or rendered != _render(tokenizer, template):
        return False
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    found: Any = apply_template(tokenizer, PROBE, chat_template=patched, **options)
    spans: list[list[int]] = []
    last = 0
    for token, marked in zip(found["input_ids"], found["assistant_masks"], strict=True):
        if marked:
            spans = spans if last else [*spans, []]
            spans[-1].append(token)
        last = marked
    stops = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    answers = [turn["content"] for turn in PROBE if turn["role"] == "assistant"]
    return len(spans) == len(answers) and all(
        str(tokenizer.decode(span)).startswith(answer) and stops.intersection(span)
        for span, answer in zip(spans, answers, strict=True)
    )
