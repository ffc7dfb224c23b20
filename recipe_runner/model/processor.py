"""The processor of a vision model: its tokenizer, and what makes pixels of images."""

import re
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, PreTrainedTokenizerBase, ProcessorMixin

from recipe_runner.data.pictures import give_processor
from recipe_runner.problems.errors import first_line, user_error
from recipe_runner.problems.problem import KeyPath

FILES = ("processor_config.json", "preprocessor_config.json")  # a folder with one of them holds a processor


def has_processor(folder: Path) -> bool:
    """Whether the folder of a model or of an adapter has more than a tokenizer."""
    return any((folder / name).is_file() for name in FILES)


def read_processor(name: str, path: KeyPath = (), **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a vision model, which knows its processor (`data.pictures.processor_of`).

    Raises:
        UserError: The model has no processor, it can't be read, or needs a package that is not installed.
    """
    try:
        processor = AutoProcessor.from_pretrained(name, **options)
    except Exception as error:  # files of the user's, read by code that is not ours: anything may come
        told = first_line(error)
        if re.search("torchvision|num2words", f"{type(error).__name__} {error}", re.IGNORECASE):
            fix = "pip install 'recipe-runner[vision]'"
            raise user_error("missing-package", f"{name}: its processor needs a package: {told}", fix) from error
        raise user_error("no-processor", f"{name}: the processor can't be read: {told}", path=path) from error
    if not isinstance(processor, ProcessorMixin) or not hasattr(processor, "image_processor"):
        fix = "take a vision model (SmolVLM, Qwen2.5-VL, Gemma 3, ...), or remove dataset.images"
        raise user_error("no-processor", f"{name} is a text model: it sees no images", fix, path=path)
    tokenizer: PreTrainedTokenizerBase = processor.tokenizer
    if isinstance(processor.chat_template, str):
        tokenizer.chat_template = processor.chat_template
    if tokenizer.pad_token is None:  # as TRL's trainers do
        tokenizer.pad_token = tokenizer.eos_token
    give_processor(tokenizer, processor)
    return tokenizer
