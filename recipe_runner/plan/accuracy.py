"""How far plans of a kind were off, and what was taken for granted."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipe_runner.files import read_json
from recipe_runner.launch.configuration import Launch
from recipe_runner.plan.device import Device
from recipe_runner.plan.memory import Setting, optimizer_of
from recipe_runner.plan.optimizer import find_kind
from recipe_runner.plan.setting import UNKNOWN_PROMPT
from recipe_runner.recipe.recipe import Recipe

USUAL_ERROR = 0.15  # where nothing like it was measured
UNSURE = 0.15  # by which the range becomes wider where something was taken for something else
FEW = 3  # cases: fewer say nothing of an error
ACCURACY = Path(__file__).parent / "accuracy.json"


@dataclass(frozen=True)
class Accuracy:
    """How far plans of a kind were from what was published.

    Attributes:
        kind: In words.
        cases: How many were compared.
        within: How many of them are within `error`.
        error: A share.
    """

    kind: str
    cases: int
    within: int
    error: float

    def __str__(self) -> str:
        if not self.cases:
            return f"fewer than {FEW} published cases are like this one: taken as within {self.error:.0%}"
        found = f"within {self.error:.0%} in {self.within} of {self.cases} published cases"
        return f"for plans of this kind ({self.kind}): {found}"


@dataclass(frozen=True)
class Assumption:
    """What was taken for granted.

    Attributes:
        text: In a sentence.
        spread: Share by which the range becomes wider for it.
    """

    text: str
    spread: float = 0.0


def find_accuracy(recipe: Recipe, device: Device) -> Accuracy:
    """How far plans like this one were off, as `scripts/make_plan_accuracy.py` found."""
    kind = kind_of(recipe)
    found = read_json(ACCURACY).get(kind) if ACCURACY.is_file() and device.gpu else None
    if not found or found["cases"] < FEW:
        return Accuracy(kind, 0, 0, USUAL_ERROR)
    return Accuracy(kind, int(found["cases"]), int(found["within"]), float(found["error"]))


def kind_of(recipe: Recipe) -> str:
    """What decides how well a plan can be held against others: the stage's rows, the method, the quantization."""
    method = str(recipe.peft["method"]) if recipe.peft else "full"
    if method == "lora":
        method = "QLoRA" if recipe.quantization["load_in_4bit"] else "LoRA"
    if recipe.quantization["load_in_8bit"]:
        method += " on 8 bits"
    return method if recipe.stage.shape.endswith("tokens") else f"{method}, {recipe.stage.name}"


def assume(recipe: Recipe, setting: Setting, known: Mapping[str, Any], launch: Launch | None) -> Iterator[Assumption]:
    """What was taken for granted; where the planner can't know, the range becomes wider."""
    batch = setting.train
    if not known.get("train"):
        if recipe.stage.generates:
            yield Assumption(f"prompts have up to {UNKNOWN_PROMPT} tokens: `recipe-run prepare` finds the longest")
        elif not batch.flat:
            yield Assumption(
                f"rows have up to {batch.length:,} tokens (max_length): `recipe-run prepare` finds the longest"
            )
    if not find_kind(optimizer_of(recipe)).known:
        name = optimizer_of(recipe)
        yield Assumption(f"the optimizer {name} is taken for AdamW: its own states were not looked at", UNSURE)
    if recipe.model.use_kernels:
        yield Assumption("kernels of the hub are taken for PyTorch's own: what they keep is not known", UNSURE)
    attention = recipe.model.attn_implementation
    if attention not in (None, "sdpa", "eager"):
        yield Assumption(
            f"{attention} is taken for a fused kernel that keeps its inputs, its output and a number a query"
        )
    if launch and launch.processes > 1:
        yield Assumption(
            "what several devices share is worked out, not traced, and was held against no measurement", 0.1
        )
    if recipe.training["torch_compile"]:
        yield Assumption("torch.compile fuses operations: what it keeps is not known", UNSURE)
    if recipe.training["activation_offloading"]:
        yield Assumption("the few activations that TRL holds back while others leave are not counted", 0.1)
    if recipe.dataset.images:
        yield Assumption("tokens of images are counted, what the vision tower computes is not", UNSURE)
    if recipe.model.trust_remote_code:
        yield Assumption("the model's own code is not run: it is taken for transformers' model of that name", UNSURE)
    published = getattr(setting.config, "quantization_config", None)
    if published and not recipe.quantization:
        yield Assumption("weights that were published quantized are counted in 16 bits: they take less", UNSURE)
    if launch and launch.is_deepspeed and "8bit" in optimizer_of(recipe):
        yield Assumption("DeepSpeed keeps weights that are trained in float32, beside the optimizer's own states")
    if any(reward.model for reward in recipe.rewards):
        yield Assumption("reward models are taken to be of the size of the model itself")
    if not setting.device.gpu:
        yield Assumption("beside the tensors a process takes what Python and PyTorch need: some 0.6 GiB")
    if setting.device.gpu and setting.device.memory and not setting.device.tflops:
        yield Assumption("the speed of the device is not known, so that there is no time")
