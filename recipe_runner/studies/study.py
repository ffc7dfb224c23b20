"""`STUDY.yaml`: what is varied, what is measured, and the variants that come of it."""

import itertools
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from recipe_runner.model.scorers import build_scorers
from recipe_runner.problems.errors import UserError, user_error
from recipe_runner.problems.problem import KeyPath, Mark, Problem, sort_problems
from recipe_runner.problems.words import suggest
from recipe_runner.recipe.document import Document, parse_document, parse_scalar, read_document
from recipe_runner.recipe.library import SUFFIXES, find_recipe
from recipe_runner.recipe.recipe import Recipe
from recipe_runner.recipe.resolve import load_recipe
from recipe_runner.recipe.schema import SECTIONS, study_defaults
from recipe_runner.recipe.validate import check_study

MOST = 1000  # variants of a study: more is a mistaken list


@dataclass(frozen=True)
class Variant:
    """One thing that is compared.

    Attributes:
        name: In the table.
        recipe: Path of the recipe.
        overrides: `KEY=VALUE` texts, as `--set` has them.
        merged_from: Name of the variant whose adapter is merged; empty for one that is trained.
        path: Where the study names it.
    """

    name: str
    recipe: str
    overrides: tuple[str, ...]
    merged_from: str
    path: KeyPath

    @property
    def slug(self) -> str:
        """Its name as a folder's."""
        return re.sub(r"[^a-z0-9.]+", "-", self.name.lower()).strip("-.") or "variant"

    def load(self, seed: int | None, folder: Path) -> Recipe:
        """Its recipe with a seed, whose runs go into a folder.

        Raises:
            UserError: The recipe has errors.
        """
        return load_recipe(self.recipe, self.arguments(seed, folder))

    def arguments(self, seed: int | None, folder: Path) -> tuple[str, ...]:
        """The overrides of a run."""
        seeded = () if seed is None else (f"run.seed={seed}",)
        return (*self.overrides, *seeded, f"run.output_dir={json.dumps(str(folder), ensure_ascii=False)}")


@dataclass(frozen=True)
class Study:
    """A study, read.

    Attributes:
        name: Of its folder.
        description: For people.
        variants: In the order of the table.
        seeds: Of the runs; one None for the recipe's own.
        baseline: Name of the variant that others are compared with.
        evaluate: How results are measured: `data`, `limit`, `scorers`, `max_new_tokens`, `batch_size`.
        latency: Whether the time of a token is measured.
        refused: Variants that can't be run, and why.
    """

    name: str
    description: str
    variants: tuple[Variant, ...]
    seeds: tuple[int | None, ...]
    baseline: str
    evaluate: Mapping[str, Any]
    latency: bool
    refused: tuple[tuple[Variant, Problem], ...]


def read_study(name: str, overrides: Sequence[str]) -> Study:
    """Reads a study, or makes one of a recipe and what is varied.

    Args:
        name: A study's file, a recipe's, or the name of a shipped recipe.
        overrides: `KEY=VALUE`; a list varies: each of its values is tried.

    Raises:
        UserError: It can't be read, or says what no study has. A variant alone that can't be run is in `refused`.
    """
    file = find_recipe(name)
    document = read_document(file)
    given = _read_overrides(overrides)
    if "stage" in document.values or "extends" in document.values or "model" in document.values:  # a recipe
        values: dict[str, Any] = {"schema_version": 1, "name": file.stem, "recipe": str(file.resolve())}
        document = Document(document.file, document.text, values, {}, {(): Mark(document.file)})
    _merge_given(document.values, given)
    problems = document.problems + check_study(document.values, _placing(document, given))
    if problems:
        raise UserError(sort_problems(problems))
    return _make(document.values, file, _placing(document, given))


def _placing(document: Document, given: Mapping[str, Any]) -> Any:
    def place(path: KeyPath, of_key: bool) -> Mark:
        if len(path) > 1 and path[0] in ("set", "vary") and path[1] in given:
            return Mark(f"--set {path[1]}")
        marks = document.key_marks if of_key and path in document.key_marks else document.value_marks
        while path not in marks and path:
            path = path[:-1]
        return marks.get(path, Mark(document.file))

    return place


def _read_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """`KEY=VALUE` texts as key -> value."""
    given: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        mark = Mark(f"--set {text}")
        if not equals or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key):
            raise user_error("bad-override", "expected KEY=VALUE, or KEY=[VALUE, VALUE] to vary it", "", mark)
        given[key] = _read_value(value, mark)
    return given


def _read_value(text: str, mark: Mark) -> Any:
    """A value of the command line: YAML, by the rules of a recipe's file."""
    document = parse_document(f"value: {text}", str(mark))
    if document.problems or set(document.values) != {"value"}:
        raise user_error("bad-override", "it is not one YAML value", "", mark)
    return document.values["value"]


