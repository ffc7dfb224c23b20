"""A resolved recipe: its sections, typed, and where each of its values was written."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from recipe_runner.problems.errors import UserError
from recipe_runner.problems.problem import KeyPath, Mark, Problem, sort_problems
from recipe_runner.recipe import schema
from recipe_runner.recipe.sections import (
    DatasetSection,
    ModelSection,
    RewardSection,
    RunSection,
    UpstreamSection,
    read_dataset,
)
from recipe_runner.stages import STAGES, Stage


@dataclass(frozen=True)
class Link:
    """What a stage of a pipeline takes from earlier ones, by their places.

    Attributes:
        before: Whose adapter or model it starts from; None for the base.
        reward: Whose reward model judges its answers; None where its recipe names one itself, or has none.
    """

    before: int | None = None
    reward: int | None = None

    @property
    def places(self) -> tuple[int, ...]:
        """All that it needs to be done."""
        return tuple(place for place in (self.before, self.reward) if place is not None)


@dataclass(frozen=True)
class Recipe:
    """A recipe that passed the schema, with defaults filled in and paths made absolute.

    Attributes:
        file: The recipe's file.
        text: The file's text, as given.
        values: The resolved values, section by section: what `resolved.yaml` holds.
        marks: Where each key was written; keys that come from a default are absent.
        warnings: What validation warned about, as lines.
        stages: The recipes of a pipeline, in order; empty for any other stage. A pipeline has no section but `run`.
        links: What each of them takes from those before it.
    """

    file: Path
    text: str
    values: Mapping[str, Any]
    marks: Mapping[KeyPath, Mark]
    warnings: tuple[str, ...] = ()
    stages: "tuple[Recipe, ...]" = ()
    links: tuple[Link, ...] = ()

    @property
    def name(self) -> str:
        """The name of the recipe."""
        return str(self.values["name"])

    @property
    def description(self) -> str:
        """A line for people; empty when the recipe has none."""
        return str(self.values.get("description", ""))

    @property
    def home(self) -> Path:
        """The folder of this recipe's run folders."""
        return Path(self.values["run"]["output_dir"]) / self.name

    @cached_property
    def stage(self) -> Stage:
        """The record of the training stage."""
        stage = STAGES[self.values["stage"]]
        return stage.seeing if self.values.get("dataset", {}).get("images") else stage

    @cached_property
    def model(self) -> ModelSection:
        """The section `model`."""
        return ModelSection(**self.values["model"])

    @cached_property
    def dataset(self) -> DatasetSection:
        """The section `dataset`."""
        return read_dataset(self.values["dataset"])

    @cached_property
    def rewards(self) -> list[RewardSection]:
        """The section `rewards`; empty for a stage that has none."""
        return [RewardSection(**reward) for reward in self.values.get("rewards") or ()]

    @cached_property
    def run(self) -> RunSection:
        """The section `run`."""
        return RunSection(**self.values["run"])

    @cached_property
    def training(self) -> UpstreamSection:
        """The section `training`: fields of the stage's configuration class."""
        return self._read_upstream("training")

    @cached_property
    def peft(self) -> UpstreamSection:
        """The section `peft`: `method`, and fields of its configuration class; false for full fine-tuning."""
        return self._read_upstream("peft")

    @property
    def unfreeze(self) -> list[str]:
        """Patterns of the base's parameters that are trained; empty for all of them, or for none beside an adapter."""
        return list(self.values.get("unfreeze") or [])

    @cached_property
    def quantization(self) -> UpstreamSection:
        """The section `quantization`: fields of BitsAndBytesConfig; false when the base is not quantized."""
        return self._read_upstream("quantization")

    @property
    def tags(self) -> list[str]:
        """The recipe's own tags."""
        return list((self.values.get("metadata") or {}).get("tags", []))

    @property
    def local_paths(self) -> list[str]:
        """Files and folders of this machine that it reads, the longest first: a folder never hides what is in it."""
        named: list[str | None] = [source.source for source in self.dataset.sources]
        named += [self.model.name_or_path, self.model.adapter, self.model.teacher, self.training["chat_template_path"]]
        named += [reward.model or (reward.function or "").rpartition(":")[0] for reward in self.rewards]
        return sorted({name for name in named if name and Path(name).is_absolute()}, key=len, reverse=True)

    def _read_upstream(self, section: str) -> UpstreamSection:
        said = self.values.get(section) or {}
        return UpstreamSection(said, schema.defaults_of(section, schema.kinds_of(self.values).get(section, "")))

    def place(self, problem: Problem) -> Problem:
        """A problem at a key of this recipe, with the key's place in the file.

        A key that was not written has the place of the nearest section around it that was. In a suggestion, RECIPE
        stands for the file.
        """
        if problem.mark or not problem.path:
            return problem
        written = problem.path
        while written and written not in self.marks:
            written = written[:-1]
        suggestion = problem.suggestion.replace("RECIPE", str(self.file))
        return replace(problem, mark=self.marks.get(written, Mark(str(self.file))), suggestion=suggestion)

    @contextlib.contextmanager
    def placing_errors(self) -> Iterator[None]:
        """Gives errors at keys of this recipe their places: functions that raise them know the key only."""
        try:
            yield
        except UserError as error:
            raise UserError(sort_problems([self.place(problem) for problem in error.problems])) from error
