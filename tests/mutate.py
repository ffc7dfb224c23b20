"""Broken copies of a user's files, by a seed: what is changed, and the answers that are allowed."""

import json
import random
import signal
import threading
from collections import Counter
from contextlib import contextmanager

ODD = [
    None,
    True,
    False,
    0,
    -1,
    1.5,
    10**9,
    "",
    " ",
    "x",
    "é😀\u2028",
    [],
    {},
    [None],
    [[]],
    {"a": 1},
    "\x00",
    "9" * 400,
]
NOISE = [
    b"\x00",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\xed\xa0\x80",
    b"{",
    b"}",
    b"[",
    b'"',
    b",",
    b"\\",
    b"\n",
    b"\r",
    b"\xe9",
    b"9" * 30,
]
SECONDS = 60  # an answer that takes longer is none


def mutate_bytes(data, chance):
    """Cuts, repeats, overwrites or inserts some bytes anywhere; returns what is left and what was done."""
    at = chance.randrange(len(data) + 1)
    until = min(len(data), at + chance.choice([1, 2, 8, 100, len(data)]))
    match chance.choice(["cut", "remove", "repeat", "insert", "overwrite", "empty"]):
        case "cut":
            return data[:at], f"cut after byte {at}"
        case "remove":
            return data[:at] + data[until:], f"bytes {at} to {until} removed"
        case "repeat":
            return data[:until] + data[at:], f"bytes {at} to {until} repeated"
        case "insert":
            noise = chance.choice(NOISE)
            return data[:at] + noise + data[at:], f"{noise!r} inserted at {at}"
        case "overwrite":
            noise = chance.choice(NOISE)
            return data[:at] + noise + data[at + len(noise) :], f"{noise!r} written at {at}"
        case _:
            return b"", "emptied"


def places_in(value, path=()):
    """The key paths of everything in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inside in items:
        yield (*path, key)
        yield from places_in(inside, (*path, key))


def mutate_json(value, chance, odd=ODD):
    """Removes, renames, repeats or replaces something in a JSON value; returns what was done. `value` is changed."""
    path = chance.choice(list(places_in(value)))
    *before, key = path
    holder = value
    for part in before:
        holder = holder[part]
    what = chance.choice(["remove", "replace", "replace", "rename" if isinstance(holder, dict) else "repeat"])
    where = ".".join(map(str, path))
    if what == "remove":
        del holder[key]
    elif what == "rename":
        new = chance.choice([key[:-1], f"{key}s", key.upper(), f" {key}", "zz"])
        holder[new] = holder.pop(key)
        return f"{where} renamed to {new!r}"
    elif what == "repeat":
        holder.insert(key, holder[key])
    else:
        holder[key] = chance.choice(odd)
        return f"{where} replaced by {json.dumps(holder[key])[:60]}"
    return f"{where}: {what}"


@contextmanager
def time_limit(what):
    """Ends an answer that does not come, where the system has a clock for it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(*arguments):
        raise AssertionError(f"no answer within {SECONDS} s: {what}")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class Answers:
    """Counts the answers to mutants, and keeps those that are not allowed."""

    def __init__(self, subject, seed):
        self.subject, self.seed, self.counts, self.wrong = subject, seed, Counter(), []
        self.chance = random.Random(f"{subject} {seed}")

    def add(self, what, result, kind=""):
        """Notes the answer to a mutant: fine, or one or more lines that say what is wrong; never a bug."""
        self.counts[kind or ("accepted" if result.status == 0 else "refused")] += 1
        told = result.err + result.out
        if result.status not in (0, 1) or "Traceback" in told or (result.status == 1 and "error[" not in told):
            self.wrong.append(f"{what}: exit {result.status}: {told[-600:]}")

    def check(self, report_figure):
        """Prints the figures; fails when an answer was not allowed."""
        told = ", ".join(f"{count} {kind}" for kind, count in self.counts.most_common())
        report_figure(f"{self.counts.total()} mutants of {self.subject} (seed {self.seed}): {told}")
        assert not self.wrong, f"{len(self.wrong)} of {self.counts.total()}:\n" + "\n\n".join(self.wrong[:10])
