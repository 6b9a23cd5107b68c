"""Deltas of many sets at one site: computed together, each row gets its own, as if each were computed alone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import xpatch
from xpatch import Gate, LowRankDelta, PatchSet, Rows
from xpatch.models import find_ffn_sites
from xpatch.ops import native
from xpatch.runtime.layer import add_patches
from xpatch.runtime.routing import EVERYTHING, Route, resolve
from xpatch.runtime.runs import DeltaRun, chosen, steps_of
from xpatch.runtime.snapshot import Snapshot, prepare_set

NAMES = [f"customer-{number}" for number in range(12)]


def delta_of(model, seed, rank=3, **names):
    site = find_ffn_sites(model)[-1]
    draw = torch.Generator().manual_seed(seed)
    down, up = torch.randn(rank, site.inner, generator=draw), torch.randn(site.width, rank, generator=draw)
    return LowRankDelta(site.down, down, up, **names)


def sets_of(model):
    parts = [delta_of(model, seed, rank=1 + seed % 4) for seed in range(len(NAMES))]
    return {name: prepare_set(model, PatchSet({"d": part}), name) for name, part in zip(NAMES, parts, strict=True)}


@pytest.fixture
def snapshot(tiny):
    return Snapshot.of(sets_of(tiny("bert")), 1)


def site_of(snapshot):
    (site,) = snapshot.at
    return snapshot.at[site], snapshot.steps[site]


CHOICES = {
    "everything": None,
    "one": "customer-3",
    "one, some rows": ["customer-3", "__base__", "customer-3", "__base__"],
    "two, all rows": [["customer-3", "customer-7"]] * 4,
    "one each": NAMES[:4],
    "mixed": [["customer-0", "customer-11"], "__base__", None, "customer-5"],
    "nothing": "__base__",
}


@pytest.mark.parametrize("shape", [(4, 64), (4, 7, 64), (12, 64), (8, 5, 64)])
@pytest.mark.parametrize("choice", CHOICES)
def test_together_is_one_after_another(snapshot, choice, shape):
    parts, steps = site_of(snapshot)
    assert len(parts) == 12 and len(steps) == 1
    route = resolve(Rows(patches=CHOICES[choice]), NAMES, 4)
    x, y = torch.randn(shape), torch.randn(*shape[:-1], 32)
    alone = add_patches(parts, x, y, route)
    together = add_patches(steps, x, y, route)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    if choice == "nothing":
        assert together is y
    if choice == "one, some rows" or choice == "mixed":
        assert torch.equal(together.unflatten(0, (4, -1))[1], y.unflatten(0, (4, -1))[1])
    if choice.startswith("one") and choice != "one each":
        assert torch.equal(together, alone)  # a delta alone is computed as ever
    exact = add_patches(steps, x.double(), y.double(), route)
    torch.testing.assert_close(together.double(), exact, rtol=1e-3, atol=1e-3)


def test_a_row_gets_the_same_bits_whatever_the_others_get(snapshot):
    _, steps = site_of(snapshot)
    x, y = torch.randn(4, 7, 64), torch.randn(4, 7, 32)
    mine = ["customer-2", "customer-9"]
    found = [
        add_patches(steps, x, y, resolve(Rows(patches=[mine, *others]), NAMES, 4))[0]
        for others in (["__base__"] * 3, ["customer-1", "customer-4", "__base__"], [mine, "customer-0", mine])
    ]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_what_no_row_named_is_not_computed(tiny):
    if not native.available():
        pytest.skip("no native build")
    model = tiny("bert")
    _, steps = site_of(Snapshot.of(sets_of(model), 1))
    joined = steps[0].on(torch.device("cpu"), torch.float32)
    x, y = torch.randn(4, 64), torch.randn(4, 32)
    route = resolve(Rows(patches=["customer-1", "customer-2", "__base__", "customer-1"]), NAMES, 4)
    before = add_patches(steps, x, y, route)
    start = int(joined.offsets[3])
    joined.down[start:] = torch.nan
    joined.up[:, start:] = torch.nan
    assert torch.equal(add_patches(steps, x, y, route), before)


def test_only_plain_deltas_that_follow_each_other_are_joined(tiny, patch_of):
    model = tiny("bert")
    site = find_ffn_sites(model)[-1]
    gate = Gate("ball", keys=torch.randn(2, site.inner), radii=torch.ones(2))
    plain = [PatchSet({"d": delta_of(model, seed)}) for seed in range(5)]
    sets = [plain[0], plain[1], patch_of(model, "lowrank", mask=True), plain[2],
            PatchSet({"d": delta_of(model, 9, gate="g")}, gates={"g": gate}), plain[3], plain[4]]  # fmt: skip
    prepared = {str(number): prepare_set(model, one, str(number)) for number, one in enumerate(sets)}
    parts, steps = site_of(Snapshot.of(prepared, 1))
    shape = [len(step.parts) if isinstance(step, DeltaRun) else 1 for step in steps]
    assert shape == [2, 1, 1, 1, 2] and len(parts) == 7
    assert steps_of(parts[:1]) == parts[:1] and steps_of(()) == ()


def test_a_run_is_made_once(tiny):
    model = tiny("bert")
    sets = sets_of(model)
    first = Snapshot.of(sets, 1)
    neurons = prepare_set(model, PatchSet({}), "empty")
    second = Snapshot.of({**sets, "empty": neurons}, 2)
    assert site_of(first)[1][0] is site_of(second)[1][0]
    assert site_of(first)[1][0]._joined  # before the first call
    third = Snapshot.of({name: sets[name] for name in NAMES[:5]}, 3)
    assert len(site_of(third)[1][0].parts) == 5
    assert len(site_of(pickle.loads(pickle.dumps(first)))[1][0].parts) == 12


def test_who_gets_what():
    class Part:
        def __init__(self, name):
            self.set_name = name

    run = DeltaRun(tuple(Part(name) for name in "abc"))
    assert list(chosen((run,), EVERYTHING)) == [(run, True)]
    assert list(chosen((run,), Route(keep={"a": False, "b": False, "c": False}))) == []
    ((part, keep),) = chosen((run,), Route(keep={"a": False, "b": (True, False), "c": False}))
    assert part is run.parts[1] and keep == (True, False)
    ((step, keep),) = chosen((run,), Route(keep={"a": True, "b": False, "c": True}))
    assert step is run and keep.tolist() == [True, False, True]
    ((step, keep),) = chosen((run,), Route(keep={"a": True, "b": (False, True), "c": False}))
    assert step is run and keep.tolist() == [[True, False, False], [True, True, False]]


def test_served_models_and_gradients(tiny, token_ids):
    model = tiny("bert").double()
    for number, name in enumerate(NAMES[:4]):
        xpatch.apply(model, PatchSet({"d": delta_of(model, number)}), name=name)
    choice = [["customer-0", "customer-2"], "__base__", "customer-3"]
    twins = []
    for row, names in enumerate(choice):
        twin = xpatch.remove(copy.deepcopy(model))
        for number, name in enumerate(NAMES[:4]):
            if name in names:
                part = delta_of(twin, number)
                weight = twin.get_submodule(part.site).weight
                weight.data += part.up.double() @ part.down.double()
        twins.append(twin(token_ids[row : row + 1]).logits[0])
    found = model(token_ids, xpatch=Rows(patches=choice)).logits
    torch.testing.assert_close(found, torch.stack(twins), rtol=1e-9, atol=1e-9)
    found.sum().backward()
    assert all(parameter.grad is not None for parameter in model.bert.encoder.layer[0].parameters())


def test_a_compiled_model_follows_the_choice(tiny, token_ids):
    model = tiny("bert")
    for number, name in enumerate(NAMES[:3]):
        xpatch.apply(model, PatchSet({"d": delta_of(model, number)}), name=name)
    compiled = torch.compile(model, backend="aot_eager")
    for patches in (["customer-0", "customer-1", "__base__"], [["customer-2", "customer-0"], None, "customer-1"]):
        rows = Rows(patches=patches)
        torch.testing.assert_close(compiled(token_ids, xpatch=rows).logits, model(token_ids, xpatch=rows).logits)
