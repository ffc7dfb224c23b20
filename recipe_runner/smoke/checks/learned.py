"""Checks of what is learned: rows, masks, the loss."""

import contextlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from recipe_runner.data.tables import IGNORED
from recipe_runner.model.load import load_result
from recipe_runner.recipe.rules.adapter import alters_base
from recipe_runner.runs.metrics import COMPLETIONS, read_metrics
from recipe_runner.smoke.checks.done import Done, Found, count_experts, shape_of
from recipe_runner.smoke.checks.prepared import work_out_sequences
from recipe_runner.smoke.rows import Wanted, squeeze
from recipe_runner.smoke.shrink import SPLITTING
from recipe_runner.smoke.watch import score_batch, split_documents
from recipe_runner.stages import STAGES

Document = tuple[list[int], list[int]]  # tokens and labels
IN_A_ROW = 4  # held-out rows that follow each other: not by chance
MOST_ROWS = 200  # prepared rows that are looked at
MIXED = 0.5  # share of what a document would see of another, above which it does; rounding gives some
APART = 10  # times what two numbers may differ: of the logits of a document in a packed row, each by itself
LONG = 20  # characters of an answer that stands in no other text by chance
REWARD = next(key for stage in STAGES.values() if stage.rewarded for key in stage.shown)  # as it is logged
MOVED = 0.05  # standard deviation of what is added to weights, so that a model differs from its reference
# Methods that change nothing when they begin.
BEGINS_AT_BASE = ("lora", "adalora", "bottleneck", "ia3", "vera", "hira", "oft", "boft", "ln_tuning", "road")


def check_rows(done: Done) -> Found:
    """The trainer has the rows that the recipe says, and none is in both splits."""
    counted = done.seen.prepared.train.accounting
    section = done.small.recipe.dataset
    read = min(done.small.rows["train"], section.train[0].limit or done.small.rows["train"])
    weighted = any(source.weight is not None for source in section.train)
    expected = read - max(1, round(read * section.fraction)) if section.fraction else read
    if len(section.train) == 1 and not weighted and counted.rows_read != expected:
        yield f"{counted.rows_read} rows were read to train on, not {expected}"
    yield from _check_held_out(done, read - expected)
    if (
        counted.rows_truncated
        and done.recipe.training["packing"]
        and done.recipe.training["packing_strategy"] == "bfd_split"
    ):
        yield f"{counted.rows_truncated} rows were cut, and bfd_split loses nothing"
    lost = counted.rows_read - counted.rows_kept
    if lost > counted.rows_read * section.max_dropped:
        yield f"{lost} of {counted.rows_read} rows were dropped: {', '.join(counted.dropped)}"
    if counted.rows_truncated > counted.rows_kept / 2:
        yield f"{counted.rows_truncated} of {counted.rows_kept} rows lost tokens at max_length"


def _check_held_out(done: Done, taken: int) -> Found:
    """The evaluation rows are those of their own sources, or those that were taken from the training rows."""
    section, evaluation = done.small.recipe.dataset, done.seen.prepared.evaluation
    if not section.has_eval:
        return
    if done.seen.trainer.eval_dataset is None:
        yield "the trainer has no evaluation data"
        return
    counted = evaluation.accounting
    expected = taken if section.fraction else done.small.rows["eval"]
    if not any(source.limit for source in section.eval) and counted.rows_read != expected:
        yield f"{counted.rows_read} rows were read to evaluate on, not {expected}"
    places = np.sort(evaluation.order[:, 1]) if section.fraction and len(section.train) == 1 else np.empty(0)
    if len(places) >= IN_A_ROW and (np.diff(places) == 1).all():
        told = f"rows {places[0] + 1} to {places[-1] + 1} of the data"
        yield f"the rows that are held out are not drawn at random: {told}"
    trained, held = (
        _read_rows(table.with_format(None))
        for table in (done.seen.trainer.train_dataset, done.seen.trainer.eval_dataset)
    )
    if len(held) != (counted.packed_rows or counted.rows_kept):
        yield f"{len(held)} rows are evaluated, not {counted.packed_rows or counted.rows_kept}"
    repeated = "sample" in done.small.told or ("made-up" in done.small.told and not section.fraction)
    if not repeated and set(held) <= set(trained):
        yield "every row that is held out is trained on, too"


