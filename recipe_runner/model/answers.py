"""Answers of a model: prompts in tokens, greedy or sampled, several at a time with padding on the left.

transformers' own `generate` does the work: here prompts are rendered as in training, ordered by length, and checked
against the model's context.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from recipe_runner.model.tokenizer import stop_ids
from recipe_runner.problems.errors import user_error

GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "num_beams": 1}


@dataclass(frozen=True)
class Answer:
    """What a model answered.

    Attributes:
        tokens: Its tokens, with the one that ended it.
        text: What they say, without special tokens.
        ended: Whether it ended by itself, not at the most tokens that were allowed.
    """

    tokens: list[int]
    text: str
    ended: bool


def count_context(model: Any) -> int | None:
    """How many tokens a model can see; None where its configuration has no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def check_prompt(tokens: Sequence[int], context: int | None, new: int, what: str) -> None:
    """Checks that a prompt and its answer fit into the context.

    Raises:
        UserError: It is empty, or too long.
    """
    if not tokens:
        raise user_error("empty-prompt", f"{what} is empty", "write a prompt")
    if context and len(tokens) + new > context:
        message = f"{what} has {len(tokens):,} tokens; with {new:,} of the answer that is more than the model's context"
        raise user_error("prompt-too-long", f"{message} of {context:,}", "shorten it, or lower --max-new-tokens")


def stop_options(model: Any, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """For `generate`: the tokens at which an answer ends, and the one that pads it."""
    ends = stop_ids(model.generation_config, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=0)
    return {"eos_token_id": ends or None, "pad_token_id": pad}


def answer_prompts(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    batch_size: int,
    room: int | None = None,
    seen: Sequence[Any] = (),
    **options: Any,
) -> Iterator[dict[int, Answer]]:
    """Answers prompts, those of like length together, the longest first.

    With an adapter of virtual tokens only those of equal length: PEFT 0.21 gives a model then no position ids, and what
    pads a prompt would count.

    Args:
        model: In evaluation mode.
        tokenizer: Its own.
        prompts: In tokens.
        batch_size: How many at a time, at most.
        room: Tokens of a batch's prompts, with what pads them, at most; one prompt may have more.
        seen: Of each prompt, what a vision model is given of its images (`data.pictures.see`), or None; empty for none.
            One with images is answered alone.
        options: For `generate`.

    Yields:
        Of each batch: place of the prompt -> its answer.
    """
    stops = stop_options(model, tokenizer)
    pad = stops["pad_token_id"]
    order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
    virtual = getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
    while order:
        width = len(prompts[order[0]])
        most = batch_size if room is None else min(batch_size, max(1, room // width))
        places = [place for place in order[:most] if not virtual or len(prompts[place]) == width]
        shown = seen[order[0]] if seen else None
        if shown or any(seen[place] for place in places if seen):
            places = order[:1]
        order = order[len(places) :]
        rows = [[pad] * (width - len(prompts[place])) + list(prompts[place]) for place in places]
        masks = [[0] * (width - len(prompts[place])) + [1] * len(prompts[place]) for place in places]
        device = model.get_input_embeddings().weight.device
        batch = {"input_ids": torch.tensor(rows, device=device), "attention_mask": torch.tensor(masks, device=device)}
        if shown:
            batch = {name: value.to(device) for name, value in shown.items()}
        made = model.generate(**batch, **stops, **options)
        yield {
            place: read_answer(tokens[width:].tolist(), stops["eos_token_id"] or (), tokenizer)
            for place, tokens in zip(places, made, strict=True)
        }


def read_answer(tokens: list[int], ends: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Answer:
    """An answer from the tokens after its prompt; what pads it after its end is left out."""
    end = next((place for place, token in enumerate(tokens) if token in ends), None)
    kept = tokens if end is None else tokens[: end + 1]
    return Answer(kept, str(tokenizer.decode(kept, skip_special_tokens=True)).strip(), end is not None)


def answer_all(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    batch_size: int,
    room: int | None = None,
    seen: Sequence[Any] = (),
    **options: Any,
) -> list[Answer]:
    """The answers to all prompts, in their order. See `answer_prompts`."""
    found: dict[int, Answer] = {}
    for answers in answer_prompts(model, tokenizer, prompts, batch_size, room, seen, **options):
        found |= answers
    return [found[place] for place in range(len(prompts))]
