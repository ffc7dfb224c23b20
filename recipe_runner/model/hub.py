"""The hub: is a model or an adapter there, and if not, why?"""

from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from transformers.utils import find_adapter_config_file

from recipe_runner.files import read_json
from recipe_runner.problems.errors import first_line, user_error
from recipe_runner.recipe.sections import ModelSection

# Why the hub did not give a configuration, first match wins: code, what happened, what to do.
LFS_POINTER = b"version https://git-lfs"
HUB_ERRORS = (
    (GatedRepoError, "model-not-found", "the model is gated", "ask for access on its page, then `hf auth login`"),
    (RepositoryNotFoundError, "model-not-found", "not on the hub, or private", "check the name, or `hf auth login`"),
    (RevisionNotFoundError, "model-not-found", "there is no such revision", "check model.revision"),
    (LocalEntryNotFoundError, "hub-unreachable", "not in the local cache, and the hub can't be reached", ""),
    (EntryNotFoundError, "model-not-found", "the repository has no config.json", "check the name"),
    (HFValidationError, "model-not-found", "neither a folder nor a hub id", "check the name"),
    (Exception, "hub-unreachable", "the hub did not answer", ""),
)


def find_model(model: ModelSection) -> None:
    """Checks that the base model is there: its folder, or its configuration on the hub (or in the hub's cache).

    Raises:
        UserError: There is no such model, or it can't be reached.
    """
    name, place = model.name_or_path, ("model", "name_or_path")
    if model.folder:
        strange = [file for file in model.folder.glob("*") if file.exists() and not (file.is_file() or file.is_dir())]
        if (model.folder / "config.json").is_file() and not strange:
            return _check_folder(model.folder)
        what = f"{strange[0].name} is a device or a pipe, not a file" if strange else ""
        what = what or "the folder has no config.json" if model.folder.is_dir() else "there is no such folder"
        fix = "`make model` makes the demo model" if "SmolLM2-135M-Instruct" in name else ""
        raise user_error("model-not-found", f"{name}: {what}", fix, path=place)
    try:
        hf_hub_download(name, "config.json", revision=model.revision)
        _refuse_adapter(name, find_adapter_config_file(name, revision=model.revision))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        code, what, fix = explain_hub_error(error)
        fix = fix or "check the network, or use a local folder: --set model.name_or_path=FOLDER"
        raise user_error(code, f"{name}: {what}", fix, path=place) from error


def _check_folder(folder: Path) -> None:
    """Checks a local model for what is found without reading its weights.

    Raises:
        UserError: config.json is no JSON object, weights are placeholders, or there is an adapter as well.
    """
    place = ("model", "name_or_path")
    try:
        config = read_json(folder / "config.json")
        if not isinstance(config, dict):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError) as error:
        raise user_error("model-config", f"config.json: {first_line(error)}", path=place) from error
    for file in (file for suffix in ("safetensors", "bin") for file in folder.glob(f"*.{suffix}")):
        with file.open("rb") as stream:
            if stream.read(len(LFS_POINTER)) == LFS_POINTER:
                message = f"{file} is a pointer of git-lfs, not the weights"
                raise user_error("model-not-loaded", message, "fetch them: git lfs pull", path=place)
    quantized = config.get("quantization_config")
    if isinstance(quantized, dict) and quantized.get("quant_method") == "bitsandbytes" and not _is_quantized(folder):
        message = "config.json says that bitsandbytes has quantized the weights, and it has not"
        fix = "remove quantization_config from config.json; `quantization` in the recipe quantizes while loading"
        raise user_error("model-not-loaded", message, fix, path=place)
    _refuse_adapter(str(folder), find_adapter_config_file(str(folder)))


def _is_quantized(folder: Path) -> bool:
    """Whether there are tensors beside those of the model by which bitsandbytes reads quantized weights."""
    try:
        for file in folder.glob("*.safetensors"):
            with safe_open(str(file), framework="pt") as tensors:
                if any("quant_state" in name or name.endswith(".SCB") for name in tensors.keys()):  # noqa: SIM118
                    return True
    except SafetensorError:
        return True  # damaged: loading them says so
    return not any(folder.glob("*.safetensors"))


def _refuse_adapter(name: str, config: str | None) -> None:
    """Refuses an adapter beside the weights: transformers 5.23 loads it, below the one that is trained."""
    if config:
        message = f"{name} also holds an adapter, which would be loaded with it, and stay below what is trained"
        fix = "take a folder without adapter_config.json; to train that adapter further, name it as model.adapter"
        raise user_error("model-not-loaded", message, fix, path=("model", "name_or_path"))


def download_adapter(name: str, files: list[str]) -> Path:
    """The folder of an adapter on the hub: the files that match some patterns, in the hub's cache.

    Raises:
        UserError: There is no such repository, or it can't be reached.
    """
    try:
        return Path(snapshot_download(name, allow_patterns=files))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        code, what, fix = explain_hub_error(error)
        fix = fix.replace("model.revision", "the name")
        raise user_error(code, f"adapter {name}: {what}", fix, path=("model", "adapter")) from error


def explain_hub_error(error: Exception) -> tuple[str, str, str]:
    """Code, what happened, what to do."""
    return next(row[1:] for row in HUB_ERRORS if isinstance(error, row[0]))
