"""Tiny real models, small real data, and a way to run the command line inside the test process."""

import gc
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from shared import SAMPLES, write_rows

from recipe_runner.recipe.rules import packages

pytest_plugins = ["learned", "templated", "seeing"]  # runs, and rows, that several files of tests share
os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches a network
HF_HOME = tempfile.TemporaryDirectory(prefix="hf-home-")  # no test reads or fills the caches of the machine
os.environ["HF_HOME"] = HF_HOME.name

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: threads wait for each other more than they compute

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES, SCHEMAS = ROOT / "tests" / "examples", ROOT / "tests" / "schemas"
TICKETS = ROOT / "recipes" / "data" / "tickets_train.jsonl"


@pytest.fixture
def report_figure(record_property):
    """Keeps a line for the end of pytest's output: what a test measured, in whichever process it ran."""
    return lambda line: record_property("figure", line)


def pytest_terminal_summary(terminalreporter):
    reports = terminalreporter.stats.get("passed", [])
    if lines := [line for report in reports for name, line in report.user_properties if name == "figure"]:
        terminalreporter.section("figures")
        for line in lines:
            terminalreporter.write_line(line)


# A process of its own runs one recipe; this one runs many, and another may use what this one does not.
packages.find_unused = lambda *_: []


@dataclass(frozen=True)
class Result:
    status: int
    out: str
    err: str


@pytest.fixture
def run_cli(capsys, monkeypatch):
    """Runs `recipe-run ARGUMENTS` in this process."""
    from recipe_runner.cli import main

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["recipe-run", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        if "trl" in sys.modules and not gc.get_freeze_count():
            gc.freeze()  # what the training stack has made stays: each run collects garbage, and would look at it again
        return Result(caught.value.code, captured.out, captured.err)

    return run


@pytest.fixture
def write_recipe(tmp_path):
    """Writes a valid small recipe, with sections changed or (None) removed, and returns its path."""

    def write(name="tiny", folder=tmp_path, **sections):
        recipe = {
            "schema_version": 1,
            "name": name,
            "stage": "sft",
            "model": {"name_or_path": "someone/some-model"},
            "dataset": {"format": "instruction", "train": {"source": str(TICKETS)}},
            "training": {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-4},
            "run": {"output_dir": str(tmp_path / "runs")},
        }
        for section, value in sections.items():
            if isinstance(value, dict) and isinstance(recipe.get(section), dict):
                recipe[section] = recipe[section] | value
            else:
                recipe[section] = value
        file = folder / f"{name}.yaml"
        file.write_text(json.dumps({key: value for key, value in recipe.items() if value is not None}, indent=1))
        return file

    return write


@pytest.fixture
def small_recipe(write_recipe, tiny_phi3, tmp_path):
    """Writes rows and a small recipe of a stage for them, with a tiny Phi-3; returns its path."""

    def small_recipe(stage="sft", rows=None, name="tiny", model=None, dataset=None, training=None, **sections):
        form, sample = SAMPLES[stage]
        rows = sample if rows is None else rows
        data = {"format": form} if form else {}
        if rows is not None:
            data["train"] = {"source": write_rows(tmp_path / "rows.jsonl", rows).name}
        training = {"max_steps": 4, "logging_steps": 1, "learning_rate": 0.01} | (training or {})
        model = {"name_or_path": str(tiny_phi3)} | (model or {})
        return write_recipe(
            name, stage=stage, model=model, dataset=data | (dataset or {}), training=training, **sections
        )

    return small_recipe


@pytest.fixture
def run_recipe(run_cli, small_recipe, tmp_path):
    """Writes rows and a small recipe, runs a command on it in this process; returns the result and the newest run."""

    def run_recipe(*arguments, command="train", name="tiny", **options):
        result = run_cli(command, small_recipe(name=name, **options), *arguments)
        return result, max((tmp_path / "runs" / name).glob("*"), default=None)

    return run_recipe


@pytest.fixture(scope="session")
def tokenizer():
    """A small BPE tokenizer with Phi-3's special tokens and TRL's copy of Phi-3's chat template."""
    import trl
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train([str(TICKETS)], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / "phi3.jinja").read_text()
    return tokenizer


@pytest.fixture(scope="session")
def tiny_phi3(tmp_path_factory, tokenizer):
    """A randomly initialised Phi-3 of the real architecture, with fused projections, as a model folder."""
    from transformers import Phi3Config

    from recipe_runner.model.tiny import write_tiny

    return write_tiny(Phi3Config(), tokenizer, tmp_path_factory.mktemp("models") / "tiny-phi3")


@dataclass(frozen=True)
class Mutants:
    seed: str
    count: int


def pytest_addoption(parser):
    parser.addoption("--mutants", choices=["sample", "all"], default="sample", help="how many broken copies are tried")
    parser.addoption("--mutants-seed", default="1", help="which ones")


@pytest.fixture
def mutants(request):
    """How many broken copies of a kind of file a test tries, and by which seed."""
    sample, large = request.node.get_closest_marker("mutants").args
    few = request.config.getoption("--mutants") == "sample"
    return Mutants(request.config.getoption("--mutants-seed"), sample if few else large)
