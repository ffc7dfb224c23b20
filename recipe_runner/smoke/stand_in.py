"""What stands in for a recipe's model: the same architecture with few narrow layers, its chat template, a tokenizer.

The configuration comes from the facts in `recipes/models.json`, else from the model's folder, else from the hub.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from recipe_runner.files import read_object, read_text
from recipe_runner.model.base import load_model_config
from recipe_runner.model.hub import find_model
from recipe_runner.model.tiny import fill_padding, shrink_config
from recipe_runner.model.tokenizer import read_own, stop_ids
from recipe_runner.plan.setting import build_config, refuse_remote_code
from recipe_runner.problems.errors import UserError, first_line, user_error
from recipe_runner.problems.words import suggest
from recipe_runner.recipe.library import shelf
from recipe_runner.recipe.models import ModelFacts, find_facts
from recipe_runner.recipe.sections import ModelSection
from recipe_runner.smoke.vision import image_tokens, write_vision

VOCABULARY = 600  # tokens that are learned from the rows, beside the special ones
WINDOW = 32  # of attention, where the architecture has one: shorter than most rows
# Spellings of special tokens in chat templates.
SPECIAL = re.compile(r"<\|[^|<>\s]+\|>|</?s>|<(?:bos|eos|pad|start_of_turn|end_of_turn)>|\[/?[A-Z_]{3,}\]|</?think>")
BEGINS = ("<|begin_of_text|>", "<bos>")  # tokens that tokenizers put before every text: Llama 3, Gemma
SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}  # how the model answers by itself
PLACE = ("model", "name_or_path")


@dataclass(frozen=True)
class StandIn:
    """A small model of a published one's architecture.

    Attributes:
        folder: Where it is.
        config: Of the model at its real size.
        facts: What is known of the model; None where it is not in `recipes/models.json`.
        stops: Tokens at which the real model stops to generate.
        told: What stands in for what, for people.
    """

    folder: Path
    config: PretrainedConfig
    facts: ModelFacts | None
    stops: frozenset[str]
    told: str


def build_stand_in(
    model: ModelSection, texts: Sequence[str], folder: Path, least_layers: int | None, sees: bool = False
) -> StandIn:
    """Writes a small model with a tokenizer for some texts into a folder.

    Args:
        model: Section of the recipe.
        texts: Of the rows: what the tokenizer is learned from.
        folder: A new one.
        least_layers: That it has at least; None for as many as the model.
        sees: Whether the rows have images: the small model then has eyes, and a processor.

    Raises:
        UserError: The architecture is not known, or nothing is known of the model.
    """
    facts = find_facts(model.name_or_path)
    config = read_config(model, facts)
    tokenizer, stops = make_tokenizer(model, facts, texts, image_tokens(config.model_type) if sees else ())
    eos = tokenizer.eos_token_id
    text = config.get_text_config()
    layers = text.num_hidden_layers if least_layers is None else least_layers
    small = shrink_config(text, len(tokenizer), eos if isinstance(eos, int) else 0, layers, keep_heads=True)
    small.max_position_embeddings = text.max_position_embeddings
    if getattr(small, "sliding_window", None):
        small.sliding_window = min(WINDOW, small.sliding_window)
    small.dtype = None
    small.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[small.model_type]]
    logging.disable_progress_bar()  # of writing a file of some hundred kilobytes
    if sees:
        write_vision(config, small, tokenizer, folder)
    else:
        torch.manual_seed(0)
        built = build_model(small)
        fill_padding(built)
        built.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    ends = [tokenizer.convert_tokens_to_ids(token) for token in sorted(stops)]
    GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id, **SAMPLING).save_pretrained(folder)
    template = facts.template if facts else "of the model's folder"
    told = f"{small.model_type} of {small.num_hidden_layers} layers, {small.hidden_size} wide"
    told += (
        "; synthetic tokenizer" if facts or not (model.folder and (model.folder / "tokenizer.json").is_file()) else ""
    )
    return StandIn(folder, config, facts, stops, f"{told}; template {template or 'none'}")


def write_judge(stand_in: StandIn, folder: Path, scores: bool) -> None:
    """Writes a model of a stand-in's sizes and tokenizer, with other random weights: a teacher, or a reward model."""
    config = AutoConfig.from_pretrained(stand_in.folder)
    torch.manual_seed(1)
    if scores:
        config.num_labels = 1
        built: Any = AutoModelForSequenceClassification.from_config(config)
    else:
        built = build_model(config)
        fill_padding(built)
    built.save_pretrained(folder)
    AutoTokenizer.from_pretrained(stand_in.folder).save_pretrained(folder)


