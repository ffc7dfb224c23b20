"""`golden.jsonl`: ten rows by which a served model is compared with the trained one.

A row is what the model is asked (`messages`, or `text`), the exact tokens of its prompt, and the first tokens of its
greedy answer; of a reward model, a whole conversation, its tokens, and its score. Written when a run is completed.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recipe_runner.files import read_text, write_text
from recipe_runner.problems.errors import first_line, user_error

FILE = "golden.jsonl"
ROWS = 10


@dataclass(frozen=True)
class GoldenRow:
    """What a model is asked, and what it answered when training was over.

    Attributes:
        kind: What is tried: as in the data, with or without a system prompt, several turns.
        messages: The conversation; None for plain text.
        text: Plain text; None for a conversation.
        tools: Descriptions of the tools that the model is offered; None where the data has none.
        prompt_ids: The tokens of the prompt, which a server must make of it, too.
        answer_ids: The first tokens of the greedy answer; None where the weights were sharded over processes.
        ended: Whether the answer ended by itself within those.
        answer: What they say.
        before: What the base answered; None where it was not at hand.
        wanted: The answer in the data.
        score: What a reward model gives `messages`, whose tokens `prompt_ids` are; None for a model that answers.
    """

    kind: str
    messages: list[dict[str, Any]] | None
    text: str | None
    tools: list[dict[str, Any]] | None
    prompt_ids: list[int]
    answer_ids: list[int] | None
    ended: bool
    answer: str
    before: str | None
    wanted: str
    score: float | None = None

    @property
    def content(self) -> list[dict[str, Any]] | str:
        """Turns, or plain text."""
        return self.messages if self.messages is not None else str(self.text)


def write_golden(folder: Path, rows: Sequence[GoldenRow]) -> None:
    """Writes the golden rows into a run folder."""
    text = "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)
    write_text(folder / FILE, text)


def read_golden(folder: Path) -> list[GoldenRow]:
    """The golden rows of a run; none where it has no such file.

    Raises:
        UserError: The file is damaged.
    """
    file = folder / FILE
    if not file.is_file():
        return []
    try:
        return [GoldenRow(**json.loads(line)) for line in read_text(file).split("\n") if line]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        what = "a line has other keys than a golden row" if isinstance(error, TypeError) else first_line(error)
        message = f"{file} is damaged: {what}"
        raise user_error("golden-damaged", message, "restore it, or train again") from error
