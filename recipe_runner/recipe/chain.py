"""The recipes of a pipeline: can each start from the one before?"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

from recipe_runner.problems.problem import KeyPath, Problem
from recipe_runner.recipe.recipe import Recipe
from recipe_runner.recipe.rules.adapter import BEGINNING, why_not_continued


def check_handover(stages: Sequence[Recipe]) -> Iterator[Problem]:
    """Each stage must be able to start from the one before."""
    for number, (before, after) in enumerate(itertools.pairwise(stages), 1):
        path: KeyPath = ("stages", number)
        for message, fix in _handover(before, after):
            yield Problem("pipeline-handover", message, None, path, fix)


def _handover(before: Recipe, after: Recipe) -> Iterator[tuple[str, str]]:
    names = f"{before.name} and {after.name}"
    for key in ("name_or_path", "revision"):
        old, new = getattr(before.model, key), getattr(after.model, key)
        if old != new:
            yield f"{names} have different base models (model.{key}: {old}, {new})", "give all stages the same"
    if after.model.adapter:
        yield f"{after.name} starts from the stage before it, not from an adapter", "remove its model.adapter"
    first, second = before.peft, after.peft
    if first and not second:
        fix = "give it the same peft, or let the stages before it train all weights, too"
        yield f"{names}: an adapter comes in, but all weights are to be trained", fix
    elif first and after.unfreeze and set(after.unfreeze) != set(before.unfreeze):
        told = f"{', '.join(before.unfreeze) or 'nothing'}; {', '.join(after.unfreeze)}"
        yield f"{names} unfreeze different parts of the base ({told})", "give both the same unfreeze"
    elif first:
        method, projection = str(first["method"]), bool(first["prefix_projection"])
        message, fix = why_not_continued(after.stage, method, projection, bool(after.quantization))
        if message:
            yield f"{after.name} can't go on from {before.name}: {message}", fix
        for key, value in second.said.items():
            if "dropout" not in key and value != first[key]:
                yield f"{names} have different adapters (peft.{key}: {first[key]}, {value})", "give both the same"


def chain(stages: Sequence[Recipe]) -> list[Recipe]:
    """The stages, with what a later one leaves out of `peft` taken from those before it."""
    chained = list(stages[:1])
    for stage in stages[1:]:
        before, own = chained[-1].peft.said, stage.peft.said
        before = {key: value for key, value in before.items() if key not in BEGINNING}
        values = {**stage.values, "peft": {**before, **own} if own else None}
        if own and chained[-1].peft and chained[-1].unfreeze:
            values.setdefault("unfreeze", chained[-1].unfreeze)
        chained.append(replace(stage, values=values))
    return chained
