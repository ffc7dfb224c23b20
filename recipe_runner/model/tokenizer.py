"""The tokenizer, with the chat template that is trained with."""

from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import AddedToken, AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from recipe_runner.data.encode import apply_template
from recipe_runner.data.job import Replaced
from recipe_runner.data.pictures import processor_of
from recipe_runner.files import read_text, write_new
from recipe_runner.model import templates
from recipe_runner.model.base import drop_idle_flags, load_model_config
from recipe_runner.model.processor import read_processor
from recipe_runner.problems.errors import UserError, first_line, user_error
from recipe_runner.problems.limits import TooSlow, time_limit
from recipe_runner.recipe.sections import DatasetSection, ModelSection, UpstreamSection

PLACE = ("model", "name_or_path")
TEMPLATE_SECONDS = 5  # for a question and its answer: usual templates take some milliseconds


def load_tokenizer(
    model: ModelSection,
    dataset: DatasetSection,
    training: UpstreamSection,
    before: PreTrainedTokenizerBase | None = None,
) -> tuple[PreTrainedTokenizerBase, Replaced | None]:
    """Loads the tokenizer with the chat template that is trained with, which is also the one saved with the result.

    Where the assistant's tokens are wanted and the model's own template does not mark them, that is TRL's training
    version of it, or one that renders the same text: `templates.find_marked`.

    Args:
        model: The base model.
        dataset: Decides whether the chat template is used, and whether it must mark the assistant's tokens.
        training: For `chat_template_path` and `eos_token`.
        before: The tokenizer of what is trained further: its chat template and end-of-sequence token go on, unless the
            recipe says otherwise.

    Returns:
        The tokenizer; and the template of the model that was replaced, if it was.

    Raises:
        UserError: The tokenizer can't be loaded, or its template can't mark the assistant's tokens.
    """
    tokenizer = _read_tokenizer(model, training["chat_template_path"], bool(dataset.images))
    if before is not None and training["chat_template_path"] is None and before.chat_template:
        tokenizer.chat_template = before.chat_template
    if before is not None and before.eos_token in tokenizer.get_vocab():
        tokenizer.eos_token = before.eos_token
    if training["eos_token"] is not None:
        if training["eos_token"] not in tokenizer.get_vocab():
            message = f"'{training['eos_token']}' is not in the tokenizer's vocabulary"
            raise user_error("unknown-token", message, path=("training", "eos_token"))
        tokenizer.eos_token = training["eos_token"]
    if tokenizer.eos_token is None:
        message = "the tokenizer has no end-of-sequence token: the model would not learn to stop"
        raise user_error("no-eos-token", message, "set training.eos_token", path=PLACE)
    if dataset.is_plain_text:
        return tokenizer, None
    if not tokenizer.chat_template:
        fix = "use an instruct model, set training.chat_template_path, or dataset.template for plain text"
        raise user_error("no-chat-template", "the tokenizer has no chat template", fix, path=("dataset", "format"))
    _check_template(tokenizer)
    replaced = _mark(tokenizer) if dataset.train_on == "assistant" else None
    if processor := processor_of(tokenizer):
        processor.chat_template = tokenizer.chat_template
    return tokenizer, replaced


def _mark(tokenizer: PreTrainedTokenizerBase) -> Replaced | None:
    """Gives a tokenizer a chat template that marks the assistant's tokens; returns what it replaces, if it does.

    Raises:
        UserError: No such template is known.
    """
    own = str(tokenizer.chat_template)
    if has_generation_markers(own):
        return None
    try:
        tokenizer.chat_template = get_training_chat_template(tokenizer)
        return Replaced(own, "TRL's training version", known=True)
    except ValueError as error:
        found, name = templates.find_marked(tokenizer)
        if not found:
            raise _without_marks(tokenizer) from error
        tokenizer.chat_template = found
        return Replaced(own, name, known=False)


def _without_marks(tokenizer: PreTrainedTokenizerBase) -> UserError:
    """The error for a template that does not mark answers, and for which no other stands in."""
    if strange := templates.find_strange_tokens(tokenizer):
        message = f"the chat template has no {{% generation %}} marks, and none can be put in: it spells {strange[0]},"
        message += " which is not a token of this model's vocabulary"
        fix = "use a template that is made for this tokenizer, or a model that has the token"
        return user_error("template-token-missing", message, fix, path=("training", "chat_template_path"))
    message = "the chat template has no {% generation %} marks, and no template with marks renders the same text"
    fix = "set training.chat_template_path to a template with the marks, or train_on: last, completion or all"
    return user_error("no-generation-marks", message, fix, path=("dataset", "train_on"))


