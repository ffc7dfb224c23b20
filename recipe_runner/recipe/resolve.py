"""From a file to a resolved recipe: `extends`, `--set`, validation, defaults, absolute paths."""

import copy
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from recipe_runner.problems.errors import UserError, user_error
from recipe_runner.problems.problem import KeyPath, Mark, Problem, join_path, sort_problems, value_at
from recipe_runner.recipe import rules, schema, validate
from recipe_runner.recipe.chain import chain, check_handover, find_links
from recipe_runner.recipe.document import Document, parse_document, paths_below, read_document
from recipe_runner.recipe.library import SUFFIXES, find_recipe, find_shipped
from recipe_runner.recipe.local import is_file_source, looks_local
from recipe_runner.recipe.recipe import Link, Recipe
from recipe_runner.recipe.rules.adapter import locate_adapter
from recipe_runner.stages import PIPELINE

MAX_BASES = 50  # that extend each other: more is a mistake of a script
KEPT = ("removed-key", "out-of-bounds")  # said already, and left in what the rules judge


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


def examine_recipe(
    file: Path, overrides: Sequence[str] = (), begun: tuple[str, _Draft] | None = None
) -> tuple[Recipe | None, list[Problem]]:
    """Reads, resolves and validates a recipe file.

    Args:
        file: A recipe.
        overrides: `a.b=c` assignments.
        begun: What `_begin` gave, where it was called already; it is used up.

    Returns:
        The recipe, or None if it has errors; and all problems, warnings included, in the order of the file.
    """
    try:
        written, draft = begun or _begin(file)
        passed = [text for text in overrides if draft.values.get("stage") == PIPELINE and not _is_own(text)]
        for override in overrides:
            if override not in passed:
                _override(draft, override)
        _drop_nulls(draft.values)
        if isinstance(draft.values.get("extends"), str):
            del draft.values["extends"]  # merged: from here on the recipe must be whole
        problems = draft.problems + validate.check_values(draft.values, draft.place)
        values = _repaired(draft.values, problems)
        values.pop("extends", None)  # meant by a typo: what it would bring is missing, and the rules can't be applied
        stages: list[Recipe] = []
        links: list[Link] = []
        if not problems or not [p for p in validate.check_values(values, draft.place) if p.code not in KEPT]:
            schema.fill_defaults(values)
            recipe = Recipe(file, written, values, draft.key_marks)
            if values["stage"] == PIPELINE:
                problems += _resolve_pipeline(values, draft, file, passed, stages, links)
                found = rules.check_name(recipe)
            else:
                _make_paths_absolute(values, draft)
                found = rules.check_rules(recipe)
            problems += [replace(p, mark=draft.place(p.path, p.code != "name-differs")) for p in found]
    except UserError as error:
        return None, error.problems
    except OSError as error:  # a folder that may not be read, a name that is too long
        return None, [Problem("unreadable-file", f"{error.filename}: {error.strerror}", Mark(str(file)))]
    problems = sort_problems(problems)
    if any(problem.severity == "error" for problem in problems):
        return None, problems
    warnings = tuple(str(problem) for problem in problems)
    return Recipe(file, written, values, draft.key_marks, warnings, tuple(stages), tuple(links)), problems


def _begin(file: Path) -> tuple[str, _Draft]:
    """The text of a recipe's file, and its values merged over those of the recipes that it extends."""
    document = read_document(file)
    return document.text, _extend(document, file, [])


def _is_own(override: str) -> bool:
    """Whether an override is of the pipeline itself; any other goes to its stages."""
    return schema.is_of_pipeline(override.partition("=")[0])


