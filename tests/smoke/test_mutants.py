"""Ways to break a recipe or the runner that validation can't see: smoke must say so, and by which check.

`docs/smoke.md` lists them; `test_the_documentation_lists_them` holds the two together.
"""

import copy
import json
import re
from pathlib import Path

import pyarrow as pa
import pytest
import torch
import yaml
from conftest import ROOT

RECIPES = ROOT / "recipes"


@pytest.fixture
def smoke():
    """Executes a recipe in this process; returns which checks said something, and what."""
    from recipe_runner.smoke.run import smoke

    def run(file):
        outcome = smoke(Path(file), 4)
        wrong = [problem for problem in outcome.problems if problem.severity == "error"]
        return {p.message.split(":")[0] if p.code == "smoke-failed" else p.code: p.message for p in reversed(wrong)}

    return run


@pytest.fixture
def edit(tmp_path):
    """A copy of a shipped recipe with keys changed: `edit("name", {"peft": {...}})`."""
    from recipe_runner.recipe.resolve import load_recipe

    def edit(name, **sections):
        values = json.loads(json.dumps(load_recipe(name).values))
        for section, keys in sections.items():
            if isinstance(keys, dict) and isinstance(values.get(section), dict):
                values[section] |= keys
            else:
                values[section] = keys
        values = {key: value for key, value in values.items() if value is not None}
        file = tmp_path / f"{values['name']}.yaml"
        file.write_text(yaml.safe_dump(values, sort_keys=False))
        return file

    return edit


def roll_labels(monkeypatch):
    from recipe_runner.data.shapes import tokens

    right = tokens.label

    def label(*args, **kwargs):
        table = right(*args, **kwargs)
        rolled = [[row[0], *row[:-1]] for row in table["labels"].to_pylist()]
        return table.set_column(1, "labels", pa.array(rolled, table["labels"].type))

    monkeypatch.setattr(tokens, "label", label)


def learn_everything(monkeypatch):
    from recipe_runner.data.shapes import tokens

    right = tokens.label
    monkeypatch.setattr(tokens, "label", lambda ids, masks=None, begins=None: right(ids))


def learn_padding(monkeypatch):
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling as Collator

    right = Collator.torch_call

    def torch_call(self, examples):
        batch = right(self, examples)
        hidden = batch["attention_mask"] == 0
        batch["labels"] = batch["labels"].masked_scatter(hidden, batch["input_ids"][hidden])
        return batch

    monkeypatch.setattr(Collator, "torch_call", torch_call)


def forget_the_end(monkeypatch):
    """The token that ends a turn is left out of the loss: the model never stops."""
    from recipe_runner.data.shapes import tokens

    right = tokens.label

    def label(*args, **kwargs):
        table = right(*args, **kwargs)
        cut = []
        for row in table["labels"].to_pylist():
            last = max(place for place, of in enumerate(row) if of != -100)
            cut.append([*row[: last - 1], -100, -100, *row[last + 1 :]])
        return table.set_column(1, "labels", pa.array(cut, table["labels"].type))

    monkeypatch.setattr(tokens, "label", label)


def drop_an_option(monkeypatch):
    from recipe_runner.training import prepare

    right = prepare.build_config
    monkeypatch.setattr(
        prepare,
        "build_config",
        lambda stage, training, *rest: right(
            stage, {key: value for key, value in training.items() if key != "per_device_train_batch_size"}, *rest
        ),
    )


def forget_the_seed(monkeypatch):
    from recipe_runner.training import prepare

    right = prepare.build_config
    monkeypatch.setattr(
        prepare, "build_config", lambda stage, training, model, seed, *rest: right(stage, training, model, 1, *rest)
    )


def replace_the_optimizer(monkeypatch):
    from transformers import Trainer

    def create_optimizer(self, *args):
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=self.args.learning_rate)
        return self.optimizer

    monkeypatch.setattr(Trainer, "create_optimizer", create_optimizer)


def forget_weight_decay(monkeypatch):
    from transformers import Trainer

    monkeypatch.setattr(Trainer, "get_decay_parameter_names", lambda self, model: [])


def ignore_the_schedule(monkeypatch):
    from transformers import Trainer

    def create_scheduler(self, num_training_steps, optimizer=None):
        self.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer or self.optimizer, factor=1)
        return self.lr_scheduler

    monkeypatch.setattr(Trainer, "create_scheduler", create_scheduler)


def never_clip(monkeypatch):
    from accelerate import Accelerator

    def measure(self, parameters, max_norm, norm_type=2):
        return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])

    monkeypatch.setattr(Accelerator, "clip_grad_norm_", measure)


def save_another_adapter(monkeypatch):
    from peft import PeftModel

    from recipe_runner.training import run

    right = PeftModel.save_pretrained

    def save_pretrained(self, folder, **kwargs):
        state = {name: torch.zeros_like(p) for name, p in self.state_dict().items() if "lora_" in name}
        right(self, folder, **{**kwargs, "state_dict": state})

    monkeypatch.setattr(PeftModel, "save_pretrained", save_pretrained)
    monkeypatch.setattr(run.verify, "verify_saved", lambda *args: None)


