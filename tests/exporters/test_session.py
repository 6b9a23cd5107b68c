"""One session serves any patches: every form, count, mask and row choice, as PyTorch does; ONNX Runtime's silences are guarded."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

import xpatch
from tests.exporters.conftest import batch, close, lowrank, masks, neurons, torch_logits
from xpatch.exporters import Session, export_adapter


def patch_set(*parts, name=None, **more):
    return xpatch.PatchSet(parts={f"part.{i}": part for i, part in enumerate(parts)}, name=name, **more)


@pytest.fixture(scope="module")
def session(bert_base):
    return Session(bert_base.folder)


@pytest.mark.parametrize("count", [0, 1, 5, 300])
def test_any_number_of_neurons_through_one_session(bert_base, session, count):
    inputs = batch()
    patches = patch_set(neurons(bert_base.site, count, scale=0.3))
    session.apply(patches, "n")
    plain = torch_logits(bert_base.model, inputs)
    expected = torch_logits(bert_base.model, inputs, patches)
    assert close(session.run(inputs, xpatch=xpatch.Rows(patches="n"))["logits"], expected)
    assert close(session.run(inputs, xpatch=xpatch.Rows(patches="__base__"))["logits"], plain)
    assert (count == 0) == np.array_equal(expected, plain)


def test_low_rank_beside_neurons(bert_base, session):
    inputs = batch(rows=1, tokens=12)
    patches = patch_set(lowrank(bert_base.down, 3), neurons(bert_base.site, 2))
    session.apply(patches, "both")
    expected = torch_logits(bert_base.model, inputs, patches)
    assert not close(expected, torch_logits(bert_base.model, inputs), 1e-2)
    assert close(session.run(inputs, xpatch=xpatch.Rows(patches="both"))["logits"], expected)


def test_several_slots_with_gelu_and_an_up_projection(xlmr_base):
    inputs = batch(padding=1)
    patches = patch_set(
        neurons("roberta.encoder.layer.0", 4, "gelu"),
        neurons("roberta.encoder.layer.1", 7, "gelu"),
        lowrank("roberta.encoder.layer.1.intermediate.dense", 2, inside=32, outside=64),
    )
    found = Session(xlmr_base.folder, patches, providers=["CPUExecutionProvider"], threads=1).run(inputs)["logits"]
    assert found.shape == (4, 3)
    assert close(found, torch_logits(xlmr_base.model, inputs, patches))


def test_sets_add_up_and_rows_choose(bert_base):
    inputs = batch()
    one, two = (
        patch_set(neurons(bert_base.site, 3), name="one"),
        patch_set(neurons(bert_base.site, 4), lowrank(bert_base.down, 2), name="two"),
    )
    session = Session(bert_base.folder, [one, two])
    assert close(session.run(inputs)["logits"], torch_logits(bert_base.model, inputs, one, two))
    assert close(
        session.run(inputs, xpatch=xpatch.Rows(patches="two"))["logits"], torch_logits(bert_base.model, inputs, two)
    )
    choice = ["one", "__base__", ["one", "two"], None]
    expected = torch_logits(bert_base.model, inputs, one, two, rows=xpatch.Rows(patches=choice))
    assert close(session.run(inputs, xpatch=xpatch.Rows(patches=choice))["logits"], expected)
    session.remove("one")
    assert close(session.run(inputs)["logits"], torch_logits(bert_base.model, inputs, two))


def test_a_set_is_replaced_by_its_name(bert_base):
    inputs = batch()
    first, second = (patch_set(neurons(bert_base.site, 3)) for _ in range(2))
    session = Session(bert_base.folder, {"fixes": first})
    before = session.run(inputs)["logits"]
    session.apply(second, "fixes")
    assert not close(session.run(inputs)["logits"], before)
    assert close(session.run(inputs)["logits"], torch_logits(bert_base.model, inputs, second))


def test_contexts_choose_and_switch_off(bert_base):
    inputs = batch()
    one, two = (patch_set(neurons(bert_base.site, 3), name=name) for name in ("one", "two"))
    session = Session(bert_base.folder).apply(one).apply(two)
    both, alone, plain = (torch_logits(bert_base.model, inputs, *sets) for sets in ((one, two), (two,), ()))
    with session.rows(patches="two"):
        assert close(session.run(inputs)["logits"], alone)
        assert close(session.run(inputs, xpatch=xpatch.Rows())["logits"], both)  # what the call says wins
        with session.disabled():
            assert close(session.run(inputs)["logits"], plain)
        assert close(session.run(inputs)["logits"], alone)
    with xpatch.rows(patches="one"), Session(bert_base.folder).disabled():  # another session's switch
        assert close(session.run(inputs)["logits"], torch_logits(bert_base.model, inputs, one))
    assert close(session.run(inputs)["logits"], both)
    session.remove()
    assert close(session.run(inputs)["logits"], plain) and session.status().names == ()


def test_status_tells_sets_and_parts(bert_base):
    patches = patch_set(neurons(bert_base.site, 3), lowrank(bert_base.down, 2), name="fixes")
    status = Session(bert_base.folder, patches, providers=["CPUExecutionProvider"]).status()
    assert status.names == ("fixes",) and status.sets[0].fingerprint == patches.fingerprint
    assert {(part.form, part.count, part.kernel) for part in status.parts} == {
        ("neurons", 3, "CPUExecutionProvider"), ("lowrank", 2, "CPUExecutionProvider")
    }  # fmt: skip


def test_a_refused_set_leaves_the_session_as_it_was(bert_base):
    inputs = batch()
    good = patch_set(neurons(bert_base.site, 3), name="fixes")
    session = Session(bert_base.folder, good)
    before = session.run(inputs)["logits"]
    with pytest.raises(xpatch.MismatchError):
        session.apply(patch_set(neurons("bert.encoder.layer.7", 1)), "fixes")
    assert np.array_equal(session.run(inputs)["logits"], before) and session.patches == {"fixes": good}


def test_swaps_are_whole_for_calls_that_run(bert_base):
    """Two sets that are never on together, swapped while four threads run: every answer is one of the two, or the base's."""
    inputs = batch()
    sets = [patch_set(neurons(bert_base.site, 40), lowrank(bert_base.down, 3)) for _ in range(2)]
    session = Session(bert_base.folder, threads=1)
    allowed = [session.run(inputs)["logits"]] + [session.apply(one, "x").run(inputs)["logits"] for one in sets]
    stop, torn = threading.Event(), []

    def ask():
        while not stop.is_set():
            found = session.run(inputs)["logits"]
            if not any(np.array_equal(found, one) for one in allowed):
                torn.append(found)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for turn in range(300):
        session.apply(sets[turn % 2], "x") if turn % 7 else session.remove()
        if not turn % 7:
            session.apply(sets[0], "x")
    stop.set()
    for thread in threads:
        thread.join()
    assert not torn


