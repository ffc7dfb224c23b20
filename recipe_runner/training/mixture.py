"""The loss of each source of a mixture, of training and of held-out rows, from one run; also of packed rows."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from recipe_runner.data.marks import COLUMN

NONE = -1  # of padding


class SourceCollator:
    """The trainer's collator, which also says of each token of a batch of which source it is: `(batch, sequence)`."""

    def __init__(self, collate: Any) -> None:
        self.collate = collate

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["collate"], name)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch."""
        rows = [dict(example) for example in examples]
        sources: list[Any] = [row.pop(COLUMN, None) for row in rows]
        lengths: list[Any] = [row.pop("document_lengths", None) or row.get("seq_lengths") for row in rows]
        batch: dict[str, Any] = self.collate(rows)
        if any(of is None for of in sources):
            return batch
        marks = [np.repeat(of, of_row) for of, of_row in zip(sources, lengths, strict=True)]
        ids = batch["input_ids"]
        if len(ids) < len(marks):  # flattened: one row after the other
            marks = [np.concatenate(marks)]
        placed = torch.full(ids.shape, NONE)
        for row, of in zip(placed, marks, strict=True):
            row[: len(of)] = torch.from_numpy(of.astype(np.int64))[: len(row)]
        return batch | {COLUMN: placed}


class SourceLosses(TrainerCallback):
    """Logs `loss/NAME` beside each loss, and `eval_loss/NAME` beside each held-out loss."""

    def __init__(self, trainer: Any, names: Sequence[str]) -> None:
        self.trainer, self.names = trainer, names
        self.sums = {mode: self._empty() for mode in ("train", "eval")}
        self.begun = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forgets what was tried before the first step."""
        if not self.begun:
            self.begun, self.sums["train"] = True, self._empty()

    def _empty(self) -> torch.Tensor:
        return torch.zeros(2, len(self.names), dtype=torch.float64)

    def add(self, mode: str, sources: torch.Tensor, outputs: Any) -> None:
        """Adds the losses of a batch, `(batch, sequence - 1)` and perhaps virtual tokens before, by source."""
        places = sources[:, 1:]
        losses, learned = (of[:, -places.shape[1] :] for of in (-outputs.log_probs.detach(), outputs.label_mask))
        known = learned.bool() & (places != NONE)
        for row, values in enumerate((losses, torch.ones_like(losses))):
            made = torch.zeros(len(self.names), dtype=torch.float64, device=values.device)
            made.index_add_(0, places[known], values[known].double())
            self.sums[mode][row] += made.cpu()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Writes the means since the last time into what is logged."""
        for mode, key in (("train", "loss"), ("eval", "eval_loss")):
            if logs is None or key not in logs:
                continue
            total = self.trainer.accelerator.reduce(self.sums[mode].to(args.device), reduction="sum").cpu()
            self.sums[mode] = self._empty()
            for name in dict.fromkeys(self.names):  # one may be there twice: in both splits, or in slices
                loss, tokens = total[:, [other == name for other in self.names]].sum(dim=1).tolist()
                if tokens:
                    logs[f"{key}/{name}"] = loss / tokens


def watch_sources(trainer: Any, names: Sequence[str]) -> None:
    """Makes a trainer of tokens and labels log the loss of each source.

    TRL 1.16 has the log-probability of each token in what the model returns, and makes one mean of them.
    """
    trainer.data_collator = SourceCollator(trainer.data_collator)
    trainer._set_signature_columns_if_needed()
    trainer._signature_columns += [COLUMN, "document_lengths"]
    losses, compute_loss = SourceLosses(trainer, names), trainer.compute_loss

    def by_source(model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        sources, seen = inputs.pop(COLUMN, None), []
        hook = model.register_forward_hook(lambda module, given, made: seen.append(made))
        try:
            found = compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        finally:
            hook.remove()
        if sources is not None and seen and getattr(seen[0], "log_probs", None) is not None:
            losses.add("train" if model.training else "eval", sources, seen[0])
        return found

    trainer.compute_loss = by_source
    trainer.add_callback(losses)