def swap_the_pairs(monkeypatch):
    from recipe_runner.data.shapes import pairs

    right = pairs.tokenize
    names = ["prompt_ids", "rejected_ids", "chosen_ids"]
    monkeypatch.setattr(pairs, "tokenize", lambda job, rows: right(job, rows).rename_columns(names))


def leave_out_quantization(monkeypatch):
    from recipe_runner.training import trainers

    monkeypatch.setattr(trainers, "build_quantization", lambda section: None)


def quantize_once(monkeypatch):
    """Double quantization is dropped on the way."""
    from recipe_runner.training import trainers

    right = trainers.build_quantization
    monkeypatch.setattr(
        trainers, "build_quantization", lambda section: right({**section, "bnb_4bit_use_double_quant": False})
    )


def change_trainer(monkeypatch, change):
    """Does something to the trainer once it is built."""
    from recipe_runner.training import run

    right = run.trainers.build_trainer

    def build_trainer(*args):
        trainer = right(*args)
        change(trainer)
        return trainer

    monkeypatch.setattr(run.trainers, "build_trainer", build_trainer)


def train_the_base(monkeypatch):
    """Of the base, a norm is trained beside the adapter."""

    def train(trainer):
        for name, parameter in trainer.model.named_parameters():
            if name.endswith("model.norm.weight"):
                parameter.requires_grad_(True)

    change_trainer(monkeypatch, train)


def begin_elsewhere(monkeypatch):
    """The weights are random ones, and not those of the model."""

    def move(trainer):
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                if name.endswith("embed_tokens.weight"):
                    parameter.add_(0.01)

    change_trainer(monkeypatch, move)


def forget_accumulation(monkeypatch):
    from recipe_runner.training import prepare

    monkeypatch.setattr(
        prepare, "accumulate", lambda recipe, count: {**recipe.training.said, "gradient_accumulation_steps": 1}
    )


def mix_the_documents(monkeypatch):
    """Documents of a packed row see each other."""
    from recipe_runner.training import packing

    right = packing.DocumentCollator.torch_call

    def torch_call(self, examples):
        batch = right(self, examples)
        places = batch["position_ids"]
        kept = {key: value for key, value in batch.items() if key != "document_bounds"}
        kept["cu_seq_lens_q"] = kept["cu_seq_lens_k"] = torch.tensor([0, places.shape[1]], dtype=torch.int32)
        return kept | {"attention_mask": torch.ones(1, 1, places.shape[1], places.shape[1]).tril().bool()}

    monkeypatch.setattr(packing.DocumentCollator, "torch_call", torch_call)
    monkeypatch.setattr(packing.PackingCheck, "on_train_begin", lambda *args, **kwargs: None)


def resume_without_the_optimizer(monkeypatch):
    from transformers import Trainer

    monkeypatch.setattr(Trainer, "_load_optimizer_and_scheduler", lambda self, checkpoint: None)


def keep_the_template(monkeypatch):
    """The tokenizer is saved without the chat template that was trained with."""
    from recipe_runner.training import run

    right = run._save

    def save(trainer, result, *rest):
        found = right(trainer, result, *rest)
        (found / "chat_template.jinja").write_text("{{ messages[0].content }}")
        return found

    monkeypatch.setattr(run, "_save", save)


def freeze_half_of_the_adapter(monkeypatch):
    def freeze(trainer):
        for name, parameter in trainer.model.named_parameters():
            if "lora_A" in name:
                parameter.requires_grad_(False)

    change_trainer(monkeypatch, freeze)


def freeze_a_layer(monkeypatch):
    """Of the layers that `unfreeze` names, the first is not trained."""

    def freeze(trainer):
        numbers = [
            int(re.search(r"layers\.(\d+)", n)[1])
            for n, p in trainer.model.named_parameters()
            if p.requires_grad and "layers." in n
        ]
        for name, parameter in trainer.model.named_parameters():
            if f"layers.{min(numbers)}." in name:
                parameter.requires_grad_(False)

    change_trainer(monkeypatch, freeze)


def evaluate_on_what_is_trained(monkeypatch):
    def exchange(trainer):
        trainer.eval_dataset = trainer.train_dataset

    change_trainer(monkeypatch, exchange)


def draw_rows_in_order(monkeypatch):
    from transformers import Trainer

    order = torch.utils.data.SequentialSampler
    monkeypatch.setattr(Trainer, "_get_train_sampler", lambda self, rows=None: order(self.train_dataset))


def leave_rows_long(monkeypatch):
    """Rows are not cut at `max_length`."""
    from recipe_runner.data.job import Job

    monkeypatch.setattr(Job, "limit", property(lambda self: None))


