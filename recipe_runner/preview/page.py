"""One self-contained page: the accounting, the lengths as a picture, rows with the loss mask in colour. No network."""

from collections.abc import Iterator
from html import escape
from pathlib import Path

from recipe_runner import __version__
from recipe_runner.data.accounting import Accounting
from recipe_runner.files import hide_home
from recipe_runner.preview.rows import Facts, Row
from recipe_runner.problems.words import make_visible
from recipe_runner.recipe.recipe import Recipe

STYLE = """
:root { color-scheme: light dark; --learned: #b7ebc6; --ink: #1b1f24; --quiet: #6a737d; --line: #d0d7de;
  --bar: #2f81f7; --bad: #cf222e; --good: #1a7f37; --warn: #8a5c00; }
@media (prefers-color-scheme: dark) {
  :root { --learned: #1d572f; --ink: #e6edf3; --quiet: #9aa4af; --line: #373e47; --bad: #ff7b72; --good: #56d364;
    --warn: #e3b341; } body { background: #0d1117; }
}
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.4rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; } p { margin: .3rem 0; }
table { border-collapse: collapse; width: 100%; } th, td { text-align: left; padding: .3rem .5rem .3rem 0;
  border-top: 1px solid var(--line); vertical-align: top; overflow-wrap: anywhere; }
th { font-weight: normal; color: var(--quiet); width: 8.5rem; }
figure { margin: .8rem 0 0; } svg { width: 100%; height: auto; display: block; }
.axis { display: flex; justify-content: space-between; color: var(--quiet); font-size: .85rem; }
.limit { color: var(--bad); border-left: 2px dashed; padding-left: .3rem; }
details { border-top: 1px solid var(--line); padding: .4rem 0; } summary { cursor: pointer; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: 14px/1.6 ui-monospace, monospace; margin: .5rem 0; }
mark { background: var(--learned); color: inherit; } .special { font-weight: bold; } .quiet { color: var(--quiet); }
.turn, .document, .cut { display: block; color: var(--quiet); font: 13px/1.6 system-ui, sans-serif; }
.document { border-top: 1px dashed var(--quiet); margin-top: .4rem; } .cut { border-top: 2px solid var(--bad); }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: 1rem; }
.rejected { color: var(--bad); } .chosen { color: var(--good); } .pair > div { min-width: 0; }
.error { color: var(--bad); } .warning { color: var(--warn); }
"""


def write_page(recipe: Recipe, facts: Facts, rows: list[Row]) -> str:
    """The page's HTML. Everything that comes from data or recipe is escaped."""
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(recipe.name)}: what the model will see</title><style>{STYLE}</style></head><body>",
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
        parts += _histogram(account)
    return _shorten_paths("\n".join([*parts, "</body></html>\n"]), recipe)


def _shorten_paths(text: str, recipe: Recipe) -> str:
    """The page with files named as from the recipe, or by their last name: it is made to be shown to others."""
    named: list[str | None] = [source.source for source in recipe.dataset.sources]
    named += [recipe.model.name_or_path, recipe.model.adapter, recipe.training["chat_template_path"]]
    folder = recipe.file.resolve().parent
    for path in sorted({name for name in named if name and Path(name).is_absolute()}, key=len, reverse=True):
        beside = Path(path).is_relative_to(folder)
        shown = str(Path(path).relative_to(folder)) if beside else Path(path).name
        text = text.replace(escape(path), escape(shown))
    return hide_home(text)


def _table(account: Accounting, facts: Facts | None) -> Iterator[str]:
    share = account.supervised_tokens / max(account.tokens, 1)
    lines = {
        "read": f"{account.rows_read:,} rows",
        "kept": f"{account.rows_kept:,} rows" + (f", {account.duplicates:,} duplicates" if account.duplicates else ""),
        "dropped": "; ".join(f"{count:,} {reason}" for reason, count in account.dropped.items()) or "none",
        "truncated": f"{account.rows_truncated:,} rows, {account.tokens_truncated:,} tokens lost",
        "tokens": f"{account.tokens:,}, of which {account.supervised_tokens:,} ({share:.0%}) are in the loss",
        "lengths": account.describe_lengths(),
        "batches": account.describe_batches(),
        "packed": f"into {account.packed_rows:,} rows" if account.packed_rows else "",
        "sources": account.describe_sources(),
        "not used": account.describe_unused(),
        "steps": facts.steps if facts else "",
        "template": facts.template if facts else "",
    }
    yield "<table>"
    yield from (f"<tr><th>{name}</th><td>{escape(text)}</td></tr>" for name, text in lines.items() if text)
    yield "</table>"


def _histogram(account: Accounting) -> Iterator[str]:
    """Rows by length as an SVG, with a line at `max_length`. Lengths are in tokens, before cutting."""
    counts, edges = account.histogram["counts"], account.histogram["edges"]
    width, height = 700, 160
    least, reach = edges[0], max(edges[-1] - edges[0], 1)
    most = f"{max(counts):,} row{'s' * (max(counts) != 1)}"
    yield f'<figure><figcaption class="axis">{most}</figcaption>'
    yield f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="rows by length in tokens">'
    yield f'<line x1="0" y1="1" x2="{width}" y2="1" stroke="var(--line)"/>'  # the height of the tallest bar
    for count, low, high in zip(counts, edges, edges[1:], strict=False):
        x, bar = (low - least) / reach * width, count / max(counts) * height
        yield (
            f'<rect x="{x:.1f}" y="{height - bar:.1f}" width="{max((high - low) / reach * width - 1, 1):.1f}"'
            f' height="{bar:.1f}" fill="var(--bar)"><title>{low} to {high} tokens: {count:,} rows</title></rect>'
        )
    yield f'<line x1="0" y1="{height}" x2="{width}" y2="{height}" stroke="var(--quiet)" stroke-width="2"/>'
    cut = ""
    if account.max_length and least <= account.max_length <= edges[-1]:
        x = (account.max_length - least) / reach * width
        cut = f'<span class="limit">max_length {account.max_length:,}</span>'
        dashes = 'stroke="var(--bad)" stroke-width="2" stroke-dasharray="6"'
        yield f'<line x1="{x:.1f}" y1="0" x2="{x:.1f}" y2="{height}" {dashes}/>'
    yield f'</svg><div class="axis"><span>{least:,}</span>{cut}<span>{edges[-1]:,} tokens</span></div></figure>'


def _row(number: int, row: Row) -> str:
    first, more = row.documents[0], len(row.documents) - 1
    origin = f"{escape(first.source)} row {first.row}" + (f" and {more} more, packed" if more else "")
    summary = f"{origin}: {len(row.input_ids):,} tokens, {row.supervised:,} in the loss"
    content = f"<pre>{_tokens(row)}</pre>"
    if row.rejected:
        summary = f"{origin}: chosen {row.supervised:,}, rejected {row.rejected.supervised:,} tokens learned"
        sides = (("chosen", row), ("rejected", row.rejected))
        content = "".join(f'<div><b class="{name}">{name}</b><pre>{_tokens(side)}</pre></div>' for name, side in sides)
        content = f'<div class="pair">{content}</div>'
    return f"<details{' open' if number == 1 else ''}><summary>{summary}</summary>{content}</details>"


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
