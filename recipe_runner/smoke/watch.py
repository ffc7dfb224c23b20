"""What is seen of a run while it trains: batches, losses, gradients, rates; and the weights before the first step."""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import TrainerCallback

from recipe_runner.data.tables import IGNORED
from recipe_runner.model.load import can_switch_off
from recipe_runner.model.scores import Score, score_logits, score_sequences

BATCHES = 2  # of the first step that are kept
ROW = 64  # tokens of a row that an adapter is tried on
OF_ROWS = ("input_ids", "labels", "attention_mask", "position_ids")  # inputs with an entry a row
EVALUATED = 64  # rows at most, of an evaluation that is worked out again


@dataclass
class Batch:
    """One batch of the first step.

    Attributes:
        inputs: As the model was given them.
        items: Learned tokens of the whole step, by which the loss is divided; None where the loss is a plain mean.
        loss: What the trainer made of it.
        own_loss: The same worked out here, from the logits of each document alone; None where it can't be.
        mixing: Of a packed row, how far the second document's logits are from those that it has alone, as a share of
            how far they are when it sees the first; None where no row packs two.
        apart: Of all documents of a packed row, the most that a logit is from the one that the document has alone, as a
            share of the largest; None where none is packed.
        moved: The most that a logit of the first row is from the base's, as a share of the largest; None where there is
            no adapter, or it can't be switched off.
    """

    inputs: dict[str, Any]
    items: float | None
    loss: float
    own_loss: float | None = None
    mixing: float | None = None
    apart: float | None = None
    moved: float | None = None


@dataclass
class Seen:
    """Everything that was seen.

    Attributes:
        trainer: TRL's trainer.
        prepared: What was prepared for it.
        folder: Of the run.
        trainable: Name -> value before the first step.
        frozen: Name -> hash before the first step.
        batches: The first of the first step.
        counts: Batches of each step.
        moved: Names of trainable tensors that had a gradient other than zero in some step.
        left: Steps that began with a gradient that was there already.
        learned: Learned tokens of each step, of all its batches.
        items: What the loss of each step is divided by; a step is missing where the trainer was not told.
        norms: Of the gradient of each step, after it was clipped.
        rates: Learning rates of each step, one a group of parameters.
        losses: As they were logged: step -> loss.
        dropping: Whether layers were in training mode while held-out rows were evaluated.
        resting: Whether layers were not in training mode while batches were learned.
        evaluated: Losses of evaluations.
        own_evaluated: The same worked out here; None where they can't be.
    """

    trainer: Any
    prepared: Any
    folder: Path
    trainable: dict[str, torch.Tensor]
    frozen: dict[str, str]
    batches: list[Batch] = field(default_factory=list)
    counts: dict[int, int] = field(default_factory=dict)
    moved: set[str] = field(default_factory=set)
    left: list[int] = field(default_factory=list)
    learned: dict[int, int] = field(default_factory=dict)
    items: dict[int, float] = field(default_factory=dict)
    norms: list[float] = field(default_factory=list)
    rates: list[list[float]] = field(default_factory=list)
    losses: dict[int, float] = field(default_factory=dict)
    dropping: bool = False
    resting: bool = False
    evaluated: list[float] = field(default_factory=list)
    own_evaluated: list[float | None] = field(default_factory=list)

    @property
    def model(self) -> Any:
        """The model that was trained."""
        return self.trainer.accelerator.unwrap_model(self.trainer.model)


