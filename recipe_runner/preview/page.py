"""One self-contained page: the accounting, the lengths as a picture, rows with the loss mask in colour. No network."""

from collections.abc import Iterator
from dataclasses import asdict
from html import escape
from pathlib import Path

from recipe_runner import __version__
from recipe_runner.data.accounting import Accounting
from recipe_runner.data.pictures import as_address
from recipe_runner.files import hide_home
from recipe_runner.pages import frame
from recipe_runner.pages.charts import draw_histogram
from recipe_runner.preview.rows import Facts, Row, Shown, describe_handed
from recipe_runner.problems.words import make_visible
from recipe_runner.recipe.recipe import Recipe

SIDE = 320  # pixels of an image's longer side on the page


def write_page(recipe: Recipe, facts: Facts, rows: list[Row]) -> str:
    """The page's HTML. Everything that comes from data or recipe is escaped."""
    parts = [
        f"<h1>{escape(recipe.name)}</h1>",
        f"<p>{escape(recipe.description)}</p>",
        f'<p class="quiet">{escape(recipe.model.name_or_path)}; recipe-run {__version__}</p>',
    ]
    parts += [
        f'<p class="{problem.severity}"><b>{problem.severity}</b> [{problem.code}] '
        f"{escape(problem.message)}; {escape(problem.suggestion)}</p>"
        for problem in facts.problems
    ]
    parts.append(
        f"<h2>{len(rows)} row{'s' * (len(rows) != 1)} as the model sees {'them' if len(rows) != 1 else 'it'}</h2>"
        "<p>Tokens in the loss are <mark>marked</mark>; <span class='special'>special tokens</span> are bold;"
        " &crarr; is a line break.</p>"
    )
    parts += [_row(number, row) for number, row in enumerate(rows, 1)]
    for split, account in facts.accounts.items():
        parts += [f"<h2>{split} data</h2>", *_table(account, facts if split == "train" else None)]
        counts, edges = account.histogram["counts"], account.histogram["edges"]
        parts.append(draw_histogram(counts, edges, account.max_length))
    return _shorten_paths(frame.write_page(f"{recipe.name}: what the model will see", parts), recipe)


def _shorten_paths(text: str, recipe: Recipe) -> str:
    """The page with files named as from the recipe, or by their last name: it is made to be shown to others."""
    folder = recipe.file.resolve().parent
    for path in recipe.local_paths:
        beside = Path(path).is_relative_to(folder)
        shown = str(Path(path).relative_to(folder)) if beside else Path(path).name
        text = text.replace(escape(path), escape(shown))
    return hide_home(text)


def _table(account: Accounting, facts: Facts | None) -> Iterator[str]:
    lines = frame.count_rows(asdict(account)) | {
        "lengths": account.describe_lengths(),
        "batches": account.describe_batches(),
        "sources": account.describe_sources(),
        "noted": account.describe_noted(),
        "not used": account.describe_unused(),
        "read as": account.describe_guessed(),
        "steps": facts.steps if facts else "",
        "template": facts.template if facts else "",
    }
    yield frame.write_facts(lines)


def _row(number: int, row: Row) -> str:
    first, more = row.documents[0], len(row.documents) - 1
    origin = f"{escape(first.source)} row {first.row}" + (f" and {more} more, packed" if more else "")
    summary = f"{origin}: {len(row.input_ids):,} tokens, {row.supervised:,} in the loss"
    summary += "" if row.label is None else f", judged {'good' if row.label else 'bad'}"
    content = f"<pre>{_tokens(row)}</pre>"
    if row.rejected:
        summary = f"{origin}: chosen {row.supervised:,}, rejected {row.rejected.supervised:,} tokens learned"
        sides = (("chosen", row), ("rejected", row.rejected))
        content = "".join(f'<div><b class="{name}">{name}</b><pre>{_tokens(side)}</pre></div>' for name, side in sides)
        content = f'<div class="pair">{content}</div>'
    content += "".join(_image(number, image) for number, image in enumerate(row.images, 1))
    content += "".join(f"<p>rewards are given {escape(make_visible(line))}</p>" for line in describe_handed(row))
    return f"<details{' open' if number == 1 else ''}><summary>{summary}</summary>{content}</details>"


def _image(number: int, image: Shown) -> str:
    told = f"image {number}: {escape(make_visible(str(image)))}"
    return f'<figure><img src="{as_address(image.picture, SIDE)}" alt="{told}"><figcaption>{told}</figcaption></figure>'


def _tokens(row: Row) -> str:
    heads = {document.start: document for document in row.documents} if len(row.documents) > 1 else {}
    turns = {start: role for document in row.documents for role, start in document.turns}
    parts, learned = [], False
    for piece in row.pieces:
        breaks = piece.start in heads or piece.start in turns
        if learned and (breaks or not piece.supervised):
            parts.append("</mark>")
            learned = False
        if document := heads.get(piece.start):
            parts.append(f'<span class="document">{escape(document.source)} row {document.row}</span>')
        if piece.start in turns:
            parts.append(f'<span class="turn">{escape(turns[piece.start])}</span>')
        if piece.supervised and not learned:
            parts.append("<mark>")
            learned = True
        text = escape(make_visible(piece.text)).replace("\n", "&crarr;\n")
        parts.append(f'<span class="special">{text}</span>' if piece.special else text)
    parts.append("</mark>" if learned else "")
    if lost := sum(document.lost for document in row.documents):
        parts.append(f'<span class="cut">cut here at max_length: {lost:,} tokens are lost</span>')
    return "".join(parts)
