"""The only place that imports torch, transformers, trl, peft, datasets and accelerate.

What upstream reads when it is imported is set here, before the modules of this package import it.
"""

import importlib.util
import logging
import os
import sys
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # a run reports to nobody unless training.report_to says so
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the data loader forks

if os.environ.get("RANK", "0") != "0":  # the first process of a launch speaks for all
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "DATASETS_VERBOSITY": "error", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 (as long as the process)

if importlib.util.find_spec("deepspeed"):  # it guesses, and says so in every process, when it finds no GPU
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")

# What upstream says on every run and nobody can act on. bitsandbytes 0.50 asks for a hub kernel on CPUs, and
# says in every layer of every step that 8-bit layers compute in float16; the rest are transformers 5.23 and TRL 1.16
# about their own use of old names, and about features that a machine without a GPU lacks.
for _logger in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
    logging.getLogger(_logger).setLevel(logging.ERROR)
for _message in (
    r".gradient_checkpointing(_disable|_enable)?. is deprecated",
    r".is_gradient_checkpointing. is deprecated",
    r"'pin_memory' argument is set as true but no accelerator is found",
    r"Paged optimizers are not supported on CPU",
    r".torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor|_\w+). is deprecated",  # DeepSpeed 0.19
):
    warnings.filterwarnings("ignore", message=_message)
