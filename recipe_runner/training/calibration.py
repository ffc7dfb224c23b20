"""LoRA's initialisations that look at data or at the plain weights before training: EVA, CorDA, LoRA-GA, LoftQ."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import initialize_lora_eva_weights
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from peft.utils.loftq_utils import _low_rank_decomposition, _SafetensorLoader
from safetensors import SafetensorError
from torch.nn.functional import pad

from recipe_runner.data.prepare import input_ids_of
from recipe_runner.problems.errors import first_line, user_error
from recipe_runner.recipe.sections import ModelSection
from recipe_runner.training.prepare import Prepared

ROWS = 128  # of the training data that are looked at. CorDA's paper (arXiv 2406.05223) takes 256 of 2,048 tokens
MOST_BATCHES = 1000  # for EVA; some ten are usual
PLACE = ("peft", "init_lora_weights")


def collect_batches(stage: Any, prepared: Prepared) -> list[dict[str, torch.Tensor]]:
    """The first rows of the training data, one a batch: `input_ids`, `attention_mask`, `labels`, each `(1, sequence)`.

    Of a packed row, its first document: the others would be read as its continuation. Of a pair, the better answer.
    """
    dataset, batches = prepared.train.dataset, []
    for row in dataset.select(range(min(ROWS, len(dataset)))):
        tokens = input_ids_of(stage, row)
        end = row["seq_lengths"][0] if row.get("seq_lengths") else len(tokens)
        end = min(end, prepared.config.max_length or end)
        ids = torch.tensor([tokens[:end]])
        labels = torch.tensor([row["labels"][:end]]) if "labels" in row else ids
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return batches


def look_at_data(loaded: Any, peft_config: Any, batches: list[dict[str, torch.Tensor]]) -> Any:
    """Makes CorDA's and LoRA-GA's passes over the data, which leave what they found in the layers of the base.

    Args:
        loaded: The base; PEFT takes a part of its weights when it makes the adapter.
        peft_config: The adapter's configuration.
        batches: Rows.

    Returns:
        The configuration with the names of its targets, which PEFT's passes need.

    Raises:
        UserError: PEFT can't use what it found.
    """
    config: Any = _maybe_include_all_linear_layers(peft_config, loaded)

    def run(step: Callable[[Any], None]) -> None:
        for batch in batches:
            step(loaded(**{name: tensor.to(loaded.device) for name, tensor in batch.items()}, use_cache=False))

    try:
        if config.init_lora_weights == "corda":
            with torch.no_grad():
                preprocess_corda(loaded, config, run_model=lambda: run(lambda found: None))
        else:
            preprocess_loraga(loaded, config, lambda: run(lambda found: found.loss.backward()))
    except (ValueError, RuntimeError) as error:
        name = config.init_lora_weights
        raise user_error("initialisation", f"{name}: {first_line(error)}", "take more data", path=PLACE) from error
    loaded.zero_grad(set_to_none=True)
    return config


def finish_initialisation(
    trained: Any, asked: str, batches: list[dict[str, torch.Tensor]], model: ModelSection
) -> None:
    """Makes the initialisations that need the adapter to be there: EVA's from data, LoftQ's from the plain weights.

    Afterwards it is an adapter like any other, and is saved as one.

    Args:
        trained: The base with its new adapter.
        asked: `init_lora_weights` of the recipe.
        batches: Rows, for EVA.
        model: Where the plain weights are, for LoftQ.

    Raises:
        UserError: The plain weights can't be read.
    """
    config = trained.active_peft_config
    if asked == "eva":
        _begin_at_main_directions(trained, config, batches)
    else:
        _begin_at_quantization_error(trained, model)
    config.eva_config, config.init_lora_weights = None, True


def _begin_at_main_directions(trained: Any, config: Any, batches: list[dict[str, torch.Tensor]]) -> None:
    """EVA: each adapter begins with the main directions of what its layer is given, and ranks go where they say most.

    Source: arXiv 2410.07170. PEFT 0.21 takes batches until the directions stand still, and leaves out a batch with
    fewer tokens than it looks for: without a limit it would go on for ever.
    """
    most = max([config.r, *config.rank_pattern.values()])
    wanted = round(most * config.eva_config.rho)
    masked = config.eva_config.use_label_mask
    grouped = _group_rows(batches, wanted, "labels" if masked else "attention_mask", config.eva_config.label_mask_value)
    if not grouped:
        counted = "learned " * masked
        message = f"eva looks for {wanted} directions, and {len(batches):,} rows have fewer {counted}tokens in all"
        raise user_error("initialisation", message, "lower peft.r, or take more data", path=PLACE)

    before = {parameter.dtype for parameter in trained.parameters() if parameter.requires_grad}
    moved = [{name: tensor.to(trained.device) for name, tensor in batch.items()} for batch in grouped]
    initialize_lora_eva_weights(trained, _Limited(moved), gather_distributed_inputs=False, show_progress_bar=False)
    for parameter in trained.parameters():
        if parameter.requires_grad and len(before) == 1:
            parameter.data = parameter.data.to(next(iter(before)))


class _Limited(list[dict[str, torch.Tensor]]):
    """Batches that are gone through again and again, but not for ever."""

    taken = 0

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Counts what is taken.

        Raises:
            UserError: Too much was.
        """
        for batch in super().__iter__():
            self.taken += 1
            if self.taken > MOST_BATCHES:
                message = f"eva's directions still move after {MOST_BATCHES} batches"
                raise user_error("initialisation", message, "lower peft.eva_config.tau or peft.r", path=PLACE)
            yield batch