def learn_the_last_answer(monkeypatch):
    """Of a dialogue, only the last answer is learned."""
    from recipe_runner.data.shapes import tokens

    right = tokens.label

    def label(*args, **kwargs):
        table = right(*args, **kwargs)
        cut = []
        for row in table["labels"].to_pylist():
            begins = [n for n, of in enumerate(row) if of != -100 and (not n or row[n - 1] == -100)]
            cut.append([-100] * begins[-1] + row[begins[-1] :])
        return table.set_column(1, "labels", pa.array(cut, table["labels"].type))

    monkeypatch.setattr(tokens, "label", label)


def divide_by_each_batch(monkeypatch):
    """The loss of a step is the mean of its batches' means: short batches weigh too much."""
    from transformers import Trainer

    monkeypatch.setattr(Trainer, "_get_num_items_in_batch", lambda self, batches, device: None)


def forget_beta(monkeypatch):
    def change(trainer):
        trainer.beta = 0.5

    change_trainer(monkeypatch, change)


def keep_all_ranks(monkeypatch):
    from recipe_runner.training import allocation

    monkeypatch.setattr(allocation.Allocation, "on_optimizer_step", lambda *args, **kwargs: None)


def forget_whole_modules(monkeypatch):
    from recipe_runner.model import adapter

    right = adapter.build_peft
    monkeypatch.setattr(
        adapter,
        "build_peft",
        lambda said, *rest: right({k: v for k, v in said.items() if k != "modules_to_save"}, *rest),
    )


def quantize_the_first_layer_only(monkeypatch):
    from recipe_runner.training import trainers

    right = trainers.build_quantization

    def build(section):
        made = right(section)
        made.llm_int8_skip_modules = ["model.layers.1", "lm_head"]
        return made

    monkeypatch.setattr(trainers, "build_quantization", build)


def lose_the_input(monkeypatch):
    from recipe_runner.data import formats

    monkeypatch.setattr(formats, "_join", lambda instruction, more, dataset: instruction)


def cut_long_documents(monkeypatch):
    """Documents are cut at a row's length, where packing would split them."""
    from recipe_runner.data.job import Job

    monkeypatch.setattr(Job, "cuts", lambda self, split: True)


def turn_dropout_off(monkeypatch):
    from trl.trainer.utils import disable_dropout_in_model

    change_trainer(monkeypatch, lambda trainer: disable_dropout_in_model(trainer.model))


def train_half_precision(monkeypatch):
    """All weights are trained, and in bfloat16: small steps are lost."""
    change_trainer(monkeypatch, lambda trainer: trainer.model.to(torch.bfloat16))


def keep_the_trial_gradient(monkeypatch):
    from recipe_runner.training import longest

    right = longest.LongestBatch.on_train_begin

    def on_train_begin(self, args, state, control, **kwargs):
        right(self, args, state, control, **kwargs)
        for parameter in kwargs["model"].parameters():
            if parameter.requires_grad:
                parameter.grad = torch.full_like(parameter, 1e-3)

    monkeypatch.setattr(longest.LongestBatch, "on_train_begin", on_train_begin)


def exchange_the_loss(monkeypatch):
    def change(trainer):
        trainer.loss_types = ["sigmoid"]

    change_trainer(monkeypatch, change)


def change_generation(monkeypatch, change):
    """Does something to the generation configuration before the result is saved."""
    from recipe_runner.training import run

    right = run._save

    def save(trainer, result, *rest):
        change(trainer.accelerator.unwrap_model(trainer.model).generation_config)
        return right(trainer, result, *rest)

    monkeypatch.setattr(run, "_save", save)


def lose_the_sampling(monkeypatch):
    def change(config):
        config.temperature = config.top_p = None

    change_generation(monkeypatch, change)


def lose_a_stop(monkeypatch):
    def change(config):
        config.eos_token_id = config.eos_token_id[0]

    change_generation(monkeypatch, change)


def activate_otherwise(monkeypatch):
    from transformers.activations import ACT2FN

    from recipe_runner.model import bottleneck

    monkeypatch.setattr(bottleneck, "ACT2FN", dict.fromkeys(ACT2FN, ACT2FN["relu"]))


def begin_each_stage_with_the_base(monkeypatch):
    from recipe_runner.smoke import run as smoke_run
    from recipe_runner.training import pipeline

    right = pipeline.start_from
    for module in (pipeline, smoke_run):
        monkeypatch.setattr(module, "start_from", lambda stage, before, *others: right(stage, None, *others))


def lose_the_first_token(monkeypatch):
    """The token that the tokenizer puts before every text is left out."""
    from recipe_runner.data import encode

    monkeypatch.setattr(encode, "ONLY_IDS", encode.ONLY_IDS | {"add_special_tokens": False})


def lose_a_packed_row(monkeypatch):
    from recipe_runner.data import prepare

    right = prepare.pack

    def pack(table, config):
        packed = right(table, config)
        return packed.slice(0, max(len(packed) - 1, 1))

    monkeypatch.setattr(prepare, "pack", pack)


