"""Words for people: the choice that a misspelt word was meant to be."""

import difflib
from collections.abc import Iterable
from functools import lru_cache

ALIKE = 0.85  # inputs and input, sytem and system; not height and weight


def nearest(word: str, choices: Iterable[str]) -> list[str]:
    """The choices that a word is most like: none, one, or several that are equally near."""
    scored = [(difflib.SequenceMatcher(None, choice, word).ratio(), choice) for choice in choices]
    best = max((score for score, _ in scored), default=0)
    return [choice for score, choice in scored if score > best - 0.02] if best >= 0.6 else []


@lru_cache(maxsize=1000)
def misspelt(word: str, known: tuple[str, ...]) -> str:
    """The known word that another one can hardly be anything else than; empty when there is none."""
    word = word.strip().lower()
    swapped = next((choice for choice in known if sorted(choice) == sorted(word)), "")
    alike = [(difflib.SequenceMatcher(None, choice, word).ratio(), choice) for choice in known]
    best, choice = max(alike, default=(0.0, ""))
    return swapped or (choice if best > ALIKE else "")


def suggest(word: str, choices: Iterable[str]) -> str:
    """`did you mean 'x'?` for the nearest choice, or nothing."""
    return ask(nearest(word, choices))


def ask(near: list[str]) -> str:
    """`did you mean 'x' or 'y'?` for some choices, or nothing."""
    return f"did you mean {' or '.join(f'{choice!r}' for choice in near)}?" if near else ""
