"""Optional packages: which choices of a recipe need one, and whether it is installed here."""

import importlib.util
import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipe_runner.files import read_text
from recipe_runner.problems.problem import Found
from recipe_runner.recipe.sections import ModelSection, UpstreamSection

if TYPE_CHECKING:
    from recipe_runner.recipe.recipe import Recipe

# What needs which module. Source: transformers 5.23, trainer_optimizer.py and integrations/integration_utils.py.
_KERNELS = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
_OPTIMIZERS = {
    "galore": "galore_torch",
    "apollo": "apollo_torch",
    "lomo": "lomo_optim",
    "adalomo": "lomo_optim",
    "grokadamw": "grokadamw",
    "schedule_free": "schedulefree",
    "stable_adamw": "optimi",
    "adamw_torch_4bit": "torchao",
    "adamw_torch_8bit": "torchao",
}
_PLAIN = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")  # torch's, transformers' own
_TRACKERS = {name: name for name in ("wandb", "trackio", "clearml", "comet_ml", "mlflow", "codecarbon", "swanlab")}
_TRACKERS |= {"tensorboard": "tensorboard", "dvclive": "dvclive", "neptune": "neptune", "dagshub": "dagshub"}
_ON_PYPI = {"optimi": "torch-optimi", "flash_attn_interface": "flash-attn-3"}


def missing_packages(model: ModelSection, training: UpstreamSection) -> Found:
    """Optional packages that the recipe needs, and this machine lacks; silent where nothing can be trained anyway."""
    if not is_installed("torch"):
        return
    attention = model.attn_implementation or ""
    wanted = [(("model", "attn_implementation"), attention, _KERNELS.get(attention))]
    wanted += [
        (("training", "optim"), optim, package)
        for prefix, package in _OPTIMIZERS.items()
        if (optim := training["optim"]).startswith(prefix)
    ]
    if model.use_kernels:
        wanted.append((("model", "use_kernels"), "use_kernels", "kernels"))
    trackers = training.said.get("report_to") or []
    for tracker in [trackers] if isinstance(trackers, str) else trackers:
        wanted.append((("training", "report_to"), tracker, _TRACKERS.get(tracker)))
    for path, choice, package in wanted:
        if package and not is_installed(package):
            name = _ON_PYPI.get(package, package.replace("_", "-"))
            yield path, f"{choice} needs the package {name}, which is not installed here", f"pip install {name}"


def find_unused(recipes: Iterable["Recipe"], with_deepspeed: bool) -> list[str]:
    """Packages that some recipes do without, though upstream imports them wherever they are installed.

    Of bitsandbytes it is not known, and it is not named, where the base model's configuration can't be read yet.
    """
    needed = any(
        recipe.quantization.said
        or recipe.training["optim"] not in _PLAIN
        or recipe.training["peft_optimizer"]
        or _may_be_quantized(recipe.model)
        for recipe in recipes
    )
    return ["bitsandbytes"] * (not needed) + ["deepspeed"] * (not with_deepspeed)


def _may_be_quantized(model: ModelSection) -> bool:
    """Whether a base is published quantized, or that is not known."""
    if model.folder:
        file: Any = model.folder / "config.json"
    else:
        from huggingface_hub import try_to_load_from_cache

        file = try_to_load_from_cache(model.name_or_path, "config.json", revision=model.revision)
    try:
        return "quantization_config" in json.loads(read_text(Path(file)))
    except (OSError, ValueError, TypeError):
        return True


@cache
def is_installed(package: str) -> bool:
    """Whether a module can be imported here, without importing it."""
    return importlib.util.find_spec(package) is not None