def _resolve_pipeline(
    values: dict[str, Any], draft: _Draft, file: Path, overrides: Sequence[str], stages: list[Recipe], links: list[Link]
) -> list[Problem]:
    """Resolves the recipes of a pipeline into `stages` and `links`, and returns everything that is wrong with them."""
    values.pop("training")  # defaults of other stages
    values["run"].pop("seed")
    values["run"]["output_dir"] = os.path.abspath(os.path.expanduser(values["run"]["output_dir"]))
    problems: list[Problem] = []
    entries = list(values["stages"])
    for number, entry in enumerate(entries):
        path: KeyPath = ("stages", number, "recipe") if isinstance(entry, dict) else ("stages", number)
        name = entry["recipe"] if isinstance(entry, dict) else entry
        mark = draft.place(path, False)
        folder, begun = draft.folders.get(mark.file, Path.cwd()), None
        try:
            found = Path(os.path.abspath(_locate(name, folder)))
            begun = _begin(found)
            if begun[1].values.get("stage") == PIPELINE:
                own = "itself" if found.resolve() == file.resolve() else "a pipeline"
                message = f"{name} is {own}: a pipeline's stages are recipes that train"
                problems.append(Problem("nested-pipeline", message, mark, path, "name the recipes one by one"))
                continue
        except UserError as error:
            if error.problems[0].code in ("unreadable-file", "recipe-not-found"):
                hint = error.problems[0].suggestion or "name a recipe file (.yaml) or a shipped recipe"
                problems.append(Problem("stage-not-found", f"cannot read {name}", mark, path, hint))
                continue
        recipe, wrong = examine_recipe(found, overrides, begun)
        problems += wrong
        values["stages"][number] = {**entry, "recipe": str(found)} if isinstance(entry, dict) else str(found)
        if recipe:
            stages.append(recipe)
    if len(stages) == len(entries):
        found_links, wrong = find_links(entries, stages)
        links[:] = found_links
        stages[:] = chain(stages, links)
        wrong += check_handover(stages, links)
        problems += [replace(p, mark=draft.place(p.path, False)) for p in wrong]
    return problems


def _extend(document: Document, file: Path, chain: list[Path]) -> _Draft:
    """Merges a document over the recipe that it extends, and that one over its own base."""
    draft = _Draft(
        document.values, document.key_marks, document.value_marks, document.problems, {document.file: file.parent}
    )
    base_name = document.values.get("extends")
    if not isinstance(base_name, str) or not base_name:
        return draft
    mark = document.value_marks[("extends",)]
    chain = [*chain, file.resolve()]
    try:
        base_file = _locate(base_name, file.parent)
        if base_file.resolve() in chain:
            message = f"{base_name} extends this recipe in turn"
            raise user_error("extends-cycle", message, "remove one 'extends'", mark, ("extends",))
        if len(chain) > MAX_BASES:
            message = f"{base_name} is the end of a chain of more than {MAX_BASES} recipes"
            raise user_error("extends-cycle", message, "write the recipe out", mark, ("extends",))
        base = _extend(read_document(base_file), base_file, chain)
    except UserError as error:
        if error.problems[0].code in ("unreadable-file", "recipe-not-found"):
            hint = "name a recipe file (.yaml) or a shipped recipe"
            raise user_error("extends-not-found", f"cannot read {base_name}", hint, mark, ("extends",)) from error
        raise
    _merge(base, draft, ())
    base.problems += draft.problems
    base.folders |= draft.folders
    return base


def _locate(name: str, folder: Path) -> Path:
    """The recipe that another one names: a path, relative to its folder, or a shipped one."""
    is_path = Path(name).suffix in SUFFIXES or "/" in name
    return folder / os.path.expanduser(name) if is_path else find_shipped(name)


def _merge(base: _Draft, over: _Draft, path: KeyPath) -> None:
    """Merges mappings key by key; everything else is replaced, marks included."""
    target, source = value_at(base.values, path), value_at(over.values, path)
    for key, value in source.items():
        here = (*path, key)
        # A source is replaced as a whole: half of one and half of another would be neither.
        is_source = path == ("dataset",) and isinstance(value, dict) and {"source", "fraction"} & set(value)
        # Of another method, no key is meant.
        other = here == ("peft",) and isinstance(value, dict) and value.get("method", "") not in ("", _method(target))
        if isinstance(value, dict) and isinstance(target.get(key), dict) and not is_source and not other:
            base.key_marks[here], base.value_marks[here] = over.key_marks[here], over.value_marks[here]
            _merge(base, over, here)
            continue
        replaced, target[key] = target.get(key), value
        for marks, new in ((base.key_marks, over.key_marks), (base.value_marks, over.value_marks)):
            for below in paths_below(replaced):
                marks.pop((*here, *below), None)
            marks.update({(*here, *below): new[(*here, *below)] for below in ((), *paths_below(value))})
    base.value_marks[path] = over.value_marks[path]


