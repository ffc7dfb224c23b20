"""Two things that upstream computes though nothing uses them: attention between documents that are packed into one row,
and the loss of tokens that are not learned.
"""

from dataclasses import asdict
from itertools import pairwise
from typing import Any

import torch
import trl.trainer.utils
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from trl.kernels.chunked_logprob import _use_triton
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling


def spare(trainer: Any) -> None:
    """Trains without both; what is left is the same but for rounding."""
    trl.trainer.utils._use_triton = scores_only_learned
    collator = trainer.data_collator
    if isinstance(collator, DataCollatorForLanguageModeling) and collator.padding_free:
        trainer.data_collator = DocumentCollator(**asdict(collator))
        AttentionInterface.register("sdpa", attend_within_documents)


class DocumentCollator(DataCollatorForLanguageModeling):
    """TRL's own, which also says as numbers where documents begin: to read a tensor, a GPU would have to stop."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch, with the places where its documents begin, and its end."""
        batch: dict[str, Any] = super().torch_call(examples)
        return batch | {"document_bounds": tuple(batch["cu_seq_lens_q"].tolist())}


def attend_within_documents(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    document_bounds: tuple[int, ...] = (),
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`sdpa` of transformers 5.23, one document after the other where a row packs several.

    There it takes the whole row, in which the mask hides all other documents: the square of the batch's tokens, as TRL
    flattens a batch into one row. The mask's blocks on the diagonal say the rest, as a sliding window.

    Args:
        module: The attention layer.
        query: `(1, heads, tokens, head size)`, as key and value.
        key: See query.
        value: See query.
        attention_mask: `(1, 1, tokens, tokens)`; None where there is one document.
        document_bounds: See `DocumentCollator`.
        kwargs: Of transformers' function.

    Returns:
        `(1, tokens, heads, head size)`, and no weights.
    """
    if attention_mask is None or len(document_bounds) < 3 or torch.compiler.is_compiling():
        whole: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return whole
    parts = []
    for start, end in pairwise(document_bounds):
        queries, keys, values = (tensor[:, :, start:end] for tensor in (query, key, value))
        mask = attention_mask[:, :, start:end, start:end]
        parts.append(sdpa_attention_forward(module, queries, keys, values, mask, **kwargs)[0])
    return torch.cat(parts, dim=1), None


def scores_only_learned(device: torch.device) -> bool:
    """Whether TRL 1.16 leaves tokens that are not learned out of its loss: on a GPU it does, on a CPU it should.

    It keeps them where shapes that change are compiled anew (`patch_fused_lm_head`), which a CPU doesn't do.
    """
    return device.type == "cpu" or bool(_use_triton(device))
