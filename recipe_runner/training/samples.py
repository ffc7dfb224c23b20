"""Answers while a model trains, and the golden rows when it is done."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import TrainerCallback
from trl.models.utils import unwrap_model_for_generation

from recipe_runner.data.images import WRITTEN
from recipe_runner.data.prompts import Prompt, render, render_prompt
from recipe_runner.data.turns import MARK
from recipe_runner.model.answers import GREEDY, Answer, answer_all, count_context
from recipe_runner.model.load import can_switch_off
from recipe_runner.problems.errors import UserError, first_line
from recipe_runner.problems.problem import Problem, as_warning
from recipe_runner.runs.golden import GoldenRow, write_golden
from recipe_runner.runs.metrics import append_metrics

SHARE = 0.1  # of a run's time that samples may take; the first and the last are always written
GOLDEN_TOKENS = 32  # of each golden answer
LONGEST = 2048  # tokens of a golden prompt
BEFORE = 3  # golden rows that the base answers, too


class Sampler(TrainerCallback):
    """Writes answers into metrics.jsonl, at every evaluation or every so many steps, if they don't take too long.

    Every process of a launch answers: sharded weights need all of them.
    """

    def __init__(
        self, trainer: Any, folder: Path, prompts: Sequence[Prompt], every: str | int, tokens: int, room: int
    ) -> None:
        self.trainer, self.folder, self.every, self.most, self.room = trainer, folder, every, tokens, room
        self.asked, tokenizer = [], tokenizer_of(trainer)
        rendered = [render(prompt, tokenizer) for prompt in prompts]
        self.prompts, self.seen = [ids for ids, _ in rendered], [shown for _, shown in rendered]
        for prompt in prompts:
            content = prompt.content
            text = content if isinstance(content, str) else "\n".join(turn["content"] for turn in content)
            text = text.replace(MARK, WRITTEN)
            self.asked.append({"prompt": text, "wanted": prompt.wanted})
        self.began, self.taken, self.skipped = time.monotonic(), 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begins to measure."""
        self.began = time.monotonic()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes answers."""
        if self.every == "eval":
            self._sample(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes answers."""
        if self.every != "eval" and (state.global_step % int(self.every) == 0 or state.global_step == state.max_steps):
            self._sample(state)

    def _sample(self, state: Any) -> None:
        began, last = time.monotonic(), state.global_step >= state.max_steps
        affordable = torch.tensor(self.taken <= SHARE * (began - self.began), device=self.trainer.args.device).int()
        if self.trainer.args.world_size > 1:  # clocks differ, and all have to do the same
            torch.distributed.all_reduce(affordable, torch.distributed.ReduceOp.MIN)
        if self.taken and not last and not affordable:
            self.skipped += 1
            return
        answers = answer_in_training(self.trainer, self.prompts, self.most, self.room, self.seen)
        self.taken += (seconds := time.monotonic() - began)
        if state.is_world_process_zero:
            told = [asked | {"answer": answer.text} for asked, answer in zip(self.asked, answers, strict=True)]
            entry = {"step": state.global_step, "samples": told, "samples_runtime": round(seconds, 2)}
            append_metrics(self.folder, entry | ({"samples_skipped": self.skipped} if self.skipped else {}))


def tokenizer_of(trainer: Any) -> Any:
    """The tokenizer of a trainer, which is given a vision model's processor."""
    return getattr(trainer.processing_class, "tokenizer", trainer.processing_class)


def answer_in_training(
    trainer: Any, prompts: Sequence[list[int]], tokens: int, room: int, seen: Sequence[Any] = ()
) -> list[Answer]:
    """Greedy answers of a model in training, which goes on as if nothing had been asked; every process has to call it.

    A layer keeps keys and values of all tokens of a batch, as it keeps activations in training: with no more tokens
    than a training batch has, answering takes about as much memory as training did.

    Args:
        trainer: With the model, as the launcher wrapped it.
        prompts: In tokens.
        tokens: The most of an answer.
        room: Tokens of a training batch, or a little more.
        seen: Of each prompt, what it shows; empty where none shows any.
    """
    was_training = trainer.model.training
    with (
        unwrap_model_for_generation(
            trainer.model_wrapped, trainer.accelerator, gather_deepspeed3_params=False
        ) as model,
        trainer.accelerator.autocast(),
        torch.no_grad(),
    ):
        model.eval()
        options = GREEDY | {"max_new_tokens": tokens, "use_cache": True}
        answers = answer_all(model, tokenizer_of(trainer), prompts, len(prompts), room, seen, **options)
    trainer.model.train(was_training)
    return answers


