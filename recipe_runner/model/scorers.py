"""Scorers: how well an answer matches the wanted one, from 0 to 1."""

import importlib
import json
import re
import string
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from recipe_runner.problems.errors import user_error
from recipe_runner.problems.limits import TooSlow, time_limit
from recipe_runner.problems.words import suggest

Scorer = Callable[[str, str], float]
PATTERN_SECONDS = 5  # for one answer
NO_JSON = object()  # what a text that is no JSON stands for: null is one
ROUGE = ("rouge1", "rouge2", "rougeL")
KNOWN = ("exact_match", "normalized_match", "json", "json:KEY", "regex:PATTERN", *ROUGE)


def build_scorers(names: Sequence[str], wanted: Sequence[str]) -> dict[str, Scorer]:
    """The scorers of some names; without a name exact_match, and json where all wanted answers are JSON.

    Raises:
        UserError: There is no such scorer, or its pattern or its package is at fault.
    """
    if not names and wanted:
        names = ("exact_match", *(("json",) if all(parse_json(text) is not None for text in wanted) else ()))
    return {name: _build(name) for name in names}


def _build(name: str) -> Scorer:
    kind, _, detail = name.partition(":")
    if kind == "json" and detail:
        return partial(_equal_at, detail)
    if kind == "regex" and detail:
        try:
            return partial(_same_found, re.compile(detail))
        except re.error as error:
            raise user_error(
                "unknown-scorer", f"the pattern {detail!r} can't be read: {error}", "correct it"
            ) from error
    if name in ROUGE:
        return _build_rouge(name)
    if name in (plain := {"exact_match": _exact, "normalized_match": _normalized, "json": _equal_json}):
        return plain[name]
    fix = suggest(name, KNOWN) or f"scorers: {', '.join(KNOWN)}"
    raise user_error("unknown-scorer", f"there is no scorer '{name}'", fix)


def _exact(answer: str, wanted: str) -> float:
    return float(answer.strip() == wanted.strip())


def _normalized(answer: str, wanted: str) -> float:
    return float(normalize(answer) == normalize(wanted))


def normalize(text: str) -> str:
    """A text in small letters, without punctuation, English articles and superfluous white space.

    Source: SQuAD 1.1's evaluation script, normalize_answer (arXiv 1606.05250).
    """
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def parse_json(text: str) -> Any:
    """The value of a JSON text, also in a Markdown fence; None where it is none, and for null."""
    fenced = re.fullmatch(r"\s*```(?:json)?\s*(.*?)\s*```\s*", text, re.DOTALL)
    found: Any = read_json_text(fenced[1] if fenced else text)
    return None if found is NO_JSON else found


def read_json_text(text: str) -> Any:
    """The value of a JSON text; `NO_JSON` where it is none. Python's reader takes NaN and Infinity, which are none."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return NO_JSON


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _equal_json(answer: str, wanted: str) -> float:
    value = parse_json(answer)
    return float(value is not None and same_json(value, parse_json(wanted)))


def same_json(one: Any, other: Any) -> bool:
    """Equality of JSON values: true is not 1 there, and 1 is 1.0."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same_json(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same_json, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def _equal_at(key: str, answer: str, wanted: str) -> float:
    value, right = parse_json(answer), parse_json(wanted)
    if not isinstance(value, dict) or not isinstance(right, dict):
        return 0.0
    return float(key in value and key in right and same_json(value[key], right[key]))


def _same_found(pattern: re.Pattern[str], answer: str, wanted: str) -> float:
    """Whether a pattern (its first group, where it has one) finds the same in both, last match each; GSM8K's way."""
    try:
        with time_limit(PATTERN_SECONDS):
            found, right = (
                [match[match.re.groups and 1] for match in pattern.finditer(text)] for text in (answer, wanted)
            )
    except TooSlow as error:
        raise user_error("unknown-scorer", f"the pattern {pattern.pattern!r}: {error}", "simplify it") from error
    return float(bool(found and right) and found[-1] == right[-1])


def _build_rouge(name: str) -> Scorer:
    try:
        RougeScorer: Any = importlib.import_module("rouge_score.rouge_scorer").RougeScorer
    except ImportError as error:
        raise user_error(
            "unknown-scorer", "the package rouge-score is not installed", "pip install rouge-score"
        ) from error
    scorer = RougeScorer([name], use_stemmer=True)

    def rouge(answer: str, wanted: str) -> float:
        return float(scorer.score(wanted, answer)[name].fmeasure)

    return rouge