def _group_rows(
    batches: list[dict[str, torch.Tensor]], wanted: int, key: str, masked: int
) -> list[dict[str, torch.Tensor]]:
    """Rows put together, padded on the right, until each batch has a number of tokens that count."""
    fill = {"input_ids": 0, "attention_mask": 0, "labels": masked}
    grouped, rows, count = [], [], 0
    for row in batches:
        rows.append(row)
        count += int((row[key] != (masked if key == "labels" else 0)).sum())
        if count >= wanted:
            length = max(row["input_ids"].shape[1] for row in rows)
            grouped.append(
                {
                    name: torch.cat([pad(row[name], (0, length - row[name].shape[1]), value=value) for row in rows])
                    for name, value in fill.items()
                }
            )
            rows, count = [], 0
    return grouped


def _begin_at_quantization_error(trained: Any, model: ModelSection) -> None:
    """LoftQ's first step: each adapter begins as the best low-rank part of what 4 bits lose of its layer's weights.

    PEFT 0.21's own `replace_lora_weights_loftq` computes on a GPU only (utils/loftq_utils.py, _loftq_init_new); this
    is the same on any device. Source: arXiv 2310.08659, algorithm 1, with one iteration.
    """
    from bitsandbytes.functional import dequantize_4bit  # a second, for quantized models only
    from peft.tuners.lora import Linear4bit

    try:
        name = model.name_or_path
        folder = model.folder or Path(snapshot_download(name, revision=model.revision, local_files_only=True))
        plain = _SafetensorLoader(trained, str(folder))
        for name, module in trained.named_modules():
            if isinstance(module, Linear4bit):
                packed = module.get_base_layer().weight
                weight = plain.get_tensor(name.removeprefix("base_model.model.") + ".weight")
                lost = weight.to(packed.device, torch.float32) - dequantize_4bit(packed.data, packed.quant_state)
                rank, scaling = module.r["default"], module.scaling["default"]
                parts = _low_rank_decomposition(lost.float(), reduced_rank=rank)
                for side, part in ((module.lora_B, parts["L"] / scaling), (module.lora_A, parts["R"])):
                    side["default"].weight.data = part.to(side["default"].weight).contiguous()
    except (OSError, SafetensorError, KeyError) as error:
        message = f"loftq needs the plain weights as safetensors: {first_line(error)}"
        raise user_error("initialisation", message, "take another initialisation", path=PLACE) from error
