"""What came of a recipe that was executed."""

from dataclasses import dataclass, field
from pathlib import Path

from recipe_runner.problems.problem import Problem

CODE = "smoke-failed"


@dataclass
class Outcome:
    """What came of a recipe.

    Attributes:
        file: The recipe's.
        name: The recipe's.
        problems: What is wrong, with the check that found it.
        seconds: How long it took.
        steps: That were taken; of a pipeline by all stages.
        rows: Where they come from.
        stand_in: What stands in for the model.
        changed: What is not as in the recipe, a line each.
        not_run: Why it was not executed, as the recipe says (`metadata.not_run`); empty where it was.
        excused: Trainable tensors that may have no gradient -> why.
    """

    file: Path
    name: str
    problems: list[Problem] = field(default_factory=list)
    seconds: float = 0.0
    steps: int = 0
    rows: str = ""
    stand_in: str = ""
    changed: list[str] = field(default_factory=list)
    excused: dict[str, str] = field(default_factory=dict)
    not_run: str = ""

    @property
    def failed(self) -> bool:
        """Whether something is wrong."""
        return any(problem.severity == "error" for problem in self.problems)
