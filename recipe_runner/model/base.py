"""The base model before its weights: its configuration, and its modules on the meta device."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    GenerationConfig,
    PretrainedConfig,
    set_seed,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.utils.import_utils import KERNELS_MAX_VERSION, KERNELS_MIN_VERSION, is_kernels_available
from trl.trainer.reward_trainer import suppress_seqcls_warning
from trl.trainer.utils import create_model_from_path

from recipe_runner.problems.errors import first_line, user_error
from recipe_runner.recipe.sections import ModelSection

PLACE = ("model", "name_or_path")
SHOWN = 3  # tensors that an error names
HEAD, WORDS = "score", "lm_head"  # of a reward model, which a language model has not; and the other way round


def load_model_config(model: ModelSection, scores: bool = False) -> PretrainedConfig:
    """Loads the configuration of the base model.

    Args:
        model: The base.
        scores: Whether it gets (or has) a head of one number, as a reward model.

    Raises:
        UserError: It can't be read, or the architecture is unknown, or no language model that generates text.
    """
    try:
        config = AutoConfig.from_pretrained(model.name_or_path, **model.location)
        if scores:
            config.num_labels = 1
        if model.attn_implementation:
            config._attn_implementation = model.attn_implementation
        if model.experts_implementation:
            config._experts_implementation = model.experts_implementation
    except Exception as error:  # a file of the user's, read by code that is not ours: anything may come
        raise user_error("model-config", f"config.json: {first_line(error)}", path=PLACE) from error
    if model.use_kernels and not is_kernels_available():
        message = f"the package kernels ({KERNELS_MIN_VERSION} or newer, below {KERNELS_MAX_VERSION}) is not installed"
        raise user_error("model-config", message, "pip install it, or remove the key", path=("model", "use_kernels"))
    named = [None] if config.architectures in (None, []) else config.architectures
    if not isinstance(named, list) or not all(isinstance(name, str | None) for name in named):
        raise user_error("model-config", f"config.json: architectures is {named!r}, not a list of names", path=PLACE)
    known = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()}
    if scores:
        _check_scoring(config, named[0], known)
        return config
    if not model.trust_remote_code and named[0] not in known:
        message = f"config.json names the architecture {named[0]}, which is no language model that generates text"
        fix = f"take a model with a head; for {config.model_type} it is"
        fix += f" {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, 'not known here')}"
        raise user_error("model-config", message, fix, path=PLACE)
    return config


def _check_scoring(config: PretrainedConfig, named: str | None, known: set[str]) -> None:
    """Checks that a reward model can be made of a model.

    Raises:
        UserError: It can't.
    """
    scoring = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(config.model_type)
    if scoring is None:
        message = f"transformers has no model of {config.model_type} with a head of one number"
        raise user_error("model-config", message, "take another base for the reward model", path=PLACE)
    if named not in known | {scoring, None}:
        message = f"config.json names the architecture {named}, of which no reward model can be made"
        raise user_error("model-config", message, f"take a language model, or a {scoring}", path=PLACE)


def is_scoring(config: PretrainedConfig) -> bool:
    """Whether a model gives each sequence a number, and no text."""
    named = (config.architectures or [""])[0]
    return bool(named) and named in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values()


def build_empty(model_config: PretrainedConfig, trust_remote_code: bool = False, scores: bool = False) -> Any:
    """The base model without weights, on the meta device; where it `scores`, with a head of one number.

    Raises:
        UserError: transformers can't build it.
    """
    architecture = getattr(transformers, (model_config.architectures or [""])[0], None)
    try:
        with torch.device("meta"):
            if scores:
                name = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES[model_config.model_type]
                return getattr(transformers, str(name))(model_config)
            if architecture:
                return architecture(model_config)  # not _from_config, which with ZeRO-3 wants to fill the weights
            return AutoModelForCausalLM.from_config(model_config, trust_remote_code=trust_remote_code)
    except Exception as error:  # of numbers in the user's file that make no model
        if re.search("experts.implementation", str(error)):
            raise user_error("model-config", first_line(error), path=("model", "experts_implementation")) from error
        if re.search(r"attn|attention", str(error), re.IGNORECASE) and model_config._attn_implementation:
            raise user_error("model-config", first_line(error), path=("model", "attn_implementation")) from error
        message = f"config.json makes no model: {type(error).__name__}: {first_line(error)}"
        raise user_error("model-config", message, path=PLACE) from error


def load_base(
    name: str, tokens: int, quantization: BitsAndBytesConfig | None, config: Any, scores: bool = False
) -> Any:
    """Loads the base as TRL does, with an embedding for every token.

    Source: trl/trainer/{sft,reward}_trainer.py 1.16.0, `__init__`. Rows for new tokens are drawn around the mean of the
    others (transformers' resize_token_embeddings), by the run's seed.

    Args:
        name: Its id or folder.
        tokens: Tokens of the tokenizer; a model may have more rows.
        quantization: Of its weights.
        config: The trainer's configuration, whose `model_init_kwargs` are used up: TRL warns of them with a model.
        scores: Whether it gets a head of one number.
    """
    options = dict(config.model_init_kwargs, trust_remote_code=config.trust_remote_code)
    if quantization:
        options["quantization_config"] = quantization
    if config.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        options["device_map"] = None
    if scores:
        set_seed(config.seed)  # of a new head
        cls: Any = AutoModelForSequenceClassification
        with suppress_seqcls_warning():
            loaded: Any = create_model_from_path(name, cls, num_labels=1, **options)
    else:
        loaded = create_model_from_path(name, **options)
    config.model_init_kwargs = None
    if tokens > loaded.get_input_embeddings().weight.shape[0]:
        set_seed(config.seed)
        loaded.resize_token_embeddings(tokens)
    return loaded


def drop_idle_flags(config: GenerationConfig) -> None:
    """Takes out of a generation configuration what has no effect in it, as a temperature without sampling.

    Published ones have such flags; transformers 5.23 refuses to save them with any change, and a run makes one: the
    tokens at which generation stops.

    Raises:
        ValueError: It could not be saved without them, either.
    """
    try:
        config.validate(strict=True)
    except ValueError as error:
        for name in re.findall(r"^- `(\w+)`:", str(error), re.MULTILINE):
            setattr(config, name, None)
        config.validate(strict=True)


@contextlib.contextmanager
def refusing_other_weights(model: ModelSection, strict: bool = True, scores: bool = False) -> Iterator[None]:
    """While weights are loaded: refuses files that do not hold exactly what the configuration asks for.

    transformers 5.23 writes a table to the log, fills what is missing with random numbers, and goes on
    (modeling_utils.py, _finalize_model_loading).

    Args:
        model: Names tensors that may be missing or left over.
        strict: Whether tensors may not be left over.
        scores: Whether a language model gets a head of one number: its own is left over, and the new one random.

    Raises:
        UserError: Tensors are missing, have another shape, or have no place; and the recipe does not name them.
    """
    report = transformers.modeling_utils.log_state_dict_report

    def check(*args: Any, **kwargs: Any) -> None:
        loading_info = kwargs["loading_info"]
        left_over, missing = loading_info.unexpected_keys if strict else (), loading_info.missing_keys
        if scores:
            left_over = [name for name in left_over if not name.startswith(f"{WORDS}.")]
            missing = [name for name in missing if not name.startswith(f"{HEAD}.")]
        shapes = {
            name: f"{name} {tuple(found)}, not {tuple(wanted)}" for name, found, wanted in loading_info.mismatched_keys
        }
        for what, found, key, named in (
            ("are missing, and would be random", missing, "new_weights", model.new_weights),
            ("have another shape", shapes.values(), "", ()),
            ("have no place in the model", left_over, "unused_weights", model.unused_weights),
        ):
            if idle := [name for name in named if not any(f"{text}.".startswith(f"{name}.") for text in found)]:
                message = f"'{idle[0]}' names none of the tensors that {what.partition(',')[0]}"
                raise user_error("other-weights", message, "remove it", path=("model", key))
            wrong = sorted(text for text in found if not any(f"{text}.".startswith(f"{name}.") for name in named))
            if wrong:
                shown = f"{', '.join(wrong[:SHOWN])}{', ...' * (len(wrong) > SHOWN)}"
                message = f"{model.name_or_path}: {len(wrong):,} tensor(s) {what}: {shown}"
                fix = "take the weights and the config.json of one model"
                fix += f"; if it is meant, list {wrong[0].rpartition('.')[0]} in model.{key}" if key else ""
                raise user_error("other-weights", message, fix, path=PLACE)
        if not scores:  # it would tell of the head at length
            report(*args, **kwargs)

    with mock.patch("transformers.modeling_utils.log_state_dict_report", check):
        yield
