"""Training end to end on a tiny model: it learns, leaves no trace, goes on exactly, and says what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import xpatch
from tests.editors.conftest import model_of, tokenizer_of
from tests.editors.hyper.conftest import SMALL, facts
from tests.editors.test_edit import digest
from xpatch.editors.hyper import train as training_module
from xpatch.editors.hyper.folder import CARD, TRAINING, WEIGHTS, read_card, read_tensors
from xpatch.errors import ConflictError, FormatError, MismatchError

METHODS = ("ke", "mend", "lime-ke", "lime-mend")


def train(out: Path, method: str = "mend", data: Any = None, model: Any = None, **options: Any) -> Any:
    model, tokenizer = model or model_of("bert"), tokenizer_of("bert")
    options = {"progress": False, **SMALL[method], **options}
    return xpatch.train_editor(model, tokenizer, facts() if data is None else data, method, out=out, **options)


def tensors(folder: Path, name: str = WEIGHTS) -> dict[str, torch.Tensor]:
    return read_tensors(folder / name)[0]


def same(first: Path, second: Path) -> bool:
    one, two = ({**tensors(path), **tensors(path, TRAINING)} for path in (first, second))
    return list(one) == list(two) and all(torch.equal(one[name], two[name]) for name in one)


class Interrupted(Exception):
    pass


def stop_at(step: int) -> Any:
    def hear(stage: str, done: int, total: int) -> None:
        if stage == "training" and done == step:
            raise Interrupted

    return hear


@pytest.mark.parametrize("method", METHODS)
def test_training_leaves_the_model_and_goes_on_exactly(method: str, tmp_path: Path) -> None:
    """Stopped between two checkpoints and called again, a training ends with the very bits of one that ran through."""
    model = model_of("bert")
    model.train()
    before, state = digest(model), torch.random.get_rng_state()
    hooks = [len(module._forward_hooks) for module in model.modules()]
    options = {"edit_languages": "all", "outer_languages": "all", "accumulate": 2}
    whole = train(tmp_path / "whole", method, model=model, **options)
    assert digest(model) == before and torch.equal(torch.random.get_rng_state(), state)
    assert hooks == [len(module._forward_hooks) for module in model.modules()] and model.training
    assert [int(found["step"]) for found in whole.history] == [3, 6] and whole.steps == 6 and whole.skipped == 0
    with pytest.raises(Interrupted):
        train(tmp_path / "parts", method, progress=stop_at(5), **options)
    assert read_tensors(tmp_path / "parts" / TRAINING)[1]["step"] == 3
    resumed = train(tmp_path / "parts", method, **options)
    assert same(tmp_path / "whole", tmp_path / "parts") and resumed.history == whole.history
    again = train(tmp_path / "parts", method, **options)  # finished: returns at once
    assert again.history == whole.history and same(tmp_path / "whole", tmp_path / "parts")


def test_the_folder_holds_names_and_no_pickle(tmp_path: Path) -> None:
    train(tmp_path / "e", "lime-mend", edit_languages="all")
    assert sorted(path.name for path in (tmp_path / "e").iterdir()) == sorted([CARD, TRAINING, WEIGHTS])
    card = json.loads((tmp_path / "e" / CARD).read_text(encoding="utf-8"))
    assert card["languages"] == ["de", "en", "xx"] and card["method"] == "lime-mend" and card["settings"]["rank"] == 8
    assert read_card(tmp_path / "e").base.all_weights.fp32
    masks = [value for name, value in tensors(tmp_path / "e").items() if "log_alpha" in name]
    assert len(masks) == 8 and all(len(mask) == 3 for mask in masks)


def test_it_learns(tmp_path: Path) -> None:
    """Flips on held-out facts: an inert editor gets none right (below), a trained one most."""
    options = {"steps": 60, "edits_per_step": 8, "validation_edits": 24, "flips": 1.0, "alpha": 1e-3, "learning_rate": 3e-3,
               "alpha_rate": 1e-3, "edit_weight": 1.0, "outer_texts": "edit", "layers": 1, "validate_every": 20}  # fmt: skip
    found = train(tmp_path / "e", data=facts(24), **options)
    assert found.history[-1]["flips_right"] > 0.6
    alpha = tensors(tmp_path / "e", TRAINING)["network.alpha"]
    assert not torch.equal(alpha, torch.full_like(alpha, 1e-3))


def test_an_inert_editor_gets_the_kept_half_right(tmp_path: Path) -> None:
    """With a step size of zero nothing changes: no flip is right, every edit that asks for the base's answer is, all else stays."""
    options = {"alpha": 0.0, "alpha_rate": 1e-30, "steps": 1, "validate_every": 1, "outer_texts": "edit"}
    found = train(tmp_path / "e", validation_edits=60, **options).history[0]
    assert found["kept"] == 1.0 and found["flips_right"] == 0.0 and abs(found["kl"]) < 1e-6
    assert abs(found["right"] - 0.5) < 0.2


