"""Words for people: texts that a terminal can print, and the choice that a misspelt word was meant to be."""

import difflib
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

LIKE = 0.6  # what people may have meant
ALIKE = 0.85  # inputs and input, sytem and system; not height and weight
LONGEST_WORD = 100  # of the names that are compared: comparing takes time by the square of their length


def make_visible(text: str) -> str:
    """Text with everything spelt out that a terminal would obey or hide: escapes, direction marks, NUL."""
    return "".join(
        character if character == "\n" or character.isprintable() or character == "\u200d" else ascii(character)[1:-1]
        for character in text
    )


def write_facts(facts: Mapping[str, str]) -> str:
    """Facts with a name, one a line; on a terminal, long ones go on below, broken at words. Empty ones are left out."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    return "\n".join(_write_fact(name, make_visible(text), width) for name, text in facts.items() if text)


def _write_fact(name: str, text: str, width: int) -> str:
    first = f"  {name:<11}"
    if len(first) + len(text) <= width or not width:
        return first + text
    lines = textwrap.wrap(text, max(width - len(first), 30), break_long_words=False, break_on_hyphens=False)
    return first + f"\n{' ' * len(first)}".join(lines)


def align(rows: Sequence[Sequence[str]], most: int = 0) -> list[str]:
    """Rows of cells as lines, in columns two spaces apart; one, where they would be wider than `most`, if not 0."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    gap = " " if most and sum(widths) + 2 * len(widths) > most else "  "
    return [gap.join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def nearest(word: str, choices: Iterable[str]) -> list[str]:
    """The choices that a word is most like: none, one, or several that are equally near."""
    if len(word) > LONGEST_WORD:
        return []
    matcher = difflib.SequenceMatcher(None, "", word)
    scored = []
    for choice in choices:
        matcher.set_seq1(choice)
        if matcher.real_quick_ratio() >= LIKE and matcher.quick_ratio() >= LIKE:  # bounds from above, and cheap
            scored.append((matcher.ratio(), choice))
    best = max((score for score, _ in scored), default=0)
    return [choice for score, choice in scored if score > best - 0.02] if best >= LIKE else []


@lru_cache(maxsize=1000)
def misspelt(word: str, known: tuple[str, ...]) -> str:
    """The known word that another one can hardly be anything else than; empty when there is none."""
    word = word.strip().lower()[:LONGEST_WORD]
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