def train_the_adapter_in_half_precision(monkeypatch):
    def change(trainer):
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)

    change_trainer(monkeypatch, change)


def pack_the_evaluation(monkeypatch):
    from recipe_runner.data.job import Job

    monkeypatch.setattr(Job, "packing", lambda self, split: bool(self.config.packing))


def lose_line_breaks(monkeypatch):
    from recipe_runner.data import formats

    right = formats._text
    monkeypatch.setattr(formats, "_text", lambda value, where: " ".join(right(value, where).split()))


def lose_the_systems(monkeypatch):
    """System prompts, of rows and of the recipe, are left out."""
    from recipe_runner.data import formats

    right = formats._context
    monkeypatch.setattr(formats, "_context", lambda row, default, where: right({**row, "system": None}, None, where))


def exchange_the_parts(monkeypatch):
    """The input stands before its instruction."""
    from recipe_runner.data import formats

    right = formats._join
    monkeypatch.setattr(formats, "_join", lambda instruction, more, dataset: right(more, instruction, dataset))


def punish_otherwise(monkeypatch):
    """AdaLoRA's penalty has a weight of its own."""
    from recipe_runner.training import allocation

    right = allocation.measure_orthogonality
    monkeypatch.setattr(allocation, "measure_orthogonality", lambda model: 10 * right(model))


def evaluate_otherwise(monkeypatch):
    """The loss of an evaluation is divided by padding and questions as well."""

    def change(trainer):
        right = trainer.compute_loss

        def compute_loss(model, inputs, *args, **kwargs):
            share = float((inputs["labels"] != -100).float().mean())
            found = right(model, inputs, *args, **kwargs)
            if model.training:
                return found
            return (found[0] * share, *found[1:]) if isinstance(found, tuple) else found * share

        trainer.compute_loss = compute_loss

    change_trainer(monkeypatch, change)


def change_the_model(monkeypatch):
    """A number of the model's configuration is another."""

    def change(trainer):
        trainer.accelerator.unwrap_model(trainer.model).config.rms_norm_eps = 1e-3

    change_trainer(monkeypatch, change)


def save_half_precision(monkeypatch):
    from recipe_runner.training import run

    right = run._save

    def save(trainer, result, *rest):
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
        found = right(trainer, result, *rest)
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.float32)
        return found

    monkeypatch.setattr(run, "_save", save)


def decay_everything(monkeypatch):
    from transformers import Trainer

    monkeypatch.setattr(
        Trainer, "get_decay_parameter_names", lambda self, model: [name for name, _ in model.named_parameters()]
    )


def take_another_template(monkeypatch):
    """Conversations are rendered by a template that is not the model's."""
    from recipe_runner.model import tokenizer

    right = tokenizer._mark

    def mark(given):
        replaced = right(given)
        given.chat_template = given.chat_template.replace("<|user|>", "<|system|>")
        return replaced

    monkeypatch.setattr(tokenizer, "_mark", mark)


def begin_with_other_words(monkeypatch):
    """A prompt of virtual tokens begins with another text than the recipe's."""

    def change(trainer):
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                if "prompt_encoder" in name:
                    parameter.normal_()

    change_trainer(monkeypatch, change)


def cut_the_attention(monkeypatch):
    """A document of a packed row attends by the mask of the first one: longer ones don't see their own beginning."""
    from recipe_runner.training import packing

    right = packing.sdpa_attention_forward

    def attend(module, query, key, value, attention_mask, **kwargs):
        if attention_mask is not None and query.shape[2] > 8:
            attention_mask = attention_mask.clone()
            attention_mask[..., 8:, :4] = False if attention_mask.dtype == torch.bool else float("-inf")
        return right(module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setattr(packing, "sdpa_attention_forward", attend)
    monkeypatch.setattr(packing.PackingCheck, "on_train_begin", lambda *args, **kwargs: None)


def place_bottlenecks_elsewhere(monkeypatch):
    from recipe_runner.model import bottleneck

    exchanged = {kind: pair[::-1] for kind, pair in bottleneck.TARGETS.items()}
    monkeypatch.setattr(bottleneck, "TARGETS", exchanged)


def begin_beside_the_base(monkeypatch):
    """LoRA's second matrix does not begin at 0: the model begins as another than its base."""

    def move(trainer):
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.05)

    change_trainer(monkeypatch, move)


def count_batches_for_steps(monkeypatch):
    """AdaLoRA plans its ranks for the batches, and not for the steps."""
    from recipe_runner.training import run

    right = run.prepare.prepare

    def prepare(*args, **kwargs):
        prepared = right(*args, **kwargs)
        if prepared.peft_config is not None and hasattr(prepared.peft_config, "total_step"):
            prepared.peft_config.total_step *= 4
        return prepared

    monkeypatch.setattr(run.prepare, "prepare", prepare)


