"""Checks that the right tokens are learned: on masks, on the chat template, on what the data itself spells."""

import copy
import json
import re
from collections.abc import Iterator
from difflib import SequenceMatcher
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import trl
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import supports_tool_calling
from trl.data_utils import common_prefix_length

from recipe_runner.data.accounting import Accounting, Tally, list_reasons
from recipe_runner.data.encode import apply_template
from recipe_runner.data.formats import turns_of
from recipe_runner.data.job import Job, Replaced
from recipe_runner.data.results import TALK
from recipe_runner.data.tables import IGNORED
from recipe_runner.data.thinking import EMPTY, thought_of, without_thought
from recipe_runner.data.turns import BAD, GOOD, LISTED, MARK, SPELLING, UNDECLARED, Turns
from recipe_runner.problems.errors import UserError, first_line, user_error
from recipe_runner.problems.problem import Problem, as_warning
from recipe_runner.recipe.local import UNSURE
from recipe_runner.recipe.sections import DatasetSection

# What a chat template, which is a program, may raise for a row.
REFUSALS = (
    TemplateError,
    RuntimeError,
    ValueError,
    TypeError,
    ArithmeticError,
    LookupError,
    AttributeError,
    MemoryError,
)
CHECKED_ROWS = 100  # of a split, whose masks are checked token by token
SHOWN_TEMPLATES = 3
ANSWERS_WHOLE = ("preference", "unpaired_preference")  # formats whose answers are learned whole
# How templates spell special tokens.
SPELT = re.compile(r"<[|｜][^<>\s]{1,40}[|｜]>|<(?:start_of_turn|end_of_turn|sop|bos|eos|/?s)>|\[g?[A-Z_]{3,}\]")
TOOL = {"type": "function", "function": {"name": "count", "description": "Counts.", "parameters": {"type": "object"}}}
CALLING_TALK = TALK[:2]
TOOL_TALK = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "One."}]
SHOWN = 60  # characters of a difference between two texts
LEAST_RATIO, MOST_RATIO = 0.75, 1.34  # of the weights of good and bad answers: about alike
LOOKED_AT = 20  # of each part of rows that are looked for in the rendered text
# Parts of rows beside the turns of each role.
CALLS, TOOLS, BESIDE, THINKING = "calls of tools", "declared tools", "text beside a call", "thinking"
EMPTY_THINKING = "empty thinking"
ENDLESS = f"of the first {CHECKED_ROWS} whose learned text has no end"