def _read_rows(table: Any) -> list[tuple[int, ...]]:
    """The tokens of all rows."""
    names = ("prompt_ids", "chosen_ids", "completion_ids", "input_ids", "image_hashes")
    columns = [name for name in names if name in table.column_names]
    return [tuple(itertools.chain(*cells)) for cells in zip(*(table[name] for name in columns), strict=True)]


def check_order(done: Done) -> Found:
    """Rows come in the order that the recipe asks for: at random, by length, or as they are."""
    trainer = done.seen.trainer
    sampler = type(trainer._get_train_sampler()).__name__
    wanted = {"group_by_length": "LengthGroupedSampler", "sequential": "SequentialSampler", "random": "RandomSampler"}
    asked = done.recipe.training["train_sampling_strategy"]
    if done.recipe.stage.generates:  # TRL's own, which repeats each prompt for its answers
        asked, wanted["random"] = "random", "_PromptOrder"
    if asked in wanted and sampler != wanted[asked]:
        yield f"training.train_sampling_strategy is {asked}, and rows are drawn by a {sampler}"


def check_mask(done: Done) -> Found:
    """What is learned is the answers, whole, with the token that ends a turn; never padding, never a question."""
    tokenizer = done.seen.prepared.tokenizer
    if not done.seen.batches:
        yield "no batch was seen"
        return
    if done.recipe.stage.generates:
        yield from _check_generated(done, tokenizer)
    if shape_of(done) == "tokens":
        yield from _check_documents(done, _read_documents(done.seen.trainer.train_dataset), tokenizer)
    for batch in done.seen.batches:
        if shape_of(done) == "tokens":
            yield from _check_tokens(done, batch.inputs, tokenizer)
        elif shape_of(done) in ("pairs", "unpaired"):
            yield from _check_answers(done, batch.inputs, tokenizer)


def _check_generated(done: Done, tokenizer: Any) -> Found:
    """What is learned is whole answers of the model's own, up to the token that ends them, to prompts of the data."""
    rows = [row for of in done.small.wanted for row in of.rows]
    asked = {of for row in rows for of in work_out_sequences(row, None, tokenizer, "rows")}
    ends = set(tokenizer.convert_tokens_to_ids(sorted(done.small.stand_in.stops)))
    for batch in done.seen.batches:
        inputs = batch.inputs
        for place, (ids, real) in enumerate(zip(inputs["prompt_ids"], inputs["prompt_mask"], strict=True)):
            if tuple(ids[real.bool()].tolist()) not in asked:
                told = tokenizer.decode(ids[real.bool()])
                yield f"an answer is made to no prompt of the data, as the chat template asks it: {told[-100:]!r}"
                return
            answer, learned = inputs["completion_ids"][place].tolist(), inputs["completion_mask"][place].tolist()
            end = next((at for at, token in enumerate(answer) if token in ends), len(answer) - 1)
            if learned != [1] * (end + 1) + [0] * (len(answer) - end - 1):
                yield f"of an answer of {end + 1} tokens {sum(learned)} are learned"
                return


def check_judged(done: Done) -> Found:
    """The answers that the model makes are judged by the recipe's rewards, each with its weight; all are kept."""
    if not done.recipe.rewards:
        return
    trainer, rewards = done.seen.trainer, done.small.recipe.rewards
    weights = [round(float(weight), 6) for weight in trainer.reward_weights]
    if weights != [round(of.weight, 6) for of in rewards]:
        yield f"the weights of the rewards are {weights}, and the recipe says {[of.weight for of in rewards]}"
    lines = read_metrics(done.seen.folder, COMPLETIONS)
    logged = {entry["step"]: entry[REWARD] for entry in read_metrics(done.seen.folder) if REWARD in entry}
    for step, value in logged.items():
        judged = [entry["rewards"] for entry in lines if entry["step"] == step and entry["split"] == "train"]
        if not judged or any(len(of) != len(rewards) for of in judged):
            yield f"the answers of step {step} are not kept with a number of each of {len(rewards)} rewards"
            return
        sums = [sum(w * (v or 0.0) for w, v in zip(weights, of.values(), strict=True)) for of in judged]
        mean = sum(sums) / len(sums)
        if abs(value - mean) > 1e-3 * max(1.0, abs(value)):
            yield f"the reward of step {step} is {value:.4f}, and its answers have {mean:.4f} on average"
            return


def _read_documents(table: Any) -> list[Document]:
    """Tokens and labels of each document of the first prepared rows."""
    documents: list[Document] = []
    for row in table.with_format(None).select(range(min(len(table), MOST_ROWS))):
        begin = 0
        for length in row.get("seq_lengths") or [len(row["input_ids"])]:
            documents.append(tuple(row[name][begin : begin + length] for name in ("input_ids", "labels")))
            begin += length
    return documents


