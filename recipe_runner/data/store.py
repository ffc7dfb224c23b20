"""Prepared data on disk, addressed by everything that it is made from: prepared once, by one process, used by all.

An entry is a folder `<key>`: `train.arrow`, `eval.arrow` (what the trainer is given), `train.npy`, `eval.npy` (source
and row of each document), `accounting.json`, and `manifest.json` with the checksums of the others, which is written
last. An entry that was cut off or damaged is not used, and made again.
"""

import collections
import contextlib
import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from filelock import FileLock, Timeout
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from recipe_runner.data.accounting import Accounting, Tally, simulate_batches
from recipe_runner.data.job import Job
from recipe_runner.data.pictures import find_files, processor_of
from recipe_runner.data.place import KEYS, store_folder
from recipe_runner.data.prepare import nothing_left, order_rows, prepare_chunks, shape_of
from recipe_runner.data.similar import find_similar, find_similar_among
from recipe_runner.data.sources import Source
from recipe_runner.data.tables import NUMBERS
from recipe_runner.files import FULL, disk_full, hash_file, write_json
from recipe_runner.recipe.local import data_files, is_file_source, list_files
from recipe_runner.workers import count_workers

CODE = Path(__file__).resolve().parent
# Of `training`, what decides on tokens, labels and packing.
MADE_BY = ("trl", "transformers", "tokenizers", "datasets", "recipe-runner")
NAMED = 5  # rows of a warning
END = 2**20  # bytes of the end of a file that is streamed
SLOW_SECONDS, SAY_SECONDS = 2, 10  # when progress is told: from then on; where there is no terminal, this often


@dataclass(frozen=True)
class PreparedSplit:
    """A split ready for the trainer.

    Attributes:
        dataset: Rows of the columns of the stage's shape; of `documents` (places in `order`), and of their lengths:
            `seq_lengths` when they are packed without seeing each other, else `document_lengths`.
        order: Array `(documents, 2)` of source and row in it.
        accounting: What became of its rows.
    """

    dataset: Dataset
    order: np.ndarray
    accounting: Accounting


@dataclass(frozen=True)
class PreparedData:
    """All splits of a recipe.

    Attributes:
        splits: `train`, and `eval` when the recipe evaluates.
        folder: The entry of the store.
        key: Its name: a fingerprint of everything that the data is made from.
        files: Data file -> a hash of it (hub id -> fingerprint).
        made_now: Whether this process made it just now.
        seconds: How long that took, or finding it did.
    """

    splits: dict[str, PreparedSplit]
    folder: Path
    key: str
    files: dict[str, str]
    made_now: bool
    seconds: float


def prepare_data(job: Job) -> PreparedData:
    """The data of a recipe from the store, prepared first when it is not there or not whole.

    One process prepares, others on the machine wait for its lock: no collective waits, so none can time out.

    Raises:
        UserError: The data is at fault.
    """
    began = time.monotonic()
    made_from = describe_origin(job)
    key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:32]
    folder = store_folder() / key
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        made_now = not is_whole(folder)
        if made_now:
            _make(folder, made_from, job)
    splits = _load(folder, job)
    return PreparedData(splits, folder, key, made_from["files"], made_now, time.monotonic() - began)


def describe_origin(job: Job) -> dict[str, Any]:
    """Everything that prepared data is made from, as JSON values: any change of it gives another key."""
    files: dict[str, str] = {}
    streamed = job.sources[: len(job.dataset.train)] if job.dataset.streaming else []
    for source in job.sources:
        if source in streamed:
            files[source.name] = _sign(source)
        elif is_file_source(source.name):
            files |= {str(file): hash_file(file) for file in list_files(source.name)}
        else:
            files[source.name] = source.rows._fingerprint
        if job.dataset.images:
            seen = sorted(set(find_files(source.rows, source.columns, source.name, job.dataset.image_folder)))
            digests = "".join(hash_file(file) for file in seen)
            files[f"images of {source.name}"] = hashlib.sha256(digests.encode()).hexdigest()
    return {
        "stage": job.stage.name,
        "dataset": asdict(replace(job.dataset, max_dropped=0, workers=None)),
        "seed": job.seed,
        "training": {key: getattr(job.config, key, None) for key in KEYS},
        "files": files,
        "tokenizer": hash_tokenizer(job.tokenizer),
        "replaced": asdict(job.replaced) if job.replaced else None,
        "versions": {name: importlib.metadata.version(name) for name in MADE_BY},
        "code": {str(file.relative_to(CODE)): hashlib.sha256(file.read_bytes()).hexdigest() for file in code_files()},
    }


