"""A small vision model of an architecture, with its processor: what the stand-in of a vision recipe is made of.

Sizes of images and patches belong to an architecture: what they are for a few is said here, and no others are known.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from recipe_runner.data.pictures import give_processor
from recipe_runner.model.processor import read_processor
from recipe_runner.problems.errors import user_error
from recipe_runner.stages import load_class

VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
GRID = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))


@dataclass(frozen=True)
class Small:
    """What a small model of an architecture sees with.

    Attributes:
        processor: transformers' class of the processor.
        images: Its class of the image processor, as `module:name`: one that needs Pillow alone, where there is one.
        sizes: Of that one.
        vision: Of the vision tower's configuration.
        whole: Of the whole configuration.
        options: Of the processor.
        tokens: Special tokens by the names that the tokenizer knows them by; those without a name under a number.
        ids: Key of the configuration -> the token whose number it is.
        videos: Its class of the video processor, which needs torchvision; empty where it has none.
    """

    processor: str
    images: str
    sizes: Mapping[str, Any]
    vision: Mapping[str, Any]
    whole: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    tokens: Mapping[str, str] = field(default_factory=dict)
    ids: Mapping[str, str] = field(default_factory=dict)
    videos: str = ""


# Tokens of an image: 4 for each part of 32 x 32 pixels.
SMALL = {
    "idefics3": Small(
        "Idefics3Processor",
        "transformers.models.idefics3.image_processing_pil_idefics3:Idefics3ImageProcessorPil",
        {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}},
        VISION | {"image_size": 32, "patch_size": 4},
        {"scale_factor": 4},
        {"image_seq_len": 4},
        {
            "image_token": "<image>",
            "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>",
            "end_of_utterance_token": "<end_of_utterance>",
            **{str(number): token for number, token in enumerate(GRID)},
        },
        {"image_token_id": "<image>"},
    ),
    "gemma3": Small(
        "Gemma3Processor",
        "transformers.models.gemma3.image_processing_pil_gemma3:Gemma3ImageProcessorPil",
        {"size": {"height": 32, "width": 32}},
        VISION | {"image_size": 32, "patch_size": 8},
        {"mm_tokens_per_image": 4},
        {"image_seq_length": 4},
        {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
        {
            "image_token_index": "<image_soft_token>",
            "image_token_id": "<image_soft_token>",
            "boi_token_index": "<start_of_image>",
            "eoi_token_index": "<end_of_image>",
        },
    ),
    "qwen2_5_vl": Small(
        "Qwen2_5_VLProcessor",
        "transformers:Qwen2VLImageProcessor",
        {"min_pixels": 56 * 56, "max_pixels": 56 * 56},
        {"hidden_size": 32, "intermediate_size": 64, "depth": 2, "num_heads": 2, "fullatt_block_indexes": [1]},
        tokens={
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "vision_bos_token": "<|vision_start|>",
            "vision_eos_token": "<|vision_end|>",
        },
        ids={
            "image_token_id": "<|image_pad|>",
            "video_token_id": "<|video_pad|>",
            "vision_start_token_id": "<|vision_start|>",
            "vision_end_token_id": "<|vision_end|>",
        },
        videos="transformers:Qwen2VLVideoProcessor",
    ),
}


def image_tokens(model_type: str) -> list[str]:
    """The special tokens around and of images of an architecture.

    Raises:
        UserError: The architecture is not known here.
    """
    return list(_find(model_type).tokens.values())


def write_vision(
    config: PretrainedConfig, text: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Writes a small random vision model and its processor.

    Args:
        config: Of the model at its real size.
        text: Of the small language model.
        tokenizer: With the image tokens of the architecture, and the chat template.
        folder: For both.

    Raises:
        UserError: The architecture is not known here, or its processor needs a package that is not installed.
    """
    small = _find(config.model_type)
    whole = copy.deepcopy(config)
    whole.text_config = text
    for name, value in {**small.vision, "out_hidden_size": text.hidden_size}.items():
        if hasattr(whole.vision_config, name):
            setattr(whole.vision_config, name, value)
    for name, value in small.whole.items():
        setattr(whole, name, value)
    for name, token in small.ids.items():
        if hasattr(whole, name):
            setattr(whole, name, tokenizer.convert_tokens_to_ids(token))
    whole.dtype = None
    named = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[config.model_type]
    torch.manual_seed(0)
    getattr(transformers, str(named))(whole).save_pretrained(folder)
    write_processor(config.model_type, tokenizer, folder)


def write_processor(model_type: str, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes the small processor of an architecture around a tokenizer, which then knows it."""
    small = _find(model_type)
    named = {name: token for name, token in small.tokens.items() if not name.isdecimal()}
    tokenizer.save_pretrained(folder)
    seeing = transformers.AutoTokenizer.from_pretrained(folder, extra_special_tokens=named)
    options = dict(small.options) | {"image_processor": load_class(small.images)(**small.sizes)}
    if small.videos:
        options["video_processor"] = load_class(small.videos)()
    cls = getattr(transformers, small.processor)
    cls(tokenizer=seeing, chat_template=tokenizer.chat_template, **options).save_pretrained(folder)
    give_processor(tokenizer, read_processor(str(folder)))


def _find(model_type: str) -> Small:
    if model_type not in SMALL:
        fix = f"known here: {', '.join(SMALL)}"
        message = f"no small vision model of {model_type} can be made"
        raise user_error("model-config", message, fix, path=("model", "name_or_path"))
    return SMALL[model_type]
