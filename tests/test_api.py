from __future__ import annotations

import copy
import pickle

import pytest
import torch

import xpatch
from xpatch import ConflictError, DenseDelta, LowRankDelta, MismatchError, PatchNeurons, PatchSet
from xpatch.patches.types import EditRecord


def neurons(site="bert.encoder.layer.1", n=3, width=32, **more):
    more = {"activation": "relu", **more}
    return PatchNeurons(site, torch.randn(n, width), torch.randn(n), torch.randn(n, width), **more)


def one(part, name=None, **more):
    return PatchSet(parts={"p": part}, name=name, **more)


def hooks(model):
    return [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]


def test_names_default_to_the_set_and_repeat_to_replace(tiny, token_ids):
    model = tiny("bert")
    first, second = one(neurons()), one(neurons(), name="fixes")
    assert xpatch.apply(model, first) is model
    xpatch.apply(model, second)
    assert xpatch.status(model).names == (first.fingerprint[:12], "fixes")
    both = model(token_ids).logits
    xpatch.apply(model, first, name="fixes")
    assert xpatch.status(model).names == (first.fingerprint[:12], "fixes")
    assert not torch.equal(model(token_ids).logits, both)
    xpatch.apply(model, second, name="fixes")
    assert torch.equal(model(token_ids).logits, both)
    xpatch.remove(model, "fixes")
    assert xpatch.status(model).names == (first.fingerprint[:12],)


def test_remove_names_what_there_is(tiny):
    model = tiny("bert")
    assert xpatch.remove(model) is model
    with pytest.raises(
        MismatchError, match="no patch set is called 'x' on this BertForSequenceClassification; applied are none"
    ):
        xpatch.remove(model, "x")
    xpatch.apply(model, one(neurons()), name="a")
    with pytest.raises(MismatchError, match="applied are 'a'"):
        xpatch.remove(model, "x")
    assert xpatch.status(model).names == ("a",)


def test_status_counts_and_prints(tiny, token_ids):
    model = tiny("bert")
    assert str(xpatch.status(model)) == "no patches applied"
    xpatch.apply(model, one(neurons()), name="a")
    down = "bert.encoder.layer.0.output.dense"
    xpatch.apply(model, one(LowRankDelta(down, torch.randn(2, 64), torch.randn(32, 2))), name="b")
    status = xpatch.status(model)
    assert [(part.set_name, part.site, part.form, part.count, part.bytes) for part in status.parts] == [
        ("a", "bert.encoder.layer.1", "neurons", 3, 4 * (3 * 32 * 2 + 3)),
        ("b", down, "lowrank", 2, 4 * 2 * (64 + 32)),
    ]
    assert status.sites == ("bert.encoder.layer.1", down) and status.bytes == sum(part.bytes for part in status.parts)
    assert status.parts[0].kernel in ("native", "reference") and status.parts[0].fired == 0
    assert "bert.encoder.layer.1" in str(status) and status.sets[0].fingerprint[:12] in str(status)


@torch.no_grad()
def test_firings_are_counted_when_asked(tiny, token_ids):
    model = tiny("bert")
    always = PatchNeurons(
        "bert.encoder.layer.1", torch.zeros(4, 32), torch.tensor([1.0, 1.0, -1.0, 0.0]), torch.randn(4, 32), "relu"
    )
    xpatch.apply(model, one(always), name="a")
    model(token_ids)
    assert xpatch.status(model, count=True).parts[0].fired == 0
    model(token_ids)
    assert xpatch.status(model).parts[0].fired == 2 * 3
    model(token_ids, xpatch=xpatch.Rows(patches=["a", "__base__", "__base__"]))
    assert xpatch.status(model).parts[0].fired == 2 * 4
    assert xpatch.status(model, count=False).parts[0].fired is None