def _sign(source: Source) -> str:
    """A hash of what is known of data that is not read as a whole: its first rows, the sizes and ends of its files."""
    digest = hashlib.sha256(json.dumps(source.rows[:], sort_keys=True, default=str).encode("utf-8", "surrogatepass"))
    for file in data_files(source.name):
        with file.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - END))
            digest.update(f"{file.name} {size}".encode() + stream.read())
    return digest.hexdigest()


def code_files() -> list[Path]:
    """Every file of the code that makes rows: all of this package."""
    return sorted(CODE.rglob("*.py"))


def hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of vocabulary, merges, normalizer, special tokens and chat template."""
    backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(tokenizer.get_vocab())
    special = json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
    parts = f"{type(tokenizer).__name__}{backend}{special}{tokenizer.chat_template}"
    if processor := processor_of(tokenizer):
        parts += f"{type(processor).__name__}{processor.image_processor.to_json_string()}"
    return hashlib.sha256(parts.encode("utf-8", "surrogatepass")).hexdigest()


def is_whole(folder: Path) -> bool:
    """Whether an entry is there, complete, and as it was written."""
    try:
        files = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
        return all(hash_file(folder / name) == digest for name, digest in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # absent, cut off or damaged: it is made again


def _make(folder: Path, made_from: dict[str, Any], job: Job) -> None:
    """Prepares all splits into a new entry; a half-written entry never has the final name."""
    for leftover in (folder, *folder.parent.glob(f"{folder.name}.*.partial")):
        shutil.rmtree(leftover, ignore_errors=True)
    _drop_leftovers(folder.parent)
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        orders = order_rows(job)
        tallies = {split: _write_split(partial, split, order, job) for split, order in orders.items()}
        unused = {source.name: list(source.unused) for source in job.sources if source.unused}
        guessed = {source.name: source.guessed for source in job.sources if source.guessed}
        doubts = [source.doubt for source in job.sources if source.doubt]
        accounting = {
            split: replace(tally.finish(), unused=unused, guessed=guessed, doubts=doubts)
            for split, tally in tallies.items()
        }
        accounting["train"] = replace(accounting["train"], streamed=job.dataset.streaming)
        for split, found in _find_twins(job, tallies).items():
            accounting[split] = replace(accounting[split], **found)
        write_json(partial / "accounting.json", {split: asdict(counted) for split, counted in accounting.items()})
        files = {file.name: hash_file(file) for file in sorted(partial.iterdir())}
        write_json(partial / "manifest.json", {"files": files, "made_from": made_from})
        partial.rename(folder)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in FULL:
            raise disk_full(error.errno, folder.parent, "prepared data is kept there (HF_HOME)") from error
        raise


def _find_twins(job: Job, tallies: Mapping[str, Tally]) -> dict[str, dict[str, Any]]:
    """Split -> what `Accounting` has of rows that are there twice, or nearly: within a split, and between the two."""
    names = ("hash", "source", "row")
    rows = {split: {name: np.concatenate(tally.columns[name]) for name in names} for split, tally in tallies.items()}
    sketches = {split: np.concatenate(tally.sketches) for split, tally in tallies.items()}

    def call(split: str, place: int) -> str:
        source = job.sources[int(rows[split]["source"][place])]
        return f"{source.call_row(int(rows[split]['row'][place]))} of {Path(source.name).name}"

    found: dict[str, dict[str, Any]] = {}
    for split, own in rows.items():
        again = np.ones(len(own["hash"]), dtype=bool)
        again[np.unique(own["hash"], return_index=True)[1]] = False
        found[split] = {"near_duplicates": int(((find_similar(sketches[split]) >= 0) & ~again).sum())}
    if "eval" in rows:
        known, firsts = np.unique(rows["train"]["hash"], return_index=True)
        leaks = np.isin(rows["eval"]["hash"], known)
        like = find_similar_among(sketches["eval"], sketches["train"])
        near = (like >= 0) & ~leaks
        same = firsts[np.searchsorted(known, rows["eval"]["hash"][leaks][:NAMED])]
        found["eval"] |= {
            "rows_in_train": int(leaks.sum()),
            "leaked": [
                f"{call('eval', place)} is {call('train', other)}"
                for place, other in zip(np.flatnonzero(leaks)[:NAMED], same, strict=True)
            ],
            "rows_near_train": int(near.sum()),
            "nearly_leaked": [
                f"{call('eval', place)} is like {call('train', like[place])}" for place in np.flatnonzero(near)[:NAMED]
            ],
        }
    return found


def _drop_leftovers(store: Path) -> None:
    """Removes what killed processes left: half-written entries that nobody holds the lock of."""
    for leftover in store.glob("*.partial"):
        try:
            with FileLock(store / f"{leftover.name.partition('.')[0]}.lock", timeout=0):
                shutil.rmtree(leftover, ignore_errors=True)
        except Timeout:
            continue  # another process is writing it


def _write_split(folder: Path, split: str, order: np.ndarray, job: Job) -> Tally:
    tally = job.tally()
    columns = shape_of(job.stage).COLUMNS | {"document_lengths": NUMBERS, "documents": pa.list_(pa.int64())}
    schema = pa.schema(list(columns.items()))
    with (folder / f"{split}.arrow").open("wb") as stream, pa.ipc.new_stream(stream, schema) as writer:
        workers = count_workers(job.dataset.workers)
        with prepare_chunks(job, split, order, tally, workers) as tables, _progress(split, len(order)) as say:
            for table in tables:
                writer.write_table(table.select(schema.names).cast(schema))
                say(tally.read)
    np.save(folder / f"{split}.npy", order)
    if not tally.columns["length"] or not sum(len(lengths) for lengths in tally.columns["length"]):
        raise nothing_left(split, tally.dropped)
    if split == "train" or job.dataset.eval:  # of what is held out, a small source may have a row or two
        _refuse_lost_sources(split, order, job, tally)
    return tally


def _refuse_lost_sources(split: str, order: np.ndarray, job: Job, tally: Tally) -> None:
    """Refuses a mixture of which a source is gone: it may be less than `max_dropped` of all rows.

    Raises:
        UserError: No row of a source can be used.
    """
    for number in np.setdiff1d(order[:, 0], np.concatenate(tally.columns["source"])):
        lost = job.tally()
        with prepare_chunks(job, split, order[order[:, 0] == number], lost) as tables:
            collections.deque(tables, maxlen=0)
        raise nothing_left(split, lost.dropped, job.sources[number])


@contextlib.contextmanager
def _progress(split: str, total: int) -> Iterator[Callable[[int], None]]:
    """A function that tells how many rows are prepared, how fast, and how long it will take, if it takes seconds."""
    began, due = time.monotonic(), float(SLOW_SECONDS)
    form = f"  {split}: {{n_fmt}} of {{total_fmt}} rows, {{rate_fmt}}, {{remaining}} left"
    bar = tqdm(total=total, bar_format=form, unit=" rows", delay=SLOW_SECONDS, leave=False, disable=None)

    def say(done: int) -> None:
        nonlocal due
        bar.update(done - bar.n)
        seconds = time.monotonic() - began
        if bar.disable and due < seconds and done < total:
            due = seconds + SAY_SECONDS
            left = f"{done / seconds:,.0f} rows/s, {seconds * (total - done) / done:,.0f} s left"
            print(f"  {split}: {done:,} of {total:,} rows, {left}", file=sys.stderr, flush=True)

    with bar:
        yield say


def _load(folder: Path, job: Job) -> dict[str, PreparedSplit]:
    """Opens an entry: data is memory-mapped."""
    told = json.loads((folder / "accounting.json").read_text(encoding="utf-8"))
    splits = {}
    for split, values in told.items():
        dataset = Dataset.from_file(str(folder / f"{split}.arrow"))
        lengths = pc.list_flatten(dataset.data.column("document_lengths")).to_numpy()
        accounting = replace(Accounting(**values), batches=_batches(job, lengths, split))
        dataset = shape_of(job.stage).finish(dataset, accounting, job.config)
        splits[split] = PreparedSplit(dataset, np.load(folder / f"{split}.npy", mmap_mode="r"), accounting)
    return splits


def _batches(job: Job, lengths: np.ndarray, split: str) -> dict[str, float]:
    """What padding costs; nothing is known of answers that are still to be generated."""
    if job.stage.generates:
        return {}
    shares = simulate_batches(lengths, job.config, split)
    return {way: share for way, share in shares.items() if way != "packed" or not job.dataset.images}