def resume_in_another_precision(monkeypatch):
    from recipe_runner.training import run

    monkeypatch.setattr(run.trainers, "keep_dtypes_on_resume", lambda trainer: None)


def hold_out_the_last(monkeypatch):
    from datasets import Dataset

    right = Dataset.train_test_split
    monkeypatch.setattr(Dataset, "train_test_split", lambda self, size, seed: right(self, size, shuffle=False))


def save_a_short_tokenizer(monkeypatch):
    """Rows' length is saved as the length of all that the model can see."""

    def change(trainer):
        trainer.processing_class.model_max_length = trainer.args.max_length

    change_trainer(monkeypatch, change)


def pack_no_training_rows(monkeypatch):
    """What the recipe says of packing evaluation rows holds for the others, too."""
    from recipe_runner.data.job import Job

    monkeypatch.setattr(Job, "packing", lambda self, split: bool(self.config.eval_packing))


def change_a_default(monkeypatch):
    """An option that the recipe does not name is not upstream's."""
    from recipe_runner.training import prepare

    right = prepare.build_config

    def build_config(stage, training, *args):
        return right(stage, {"adam_beta2": 0.95} | training, *args)

    monkeypatch.setattr(prepare, "build_config", build_config)


def evaluate_with_dropout(monkeypatch):
    def change(trainer):
        trainer.model.eval = lambda: trainer.model

    change_trainer(monkeypatch, change)


def learn_without_dropout(monkeypatch):
    def change(trainer):
        trainer.model.train = lambda mode=True: torch.nn.Module.train(trainer.model, False)

    change_trainer(monkeypatch, change)


def save_a_short_answer(monkeypatch):
    """Answers of the result are as long as its rows were, at most."""

    def change(config):
        config.max_length = 64

    change_generation(monkeypatch, change)


def save_a_short_context(monkeypatch):
    """The saved config.json says that the model sees no more than a row had."""

    def change(trainer):
        save = trainer.model.save_pretrained

        def short(*args, **kwargs):
            trainer.model.config.max_position_embeddings = 64
            save(*args, **kwargs)

        trainer.model.save_pretrained = short

    change_trainer(monkeypatch, change)


def pack_half_rows(monkeypatch):
    """Packed rows are half as long as they may be."""
    from recipe_runner.data import prepare

    right = prepare.pack

    def pack(table, config):
        half = copy.copy(config)
        half.max_length //= 2
        return right(table, half)

    monkeypatch.setattr(prepare, "pack", pack)


def save_another_base(monkeypatch):
    """The saved adapter names its base by the last part of the path."""

    def change(trainer):
        config = trainer.model.active_peft_config
        config.base_model_name_or_path = config.base_model_name_or_path.rpartition("/")[2]

    change_trainer(monkeypatch, change)


def lose_the_random_state(monkeypatch):
    """A checkpoint doesn't say where the generators of random numbers were."""
    from transformers import Trainer

    monkeypatch.setattr(Trainer, "_load_rng_state", lambda self, checkpoint: None)


def forget_the_weights_of_rewards(monkeypatch):
    change_trainer(monkeypatch, lambda trainer: setattr(trainer, "reward_weights", torch.ones(3)))


def keep_no_answers(monkeypatch):
    from recipe_runner.training import run

    monkeypatch.setattr(run, "keep_completions", lambda *args: None)


def exchange_the_scored(monkeypatch):
    from recipe_runner.data.shapes import scored_pairs

    right = scored_pairs.tokenize

    def tokenize(job, rows):
        table = right(job, rows)
        return pa.table({"chosen_ids": table["rejected_ids"], "rejected_ids": table["chosen_ids"]})

    monkeypatch.setattr(scored_pairs, "tokenize", tokenize)


def exchange_the_labels(monkeypatch):
    from recipe_runner.data.shapes import unpaired

    right = unpaired.take_side

    def take_side(row, good):
        return {**right(row, good), "label": not good}

    monkeypatch.setattr(unpaired, "take_side", take_side)


def freeze_the_head(monkeypatch):
    def change(trainer):
        for name, parameter in trainer.model.named_parameters():
            if "score" in name:
                parameter.requires_grad_(False)

    change_trainer(monkeypatch, change)


def ask_without_a_place_for_the_answer(monkeypatch):
    """Prompts are rendered without the beginning of an answer."""

    def change(trainer):
        right = trainer._tokenize_prompts

        def tokenize(prompts):
            ids, *more = right(prompts)
            return [row[:-3] for row in ids], *more

        trainer._tokenize_prompts = tokenize

    change_trainer(monkeypatch, change)


def learn_what_pads_an_answer(monkeypatch):
    def change(trainer):
        right = trainer._generate_and_score_completions

        def score(inputs):
            made = right(inputs)
            made["completion_mask"] = torch.ones_like(made["completion_mask"])
            made["completion_ids"][:, 0] = trainer.eos_token_ids[0]  # so that it ends before the others
            return made

        trainer._generate_and_score_completions = score

    change_trainer(monkeypatch, change)


