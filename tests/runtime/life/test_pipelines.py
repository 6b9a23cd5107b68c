"""Code of transformers that calls the model: pipelines and the Trainer."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

import xpatch

TEXTS = ["w5 w9 w7", "w20 w31 w8 w6", "w44", "w12 w13"]


@pytest.fixture
def tokenizer():
    """One token a word, w0 to w99; the special ones are the first of them."""
    import transformers as hf
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(100)}, unk_token="w4"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", unk_token="w4", mask_token="w3", padding_side="left"
    )


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize(
    ("task", "family", "options"),
    [
        ("text-classification", "bert", {"top_k": None}),
        ("fill-mask", "bert-mlm", {}),
        ("text-generation", "gpt2-lm", {"max_new_tokens": 4, "do_sample": False}),
        ("text-generation", "llama", {"max_new_tokens": 4, "num_beams": 2, "do_sample": False}),
    ],
)
def test_pipelines(tiny, tokenizer, sets_for, patched, no_trace, token_ids, task, family, options, batch_size):
    from transformers import pipeline

    model = tiny(family)
    base, sets = copy.deepcopy(model), sets_for(model)
    texts = [f"{text} w3" for text in TEXTS] if task == "fill-mask" else TEXTS
    pipe = pipeline(task, model=model, tokenizer=tokenizer, device="cpu")

    def run():
        return [str(answer) for answer in pipe(texts, batch_size=batch_size, **options)]

    before = run()
    patched(pipe.model, sets)
    after = run()
    assert all(one != other for one, other in zip(before, after, strict=True))
    with xpatch.disabled(model):
        assert run() == before
    with xpatch.rows(patches="__base__"):
        assert run() == before
    if batch_size == len(texts):
        with xpatch.rows(patches=["__base__", list(sets), "__base__", None]):
            mixed = run()
        assert [mixed[0], mixed[2]] == [before[0], before[2]] and [mixed[1], mixed[3]] == [after[1], after[3]]
    copied = pipeline(task, model=patched(copy.deepcopy(base), sets), tokenizer=tokenizer, device="cpu")
    assert [str(answer) for answer in copied(texts, batch_size=batch_size, **options)] == after  # patched before
    xpatch.remove(model)
    assert run() == before
    no_trace(model, base, token_ids)


@pytest.fixture
def trainer(tmp_path):
    from transformers import Trainer, TrainingArguments

    def make(model, **more):
        rows = [{"input_ids": torch.randint(5, 99, (7,)), "labels": index % 2} for index in range(8)]
        options = {"per_device_eval_batch_size": 4, "per_device_train_batch_size": 4, "report_to": [], "use_cpu": True}
        arguments = TrainingArguments(tmp_path / "run", disable_tqdm=True, save_strategy="no", **options, **more)
        return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows), rows

    return make


def test_the_trainer_predicts_and_evaluates_with_patches(tiny, trainer, sets_for, patched, no_trace, token_ids):
    model = tiny("bert")
    base, sets = copy.deepcopy(model), sets_for(model)
    train, rows = trainer(model)
    before = torch.from_numpy(train.predict(rows).predictions)
    loss = train.evaluate()["eval_loss"]
    patched(model, sets)
    ids = torch.stack([row["input_ids"] for row in rows])
    with torch.no_grad():
        expected = torch.cat([model(part).logits for part in ids.split(4)])
    assert torch.equal(torch.from_numpy(train.predict(rows).predictions), expected)
    assert train.evaluate()["eval_loss"] != loss
    with xpatch.disabled(model):
        assert torch.equal(torch.from_numpy(train.predict(rows).predictions), before)
        assert train.evaluate()["eval_loss"] == pytest.approx(loss)
    no_trace(model, base, token_ids)


def test_the_trainer_trains_and_saves_the_base(tiny, trainer, sets_for, patched, tmp_path, token_ids):
    model = tiny("bert")
    base, sets = copy.deepcopy(model), sets_for(model)
    patched(model, sets)
    train, _ = trainer(model, max_steps=2, learning_rate=1e-2, seed=1)
    train.train()
    with pytest.warns(UserWarning, match="without its patches"):
        train.save_model(tmp_path / "saved")
    xpatch.remove(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        saved = type(model).from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        assert torch.equal(saved(token_ids).logits, model.eval()(token_ids).logits)
        assert not torch.equal(saved(token_ids).logits, base(token_ids).logits)
    assert (tmp_path / "saved" / "xpatch_applied.json").exists()
