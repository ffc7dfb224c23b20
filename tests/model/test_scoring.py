"""What is not computed, or otherwise than upstream does: attention in packed rows, the loss on a CPU. Results stay."""

import pytest
import torch
from shared import LORA, build_model, metrics

DOCUMENTS = [[5, 9, 2, 7] * 9, [3] * 5, [8, 1, 6] * 7]  # one is longer than the sliding window
KINDS = {
    "phi3": {"num_key_value_heads": 2, "sliding_window": 16},
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 4},
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 16},
    "gpt_neox": {},
}
COUNTING = [
    {"messages": [{"role": "user", "content": f"count to {n}"}, {"role": "assistant", "content": "one " * n}]}
    for n in (3, 30, 7, 12, 5, 22, 9, 4)
]


@pytest.fixture
def sizes(monkeypatch):
    """Queries of each call of PyTorch's attention."""
    found, attend = [], torch.nn.functional.scaled_dot_product_attention

    def counted(query, *args, **kwargs):
        found.append(query.shape[2])
        return attend(query, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    return found


@pytest.fixture
def plain(monkeypatch):
    """Makes the next runs as upstream computes them."""
    import trl.trainer.utils
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction, _use_triton

    from recipe_runner.training import trainers

    def undo():
        monkeypatch.setattr(trainers, "split_attention", lambda trainer: None)
        monkeypatch.setattr(trainers, "score_on_cpu", lambda: None)
        monkeypatch.setattr(trl.trainer.utils, "_use_triton", _use_triton)
        monkeypatch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", ChunkedLogProbFunction)
        AttentionInterface.register("sdpa", sdpa_attention_forward)

    return undo


@pytest.mark.parametrize("kind", KINDS)
def test_documents_are_attended_one_by_one(kind, sizes):
    """With the mask's blocks, so that a sliding window is heeded; gradients are those of the whole row."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from recipe_runner.training.packing import DocumentCollator, attend_within_documents

    model = build_model(kind, **KINDS[kind])
    first, second, third = DOCUMENTS
    rows = [{"input_ids": first + second, "labels": first + second, "seq_lengths": [36, 5]}]
    rows.append({"input_ids": third, "labels": third, "seq_lengths": [21]})
    found, gradients = [], []
    for attend in (sdpa_attention_forward, attend_within_documents):
        AttentionInterface.register("sdpa", attend)
        batch = DocumentCollator(pad_token_id=0, padding_free=True)(rows)
        assert batch["document_bounds"] == (0, 36, 41, 62)
        model.zero_grad()
        sizes.append("|")
        output = model(**batch, use_cache=False)
        output.loss.backward()
        found.append(output.logits.detach())
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    border = sizes.index("|", 1)
    assert set(sizes[1:border]) == {62}
    assert set(sizes[border + 1 :]) == {36, 5, 21}
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("tokens", "calls"), [(4095, [4095]), (4096, [2048, 2048])])
def test_an_accelerator_attends_to_short_rows_at_once(sizes, tokens, calls):
    """Tensors without content stand for those of a GPU."""
    from recipe_runner.training.packing import attend_within_documents

    query = torch.empty(1, 2, tokens, 8, device="meta")
    mask = torch.empty(1, 1, tokens, tokens, dtype=torch.bool, device="meta")
    bounds = (0, 2048, tokens)
    answer, _ = attend_within_documents(torch.nn.Module(), query, query, query, mask, document_bounds=bounds)
    assert answer.shape == (1, tokens, 2, 8)
    assert sizes == calls


def test_a_packed_run_is_the_same(run_recipe, sizes, plain):
    """Two packed rows a batch, which TRL makes one row of: no attention is larger than the longest document."""
    found, most = [], []
    training = {"packing": True, "max_length": 64, "per_device_train_batch_size": 2, "max_steps": 3}
    for number in range(2):
        if number:
            plain()
        sizes.clear()
        options = {"rows": COUNTING, "dataset": {"format": "chat"}, "training": training, "peft": LORA}
        result, folder = run_recipe(name=f"run{number}", **options)
        assert result.status == 0, result.err
        found.append([(entry["loss"], entry["entropy"]) for entry in metrics(folder) if "loss" in entry])
        most.append(max(sizes))
    assert most[0] <= 64 < most[1], "transformers still attends to the whole row"
    assert len(found[0]) == 3
    for ours, theirs in zip(*found, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_only_what_is_learned_is_scored(run_recipe, plain, monkeypatch, stage):
    """The loss, its entropy and accuracy are those of TRL, which on a CPU scores the prompts, too."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    from recipe_runner.model import scoring

    scored = []
    for name, of in (("ours", scoring.Score), ("TRL's", ChunkedLogProbFunction)):
        watch(monkeypatch, of, lambda hidden, name=name: scored.append((name, len(hidden))))
    rows = [{"instruction": "one two three " * n, "output": "four " * n} for n in range(1, 9)]
    dataset = {"format": "instruction"}
    if stage == "dpo":
        rows = [{"prompt": "one two " * n, "chosen": "four " * n, "rejected": "no"} for n in range(1, 9)]
        dataset = {"format": "preference"}
    found = []
    for number in range(2):
        if number:
            plain()
        training = {"max_steps": 3, "per_device_train_batch_size": 2}
        options = {"stage": stage, "rows": rows, "dataset": dataset, "training": training, "peft": LORA}
        result, folder = run_recipe(name=f"run{number}", **options)
        assert result.status == 0, result.err
        found.append([entry for entry in metrics(folder) if "loss" in entry])
    total = {name: sum(count for by, count in scored if by == name) for name, _ in scored}
    assert 0 < total["ours"] < total["TRL's"], "TRL still scores all tokens on a CPU"
    for ours, theirs in zip(*found, strict=True):
        for name in ("loss", "entropy", "mean_token_accuracy", "num_tokens", "grad_norm"):
            if name in theirs:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name


def watch(monkeypatch, of, look):
    apply = of.apply
    monkeypatch.setattr(of, "apply", lambda hidden, *rest: look(hidden) or apply(hidden, *rest))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 5, 23])