def check_ends(sample: pa.ChunkedArray, tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Checks on real rows that every supervised span ends with a token that ends a turn or a text.

    A template may leave that token out of the assistant's mask, or spell one that the vocabulary lacks: the loss
    looks healthy, and the model never stops. The sample holds labels of rows that are not yet cut.

    Returns:
        The tokens that end the rows, as they are spelt.

    Raises:
        UserError: A supervised span ends with content.
    """
    stops = _ending_tokens(tokenizer)
    found: set[str] = set()
    for number, labels in enumerate(sample.to_pylist(), 1):
        ends = list(_find_ends(labels, tokenizer, stops))
        if not all(ends):
            raise _masked_end(number, str(tokenizer.decode([t for t in labels if t != IGNORED])), tokenizer)
        found.update(str(text) for text in tokenizer.convert_ids_to_tokens(ends[-1] if ends else []))
    return found


def _find_ends(labels: list[int], tokenizer: PreTrainedTokenizerBase, stops: set[int]) -> Iterator[list[int]]:
    """Of each supervised span, the tokens at its end that end a turn or a text; none where it ends with content."""
    last: int | None = None
    ends: list[int] = []
    for token in [*labels, IGNORED]:
        if token != IGNORED and (last is None or str(tokenizer.decode([token])).strip()):
            ends = [*ends, token] if token in stops else []
            last = token  # white space after the end of a turn belongs to the template
        elif token == IGNORED and last is not None:
            yield ends
            last = None


def _ending_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    return {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}


def count_endless(sample: pa.ChunkedArray, names: list[str], tokenizer: PreTrainedTokenizerBase, tally: Tally) -> None:
    """As `check_ends`, of texts as they are written: rows whose last learned text has no end are counted."""
    stops = _ending_tokens(tokenizer)
    for name, labels in zip(names, sample.to_pylist(), strict=False):
        last = [*_find_ends(labels, tokenizer, stops)][-1:]
        tally.ends.update(str(text) for text in tokenizer.convert_ids_to_tokens(last[0] if last else []))
        if last == [[]]:
            tally.noted[ENDLESS] += 1
            tally.firsts.setdefault(ENDLESS, name)


def _masked_end(number: int, learned: str, tokenizer: PreTrainedTokenizerBase) -> UserError:
    spelt = re.search(r"<[^<>\s]{1,40}>\s*$", learned)
    if spelt and (token := spelt[0].strip()) not in tokenizer.get_vocab():
        message = f"the chat template ends a turn with {token}, which is not a token of this model's vocabulary"
        fix = "use a template that is made for this tokenizer, or a model that has the token"
        return user_error("template-token-missing", message, fix, path=("training", "chat_template_path"))
    message = f"the supervised text of row {number} ends with {learned[-30:]!r}, not with an end-of-turn token"
    fix = "the model would not learn to stop: put that token inside {% generation %} in the chat template"
    return user_error("end-of-turn-masked", message, fix, path=("dataset", "train_on"))


def count_special_tokens(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows whose text spells a special token: the model would read it as one (a turn that nobody spoke)."""
    begins, spelt = _special_pattern(tokenizer)
    count = 0
    for row in rows:
        texts = [turn["content"] for turn in turns_of(row) + list(row.get("rejected", []))] or [
            v for v in row.values() if isinstance(v, str)
        ]
        count += any(any(begin in text for begin in begins) and spelt.search(text) is not None for text in texts)
    return count


def find_special_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The special tokens that a text spells."""
    return _special_pattern(tokenizer)[1].findall(text)


@lru_cache(maxsize=4)
def _special_pattern(tokenizer: PreTrainedTokenizerBase) -> tuple[frozenset[str], re.Pattern[str]]:
    """First characters of the special tokens (a quick look), and a pattern of all."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    tokens = sorted({token for token in added | set(tokenizer.all_special_tokens) if token.strip()})
    return frozenset(token[0] for token in tokens), re.compile("|".join(map(re.escape, tokens)) or r"(?!)")


def count_empty_thoughts(
    sample: pa.ChunkedArray, names: list[str], tokenizer: PreTrainedTokenizerBase, tally: Tally
) -> None:
    """Counts rows that learn an empty block of thinking, which a template writes (Qwen 3), of some labels."""
    for name, labels in zip(names, sample.to_pylist(), strict=False):
        runs = (list(run) for learned, run in groupby(labels, key=lambda label: label != IGNORED) if learned)
        if any(EMPTY.search(str(tokenizer.decode(run))) for run in runs):
            tally.empty_thoughts += 1
            tally.firsts.setdefault(EMPTY_THINKING, name)


def count_rendered_parts(rows: list[dict[str, Any]], names: list[str], job: Job, tally: Tally) -> None:
    """Counts rows by what they are made of, and looks for some of each part in what the template makes of them."""
    for row, name in zip(rows, names, strict=True):
        parts = list(_find_parts(row, job.dataset))
        kinds = list(dict.fromkeys(kind for kind, _ in parts))  # in their order: the same every time
        tally.parts.update(kinds)
        if not any(tally.looked_at[kind] < LOOKED_AT for kind in kinds):
            continue
        rendered = _render(turns_of(row), job.tokenizer, row.get("tools"))
        for kind, texts in parts if rendered is not None else []:
            tally.looked_at[kind] += 1
            if not all(any(form in str(rendered) for form in _forms(text)) for text in texts):
                tally.lost_parts[kind] += 1
                tally.firsts.setdefault(kind, name)


def _find_parts(row: dict[str, Any], dataset: DatasetSection) -> Iterator[tuple[str, list[str]]]:
    """What a row is made of: the kind of each part, and texts that must be in the rendered row."""
    turns = turns_of(row)
    for tool in row.get("tools", ()):
        yield TOOLS, [tool["function"]["name"]]
    answers = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
    muted = {answers[place] for place in row.get("muted", ())}
    learned = set(answers) - muted if "messages" in row else set(answers[-1:])
    for number, turn in enumerate(turns):
        calls = turn.get("tool_calls", ())
        if not calls:
            yield turn["role"], [text.strip() for text in without_thought(turn["content"]).split(MARK)]
        elif turn["content"].strip():
            yield BESIDE, [without_thought(turn["content"]).strip()]
        for call in calls:
            arguments = call["function"]["arguments"].values()
            yield CALLS, [call["function"]["name"], *(value for value in arguments if isinstance(value, str))]
        if number in learned and (thought := thought_of(turn).strip()):
            yield THINKING, [thought]


def _forms(text: str) -> tuple[str, ...]:
    """A text as templates write it: as it is, or by `tojson`."""
    return text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]


