"""Optional packages: which choices of a recipe need one, and whether it is installed here."""

import importlib.util
from functools import cache

from recipe_runner.problems.problem import Found
from recipe_runner.recipe.sections import ModelSection, UpstreamSection

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


@cache
def is_installed(package: str) -> bool:
    """Whether a module can be imported here, without importing it."""
    return importlib.util.find_spec(package) is not None
