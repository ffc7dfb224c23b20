"""`recipe-run evaluate`: what a model does on data that it was not trained on, beside its base.

Rows are prepared by the runner's own functions, so that losses are of the tokens that training would learn; answers are
greedy, to the same prompts that a server would make.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from recipe_runner.data.job import Job, read_rows
from recipe_runner.data.prepare import nothing_left, prepare_chunks, shape_of
from recipe_runner.data.prompts import Prompt, few_shot, render, render_prompt, split_row
from recipe_runner.data.shapes.unpaired import take_side
from recipe_runner.data.tables import IGNORED
from recipe_runner.model.answers import GREEDY, Answer, answer_all, check_prompt, count_context
from recipe_runner.model.continuation import find_adapter
from recipe_runner.model.scorers import Scorer, build_scorers
from recipe_runner.model.scores import Score, rate_sequences, score_sequences
from recipe_runner.preview.rows import open_preview
from recipe_runner.problems.errors import user_error
from recipe_runner.problems.problem import Problem, as_warning
from recipe_runner.problems.words import align
from recipe_runner.recipe.recipe import Recipe
from recipe_runner.results.statistics import Measure, estimate, resample
from recipe_runner.results.target import Opened, Target, open_target

Sequence_ = tuple[list[int], list[int]]
TUNED, BASE = "tuned", "base"
WIDTH = 80  # columns of a terminal


@dataclass(frozen=True)
class Row:
    """A row of the evaluation data.

    Attributes:
        source: File or hub id.
        number: Its number there, from 1.
        prompt: What is asked; None for raw text.
        prompt_ids: Its tokens.
        sequences: Answer (`chosen`, ...) -> tokens and labels, as the trainer would get them; empty where the model
            answers itself.
        label: Of a judged answer: whether it is a good one.
        shown: What a vision model is given of the prompt; None where it shows no images.
        look: Makes what a vision model is given of the row with an answer; None where it shows no images.
    """

    source: str
    number: int
    prompt: Prompt | None
    prompt_ids: list[int]
    sequences: dict[str, Sequence_]
    label: bool | None
    shown: Any = None
    look: Callable[[str], dict[str, Any]] | None = None

    def sees(self, answer: str) -> Callable[[], dict[str, Any]] | None:
        """What makes all that a vision model is given of the row with an answer."""
        return partial(self.look, answer) if self.look else None


@dataclass(frozen=True)
class Column:
    """What one model made of all rows.

    Attributes:
        name: Of the column.
        answers: One a row, None where it has no answer that is known; empty where nothing is asked.
        marks: Scorer -> one a row, None where nothing is asked.
        scores: Answer -> one score a row; empty where the tokens of the examples can't be told from those of the row.
        rewards: Answer -> array `(rows,)`: beta times the log-probability beyond the reference's; empty without one.
    """

    name: str
    answers: list[Answer | None]
    marks: dict[str, list[float | None]]
    scores: dict[str, list[Score]]
    rewards: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Evaluation:
    """An evaluation: rows, what each column made of them, and the examples that were shown."""

    rows: list[Row]
    columns: list[Column]
    shots: list[Prompt]
    seed: int


def evaluate(
    target: Target,
    recipe: Recipe,
    limit: int | None,
    shots: int,
    scorers: Sequence[str] | None,
    batch_size: int,
    new_tokens: int,
    seed: int,
    dtype: str | None,
    quantized: bool,
    tell: Callable[[str], None],
    then: Callable[[str, Opened], None] = lambda name, opened: None,
    beside_base: bool = True,
) -> Evaluation:
    """Evaluates a target, and the base beside it.

    Args:
        target: What is evaluated.
        recipe: Whose evaluation data is taken.
        limit: The most rows.
        shots: Examples in the prompt of another column of the base; 0 for none.
        scorers: Names of scorers; None for those that suit, an empty list where nothing is answered.
        batch_size: Prompts answered at a time.
        new_tokens: The most tokens of an answer.
        seed: Of examples and resamples.
        dtype: Of the weights.
        quantized: Whether the base is quantized as in training.
        tell: Is told what was done.
        then: Is given each model by name, while it is in memory.
        beside_base: Whether the base is evaluated, too.

    Raises:
        UserError: Data or model is at fault.
    """
    preview = open_preview(recipe, 1)
    job, pairs = preview.job, preview.job.stage.reference and not preview.job.stage.generates
    rows = read_evaluation(job, preview.orders, limit)
    if job.stage.scores:
        return _rate_pairs(rows, open_target(target, dtype, quantized, scores=True), seed, tell)
    warn_of_prompts(rows)
    wanted = [row.prompt.wanted for row in rows if row.prompt and row.prompt.wanted]
    built = build_scorers(scorers or (), wanted if not pairs and scorers is None else [])
    if built and not wanted:
        raise user_error("nothing-to-score", "no row has an answer to score", "leave out --scorer")
    if shots and target.recipe is None:
        message = "a plain model has no training data that examples could be taken from"
        raise user_error("no-examples", message, "leave out --few-shot, or evaluate a run or a recipe")
    if job.stage.generates and not built:
        handed = job.dataset.reward_columns
        told = f"column '{handed[0]}' is no text" if handed else "there is none"
        message = (
            f"rows have no wanted answer that answers could be held against: it is the first reward column, {told}"
        )
        raise user_error("nothing-to-score", message, "put its column first in dataset.reward_columns")
    if shots and recipe.dataset.images:
        raise user_error("no-examples", "examples in the prompt are texts, and these rows show images", "leave it out")
    examples = choose_examples(job, preview.orders["train"], shots, seed)
    opened = open_target(target, dtype, quantized)
    shown = [
        render_prompt(few_shot(examples, row.prompt), job.tokenizer, row.prompt.tools) if row.prompt else []
        for row in rows
    ]
    measure = _Measuring(rows, built, examples, shown if examples else [], batch_size, new_tokens, tell)
    measure.check(count_context(opened.model))
    begun = target.holds_base or (target.run is not None)  # there is a base to compare with
    first = measure.of(TUNED if begun else BASE, opened, few=not begun)
    then(first[0].name, opened)
    if not begun or not beside_base:
        return Evaluation(rows, first, examples, seed)
    tuned, started = first[0], None
    if pairs and target.is_adapter and recipe.model.adapter:
        started = _reference_scores(opened, recipe, rows)
    if not target.holds_base:
        del opened  # one model in memory
        opened = open_target(target, dtype, quantized, base=True)
    with opened.model.disable_adapter() if target.holds_base else nullcontext():
        columns = measure.of(BASE, opened)
        then(BASE, opened)
    if pairs:
        reference = started or columns[0].scores
        tuned = dataclasses.replace(tuned, rewards=reward(tuned.scores, reference, recipe.training["beta"]))
    return Evaluation(rows, [*columns, tuned], examples, seed)


def _rate_pairs(rows: list[Row], opened: Opened, seed: int, tell: Callable[[str], None]) -> Evaluation:
    """What a reward model gives both answers of every row. There is no base beside it: its head would be random."""
    began, rewards = time.monotonic(), {}
    for name in rows[0].sequences:
        rewards[name] = np.array(rate_sequences(opened.model, [row.sequences[name][0] for row in rows]))
    tell(f"{TUNED}: {len(rows):,} rows in {time.monotonic() - began:.0f} s")
    return Evaluation(rows, [Column(TUNED, [], {}, {}, rewards)], [], seed)


def reward(
    scores: Mapping[str, list[Score]], reference: Mapping[str, list[Score]], beta: float
) -> dict[str, np.ndarray]:
    """The implicit rewards: beta times the log-probability of each answer beyond the reference's.

    Source: DPO, arXiv 2305.18290; TRL 1.16 logs the same as `rewards/chosen` and `rewards/rejected`.
    """
    return {
        name: beta * np.array([before.loss - after.loss for before, after in zip(reference[name], found, strict=True)])
        for name, found in scores.items()
    }


@dataclass(frozen=True)
class _Measuring:
    """How each model is measured."""

    rows: list[Row]
    scorers: Mapping[str, Scorer]
    examples: list[Prompt]
    shown: list[list[int]]
    batch_size: int
    new_tokens: int
    tell: Callable[[str], None]

    @property
    def asked(self) -> list[int]:
        """Places of the rows that are answered: those with an answer to compare with, where answers are scored."""
        return [n for n, row in enumerate(self.rows) if self.scorers and row.prompt and row.prompt.wanted]

    def check(self, context: int | None) -> None:
        """Checks that all prompts fit, before anything is computed.

        Raises:
            UserError: One does not.
        """
        for place in self.asked:
            row = self.rows[place]
            for tokens in (row.prompt_ids, *self.shown[place : place + 1]):
                check_prompt(tokens, context, self.new_tokens, f"{row.source}: the prompt of row {row.number}")

    def of(self, name: str, opened: Opened, few: bool = True) -> list[Column]:
        """The column of a model, and the one with examples."""
        prompts = [row.prompt_ids for row in self.rows]
        columns = [self._column(name, opened, prompts, [row.sequences for row in self.rows])]
        if few and self.examples:
            sequences = [with_examples(row, prompt) for row, prompt in zip(self.rows, self.shown, strict=True)]
            whole = [found for found in sequences if found is not None]
            whole = whole if len(whole) == len(self.rows) else []
            columns.append(self._column(f"{name}, {len(self.examples)} shown", opened, self.shown, whole))
        return columns

    def _column(
        self, name: str, opened: Opened, prompts: list[list[int]], sequences: Sequence[dict[str, Sequence_]]
    ) -> Column:
        began = time.monotonic()
        scores = {
            answer: score_sequences(
                opened.model, [row[answer] for row in sequences], [row.sees(answer) for row in self.rows]
            )
            for answer in (sequences[0] if sequences else ())
        }
        options: dict[str, Any] = GREEDY | {"max_new_tokens": self.new_tokens}
        asked, seen = [prompts[place] for place in self.asked], [self.rows[place].shown for place in self.asked]
        found = answer_all(opened.model, opened.tokenizer, asked, self.batch_size, seen=seen, **options)
        known: dict[int, Answer] = dict(zip(self.asked, found, strict=True))
        answers = [known.get(place) for place in range(len(self.rows))] if self.scorers else []
        pairs = [
            (answer.text, row.prompt.wanted) if answer and row.prompt else None
            for answer, row in zip(answers, self.rows, strict=False)
        ]
        marks = {of: [scorer(*pair) if pair else None for pair in pairs] for of, scorer in self.scorers.items()}
        self.tell(f"{name}: {len(self.rows):,} rows in {time.monotonic() - began:.0f} s")
        return Column(name, answers, marks, scores, {})


def read_evaluation(job: Job, orders: Mapping[str, np.ndarray], limit: int | None) -> list[Row]:
    """The rows of the evaluation data that can be used, as the trainer would get them, unpacked.

    Raises:
        UserError: There is no evaluation data, or no row of it can be used.
    """
    if "eval" not in orders:
        fix = "name data that was not trained on: --data FILE"
        raise user_error("no-evaluation-data", "the recipe has no evaluation data", fix)
    job = job.unpacked("eval")
    order, tally, rows = choose_rows(orders["eval"], limit), job.tally(), []
    with prepare_chunks(job, "eval", order, tally) as tables:
        entries = [entry for table in tables for entry in table.to_pylist()]
        part = order[[entry["documents"][0] for entry in entries]]
        for entry, (source, number), raw in zip(entries, part, read_rows(job, part), strict=True):
            raw = take_side(raw, entry["label"] == [1]) if "label" in entry else raw
            prompt = split_row(raw, job.tokenizer, job.dataset.reward_columns)
            ids, shown = render(prompt, job.tokenizer) if prompt else ([], None)
            sequences = {} if job.stage.generates else shape_of(job.stage).as_trained(entry, job)
            label = raw.get("label")
            look = partial(shape_of(job.stage).inputs_of, entry, job) if raw.get("images") else None
            name = job.sources[source].name
            rows.append(Row(name, int(number) + 1, prompt, ids, sequences, label, shown, look))
    if not rows:
        raise nothing_left("eval", tally.dropped)
    if tally.dropped:
        told = "; ".join(f"{count} {reason}" for reason, count in tally.dropped.items())
        message = f"of {len(order):,} rows are left out: {told}"
        print(as_warning(Problem("rows-left-out", message)), file=sys.stderr)
    return rows


def choose_rows(order: np.ndarray, limit: int | None) -> np.ndarray:
    """The first rows, `(rows, 2)` of source and row in it; of several sources, evenly from all of them."""
    if limit is None or limit >= len(order) or len(np.unique(order[:, 0])) == 1:
        return order[:limit]
    return order[np.linspace(0, len(order) - 1, limit).round().astype(int)]


def warn_of_prompts(rows: Sequence[Row]) -> None:
    """Says so where what a server asks is not what the model was trained to answer: other tokens before the answer."""
    differ = [row for row in rows if row.prompt and row.sequences and not _continues(row)]
    if differ:
        first = f"{differ[0].source} row {differ[0].number}"
        message = f"in {len(differ):,} of {len(rows):,} rows (first: {first}) the chat template renders a prompt"
        message += " otherwise than the same turns before their answer"
        print(as_warning(Problem("prompt-differs", message)), file=sys.stderr)


def _continues(row: Row) -> bool:
    """Whether the tokens of a row begin with its prompt, as far as it was not cut."""
    ids = next(iter(row.sequences.values()))[0]
    shared = min(len(ids), len(row.prompt_ids))
    return ids[:shared] == row.prompt_ids[:shared]


def choose_examples(job: Job, order: np.ndarray, number: int, seed: int) -> list[Prompt]:
    """Rows of the training data to show in a prompt, chosen by the seed.

    Raises:
        UserError: There are not as many.
    """
    if not number:
        return []
    drawn = order[np.random.default_rng(seed).permutation(len(order))[: max(20, 4 * number)]]
    found = [
        prompt
        for row in read_rows(job, drawn)
        if not row["dropped"]
        and (prompt := split_row(row, job.tokenizer, job.dataset.reward_columns))
        and prompt.wanted
    ]
    if len(found) < number:
        message = f"{number} examples were asked for, and the training data has {len(found)} with an answer"
        raise user_error("no-examples", message, "lower --few-shot")
    return found[:number]


def with_examples(row: Row, prompt: list[int]) -> dict[str, Sequence_] | None:
    """The sequences of a row after a prompt with examples; None where its tokens can't be told from theirs."""
    made: dict[str, Sequence_] = {}
    for name, (ids, labels) in row.sequences.items():
        own = len(row.prompt_ids)
        first = next((place for place, label in enumerate(labels) if label != IGNORED), len(labels))
        shared = own - min(first, own)  # tokens of the prompt that are learned: answers of its earlier turns
        if not _continues(row) or (shared and prompt[-shared:] != row.prompt_ids[-shared:]):
            return None
        begin = len(prompt) - own
        if begin < 0:
            return None
        made[name] = [*prompt, *ids[own:]], [*[IGNORED] * begin, *labels]
    return made


