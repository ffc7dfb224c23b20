"""Rows that say nearly the same, by MinHash of their texts.

Texts are compared as sets of three words after each other; of two sets counts the share that both have (Jaccard). It is
estimated from 64 numbers a row, so within some 0.05, and rows of which none of 16 bands is equal are not compared at
all: of rows that share four fifths one in some thousand pairs is missed. Eight bits of each number are enough.

Source: Broder 1997, On the resemblance and containment of documents; Li and König 2010, arXiv 0910.3349 (few bits of
each number); Lee et al. 2022, arXiv 2107.06499 (near duplicates by MinHash in training data).
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rensa import RMinHash

from recipe_runner.data.formats import turns_of
from recipe_runner.data.pictures import hash_picture

SIMILAR = 0.8  # share of pieces from which rows are nearly the same
WORDS = 3  # of a piece
NUMBERS, BANDS = 64, 16
SEED = 1
AT_ONCE = 100_000  # pairs that are compared at a time: what bounds the memory
# Scripts that put no spaces between words: each letter counts as one.
UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")


def sketch(rows: Sequence[dict[str, Any]]) -> np.ndarray:
    """What is kept of the texts of rows to find similar ones: array `(rows, 64)`; zeros of one without three words.

    System prompts are left out, as rows share them. Rows with other images are never similar.
    """
    if not rows:
        return np.zeros((0, NUMBERS), dtype=np.uint8)
    return np.array([_sketch(_cut(row)) for row in rows], dtype=np.uint32).astype(np.uint8)  # the lowest bits


def _sketch(pieces: list[str]) -> list[int]:
    """One row at a time: rensa 0.5 computes many by threads, for which processes forked later wait for ever."""
    if not pieces:
        return [0] * NUMBERS
    made = RMinHash(NUMBERS, SEED)
    made.update(pieces)
    found: list[int] = made.digest()
    return found


def find_similar(sketches: np.ndarray) -> np.ndarray:
    """For each row the place of an earlier one that says nearly the same; -1 where there is none: array `(rows,)`."""
    return _find(sketches, len(sketches), 0)


def find_similar_among(sketches: np.ndarray, others: np.ndarray) -> np.ndarray:
    """For each row the place of one of `others` that says nearly the same; -1 where there is none: array `(rows,)`."""
    return _find(np.concatenate([others, sketches]), len(others), len(others))[len(others) :]


def _find(sketches: np.ndarray, among: int, since: int) -> np.ndarray:
    """As `find_similar`: of the rows from `since` on, each one of the first `among` rows.

    In each band a row is compared with the first and with the last of the rows before it that have the same.
    """
    found = np.full(len(sketches), -1)
    known = np.flatnonzero(sketches.any(axis=1))
    for band in np.split(sketches[known], BANDS, axis=1) if len(known) else ():
        keys = np.ascontiguousarray(band).view(np.uint32)[:, 0]
        order = np.argsort(keys, kind="stable")
        rows, places = known[order], np.arange(len(order))
        begins = np.concatenate([[True], np.diff(keys[order]) != 0])
        firsts = np.maximum.accumulate(np.where(begins, places, 0))
        before = np.maximum.accumulate(np.where(rows < among, places, -1))
        lasts = np.concatenate([[-1], before[:-1]])
        for earlier in (firsts, lasts):
            wanted = (rows >= since) & (found[rows] < 0) & (earlier >= firsts) & (earlier < places)
            wanted &= rows[earlier] < among
            pairs = np.stack([rows, rows[earlier]], axis=1)[wanted]
            for part in np.array_split(pairs, len(pairs) // AT_ONCE + 1):
                near = (sketches[part[:, 0]] == sketches[part[:, 1]]).mean(axis=1) >= SIMILAR
                found[part[near, 0]] = part[near, 1]
    return found


def _cut(row: dict[str, Any]) -> list[str]:
    """The pieces of a row's texts."""
    turns = [turn for turn in [*turns_of(row), *row.get("rejected", ())] if turn["role"] != "system"]
    texts = map(_say, turns) if turns else (value for value in row.values() if isinstance(value, str))
    text = ("".join(segment["text"] for segment in row["segments"]) if "segments" in row else " ".join(texts)).lower()
    if not text.isascii():
        text = UNSPACED.sub(r" \g<0> ", text)
    words = text.split()
    pieces = list(map(" ".join, zip(words, words[1:], words[2:], strict=False)))
    if not row.get("images"):
        return pieces
    shown = " ".join(str(hash_picture(picture)) for picture in row["images"])
    return [f"{shown} {piece}" for piece in pieces]


def _say(turn: Mapping[str, Any]) -> str:
    """All that a turn says."""
    calls = json.dumps(turn["tool_calls"], ensure_ascii=False) if turn.get("tool_calls") else ""
    return f"{turn.get('reasoning_content') or ''} {turn['content'] or ''} {calls}"
