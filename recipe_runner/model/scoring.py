"""The loss on a CPU: TRL's way of it is made for GPUs."""

from collections.abc import Sequence
from typing import Any

import torch
import trl.trainer.utils
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from trl.kernels.chunked_logprob import ChunkedLogProbFunction, _use_triton

LOGITS = 2**26  # that are kept for the backward pass: 256 MiB in float32

Scores = tuple[torch.Tensor | None, ...]


def score_on_cpu() -> None:
    """Scores tokens on a CPU by PyTorch's own functions, and only those that are learned.

    TRL 1.16 (`add_fused_lm_head`) scores on a CPU the prompts, too, because some accelerators would compile anew for
    each number of tokens; and it computes the logits twice, in parts, so that they never lie in memory all at once.
    """
    trl.trainer.utils._use_triton = scores_only_learned
    trl.trainer.utils._ChunkedLogProbFunction = Score  # type: ignore[assignment, misc]


def scores_only_learned(device: torch.device) -> bool:
    """Whether the loss leaves out tokens that are not learned."""
    return device.type == "cpu" or bool(_use_triton(device))


class Score:
    """In the place of TRL's `ChunkedLogProbFunction`: the same arguments and results."""

    @staticmethod
    def apply(
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None = None,
        scale: float = 1.0,
        outputs: Sequence[str] = (),
    ) -> Scores:
        """Log-probabilities of targets, and what is asked for beside them; None for what is not.

        Args:
            hidden: `(tokens, hidden size)`.
            weight: Of the head, `(vocabulary, hidden size)`.
            bias: Of the head, `(vocabulary,)`.
            targets: `(tokens,)`.
            temperature: By which logits are divided.
            chunk_size: Of TRL's parts of the vocabulary.
            softcap: As in Gemma 2.
            scale: By which logits are multiplied.
            outputs: `entropy`, `log_sum_sq_probs`, `mean_logits`, `is_top1`.

        Returns:
            Log-probabilities and the four outputs, each `(tokens,)`.
        """
        if hidden.device.type not in ("cpu", "meta") or hasattr(
            weight, "ds_id"
        ):  # ZeRO-3 gathers the head for each pass anew
            scores: Scores = ChunkedLogProbFunction.apply(
                hidden, weight, bias, targets, temperature, chunk_size, softcap, scale, outputs
            )
            return scores
        number = max(1, LOGITS // len(weight))
        if len(hidden) <= number:
            return _score(hidden, weight, bias, targets, temperature, softcap, scale, outputs)
        parts = [
            checkpoint(
                _score, hidden[begin : begin + number], weight, bias, targets[begin : begin + number],
                temperature, softcap, scale, outputs, use_reentrant=False,
            )
            for begin in range(0, len(hidden), number)
        ]  # fmt: skip
        return tuple(None if of[0] is None else torch.cat(of) for of in zip(*parts, strict=True))


def _score(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    temperature: float,
    softcap: float | None,
    scale: float,
    outputs: Sequence[str],
) -> Scores:
    if not torch.is_autocast_enabled("cpu"):
        weight, bias = weight.to(hidden.dtype), bias if bias is None else bias.to(hidden.dtype)
    logits = functional.linear(hidden, weight, bias).float()
    if scale != 1:
        logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if temperature != 1:
        logits = logits / temperature
    chances = torch.log_softmax(logits, dim=-1)
    found: dict[str, Any] = {"entropy": None, "log_sum_sq_probs": None, "mean_logits": None, "is_top1": None}
    if "entropy" in outputs:
        found["entropy"] = -(chances.exp() * chances).sum(dim=-1)
    with torch.no_grad():
        if "log_sum_sq_probs" in outputs:
            found["log_sum_sq_probs"] = torch.logsumexp(2 * chances, dim=-1)
        if "mean_logits" in outputs:
            found["mean_logits"] = logits.mean(dim=-1)
        if "is_top1" in outputs:
            found["is_top1"] = logits.argmax(dim=-1) == targets
    return (chances.gather(-1, targets.unsqueeze(-1)).squeeze(-1), *found.values())
