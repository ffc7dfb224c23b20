"""What a person should know of prepared data, as errors and warnings: from what was counted of its rows."""

import copy
from collections.abc import Iterator
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import trl
from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import supports_tool_calling

from recipe_runner.data.accounting import Accounting, find_too_many_dropped
from recipe_runner.data.checks import BESIDE, CALLS, CHECKED_ROWS, EMPTY_THINKING, ENDLESS, THINKING, TOOLS
from recipe_runner.data.encode import apply_template
from recipe_runner.data.job import Replaced
from recipe_runner.data.rendering import REFUSALS, SPELT, count_common, render_turns, shorten_middle
from recipe_runner.data.results import TALK
from recipe_runner.data.turns import BAD, GOOD, LISTED, SPELLING, UNDECLARED
from recipe_runner.problems.problem import Problem, as_warning
from recipe_runner.recipe.local import UNSURE
from recipe_runner.recipe.sections import DatasetSection

SHOWN_TEMPLATES = 3
ANSWERS_WHOLE = ("preference", "unpaired_preference")  # formats whose answers are learned whole
TOOL = {"type": "function", "function": {"name": "count", "description": "Counts.", "parameters": {"type": "object"}}}
CALLING_TALK = TALK[:2]
TOOL_TALK = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "One."}]
LEAST_RATIO, MOST_RATIO = 0.75, 1.34  # of the weights of good and bad answers: about alike


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
        asked = str(render_turns(CALLING_TALK[:1], tokenizer, [TOOL], asks=True))
        whole = str(render_turns(CALLING_TALK, tokenizer, [TOOL]))
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
    vocabulary, own = set(tokenizer.get_vocab()), render_turns(TOOL_TALK, tokenizer) or ""
    found: list[tuple[float, Path]] = []
    for file in sorted((Path(trl.__file__).parent / "chat_templates").glob("*_training.jinja")):
        tried = copy.copy(tokenizer)
        tried.chat_template = file.read_text(encoding="utf-8")
        text = render_turns(TOOL_TALK, tried, [TOOL])
        spelt = set(SPELT.findall(text or ""))
        if text and spelt and spelt <= vocabulary and supports_tool_calling(tried):
            other = render_turns(TOOL_TALK, tried) or ""
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
    yield from _find_losses(dataset, counted, split)
    if split == "train":
        yield from _find_doubts(counted)
    yield from _find_lost_parts(dataset, tokenizer, counted, split)
    yield from _find_tool_problems(dataset, tokenizer, counted, split)
    yield from map(as_warning, _find_other_spelling(tokenizer, counted, split))
    yield from _find_empty_thinking(dataset, counted, split)
    if replaced:
        yield from _find_changed_texts(counted, split, replaced)
    yield from _find_token_problems(tokenizer, counted, split)
    yield from _find_end_problems(dataset, tokenizer, stops, counted, split)
    yield from _find_leaks(counted, split)


def _find_losses(dataset: DatasetSection, counted: Accounting, split: str) -> Iterator[Problem]:
    """Rows that are dropped or cut."""
    if lost := find_too_many_dropped(counted.dropped, counted.rows_read, dataset.max_dropped, f"{split} rows"):
        yield Problem("too-many-dropped", lost[0], None, ("dataset", "max_dropped"), lost[1])
    if counted.rows_truncated > counted.rows_kept / 10:
        found = f"{counted.rows_truncated / counted.rows_kept:.0%} of the {split} rows are cut at max_length"
        fix = "raise training.max_length, or set dataset.on_overlong: they end without an end-of-turn token"
        yield as_warning(Problem("many-truncated", found, None, ("training", "max_length"), fix))


def _find_doubts(counted: Accounting) -> Iterator[Problem]:
    """What was guessed of how files are written, and may be wrong."""
    for name, told in counted.guessed.items():
        if UNSURE in told:
            found = f"{name} is not in UTF-8, and is read as {UNSURE}, by a guess: look whether the texts are right"
            fix = "set encoding in the source, to cp1252 or what it is (cp1251, shift_jis, gb18030, ...)"
            yield as_warning(Problem("guessed-encoding", found, None, ("dataset", "train"), fix))
    for found in counted.doubts:
        fix = 'double the quotes of a text, in a cell between quotes ("so ""it"" is"), or write the rows as json'
        yield as_warning(Problem("csv-quotes", found, None, ("dataset", "train"), fix))


def _find_tool_problems(
    dataset: DatasetSection, tokenizer: PreTrainedTokenizerBase, counted: Accounting, split: str
) -> Iterator[Problem]:
    """Calls that would not be learned, or that nobody offered; tools that are listed twice."""
    if dataset.train_on == "assistant" and counted.parts.get(CALLS) and not marks_calls(tokenizer):
        found = f"the chat template does not mark {CALLS} as the assistant's ({{% generation %}}): those of"
        found += f" {counted.parts[CALLS]:,} {split} rows would not be learned"
        fix = f"set dataset.train_on: last, or {_name_tool_templates(tokenizer, dataset).removeprefix('set ')}"
        yield Problem("calls-not-marked", found, None, ("dataset", "train_on"), fix)
    if undeclared := counted.noted.get(UNDECLARED):
        found = f"{undeclared:,} {split} rows call tools that they do not declare"
        fix = "declare them in the column of tools: a model that is offered others should not learn to call these"
        yield as_warning(Problem("undeclared-calls", found, None, ("dataset", split), fix))
    listed = counted.noted.get(LISTED)
    if listed and "Counts." in str(render_turns(TOOL_TALK[:1], tokenizer, [TOOL])):
        found = f"{listed:,} {split} rows list their tools in the text of the first turn, and declare them in a column:"
        found += " the chat template writes them again"
        fix = "take the list out of the text, or leave the column out: columns: {tools: null}"
        yield as_warning(Problem("tools-listed-twice", found, None, ("dataset", split), fix))


