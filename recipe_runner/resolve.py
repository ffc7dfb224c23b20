"""From a file to a resolved recipe: `extends`, `--set`, validation, defaults, absolute paths."""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from recipe_runner import rules, schema, validate
from recipe_runner.document import Document, parse_document, parse_scalar, read_document
from recipe_runner.errors import UserError, user_error
from recipe_runner.library import SUFFIXES, find_recipe
from recipe_runner.problem import KeyPath, Mark, Problem, join_path, sort_problems
from recipe_runner.recipe import Recipe

# Codes after which the rules across sections can still be applied: the shape of the recipe is right.
_SHAPELY = {"unknown-key", "renamed-key", "misplaced-key", "removed-key", "out-of-bounds"}


@dataclass
class _Draft:
    """A recipe under construction. `folders` says which folder the paths of a file are relative to."""

    values: dict[str, Any]
    key_marks: dict[KeyPath, Mark]
    value_marks: dict[KeyPath, Mark]
    problems: list[Problem]
    folders: dict[str, Path] = field(default_factory=dict)

    def place(self, path: KeyPath, of_key: bool) -> Mark:
        """The mark of a key (or its value), or of the nearest key around it."""
        marks = self.key_marks if of_key and path in self.key_marks else self.value_marks
        while path not in marks and path:
            path = path[:-1]
            marks = self.key_marks if path in self.key_marks else self.value_marks
        return marks[path]


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Reads, resolves and validates a recipe.

    Args:
        name: Path of a recipe, or name of a shipped one.
        overrides: `a.b=c` assignments from the command line.

    Raises:
        UserError: With everything that is wrong with the recipe.
    """
    recipe, problems = examine_recipe(find_recipe(name), overrides)
    if recipe is None:
        raise UserError(problems)
    return recipe


def examine_recipe(file: Path, overrides: Sequence[str] = ()) -> tuple[Recipe | None, list[Problem]]:
    """Reads, resolves and validates a recipe file.

    Returns:
        The recipe, or None if it has errors; and all problems, warnings included, in the order of the file.
    """
    try:
        document = read_document(file)
        draft = _extend(document, file, [])
        for override in overrides:
            _override(draft, override)
    except UserError as error:
        return None, error.problems
    problems = draft.problems + validate.check_values(draft.values, draft.place)
    values: dict[str, Any] = copy.deepcopy(draft.values)
    if all(problem.code in _SHAPELY for problem in problems):
        _repair(values, problems)
        schema.fill_defaults(values)
        _make_paths_absolute(values, draft)
        problems += rules.check_rules(values, draft.place, file)
    problems = sort_problems(problems)
    if any(problem.severity == "error" for problem in problems):
        return None, problems
    values.pop("extends", None)
    warnings = tuple(str(problem) for problem in problems)
    return Recipe(file, document.text, values, draft.key_marks, warnings), problems


def _extend(document: Document, file: Path, chain: list[Path]) -> _Draft:
    """Merges a document over the recipe that it extends, and that one over its own base."""
    draft = _Draft(
        document.values, document.key_marks, document.value_marks, document.problems, {document.file: file.parent}
    )
    base_name = document.values.get("extends")
    if not isinstance(base_name, str) or not base_name:
        return draft
    mark = document.value_marks[("extends",)]
    is_path = Path(base_name).suffix in SUFFIXES or "/" in base_name
    base_file = file.parent / base_name if is_path else find_recipe(base_name)
    chain = [*chain, file.resolve()]
    if base_file.resolve() in chain:
        raise user_error(
            "extends-cycle", f"{base_name} extends this recipe in turn", "remove one 'extends'", mark, "extends"
        )
    try:
        base = _extend(read_document(base_file), base_file, chain)
    except UserError as error:
        if error.problems[0].code == "unreadable-file":
            raise user_error(
                "extends-not-found",
                f"cannot read {base_file}",
                "name a recipe file or a shipped recipe",
                mark,
                "extends",
            ) from error
        raise
    _merge(base, draft, ())
    base.problems += draft.problems
    base.folders |= draft.folders
    return base


def _merge(base: _Draft, over: _Draft, path: KeyPath) -> None:
    """Merges mappings key by key; everything else is replaced, marks included."""
    target, source = _at(base.values, path), _at(over.values, path)
    for key, value in source.items():
        here = (*path, key)
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            base.key_marks[here], base.value_marks[here] = over.key_marks[here], over.value_marks[here]
            _merge(base, over, here)
            continue
        target[key] = value
        for marks, new in ((base.key_marks, over.key_marks), (base.value_marks, over.value_marks)):
            for old in [old for old in marks if old[: len(here)] == here]:
                del marks[old]
            marks.update({mark: new[mark] for mark in new if mark[: len(here)] == here})
    base.value_marks[path] = over.value_marks[path]


def _override(draft: _Draft, override: str) -> None:
    """Applies one `a.b=c`; c is read as YAML, by the rules of the file."""
    key, equals, text = override.partition("=")
    name = f"--set {override}"
    if not equals or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key):
        raise user_error("bad-override", "expected KEY=VALUE, for example training.learning_rate=1e-4", "", Mark(name))
    document = parse_document(f"value: {text}", name)
    path: KeyPath = tuple(int(part) if part.isdigit() else part for part in key.split("."))
    target: Any = draft.values
    for depth, part in enumerate(path[:-1]):
        if isinstance(target, dict) and target.get(str(part)) is None:
            target[str(part)] = {}
        target = _child(target, part, name, path[: depth + 1])
    _child(target, path[-1], name, path, missing_ok=True)
    target[path[-1] if isinstance(target, list) else str(path[-1])] = document.values["value"]
    draft.problems += [Problem(p.code, p.message, Mark(name), key, p.suggestion) for p in document.problems]
    for depth in range(1, len(path) + 1):
        if depth == len(path) or path[:depth] not in draft.key_marks:
            draft.key_marks[path[:depth]] = draft.value_marks[path[:depth]] = Mark(name)
    for old in [
        old for old in (*draft.key_marks, *draft.value_marks) if len(old) > len(path) and old[: len(path)] == path
    ]:
        draft.key_marks.pop(old, None)
        draft.value_marks.pop(old, None)
    draft.folders[name] = Path.cwd()  # a path typed on the command line is relative to where it was typed


def _child(target: Any, part: str | int, name: str, path: KeyPath, missing_ok: bool = False) -> Any:
    if isinstance(target, list) and isinstance(part, int) and part < len(target):
        return target[part]
    if isinstance(target, dict) and (missing_ok or str(part) in target):
        return target.get(str(part))
    raise user_error("bad-override", f"there is no '{join_path(path)}' to set a key of", "", Mark(name))


def _repair(values: dict[str, Any], problems: list[Problem]) -> None:
    """Takes misspelt and renamed keys by the name that was meant, so that the rules judge the recipe, not the typo."""
    for problem in problems:
        meant = re.fullmatch(r"(?:did you mean|use) '([\w-]+)'\??", problem.suggestion)
        parts: KeyPath = tuple(int(part) if part.isdigit() else part for part in problem.path.split("."))
        section = _at(values, parts[:-1])
        value = section.pop(str(parts[-1]), None) if problem.code != "out-of-bounds" else None
        if problem.code in ("unknown-key", "renamed-key") and meant and meant[1] not in section:
            section[meant[1]] = value


def _make_paths_absolute(values: dict[str, Any], draft: _Draft) -> None:
    """Paths are relative to the file they are written in; run.output_dir is relative to the current folder."""

    def folder(path: KeyPath) -> Path:
        return draft.folders.get(draft.place(path, False).file, Path.cwd())

    model = values["model"]
    local = (folder(("model", "name_or_path")) / Path(model["name_or_path"]).expanduser()).resolve()
    if re.match(r"\.{0,2}/|~", model["name_or_path"]) or local.is_dir():
        model["name_or_path"] = str(local)
    for path, source in rules.sources(values):
        if Path(source["source"]).suffix in rules.DATA_SUFFIXES:
            source["source"] = str((folder((*path, "source")) / Path(source["source"]).expanduser()).resolve())
    training = values["training"]
    if isinstance(training.get("chat_template_path"), str):
        here = folder(("training", "chat_template_path"))
        training["chat_template_path"] = str((here / training["chat_template_path"]).resolve())
    values["run"]["output_dir"] = str(Path(values["run"]["output_dir"]).expanduser().absolute())


def dump_values(values: Any) -> str:
    """Writes resolved values as YAML that reads back the same by the strict rules."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


class _Dumper(yaml.SafeDumper):
    """Writes aliases out, and quotes what YAML 1.2 would not read as a string (PyYAML thinks in YAML 1.1)."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        style = "'" if parse_scalar(text) != text else "|" if "\n" in text else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _Dumper.represent_text)


def _at(values: Any, path: KeyPath) -> Any:
    for part in path:
        values = values[part]
    return values