def _reference_scores(opened: Opened, recipe: Recipe, rows: Sequence[Row]) -> dict[str, list[Score]]:
    """Scores of the adapter that training began with, which is the reference of its rewards."""
    begun = find_adapter(recipe.model, recipe.peft)
    model = opened.model
    model.load_adapter(str(begun), adapter_name="reference")
    try:
        model.set_adapter("reference")
        return {name: score_sequences(model, [row.sequences[name] for row in rows]) for name in rows[0].sequences}
    finally:
        model.set_adapter("default")
        model.delete_adapter("reference")


def measure_column(evaluation: Evaluation, column: Column) -> dict[str, Measure]:
    """Name -> what is measured of a column, row by row."""
    rows, found = evaluation.rows, {}
    ones = np.ones(len(rows))
    for answer, scores in column.scores.items():
        of = f" ({answer})" if len(column.scores) > 1 else ""
        loss, tokens, right = (np.array([getattr(s, key) for s in scores]) for key in ("loss", "tokens", "right"))
        found[f"loss{of}"] = Measure(loss, tokens)
        if not of:
            found["perplexity"] = Measure(loss, tokens, exponential=True)
            found["token accuracy"] = Measure(right, tokens)
    if {"chosen", "rejected"} <= column.scores.keys():
        chosen, rejected = (np.array([score.loss for score in column.scores[name]]) for name in ("chosen", "rejected"))
        found["chosen is likelier"] = Measure((chosen < rejected).astype(float), ones)
    if {"chosen", "rejected"} <= column.rewards.keys():
        margins = column.rewards["chosen"] - column.rewards["rejected"]
        found["pairs ranked right"] = Measure((margins > 0).astype(float), ones)
        found["reward margin"] = Measure(margins, ones)
    elif column.rewards and all(row.label is not None for row in rows):
        good = np.array([float(bool(row.label)) for row in rows])
        rewards = next(iter(column.rewards.values()))
        found["reward margin"] = Measure(rewards * good, good, minus=Measure(rewards * (1 - good), 1 - good))
    asked = np.array([float(answer is not None) for answer in column.answers])
    for name, values in column.marks.items():
        found[name] = Measure(np.array([value or 0.0 for value in values]), asked)
    if column.answers:
        ended = [float(bool(answer and answer.ended)) for answer in column.answers]
        found["ended by itself"] = Measure(np.array(ended), asked)
    return found


