"""Packing is exact, or refused: documents in one row must not see each other, and need not be looked at together."""

import contextlib
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, TrainerCallback
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from recipe_runner.problems.errors import user_error

TOKENS = 64  # of each of the two documents that are compared
LONG = 4096  # tokens of a row from which on a GPU attends to its documents one by one
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
LOOKED_AT = 100  # packed rows that are searched for one of two documents


class PackingCheck(TrainerCallback):
    """Compares, before the first step, the logits of a document inside a packed row with those that it has alone.

    transformers 5 keeps documents apart by `position_ids`, if the architecture takes them and its attention heeds them.
    Where it does not, a packed row gives what the mixed text gives; that third forward tells what "different" means for
    these weights and this precision.
    """

    def __init__(self, trainer: Any, name: str) -> None:
        self.trainer, self.name = trainer, name

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raises a UserError when documents see each other."""
        documents = self._two_documents()
        if documents is None:
            return  # every row holds one document
        model, (first, second) = kwargs["model"], documents
        training = model.training
        model.eval()
        try:
            alone = self._logits(model, [second])
            packed = self._logits(model, [first, second])
            mixed = self._logits(model, [[*first, *second]])[-len(second) :]
        except TypeError as error:  # an architecture without position_ids
            raise self._refusal(str(error).splitlines()[0]) from error
        finally:
            model.train(training)
        apart = float((packed - alone).abs().max())
        together = float((mixed - alone).abs().max())
        if apart > together / 2:
            raise self._refusal(f"a document's logits change by up to {apart:.2g} when it is packed with another")

    def _two_documents(self) -> tuple[list[int], list[int]] | None:
        for row in self.trainer.first_rows.select(range(min(LOOKED_AT, len(self.trainer.first_rows)))):
            if len(row["seq_lengths"]) > 1:
                border, end = row["seq_lengths"][0], sum(row["seq_lengths"][:2])
                return row["input_ids"][:border][:TOKENS], row["input_ids"][border:end][:TOKENS]
        return None

    def _logits(self, model: torch.nn.Module, documents: list[list[int]]) -> torch.Tensor:
        """Logits `(tokens, vocabulary)` of the last document of a row, by the collator and precision of training."""
        tokens = [token for document in documents for token in document]
        row = {"input_ids": tokens, "labels": tokens, "seq_lengths": [len(document) for document in documents]}
        batch = self.trainer._prepare_inputs(self.trainer.data_collator([row]))
        batch.pop("labels")
        with torch.no_grad(), self.trainer.autocast_smart_context_manager():
            logits: torch.Tensor = model(**batch, use_cache=False).logits[0].float()  # as in SFTTrainer.compute_loss
        return logits[-len(documents[-1]) :]

    def _refusal(self, found: str) -> Exception:
        message = f"packing is not exact for {self.name}: {found}"
        fix = "use training.train_sampling_strategy: group_by_length instead of packing"
        return user_error("packing-not-exact", message, fix, path=("training", "packing"))


def split_attention(trainer: Any) -> None:
    """Attends to the documents of a packed row one by one, where PyTorch's attention would take the whole row."""
    trainer.data_collator = DocumentCollator(**asdict(trainer.data_collator))
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

    On a GPU only rows of `LONG` tokens and more are worth the many small kernels: of 16,229 tokens attention took 72 %
    of an H100's time, of 2,048 the host is the limit. cuDNN is left out, as it plans anew for each length.

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
    device, tokens = query.device.type, query.shape[2]
    if (
        torch.compiler.is_compiling()  # first: what is looked at before would be compiled for each number of documents
        or attention_mask is None
        or len(document_bounds) < 3
        or document_bounds[-1] != tokens
        or (device != "cpu" and tokens < LONG)
    ):
        whole: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return whole
    parts = []
    with sdpa_kernel(KERNELS) if device == "cuda" else contextlib.nullcontext():
        for start, end in pairwise(document_bounds):
            queries, keys, values = (tensor[:, :, start:end] for tensor in (query, key, value))
            mask = attention_mask[:, :, start:end, start:end]
            parts.append(sdpa_attention_forward(module, queries, keys, values, mask, **kwargs)[0])
    return torch.cat(parts, dim=1), None