class Watcher(TrainerCallback):
    """Looks at a trainer, and changes nothing. `seen` is there once training begins."""

    def __init__(self) -> None:
        self.seen: Seen | None = None
        self.inside = False  # of a step: the longest batch, which is tried before, does not count
        self.step = 0

    def __call__(self, trainer: Any, prepared: Any, folder: Path) -> None:
        """Begins to watch a trainer. For `run_recipe`."""
        model = trainer.accelerator.unwrap_model(trainer.model)
        trainable = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        self.seen = Seen(trainer, prepared, folder, trainable, hash_frozen(model))
        compute_loss = trainer.compute_loss

        def watched(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            kept = {key: value for key, value in inputs.items() if key != "sources"}
            items = kwargs.get("num_items_in_batch")
            found = compute_loss(model, inputs, *args, **kwargs)
            if self.inside:
                self._note_batch(model, kept, items, found[0] if isinstance(found, tuple) else found)
            return found

        predict = trainer.prediction_step

        def predicting(model: Any, *args: Any, **kwargs: Any) -> Any:
            assert self.seen is not None
            self.seen.dropping |= any(module.training for module in model.modules())
            return predict(model, *args, **kwargs)

        trainer.compute_loss, trainer.prediction_step = watched, predicting
        trainer.add_callback(self)

    def _note_batch(self, model: Any, inputs: dict[str, Any], items: Any, loss: torch.Tensor) -> None:
        assert self.seen is not None
        self.seen.resting |= not all(module.training for module in model.modules())
        self.seen.counts[self.step] = self.seen.counts.get(self.step, 0) + 1
        if "labels" in inputs:
            learned = int((inputs["labels"][..., 1:] != IGNORED).sum())
            self.seen.learned[self.step] = self.seen.learned.get(self.step, 0) + learned
        if items is not None:
            self.seen.items[self.step] = float(items)
        if self.step == self.first and len(self.seen.batches) < BATCHES:
            number = None if items is None else float(items)
            batch = Batch(inputs, number, float(loss.detach()))
            batch.own_loss = compute_own_loss(self.seen.trainer, model, batch)
            batch.mixing, batch.apart = measure_packed(self.seen.trainer, model, inputs)
            if not self.seen.batches:
                batch.moved = measure_moved(self.seen.trainer, model, inputs)
            self.seen.batches.append(batch)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Notes where training begins."""
        self.first = state.global_step + 1

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step begins."""
        self.inside, self.step = True, state.global_step + 1
        assert self.seen is not None
        if any(p.grad is not None and bool(torch.count_nonzero(p.grad)) for p in self.seen.model.parameters()):
            self.seen.left.append(self.step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gradients are there, and clipped."""
        assert self.seen is not None
        grads = {n: p.grad for n, p in self.seen.model.named_parameters() if p.requires_grad and p.grad is not None}
        self.seen.moved |= {name for name, grad in grads.items() if bool(torch.count_nonzero(grad))}
        squares = [grad.detach().float().pow(2).sum() for grad in grads.values()]
        self.seen.norms.append(float(torch.stack(squares).sum().sqrt()) if squares else 0.0)
        optimizer = kwargs["optimizer"]
        self.seen.rates.append([float(group["lr"]) for group in optimizer.param_groups])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step ends."""
        self.inside = False

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Notes losses."""
        assert self.seen is not None
        if logs and "loss" in logs:
            self.seen.losses[state.global_step] = logs["loss"]
        if logs and "eval_loss" in logs:
            self.seen.evaluated.append(logs["eval_loss"])
            self.seen.own_evaluated.append(compute_own_evaluation(self.seen.trainer, self.seen.model))


def hash_frozen(model: Any) -> dict[str, str]:
    """Name -> a hash of each tensor that is not trained, those of quantized weights included."""
    tensors = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    return {name: hash_tensor(tensor) for name, tensor in tensors.items()}


def hash_tensor(tensor: torch.Tensor) -> str:
    """A hash of a tensor's bytes."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.blake2b(flat.numpy().tobytes(), digest_size=16).hexdigest()


def split_documents(inputs: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """Tokens and labels of each document of a batch, without padding; those of a packed row by their positions."""
    ids, labels = inputs["input_ids"], inputs["labels"]
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    documents = []
    for place in range(len(ids)):
        row, learned = ids[place].tolist(), labels[place].tolist()
        if mask is not None and mask.shape == ids.shape:
            real = [bool(of) for of in mask[place].tolist()]
            row = [token for token, is_real in zip(row, real, strict=True) if is_real]
            learned = [label for label, is_real in zip(learned, real, strict=True) if is_real]
        if positions is None:
            documents.append((row, learned))
            continue
        begins = [at for at, position in enumerate(positions[place].tolist()[: len(row)]) if position == 0]
        for begin, end in zip(begins, [*begins[1:], len(row)], strict=True):
            documents.append((row[begin:end], learned[begin:end]))
    return documents


@contextlib.contextmanager
def _evaluating(trainer: Any, model: Any) -> Iterator[None]:
    """Without dropout, gradients, and in the precision of training; the model is then as it was before."""
    modes, trained = [m.training for m in model.modules()], {n: p.requires_grad for n, p in model.named_parameters()}
    for module in model.modules():  # not by `eval`, which is the runner's to call
        module.training = False
    try:
        with torch.no_grad(), trainer.autocast_smart_context_manager():
            yield
    finally:
        for module, mode in zip(model.modules(), modes, strict=True):
            module.training = mode
        for name, parameter in model.named_parameters():  # PEFT 0.21 trains all of an adapter that is switched on again
            parameter.requires_grad_(trained[name])


def compute_logits(model: Any, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """Logits of the first row's text, `(sequence, vocabulary)`, without those of virtual tokens before it."""
    logits: torch.Tensor = model(input_ids=ids, **inputs, use_cache=False).logits[0, -ids.shape[1] :]
    return logits.float()


def score_batch(model: Any, inputs: Mapping[str, Any]) -> list[Score]:
    """Scores each document of a batch alone; of a batch with images each row, beside the others."""
    if not any("pixel" in name for name in inputs):
        return score_sequences(model, split_documents(dict(inputs)))
    other = ("labels", "completion_mask", "use_cache")
    logits = model(**{name: value for name, value in inputs.items() if name not in other}, use_cache=False).logits
    return [score_logits(*row) for row in zip(logits[:, :-1], inputs["labels"][:, 1:], strict=True)]


def compute_own_loss(trainer: Any, model: Any, batch: Batch) -> float | None:
    """The loss of a batch by the definition: the mean negative log-likelihood of learned tokens, each document alone.

    Only for trainers of tokens and labels, with the plain loss. Dropout is off: an adapter that has just begun changes
    nothing, with or without it.
    """
    if "labels" not in batch.inputs or "completion_mask" in batch.inputs:
        return None
    if trainer.args.loss_type != "nll" or trainer.args.label_smoothing_factor or trainer.args.neftune_noise_alpha:
        return None
    with _evaluating(trainer, model):
        scores = score_batch(model, batch.inputs)
    return sum(score.loss for score in scores) / (batch.items or max(sum(score.tokens for score in scores), 1))


def compute_own_evaluation(trainer: Any, model: Any) -> float | None:
    """The loss of an evaluation by the definition: of each row, the mean of its batch, as transformers counts it."""
    if len(trainer.eval_dataset) > EVALUATED or getattr(trainer, "aux_loss_enabled", False):
        return None
    total, rows = 0.0, 0
    for inputs in trainer.get_eval_dataloader():
        if isinstance(inputs, list):  # prompts, which the model is still to answer
            return None
        loss = compute_own_loss(trainer, model, Batch(dict(inputs), None, 0.0))
        if loss is None:
            return None
        total, rows = total + loss * len(inputs["input_ids"]), rows + len(inputs["input_ids"])
    return total / rows


def measure_packed(trainer: Any, model: Any, inputs: dict[str, Any]) -> tuple[float | None, float | None]:
    """How the documents of a packed row differ from what each is alone.

    Returns:
        How much the second document sees of the first: 0 is nothing, 1 is all of it; None where no row packs two. And
        the most that a logit of any document is from the one that it has alone, as a share of the largest; None where
        none is packed.
    """
    if "position_ids" not in inputs or "labels" not in inputs:
        return None, None
    first = {key: inputs[key][:1] for key in OF_ROWS if key in inputs}
    documents = [ids for ids, _ in split_documents(first)]
    device = inputs["input_ids"].device

    def alone(ids: list[int]) -> torch.Tensor:
        return compute_logits(model, torch.tensor([ids], device=device))

    with _evaluating(trainer, model):
        given = {key: value for key, value in inputs.items() if key not in ("input_ids", "labels", "use_cache")}
        packed = compute_logits(model, inputs["input_ids"], **given)
        begins = accumulate(map(len, documents), initial=0)
        own = [alone(ids) for ids in documents]
        apart = [(packed[begin:end] - one).abs() for (begin, end), one in zip(pairwise(begins), own, strict=True)]
        mixing = None
        if len(documents) > 1 and len(documents[1]) > 1:
            mixed = alone([*documents[0], *documents[1]])[len(documents[0]) :]
            far = (mixed - own[1]).abs().mean().clamp(min=1e-12)
            mixing = float(apart[1].mean() / far)
    return mixing, max(float(of.max()) for of in apart) / max(float(packed.abs().max()), 1e-6)


def measure_moved(trainer: Any, model: Any, inputs: dict[str, Any]) -> float | None:
    """How far the logits of a row are from those of the base."""
    plain = trainer.accelerator.unwrap_model(model)
    if not isinstance(plain, PeftModel) or "input_ids" not in inputs or not can_switch_off(plain.active_peft_config):
        return None
    ids = inputs["input_ids"][:1, :ROW]
    with _evaluating(trainer, model):
        adapted = compute_logits(plain, ids)
        with plain.disable_adapter():
            base = compute_logits(plain, ids)
    return float((adapted - base).abs().max()) / max(float(base.abs().max()), 1e-6)
