"""A reward for school mathematics in the style of GSM8K (arXiv 2110.14168): the number after the last ####."""

import re

NUMBER = re.compile(r"####\s*(-?[\d,]*\.?\d+)")


def same_number(completions, answer, **kwargs):
    """1 for the number of the column `answer`, else 0."""
    said = [_last_number(completion[0]["content"]) for completion in completions]
    right = [_last_number(text) for text in answer]
    return [float(found is not None and found == wanted) for found, wanted in zip(said, right, strict=True)]


def _last_number(text):
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None
