"""A conversation with a model in a terminal: its words as they come, several turns, and a way to stop an answer."""

import shutil
import signal
import textwrap
from collections.abc import Callable
from typing import Any

import torch
from transformers import StoppingCriteria, TextStreamer, set_seed

from recipe_runner.data.prompts import Prompt
from recipe_runner.data.turns import Turns
from recipe_runner.model.answers import read_answer, stop_options
from recipe_runner.problems.errors import UserError
from recipe_runner.problems.words import make_visible
from recipe_runner.results.generation import Asker, warn_of_special

HELP = "/reset begins anew, /exit ends (or Ctrl-D), Ctrl-C ends an answer"
NARROWEST = 70  # columns of a terminal in which two answers stand side by side


class Stopper(StoppingCriteria):
    """Ends an answer at Ctrl-C, after the token that is being made; at a second one, at once."""

    def __init__(self) -> None:
        self.stopped = False

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Whether each row of a batch is done."""
        return torch.full((input_ids.shape[0],), self.stopped, device=input_ids.device, dtype=torch.bool)

    def on_signal(self, number: int, frame: Any) -> None:
        """Notes Ctrl-C."""
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = True


class Words(TextStreamer):
    """transformers' streamer; what a terminal would obey is spelt out."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Prints some words."""
        super().on_finalized_text(make_visible(text), stream_end)


def talk(asker: Asker, compare: bool, read: Callable[[str], str], say: Callable[[str], None]) -> None:
    """Talks until the person ends it.

    Args:
        asker: Who answers.
        compare: Whether the base answers beside it; both are asked the same, with the tuned model's own answers before.
        read: Asks the person for a line; raises EOFError at the end.
        say: Says a line.
    """
    turns: Turns = []
    say(HELP)
    set_seed(asker.seed)
    while True:
        try:
            text = read("> ").strip()
            if text in ("/exit", "/quit"):
                return None
            if text in ("/reset", "/help") or not text:
                turns = [] if text == "/reset" else turns
                say("A new conversation." if text == "/reset" else HELP)
                continue
            posed = asker.pose(text).content
            asked = posed if isinstance(posed, str) else [*turns, *(posed if not turns else posed[-1:])]
            tokens = asker.render(Prompt(asked), "the conversation")
            warn_of_special([text], asker.opened.tokenizer)
            answer = _answer(asker, tokens, compare, say)
            if not isinstance(asked, str):
                turns = [*asked, {"role": "assistant", "content": answer}]
        except EOFError:
            return say("")
        except KeyboardInterrupt:
            say("")
        except UserError as error:
            say(f"{error}; or /reset")


def _answer(asker: Asker, tokens: list[int], compare: bool, say: Callable[[str], None]) -> str:
    """Answers, as words come, or beside the base's answer when both are there."""
    stopper = Stopper()
    before = signal.signal(signal.SIGINT, stopper.on_signal)
    try:
        if not compare:
            return _generate(asker, tokens, stopper, Words(asker.opened.tokenizer, True, skip_special_tokens=True))
        tuned = _generate(asker, tokens, stopper, None)
        with asker.opened.model.disable_adapter():
            base = _generate(asker, tokens, stopper, None)
        say(side_by_side(base, tuned))
        return tuned
    finally:
        signal.signal(signal.SIGINT, before)


def _generate(asker: Asker, tokens: list[int], stopper: Stopper, streamer: TextStreamer | None) -> str:
    model, tokenizer = asker.opened.model, asker.opened.tokenizer
    stops = stop_options(model, tokenizer)
    batch = torch.tensor([tokens], device=model.get_input_embeddings().weight.device)
    made = model.generate(
        input_ids=batch,
        attention_mask=torch.ones_like(batch),
        streamer=streamer,
        stopping_criteria=[stopper],
        **stops,
        **asker.options,
    )
    return read_answer(made[0, len(tokens) :].tolist(), stops["eos_token_id"] or (), tokenizer).text


def side_by_side(base: str, tuned: str, width: int = 0) -> str:
    """Two answers in two columns; one above the other where the terminal is too narrow for two."""
    width = width or shutil.get_terminal_size().columns
    columns = {"base": make_visible(base), "tuned": make_visible(tuned)}
    if width < NARROWEST:
        return "\n".join(f"{name}: {text}" for name, text in columns.items())
    half = (width - 3) // 2
    wrapped = [[name, *_wrap(text, half)] for name, text in columns.items()]
    height = max(map(len, wrapped))
    left, right = ([*lines, *[""] * (height - len(lines))] for lines in wrapped)
    return "\n".join(f"{one:<{half}} | {other}".rstrip() for one, other in zip(left, right, strict=True))


def _wrap(text: str, width: int) -> list[str]:
    return [part for line in text.splitlines() for part in textwrap.wrap(line, width) or [""]]