def begin_the_order_anew(monkeypatch):
    """As TRL 1.16: a resumed run takes prompts in the order of the first epoch."""
    from recipe_runner.training import run

    monkeypatch.setattr(run, "keep_prompt_order", lambda trainer: None)


def sample_otherwise(monkeypatch):
    change_trainer(monkeypatch, lambda trainer: setattr(trainer, "temperature", 0.1))


def judge_by_another_model(monkeypatch):
    """The reward of a model is another number than its score."""
    from recipe_runner.training import trainers

    right = trainers.build_rewards

    def build_rewards(*args):
        rewards = right(*args)
        return [*rewards[1:], *rewards[:1]]

    monkeypatch.setattr(trainers, "build_rewards", build_rewards)


TICKETS, CHAT, TEXT, DPO = "smollm2_tickets_lora", "phi3_chat_qlora", "phi3_text_qlora", "smollm2_replies_dpo"
PARTIAL, ADALORA, FILING = "qwen25_05b_math_partial", "smollm2_360m_instruct_adalora", "smollm2_filing_lora"
PIPELINE, SQL, STORIES = "smollm2_desk_pipeline", "qwen25_15b_sql_lora", "smollm2_135m_stories_full"
INTENTS, NORMALIZED, LLAMA = "gemma3_270m_intents_full", "olmo2_7b_dpo_qlora", "llama32_1b_chat_lora"
BOTTLENECK, HANDBOOK, FULL = "smollm2_17b_chat_bottleneck", "smollm2_handbook_lora", "llama32_1b_instruct_full"
PROMPT = "qwen3_06b_sentiment_prompt"
SCORES, GRPO, RLOO, KTO = "smollm2_replies_reward", "smollm2_filing_grpo", "phi3_rloo_qlora", "smollm2_replies_kto"
# What is broken -> a recipe that shows it, what breaks it, and the checks of which one must say so.
RUNNER = {
    "labels shifted by one": (TICKETS, roll_labels, {"mask"}),
    "the question learned as well": (TICKETS, learn_everything, {"mask"}),
    "padding learned": (TICKETS, learn_padding, {"mask", "loss"}),
    "the token that ends a turn left out of the loss": (TICKETS, forget_the_end, {"mask", "end-of-turn-masked"}),
    "an option dropped on the way to the trainer": (TICKETS, drop_an_option, {"options"}),
    "another seed": (TICKETS, forget_the_seed, {"options"}),
    "another optimizer": (TICKETS, replace_the_optimizer, {"optimizer"}),
    "the schedule ignored": (TICKETS, ignore_the_schedule, {"schedule"}),
    "gradients not clipped": (TICKETS, never_clip, {"schedule"}),
    "gradient accumulation ignored": (CHAT, forget_accumulation, {"options", "schedule"}),
    "an adapter saved that is not the trained one": (TICKETS, save_another_adapter, {"saved", "nothing-learned"}),
    "the chat template not saved": (TICKETS, keep_the_template, {"saved"}),
    "chosen and rejected answers exchanged": (DPO, swap_the_pairs, {"mask"}),
    "quantization left out": (TEXT, leave_out_quantization, {"options", "targets"}),
    "double quantization dropped": (TEXT, quantize_once, {"options"}),
    "a part of the base trained beside the adapter": (TICKETS, train_the_base, {"trained"}),
    "training begun from other weights": (TICKETS, begin_elsewhere, {"base"}),
    "documents of a packed row mixed": (TEXT, mix_the_documents, {"loss"}),
    "the optimizer's state lost when a run is resumed": (TICKETS, resume_without_the_optimizer, {"resumed"}),
    "half of the adapter frozen": (TICKETS, freeze_half_of_the_adapter, {"trained"}),
    "a layer frozen that `unfreeze` names": (PARTIAL, freeze_a_layer, {"trained"}),
    "training rows evaluated": (FILING, evaluate_on_what_is_trained, {"rows"}),
    "rows drawn in their order": (TICKETS, draw_rows_in_order, {"order"}),
    "rows not cut at `max_length`": (TEXT, leave_rows_long, {"mask"}),
    "of a dialogue only the last answer learned": (CHAT, learn_the_last_answer, {"mask"}),
    "the loss of a step not divided by its tokens": (CHAT, divide_by_each_batch, {"loss"}),
    "another `beta` in DPO": (DPO, forget_beta, {"loss"}),
    "AdaLoRA's ranks left as they were": (ADALORA, keep_all_ranks, {"moved"}),
    "`modules_to_save` lost": (TICKETS, forget_whole_modules, {"targets", "options"}),
    "one layer quantized of several": (TEXT, quantize_the_first_layer_only, {"options"}),
    "the input of an instruction lost": (SQL, lose_the_input, {"mask"}),
    "long documents cut instead of split": (STORIES, cut_long_documents, {"rows"}),
    "dropout turned off": (CHAT, turn_dropout_off, {"options"}),
    "full fine-tuning in half precision": (INTENTS, train_half_precision, {"options"}),
    "a gradient left from the trial of the longest batch": (TICKETS, keep_the_trial_gradient, {"gradients"}),
    "another loss of DPO": (NORMALIZED, exchange_the_loss, {"options", "loss"}),
    "how the model samples not saved": (LLAMA, lose_the_sampling, {"saved"}),
    "a token lost at which the model stops": (INTENTS, lose_a_stop, {"saved"}),
    "another activation in bottleneck adapters": (BOTTLENECK, activate_otherwise, {"options"}),
    "the token lost that begins every text": (FULL, lose_the_first_token, {"prepared"}),
    "a packed row lost": (HANDBOOK, lose_a_packed_row, {"prepared"}),
    "an adapter trained in half precision": (LLAMA, train_the_adapter_in_half_precision, {"options"}),
    "evaluation rows packed": (LLAMA, pack_the_evaluation, {"prepared"}),
    "line breaks of the data lost": (PARTIAL, lose_line_breaks, {"prepared"}),
    "system prompts lost": (SQL, lose_the_systems, {"prepared", "mask"}),
    "instruction and input exchanged": (SQL, exchange_the_parts, {"prepared"}),
    "AdaLoRA's penalty with another weight": (ADALORA, punish_otherwise, {"loss"}),
    "an evaluation's loss divided by other tokens": (FILING, evaluate_otherwise, {"evaluated"}),
    "another configuration of the model": (INTENTS, change_the_model, {"base"}),
    "an adapter saved in half precision": (LLAMA, save_half_precision, {"saved", "result-differs"}),
    "weight decay on norms": (INTENTS, decay_everything, {"optimizer"}),
    "another chat template than the model's": (CHAT, take_another_template, {"prepared"}),
    "a prompt begun with other words": (PROMPT, begin_with_other_words, {"base"}),
    "a packed document that sees a part of itself only": (HANDBOOK, cut_the_attention, {"loss"}),
    "bottleneck adapters in other places": (BOTTLENECK, place_bottlenecks_elsewhere, {"targets"}),
    "an adapter that does not begin at the base": (TICKETS, begin_beside_the_base, {"loss"}),
    "AdaLoRA's ranks planned for other steps": (ADALORA, count_batches_for_steps, {"options", "moved"}),
    "a run resumed in another precision": ("smollm2_tickets_qlora", resume_in_another_precision, {"resumed"}),
    "the last rows held out, not rows drawn at random": (SQL, hold_out_the_last, {"rows"}),
    "a tokenizer saved that cuts texts": (TICKETS, save_a_short_tokenizer, {"saved"}),
    "each stage of a pipeline begun with the base": (PIPELINE, begin_each_stage_with_the_base, {"base"}),
    "packed rows half full": (STORIES, pack_half_rows, {"prepared"}),
    "another base named in the adapter": (TICKETS, save_another_base, {"saved"}),
    "the state of random numbers lost when a run is resumed": (
        "phi3_instruct_qlora",
        lose_the_random_state,
        {"resumed"},
    ),
    "training rows not packed": (LLAMA, pack_no_training_rows, {"prepared"}),
    "another default than upstream's": (HANDBOOK, change_a_default, {"options"}),
    "evaluation with dropout": (LLAMA, evaluate_with_dropout, {"evaluated"}),
    "training without dropout": (TICKETS, learn_without_dropout, {"options"}),
    "answers cut at the length of rows": (INTENTS, save_a_short_answer, {"saved"}),
    "a context saved that is that of rows": (INTENTS, save_a_short_context, {"base"}),
    "weights of rewards ignored": (RLOO, forget_the_weights_of_rewards, {"judged"}),
    "answers and their rewards not kept": (GRPO, keep_no_answers, {"judged"}),
    "rewards weighed by each other's weights": (GRPO, judge_by_another_model, {"judged"}),
    "the answers of pairs exchanged for a reward model": (SCORES, exchange_the_scored, {"prepared"}),
    "labels of a pair's answers exchanged": (KTO, exchange_the_labels, {"prepared"}),
    "the head of a reward model frozen": (SCORES, freeze_the_head, {"trained", "moved"}),
    "prompts without a place for the answer": (GRPO, ask_without_a_place_for_the_answer, {"mask"}),
    "what pads an answer learned": (GRPO, learn_what_pads_an_answer, {"mask"}),
    "prompts in the first epoch's order when a run is resumed": (
        "phi3_distillation_qlora",
        begin_the_order_anew,
        {"resumed", "order"},
    ),
    "answers sampled at another temperature": (GRPO, sample_otherwise, {"options"}),
}


