"""Rows and accounting for a terminal."""

import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from itertools import zip_longest

import click

from recipe_runner.data.accounting import Accounting
from recipe_runner.data.tables import IGNORED
from recipe_runner.preview.rows import Facts, Piece, Row, describe_handed
from recipe_runner.problems import words
from recipe_runner.problems.words import make_visible
from recipe_runner.problems.writers import write_text

SHOWN, MENTIONED = 3, 12  # documents of a packed row: with their text, with a line


def write_row(row: Row, colour: bool) -> str:
    """A row, its tokens marked: supervised in green, the rest plain; without colour, [[supervised]]."""
    if row.rejected:
        return _write_pair(row, row.rejected, colour)
    heads = {document.start: _head(number, row) for number, document in enumerate(row.documents)}
    turns = {start: role for document in row.documents for role, start in document.turns}
    lines = []
    if len(row.documents) > 1:
        lines.append(f"{len(row.documents)} documents packed into {len(row.input_ids)} tokens")
    line, last = "", False
    more = row.documents[SHOWN:]
    pieces = row.pieces if not more else [piece for piece in row.pieces if piece.start < more[0].start]
    for piece in pieces:
        if piece.start in heads or piece.start in turns:
            lines.append(line + _close(last, colour))
            line, last = "", False
            if piece.start in heads:
                lines.append(click.style(heads[piece.start], bold=True) if colour else heads[piece.start])
            if piece.start in turns:
                role = f"  -- {make_visible(turns[piece.start])}"
                lines.append(click.style(role, fg="blue") if colour else role)
        marks = _close(last, colour) if last and not piece.supervised else ""
        marks += "[[" if piece.supervised and not last and not colour else ""
        line += marks + _paint(piece, colour)
        last = piece.supervised
    lines.append(line + _close(last, colour))
    if more:
        lines += [_head(number, row) for number in range(SHOWN, min(len(row.documents), MENTIONED))]
        lines.append(f"  -- the text of {len(more)} more documents is left out here: --html FILE shows it")
    if lost := sum(document.lost for document in row.documents):
        lines.append(f"  -- cut here at max_length: {lost:,} tokens are lost")
    lines += [f"  -- image {number}: {make_visible(str(image))}" for number, image in enumerate(row.images, 1)]
    lines += [f"  -- rewards are given {make_visible(line)}" for line in describe_handed(row)]
    return "\n".join(line for line in lines if line) + "\n"


def _write_pair(chosen: Row, rejected: Row, colour: bool) -> str:
    """The prompt, then both answers side by side."""
    begins = next((place for place, label in enumerate(chosen.labels) if label != IGNORED), len(chosen.labels))
    turns = tuple(turn for turn in chosen.documents[0].turns if turn[1] < begins)
    document = replace(chosen.documents[0], turns=turns, lost=0)
    pieces = tuple(piece for piece in chosen.pieces if piece.start < begins)
    prompt = write_row(replace(chosen, pieces=pieces, documents=(document,), rejected=None), colour).rstrip("\n")
    width = max(shutil.get_terminal_size().columns // 2 - 2, 20)
    columns = [
        [f"{name}: {side.supervised:,} tokens learned", *_wrap(side, width)]
        for name, side in (("chosen", chosen), ("rejected", rejected))
    ]
    lines = []
    for left, right in zip_longest(*columns, fillvalue=""):
        shown = f"{left:<{width}}"
        lines.append(
            f"{click.style(shown, fg='green')} | {click.style(right, fg='red')}" if colour else f"{shown} | {right}"
        )
    if lost := chosen.documents[0].lost:
        lines.append(f"  -- cut at max_length: {lost:,} tokens are lost")
    return "\n".join([prompt, *lines]) + "\n"


def _wrap(side: Row, width: int) -> list[str]:
    """The answer of a side in lines of at most a width."""
    text = "".join(make_visible(piece.text) for piece in side.pieces if piece.supervised)
    return [part for line in text.split("\n") for part in textwrap.wrap(line, width) or [""]]


def _head(number: int, row: Row) -> str:
    document = row.documents[number]
    span = row.labels[document.start : document.start + document.tokens]
    learned = sum(label != IGNORED for label in span)
    of = f" (document {number + 1})" if len(row.documents) > 1 else ""
    judged = "" if row.label is None else f", judged {'good' if row.label else 'bad'}"
    place = f"{make_visible(document.source)} row {document.row}{of}"
    return f"{place}: {document.tokens:,} tokens, {learned:,} supervised{judged}"


def _close(last: bool, colour: bool) -> str:
    return "]]" if last and not colour else ""


def _paint(piece: Piece, colour: bool) -> str:
    text = make_visible(piece.text).replace("\n", "\N{RETURN SYMBOL}\n")
    if not colour:
        return text
    return click.style(text, fg="green" if piece.supervised else "bright_black", bold=piece.special)


def write_facts(facts: Facts) -> str:
    """The accounting of all splits, and what it warns about; errors end the command, and are said there."""
    lines = [line for split, account in facts.accounts.items() for line in describe(split, account)]
    more = {"steps": facts.steps, "template": facts.template, "prepared": facts.stored}
    lines.append(words.write_facts(more))
    warnings = [problem for problem in facts.problems if problem.severity == "warning"]
    return "\n".join(lines) + (f"\n{write_text(warnings)}" if warnings else "")


def describe(split: str, account: Accounting) -> Iterator[str]:
    """The accounting of a split, one fact a line."""
    yield f"{split} data"
    facts = {
        "rows": str(account),
        "lengths": account.describe_lengths(),
        "batches": account.describe_batches(),
        "packed": f"{account.packed_rows:,} rows" if account.packed_rows else "",
        "sources": account.describe_sources(),
        "noted": account.describe_noted(),
        "not used": account.describe_unused(),
        "read as": account.describe_guessed(),
    }
    yield words.write_facts(facts)
    if account.histogram:
        yield from draw_histogram(account.histogram)


def draw_histogram(histogram: dict[str, list[int]], width: int = 40) -> Iterator[str]:
    """Rows by length, as bars of characters."""
    counts, edges = histogram["counts"], histogram["edges"]
    for count, low, high in zip(counts, edges, edges[1:], strict=False):
        bar = "#" * round(count / max(counts) * width) or ("." if count else "")
        yield f"  {f'{low}-{high}':>13} {bar} {count:,}"
