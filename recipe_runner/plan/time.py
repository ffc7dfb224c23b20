"""How long a run takes: operations of the step that was traced, and a stated range of how well a device is used."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recipe_runner.plan.memory import Setting, Traced
from recipe_runner.recipe.recipe import Recipe

# Shares of a sheet's rate that matrix products reach, and seconds that the host takes to start an operation. Held
# against docs/performance.md: Phi-3-mini on an H100, one packed row a batch, is limited by the host, at 22 to 40
# microseconds an operation.
BEST_SHARE, WORST_SHARE = 0.6, 0.2
BEST_START, WORST_START = 8e-6, 45e-6


@dataclass(frozen=True)
class Time:
    """What is known of a run's time.

    Attributes:
        steps: Of the optimizer; None where the number of rows is not known.
        tokens: That are trained on; None as above.
        flops: Of a batch on a device.
        flops_per_token: The same by token, forward and backward, with what is computed twice.
        low: Seconds of a step at best; None where the device's speed is not known.
        high: Seconds of a step at worst.
    """

    steps: int | None
    tokens: int | None
    flops: int
    flops_per_token: float
    low: float | None
    high: float | None

    def as_json(self) -> dict[str, Any]:
        """As JSON values, in seconds."""
        known = self.low is not None and self.high is not None
        return {
            "steps": self.steps,
            "tokens": self.tokens,
            "flops_per_token": round(self.flops_per_token),
            "step_seconds": [self.low, self.high] if known else None,
            "seconds": [side * self.steps for side in (self.low, self.high) if side and self.steps] or None,
            "utilisation": [WORST_SHARE, BEST_SHARE],
        }


def measure_time(recipe: Recipe, setting: Setting, traced: Traced, known: Mapping[str, Any], processes: int) -> Time:
    """The time of a recipe's steps.

    Args:
        recipe: The recipe.
        setting: Its device and batch.
        traced: A batch.
        known: Split -> accounting of the prepared data; empty where it is not prepared.
        processes: That train at a time.
    """
    training, batch = recipe.training, setting.train
    accumulated = int(training["gradient_accumulation_steps"] or 1)
    steps = count_steps(recipe, known, batch.rows, processes)
    tokens = None
    accounting = known.get("train") or {}
    rows = accounting.get("rows_kept")
    if steps and rows and accounting.get("tokens"):
        seen = steps * accumulated * batch.rows * processes
        tokens = round(seen * accounting["tokens"] / max(accounting.get("packed_rows") or rows, 1))
    low = high = None
    if setting.device.tflops:
        rate = setting.device.tflops * 1e12
        low = accumulated * max(traced.flops / (BEST_SHARE * rate), traced.operations * BEST_START)
        high = accumulated * (traced.flops / (WORST_SHARE * rate) + traced.operations * WORST_START)
    return Time(steps, tokens, traced.flops, traced.flops / max(batch.tokens, 1), low, high)


def count_steps(recipe: Recipe, known: Mapping[str, Any], rows_at_a_time: int, processes: int) -> int | None:
    """Steps of the optimizer; None where the number of rows is not known."""
    training = recipe.training
    if (training["max_steps"] or 0) > 0:
        return int(training["max_steps"])
    accounting = known.get("train") or {}
    rows = int(accounting.get("packed_rows") or accounting.get("rows_kept") or 0)
    if not rows or recipe.stage.generates:
        return None
    doubled = recipe.stage.sequences
    batches = math.ceil(rows / (rows_at_a_time // doubled * processes))
    per_epoch: int = max(math.ceil(batches / int(training["gradient_accumulation_steps"] or 1)), 1)
    return math.ceil(float(training["num_train_epochs"] or 1) * per_epoch)
