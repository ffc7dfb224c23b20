"""Which column has which role, and columns that would be lost."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, Value

from recipe_runner.data.turns import says_something
from recipe_runner.problems.errors import user_error
from recipe_runner.problems.problem import KeyPath
from recipe_runner.problems.words import misspelt, nearest, suggest
from recipe_runner.recipe.document import write_scalar
from recipe_runner.recipe.new import MEANINGS, OTHER_NAMES, Columns, find_columns, guess_format
from recipe_runner.recipe.schema import formats_of
from recipe_runner.recipe.sections import DatasetSection, SourceSection
from recipe_runner.stages import FORMATS, STAGES

JUDGED = ("preference", "unpaired_preference")  # formats that are taken for each other
# What a reward function is given by the trainer itself. Source: TRL 1.16, GRPOTrainer._calculate_rewards.
GIVEN = ("prompt", "prompts", "completion", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")


def choose_columns(section: SourceSection, form: str, head: Columns) -> dict[str, str]:
    """Maps each role of the format to a column that the data has.

    Args:
        section: The source.
        form: The format.
        head: Column -> its cells in the first rows.

    Raises:
        UserError: Columns are missing; the message lists those there are, and says which may be meant.
    """
    given, available = section.columns, list(head)
    taken = set(given.values())
    columns = {}
    for role in FORMATS[form].roles:
        names = (role, *OTHER_NAMES.get(role, ()))
        found = (name for name in names if name in available and name not in taken)
        column = given.get(role, next(found, role if role in FORMATS[form].required else None))
        if column or role in FORMATS[form].required:
            columns[role] = column or role
            taken.add(columns[role])
    answers = head.get(columns.get("completion", ""), ())
    if form == "unpaired_preference" and "prompt" not in columns and not any(isinstance(of, list) for of in answers):
        columns["prompt"] = "prompt"  # which only whole conversations do without
    if missing := [role for role, column in columns.items() if column not in available]:
        there = f"its columns: {', '.join(available)}"
        told = " and ".join(f"no column '{columns[role]}' for the role '{role}'" for role in missing)
        right = {role: column for role, column in columns.items() if role not in missing and role in given}
        meant = find_columns(form, head, right)[0]
        meant |= {role: near[0] for role in missing if (near := nearest(columns[role], available))}
        wanted = ", ".join(f"{role}: {write_scalar(meant.get(role, 'NAME'))}" for role in missing)
        at: KeyPath = (*section.path, "columns", missing[0])
        message, fix = f"{section.source} has {told}; {there}", f"set columns: {{{wanted}}}"
        other = guess_format(head)
        if other in JUDGED and form in JUDGED and other != form and set(FORMATS[str(other)].required) <= set(available):
            stages = [stage for stage in STAGES if other in formats_of(stage)]
            fix = f"its rows are of format: {other}, for stage {' or '.join(stages)}"
        raise user_error("missing-column", message, fix, path=at)
    for role, column in columns.items():
        if shared := next((other for other in columns if other != role and columns[other] == column), None):
            message = f"the roles '{role}' and '{shared}' have the same column '{column}'"
            place = ("columns", role if role in given else shared)
            raise user_error("wrong-column-role", message, "name another column", path=(*section.path, *place))
    return columns


def hand_on(
    section: SourceSection, wanted: Sequence[str], columns: dict[str, str], available: Sequence[str]
) -> dict[str, str]:
    """The columns that rewards are given, each by its own name.

    Raises:
        UserError: The source does not have one, or its name is taken.
    """
    for number, name in enumerate(wanted):
        place: KeyPath = ("dataset", "reward_columns", number)
        if name not in available:
            fix = suggest(name, available) or f"its columns: {', '.join(available)}"
            raise user_error("missing-column", f"{section.source} has no column '{name}'", fix, path=place)
        if name in (*columns, *GIVEN, "dropped", "noted", "tools"):
            what = f"a role of this format (columns: {{{name}: {columns[name]}}})" if name in columns else "taken"
            raise user_error("wrong-column-role", f"the name '{name}' is {what}", "rename the column", path=place)
    return {name: name for name in wanted}


def refuse_lost_columns(section: SourceSection, form: str, unused: Dataset) -> None:
    """Refuses to leave out a column of known meaning that says something.

    Raises:
        UserError: There is one that is neither used nor, in `columns` or `dataset.ignore`, said to be left out.
    """
    roles = FORMATS[form].roles
    for name in unused.column_names:
        known = name if name in MEANINGS else misspelt(name, tuple(MEANINGS))
        if not known or (name in section.columns and section.columns[name] is None):
            continue
        if known == "label" and getattr(unused.features[name], "dtype", "") != "bool":
            continue  # a class, of data for a classifier
        values = unused.data.column(name)
        texts = pa.types.is_string(values.type) or pa.types.is_large_string(values.type)
        if any(says_something(value) for value in (values.unique() if texts else values).to_pylist()):
            role = MEANINGS[known] or known
            message = f"{section.source} has a column '{name}', which format {form} does not use: it would be lost"
            fix = f"set columns: {{{role}: {name}}}, or" if name != role and role in roles else "remove it, or"
            if known in ("image", "images") and "images" in roles:
                fix = "set dataset.images: marked (or first) to train on them, or"
            path = (*section.path, "columns") if section.columns else (*section.path, "source")
            raise user_error("unused-column", message, f"{fix} list it in dataset.ignore: [{name}]", path=path)


def refuse_parts_without(
    section: SourceSection, form: str, columns: Mapping[str, str], parts: Mapping[Path, Dataset]
) -> None:
    """Refuses a source of several files, one of which lacks a column that the format must have.

    Raises:
        UserError: One does.
    """
    for file, part in parts.items():
        for role in FORMATS[form].required:
            if columns[role] not in part.column_names:
                found = f"{file} has no column '{columns[role]}' for the role '{role}', which other files of"
                fix = f"its columns: {', '.join(part.column_names)}; name it as a source of its own, with columns"
                place = (*section.path, "source")
                raise user_error("missing-column", f"{found} {section.source} have", fix, path=place)


def check_streamed_row(
    dataset: DatasetSection,
    section: SourceSection,
    columns: Mapping[str, str],
    known: frozenset[str],
    row: Mapping[str, Any],
    called: str,
) -> None:
    """Checks the columns of a row that came after those by which the source's columns were chosen.

    Args:
        dataset: The section.
        section: The source.
        columns: Role -> column, of its first rows.
        known: All columns of these.
        row: The row, by column.
        called: What the row is called.

    Raises:
        UserError: It lacks a column that is needed, or has one that says something and would be lost.
    """
    roles = FORMATS[dataset.format].roles
    for role in FORMATS[dataset.format].required:
        if columns.get(role) not in (None, *row):
            message = f"{section.source}: {called} has no column '{columns[role]}'; its columns: {', '.join(row)}"
            raise user_error("missing-column", message, "fix the file, or leave it out", path=(*section.path, "source"))
    for name in row.keys() - known:
        meant = name in MEANINGS or any(name in (role, *OTHER_NAMES.get(role, ())) for role in roles)
        given = section.columns
        left_out = name in dataset.ignore or (name in given and given[name] is None)
        if meant and not left_out and says_something(row[name]):
            message = (
                f"{section.source}: {called} has a column '{name}', which none of the first rows has: it would be lost"
            )
            fix = "bring such rows among the first 1,000, or list the column in dataset.ignore"
            raise user_error("unused-column", message, fix, path=(*section.path, "source"))


def list_turn_keys(rows: Dataset, column: str) -> list[str]:
    """Keys of the turns of a column of turns: of all rows where the column has one type, else of the first thousand."""
    turns = getattr(rows.features[column], "feature", rows.features[column])
    if isinstance(turns, dict):
        return list(turns)
    if isinstance(turns, Value):
        return []
    cells = [cell for cell in rows[:1000][column] if isinstance(cell, list)]
    return list(dict.fromkeys(key for cell in cells for turn in cell if isinstance(turn, dict) for key in turn))