def _check_tokens(done: Done, inputs: Mapping[str, Any], tokenizer: Any) -> Found:
    ids, labels = inputs["input_ids"], inputs["labels"]
    learned = labels != IGNORED
    if bool((labels[learned] != ids[learned]).any()):
        yield "labels are not the tokens at their place"
        return
    real = inputs.get("attention_mask")
    if real is not None and real.shape == ids.shape and bool(learned[real == 0].any()):
        yield "padding is learned"
    yield from _check_documents(done, split_documents(dict(inputs)), tokenizer)


def _check_documents(done: Done, documents: Sequence[Document], tokenizer: Any) -> Found:
    wanted, training = done.small.wanted, done.recipe.training
    ends = set(tokenizer.convert_tokens_to_ids(sorted(done.small.stand_in.stops)))
    limit = training["max_length"]
    texts = frozenset(_bare(text, tokenizer) for of in wanted for text in of.learned) | _render_answers(done, tokenizer)
    asked = [[_bare(text, tokenizer) for text in texts] for of in wanted for texts in of.asked]
    writes = done.recipe.dataset.format == "segments"  # which hold their ends themselves, or have none
    splits = training["packing"] and training["packing_strategy"] in SPLITTING
    ended = 0
    for tokens, marks in documents:
        begin = repr(tokenizer.decode(tokens)[:100])
        runs = _find_runs(tokens, marks)
        if limit and len(tokens) > limit:
            yield f"a row has {len(tokens)} tokens: training.max_length is {limit}"
            return
        if not runs:
            yield f"nothing is learned of a row: {begin}"
            return
        ended += any(token in ends for run in runs for token in run)
        if wanted[0].whole:
            if sum(map(len, runs)) < len(tokens) - 2:  # a first token is never predicted
                yield f"{len(tokens) - sum(map(len, runs))} of {len(tokens)} tokens of a row are not learned: {begin}"
                return
            continue
        cut = bool(limit and len(tokens) >= limit)
        said = [squeeze(tokenizer.decode(run, skip_special_tokens=True)) for run in runs]
        for run, text in zip(runs, said, strict=True):
            part = (splits and any(text in of for of in texts)) or (cut and any(of.startswith(text) for of in texts))
            if text not in texts and not part:
                yield f"what is learned is no answer of the data: {tokenizer.decode(run)[:100]!r}"
                return
            if not part and not writes and not any(token in ends for token in run):
                yield f"an answer is learned without a token at which the model stops: {tokenizer.decode(run)[-100:]!r}"
                return
        if splits or cut:
            continue
        row = squeeze(tokenizer.decode(tokens, skip_special_tokens=True))
        if asked and not any(all(text in row for text in of) for of in asked):
            yield f"what is asked in the data is not before an answer: {begin}"
            return
        if lost := [text for text in texts if len(text) > LONG and text in row and text not in "".join(said)]:
            yield f"an answer of the data is not learned: {lost[0][:100]!r}"
            return
    whole = any(not limit or len(tokens) < limit for tokens, _ in documents)  # else: parts of long documents
    if whole and not ended and not writes:
        yield f"no token is learned at which the model stops ({', '.join(sorted(done.small.stand_in.stops))})"
    text = squeeze(tokenizer.decode([t for tokens, _ in documents for t in tokens], skip_special_tokens=True))
    if done.recipe.dataset.system and squeeze(done.recipe.dataset.system) not in text:
        yield "the system prompt (dataset.system) is in no row"
    bos = tokenizer.bos_token_id
    if bos is not None and any(tokens[:2] == [bos, bos] for tokens, _ in documents):
        yield "rows begin with two tokens that mark a beginning"


def _render_answers(done: Done, tokenizer: Any) -> frozenset[str]:
    """What is learned of rows with calls of tools or thinking: as the chat template writes it."""
    found: set[str] = set()
    for row in (row for of in done.small.wanted for row in of.rows):
        turns = row.get("messages") or row.get("completion") or []
        if any(isinstance(turn, dict) and turn.keys() & {"tool_calls", "reasoning_content"} for turn in turns):
            ids, labels, *_ = work_out_sequences(row, done.recipe.dataset.train_on, tokenizer)
            found |= {squeeze(tokenizer.decode(run, skip_special_tokens=True)) for run in _find_runs(ids, labels)}
    return frozenset(found)


