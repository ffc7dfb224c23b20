"""A run that is over, as the checks see it, and what several of them need."""

import math
import re
from collections.abc import Iterator, Mapping, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file

from recipe_runner.recipe.recipe import Recipe
from recipe_runner.smoke.shrink import Small
from recipe_runner.smoke.watch import Seen

CLOSE_LOSS = 2e-3  # of losses, relative
CLOSE, CLOSE_HALF = 1e-3, 3e-2  # of losses and logits, relative: in float32, and where something is in half precision
SHOWN = 3  # names in a sentence


@dataclass(frozen=True)
class Done:
    """A run that is over, and what is known of it.

    Attributes:
        recipe: As it is on the shelf, resolved.
        small: As it was run.
        seen: What was seen of it.
        full: What the adapter is put on in the model at its real size: see `FullSize`.
        again: What was seen of the run that went on from a checkpoint; None where it was not resumed.
        first: Tensors of the result, before the run was resumed.
        before: The result of the stage before, which training begins with; None where it begins with the base.
    """

    recipe: Recipe
    small: Small
    seen: Seen
    full: "FullSize"
    again: Seen | None = None
    first: Mapping[str, torch.Tensor] = field(default_factory=dict)
    before: Path | None = None

    @property
    def model(self) -> Any:
        """The trained model."""
        return self.seen.model

    @property
    def close(self) -> float:
        """How near two numbers must be that should be the same."""
        halves = self.recipe.quantization or self.recipe.model.dtype in ("bfloat16", "float16")
        config = self.seen.trainer.args
        return CLOSE_HALF if halves or config.bf16 or config.fp16 else CLOSE

    @property
    def close_loss(self) -> float:
        """How near two losses must be: a mean over tokens, in which rounding evens out."""
        return min(self.close, CLOSE_LOSS)


@dataclass(frozen=True)
class FullSize:
    """What is adapted or trained in the model at its real size, without weights.

    Attributes:
        adapted: Names of modules with an adapter.
        trained: Names of parameters that are trained, of the base's.
        modules: Names of all modules.
        parameters: How many the base has.
    """

    adapted: frozenset[str]
    trained: frozenset[str]
    modules: frozenset[str]
    parameters: int


Found = Iterator[str]


def adapted_modules(model: Any) -> set[str]:
    """Names of the modules of the base that have an adapter."""
    inside = "base_model.model."
    return {name.removeprefix(inside) for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)}


def shape_of(done: Done) -> str:
    """What a row is, with or without images."""
    return done.recipe.stage.shape.removeprefix("image_")


def is_of_base(name: str) -> bool:
    """Whether a parameter is one of the base's: PEFT names its own by the method."""
    marks = "lora_|adapter|prompt_encoder|ia3_|vera_|hira_|oft_|boft_|hra_|default"
    return not re.search(rf"(?<![a-z])(?:{marks})", name)  # Gemma 3 has a mm_soft_emb_norm


def read_tensors(result: Path) -> dict[str, torch.Tensor]:
    """All tensors in a result's files."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(result.glob("*.safetensors")):
        found |= load_file(file)
    return found


def is_near(found: torch.Tensor | None, wanted: torch.Tensor, allowed: float) -> bool:
    """Whether a tensor is another one, within a share of its length."""
    if found is None or found.shape != wanted.shape:
        return False
    distance = (found.float() - wanted.float()).norm()
    return bool(distance <= allowed * max(float(wanted.float().norm()), 1e-6))


def is_same(found: Any, said: Any) -> bool:
    """Whether a value is the one that a recipe says, also where a library spells it otherwise."""
    found, said = getattr(found, "value", found), getattr(said, "value", said)
    if all(value in (None, "") or (isinstance(value, Sized) and not len(value)) for value in (found, said)):
        return True
    if isinstance(found, Mapping) and isinstance(said, Mapping):
        return all(is_same(found.get(key), value) for key, value in said.items())
    if all(isinstance(value, list | tuple | set | frozenset) for value in (found, said)):
        return sorted(map(str, found)) == sorted(map(str, said))
    if isinstance(found, list | tuple) and len(found) == 1:
        found = found[0]
    if isinstance(said, bool) or isinstance(found, bool):
        return bool(found) == bool(said)
    if isinstance(found, int | float) and isinstance(said, int | float):
        return math.isclose(found, said, rel_tol=1e-9)
    return str(found) == str(said)


def count_experts(model: Any) -> int:
    """How many experts a layer of a model has; 0 where it has none."""
    config = model.config.get_text_config()
    return int(getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 0)


def list_names(names: Any) -> str:
    """The first of some names, and how many there are more."""
    listed = sorted(names)
    return ", ".join(listed[:SHOWN]) + (f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else "")