# What is broken -> what is changed in the recipe, so that it shows.
CHANGES = {
    "gradients not clipped": {"training": {"max_grad_norm": 0.1}},
    "rows not cut at `max_length`": {"training": {"max_length": 32, "packing": False}},
    "of a dialogue only the last answer learned": {"training": {"packing": False}},
    "weight decay on norms": {"training": {"weight_decay": 0.1}},
    "an evaluation's loss divided by other tokens": {"training": {"packing": False}},
    "weights of rewards ignored": {"rewards": [{"name": "json_valid", "weight": 0.5}, {"name": "length", "max": 9}]},
    "`modules_to_save` lost": {"peft": {"modules_to_save": ["norm"]}},
}


@pytest.mark.parametrize("broken", RUNNER)
def test_a_broken_runner_is_caught(smoke, edit, monkeypatch, broken):
    name, breaking, checks = RUNNER[broken]
    recipe = RECIPES / f"{name}.yaml" if name == PIPELINE else edit(name, **CHANGES.get(broken, {}))
    breaking(monkeypatch)
    found = smoke(recipe)
    assert found.keys() & checks, found


def test_a_weight_decay_that_is_lost_is_caught(smoke, edit, monkeypatch):
    forget_weight_decay(monkeypatch)
    assert "optimizer" in smoke(edit(TICKETS, training={"weight_decay": 0.1}))