def summarize(evaluation: Evaluation) -> dict[str, Any]:
    """The figures of an evaluation as JSON values: of all rows, and of each source where there are several."""
    measures = {column.name: measure_column(evaluation, column) for column in evaluation.columns}
    sources = np.array([row.source for row in evaluation.rows])
    names = list(dict.fromkeys(sources.tolist()))
    values: dict[str, Any] = {"rows": len(evaluation.rows), "seed": evaluation.seed}
    values |= _estimate_all(measures, np.full(len(sources), True), evaluation.seed)
    if len(names) > 1:
        values["by_source"] = {
            name: {"rows": int((sources == name).sum())} | _estimate_all(measures, sources == name, evaluation.seed)
            for name in names
        }
    return values


def _estimate_all(measures: Mapping[str, Mapping[str, Measure]], kept: np.ndarray, seed: int) -> dict[str, Any]:
    flat = {
        json.dumps([column, name]): measure.of(kept)
        for column, found in measures.items()
        for name, measure in found.items()
    }
    drawn = resample(flat, seed)
    told: dict[str, Any] = {"columns": {column: {} for column in measures}}
    for key, (value, values) in drawn.items():
        column, name = json.loads(key)
        told["columns"][column][name] = dataclasses.asdict(estimate(value, values))
    if TUNED in measures and BASE in measures:
        told["difference"] = {}
        for name in measures[TUNED]:
            tuned, base = drawn[json.dumps([TUNED, name])], drawn.get(json.dumps([BASE, name]))
            if base:
                told["difference"][name] = dataclasses.asdict(estimate(tuned[0] - base[0], tuned[1] - base[1]))
    return told


