"""What a merged model needs to be served by llama.cpp and Ollama: the command that converts it, and a Modelfile.

Ollama's templates are Go's: the chat template is taken apart into what stands before and after each turn, and the parts
must render the golden rows as the chat template does, or no template is written.
"""

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from recipe_runner.data.rendering import count_common
from recipe_runner.data.turns import Turns
from recipe_runner.files import read_object, write_text
from recipe_runner.model.tokenizer import stop_ids
from recipe_runner.results.target import Target
from recipe_runner.runs.golden import read_golden

FILE = "Modelfile"
OUT_TYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


@dataclass(frozen=True)
class Parts:
    """A chat template as what stands before and after the text of each role's turns, and before the answer."""

    around: dict[str, tuple[str, str]]
    answer: str
    system: str | None

    def render(self, turns: Turns) -> str:
        """What these parts make of turns that wait for an answer."""
        begin = (
            [] if self.system is None or turns[0]["role"] == "system" else [{"role": "system", "content": self.system}]
        )
        texts = [self.around[turn["role"]] for turn in (*begin, *turns)]
        filled = [
            before + turn["content"] + after for (before, after), turn in zip(texts, (*begin, *turns), strict=True)
        ]
        return "".join(filled) + self.answer

    def as_go(self) -> str:
        """The parts as a template of Go, over Ollama's messages."""
        branches = [f'{{{{ if eq .Role "{role}" }}}}{a}{{{{ .Content }}}}{b}' for role, (a, b) in self.around.items()]
        inner = "{{ else }}".join(branches) + "{{ end }}" * len(branches)
        return f"{{{{ range .Messages }}}}{inner}{{{{ end }}}}{self.answer}"


def find_start(tokenizer: PreTrainedTokenizerBase) -> str:
    """The token that the template writes before all turns, where llama.cpp does not add it as the tokenizer does."""
    adds = tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
    return "" if adds or not _begins_text(tokenizer) else str(tokenizer.bos_token)


def take_apart(tokenizer: PreTrainedTokenizerBase) -> Parts | None:
    """A chat template's parts; None where it is more than texts around turns.

    What ends an answer and what begins the next question stand together in what it renders: each place between them is
    tried.
    """
    system, first, answer, second, last = ({"content": f"{name}TEXT"} for name in "ABCDE")
    asked, again = first | {"role": "user"}, second | {"role": "user"}
    told, closed = answer | {"role": "assistant"}, last | {"role": "assistant"}
    talks: list[Turns] = [[asked], [asked, told, again]]
    try:
        alone = _render(tokenizer, [asked]).split("BTEXT")[1]
        waiting = _render(tokenizer, [asked], waits=True).split("BTEXT")[1]
        # Phi-3's template ends with an end-of-sequence token where nobody is to answer; half a token is none.
        after_user = re.sub(r"<\|?$", "", alone[: count_common(alone, waiting)]) if alone != waiting else alone
        opening = waiting.removeprefix(after_user)
        whole = _render(tokenizer, [asked, told, again, closed])
        begin, after_first, between, _, end = re.split("[BCDE]TEXT", whole)
    except Exception:  # a template is a program: of some there are no such parts, and it may raise anything
        return None
    before_answer = after_first.removeprefix(after_user)
    places = [place for place in range(len(between) + 1) if begin.endswith(between[place:])]
    for place in sorted(places, key=lambda place: (not end.startswith(between[:place]), -place)):
        before_user = between[place:]
        around = {"user": (before_user, after_user), "assistant": (before_answer, between[:place])}
        own = begin.removesuffix(before_user)
        try:
            head, tail = re.split("[A]TEXT", _render(tokenizer, [system | {"role": "system"}, asked]))
        except Exception:  # as above: this one takes no system turn
            found = Parts(around, opening, None)
            if not own and fits(found, tokenizer, talks):
                return found
            continue
        around = {"system": (head, tail.split("BTEXT")[0].removesuffix(before_user)), **around}
        default = own.removeprefix(around["system"][0]).removesuffix(around["system"][1]) if own else None
        found = Parts(around, opening, default)
        if fits(found, tokenizer, [*talks, [system | {"role": "system"}, asked]]):
            return found
    return None


