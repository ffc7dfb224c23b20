"""How likely a model finds what it should say, by supervised tokens; and what a reward model gives sequences."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from recipe_runner.data.tables import IGNORED

TOKENS = 2048  # of a batch: what bounds the logits' memory


@dataclass(frozen=True)
class Score:
    """What a model gives the supervised tokens of a sequence.

    Attributes:
        loss: Sum of their negative log-likelihoods, in nats; minus the log-probability of the answer.
        tokens: How many they are.
        right: How many of them are the model's first choice.
    """

    loss: float
    tokens: int
    right: int


def score_logits(logits: torch.Tensor, targets: torch.Tensor) -> Score:
    """Scores a sequence: logits `(sequence, vocabulary)` of its next tokens, which are learned where they are known."""
    known = targets != IGNORED
    chosen, wanted = logits[known].float(), targets[known]
    loss = torch.nn.functional.cross_entropy(chosen, wanted, reduction="sum")
    return Score(float(loss), len(wanted), int((chosen.argmax(-1) == wanted).sum()))


def score_sequences(
    model: Any,
    sequences: Sequence[tuple[list[int], list[int]]],
    seen: Sequence[Callable[[], dict[str, Any]] | None] = (),
) -> list[Score]:
    """Scores sequences of tokens and labels (-100 where nothing is learned), those of like length together.

    Logits have the shape `(batch, sequence, vocabulary)`; those of virtual tokens before the text are left out.

    Args:
        model: In evaluation mode.
        sequences: Tokens and labels.
        seen: Of each sequence, what makes all that a vision model is given of it, which is scored alone; or None. Empty
            where there are no images.
    """
    found: dict[int, Score] = {}
    order = sorted(range(len(sequences)), key=lambda place: -len(sequences[place][0]))
    device = model.get_input_embeddings().weight.device
    while order:
        width = len(sequences[order[0]][0])
        number = 1 if seen and any(seen) else max(1, TOKENS // width)
        places, order = order[:number], order[number:]
        rows, labels, masks = [], [], []
        for place in places:
            ids, learned = sequences[place]
            space = width - len(ids)
            rows.append([*ids, *[0] * space])
            labels.append([*learned, *[IGNORED] * space])
            masks.append([1] * len(ids) + [0] * space)
        batch = {"input_ids": torch.tensor(rows, device=device), "attention_mask": torch.tensor(masks, device=device)}
        if seen and (look := seen[places[0]]):
            batch = {name: value.to(device) for name, value in look().items()}
        targets = torch.tensor(labels, device=device)[:, 1:]
        with torch.no_grad():
            logits = model(**batch, use_cache=False).logits[:, -width:][:, :-1]
        for number, place in enumerate(places):
            found[place] = score_logits(logits[number], targets[number])
    return [found[place] for place in range(len(sequences))]


def rate_sequences(model: Any, sequences: Sequence[list[int]]) -> list[float]:
    """What a reward model gives sequences of tokens, those of like length together; padded as in training."""
    found: dict[int, float] = {}
    order = sorted(range(len(sequences)), key=lambda place: -len(sequences[place]))
    device, pad = model.get_input_embeddings().weight.device, model.config.get_text_config().pad_token_id
    while order:
        width = len(sequences[order[0]])
        places, order = order[: max(1, TOKENS // width)], order[max(1, TOKENS // width) :]
        rows = torch.tensor(
            [[*ids, *[pad] * (width - len(ids))] for ids in (sequences[p] for p in places)], device=device
        )
        real = torch.tensor(
            [[1] * len(sequences[p]) + [0] * (width - len(sequences[p])) for p in places], device=device
        )
        with torch.no_grad():
            scores = model(input_ids=rows, attention_mask=real, use_cache=False).logits[:, 0]
        found |= dict(zip(places, scores.float().tolist(), strict=True))
    return [found[place] for place in range(len(sequences))]
