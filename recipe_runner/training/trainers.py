"""TRL's trainer for a stage, and the places where it is made to do or say what upstream does not."""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from transformers import set_seed

from recipe_runner.data.marks import mark_sources
from recipe_runner.data.pictures import processor_of
from recipe_runner.data.sources import name_sources
from recipe_runner.files import share_path
from recipe_runner.model import base, continuation
from recipe_runner.model.adapter import saves_embeddings, train_in_full_precision
from recipe_runner.model.quantization import build_quantization, forget_8bit_inputs, keep_4bit_weights_trainable
from recipe_runner.model.scoring import score_on_cpu
from recipe_runner.model.unfreeze import freeze_others
from recipe_runner.problems.errors import first_line, refused, user_error
from recipe_runner.recipe.recipe import Recipe
from recipe_runner.recipe.rules.adapter import CHANGING_BASE, FROM_DATA, alters_base
from recipe_runner.recipe.sections import DatasetSection
from recipe_runner.runs.folder import last_checkpoint
from recipe_runner.stages import load_class
from recipe_runner.training import streaming
from recipe_runner.training.calibration import collect_batches, finish_initialisation, look_at_data
from recipe_runner.training.failures import is_damaged_pickle, is_out_of_memory
from recipe_runner.training.mixture import watch_sources
from recipe_runner.training.packing import PackingCheck, split_attention
from recipe_runner.training.prepare import Prepared
from recipe_runner.training.reward_models import find_trained, load_trained
from recipe_runner.training.rewards import Reward, build_rewards

REFERENCE = "ref"  # TRL's name of the frozen copy of an adapter that is trained further


def build_trainer(recipe: Recipe, prepared: Prepared, checkpoint: Path | None = None) -> Any:
    """Hands everything to TRL, which loads the weights, quantizes them and puts the adapter on.

    Args:
        recipe: The recipe.
        prepared: Everything but the weights.
        checkpoint: From which the run goes on.

    Raises:
        UserError: The weights can't be loaded.
    """
    name, cls, config = recipe.model.name_or_path, load_class(recipe.stage.trainer), prepared.config
    quantization = build_quantization(recipe.quantization.said)
    continued, peft_config = prepared.adapter, prepared.peft_config
    if alters_base(recipe.peft) and not continued:
        set_seed(config.seed)  # the same part of the base's weights when the run is resumed
    begun = "" if continued else str(recipe.peft["init_lora_weights"])
    batches = collect_batches(recipe.stage, prepared) if begun in FROM_DATA else []
    mixed = recipe.stage.shape == "tokens" and len(recipe.dataset.sources) > 1
    if recipe.dataset.images:
        _take_images(config, recipe.dataset)
    rewards = build_rewards(recipe, config) if recipe.stage.rewarded else []
    more = _find_judges(recipe, config, rewards)
    datasets = {
        split: mark_sources(of.dataset, of.order) if mixed else of.dataset for split, of in prepared.data.splits.items()
    }
    first_rows = datasets["train"]
    readers: list[Any] = []
    if recipe.dataset.streaming:
        datasets["train"], readers = streaming.open_stream(prepared, first_rows.features, checkpoint)
    try:
        with _taking_prepared(cls), base.refusing_other_weights(recipe.model, scores=recipe.stage.scores):
            model: Any = name
            if continued or recipe.model.adds_tokens or begun in CHANGING_BASE:
                tokens = len(prepared.tokenizer) if recipe.model.adds_tokens else 0
                model = base.load_base(name, tokens, quantization, config, recipe.stage.scores)
            if continued and peft_config:
                model = continuation.load_for_training(model, continued, peft_config, quantization, config)
            if begun in CHANGING_BASE:
                peft_config = look_at_data(model, peft_config, batches)
            trainer = cls(
                model=model,
                args=config,
                train_dataset=datasets["train"],
                eval_dataset=datasets.get("eval"),
                processing_class=processor_of(prepared.tokenizer) or prepared.tokenizer,
                quantization_config=quantization if model is name else None,
                peft_config=None if continued else peft_config,
                **more,
            )
    except (OSError, SafetensorError) as error:
        raise user_error("model-not-loaded", first_line(error), path=("model", "name_or_path")) from error
    except Exception as error:  # weights are read by torch's unpickler, too, which raises anything
        if is_damaged_pickle(error):
            message = f"a file of the weights is damaged: {type(error).__name__}: {first_line(error)}"
            raise user_error("model-not-loaded", message, "fetch it again", path=("model", "name_or_path")) from error
        if is_out_of_memory(error) or not isinstance(error, ImportError | ValueError | RuntimeError | TypeError):
            raise
        section = recipe.peft if peft_config and isinstance(error, TypeError) else recipe.training
        raise refused("peft" if section is recipe.peft else "training", section.said, error) from error
    trainer.first_rows = first_rows
    if readers:
        trainer.add_callback(streaming.Follow(trainer, readers, checkpoint))
    trained = trainer.accelerator.unwrap_model(trainer.model)
    if prepared.unfrozen and not peft_config:
        freeze_others(trained, prepared.unfrozen)
    if not recipe.stage.scores:
        base.drop_idle_flags(trained.generation_config)
    if begun in CHANGING_BASE:  # of the adapter that is saved, which is for the plain base, it is not true
        setattr(trained.active_peft_config, f"{begun}_config", None)
    if begun in ("eva", "loftq"):
        finish_initialisation(trained, begun, batches, recipe.model)
    if peft_config or prepared.unfrozen:
        mixed = config.bf16 or config.fp16
        train_in_full_precision(trained, recipe, bool(quantization or prepared.published), mixed)
    if peft_config:
        for adapter in trained.peft_config.values():
            adapter.base_model_name_or_path = share_path(name)
            if recipe.stage.scores:  # PEFT 0.21 adds names of heads each time that it meets a configuration
                adapter.modules_to_save = [*dict.fromkeys(n for n in adapter.modules_to_save if n != "classifier")]
            if getattr(adapter, "tokenizer_name_or_path", None):  # of a prompt that begins with a text
                adapter.tokenizer_name_or_path = share_path(name)
        trained.create_or_update_model_card = lambda *args: None  # an empty form: training/card.py writes ours
        saved = saves_embeddings(trained.active_peft_config)
        trained.save_pretrained = functools.partial(trained.save_pretrained, save_embedding_layers=saved)
        if REFERENCE in trained.peft_config:
            _copy_to_reference(trained)
    if recipe.dataset.images:
        _put_images_first(trainer)
    trainer.create_model_card = lambda **kwargs: None
    keep_4bit_weights_trainable(trainer.model)
    if recipe.quantization["load_in_8bit"]:
        forget_8bit_inputs()
    _keep_length(trainer)
    if getattr(trainer, "aux_loss_enabled", False):  # TRL asks for them in each pass; answering can't do with them
        trained.config.get_text_config().output_router_logits = False
    score_on_cpu()
    if "seq_lengths" in prepared.train.dataset.column_names:
        split_attention(trainer)
        trainer.add_callback(PackingCheck(trainer, name))
    trainer.rewards = rewards
    if mixed:
        watch_sources(trainer, name_sources(recipe.dataset.sources))
    return trainer