def list_answers(evaluation: Evaluation) -> Iterator[dict[str, Any]]:
    """Every row with what each column made of it, as JSON values."""
    for place, row in enumerate(evaluation.rows):
        entry: dict[str, Any] = {"source": row.source, "row": row.number}
        if row.prompt:
            entry |= {"prompt": row.prompt.content, "wanted": row.prompt.wanted}
        entry["columns"] = {}
        for column in evaluation.columns:
            told: dict[str, Any] = {}
            if column.answers:
                answer = column.answers[place]
                told = {"answer": answer.text, "ended": answer.ended} if answer else {}
            told |= {name: values[place] for name, values in column.marks.items()}
            for name, scores in column.scores.items():
                told[f"loss{f' ({name})' if name else ''}"] = scores[place].loss / max(scores[place].tokens, 1)
            told |= {
                f"reward ({answer or 'answer'})": float(values[place]) for answer, values in column.rewards.items()
            }
            entry["columns"][column.name] = told
        yield entry


def write_table(values: Mapping[str, Any]) -> str:
    """The figures as text of at most 80 columns where there are up to three models: value and 95 % interval."""
    columns = values["columns"]
    names = list(dict.fromkeys(name for found in columns.values() for name in found))
    lines = [["", *columns]]
    for name in names:
        lines.append([name, *(_cell(found.get(name)) for found in columns.values())])
    text = ["\n".join(align(lines, WIDTH))]
    if values.get("difference"):
        rows = [["tuned minus base", ""], *([name, _cell(found)] for name, found in values["difference"].items())]
        text.append("\n".join(align(rows, WIDTH)))
    for source, found in values.get("by_source", {}).items():
        text.append(f"{source} ({found['rows']:,} rows)\n{write_table(found)}")
    return "\n\n".join(text)


def _cell(found: Mapping[str, float] | None) -> str:
    if not found or not np.isfinite(found["value"]):
        return "-"
    return f"{_number(found['value'])} [{_number(found['low'])}, {_number(found['high'])}]"


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.4g}"