def _bare(text: str, tokenizer: Any) -> str:
    """A text of the data without the special tokens that it spells."""
    for special in tokenizer.all_special_tokens:
        text = text.replace(special, "")
    return text


def _find_runs(tokens: Sequence[int], labels: Sequence[int]) -> list[list[int]]:
    """Stretches of learned tokens."""
    runs: list[list[int]] = []
    for place, (token, label) in enumerate(zip(tokens, labels, strict=True)):
        if label == IGNORED:
            continue
        if place and labels[place - 1] != IGNORED and runs:
            runs[-1].append(token)
        else:
            runs.append([token])
    return runs


def _check_answers(done: Done, inputs: Mapping[str, Any], tokenizer: Any) -> Found:
    wanted: list[Wanted] = done.small.wanted
    pairs = shape_of(done) == "pairs"
    ids, masks, real = (inputs[name] for name in ("input_ids", "completion_mask", "attention_mask"))
    ends = set(tokenizer.convert_tokens_to_ids(sorted(done.small.stand_in.stops)))
    chosen = frozenset(text for of in wanted for text in of.learned)
    rejected = frozenset(text for of in wanted for text in of.rejected)
    asked = [texts for of in wanted for texts in of.asked]
    if bool((masks.bool() & ~real.bool()).any()):
        yield "padding is learned"
    for place, (row, mask) in enumerate(zip(ids, masks, strict=True)):
        run = row[mask.bool()].tolist()
        limit, length = done.recipe.training["max_length"], int(real[place].sum())
        if limit and length > limit:
            yield f"a row has {length} tokens: training.max_length is {limit}"
            return
        said, is_chosen = squeeze(tokenizer.decode(run, skip_special_tokens=True)), place < len(ids) // 2 or not pairs
        texts = chosen if is_chosen else rejected
        if said not in texts and not any(text.startswith(said) and said for text in texts):
            kind = "chosen" if is_chosen else "rejected"
            yield f"what is learned as {kind} is no {kind} answer of the data: {tokenizer.decode(run)[:100]!r}"
            return
        whole = squeeze(tokenizer.decode(row[real[place].bool()], skip_special_tokens=True))
        if asked and not (limit and length >= limit) and not any(all(text in whole for text in of) for of in asked):
            yield f"the prompt of the data is not before an answer: {tokenizer.decode(row)[:100]!r}"
            return
        if said in texts and not any(token in ends for token in run):
            stops = ", ".join(sorted(done.small.stand_in.stops))
            yield f"an answer is learned without a token at which the model stops ({stops})"
            return


def check_loss(done: Done) -> Found:
    """The first loss is what the definition says, and every loss is a finite number."""
    losses = list(done.seen.losses.values())
    if not losses or not all(math.isfinite(loss) for loss in losses):
        yield f"losses are not finite: {losses}"
        return
    step = min(done.seen.learned, default=None)
    items, learned = done.seen.items.get(step), done.seen.learned.get(step)  # type: ignore[arg-type]
    if done.seen.batches[0].own_loss is not None and learned and (items is None or abs(items - learned) > 1):
        told = "the batch's" if items is None else f"{items:,.0f}"
        yield f"the loss of a step is divided by {told} tokens, and {learned:,} are learned in its batches"
    # What a mixture of experts adds: between the coefficient, and the coefficient times the number of experts.
    mixture = bool(getattr(done.seen.trainer, "aux_loss_enabled", False))
    added = done.seen.trainer.router_aux_loss_coef * count_experts(done.model) if mixture else 0.0
    begins_at_base = not done.recipe.peft or (done.recipe.peft["method"] in BEGINS_AT_BASE and not done.before)
    penalty = _measure_penalty(done) if done.recipe.peft["method"] == "adalora" else 0.0
    for batch in done.seen.batches:
        if batch.own_loss is None:
            continue
        if not begins_at_base and _has_dropout(done):
            continue
        allowed, wanted = done.close_loss * max(abs(batch.own_loss), 1e-3) + added, batch.own_loss + penalty
        if abs(batch.loss - wanted) > allowed:
            yield f"the loss of the first step is {batch.loss:.4f}, and {wanted:.4f} by the definition"
            return
        if batch.mixing is not None and batch.mixing > MIXED:
            yield f"a document of a packed row sees the one before it ({batch.mixing:.0%} of what there is to see)"
            return
        if batch.apart is not None and batch.apart > APART * done.close:
            yield f"a logit of a document in a packed row is {batch.apart:.1%} from the one that it has alone"
            return
    moved = done.seen.batches[0].moved if done.seen.batches else None
    plain = done.recipe.peft and begins_at_base and not done.before and not alters_base(done.recipe.peft)
    if plain and moved is not None and moved > done.close:
        yield f"training begins with logits {moved:.1%} from the base's, and the adapter changes nothing yet"
    if not done.recipe.stage.first_loss or not (begins_at_base or done.before):
        return
    kinds = done.recipe.training["loss_type"]
    kind = next(iter(done.recipe.stage.first_loss), "") if kinds is None else kinds
    kind = kind[0] if isinstance(kind, list) and len(kind) == 1 else kind
    known = done.recipe.stage.first_loss.get(kind) if isinstance(kind, str) else None
    if kind in ("sigmoid", "sigmoid_norm") and shape_of(done) == "pairs":
        yield from _check_pair_loss(done, normalized=kind == "sigmoid_norm")
    first = done.seen.losses.get(1)
    if known is not None and first is not None and abs(first - known) > 0.02:
        yield f"the first loss is {first:.4f}: of a model that still is its reference it is {known:.4f}"


