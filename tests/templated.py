"""Rows by our preparation and by TRL's own, through every chat template that TRL stores."""

import dataclasses
import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

SPEC = importlib.util.find_spec("trl")  # which is not imported: this file is read for every test
FOLDER = Path(SPEC.origin if SPEC else "").parent / "chat_templates"
OF_IMAGES = ("idefics3", "idefics3_training", "llava_next", "llava_next_training")  # take no text as content
TEMPLATES = sorted(file for file in FOLDER.glob("*.jinja") if file.stem not in OF_IMAGES)
PARTS = ("input_ids", "labels", "prompt_ids", "chosen_ids", "rejected_ids", "completion_ids", "seq_lengths")


@pytest.fixture(scope="session")
def tokenizer_of(tokenizer):
    """A copy of the small tokenizer with a chat template, and with the tokens that this one spells."""
    import copy

    from transformers import AddedToken

    def tokenizer_of(template):
        made = copy.deepcopy(tokenizer)
        made.chat_template = template.read_text(encoding="utf-8")
        made.add_special_tokens({"bos_token": "<s>"})
        spelt = dict.fromkeys(re.findall(r"<[|｜/]?[\w|｜▁]+>", made.chat_template))
        made.add_tokens([AddedToken(token, normalized=False, special=True) for token in spelt], special_tokens=True)
        return made

    return tokenizer_of


@pytest.fixture
def job_of(small_recipe, monkeypatch):
    """A job for rows, with a tokenizer of the test's; no model is looked at, nor how a template ends its turns."""
    from recipe_runner.data import prepare
    from recipe_runner.data.job import Job
    from recipe_runner.data.sources import open_sources
    from recipe_runner.recipe.resolve import load_recipe
    from recipe_runner.training.config import build_config
    from recipe_runner.training.environment import choose_precision

    monkeypatch.setattr(prepare, "check_ends", lambda *_: set())

    def job_of(stage, rows, tokenizer, training=None, **dataset):
        options = {"stage": stage, "rows": rows, "dataset": dataset, "training": training}
        recipe = load_recipe(str(small_recipe(**options)))
        precision = choose_precision(recipe.training, None, adapter=False, launcher="no")
        config = build_config(recipe.stage, recipe.training.said, recipe.model, recipe.run.seed, precision)
        return Job(recipe.stage, recipe.dataset, recipe.run.seed, open_sources(recipe.dataset), tokenizer, config)

    return job_of


def prepare(job, workers=1, split="train"):
    """Rows and accounting, by our preparation."""
    from recipe_runner.data.order import arrange_rows
    from recipe_runner.data.prepare import prepare_chunks, shape_of

    tally = job.tally()
    with prepare_chunks(job, split, arrange_rows(job.dataset, job.sources, job.seed)[split], tally, workers) as tables:
        rows = [row for table in tables for row in table.to_pylist()]
    return [{name: row[name] for name in shape_of(job.stage).COLUMNS} for row in rows], tally


def prepare_by_trl(job, rows, **options):
    """Rows by TRL's own preparation of one row at a time, from its layout."""
    import trl
    from datasets import Dataset

    trainer = {"sft": trl.SFTTrainer, "dpo": trl.DPOTrainer, "kto": trl.KTOTrainer}[job.stage.name]
    config = job.config
    if job.stage.name == "sft":
        config = dataclasses.replace(config, assistant_only_loss=job.dataset.train_on == "assistant")
    stand_in = SimpleNamespace(
        _tokenizer=job.tokenizer,
        chat_template=None,
        completion_only_loss=job.dataset.train_on == "completion",
        calculate_KL=False,
        desirable_weight=1.0,
        undesirable_weight=1.0,
    )
    more = (config.packing, None, "train") if job.stage.name == "sft" else ("train",)
    found = trainer._prepare_dataset(stand_in, Dataset.from_list(rows), job.tokenizer, config, *more)
    return [{name: row[name] for name in PARTS if name in row} for row in found]