def _merge_given(values: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Puts what the command line says into a study: lists vary, the rest is set."""
    for key, value in given.items():
        section = "vary" if isinstance(value, list) else "set"
        if isinstance(values.setdefault(section, {}), dict):
            values[section][key] = value
        other = values.get("set" if section == "vary" else "vary")
        if isinstance(other, dict):
            other.pop(key, None)
    for section in ("set", "vary"):
        if values.get(section) == {}:
            del values[section]


def _make(values: Mapping[str, Any], file: Path, place: Any) -> Study:
    said = values.get("variants") or [{"name": values["name"]}]
    count = sum(math.prod(map(len, _find_varied(entry, values).values())) for entry in said)
    if count > MOST:
        raise user_error("study-too-large", f"{count:,} variants; at most {MOST:,}", "vary less")
    variants: list[Variant] = []
    refused: list[tuple[Variant, Problem]] = []
    for number, entry in enumerate(said):
        for variant in _spread(entry, number, values, file):
            if variant.name in {other.name for other in variants}:
                message = f"another variant has the name '{variant.name}', too"
            elif variant.slug in {other.slug for other in variants}:
                message = f"'{variant.name}' would have the same folder as another variant, {variant.slug}"
            else:
                variants.append(variant)
                continue
            mark = place(variant.path, False)
            problem = Problem("variant-name-twice", message, mark, variant.path, "give it another name")
            refused.append((variant, problem))
    known = [variant.name for variant in variants]
    for variant in list(variants):
        if variant.merged_from and variant.merged_from not in known:
            message = f"there is no variant '{variant.merged_from}'"
            fix = suggest(variant.merged_from, known)
            path = (*variant.path, "merged_from")
            refused.append((variant, Problem("unknown-variant", message, place(path, False), path, fix)))
            variants.remove(variant)
    baseline = values.get("baseline", known[0] if known else "")
    if "baseline" in values and baseline not in known:
        mark = place(("baseline",), False)
        raise user_error("unknown-variant", f"there is no variant '{baseline}'", suggest(baseline, known), mark)
    evaluate = {**study_defaults("evaluate"), **values.get("evaluate", {})}
    try:
        build_scorers(evaluate.get("scorers") or (), ())
    except UserError as error:
        path = ("evaluate", "scorers")
        raise UserError([replace(problem, mark=place(path, False), path=path) for problem in error.problems]) from error
    if "data" in evaluate:
        evaluate["data"] = str(_beside(evaluate["data"], file))
        if not Path(evaluate["data"]).is_file():
            path = ("evaluate", "data")
            message = f"{evaluate['data']}: there is no such file"
            raise user_error("data-not-found", message, "check the name", place(path, False), path)
    return Study(
        values["name"],
        values.get("description", ""),
        tuple(variants),
        tuple(values.get("seeds", [None])),
        baseline,
        evaluate,
        values.get("latency", study_defaults()["latency"]),
        tuple(refused),
    )


def _beside(name: str, file: Path) -> Path:
    """A path that a study names, relative to its folder."""
    return Path(os.path.abspath(file.parent / os.path.expanduser(name)))


def _spread(entry: Mapping[str, Any], number: int, values: Mapping[str, Any], file: Path) -> list[Variant]:
    """The variants of one entry: one for each combination of what varies."""
    recipe = entry.get("recipe", values["recipe"])
    if Path(recipe).suffix in SUFFIXES or "/" in recipe:
        recipe = str(_beside(recipe, file))
    fixed = {**values.get("set", {}), **entry.get("set", {})}
    vary = _find_varied(entry, values)
    made = []
    for chosen in itertools.product(*vary.values()):
        options = dict(zip(vary, chosen, strict=True))
        told = [f"{key.rpartition('.')[2]}={_show(value)}" for key, value in options.items()]
        own = [] if "variants" not in values and vary else [entry["name"]]
        name = " ".join([*own, *told])
        path: KeyPath = ("variants", number) if "variants" in values else ()
        overrides = tuple(f"{key}={json.dumps(value)}" for key, value in _in_order({**fixed, **options}))
        made.append(Variant(name, recipe, overrides, entry.get("merged_from", ""), path))
    return made


def _find_varied(entry: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, list[Any]]:
    """What varies in an entry: key -> values. A merged adapter is another variant's."""
    return {} if entry.get("merged_from") else {**values.get("vary", {}), **entry.get("vary", {})}


def _in_order(options: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Whole sections before keys in them: `peft: null` does not take away `peft.method`."""
    return sorted(options.items(), key=lambda option: option[0] not in SECTIONS)


def _show(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}".replace("e-0", "e-")
    return value if isinstance(value, str) and parse_scalar(value) == value else json.dumps(value, ensure_ascii=False)