@pytest.mark.parametrize("autocast", [False, True])
def test_scores_are_those_of_trl(monkeypatch, tokens, dtype, autocast):
    """In one part and in several, with all that an architecture may ask for; the gradients, too."""
    from trl.kernels.chunked_logprob import OPTIONAL_OUTPUTS, ChunkedLogProbFunction

    from recipe_runner.model import scoring

    monkeypatch.setattr(scoring, "LOGITS", 5 * 300)
    torch.manual_seed(tokens)
    targets, found = torch.randint(0, 300, (tokens,)), []
    values = [torch.randn(tokens, 16, dtype=dtype), torch.randn(300, 16), torch.randn(300)]
    for of in (scoring.Score, ChunkedLogProbFunction):
        given = [value.clone().requires_grad_() for value in values]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            scores = of.apply(*given, targets, 0.7, 128, 20.0, 0.5, OPTIONAL_OUTPUTS)
        (scores[0].sum() + 0.1 * scores[1].sum()).backward()
        found.append((scores, [value.grad for value in given]))
    exact = dtype == torch.float32 and not autocast
    close = {"rtol": 1e-4, "atol": 1e-5} if exact else {"rtol": 2e-2, "atol": 3e-2 * max(1, tokens) ** 0.5}
    for ours, theirs in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(ours, theirs, **close)
    for ours, theirs in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(ours, theirs, **close)


def test_what_is_not_asked_for_is_not_computed():
    from recipe_runner.model.scoring import Score

    scores = Score.apply(torch.ones(2, 4), torch.ones(8, 4), None, torch.tensor([1, 2]), 1.0, 8)
    assert scores[1:] == (None, None, None, None)


def test_a_batch_without_learned_tokens_is_a_loss_of_0(tiny_phi3, plain):
    import trl.trainer.utils
    from transformers import AutoModelForCausalLM

    from recipe_runner.model.scoring import score_on_cpu

    model = AutoModelForCausalLM.from_pretrained(tiny_phi3)
    trl.trainer.utils.add_fused_lm_head(model)
    plain()
    score_on_cpu()
    ids = torch.tensor([[1, 2, 3, 4]])
    output = model(input_ids=ids, labels=torch.full_like(ids, -100), fused_lm_head=True)
    output.loss.backward()
    assert output.loss.item() == 0
    assert all(not parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)
