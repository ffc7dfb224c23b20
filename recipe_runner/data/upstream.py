"""TRL's own preparation of rows, called without a trainer: a trainer would load the weights first."""

import contextlib
from types import SimpleNamespace
from typing import Any
from unittest import mock

from datasets import Dataset
from transformers import PreTrainedTokenizerBase


def call_preparation(
    trainer: Any, rows: Dataset, tokenizer: PreTrainedTokenizerBase, config: Any, *more: Any, **attributes: Any
) -> Dataset:
    """Calls `_prepare_dataset` of a trainer class of TRL.

    Source: trl/trainer/{sft,dpo,kto,reward}_trainer.py 1.16.0; of `self` the method reads only the attributes given
    here, which `test_tokens.py` holds against a real trainer. Its barrier between processes is taken out: `store` lets
    one process prepare and the others wait without a collective, which would time out.

    Args:
        trainer: The class.
        rows: Rows in a layout that it knows.
        tokenizer: With the chat template that is trained with.
        config: An instance of its configuration class.
        more: Its further arguments: they differ between trainers.
        attributes: Of `self`, beside the tokenizer.
    """
    stand_in = SimpleNamespace(_tokenizer=tokenizer, **attributes)
    with mock.patch(f"{trainer.__module__}.global_then_local_main_first", contextlib.nullcontext):
        prepared: Dataset = trainer._prepare_dataset(stand_in, rows, tokenizer, config, *more)
    return prepared