def test_masks_by_language(bert_base, session):
    inputs = batch()
    patches = patch_set(
        neurons(bert_base.site, 5, mask="m"),
        lowrank(bert_base.down, 2, mask="wide"),
        masks={"m": masks("en", "zh"), "wide": masks("zh", "ar", inside=64)},
    )
    session.apply(patches, "masked")
    for languages in ("en", "zh", "unknown", ["en", "ar", "zh", "unknown"]):
        expected = torch_logits(bert_base.model, inputs, patches, rows=xpatch.Rows(languages=languages))
        assert close(
            session.run(inputs, xpatch=xpatch.Rows(patches="masked", languages=languages))["logits"], expected
        ), languages
    with pytest.warns(UserWarning, match="language masks but this call names no languages"):
        unmasked = torch_logits(bert_base.model, inputs, patches)
    with pytest.warns(UserWarning, match="language masks but this call names no languages"):
        assert close(session.run(inputs, xpatch=xpatch.Rows(patches="masked"))["logits"], unmasked)
    assert not close(unmasked, torch_logits(bert_base.model, inputs, patches, rows=xpatch.Rows(languages="zh")), 1e-3)


def test_a_fixed_order_of_languages(xlmr_base):
    inputs = batch(padding=1)
    patches = patch_set(neurons(xlmr_base.site, 5, "gelu", mask="m"), masks={"m": masks("ar", "en")})
    session = Session(xlmr_base.folder, patches)
    expected = torch_logits(xlmr_base.model, inputs, patches, rows=xpatch.Rows(languages=["en", "zh", "ar", "en"]))
    assert close(session.run(inputs, xpatch=xpatch.Rows(languages=["en", "zh", "ar", "en"]))["logits"], expected)
    other = patch_set(neurons(xlmr_base.site, 5, "gelu", mask="m"), masks={"m": masks("ar", "de")})
    with pytest.raises(xpatch.MismatchError, match=r"name de, .*exported for en, zh, ar"):
        session.apply(other)


def test_different_masks_in_one_slot_conflict(bert_base):
    one = patch_set(neurons(bert_base.site, 1, mask="m"), masks={"m": masks("en")}, name="one")
    two = patch_set(neurons(bert_base.site, 1), name="two")
    session = Session(bert_base.folder, [one, two])
    session.run(batch(), xpatch=xpatch.Rows(patches="one", languages="en"))
    with pytest.raises(xpatch.ConflictError, match="'part.0' of set 'one', 'part.0' of set 'two'"):
        session.run(batch())