def _take_images(config: Any, dataset: DatasetSection) -> None:
    """Has TRL's vision path learn what the recipe says: it builds labels itself, as its collator makes a batch."""
    config.remove_unused_columns = False  # rows are made when they are read: transformers would take what they are of
    if hasattr(config, "assistant_only_loss"):
        config.assistant_only_loss = dataset.train_on == "assistant"
        config.completion_only_loss = dataset.train_on not in ("all", "assistant")


def _put_images_first(trainer: Any) -> None:
    """Has batches begin with rows that have images.

    transformers 5.23's Idefics3Processor (SmolVLM) fails at others where it marks the assistant's tokens: it makes
    tensors of what it should leave as it is (`skip_tensor_conversion`), unless the first row has an image.
    """
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: collate(sorted(rows, key=lambda row: not row["images"]))


@contextlib.contextmanager
def _taking_prepared(cls: Any) -> Iterator[None]:
    """Has TRL's trainer take rows as they are; one that generates prepares none."""
    if not hasattr(cls, "_prepare_dataset"):
        yield
        return
    with mock.patch.object(cls, "_prepare_dataset", lambda self, dataset, *rest: dataset):
        yield


def _find_judges(recipe: Recipe, config: Any, rewards: Sequence[Reward]) -> dict[str, Any]:
    """What judges the answers that the model makes while it trains: its rewards, or its teacher."""
    if recipe.stage.taught:
        name = str(recipe.model.teacher)
        place: dict[str, Any] = {"trust_remote_code": recipe.model.trust_remote_code}
        place |= {"revision": recipe.model.teacher_revision} if recipe.model.teacher_revision else {}
        return {"teacher_model": load_trained(find_trained(name, ("model", "teacher")), config, **place)[0]}
    if not rewards:
        return {}
    config.reward_weights = [one.weight for one in rewards]
    judges, tokenizers = [one.judge for one in rewards], [one.tokenizer for one in rewards]
    return {"reward_funcs": judges, "reward_processing_classes": tokenizers}


def _copy_to_reference(trained: Any) -> None:
    """Makes the reference of a stage that goes on from an adapter what the adapter is now.

    TRL 1.16 (DPOTrainer.__init__) copies what has `.default.` in its name: of methods whose names end with `.default`
    (IA3, VeRA, BOFT, OFT, ...) nothing, so that their reference would be an adapter that was never trained.
    """
    tensors = dict(trained.named_parameters(remove_duplicate=False)) | dict(trained.named_buffers())
    with torch.no_grad():
        for name, tensor in tensors.items():
            parts = name.split(".")
            copy = tensors.get(".".join(REFERENCE if part == "default" else part for part in parts))
            if "default" in parts and copy is not None:
                copy.data.copy_(tensor)