def _find_empty_thinking(dataset: DatasetSection, counted: Accounting, split: str) -> Iterator[Problem]:
    if counted.empty_thoughts and dataset.thinking != "mask":
        found = f"the chat template writes a block of thinking with nothing in it before answers of the {split} rows"
        found += f" ({counted.empty_thoughts:,} of the first {CHECKED_ROWS}, as {counted.firsts[EMPTY_THINKING]}),"
        found += " and it is learned: the model won't think"
        fix = "if it should go on thinking where it is asked to, set dataset.thinking: mask"
        if dataset.format in ANSWERS_WHOLE:
            fix = "take rows with thinking, or a model whose chat template writes no such block"
        yield as_warning(Problem("empty-thinking-learned", found, None, ("dataset", "thinking"), fix))


def _find_changed_texts(counted: Accounting, split: str, replaced: Replaced) -> Iterator[Problem]:
    """Rows that another template than the model's own writes otherwise."""
    if not counted.changed_texts:
        return
    found = f"{replaced.name} stands in for the model's own chat template, to mark the answers, and changes the text of"
    found += f" {counted.changed_texts:,} {split} rows: {counted.change}"
    place = ("dataset", "train_on")
    if replaced.known:
        fix = "the result is saved with it; or set training.chat_template_path"
        yield as_warning(Problem("template-changes-text", found, None, place, fix))
    else:
        fix = "set training.chat_template_path to a template with marks, or train_on: completion or all"
        yield Problem("no-generation-marks", found, None, place, fix)


def _find_token_problems(tokenizer: PreTrainedTokenizerBase, counted: Accounting, split: str) -> Iterator[Problem]:
    """Special tokens where none should be, and two where one should be."""
    place = ("dataset", split)
    if counted.rows_with_special_tokens:
        found = f"{counted.rows_with_special_tokens:,} {split} rows spell special tokens of the tokenizer in their text"
        fix = "the model reads them as the real ones; look at them, and fix or remove the rows"
        yield as_warning(Problem("special-tokens-in-data", found, None, place, fix))
    if counted.rows_with_two_bos:
        found = f"{counted.rows_with_two_bos:,} {split} rows begin with two {tokenizer.bos_token} tokens"
        problem = Problem("doubled-bos", found, None, place, "the tokenizer adds one: take it out of the text")
        yield problem if counted.rows_with_two_bos > counted.rows_kept / 2 else as_warning(problem)


def _find_end_problems(
    dataset: DatasetSection, tokenizer: PreTrainedTokenizerBase, stops: set[str], counted: Accounting, split: str
) -> Iterator[Problem]:
    """Rows after which the model would not learn to stop."""
    if endless := counted.noted.get(ENDLESS):
        found = f"{endless:,} of the first {CHECKED_ROWS} {split} rows don't end with a token that ends a text"
        found += f" ({counted.firsts[ENDLESS]}), and none is added to segments: the model would not learn to stop"
        fix = f"end the last segment that is learned with {tokenizer.eos_token}"
        yield as_warning(Problem("segments-without-end", found, None, ("dataset", split), fix))
    if counted.ends and not stops.intersection(counted.ends):
        found = f"turns end with {' '.join(counted.ends)}, but generation stops at {' '.join(sorted(stops))} only"
        fix = f"set training.eos_token: '{counted.ends[0]}', or the trained model will not stop"
        place = ("training", "eos_token")
        if dataset.format.endswith("preference"):  # TRL's configurations for preferences have no such key
            place, fix = ("model", "name_or_path"), f"train it by stage sft first, and {fix}"
        yield Problem("end-of-turn-is-no-end", found, None, place, fix)


def _find_leaks(counted: Accounting, split: str) -> Iterator[Problem]:
    """Evaluation rows that the model was trained on, or nearly."""
    for code, rows, named, what, fix in (
        (
            "eval-rows-in-train",
            counted.rows_in_train,
            counted.leaked,
            "are training rows, too",
            "remove them from one of the two: what was trained on can't be held against the model",
        ),
        (
            "eval-rows-near-train",
            counted.rows_near_train,
            counted.nearly_leaked,
            "say nearly the same as training rows",
            "remove those that ask the same from one of the two: the model may know their answers by heart",
        ),
    ):
        if rows:
            found = f"{rows:,} of {counted.rows_kept:,} {split} rows {what}"
            found += f" ({'; '.join(named)}{'; ...' * (rows > len(named))})"
            yield as_warning(Problem(code, found, None, ("dataset", split), fix))
