"""The result of a run, loaded for inference: a run folder, an adapter or a model -> model and tokenizer."""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import DEFAULT_REVISION
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import GENERATION_CONFIG_NAME

from recipe_runner.files import read_object, read_status
from recipe_runner.model import bottleneck  # noqa: F401 (makes its method known to PEFT)
from recipe_runner.model.adapter import SCORING, saves_embeddings
from recipe_runner.model.base import is_scoring, refusing_other_weights
from recipe_runner.model.hub import find_model
from recipe_runner.model.processor import has_processor, read_processor
from recipe_runner.model.quantization import keep_4bit_weights_trainable
from recipe_runner.problems.errors import UserError, first_line, user_error
from recipe_runner.recipe.rules.adapter import CONFIG, WEIGHTS
from recipe_runner.recipe.sections import ModelSection
from recipe_runner.runs.folder import result_name


def find_result(folder: Path) -> Path:
    """The adapter or model of a run (of a pipeline: of its last stage); any other folder must be one itself.

    Raises:
        UserError: The run did not complete, or there is no adapter and no model.
    """
    if (folder / "status.json").is_file():
        if (status := read_status(folder)) != "completed":
            raise user_error("run-not-completed", f"the run in {folder} is {status}", f"--resume {folder} continues it")
        stages = read_object(folder / "status.json").get("stages")
        if isinstance(stages, list) and stages and isinstance(stages[-1], dict):
            return find_result(folder / str(stages[-1].get("run")))
        results = [folder / result_name(adapter) for adapter in (True, False)]
        folder = next((result for result in results if result.is_dir()), folder)
    if not any((folder / name).is_file() for name in (CONFIG, "config.json")):
        message = f"{folder} holds no adapter and no model"
        raise user_error("result-not-found", message, "name a run folder, an adapter's folder or a model's folder")
    return folder


def is_reward_model(result: Path) -> bool:
    """Whether the folder of a model or adapter says that it gives numbers, and writes no text."""
    if (result / CONFIG).is_file():
        return bool(read_object(result / CONFIG).get("task_type") == "SEQ_CLS")
    named = read_object(result / "config.json").get("architectures")
    return isinstance(named, list) and str(named[:1]).endswith("ForSequenceClassification']")


def find_base(config: PeftConfig, result: Path) -> str:
    """The base of an adapter: where its configuration says, seen from here; else where its run found it."""
    name = config.base_model_name_or_path or ""
    recorded = read_object(result.parent / "environment.json").get("base_model")
    if name and not Path(name).is_dir() and isinstance(recorded, dict):
        place = Path(str(recorded.get("name_or_path"))).expanduser()
        return str(place) if place.is_dir() else name
    return name


def can_switch_off(config: PeftConfig) -> bool:
    """Whether the base is there again when an adapter is switched off: PEFT leaves trained biases as they are."""
    return getattr(config, "bias", "none") == "none"