def _render(tokenizer: PreTrainedTokenizerBase, turns: Turns, waits: bool = False) -> str:
    """What the chat template makes of turns, without a token that begins every text and no turn."""
    text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=waits))
    bos = str(tokenizer.bos_token or "")
    return text.removeprefix(bos) if text.count(bos) == 1 and _begins_text(tokenizer) else text


def _begins_text(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template writes the beginning-of-sequence token once, before all turns."""
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
    text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    return text.startswith(str(tokenizer.bos_token)) and text.count(str(tokenizer.bos_token)) == 1


def fits(parts: Parts, tokenizer: PreTrainedTokenizerBase, conversations: list[Turns]) -> bool:
    """Whether the parts render conversations as the chat template does."""
    try:
        return all(parts.render(turns) == _render(tokenizer, turns, waits=True) for turns in conversations)
    except KeyError:  # a role that has no part
        return False


# Turns that some templates render in a way of their own.
UNUSUAL: dict[str, Turns] = {
    "white space around a text": [{"role": "user", "content": " x \n"}],
    "thoughts in earlier answers": [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "<think>\ny\n</think>\n\nz"},
        {"role": "user", "content": "x"},
    ],
    "an empty system prompt": [{"role": "system", "content": ""}, {"role": "user", "content": "x"}],
    "tools": [{"role": "user", "content": "x"}],
}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}


def _fits_or_refuses(parts: Parts, tokenizer: PreTrainedTokenizerBase, turns: Turns) -> bool:
    """Whether the parts render unusual turns as the chat template does, or it refuses them."""
    try:
        if turns is UNUSUAL["tools"]:
            given: Any = tokenizer.apply_chat_template(turns, tools=[TOOL], tokenize=False)
            return bool(given == tokenizer.apply_chat_template(turns, tokenize=False))
        return fits(parts, tokenizer, [turns])
    except Exception:  # a template is a program: it may refuse these in any way
        return True


def write_modelfile(folder: Path, target: Target) -> list[str]:
    """Writes an Ollama Modelfile beside a merged model.

    Returns:
        Lines for people: how to convert and to serve it.
    """
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    config: Any = GenerationConfig.from_pretrained(str(folder))
    name = target.recipe.name if target.recipe else folder.name
    lines = [
        f"# {name}, after the command that makes the GGUF file: `recipe-run merge` printed it.",
        f"FROM ./{name}.gguf",
    ]
    lines += _template_lines(tokenizer, target)
    stops = tokenizer.convert_ids_to_tokens(stop_ids(config, tokenizer))
    lines += [f"PARAMETER stop {json.dumps(token, ensure_ascii=False)}" for token in stops]
    write_text(folder / FILE, "\n".join(lines) + "\n")
    out = OUT_TYPES.get(str(read_object(folder / "config.json").get("dtype")), "auto")
    place, file = shlex.quote(str(folder)), shlex.quote(str(folder / f"{name}.gguf"))
    return [
        "llama.cpp and Ollama:",
        f"  python llama.cpp/convert_hf_to_gguf.py {place} --outfile {file} --outtype {out}",
        f"  ollama create {name} -f {shlex.quote(str(folder / FILE))}",
    ]


def _template_lines(tokenizer: PreTrainedTokenizerBase, target: Target) -> list[str]:
    """TEMPLATE and SYSTEM; a comment where the template can't be written for Ollama."""
    if target.recipe and target.recipe.dataset.is_plain_text:
        return ['TEMPLATE """{{ .Prompt }}"""']
    parts = take_apart(tokenizer) if tokenizer.chat_template else None
    conversations = [row.messages for row in read_golden(target.run) if row.messages] if target.run else []
    go = find_start(tokenizer) + parts.as_go() if parts else ""
    texts = [text for around in parts.around.values() for text in around] if parts else []
    if not parts or '"""' in go or any("{{" in text for text in texts) or not fits(parts, tokenizer, conversations):
        return ["# The chat template is more than texts around turns: Ollama takes the one in the GGUF file."]
    system = target.recipe.dataset.system if target.recipe and target.recipe.dataset.system else parts.system
    lines = []
    if differing := [name for name, turns in UNUSUAL.items() if not _fits_or_refuses(parts, tokenizer, turns)]:
        lines.append(f"# Unlike the chat template of training, this does not know: {', '.join(differing)}.")
    lines.append(f'TEMPLATE """{go}"""')
    if system and '"""' not in system:
        lines.append(f'SYSTEM """{system}"""')
    return lines
