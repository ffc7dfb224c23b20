"""How long a model takes for a token when it answers one person: greedy, with its cache, a batch of one."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from recipe_runner.model.answers import GREEDY, stop_options
from recipe_runner.results.target import Opened

TOKENS = 33  # of an answer: the first one costs the prompt, the others are what is measured
ROUNDS = 3  # of each prompt: the median counts
PROMPTS = 3


@dataclass(frozen=True)
class Latency:
    """Times of an answer, in milliseconds.

    Attributes:
        first: Until the first token is there, the prompt included.
        token: For each token after it.
    """

    first: float
    token: float


def measure_latency(opened: Opened, prompts: Sequence[list[int]]) -> Latency:
    """Measures a model on the first prompts (in tokens); what it answers does not matter.

    The time of an answer of one token is taken off that of a longer one: the rest is the time of its other tokens.
    """
    firsts, others = [], []
    _time(opened, prompts[0], 2)  # the first pass allocates
    for _ in range(ROUNDS):
        for prompt in prompts[:PROMPTS]:
            first = _time(opened, prompt, 1)
            firsts.append(first)
            others.append((_time(opened, prompt, TOKENS) - first) / (TOKENS - 1))
    return Latency(1000 * statistics.median(firsts), 1000 * statistics.median(others))


def _time(opened: Opened, prompt: list[int], tokens: int) -> float:
    """Seconds of an answer of exactly so many tokens."""
    model = opened.model
    ids = torch.tensor([prompt], device=model.get_input_embeddings().weight.device)
    options = GREEDY | {"min_new_tokens": tokens, "max_new_tokens": tokens}
    began = time.perf_counter()
    model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), **stop_options(model, opened.tokenizer), **options
    )
    if ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began
