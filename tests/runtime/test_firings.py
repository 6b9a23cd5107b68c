"""What counts as fired, under which language, and that nothing is lost, kept or shared that should not be."""

from __future__ import annotations

import copy
import gc
import pickle
import threading

import pytest
import torch

import xpatch
from xpatch import Gate, LowRankDelta, PatchNeurons, PatchSet, Rows
from xpatch.runtime import firings as module
from xpatch.runtime.attach import runtime_of
from xpatch.runtime.firings import OTHERS, UNKNOWN, Firings, countable, first_token_sites
from xpatch.runtime.routing import EVERYTHING, Route
from xpatch.runtime.snapshot import prepare_set


def neurons(site="bert.encoder.layer.1", bias=(1.0, 1.0, -1.0, 0.0), **more):
    """Silent keys: the bias alone decides who fires (two do), on every input."""
    count = len(bias)
    return PatchNeurons(site, torch.zeros(count, 32), torch.tensor(bias), torch.randn(count, 32), "relu", **more)


@pytest.fixture
def prepared(tiny):
    """The part of a set of four neurons, prepared for a tiny model but not applied."""
    return prepare_set(tiny("bert"), PatchSet(parts={"part": neurons()}), "a").parts[0]


def by_hand(fired, route):
    """Counts written out: (language, neuron) of every input with the neuron above zero at some token."""
    languages = route.languages if isinstance(route.languages, tuple) else [route.languages] * len(fired)
    counts = {}
    for item, row in enumerate(fired.tolist()):
        language = languages[item * len(languages) // len(fired)] or UNKNOWN
        mine = counts.setdefault(language, [0] * fired.shape[-1])
        for neuron in range(fired.shape[-1]):
            mine[neuron] += any(token[neuron] for token in row)
    return {language: mine for language, mine in counts.items() if any(mine)}


def record(counted, part, fired, route):
    """Hand in what fired, given as `[B, T, N]` or `[B·T, N]` bool."""
    *lead, neurons = fired.shape
    counted.record(part, fired.reshape(-1, neurons).nonzero(), lead, neurons, route)


def plain(counts):
    return {language: row.tolist() for language, row in counts.items() if row.any()}


@pytest.mark.parametrize("share", [0.0, 0.01, 0.9])
@pytest.mark.parametrize(
    "route",
    [
        EVERYTHING,
        Route(languages="de"),
        Route(languages=("en", "de", "en", "zh", "de", "en"), batch=6),
        Route(languages=("en", None, "en"), batch=3),  # two inputs for each row: beams
        Route(languages=("en", "de", "zh", "en"), batch=4),  # fits nothing: language unknown
    ],
    ids=["none", "one", "each", "beams", "unfit"],
)
def test_counts_are_those_written_out(prepared, share, route):
    fired = torch.rand(6, 5, 4) < share
    counted = Firings()
    for _ in range(3):
        record(counted, prepared, fired, route)
    fits = not isinstance(route.languages, tuple) or 6 % len(route.languages) == 0
    expected = by_hand(fired, route if fits else EVERYTHING)
    (found,) = counted.take([prepared])
    assert plain(found) == {language: [3 * count for count in row] for language, row in expected.items()}
    assert counted.total(prepared) == 3 * sum(map(sum, expected.values()))


def test_flattened_tokens_belong_to_their_input(prepared):
    fired = torch.rand(6, 5, 4) < 0.2
    route = Route(languages=("en", "de", "en", "zh", "de", "en"), batch=6)
    counted = Firings()
    record(counted, prepared, fired.reshape(30, 4), route)
    assert plain(counted.take([prepared])[0]) == by_hand(fired, route)


@torch.no_grad()
def test_a_classifier_counts_the_token_it_reads(tiny, token_ids):
    model = tiny("bert")
    assert first_token_sites(model) >= {"bert.encoder.layer.1"}
    keys = torch.randn(4, 32)
    final, below = (
        PatchNeurons(f"bert.encoder.layer.{layer}", keys, torch.zeros(4), 1e-3 * torch.randn(4, 32), "relu")
        for layer in (1, 0)
    )
    xpatch.apply(model, PatchSet(parts={"final": final, "below": below}), name="a")
    seen = {}
    for layer in (0, 1):
        up = model.bert.encoder.layer[layer].intermediate.dense
        up.register_forward_pre_hook(lambda m, args, layer=layer: seen.__setitem__(layer, args[0] @ keys.t() > 0))
    xpatch.status(model, count=True)
    model(token_ids)
    found = {part.part: part.fired for part in xpatch.status(model).parts}
    assert found == {"final": int(seen[1][:, 0].sum()), "below": int(seen[0].any(1).sum())}
    assert found["final"] < int(seen[1].any(1).sum())


@pytest.mark.parametrize("family", ["gpt2", "gpt2-lm", "bert-mlm", "opt", "llama"])
def test_other_models_count_every_token(tiny, family):
    assert first_token_sites(tiny(family)) == frozenset()


@torch.no_grad()
def test_rows_choose_language_and_set(tiny, token_ids):
    model = xpatch.apply(tiny("bert"), PatchSet(parts={"part": neurons()}), name="a")
    xpatch.apply(model, PatchSet(parts={"part": neurons(bias=(1.0,))}), name="b")
    xpatch.status(model, count=True)
    model(token_ids, xpatch=Rows(languages=["en", "de", "en"], patches=[None, "a", "__base__"]))
    model(token_ids)
    sets = runtime_of(model).snapshot.sets
    found = runtime_of(model).firings.take([sets["a"].parts[0], sets["b"].parts[0]])
    assert [plain(counts) for counts in found] == [
        {"en": [1, 1, 0, 0], "de": [1, 1, 0, 0], UNKNOWN: [3, 3, 0, 0]},
        {"en": [1], UNKNOWN: [3]},
    ]


@pytest.mark.parametrize("kind", ["ball", "threshold"])
@pytest.mark.parametrize("form", ["neurons", "lowrank", "dense"])
@torch.no_grad()
def test_gates_let_few_through(tiny, token_ids, patch_of, by_hand, form, kind):
    """A gated part counts inputs whose gate opened; its neurons only where they fire too."""
    model = tiny("bert-mlm")
    patches = patch_of(model, form, gate=kind)
    twin = by_hand(model, patches)
    twin(token_ids)
    site = twin.bert.encoder.layer[1].output.dense
    opened = torch.tensor(site.opened).reshape(3, 7)
    xpatch.apply(model, patches, name="a")
    part = runtime_of(model).snapshot.sets["a"].parts[0]
    xpatch.status(model, count=True)
    seen = []
    model.bert.encoder.layer[1].intermediate.dense.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    model(token_ids)
    if form == "neurons":
        fires = torch.nn.functional.linear(seen[0], part.part.keys, part.part.bias) > 0
        expected = (fires & opened.unsqueeze(-1)).any(1).sum()
    else:
        expected = opened.any(1).sum()
    assert xpatch.status(model).parts[0].fired == int(expected)


@torch.no_grad()
def test_a_delta_without_a_gate_is_not_counted(tiny, token_ids, patch_of):
    model = xpatch.apply(tiny("bert"), patch_of(tiny("bert"), "lowrank"), name="a")
    assert not countable(runtime_of(model).snapshot.sets["a"].parts[0])
    xpatch.status(model, count=True)
    model(token_ids)
    assert xpatch.status(model).parts[0].fired is None


@pytest.mark.parametrize("gate", [None, "ball", "threshold"])
@pytest.mark.parametrize("form", ["neurons", "lowrank", "dense"])
def test_counting_changes_no_answer_and_no_gradient(tiny, token_ids, patch_of, form, gate):
    model = tiny("bert")
    xpatch.apply(model, patch_of(model, form, mask=True, gate=gate), name="a")
    results = []
    for count in (False, True):
        xpatch.status(model, count=count)
        model.zero_grad()
        logits = model(token_ids, xpatch=Rows(languages=["de", "en", "xx"])).logits
        logits.square().sum().backward()
        results.append([logits, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert all(torch.equal(off, on) for off, on in zip(*results, strict=True))


def test_eight_threads_lose_nothing(tiny, token_ids):
    model = xpatch.apply(tiny("bert"), PatchSet(parts={"part": neurons()}), name="a")
    xpatch.status(model, count=True)
    calls, threads = 40, 8
    start = threading.Barrier(threads)

    def serve(language):
        start.wait()
        for _ in range(calls):
            with torch.no_grad():
                model(token_ids, xpatch=Rows(languages=[language, "en", language]))

    running = [threading.Thread(target=serve, args=(f"l{number % 4}",)) for number in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    part = runtime_of(model).snapshot.sets["a"].parts[0]
    (found,) = runtime_of(model).firings.take([part])
    assert plain(found) == {
        "en": [calls * threads] * 2 + [0, 0],
        **{f"l{number}": [2 * 2 * calls] * 2 + [0, 0] for number in range(4)},
    }


def test_reset_and_record_at_once_lose_nothing(prepared):
    counted, fired = Firings(), torch.ones(2, 3, 4, dtype=torch.bool)
    taken, done = [], threading.Event()

    def take():
        while not done.is_set():
            taken.append(counted.take([prepared], reset=True)[0])
        taken.append(counted.take([prepared], reset=True)[0])

    taker = threading.Thread(target=take)
    writers = [
        threading.Thread(target=lambda: [record(counted, prepared, fired, EVERYTHING) for _ in range(300)])
        for _ in range(4)
    ]
    for thread in [taker, *writers]:
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    taker.join()
    assert sum(counts[UNKNOWN].sum() for counts in taken if counts) == 4 * 300 * 2 * 4


def test_languages_are_bounded(prepared, monkeypatch):
    monkeypatch.setattr(module, "LANGUAGES_AT_MOST", 3)
    counted, fired = Firings(), torch.ones(1, 1, 4, dtype=torch.bool)
    for number in range(50):
        record(counted, prepared, fired, Route(languages=f"made-up-{number}"))
    (found,) = counted.take([prepared])
    assert set(found) == {"made-up-0", "made-up-1", "made-up-2", OTHERS}
    assert sum(row[0] for row in found.values()) == 50


@torch.no_grad()
def test_a_replaced_set_begins_at_zero_and_the_old_counts_go(tiny, token_ids):
    model = xpatch.apply(tiny("bert"), PatchSet(parts={"part": neurons()}), name="a")
    xpatch.apply(model, PatchSet(parts={"part": neurons(bias=(1.0,))}), name="b")
    xpatch.status(model, count=True)
    model(token_ids)
    xpatch.apply(model, PatchSet(parts={"part": neurons()}), name="a")
    assert [part.fired for part in xpatch.status(model).parts] == [0, 3]
    gc.collect()
    assert len(runtime_of(model).firings._tables) == 1


@torch.no_grad()
def test_a_copied_or_pickled_model_counts_on_by_itself(tiny, token_ids):
    model = xpatch.apply(tiny("bert"), PatchSet(parts={"part": neurons()}), name="a")
    xpatch.status(model, count=True)
    model(token_ids)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for other in copies:
        assert xpatch.status(other).parts[0].fired == 6
        other(token_ids)
        assert xpatch.status(other).parts[0].fired == 12
    assert xpatch.status(model).parts[0].fired == 6


@torch.no_grad()
def test_a_compiled_model_counts(tiny, token_ids):
    model = xpatch.apply(tiny("bert", layers=1), PatchSet(parts={"part": neurons("bert.encoder.layer.0")}), name="a")
    compiled = torch.compile(model, backend="eager")
    xpatch.status(model, count=True)
    for _ in range(3):
        compiled(token_ids)
    assert xpatch.status(compiled).parts[0].fired == 3 * 6


def test_inference_mode_and_training_share_counts(tiny, token_ids):
    model = xpatch.apply(tiny("bert"), PatchSet(parts={"part": neurons()}), name="a")
    xpatch.status(model, count=True)
    with torch.inference_mode():
        model(token_ids)
    model(token_ids).logits.sum().backward()
    assert xpatch.status(model).parts[0].fired == 12


@torch.no_grad()
def test_half_precision_models_count(tiny, token_ids):
    model = xpatch.apply(tiny("bert").to(torch.bfloat16), PatchSet(parts={"part": neurons()}), name="a")
    xpatch.status(model, count=True)
    model(token_ids)
    assert xpatch.status(model).parts[0].fired == 6


def test_tensors_without_data_count_nothing(prepared):
    counted = Firings()
    pairs = torch.zeros(5, 2, dtype=torch.int64)
    counted.record(prepared, pairs.to("meta"), (2, 3), 4, EVERYTHING)
    counted.record(prepared, pairs[:0], (0, 3), 4, EVERYTHING)
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        counted.record(prepared, torch.zeros(5, 2, dtype=torch.int64), (2, 3), 4, EVERYTHING)
    assert counted.total(prepared) == 0


def test_what_was_counted_elsewhere_only_on_wish():
    assert Firings().counts_on(torch.device("cuda")) and Firings(cpu_only=True).counts_on(torch.device("cpu"))
    assert not Firings(cpu_only=True).counts_on(torch.device("cuda"))


def test_a_gated_delta_beside_the_final_ffn_reads_one_token(tiny, token_ids):
    model = tiny("bert")
    down = "bert.encoder.layer.1.output.dense"
    with torch.no_grad():
        seen = []
        handle = model.get_submodule(down).register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        model(token_ids)
        handle.remove()
        gate = Gate("ball", keys=seen[0][1, :2].clone(), radii=torch.full((2,), 1e-3))  # tokens 0 and 1 of input 1
        delta = LowRankDelta(down, torch.randn(2, 64), torch.randn(32, 2), gate="g")
        xpatch.apply(model, PatchSet(parts={"part": delta}, gates={"g": gate}), name="a")
        xpatch.status(model, count=True)
        model(token_ids)
    assert xpatch.status(model).parts[0].fired == 1