def _keep_length(trainer: Any) -> None:
    """Keeps the column `length`, by which transformers groups rows that have no `input_ids` to measure.

    TRL 1.16 lists the columns that a trainer needs, without this one.
    """
    if "length" in trainer.first_rows.column_names:
        trainer._set_signature_columns_if_needed()
        trainer._signature_columns.append("length")


def watch_gradients(trainer: Any, folder: Path) -> None:
    """Ends the run before a loss or gradient that is not finite reaches the weights, and so the next checkpoint.

    Notes in `trainer.learned` whether any gradient was other than zero; it is not there when no step was taken.

    transformers 5.23 replaces such losses in its log (logging_nan_inf_filter) and trains on; as this looks at every
    batch twice, and makes a GPU wait each time, it is switched off. What is found here stays on the device, and is
    read once before each step of the optimizer. With float16 the gradient scaler deals with gradients that overflow,
    so only the loss is looked at.
    """
    training_step, get_grad_norm = trainer.training_step, trainer._get_grad_norm
    trainer.args.logging_nan_inf_filter = False
    losses: list[torch.Tensor] = []  # of the batches of a step: whether they are not finite

    def fail(what: str) -> None:
        checkpoint = last_checkpoint(folder)
        kept = f"the last good checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet"
        fix = "lower training.learning_rate, add training.warmup_steps, or look at the rows of this step"
        raise user_error(
            "non-finite", f"the {what} of step {trainer.state.global_step + 1} is not a finite number; {kept}", fix
        )

    def checked_step(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = training_step(*args, **kwargs)
        losses.append(~torch.isfinite(loss).all())
        return loss

    def checked_norm(*args: Any, **kwargs: Any) -> Any:
        norm = get_grad_norm(*args, **kwargs)
        found = torch.stack(losses).any()
        losses.clear()
        if norm is not None:
            size = torch.as_tensor(norm, device=found.device, dtype=torch.float32)
            found = torch.stack([found, ~torch.isfinite(size), size > 0])
        lost, unbounded, learned = found.tolist() if norm is not None else (bool(found), False, None)
        if lost:
            fail("loss")
        if unbounded and not trainer.args.fp16:
            fail("gradient")
        if norm is not None:
            trainer.learned = learned or getattr(trainer, "learned", False)
        return norm

    trainer.training_step, trainer._get_grad_norm = checked_step, checked_norm


def load_by_conversion(trainer: Any) -> None:
    """Loads the weights of a checkpoint by the names that they have in files, where those are others than in memory.

    transformers 5.23 writes the weights of some architectures (experts of a mixture, GPT-NeoX's head) under other names
    than they have in memory, but takes a checkpoint's names as they are, when a run is resumed and when the best
    checkpoint is loaded: what has another name would keep its value.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    if isinstance(model, PeftModel) or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return
    resume, best = trainer._load_from_checkpoint, trainer._load_best_model

    def load(folder: str | Path, usual: Callable[[], None]) -> None:
        if names_of_weights(Path(folder)) <= model.state_dict().keys():
            usual()
            return
        kinds = {parameter.dtype for parameter in model.parameters()}
        dtype = kinds.pop() if len(kinds) == 1 else torch.float32
        loaded = type(model).from_pretrained(folder, config=copy.deepcopy(model.config), dtype=dtype)
        model.load_state_dict(loaded.state_dict())

    def load_from_checkpoint(folder: str, *args: Any, **kwargs: Any) -> None:
        load(folder, lambda: resume(folder, *args, **kwargs))

    trainer._load_from_checkpoint = load_from_checkpoint
    trainer._load_best_model = lambda: load(trainer.state.best_model_checkpoint, best)


def names_of_weights(folder: Path) -> set[str]:
    """Names of the tensors in the weights' files of a folder."""
    names: set[str] = set()
    for file in folder.glob("model*.safetensors"):
        with safe_open(file, "pt") as tensors:
            names.update(tensors.keys())
    return names


def keep_dtypes_on_resume(trainer: Any) -> None:
    """Keeps the adapter of a quantized base in bfloat16 when a checkpoint is loaded.

    TRL 1.16 trains it in bfloat16; transformers 5.23 resumes through PEFT's load_adapter, which casts it to float32, so
    that a resumed run would go on differently. `test_run.py` holds that it goes on the same.
    """
    load, dtypes = trainer._load_from_checkpoint, {name: p.dtype for name, p in trainer.model.named_parameters()}

    def load_and_cast(*args: Any, **kwargs: Any) -> None:
        load(*args, **kwargs)
        for name, parameter in trainer.model.named_parameters():
            parameter.data = parameter.data.to(dtypes[name])

    trainer._load_from_checkpoint = load_and_cast