def read_tokenizer(result: str | Path, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a result, padding on the left.

    Raises:
        UserError: It can't be read.
    """
    if has_processor(Path(result)):
        seeing = read_processor(str(result), **options)
        seeing.padding_side = "left"
        return seeing
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(result), padding_side="left", **options)
    except Exception as error:  # files of the user's, read by code that is not ours: anything may come
        message = f"{result}: the tokenizer can't be read: {first_line(error)}"
        raise user_error("tokenizer-not-found", message, "was it copied whole?") from error
    return tokenizer


def load_result(
    folder: str | Path, section: ModelSection | None = None, plain_base: bool = False, **options: Any
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Loads a result for inference: in evaluation mode, with the tokenizer it was saved with, padding on the left.

    The base of an adapter is loaded from where `find_base` finds it; `model.disable_adapter()` gives it back.

    Args:
        folder: A run folder, an adapter or a model; or a model's id on the hub.
        section: Of the recipe: which tensors of the base's files may be missing or left over. Without one, none may be
            missing.
        plain_base: Whether a base that was published quantized gets plain weights under the adapter.
        options: For `from_pretrained`: dtype, quantization_config, ...

    Raises:
        UserError: There is no result, or it can't be loaded.
    """
    result = find_result(Path(folder)) if Path(folder).is_dir() or Path(folder).is_absolute() else Path(folder)
    place = {key: options[key] for key in ("revision", "trust_remote_code") if key in options}
    try:
        if (result / CONFIG).is_file():
            config = PeftConfig.from_pretrained(str(result))
            name = find_base(config, result)
            _refuse_missing(name, result)
            tokenizer = read_tokenizer(result)
            auto, scores = _choose_class(
                config.task_type == SCORING, AutoConfig.from_pretrained(name, **{"revision": config.revision} | place)
            )
            with _refusing(section, name, bool(scores)):
                base: Any = auto.from_pretrained(name, **{"revision": config.revision} | options | scores)
            if plain_base and getattr(base, "is_quantized", False):
                base = base.dequantize()
            if len(tokenizer) > base.get_input_embeddings().weight.shape[0]:
                base.resize_token_embeddings(len(tokenizer))  # as PEFT's AutoPeftModel does
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Found missing adapter keys")  # they are refused below
                model: Any = PeftModel.from_pretrained(base, str(result))
            _check_adapter(model, result)
        else:
            if not result.is_dir():
                _find_on_hub(str(folder), place.get("revision", DEFAULT_REVISION))
            tokenizer = read_tokenizer(result, **place)
            read = AutoConfig.from_pretrained(str(result), **place)
            auto, scores = _choose_class(is_scoring(read), read)
            with _refusing(section, str(result)):
                model = auto.from_pretrained(str(result), **options | scores)
        if scores:
            model.config.get_text_config().pad_token_id = tokenizer.pad_token_id  # by which the last token is found
        if (result / GENERATION_CONFIG_NAME).is_file():  # of an adapter, PEFT leaves it out
            model.generation_config = GenerationConfig.from_pretrained(str(result))
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        message = f"{result} can't be loaded: {first_line(error)}"
        fix = "is its base model where it was? was it copied whole?"
        raise user_error("result-not-loaded", message, fix) from error
    keep_4bit_weights_trainable(model)
    return model.eval(), tokenizer


def _choose_class(scores: bool, config: PretrainedConfig) -> tuple[Any, dict[str, Any]]:
    """Transformers' class for a model, and what it has to be told beside: a reward model has one output."""
    if scores:
        return AutoModelForSequenceClassification, {"num_labels": 1}
    named = (config.architectures or [""])[0]
    sees = named in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()
    return (AutoModelForImageTextToText if sees else AutoModelForCausalLM), {}


@contextlib.contextmanager
def _refusing(section: ModelSection | None, name: str, scores: bool = False) -> Iterator[None]:
    """While weights are loaded: refuses files that lack tensors; with a recipe's section also those left over.

    Raises:
        UserError: They do; without the keys of a recipe, which is not what is at fault.
    """
    known = section or ModelSection(name, DEFAULT_REVISION, True, False)
    try:
        with refusing_other_weights(known, strict=section is not None, scores=scores):
            yield
    except UserError as error:
        problem = error.problems[0]
        raise user_error(
            problem.code, problem.message, "was it copied whole? do config.json and weights go together?"
        ) from error


def _check_adapter(model: Any, result: Path) -> None:
    """Checks that the file of an adapter holds the tensors of the adapter, and no others: PEFT 0.21 only warns.

    Raises:
        UserError: It does not, or it is missing.
    """
    file = result / WEIGHTS
    if not file.is_file():
        return  # an old one, pickled: PEFT has read it, or said why not
    with safe_open(str(file), framework="pt") as tensors:
        saved = set(tensors.keys())
    config = model.active_peft_config
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Could not find a config file in")  # of a base seen from elsewhere
        wanted = set(get_peft_model_state_dict(model, save_embedding_layers=saves_embeddings(config)))
    for what, names in (("lacks", wanted - saved), ("has, and no place for,", saved - wanted)):
        if names:
            message = f"{file} {what} {len(names):,} tensor(s) of the adapter, {min(names)} for one"
            fix = "was it copied whole? does adapter_config.json go with it?"
            raise user_error("result-not-loaded", message, fix)


def _find_on_hub(name: str, revision: str) -> None:
    """Checks that a model is on the hub, or in its cache.

    Raises:
        UserError: It is not.
    """
    try:
        find_model(ModelSection(name, revision, True, False))
    except UserError as error:
        problem = error.problems[0]
        fix = "is it the name of a run folder, a recipe or a model?"
        raise user_error(problem.code, problem.message, fix) from error


def _refuse_missing(base: str, result: Path) -> None:
    """Checks that the weights of an adapter are there, and the folder of its base, where it is one.

    Raises:
        UserError: It has moved.
    """
    if not any(result.glob("adapter_model.*")):
        raise user_error("result-not-loaded", f"{result / WEIGHTS} is missing", "was it copied whole?")
    if (Path(base).is_absolute() and not Path(base).is_dir()) or (
        base.startswith((".", "~")) and not Path(base).is_dir()
    ):
        message = f"the base model of {result} is not where it was: {base}"
        fix = f"put it back, or write its folder or id as base_model_name_or_path into {result / CONFIG}"
        raise user_error("base-moved", message, fix)