def test_the_best_weights_are_kept(tmp_path: Path) -> None:
    """With a learning rate that ruins the network, the folder holds the first checkpoint and training stops early."""
    found = train(tmp_path / "e", steps=40, validate_every=2, patience=4, learning_rate=0.3, best_by="loss")
    losses = [entry["loss"] for entry in found.history]
    best = min(range(len(losses)), key=losses.__getitem__)
    assert found.best_step == int(found.history[best]["step"])
    assert read_tensors(tmp_path / "e" / WEIGHTS)[1]["validation"] == found.history[best]
    assert found.steps == found.best_step + 4 or found.steps == 40


def test_a_step_without_a_finite_gradient_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from xpatch.editors.hyper.trainer import Trainer

    plain = Trainer._gradients
    monkeypatch.setattr(
        Trainer, "_gradients", lambda self: plain(self) * (float("nan") if self.progress.step != 2 else 1.0)
    )
    broken = train(tmp_path / "a")
    assert broken.skipped == 5
    assert all(torch.isfinite(value).all() for value in tensors(tmp_path / "a", TRAINING).values())


def test_the_paper_objective_of_knowledge_editor(tmp_path: Path) -> None:
    """The multiplier climbs while KL is above its margin; the condition names both answers; every matrix is edited."""
    options = {**SMALL["ke"], "preset": "paper", "locality_per_edit": 2, "layers": 0, "edits_per_step": 2}
    train(tmp_path / "e", "ke", **options)
    facts_ = read_tensors(tmp_path / "e" / TRAINING)[1]
    assert facts_["multiplier"] != 1.0 and facts_["multiplier"] >= 0
    assert len(read_card(tmp_path / "e").linears) == 2 * 6


def test_l0_pulls_only_where_it_is_switched_on(tmp_path: Path) -> None:
    options = {"steps": 5, "validate_every": 5, "mask_rate": 0.05, "edits_per_step": 2}
    for weight in (0.0, 50.0):
        train(tmp_path / str(weight), "lime-mend", l0_weight=weight, **options)
    off, on = (
        torch.cat([v.flatten() for k, v in tensors(tmp_path / name, TRAINING).items() if k.endswith("log_alpha") and "network" in k])
        for name in ("0.0", "50.0")
    )  # fmt: skip
    assert float(on.mean()) < -0.15 < float(off.mean())


def test_bf16_trains(tmp_path: Path) -> None:
    found = train(tmp_path / "e", precision="bf16")
    assert found.skipped == 0 and all(torch.isfinite(v).all() for v in tensors(tmp_path / "e").values())


def test_another_training_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    train(tmp_path / "e")
    for words, options in (
        ("another method", {"method": "ke"}),
        ("another seed", {"seed": 1}),
        ("another data", {"data": facts(13)}),
        ("learning_rate=", {"learning_rate": 1.0}),
        ("another base", {"model": model_of("bert", 2)}),
    ):
        with pytest.raises(ConflictError, match=words):
            train(tmp_path / "e", **options)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("x", encoding="utf-8")
    with pytest.raises(ConflictError, match="other files"):
        train(tmp_path / "other")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"method": "mpn"}, FormatError, "no editor to train; methods with one: ke, lime-ke"),
        ({"preset": "best"}, FormatError, "no preset 'best'"),
        ({"learning_rat": 1}, FormatError, "no setting 'learning_rat'"),
        ({"edits_per_step": 1, "accumulate": 2}, FormatError, "edits_per_step"),
        ({"data": facts(3)}, FormatError, "at least 4 requests"),
        ({"validation": facts(2)}, FormatError, "'fact-0' is in the training data"),
        ({"model": model_of("bert").half()}, MismatchError, "float16"),
        ({"edit_languages": ["fr"]}, FormatError, "edit languages"),
    ],
)
def test_wrong_calls(options: dict[str, Any], error: type, words: str, tmp_path: Path) -> None:
    method = options.pop("method", "mend")
    with pytest.raises(error, match=words):
        xpatch.train_editor(
            options.pop("model", None) or model_of("bert"),
            tokenizer_of("bert"),
            options.pop("data", None) or facts(),
            method,
            out=tmp_path / "e",
            progress=False,
            **options,
        )


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    train(tmp_path / "e")
    (tmp_path / "e" / TRAINING).write_bytes(b"not a tensor file")
    with pytest.raises(FormatError, match=r"training\.safetensors is damaged"):
        train(tmp_path / "e")
    (tmp_path / "e" / CARD).write_text("{}", encoding="utf-8")
    with pytest.raises(FormatError, match=r"editor\.json.*format_version"):
        train(tmp_path / "e")


def test_nothing_half_written_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*ignored: Any, **also: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("xpatch.editors.files.save_file", fail)
    with pytest.raises(FormatError, match="cannot be written"):
        train(tmp_path / "e")
    assert [path.name for path in (tmp_path / "e").iterdir()] == [CARD]
    assert training_module.WEIGHTS == WEIGHTS