# What is broken in a recipe -> the recipe, its changed sections, and the checks of which one must say so.
HALF = {"method": "lora", "r": 8, "target_modules": r"model\.layers\.[0-9]\.self_attn\.(q|v)_proj"}
BROKEN_RECIPES = {
    "a template of another model": (
        TICKETS,
        {"training": {"chat_template_path": "TEMPLATE"}},
        {"mask", "template-token-missing"},
    ),
    "a target that misses two thirds of the layers": (TICKETS, {"peft": HALF}, {"targets"}),
    "a row length at which no answer is whole": (
        "phi3_instruct_qlora",
        {"training": {"max_length": 24}},
        {"rows", "too-many-dropped"},
    ),
    "the worst weights kept for the best": (
        FILING,
        {"training": {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}},
        {"best-metric"},
    ),
    "an adapter that begins at random": (TICKETS, {"peft": {"init_lora_weights": False}}, {"loss"}),
    "a prompt that ends with a space in plain text": (
        "smollm3_3b_instruct_qlora",
        {"dataset": {"template": "{instruction}\n{input}\nAnswer: {output}"}},
        {"prepared"},
    ),
    "a learning rate that rises": (
        TICKETS,
        {"training": {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 10}}},
        {"least-rate"},
    ),
    "the head quantized as well": (
        "phi3_instruct_qlora",
        {"quantization": {"llm_int8_skip_modules": ["embed_tokens"]}},
        {"quantized-head"},
    ),
    "a learning rate at which training diverges": (
        TICKETS,
        {"training": {"learning_rate": 1e6}},
        {"non-finite", "nothing-learned"},
    ),
}


@pytest.mark.parametrize("broken", BROKEN_RECIPES)
def test_a_broken_recipe_is_caught(smoke, edit, tmp_path, broken):
    import trl

    name, sections, checks = BROKEN_RECIPES[broken]
    if "chat_template_path" in str(sections):
        path = Path(trl.__file__).parent / "chat_templates" / "llama3_training.jinja"
        sections = {"training": {"chat_template_path": str(path)}}
    found = smoke(edit(name, **sections))
    assert found.keys() & checks, found


def test_the_documentation_lists_them():
    text = (ROOT / "docs" / "smoke.md").read_text().partition("## What it catches")[2].partition("\n## ")[0]
    listed = set(re.findall(r"^\| ([^|]+?) \| `\w+`", text, re.MULTILINE))
    assert listed == {*RUNNER, *BROKEN_RECIPES, "weight decay lost"}


def test_held_out_rows_are_cut_where_training_rows_are_split(smoke, edit):
    training = {"packing_strategy": "bfd_split", "eval_packing": False}
    assert smoke(edit(LLAMA, training=training)) == {}


# What might be taken for broken, and is not -> the recipe, and its changed sections.
RIGHT = {
    "an adapter that takes a part of the base": (TICKETS, {"peft": {"init_lora_weights": "pissa"}}),
    "layers without a bottleneck": (BOTTLENECK, {"peft": {"exclude_modules": [r"layers.0.mlp.down_proj"]}}),
    "long rows dropped": ("phi3_instruct_qlora", {"dataset": {"on_overlong": "drop"}}),
}


@pytest.mark.parametrize("kind", RIGHT)
def test_what_is_right_passes(smoke, edit, kind):
    name, sections = RIGHT[kind]
    assert smoke(edit(name, **sections)) == {}


@pytest.mark.parametrize("name", [TICKETS, DPO, TEXT, CHAT])
def test_an_unbroken_runner_passes(smoke, edit, name):
    assert smoke(edit(name)) == {}
