"""The recipes of a pipeline: what does each take from those before it, and can it start from that?"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from recipe_runner.problems.problem import KeyPath, Problem
from recipe_runner.problems.words import suggest
from recipe_runner.recipe.recipe import Link, Recipe
from recipe_runner.recipe.rules.adapter import BEGINNING, why_not_continued


def find_links(entries: Sequence[Any], stages: Sequence[Recipe]) -> tuple[list[Link], list[Problem]]:
    """What each stage takes from earlier ones, by what its entry in `stages` says; and what is wrong with that."""
    links, problems = [], []
    for number, (entry, stage) in enumerate(zip(entries, stages, strict=True)):
        said = entry if isinstance(entry, Mapping) else {}
        places: dict[str, int] = {}
        for key in ("from", "reward_from"):
            if key not in said:
                continue
            names = [other.name for other in stages[:number]]
            if names.count(said[key]) == 1:
                places[key] = names.index(said[key])
                continue
            several = said[key] in names
            message = (
                f"{stage.name} comes after {'several recipes' if several else 'no recipe'} of the name {said[key]}"
            )
            fix = "give them different names" if several else suggest(said[key], names)
            fix = fix or f"earlier recipes: {', '.join(names) or 'none'}"
            problems.append(Problem("pipeline-handover", message, None, ("stages", number, key), fix))
        answering = [place for place in range(number) if not stages[place].stage.scores]
        link = Link(places.get("from", max(answering, default=None)), places.get("reward_from"))
        problems += _check_reward(number, stage, link, stages)
        links.append(link)
    return links, problems


def _check_reward(number: int, stage: Recipe, link: Link, stages: Sequence[Recipe]) -> Iterator[Problem]:
    """A stage takes the reward model of one that trains such, in the place of the one that its recipe names."""
    path: KeyPath = ("stages", number, "reward_from")
    if link.reward is None:
        return
    judge = stages[link.reward]
    models = [reward for reward in stage.rewards if reward.model]
    if not judge.stage.scores:
        message = f"{judge.name} is of stage {judge.stage.name}, and trains no reward model"
        yield Problem("pipeline-handover", message, None, path, "name a recipe that trains one")
    elif len(models) != 1:
        message = f"{stage.name} has {len(models) or 'no'} rewards with a model, and one takes the place of one"
        yield Problem("pipeline-handover", message, None, path, "write one {model: ...} into its rewards")


def check_handover(stages: Sequence[Recipe], links: Sequence[Link]) -> Iterator[Problem]:
    """Each stage must be able to start from the one whose result it takes."""
    for number, (after, link) in enumerate(zip(stages, links, strict=True)):
        if link.before is not None:
            path: KeyPath = ("stages", number)
            for message, fix in _handover(stages[link.before], after):
                yield Problem("pipeline-handover", message, None, path, fix)


def _handover(before: Recipe, after: Recipe) -> Iterator[tuple[str, str]]:
    names = f"{before.name} and {after.name}"
    if before.stage.scores and not after.stage.scores:
        message = f"{after.name} can't start from {before.name}, a reward model: it gives numbers, and writes no text"
        yield message, "say what it starts from: {recipe: ..., from: NAME}"
        return
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


def chain(stages: Sequence[Recipe], links: Sequence[Link]) -> list[Recipe]:
    """The stages, with what one leaves out of `peft` taken from the one that it starts from."""
    chained: list[Recipe] = []
    for stage, link in zip(stages, links, strict=True):
        if link.before is None:
            chained.append(stage)
            continue
        earlier = chained[link.before]
        own = stage.peft.said
        before = {key: value for key, value in earlier.peft.said.items() if key not in BEGINNING}
        values = {**stage.values, "peft": {**before, **own} if own else None}
        if own and earlier.peft and earlier.unfreeze:
            values.setdefault("unfreeze", earlier.unfreeze)
        chained.append(replace(stage, values=values))
    return chained


def with_reward(recipe: Recipe, model: str | None) -> Recipe:
    """A stage's recipe with a reward model in the place of the one that it names; None takes it out."""
    rewards = [
        {**reward, "model": model} if reward.get("model") else reward for reward in recipe.values.get("rewards") or ()
    ]
    kept = [reward for reward in rewards if reward.get("model", "") is not None]
    return replace(recipe, values={**recipe.values, "rewards": kept})
