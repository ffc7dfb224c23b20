"""Fixes what has one certain fix in a recipe's text: renamed keys and choices, unambiguous typos in them, the name.

Only the characters of a key or value are replaced, at the place where they were read; comments, order and layout stay
as they are.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path

from recipe_runner.files import write_text
from recipe_runner.problems.errors import UserError
from recipe_runner.problems.problem import KeyPath, Problem, value_at
from recipe_runner.recipe.document import Document, parse_document, read_document, write_scalar
from recipe_runner.recipe.schema import is_name

CERTAIN = 0.8  # likeness (difflib's ratio) from which a typo is taken for one
_OF_KEYS, _OF_VALUES = ("unknown-key", "renamed-key"), ("unknown-choice", "renamed-choice")


def fix_file(file: Path, problems: Sequence[Problem]) -> str:
    """Fixes a recipe file in place and returns the difference; empty when nothing could be fixed.

    Args:
        file: The recipe.
        problems: What validation found in it.

    Raises:
        UserError: The file can't be read whole. It is left as it is.
        OSError: The file can't be written. It is left as it is.
    """
    document = read_document(file)
    text = apply_fixes(document, problems, file.stem)
    if text == document.text:
        return ""
    old, new = document.text.splitlines(keepends=True), text.splitlines(keepends=True)
    write_text(file, text, "utf-8-sig" if file.read_bytes().startswith(b"\xef\xbb\xbf") else "utf-8")
    return "".join(difflib.unified_diff(old, new, str(file), str(file)))


def apply_fixes(document: Document, problems: Sequence[Problem], stem: str) -> str:
    """The text of a document with every certain fix applied; the same text when the result would not be as expected."""
    lines = document.text.splitlines(keepends=True)
    renamed: set[KeyPath] = set()
    edits = []
    for problem in problems:
        if problem.mark is None or problem.mark.file != document.file or not problem.mark.line:
            continue
        if problem.code == "name-differs" and is_name(stem):
            edits.append((document.value_marks[("name",)], str(document.values["name"]), stem))
        elif problem.code in _OF_VALUES and _is_certain(problem, old := value_at(document.values, problem.path)):
            edits.append((problem.mark, str(old), problem.meant))
        elif problem.code in _OF_KEYS and _certain_key(problem, document):
            edits.append((problem.mark, str(problem.path[-1]), problem.meant))
            renamed.add((*problem.path[:-1], problem.meant))
    for mark, old, new in sorted(edits, reverse=True):  # from the end: a change moves what is behind it on the line
        line, start = lines[mark.line - 1], mark.column - 1
        quoted = line[start : start + 1] in ("'", '"')
        start += quoted
        if line.startswith(old, start):
            lines[mark.line - 1] = line[:start] + (new if quoted else write_scalar(new)) + line[start + len(old) :]
    text = "".join(lines)
    try:
        after = parse_document(text, document.file)
    except UserError:
        return document.text
    return text if not after.problems and renamed <= set(after.key_marks) else document.text


def _certain_key(problem: Problem, document: Document) -> bool:
    siblings = [path[-1] for path in document.key_marks if path[:-1] == problem.path[:-1]]
    return problem.meant not in siblings and _is_certain(problem, problem.path[-1])


def _is_certain(problem: Problem, old: object) -> bool:
    """Whether what was meant is certain: renamed upstream, or all but spelt right."""
    if problem.meant is None or problem.code.startswith("renamed"):
        return problem.meant is not None
    return difflib.SequenceMatcher(None, str(old), str(problem.meant)).ratio() >= CERTAIN
