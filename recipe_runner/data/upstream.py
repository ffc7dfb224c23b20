"""TRL's own preparation of rows, called without a trainer: a trainer would load the weights first."""

import contextlib
import copy
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pyarrow as pa
from datasets import Dataset

from recipe_runner.data.job import Job


def call_preparation(
    trainer: Any, job: Job, rows: list[dict[str, Any]], columns: Iterable[str], *more: Any, **attributes: Any
) -> pa.Table:
    """Tokenizes whole rows by `_prepare_dataset` of a trainer class of TRL.

    Source: trl/trainer/{sft,dpo,kto,reward}_trainer.py 1.16.0; of `self` the method reads only the attributes given
    here, which `test_tokens.py` holds against a real trainer. Its barrier between processes is taken out: `store` lets
    one process prepare and the others wait without a collective, which would time out.

    Args:
        trainer: The class.
        job: For tokenizer and configuration.
        rows: In a layout that it knows.
        columns: Those of what it makes that are wanted.
        more: Its further arguments: they differ between trainers.
        attributes: Of `self`, beside the tokenizer.
    """
    whole = copy.copy(job.config)
    whole.max_length = None  # cutting is counted, so it comes later
    whole.assistant_only_loss = job.dataset.train_on == "assistant"  # SFTTrainer's
    dataset = Dataset.from_dict({key: [row[key] for row in rows] for key in rows[0]})
    stand_in = SimpleNamespace(_tokenizer=job.tokenizer, **attributes)
    with mock.patch(f"{trainer.__module__}.global_then_local_main_first", contextlib.nullcontext):
        prepared = trainer._prepare_dataset(stand_in, dataset, job.tokenizer, whole, *more)
    return prepared.select_columns(list(columns)).data.table.combine_chunks()
