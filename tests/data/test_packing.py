"""Packed documents don't see each other: exact for the families on the shelf, refused where it is not."""

import pytest
from shared import TEXT, build_model

OPT = {"ffn_dim": 128, "word_embed_proj_dim": 64, "do_layer_norm_before": True}


def losses(model, documents):
    """Sum of the losses of each document in a row, by TRL's collator, as `SFTTrainer.compute_loss` calls the model."""
    import torch
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    row = [token for document in documents for token in document]
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    batch = collator([{"input_ids": row, "labels": row, "seq_lengths": [len(document) for document in documents]}])
    labels = batch.pop("labels")[0]
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits[0]
    each = torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="none", ignore_index=-100)
    ends = torch.tensor([len(document) for document in documents]).cumsum(0).tolist()
    starts = [0, *ends[:-1]]
    assert all(labels[start] == -100 for start in starts)  # the end of one document never predicts the next
    return [float(each[start : end - 1].sum()) for start, end in zip(starts, ends, strict=True)]


@pytest.mark.parametrize("kind", ["phi3", "llama"], ids=["Phi-3", "SmolLM2"])
def test_loss_of_a_packed_document_is_its_loss_alone(kind):
    import torch

    model = build_model(kind, num_key_value_heads=2)
    documents = [torch.randint(1, 600, (length,)).tolist() for length in (30, 7, 55)]
    packed = losses(model, documents)
    alone = [losses(model, [document])[0] for document in documents]
    assert packed == pytest.approx(alone, rel=1e-4)
    mixed = losses(model, [[token for document in documents for token in document]])[0]
    assert abs(mixed - sum(alone)) > 1  # the comparison can tell


def test_a_model_that_would_mix_documents_is_refused_packing(run_recipe, tokenizer, tmp_path):
    folder = tmp_path / "opt"
    build_model("opt", **OPT).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    training = {"packing": True, "max_length": 64, "max_steps": 1, "learning_rate": 1e-4}
    options = {
        "rows": TEXT,
        "dataset": {"format": "text"},
        "model": {"name_or_path": str(folder)},
        "training": training,
    }
    result, _ = run_recipe(**options)
    assert result.status == 1
    assert "error[packing-not-exact] training.packing: packing is not exact for" in result.err
    assert "group_by_length instead" in result.err
    assert run_recipe("--set", "training.packing=false", **options)[0].status == 0