BAD_SETS = [
    (
        lambda: one(neurons("bert.encoder")),
        MismatchError,
        "has no FFN named 'bert.encoder'; it has bert.encoder.layer.0",
    ),
    (
        lambda: one(neurons(width=16)),
        MismatchError,
        r"part 'p' .* widths \(16, 16\), but 'bert.encoder.layer.1' .* has \(32, 32\)",
    ),
    (
        lambda: one(LowRankDelta("nowhere", torch.ones(1, 64), torch.ones(32, 1))),
        MismatchError,
        "no linear layer named 'nowhere'",
    ),
    (
        lambda: one(LowRankDelta("bert.encoder.layer.1.output.dense", torch.ones(1, 64), torch.ones(16, 1))),
        MismatchError,
        r"widths \(64, 16\), but 'bert.encoder.layer.1.output.dense' .* has \(64, 32\)",
    ),
    (
        lambda: one(DenseDelta("bert.encoder.layer.1.output.dense", torch.ones(32, 32))),
        MismatchError,
        r"widths \(32, 32\)",
    ),
]


@pytest.mark.parametrize("make, error, message", BAD_SETS)
@torch.no_grad()
def test_a_set_that_does_not_fit_changes_nothing(tiny, token_ids, make, error, message):
    for model in (tiny("bert"), xpatch.apply(tiny("bert"), one(neurons()), name="good")):
        before, up = model(token_ids).logits, hooks(model)
        with pytest.raises(error, match=message):
            xpatch.apply(model, make(), name="bad")
        assert torch.equal(model(token_ids).logits, before) and hooks(model) == up
        assert "bad" not in xpatch.status(model).names


@pytest.mark.parametrize("method", ["register_forward_hook", "register_forward_pre_hook"])
@torch.no_grad()
def test_an_apply_that_fails_on_the_way_changes_nothing(tiny, token_ids, monkeypatch, method):
    down = "bert.encoder.layer.0.output.dense"
    wide = PatchSet(parts={"p": neurons(), "q": LowRankDelta(down, torch.randn(2, 64), torch.randn(32, 2))})
    for model in (tiny("bert"), xpatch.apply(tiny("bert"), one(neurons("bert.encoder.layer.0")), name="good")):
        before, up, attributes = model(token_ids).logits, hooks(model), set(vars(model))
        done = 0
        while True:
            calls, real = [], getattr(torch.nn.Module, method)

            def failing(self, *args, calls=calls, real=real, limit=done, **kwargs):
                calls.append(1)
                if len(calls) > limit:
                    raise RuntimeError("injected")
                return real(self, *args, **kwargs)

            monkeypatch.setattr(torch.nn.Module, method, failing)
            try:
                xpatch.apply(model, wide, name="bad")
                break
            except RuntimeError as error:
                assert str(error) == "injected"
            finally:
                monkeypatch.setattr(torch.nn.Module, method, real)
            assert hooks(model) == up and set(vars(model)) == attributes
            assert torch.equal(model(token_ids).logits, before)
            done += 1
        assert done >= 1
        assert not torch.equal(model(token_ids).logits, before)


def test_the_base_is_checked_where_it_is_known(tiny):
    from xpatch.patches.identity import identify

    model, other = tiny("bert"), tiny("bert")
    patches = one(neurons(), base=identify(model, site="bert.encoder.layer.1"))
    with pytest.raises(MismatchError):
        xpatch.apply(other, patches)
    assert xpatch.status(other).names == ()
    xpatch.apply(model, patches)
    xpatch.apply(model, patches, name="again")  # applied patches are no change of the base
    assert len(xpatch.status(model).names) == 2


def test_wrong_arguments(tiny):
    model = tiny("bert")
    with pytest.raises(MismatchError, match=r"expected a PatchSet; found str. Load a folder with xpatch.load"):
        xpatch.apply(model, "fixes/")
    with pytest.raises(MismatchError, match=r"expected a torch.nn.Module as model; found str"):
        xpatch.apply("model", one(neurons()))
    with pytest.raises(ConflictError, match="cannot be called '__base__'"):
        xpatch.apply(model, one(neurons()), name="__base__")
    with pytest.raises(MismatchError, match="non-empty string"):
        xpatch.apply(model, one(neurons()), name="")


