"""The frame of a page: style sheet, head, tables of facts. Nothing is loaded from elsewhere."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from recipe_runner.problems.words import make_visible

STYLE = """
:root { color-scheme: light dark; --learned: #b7ebc6; --ink: #1b1f24; --quiet: #6a737d; --line: #d0d7de;
  --bar: #2f81f7;
  --c0: #0969da; --c1: #bc4c00; --c2: #1a7f37; --c3: #8250df; --c4: #cf222e; --c5: #57606a;
  --bad: #cf222e; --good: #1a7f37; --warn: #8a5c00; }
@media (prefers-color-scheme: dark) {
  :root { --learned: #1d572f; --ink: #e6edf3; --quiet: #9aa4af; --line: #373e47; --bad: #ff7b72; --good: #56d364;
    --warn: #e3b341;
    --c0: #58a6ff; --c1: #f0883e; --c2: #3fb950; --c3: #bc8cff; --c4: #ff7b72; --c5: #8b949e; }
  body { background: #0d1117; }
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
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); gap: 1rem; }
figcaption { color: var(--quiet); font-size: .9rem; } svg text { font: 12px system-ui, sans-serif; fill: var(--quiet); }
.legend { font-size: .85rem; } .legend span { margin-right: .8rem; } .wide { overflow-x: auto; }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); } .c3 { color: var(--c3); }
.c4 { color: var(--c4); } .c5 { color: var(--c5); } .legend span::before { content: "\\2014 "; font-weight: bold; }
table + table { margin-top: 1rem; }
.grid th, .grid td { width: auto; padding-right: .8rem; white-space: nowrap; }
.grid td { font-variant-numeric: tabular-nums; }
.answer { border-left: 3px solid var(--line); padding-left: .6rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.error { color: var(--bad); } .warning { color: var(--warn); }
"""


def write_page(title: str, parts: Sequence[str]) -> str:
    """A page of parts that are HTML already."""
    head = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
    ]
    return "\n".join([*head, *(part for part in parts if part), "</body></html>\n"])


def _escape(text: str) -> str:
    return escape(make_visible(text))


def write_facts(facts: Mapping[str, str]) -> str:
    """Facts with a name, as a table; empty ones are left out."""
    rows = [f"<tr><th>{_escape(name)}</th><td>{_escape(text)}</td></tr>" for name, text in facts.items() if text]
    return f"<table>{''.join(rows)}</table>" if rows else ""


def count_rows(account: Mapping[str, Any]) -> dict[str, str]:
    """What became of the rows of a split, one fact a line; `account` is an `Accounting` as JSON has it."""

    def count(name: str) -> int:
        return int(account.get(name) or 0)

    tokens, learned, packed = map(count, ("tokens", "supervised_tokens", "packed_rows"))
    twice = describe_duplicates(count("duplicates"), count("near_duplicates"))
    dropped = account.get("dropped") or {}
    return {
        "read": f"{count('rows_read'):,} rows",
        "kept": f"{count('rows_kept'):,} rows" + f", {twice}" * bool(twice),
        "dropped": "; ".join(f"{rows:,} {reason}" for reason, rows in dropped.items()) or "none",
        "truncated": f"{count('rows_truncated'):,} rows, {count('tokens_truncated'):,} tokens lost",
        "tokens": f"{tokens:,}, of which {learned:,} ({learned / max(tokens, 1):.0%}) are in the loss",
        "packed": f"into {packed:,} rows" * bool(packed),
    }


def describe_duplicates(same: int, near: int) -> str:
    """How many rows there are twice, in words; empty where there are none."""
    told = [f"{same:,} duplicates"] if same else []
    return ", ".join([*told, *([f"{near:,} near duplicates"] if near else [])])


def describe_batches(batches: Mapping[str, float], length: int | None) -> str:
    """What padding costs, in a line. `batches` are an `Accounting`'s; `length` is what packed rows are filled to."""
    texts = {
        "left": "{:.0%} padding;",
        "random": "random batches {:.0%},",
        "grouped": "grouped by length {:.0%},",
        "packed": f"packed to {length or 0:,} {{:.0%}} empty",
    }
    return " ".join(text.format(batches[name]) for name, text in texts.items() if name in batches).rstrip(",")


def write_grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with a head, whose first column names the rows; on a narrow page it moves by itself."""
    if not rows:
        return ""
    first = "".join(f"<th>{_escape(cell)}</th>" for cell in head)
    body = "".join(
        "<tr><th>" + _escape(row[0]) + "</th>" + "".join(f"<td>{_escape(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table class="grid"><tr>{first}</tr>{body}</table></div>'