def compare_templates(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, own: str, tally: Tally) -> None:
    """Counts rows whose text is not what the model's own template makes of them, and keeps the first difference."""
    chats = [(turns_of(row), row.get("tools")) for row in rows]
    for turns, tools in chats:
        before, after = _render(turns, tokenizer, tools, own), _render(turns, tokenizer, tools)
        if change := find_change(before or "", after or ""):
            tally.changed_texts += 1
            tally.change = tally.change or change


def find_change(own: str, other: str) -> str:
    """Where two renderings of a row differ, for a message; empty where they do not."""
    if own == other:
        return ""
    begin = count_common(own, other)
    end = count_common(own[begin:][::-1], other[begin:][::-1])
    before, after = (repr(shorten_middle(text[begin : len(text) - end])) for text in (own, other))
    return f"{after} instead of {before}"


def count_common(one: str, other: str) -> int:
    """How many characters two texts begin with in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def shorten_middle(text: str) -> str:
    """A text of at most `SHOWN` characters, its middle left out."""
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]}...{text[-SHOWN // 2 :]}"


def _render(
    turns: Turns, tokenizer: PreTrainedTokenizerBase, tools: Any = None, template: str | None = None, asks: bool = False
) -> str | None:
    """The text that the template makes of turns; None when it refuses them, which `tokens` reports with the row."""
    try:
        options = {"chat_template": template, "add_generation_prompt": asks, "tokenize": False}
        return str(apply_template(tokenizer, turns, tools, **options))
    except REFUSALS:
        return None


def find_refused(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, told: str) -> str:
    """What of a row the chat template refuses with some words: a declared tool, or a turn; empty for neither."""

    def refuses(turns: Turns, tools: Any) -> bool:
        try:
            apply_template(tokenizer, turns, tools, tokenize=False)
        except REFUSALS as error:
            return first_line(error) == told
        return False

    tools, turns = row.get("tools") or [], turns_of(row)
    if tools and not refuses(turns, None):
        names = [(number, tool["function"]["name"]) for number, tool in enumerate(tools, 1) if refuses(turns, [tool])]
        if names:
            return "tool {} ('{}')".format(*names[0])
    conversations = [turns, [*row.get("prompt", ()), *row["rejected"]]] if "rejected" in row else [turns]
    for whole in conversations:
        for number, turn in enumerate(whole, 1):
            if refuses(whole[:number], tools):
                calls = [call["function"]["name"] for call in turn.get("tool_calls", ())]
                said = f"calls of {', '.join(calls)}" if calls else repr(shorten_middle(turn["content"]))
                return f"turn {number} ({turn['role']}, {said})"
    return ""


def find_turn(
    turns: Turns, number: int, input_ids: list[int], tokenizer: PreTrainedTokenizerBase, tools: Any = None
) -> int | None:
    """Where a turn of a conversation begins, in tokens; None when the template refuses the turns before it alone.

    After as many tokens as the turns before it have alone. A template may render these otherwise when they are alone
    (Qwen3's gives the last answer a `<think>` block): then after the last end of a turn before the turn's own text,
    which begins where another text in its place makes a difference.
    """
    changed = [*turns[:number], turns[number] | {"content": f"#{turns[number]['content']}"}, *turns[number + 1 :]]
    try:
        alone: Any = apply_template(tokenizer, turns[:number], tools, tokenize=True, return_dict=False)
        same = int(common_prefix_length(alone, input_ids))
        if same == len(alone):
            return same
        other: Any = apply_template(tokenizer, changed, tools, tokenize=True, return_dict=False)
    except REFUSALS:
        return None
    text = int(common_prefix_length(other, input_ids))
    ends = [place for place in range(same, text) if input_ids[place] == tokenizer.eos_token_id]
    begin = ends[-1] + 1 if ends else same
    while ends and begin < text and not str(tokenizer.decode(input_ids[begin : begin + 1])).strip():
        begin += 1  # the line break after the end of a turn
    return begin


def _find_lost_parts(
    dataset: DatasetSection, tokenizer: PreTrainedTokenizerBase, counted: Accounting, split: str
) -> Iterator[Problem]:
    """What of the rows the chat template leaves out."""
    path = ("dataset",)
    for part, lost in counted.lost_parts.items():
        looked, rows = counted.looked_at[part], f"{counted.parts[part]:,} {split} rows"
        if part == THINKING and lost:
            found = (
                f"the chat template leaves out the thinking of {lost} of {looked} learned answers ({rows} have some;"
            )
            found += f" the first that loses it is {counted.firsts[part]})"
            fix = "set dataset.thinking: drop, train_on: last where it is lost in earlier turns only, or"
            fix += " training.chat_template_path to a template that renders it"
            yield Problem("thinking-lost", found, None, (*path, "thinking"), fix)
        elif part == BESIDE and lost:
            found = (
                f"the chat template leaves out the text beside calls of tools, in {lost} of {looked} turns ({rows} have"
            )
            yield as_warning(
                Problem("text-beside-call-lost", f"{found} some)", None, path, _name_tool_templates(tokenizer, dataset))
            )
        elif not lost or lost < looked:
            continue
        elif part in (CALLS, TOOLS):
            found = f"the chat template renders nothing of {part}, which {rows} have"
            fix = _name_tool_templates(tokenizer, dataset)
            fix += "; or leave tools out: columns: {tools: null}" if part == TOOLS else ""
            yield Problem("tools-not-rendered", found, None, path, fix)
        elif part == "system":
            found = f"the chat template renders nothing of the role 'system', which {rows} have"
            fix = "set dataset.merge_system: true, or use another template"
            problem = Problem("system-prompt-lost", found, None, (*path, "system"), fix)
            yield problem if dataset.system else as_warning(problem)
        else:
            found = f"the chat template renders nothing of the role '{part}', which {rows} have"
            fix = "use a template that does (training.chat_template_path)"
            yield Problem(
                "role-not-rendered",
                found,
                None,
                path,
                _name_tool_templates(tokenizer, dataset) if part == "tool" else fix,
            )


def _find_other_spelling(tokenizer: PreTrainedTokenizerBase, counted: Accounting, split: str) -> Iterator[Problem]:
    """Calls that answers spell in their text as the chat template does not: a server looks for the template's way."""
    for what, rows in counted.noted.items():
        mark = what.removeprefix(SPELLING)
        if mark == what or not renders_calls(tokenizer):
            continue
        asked = str(_render(CALLING_TALK[:1], tokenizer, [TOOL], asks=True))
        whole = str(_render(CALLING_TALK, tokenizer, [TOOL]))
        written = whole[count_common(asked, whole) :]
        if mark not in written:
            found = f"{rows:,} {split} rows spell calls of tools as {mark} in their text, and the chat template writes"
            found += f" {shorten_middle(written)!r}"
            fix = "a server would not take the text for a call: write the calls as tool_calls, or take another template"
            yield Problem("calls-spelt-otherwise", found, None, ("dataset", split), fix)


def renders_calls(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template renders calls of tools and their results."""
    try:
        return bool(supports_tool_calling(tokenizer))
    except REFUSALS:
        return False


def marks_calls(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template marks a call as the assistant's, and not only the texts of answers."""
    try:
        options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        found: Any = apply_template(tokenizer, CALLING_TALK, [TOOL], **options)
        return 1 in found["assistant_masks"]
    except REFUSALS:
        return True  # what it refuses is said of the rows


def check_labels(config: Any, counted: Accounting) -> Iterator[Problem]:
    """Whether good and bad answers weigh alike in KTO's loss.

    Source: KTO, arXiv 2402.01306, equation 8: together, the good ones
    weigh 1 to 4/3 of the bad ones. A little less does no harm.
    """
    good, bad = counted.noted.get(GOOD, 0), counted.noted.get(BAD, 0)
    if not good and not bad:
        return
    path = ("dataset", "train")
    if not good or not bad:
        found = f"all {good or bad:,} train rows are judged {'good' if good else 'bad'}: nothing tells answers apart"
        fix = "add rows with the other label, or learn them as they are: format instruction or chat"
        yield Problem("labels-equal", found, None, path, fix)
        return
    ratio = config.desirable_weight * good / (config.undesirable_weight * bad)
    if not LEAST_RATIO <= ratio <= MOST_RATIO:
        key, weight = ("undesirable_weight", good / bad) if ratio > 1 else ("desirable_weight", bad / good)
        found = f"{good:,} good and {bad:,} bad answers: the good ones weigh {ratio:.2g} times as much as the bad ones"
        fix = f"set training.{key}: {weight:.2g} (1 to 1.33 times is what KTO's authors take)"
        yield as_warning(Problem("unbalanced-labels", found, None, ("training", key), fix))


def _name_tool_templates(tokenizer: PreTrainedTokenizerBase, dataset: DatasetSection) -> str:
    """Which of TRL's templates render tools, and are made of tokens that the tokenizer has."""
    names = [f"trl/{file.name}" for file in find_tool_templates(tokenizer)][:SHOWN_TEMPLATES]
    if dataset.format in ANSWERS_WHOLE:  # DPO and KTO take the model's own template: TRL 1.16 has no key for another
        way = "take a model whose chat template renders tools: one that stage sft has trained with such a template"
        return way + f" (training.chat_template_path: {' or '.join(names)}), which goes on with it" * bool(names)
    if not names:
        none = "none of TRL's is made of this model's tokens"
        return f"use a template that renders tools (training.chat_template_path); {none}"
    others = f" (so do {', '.join(name.removeprefix('trl/') for name in names[1:])})" * (len(names) > 1)
    return f"set training.chat_template_path: {names[0]}, which renders them{others}"


def find_tool_templates(tokenizer: PreTrainedTokenizerBase) -> list[Path]:
    """TRL's templates that mark answers, render tools, and spell no special token that the tokenizer lacks.

    Those come first that render a conversation most like the tokenizer's own.
    """
    vocabulary, own = set(tokenizer.get_vocab()), _render(TOOL_TALK, tokenizer) or ""
    found: list[tuple[float, Path]] = []
    for file in sorted((Path(trl.__file__).parent / "chat_templates").glob("*_training.jinja")):
        tried = copy.copy(tokenizer)
        tried.chat_template = file.read_text(encoding="utf-8")
        text = _render(TOOL_TALK, tried, [TOOL])
        spelt = set(SPELT.findall(text or ""))
        if text and spelt and spelt <= vocabulary and supports_tool_calling(tried):
            other = _render(TOOL_TALK, tried) or ""
            found.append((-SequenceMatcher(None, own, other, autojunk=False).ratio(), file))
    return [file for _, file in sorted(found)]


def find_problems(
    dataset: DatasetSection,
    tokenizer: PreTrainedTokenizerBase,
    stops: set[str],
    counted: Accounting,
    split: str,
    replaced: Replaced | None = None,
) -> Iterator[Problem]:
    """What a person should know of a prepared split, as errors and warnings at the recipe's keys.

    `stops` are the tokens at which generation stops; `replaced` is the model's own template, where there is another.
    """

    def at(code: str, message: str, suggestion: str, *path: str) -> Problem:
        return Problem(code, message, None, path, suggestion)

    lost = sum(counted.dropped.values())
    if counted.rows_read and lost / counted.rows_read > dataset.max_dropped:
        reasons = list_reasons(counted.dropped)
        found = f"{lost:,} of {counted.rows_read:,} {split} rows can't be used ({reasons})"
        fix = f"fix the data, or allow it: dataset.max_dropped is {dataset.max_dropped:g}"
        yield at("too-many-dropped", found, fix, "dataset", "max_dropped")
    yield from _find_lost_parts(dataset, tokenizer, counted, split)
    if dataset.train_on == "assistant" and counted.parts.get(CALLS) and not marks_calls(tokenizer):
        found = f"the chat template does not mark {CALLS} as the assistant's ({{% generation %}}): those of"
        found += f" {counted.parts[CALLS]:,} {split} rows would not be learned"
        fix = f"set dataset.train_on: last, or {_name_tool_templates(tokenizer, dataset).removeprefix('set ')}"
        yield at("calls-not-marked", found, fix, "dataset", "train_on")
    for name, told in counted.guessed.items() if split == "train" else ():
        if UNSURE in told:
            found = f"{name} is not in UTF-8, and is read as {UNSURE}, by a guess: look whether the texts are right"
            fix = "set encoding in the source, to cp1252 or what it is (cp1251, shift_jis, gb18030, ...)"
            yield as_warning(at("guessed-encoding", found, fix, "dataset", "train"))
    for found in counted.doubts if split == "train" else ():
        fix = 'double the quotes of a text, in a cell between quotes ("so ""it"" is"), or write the rows as json'
        yield as_warning(at("csv-quotes", found, fix, "dataset", "train"))
    if undeclared := counted.noted.get(UNDECLARED):
        found = f"{undeclared:,} {split} rows call tools that they do not declare"
        fix = "declare them in the column of tools: a model that is offered others should not learn to call these"
        yield as_warning(at("undeclared-calls", found, fix, "dataset", split))
    listed = counted.noted.get(LISTED)
    if listed and "Counts." in str(_render(TOOL_TALK[:1], tokenizer, [TOOL])):
        found = f"{listed:,} {split} rows list their tools in the text of the first turn, and declare them in a column:"
        found += " the chat template writes them again"
        fix = "take the list out of the text, or leave the column out: columns: {tools: null}"
        yield as_warning(at("tools-listed-twice", found, fix, "dataset", split))
    yield from map(as_warning, _find_other_spelling(tokenizer, counted, split))
    if counted.empty_thoughts and dataset.thinking != "mask":
        found = f"the chat template writes a block of thinking with nothing in it before answers of the {split} rows"
        found += f" ({counted.empty_thoughts:,} of the first {CHECKED_ROWS}, as {counted.firsts[EMPTY_THINKING]}),"
        found += " and it is learned: the model won't think"
        fix = "if it should go on thinking where it is asked to, set dataset.thinking: mask"
        if dataset.format in ANSWERS_WHOLE:
            fix = "take rows with thinking, or a model whose chat template writes no such block"
        yield as_warning(at("empty-thinking-learned", found, fix, "dataset", "thinking"))
    if counted.changed_texts and replaced:
        found = (
            f"{replaced.name} stands in for the model's own chat template, to mark the answers, and changes the text of"
        )
        found += f" {counted.changed_texts:,} {split} rows: {counted.change}"
        if replaced.known:
            fix = "the result is saved with it; or set training.chat_template_path"
            yield as_warning(at("template-changes-text", found, fix, "dataset", "train_on"))
        else:
            fix = "set training.chat_template_path to a template with marks, or train_on: completion or all"
            yield at("no-generation-marks", found, fix, "dataset", "train_on")
    if counted.rows_with_special_tokens:
        found = f"{counted.rows_with_special_tokens:,} {split} rows spell special tokens of the tokenizer in their text"
        fix = "the model reads them as the real ones; look at them, and fix or remove the rows"
        yield as_warning(at("special-tokens-in-data", found, fix, "dataset", split))
    if endless := counted.noted.get(ENDLESS):
        found = f"{endless:,} of the first {CHECKED_ROWS} {split} rows don't end with a token that ends a text"
        found += f" ({counted.firsts[ENDLESS]}), and none is added to segments: the model would not learn to stop"
        fix = f"end the last segment that is learned with {tokenizer.eos_token}"
        yield as_warning(at("segments-without-end", found, fix, "dataset", split))
    if counted.ends and not stops.intersection(counted.ends):
        found = f"turns end with {' '.join(counted.ends)}, but generation stops at {' '.join(sorted(stops))} only"
        fix = f"set training.eos_token: '{counted.ends[0]}', or the trained model will not stop"
        if not dataset.format.endswith("preference"):
            yield at("end-of-turn-is-no-end", found, fix, "training", "eos_token")
        else:  # TRL's configurations for preferences have no such key
            yield at("end-of-turn-is-no-end", found, f"train it by stage sft first, and {fix}", "model", "name_or_path")
    if counted.rows_in_train:
        found = f"{counted.rows_in_train:,} of {counted.rows_kept:,} {split} rows are training rows, too"
        found += f" ({'; '.join(counted.leaked)}{'; ...' * (counted.rows_in_train > len(counted.leaked))})"
        fix = "remove them from one of the two: what was trained on can't be held against the model"
        yield as_warning(at("eval-rows-in-train", found, fix, "dataset", split))
    if counted.rows_near_train:
        found = (
            f"{counted.rows_near_train:,} of {counted.rows_kept:,} {split} rows say nearly the same as training rows"
        )
        found += (
            f" ({'; '.join(counted.nearly_leaked)}{'; ...' * (counted.rows_near_train > len(counted.nearly_leaked))})"
        )
        fix = "remove those that ask the same from one of the two: the model may know their answers by heart"
        yield as_warning(at("eval-rows-near-train", found, fix, "dataset", split))
    if counted.rows_with_two_bos:
        found = f"{counted.rows_with_two_bos:,} {split} rows begin with two {tokenizer.bos_token} tokens"
        problem = at("doubled-bos", found, "the tokenizer adds one: take it out of the text", "dataset", split)
        yield problem if counted.rows_with_two_bos > counted.rows_kept / 2 else as_warning(problem)
    if counted.rows_truncated > counted.rows_kept / 10:
        found = f"{counted.rows_truncated / counted.rows_kept:.0%} of the {split} rows are cut at max_length"
        fix = "raise training.max_length, or set dataset.on_overlong: they end without an end-of-turn token"
        yield as_warning(at("many-truncated", found, fix, "training", "max_length"))