def _method(values: Any) -> Any:
    """`peft.method` of a recipe's values."""
    peft = values.get("peft") if isinstance(values, dict) else None
    return peft.get("method") if isinstance(peft, dict) else None


def _override(draft: _Draft, override: str) -> None:
    """Applies one `a.b=c`; c is read as YAML, by the rules of the file."""
    key, equals, text = override.partition("=")
    mark = Mark(f"--set {override}")
    if not equals or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key) or key == "extends":
        raise user_error("bad-override", "expected KEY=VALUE, for example training.learning_rate=1e-4", "", mark)
    try:
        document = parse_document(f"value: {text}", mark.file)
    except UserError as error:  # the line and column of a text that nobody sees say nothing
        raise UserError([replace(problem, mark=mark) for problem in error.problems]) from error
    if set(document.values) != {"value"}:
        raise user_error("bad-override", "more than one value", "use one --set for each key", mark)
    path: KeyPath = ()
    target: Any = draft.values
    *parents, last = key.split(".")
    for part in parents:
        if isinstance(target, dict) and target.get(part) is None:
            target[part] = {}
        path = (*path, _step(target, part, mark, path))
        target = target[path[-1]]
    path = (*path, _step(target, last, mark, path, new=True))
    replaced = target.get(path[-1]) if isinstance(target, dict) else target[path[-1]]
    if path == ("peft", "method") and replaced not in (None, document.values["value"]):  # no key of the other is meant
        for other in [other for other in target if other != "method"]:
            for marks in (draft.key_marks, draft.value_marks):
                for below in ((), *paths_below(target[other])):
                    marks.pop(("peft", other, *below), None)
            del target[other]
    target[path[-1]] = document.values["value"]
    draft.problems += [replace(problem, mark=mark, path=path) for problem in document.problems]
    for marks in (draft.key_marks, draft.value_marks):
        for below in paths_below(replaced):
            marks.pop((*path, *below), None)
        for depth in range(1, len(path) + 1):
            if depth == len(path) or path[:depth] not in marks:
                marks[path[:depth]] = mark
    draft.folders[mark.file] = Path.cwd()  # a path typed on the command line is relative to where it was typed


def _step(target: Any, part: str, mark: Mark, path: KeyPath, new: bool = False) -> str | int:
    """The key or index that a part of an override's path stands for."""
    if isinstance(target, list) and part.isascii() and part.isdigit() and int(part) < len(target):
        return int(part)
    if isinstance(target, dict) and (new or part in target):
        return part
    raise user_error("bad-override", f"there is no '{join_path((*path, part))}' to set a key of", "", mark)


def _drop_nulls(values: dict[str, Any]) -> None:
    """In the header and in our own sections null means left out; upstream's fields may be null."""
    for section in (values, *(values.get(name) for name in ("model", "dataset", "run"))):
        if isinstance(section, dict):
            for key in [key for key, value in section.items() if value is None]:
                del section[key]


def _repaired(values: dict[str, Any], problems: list[Problem]) -> dict[str, Any]:
    """The keys and values that were meant, a copy where they are others: rules judge the recipe, not the typo."""
    if not problems:
        return values
    values = copy.deepcopy(values)
    for problem in problems:
        if problem.code == "out-of-bounds" and any(isinstance(step, int) for step in problem.path[:-1]):
            continue  # of a source in a list: rules ask which of them have the key, not for its number
        if problem.code in ("unknown-key", "renamed-key", "misplaced-key", "removed-key", "out-of-bounds"):
            path = problem.path
            while isinstance(path[-1], int):  # an item of a list: without it, the list would be another
                path = path[:-1]
            section = value_at(values, path[:-1])
            value = section.pop(path[-1], None) if isinstance(section, dict) else None
            if problem.meant is not None and problem.meant not in section:
                section[problem.meant] = value
        elif problem.meant is not None and problem.path:
            value_at(values, problem.path[:-1])[problem.path[-1]] = problem.meant
    return values


