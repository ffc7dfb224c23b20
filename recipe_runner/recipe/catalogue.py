"""The catalogue of the shelf: what each recipe is for, found by filters and by words."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from recipe_runner.files import read_object
from recipe_runner.recipe.library import shelf, shipped_recipes
from recipe_runner.recipe.models import find_facts
from recipe_runner.recipe.recipe import Recipe
from recipe_runner.recipe.resolve import load_recipe

ALIKE = 0.75  # of two words: qwem and qwen, not llama and gemma
FULL, PARTIAL = "full", "partial"  # methods without an adapter


@dataclass(frozen=True)
class Entry:
    """A recipe on the shelf.

    Attributes:
        name: Its name.
        stage: Its training stage.
        description: In a sentence.
        model: Of its first stage.
        parameters: As the model's publisher counts them; None where they are not known.
        task: What the model learns to do.
        method: full, partial, qlora, hybrid or PEFT's method.
        license: Of the model.
        data_license: Of the data.
        planned: Bytes of memory of a device, as `recipe-run plan` works them out; None where nothing is planned.
        hardware: It is meant for.
        launch: The launch configuration that it is meant for.
        not_run: Why it was never run; empty where it was.
        tags: Words to find it by.
        file: Where it is.
    """

    name: str
    stage: str
    description: str
    model: str
    parameters: int | None
    task: str
    method: str
    license: str
    data_license: str
    planned: int | None
    hardware: str
    launch: str
    not_run: str
    tags: tuple[str, ...]
    file: Path

    def as_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {**vars(self), "tags": list(self.tags), "file": str(self.file)}


def read_catalogue() -> list[Entry]:
    """All recipes on the shelf, by name.

    Raises:
        UserError: One of them has errors.
    """
    return [_describe(load_recipe(str(file)), file) for file in shipped_recipes()]


@cache
def read_planned() -> dict[str, dict[str, Any]]:
    """Recipe -> the memory that was planned for it (`scripts/make_planned.py`)."""
    return dict(read_object(shelf() / "recipes" / "planned.json"))


def _describe(recipe: Recipe, file: Path) -> Entry:
    first = (recipe.stages or (recipe,))[0]
    told = recipe.values.get("metadata") or {}
    model = first.values["model"]["name_or_path"]
    facts = find_facts(model)
    return Entry(
        recipe.name,
        str(recipe.values["stage"]),
        recipe.values.get("description", ""),
        facts.name if facts else model,
        facts.parameters if facts else None,
        told.get("task", ""),
        name_method(first),
        told.get("license", ""),
        told.get("data_license", ""),
        read_planned().get(recipe.name, {}).get("peak_bytes"),
        told.get("hardware", ""),
        told.get("launch", ""),
        told.get("not_run", ""),
        tuple(told.get("tags", ())),
        file,
    )


def name_method(recipe: Recipe) -> str:
    """How a recipe trains, in a word: as people look for it."""
    if not recipe.peft:
        return PARTIAL if recipe.unfreeze else FULL
    method = str(recipe.peft["method"])
    if recipe.unfreeze:
        return "hybrid"
    if method != "lora":
        return method
    return "qlora" if recipe.quantization else "dora" if recipe.peft["use_dora"] else "lora"


def choose(
    entries: Sequence[Entry], words: Sequence[str], most: int | None = None, **wanted: str | None
) -> list[Entry]:
    """The entries that suit, in their order.

    Args:
        entries: Of the catalogue.
        words: Each must be like a word of an entry: a part of it, or misspelt.
        most: Parameters of the model.
        wanted: `model`, `task`, `method`, `stage`: parts of what an entry says of it.
    """
    return [
        entry
        for entry in entries
        if all(value is None or value.lower() in str(getattr(entry, key)).lower() for key, value in wanted.items())
        and (most is None or (entry.parameters is not None and entry.parameters <= most))
        and all(_is_like(word.lower(), entry) for word in words)
    ]


def _is_like(word: str, entry: Entry) -> bool:
    """Whether a word stands in an entry, or one that it is nearly."""
    text = f"{entry.name} {entry.description} {entry.model} {entry.task} {entry.method} {' '.join(entry.tags)}".lower()
    if word in text:
        return True
    words = {piece.strip(".,:") for piece in re.split(r"[\s_/-]+", text)}
    return any(difflib.SequenceMatcher(None, word, other).ratio() >= ALIKE for other in words)


def write_count(parameters: int | None) -> str:
    """A number of parameters for people: 3.8B, 135M."""
    if parameters is None:
        return ""
    return f"{parameters / 1e9:.3g}B" if parameters >= 999.5e6 else f"{parameters / 1e6:.3g}M"


def write_planned(size: int | None) -> str:
    """Planned memory for people: 3.9 GiB."""
    return "" if size is None else f"{size / 2**30:.1f} GiB"
