"""Images opened, checked, and fingerprinted; and the processor of a vision model, which sees them."""

import base64
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from datasets import Dataset, Features, Image
from PIL import Image as Pillow
from PIL import ImageOps, UnidentifiedImageError
from transformers import PreTrainedTokenizerBase

from recipe_runner.data.images import Picture, locate
from recipe_runner.problems.errors import first_line, user_error

PICTURES = pa.list_(pa.struct([("path", pa.string()), ("bytes", pa.binary())]))
MOST_PIXELS = 89_478_485  # Pillow's own limit (Image.MAX_IMAGE_PIXELS), of which it only warns
LEAST_SIDE = 2  # pixels: an image of one pixel shows nothing, and is what failed downloads and trackers leave
PROCESSOR = "processor"  # the attribute by which a tokenizer knows the processor that it is a part of


class ImageError(ValueError):
    """An image can't be used; the message says which, and why."""


def give_processor(tokenizer: PreTrainedTokenizerBase, processor: Any) -> None:
    """Makes a tokenizer known as that of a vision model: all that render turns, which take a tokenizer, heed it."""
    setattr(tokenizer, PROCESSOR, processor)


def processor_of(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The processor that a tokenizer is a part of; None for that of a text model."""
    return vars(tokenizer).get(PROCESSOR)


def keep_encoded(rows: Dataset, column: str) -> Dataset:
    """Rows whose images are given as they are stored, not opened."""
    plain = Image(decode=False)

    def encoded(feature: Any) -> Any:
        if isinstance(feature, Image):
            return plain
        if hasattr(feature, "feature"):
            return type(feature)(encoded(feature.feature))
        return feature

    kept = {name: encoded(kind) if name == column else kind for name, kind in rows.features.items()}
    return rows if kept == dict(rows.features) else rows.cast(Features(kept))


def hash_picture(picture: Picture) -> list[int]:
    """A hash of an image's file, as two numbers."""
    content = picture["bytes"] or Path(str(picture["path"])).read_bytes()
    return np.frombuffer(xxhash.xxh3_64_digest(content), dtype=np.int32).tolist()


def open_image(picture: Picture, number: int = 1) -> Pillow.Image:
    """An image, whole, upright, in RGB.

    Raises:
        ImageError: It is missing, no image, cut off, animated, too small or too large.
    """
    named = picture["path"] or "its bytes"
    what = f"image {number} ({named})"
    file: Any = io.BytesIO(picture["bytes"]) if picture["bytes"] else picture["path"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes, which are looked at here, and of odd metadata
            with Pillow.open(file) as opened:
                width, height = opened.size
                if width * height > MOST_PIXELS:
                    least = f"at most {MOST_PIXELS:,} are read"
                    raise ImageError(f"{what} has {width:,} x {height:,} pixels, and {least}; make it smaller")
                if min(width, height) < LEAST_SIDE:
                    raise ImageError(f"{what} has {width} x {height} pixels, and shows nothing; leave the row out")
                if (frames := getattr(opened, "n_frames", 1)) > 1:
                    raise ImageError(f"{what} is animated ({frames} frames); write one of them as an image")
                upright = ImageOps.exif_transpose(opened)
                return upright.convert("RGB")
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError(f"{what} is not there; dataset.image_folder is where its path begins") from error
    except Pillow.DecompressionBombError as error:
        raise ImageError(f"{what} has more than {MOST_PIXELS:,} pixels; make it smaller") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{what} is no image that Pillow reads") from error
    except Exception as error:  # a file of the user's, read by code that is not ours: anything may come
        raise ImageError(f"{what} can't be read: {type(error).__name__}: {error}; is it cut off?") from error


def open_images(pictures: Sequence[Picture]) -> list[Pillow.Image]:
    """All images of a row. See `open_image`."""
    return [open_image(picture, number) for number, picture in enumerate(pictures, 1)]


def as_address(picture: Picture, side: int) -> str:
    """A small copy of an image as a data: address, for a page; `side` is its longer one, in pixels."""
    image, file = open_image(picture), io.BytesIO()
    image.thumbnail((side, side))
    image.save(file, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def see(tokenizer: PreTrainedTokenizerBase, text: str, pictures: Sequence[Picture]) -> dict[str, Any]:
    """What a vision model is given of a rendered prompt and its images: tokens, pixels and more, a batch of one.

    Raises:
        UserError: An image can't be used.
    """
    processor: Any = processor_of(tokenizer)
    try:
        images = open_images(pictures)
        return dict(processor(images=[images], text=[text], add_special_tokens=False, return_tensors="pt"))
    except ImageError as error:
        raise user_error("unreadable-image", str(error)) from error
    except ValueError as error:  # of sizes that the processor can't take
        raise user_error("unreadable-image", f"the processor refuses the images: {first_line(error)}") from error


def find_files(rows: Dataset, columns: Mapping[str, str], source: str, folder: str | None) -> Iterator[Path]:
    """Files of the images that rows name, as far as they are there; in the column of images, or in their turns."""
    found: dict[str, None] = {}
    for batch in rows.iter(1000):
        for role, column in columns.items():
            for cell in batch[column] if role in ("images", "messages", "prompt") else ():
                found |= dict.fromkeys(_name_files(cell, role))
    for picture in locate([{"path": name, "bytes": None} for name in found], source, folder):
        if (file := Path(picture["path"])).is_file():
            yield file


def _name_files(cell: Any, role: str) -> Iterator[str]:
    """Paths of the images of a cell."""
    for value in cell if isinstance(cell, list) else [cell]:
        if role == "images":
            path = value.get("path") if isinstance(value, Mapping) and not value.get("bytes") else value
            if isinstance(path, str):
                yield path
        elif isinstance(value, Mapping) and isinstance(content := value.get("content", value.get("value")), list):
            for part in content:
                if isinstance(part, Mapping) and isinstance(path := part.get("image") or part.get("path"), str):
                    yield path