def can_answer(trainer: Any) -> bool:
    """Whether a model can generate as the launcher has sharded it.

    Not under FSDP; nor virtual tokens under ZeRO-3, where PEFT 0.21 reads them outside of the modules whose hooks would
    gather them: the processes would wait for each other until the timeout.
    """
    config = getattr(trainer.accelerator.unwrap_model(trainer.model), "active_peft_config", None)
    zero3 = trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3
    return not trainer.is_fsdp_enabled and not (zero3 and getattr(config, "is_prompt_learning", False))


def record_golden(trainer: Any, folder: Path, prompts: Sequence[Prompt], plain_base: bool, room: int) -> None:
    """Writes the golden rows of a model that is trained; every process has to call it.

    What a chat template refuses (a system prompt) is left out, and so is what is too long. Weights that FSDP sharded
    answer nothing, and virtual tokens that ZeRO-3 sharded don't, either: see `can_answer`.

    Args:
        trainer: With the trained model.
        folder: The run folder.
        prompts: Of the golden rows.
        plain_base: Whether the base in memory is the plain one, so that it can be asked, too.
        room: Tokens of a training batch; a longer prompt is left out, too.
    """
    tokenizer, context = tokenizer_of(trainer), count_context(trainer.model) or LONGEST
    rendered: list[tuple[Prompt, list[int]]] = []
    for prompt in prompts:
        try:
            tokens = render_prompt(prompt.content, tokenizer, prompt.tools)
        except UserError:
            continue  # of what people may ask, the template takes a part
        if 0 < len(tokens) <= min(LONGEST, room, context - GOLDEN_TOKENS):
            rendered.append((prompt, tokens))
    ids = [tokens for _, tokens in rendered]
    answers: list[Answer] = []
    before: list[Answer] = []
    if ids and can_answer(trainer):
        try:
            answers = answer_in_training(trainer, ids, GOLDEN_TOKENS, room)
            model = trainer.accelerator.unwrap_model(trainer.model)
            if isinstance(model, PeftModel) and plain_base and can_switch_off(model.active_peft_config):
                with model.disable_adapter():
                    before = answer_in_training(trainer, ids[:BEFORE], GOLDEN_TOKENS, room)
        except Exception as error:  # an architecture that can't generate: the result is saved and compared already
            if trainer.args.process_index == 0:
                message = f"the model does not answer: {first_line(error)}"
                print(as_warning(Problem("no-golden-answers", message)), file=sys.stderr)
    if trainer.args.process_index == 0:
        rows = []
        for place, (prompt, tokens) in enumerate(rendered):
            answer = answers[place] if answers else None
            text, messages = (prompt.content, None) if isinstance(prompt.content, str) else (None, prompt.content)
            rows.append(
                GoldenRow(
                    prompt.kind,
                    messages,
                    text,
                    prompt.tools,
                    tokens,
                    answer.tokens if answer else None,
                    bool(answer and answer.ended),
                    answer.text if answer else "",
                    before[place].text if place < len(before) else None,
                    prompt.wanted,
                )
            )
        write_golden(folder, rows)


def record_scores(trainer: Any, folder: Path, prompts: Sequence[Prompt], room: int) -> None:
    """Writes the golden rows of a reward model that is trained: conversations and their scores; see `record_golden`."""
    tokenizer, rows = trainer.processing_class, []
    trainer.model_wrapped.eval()
    for prompt in prompts:
        if isinstance(prompt.content, str):
            continue
        turns = [*prompt.content, {"role": "assistant", "content": prompt.wanted}]
        try:
            tokens = render_prompt(turns, tokenizer, prompt.tools, asks=False)
        except UserError:
            continue
        if 0 < len(tokens) <= min(LONGEST, room):
            batch = torch.tensor([tokens], device=trainer.args.device)
            with torch.no_grad(), trainer.accelerator.autocast():
                score = float(trainer.model_wrapped(input_ids=batch, use_cache=False).logits[0, 0])
            kind, tools = prompt.kind, prompt.tools
            rows.append(GoldenRow(kind, turns, None, tools, tokens, None, False, "", None, "", score))
    if trainer.args.process_index == 0:
        write_golden(folder, rows)