def _make_paths_absolute(values: dict[str, Any], draft: _Draft) -> None:
    """Paths are relative to the file they are written in; run.output_dir is relative to the current folder."""

    def folder(path: KeyPath) -> Path:
        return draft.folders.get(draft.place(path, False).file, Path.cwd())

    def absolute(path: KeyPath, name: str) -> Path:
        return Path(os.path.abspath(folder(path) / os.path.expanduser(name)))

    model, training = values["model"], values["training"]
    local = absolute(("model", "name_or_path"), model["name_or_path"])
    if looks_local(model["name_or_path"]) or local.is_dir():
        model["name_or_path"] = str(local)
    if "adapter" in model:
        local = absolute(("model", "adapter"), model["adapter"])
        if looks_local(model["adapter"]) or local.is_dir() or model["adapter"].count("/") != 1:
            model["adapter"] = str(locate_adapter(local))
    if "teacher" in model:
        local = absolute(("model", "teacher"), model["teacher"])
        model["teacher"] = str(local) if looks_local(model["teacher"]) or local.is_dir() else model["teacher"]
    for number, reward in enumerate(values.get("rewards", ())):
        if "function" in reward:
            file, _, name = reward["function"].rpartition(":")
            reward["function"] = f"{absolute(('rewards', number, 'function'), file)}:{name}"
        if "model" in reward:
            local = absolute(("rewards", number, "model"), reward["model"])
            named = looks_local(reward["model"]) or local.suffix in SUFFIXES or local.is_dir()
            reward["model"] = str(local) if named else reward["model"]
    if "image_folder" in values["dataset"]:
        place = ("dataset", "image_folder")
        values["dataset"]["image_folder"] = str(absolute(place, values["dataset"]["image_folder"]))
    for path, source in _source_values(values["dataset"]):
        local = absolute((*path, "source"), source["source"])
        if is_file_source(source["source"]) or (local.exists() and not source["source"].startswith("hf://")):
            source["source"] = str(local) + "/" * source["source"].endswith("/")
    if isinstance(training.get("chat_template_path"), str):
        local = absolute(("training", "chat_template_path"), training["chat_template_path"])
        training["chat_template_path"] = str(
            local if local.exists() else find_template(training["chat_template_path"]) or local
        )
    metadata = values.get("metadata") or {}
    if isinstance(sample := metadata.get("sample"), str):
        metadata["sample"] = str(absolute(("metadata", "sample"), sample))
    elif sample:
        metadata["sample"] = {of: str(absolute(("metadata", "sample", of), name)) for of, name in sample.items()}
    if Path(metadata.get("launch", "")).suffix in SUFFIXES:  # else the name of a shipped one
        metadata["launch"] = str(absolute(("metadata", "launch"), metadata["launch"]))
    values["run"]["output_dir"] = os.path.abspath(os.path.expanduser(values["run"]["output_dir"]))


def find_template(name: str) -> Path | None:
    """The file of `trl/NAME.jinja`, one of the chat templates that TRL stores; None for another name."""
    spec = importlib.util.find_spec("trl") if re.fullmatch(r"trl/[\w.-]+", name) else None  # which does not import it
    file = Path(spec.origin).parent / "chat_templates" / name[4:] if spec and spec.origin else None
    return file if file and file.is_file() else None


def _source_values(dataset: dict[str, Any]) -> Iterator[tuple[KeyPath, dict[str, Any]]]:
    """Every data source, with its key path."""
    for key in ("train", "eval"):
        entry = dataset.get(key, {})
        if isinstance(entry, list):
            yield from ((("dataset", key, number), source) for number, source in enumerate(entry))
        elif "source" in entry:
            yield ("dataset", key), entry