def _measure_penalty(done: Done) -> float:
    """What AdaLoRA adds to the loss of a batch: how far its matrices are from orthogonal, when training begins.

    Source: Zhang et al. 2023, arXiv 2303.10512, equation 4.
    """
    apart = []
    for name, p in done.seen.trainable.items():
        if "lora_A" in name or "lora_B" in name:
            product = p @ p.T if "lora_A" in name else p.T @ p
            apart.append(float(torch.linalg.matrix_norm(product - torch.eye(len(product), device=product.device))))
    weight, batches = done.recipe.peft["orth_reg_weight"], max(done.seen.counts.values())
    return float(weight) * sum(apart) / max(len(apart), 1) / batches


def _check_pair_loss(done: Done, normalized: bool) -> Found:
    """DPO's loss is that of its definition, for a model that differs from its reference.

    Source: Rafailov et al. 2023, arXiv 2305.18290, equation 7; `normalized` by the length of each answer.
    """
    training, model, trainer = done.recipe.training, done.model, done.seen.trainer
    plain = (None, False, 0, 0.0, "reverse_kl")
    special = ("ld_alpha", "f_divergence_type", "label_smoothing", "use_weighting", "precompute_ref_log_probs")
    if any(training[key] not in plain for key in special) or (done.before and done.recipe.quantization):
        return
    inputs = done.seen.batches[0].inputs
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORED)
    batch = {**inputs, "labels": labels}
    was_training = model.training
    model.eval()
    with trainer.autocast_smart_context_manager(), _moved(model):
        found = float(trainer.compute_loss(trainer.model, dict(inputs)))
        tuned = score_batch(model, batch)
        if done.before:
            reference = score_batch(load_result(done.before, None, dtype=model.dtype)[0].eval(), batch)
        elif done.recipe.peft:
            with model.disable_adapter():
                reference = score_batch(model, batch)
        else:
            base = AutoModelForCausalLM.from_pretrained(done.small.stand_in.folder, dtype=model.dtype)
            reference = score_batch(base.to(model.device), batch)
    model.train(was_training)
    gains = [
        (before.loss - after.loss) / (after.tokens if normalized else 1)
        for before, after in zip(reference, tuned, strict=True)
    ]
    half, beta = len(gains) // 2, training["beta"]
    margins = [chosen - rejected for chosen, rejected in zip(gains[:half], gains[half:], strict=True)]
    wanted = sum(math.log1p(math.exp(-beta * margin)) for margin in margins) / half
    if abs(found - wanted) > max(done.close, 1e-3) * max(abs(wanted - math.log(2)), 0.1):
        yield f"DPO's loss is {found:.4f}, and {wanted:.4f} by the definition, with beta {beta:g}"


@contextlib.contextmanager
def _moved(model: Any) -> Iterator[None]:
    """Moves what is trained away from where it is, and back."""
    trained = [p for p in model.parameters() if p.requires_grad]
    kept = [p.detach().clone() for p in trained]
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in trained:
            p.add_((torch.randn(p.shape, generator=random) * MOVED).to(p))
    try:
        yield
    finally:
        with torch.no_grad():
            for p, before in zip(trained, kept, strict=True):
                p.copy_(before)


def _has_dropout(done: Done) -> bool:
    return any(isinstance(m, torch.nn.Dropout) and m.p for m in done.model.modules())