def test_the_same_masks_in_two_sets(bert_base):
    inputs, mask = batch(), masks("en", "ar")
    one, two = (
        patch_set(neurons(bert_base.site, 2, mask="m"), masks={"m": mask}, name=name) for name in ("one", "two")
    )
    choice = xpatch.Rows(patches=["one", "two", ["one", "two"], "__base__"], languages="ar")
    expected = torch_logits(bert_base.model, inputs, one, two, rows=choice)
    found = Session(bert_base.folder, [one, two]).run(inputs, xpatch=choice)["logits"]
    assert close(found, expected)


def test_io_binding_sees_the_patches(bert_base):
    inputs = batch()
    patches = patch_set(neurons(bert_base.site, 3), name="fixes")
    session = Session(bert_base.folder, patches)
    binding = session.graphs["model"].io_binding()
    for name in session.base.inputs:
        value = inputs.get(name, torch.zeros_like(inputs["input_ids"])).numpy()
        binding.bind_cpu_input(name, value)
    binding.bind_output("logits", "cpu")
    for choice, sets in (("fixes", [patches]), ("__base__", []), (None, [patches])):
        session.bind(binding, 4, xpatch=xpatch.Rows(patches=choice))
        session.graphs["model"].run_with_iobinding(binding)
        assert close(binding.copy_outputs_to_cpu()[0], torch_logits(bert_base.model, inputs, *sets)), choice


def test_an_adapter_in_plain_onnxruntime(bert_base, tmp_path):
    """Other programs need nothing of xpatch: the file goes into ONNX Runtime as any adapter does."""
    import onnxruntime

    inputs = batch()
    patches = patch_set(neurons(bert_base.site, 5, mask="m"), masks={"m": masks("en", "zh")})
    path = export_adapter(patches, bert_base.folder, tmp_path / "fixes.onnx_adapter")
    plain = onnxruntime.InferenceSession(str(bert_base.folder / "model.onnx"), providers=["CPUExecutionProvider"])
    adapter, options = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
    adapter.Load(str(path))
    options.add_active_adapter(adapter)
    feed = {name: value.numpy() for name, value in inputs.items()}
    feed |= {"token_type_ids": np.zeros_like(feed["input_ids"]), "xpatch_language": np.asarray([2, 0, 1, 2])}
    expected = torch_logits(bert_base.model, inputs, patches, rows=xpatch.Rows(languages=["zh", "none", "en", "zh"]))
    assert close(plain.run(["logits"], feed, options)[0], expected)


def test_bad_calls_are_refused(bert_base):
    inputs = batch()
    session = Session(bert_base.folder, {"fixes": patch_set(neurons(bert_base.site, 2))})
    keys = next(tensor.name for slot in session.base.slots for key, tensor in slot.tensors.items() if key == "keys")
    with pytest.raises(xpatch.ConflictError, match=f"{keys} belong to patches"):
        session.run({**inputs, keys: np.zeros((32, 1), np.float32)})
    with pytest.raises(xpatch.MismatchError, match="no patch set is called 'fix'; applied are"):
        session.run(inputs, xpatch=xpatch.Rows(patches="fix"))
    with pytest.raises(xpatch.MismatchError, match="one entry per row: 4 rows"):
        session.run(inputs, xpatch=xpatch.Rows(patches=["fixes"]))
    with pytest.raises(xpatch.MismatchError, match="4 rows, found 1 codes"):
        session.run(inputs, xpatch=xpatch.Rows(languages=["en"]))
    with pytest.raises(xpatch.MismatchError, match="cannot be combined"):
        session.run(inputs, xpatch=xpatch.Rows(patches=[["fixes", "__base__"]] * 4))
    with pytest.raises(xpatch.MismatchError, match="unknown inputs labels"):
        session.run({**inputs, "labels": np.zeros(4)})
    with pytest.raises(xpatch.MismatchError, match="at most 40 tokens"):
        session.run(batch(tokens=41))
    with pytest.raises(xpatch.MismatchError, match=r"attention_mask: expected the shape of input_ids, \[4, 9\]"):
        session.run({**inputs, "attention_mask": np.ones((4, 8))})
    with pytest.raises(xpatch.MismatchError, match="no patch set is called 'gone'"):
        session.remove("gone")
    with pytest.raises(xpatch.ConflictError, match="means the unpatched model"):
        session.apply(patch_set(neurons(bert_base.site, 2)), "__base__")


def test_two_adapters_of_one_name_conflict(bert_base):
    sets = [patch_set(neurons(bert_base.site, 1), name="same") for _ in range(2)]
    with pytest.raises(xpatch.ConflictError, match="two sets are called 'same'"):
        Session(bert_base.folder, sets)


def test_a_missing_provider(bert_base):
    with pytest.raises(xpatch.BackendError, match="has no NoSuchProvider here; it has .*CPUExecutionProvider"):
        Session(bert_base.folder, providers=["NoSuchProvider"])
