"""Data types of weights and of mixed precision, where a recipe leaves them to the machine."""

from dataclasses import dataclass

from recipe_runner.recipe.sections import UpstreamSection


@dataclass(frozen=True)
class Precision:
    """Precision of a run.

    Attributes:
        dtype: Data type of the weights in memory, a torch name or `auto`.
        bf16: Mixed precision with bfloat16.
        fp16: Mixed precision with float16.
        reason: Why, in a few words.
    """

    dtype: str
    bf16: bool
    fp16: bool
    reason: str

    def __str__(self) -> str:
        mixed = "bf16 mixed" if self.bf16 else "fp16 mixed" if self.fp16 else "no mixed"
        return f"{self.dtype} weights, {mixed} precision ({self.reason})"


def decide_precision(training: UpstreamSection, dtype: str | None, adapter: bool, has_bf16: bool) -> Precision:
    """What a run trains in on a machine.

    Args:
        training: For `bf16` and `fp16`.
        dtype: Data type of the weights that the recipe asks for.
        adapter: Whether an adapter is trained, rather than the weights themselves.
        has_bf16: Whether the machine computes in bfloat16.
    """
    asked = training.said.get("bf16") is not None or bool(training["fp16"])
    bf16 = bool(training["bf16"]) if asked else has_bf16
    return Precision(dtype or ("bfloat16" if has_bf16 and adapter else "float32"), bf16, bool(training["fp16"]), "")
