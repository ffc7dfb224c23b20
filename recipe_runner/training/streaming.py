"""A run on data that is streamed: what each process reads, and where it goes on when it is resumed."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Features, IterableDataset
from transformers import TrainerCallback

from recipe_runner.data.marks import COLUMN as SOURCES
from recipe_runner.data.stream import Position, Reader, stream
from recipe_runner.files import write_json
from recipe_runner.problems.errors import user_error
from recipe_runner.training.prepare import Prepared

FILE = "stream-{}.json"  # of a checkpoint: where a process was


def open_stream(
    prepared: Prepared, features: Features, checkpoint: Path | None
) -> tuple[IterableDataset, list[Reader]]:
    """The training data of a trainer, and the readers of all processes, of which each uses its own.

    Raises:
        UserError: The checkpoint does not say where its processes were.
    """
    count = prepared.config.world_size
    prepared.config.ignore_data_skip = True  # a reader begins where it was
    readers = []
    for number in range(count):
        position, skip = Position(), 0
        if checkpoint:
            file = checkpoint / FILE.format(number)
            try:
                values = json.loads(file.read_text(encoding="utf-8"))
                position, skip = Position.from_json(values["position"]), int(values["skip"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                message = f"{file} does not say where the run was in its data"
                raise user_error("not-a-run", message, "start a new run: --resume never") from error
        readers.append(Reader(prepared.job, number, count, prepared.known, SOURCES in features, position, skip))
    return stream(readers, features), readers


class Follow(TrainerCallback):
    """Keeps where each process is in its data, and says in the end what was read.

    transformers 5.23 reads the data again up to where it was; here a reader goes on by itself, so that random numbers,
    too, are set here.
    """

    def __init__(self, trainer: Any, readers: Sequence[Reader], checkpoint: Path | None) -> None:
        self.trainer, self.reader = trainer, readers[trainer.args.process_index]
        self.checkpoint = checkpoint
        self.given = self.reader.begin.given + self.reader.skip

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Sets the random numbers of the checkpoint, once the first batches are there."""
        if self.checkpoint:
            self.trainer._load_rng_state(str(self.checkpoint))
            self.checkpoint = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Counts the rows of the step."""
        self.given += args.per_device_train_batch_size * args.gradient_accumulation_steps

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes where this process is into the checkpoint."""
        position, skip = self.reader.find(self.given)
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        write_json(folder / FILE.format(args.process_index), {"position": position.as_json(), "skip": skip})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Says what was read."""
        of = f" (process 0 of {args.world_size})" if args.world_size > 1 else ""
        if args.process_index == 0:
            print(f"  data: {self.reader.now.describe()}{of}", flush=True)