def build_model(config: PretrainedConfig) -> Any:
    """A random model of a configuration.

    Raises:
        UserError: transformers can't build it.
    """
    try:
        return AutoModelForCausalLM.from_config(config)
    except Exception as error:  # of numbers that make no model
        message = f"no small {config.model_type} can be built: {type(error).__name__}: {first_line(error)}"
        raise user_error("model-config", message, path=PLACE) from error


def read_config(model: ModelSection, facts: ModelFacts | None) -> PretrainedConfig:
    """The configuration of a recipe's model, at its real size.

    Raises:
        UserError: transformers does not know the architecture, it needs code of its own, or nothing is known of it.
    """
    if facts is None:
        if model.folder is None and not _is_cached(model):
            message = f"{model.name_or_path} is not in recipes/models.json, and the hub can't be reached"
            fix = "add its facts with their sources, or name a folder with its config.json"
            raise user_error("model-facts-missing", message, fix, path=PLACE)
        refuse_remote_code(model, read_object(model.folder / "config.json") if model.folder else {})
        return load_model_config(model)
    return build_config(model, facts)


def _is_cached(model: ModelSection) -> bool:
    """Whether the configuration is in the hub's cache, or can be fetched."""
    try:
        find_model(model)
    except UserError:  # the caller says what is missing
        return False
    return True


def find_template(facts: ModelFacts) -> str:
    """The chat template of a model; empty where it has none.

    Raises:
        UserError: TRL has none of that name.
    """
    if facts.template.startswith("trl/"):
        file = Path(trl.__file__).parent / "chat_templates" / facts.template.removeprefix("trl/")
        if not file.is_file():
            known = [f"trl/{template.name}" for template in file.parent.glob("*.jinja")]
            fix = suggest(facts.template, known) or f"TRL's are in {file.parent}"
            raise user_error("model-facts", f"{facts.name}: there is no template {facts.template}", fix, path=PLACE)
        return read_text(file)
    return read_text(shelf() / "recipes" / "templates" / facts.template) if facts.template else ""


def make_tokenizer(
    model: ModelSection, facts: ModelFacts | None, texts: Sequence[str], more: Sequence[str] = ()
) -> tuple[PreTrainedTokenizerBase, frozenset[str]]:
    """A tokenizer, and the tokens at which the real model stops.

    A byte-level BPE of the rows' texts with the special tokens of the model and of its chat template; the model's own,
    where it is in its folder and nothing else is known. `more` are special tokens that no template spells.
    """
    if facts is None:
        tokenizer = read_own(model)
        try:
            config: Any = GenerationConfig.from_pretrained(model.name_or_path)
        except OSError:
            config = AutoConfig.from_pretrained(model.name_or_path, **model.location)
        return tokenizer, frozenset(map(str, tokenizer.convert_ids_to_tokens(stop_ids(config, tokenizer))))
    template, tokens = find_template(facts), facts.tokens
    named = [tokens[key] for key in ("bos", "eos", "pad") if tokens.get(key)]
    special = list(dict.fromkeys([*named, *tokens.get("stops", ()), *SPECIAL.findall(template), *more]))
    tokenizer = learn_tokenizer(texts, special)
    tokenizer.eos_token, tokenizer.pad_token = tokens["eos"], tokens.get("pad") or tokens["eos"]
    if tokens.get("bos"):
        tokenizer.bos_token = tokens["bos"]
    if (bos := tokens.get("bos")) in BEGINS:
        number = tokenizer.convert_tokens_to_ids(bos)
        put = TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, number)])
        tokenizer.backend_tokenizer.post_processor = put
    tokenizer.chat_template = template or None
    return tokenizer, frozenset([*tokens.get("stops", ()), tokens["eos"]])


def learn_tokenizer(texts: Iterable[str], special: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of some texts: every text can be written in it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY + len(special),
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)