def _check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Checks that the chat template can be read, and renders a question and its answer.

    Raises:
        UserError: It fails. What it refuses by its own `raise_exception` is left to the rows.
    """
    try:
        with time_limit(TEMPLATE_SECONDS):
            apply_template(tokenizer, templates.PROBE[:2], tokenize=False)
    except Exception as error:  # a template is a program: anything may come
        if type(error) is TemplateError:
            return
        told = first_line(error) if isinstance(error, TooSlow) else f"{type(error).__name__}: {first_line(error)}"
        found = f"the chat template fails on a question and its answer: {told}"
        if isinstance(error, TemplateSyntaxError):
            found = f"the chat template can't be read: line {error.lineno}: {error.message}"
        raise user_error("template-broken", found, "fix it", path=("training", "chat_template_path")) from error


def stop_ids(config: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Numbers of the tokens at which generation stops: those of a generation configuration, and the tokenizer's own."""
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return [number for number in dict.fromkeys((*ends, tokenizer.eos_token_id)) if isinstance(number, int)]


def find_stops(model: ModelSection, tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Tokens at which generation stops: those of the base's generation configuration, and the tokenizer's own.

    transformers 5.23 adds the tokenizer's to the saved configuration (trainer_utils.align_special_tokens).
    """
    try:
        config: Any = GenerationConfig.from_pretrained(model.name_or_path, **model.location)
        drop_idle_flags(config)
    except OSError:  # it has none: transformers makes it of the model's configuration
        config = AutoConfig.from_pretrained(model.name_or_path, **model.location)
    except Exception as error:  # a file of the user's, read by code that is not ours: anything may come
        raise user_error("model-config", f"generation_config.json: {first_line(error)}", path=PLACE) from error
    ids = [number for number in stop_ids(config, tokenizer) if number < len(tokenizer)]
    return {str(token) for token in tokenizer.convert_ids_to_tokens(ids)}


def read_own(model: ModelSection) -> PreTrainedTokenizerBase:
    """The tokenizer of a base model, as it was published.

    Raises:
        UserError: It can't be read.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model.name_or_path, **model.location)
    except Exception as error:  # files of the user's, read by code that is not ours: anything may come
        load_model_config(model)  # which transformers reads as well: is that one at fault?
        message = f"the tokenizer can't be read: {first_line(error)}"
        raise user_error("tokenizer-not-found", message, path=PLACE) from error
    return tokenizer


def _read_tokenizer(model: ModelSection, template: str | None, sees: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer with the recipe's tokens, and its chat template if it names a file; of a processor, if it sees."""
    place = ("dataset", "images")
    tokenizer = read_processor(model.name_or_path, place, **model.location) if sees else read_own(model)
    _add_tokens(tokenizer, model)
    try:
        tokenizer.chat_template = read_text(Path(template)) if template else tokenizer.chat_template
    except (OSError, ValueError) as error:
        found = f"{template} can't be read as text: {first_line(error)}"
        raise user_error("template-broken", found, path=("training", "chat_template_path")) from error
    return tokenizer


def _add_tokens(tokenizer: PreTrainedTokenizerBase, model: ModelSection) -> None:
    """Gives the tokenizer the recipe's new tokens.

    Raises:
        UserError: It has one of them already.
    """
    for key, special in (("add_tokens", False), ("add_special_tokens", True)):
        tokens = list(getattr(model, key))
        if there := [token for token in tokens if token in tokenizer.get_vocab()]:
            message = f"the tokenizer has '{there[0]}' already, as token {tokenizer.get_vocab()[there[0]]:,}"
            raise user_error("new-tokens", message, "take it out", path=("model", key))
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=special) for token in tokens], special)


def write_training_template(model: ModelSection, template: str | None, file: Path) -> None:
    """Writes the chat template that marks the assistant's tokens, for `training.chat_template_path`.

    Raises:
        UserError: No such template is known, or the file is there already.
    """
    tokenizer = _read_tokenizer(model, template)
    if not tokenizer.chat_template:
        raise user_error("no-chat-template", "the tokenizer has no chat template", path=PLACE)
    _mark(tokenizer)
    write_new(file, str(tokenizer.chat_template))
