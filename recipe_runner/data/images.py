"""Images of rows: where they stand in the turns. Plain Python.

In turns, an image is one character, `MARK`, so that everything that reads text reads these turns as well; a row's
`images` hold them in the order of the marks, each as `{path, bytes}`. `as_parts` writes turns as chat templates of
vision models take them: `{type: image}` and `{type: text, text}`.
"""

import glob
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recipe_runner.data.turns import MARK, RowError, Turns, describe_value, says_something
from recipe_runner.recipe.local import is_file_source
from recipe_runner.recipe.sections import DatasetSection

Picture = dict[str, Any]  # an image of a row, not yet opened: its path, or the bytes of its file
WRITTEN = "<image>"  # how people write where an image stands


def as_parts(turns: Turns) -> Turns:
    """Turns with their content in parts, an image for each mark."""
    return [turn | {"content": _split(turn["content"])} if isinstance(turn["content"], str) else turn for turn in turns]


def _split(text: str) -> list[dict[str, str]]:
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(text.split(MARK)):
        parts += [{"type": "image"}] * (number > 0)
        parts += [{"type": "text", "text": piece}] if piece or MARK not in text else []
    return parts


def place_images(row: dict[str, Any], cell: Any, dataset: DatasetSection, where: str) -> None:
    """Gives a normalised row its `images`, and its turns a mark for each.

    Args:
        row: In TRL's layout. Is changed.
        cell: Of the column of images; None where there is none.
        dataset: Says where images stand: at their marks, or before the first question.
        where: The row's place, for messages.

    Raises:
        RowError: There are more or fewer images than marks, or one stands where none can.
    """
    prompt = [turn for key in ("messages", "prompt") for turn in row.get(key, ())]
    answers = [turn for key in ("completion", "chosen", "rejected") for turn in row.get(key, ())]
    inline: list[Any] = []
    for place, turn in enumerate([*prompt, *answers]):
        own = [read_picture(value, where) for value in turn.pop("images", [])]
        if turn["role"] == "user" and place < len(prompt):
            if WRITTEN in turn["content"] and dataset.images == "first":
                fix = "set dataset.images: marked"
                raise RowError(f"{where}: the text has the mark {WRITTEN}, but images are put first; {fix}")
            turn["content"] = turn["content"].replace(WRITTEN, MARK)
            inline += own
        elif own or MARK in turn["content"] or WRITTEN in turn["content"]:
            raise RowError(f"{where}: an image in a turn of {turn['role']}: only the user's turns can show one")
    pictures = _read_cell(cell, where)
    if inline and pictures:
        raise RowError(f"{where}: images in its turns, and in the column of images; leave one of them out")
    pictures = pictures or inline
    if pictures and (row.get("tools") or row.get("muted")):
        what = "declares tools" if row.get("tools") else "has turns of weight 0"
        raise RowError(f"{where}: it has images and {what}, which TRL 1.16 can't train on together; remove one of them")
    marks = sum(turn["content"].count(MARK) for turn in prompt)
    if dataset.images == "first" and pictures and not marks:
        first = next((turn for turn in prompt if turn["role"] == "user"), None)
        if first is None:
            raise RowError(f"{where}: images, and no turn of the user's to show them in")
        first["content"] = MARK * len(pictures) + first["content"]
    elif marks != len(pictures):
        fix = f"write {WRITTEN} into the turns for each image, and name as many images"
        fix += "; or set dataset.images: first, which puts all images before the first question" * (not marks)
        raise RowError(f"{where}: {len(pictures)} image(s), and {marks} mark(s) where one stands; {fix}")
    row["images"] = pictures


def _read_cell(cell: Any, where: str) -> list[Picture]:
    """The images of a row's cell, as paths or bytes: one, or a list of them.

    Raises:
        RowError: It holds something else.
    """
    if not says_something(cell):
        return []
    return [read_picture(value, where) for value in (cell if isinstance(cell, list) else [cell])]


def read_picture(value: Any, where: str) -> Picture:
    """An image as people write it: a path, the bytes of a file, or datasets' `{path, bytes}`.

    Raises:
        RowError: It is something else.
    """
    if isinstance(value, bytes):
        return {"path": None, "bytes": value}
    if isinstance(value, Mapping) and value.keys() <= {"path", "bytes"} and (value.get("path") or value.get("bytes")):
        return {"path": value.get("path"), "bytes": value.get("bytes")}
    if isinstance(value, str) and value:
        if value.startswith("data:"):
            raise RowError(f"{where}: an image written as data:, which is not read; write it to a file, and name that")
        if "://" in value:
            raise RowError(
                f"{where}: {value} is an address, from which nothing is read; download it, and name the file"
            )
        return {"path": value, "bytes": None}
    raise RowError(f"{where}: expected the path or the bytes of an image, found {describe_value(value)}")


def locate(pictures: Sequence[Picture], source: str, folder: str | None) -> list[Picture]:
    """Images whose paths begin in a folder, by default that of their source's file; with bytes, they need no path."""
    if folder is None and is_file_source(source):
        parts = Path(source).parts
        fixed = parts[: next((n for n, part in enumerate(parts) if glob.has_magic(part)), len(parts))]
        folder = str(Path(*fixed) if len(fixed) < len(parts) or source.endswith("/") else Path(source).parent)
        folder = str(Path(source)) if Path(source).is_dir() else folder
    return [
        picture if picture["bytes"] else {"path": str(Path(folder or ".") / picture["path"]), "bytes": None}
        for picture in pictures
    ]