@pytest.mark.parametrize("family", ["bert", "gpt2-lm"])
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@torch.no_grad()
def test_copies_have_their_own_patches(tiny, token_ids, family, clone):
    model = tiny(family)
    base = model(token_ids).logits
    xpatch.apply(
        model, one(neurons("transformer.h.1.mlp" if family == "gpt2-lm" else "bert.encoder.layer.1")), name="a"
    )
    patched = model(token_ids).logits
    twin = clone(model)
    assert torch.equal(twin(token_ids).logits, patched) and xpatch.status(twin).names == ("a",)
    with xpatch.disabled(model):
        assert torch.equal(twin(token_ids).logits, patched)
    xpatch.remove(twin)
    assert torch.equal(twin(token_ids).logits, base) and torch.equal(model(token_ids).logits, patched)
    assert sum(map(sum, hooks(twin))) == 0 and "generate" not in vars(twin)
    twin = clone(model)
    xpatch.remove(model)
    assert torch.equal(twin(token_ids).logits, patched) and torch.equal(model(token_ids).logits, base)


def test_public_names_are_all_there():
    import importlib.util

    for name in xpatch.__all__:
        if name in ("edit", "methods") and importlib.util.find_spec("xpatch.editors.base") is None:
            continue
        assert getattr(xpatch, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = xpatch.nothing


def test_a_set_without_parts_is_listed_and_removed(tiny):
    model = tiny("bert")
    xpatch.apply(model, PatchSet(parts={}), name="nothing")
    assert "nothing" in str(xpatch.status(model))
    xpatch.remove(model, "nothing")
    with pytest.raises(MismatchError, match="nothing"):
        xpatch.remove(model, "nothing")


def expiring(site, **moments):
    """One neuron for each edit, which ends when `moments` says."""
    requests = {
        id: xpatch.EditRequest(id=id, versions={"en": {"text": id, "target": "1"}}, expires=moment)
        for id, moment in moments.items()
    }
    count = len(requests)
    part = xpatch.PatchNeurons(site, torch.randn(count, 32), torch.ones(count), torch.randn(count, 32), "relu")
    edits = tuple(
        EditRecord(id=id, method="by-hand", status="edited", request=request, rows={"neurons": (row,)})
        for row, (id, request) in enumerate(requests.items())
    )
    return xpatch.PatchSet(parts={"neurons": part}, edits=edits, name="fixes")


@torch.no_grad()
def test_expired_edits_are_left_out_and_named(tiny, token_ids):
    model = tiny("bert")
    patches = expiring("bert.encoder.layer.1", past="2020-01-31", never=None, future="2990-01-31")
    with pytest.warns(UserWarning, match="patch set 'fixes': expired edits are not applied: 'past'"):
        xpatch.apply(model, patches)
    found = model(token_ids).logits
    applied = xpatch.status(model).sets[0]
    assert (applied.edits, applied.expired, applied.fingerprint) == (2, ("past",), patches.fingerprint)
    assert str(xpatch.status(model)).startswith("fixes  2 edits (1 expired: past)  ")
    assert torch.equal(xpatch.apply(model, patches.drop(["past"]), name="fixes")(token_ids).logits, found)
    with pytest.raises(xpatch.FormatError, match="expires"):
        xpatch.apply(model, expiring("bert.encoder.layer.1", odd="soon"), name="other")
    assert xpatch.status(model).names == ("fixes",)


@torch.no_grad()
def test_only_signed_sets_are_applied_where_keys_are_asked_for(tiny, token_ids, tmp_path):
    from xpatch.patches.keys import generate_key

    for name in ("release", "other"):
        generate_key(tmp_path / name)
    model = tiny("bert")
    base = model(token_ids).logits
    patches = expiring("bert.encoder.layer.1", a=None, b=None)
    signed = xpatch.sign(patches, tmp_path / "release")
    for refused in (patches, xpatch.sign(patches, tmp_path / "other"), signed.drop(["a"])):
        with pytest.raises(xpatch.FormatError):
            xpatch.apply(model, refused, trusted_keys=[tmp_path / "release.pub"])
        assert torch.equal(model(token_ids).logits, base) and not xpatch.status(model).names
    xpatch.apply(model, signed, trusted_keys=[tmp_path / "release.pub"])
    assert not torch.equal(model(token_ids).logits, base)
