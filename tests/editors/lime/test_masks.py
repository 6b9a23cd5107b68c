"""LiME's masks: their values at the start, the L0 and its gradient, languages by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.editors.conftest import model_of, tokenizer_of
from tests.editors.hyper.conftest import probes, signals_of
from xpatch.editors.hyper.kinds import blueprint, network_of
from xpatch.editors.hyper.network import Condition
from xpatch.editors.hyper.texts import Encoder
from xpatch.editors.lime.config import KE_PRESETS, MEND_PRESETS
from xpatch.editors.lime.masks import LARGEST, SMALLEST, HardConcreteMasks, Masked
from xpatch.errors import MismatchError

LANGUAGES = ("zh", "ar", "en")  # not the order of an alphabet


@pytest.fixture(params=["lime-mend", "lime-ke"])
def case(request: pytest.FixtureRequest) -> tuple[Masked, Any, Any]:
    model, tokenizer = model_of("bert"), tokenizer_of("bert")
    items, signals = signals_of(model, tokenizer, probes(), [0, 1, 2])
    small = {"rank": 8} if request.param == "lime-mend" else {"hidden": 8, "condition": 8}
    config = (MEND_PRESETS if request.param == "lime-mend" else KE_PRESETS)["default"].model_copy(update=small)
    network = network_of(request.param, blueprint(request.param, model, items, LANGUAGES, config))
    assert isinstance(network, Masked)
    return network, signals, Encoder(model, tokenizer)(probes())


def test_mask_at_the_start_is_one_and_a_half() -> None:
    masks = HardConcreteMasks(3, 400, torch.Generator().manual_seed(0)).eval()
    found = masks(torch.tensor([0, 1, 2]))
    assert ((found - 1.5).abs() <= 0.02).all()
    assert abs(float(masks.open_share(torch.tensor([0, 1, 2])).detach()) - 0.832) < 1e-3


def test_noise_is_drawn_while_training_and_masks_only_amplify() -> None:
    masks = HardConcreteMasks(2, 500, torch.Generator().manual_seed(0)).train()
    row = torch.zeros(4, dtype=torch.long)
    first, again, other = (masks(row, torch.Generator().manual_seed(seed)).detach() for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])  # fresh for every row
    assert float(first.min()) >= 1 and float(first.max()) <= 2
    shut, opened = float((first == 1).float().mean()), float((first == 2).float().mean())
    assert abs(shut - (1 - 0.832)) < 0.03 and abs(opened - (1 - 0.832)) < 0.03


def test_l0_has_a_gradient_and_pulls_the_masks_shut(case: Any) -> None:
    network, _, tokens = case
    loss = network.penalty(Condition(tokens, ["en", "zh", "en"]))
    loss.backward()
    for mask in (*network.inner, *network.outer):
        gradient = mask.log_alpha.grad
        assert (gradient[[0, 2]] > 0).all() and (gradient[1] == 0).all()  # the languages in use, and those alone
    assert abs(float(loss.detach()) - 0.832) < 1e-3


def test_log_alpha_stays_in_its_range() -> None:
    masks = HardConcreteMasks(1, 4, torch.Generator())
    with torch.no_grad():
        masks.log_alpha.copy_(torch.tensor([[-9.0, 9.0, 0.0, 1.0]]))
    masks.constrain()
    assert masks.log_alpha.tolist() == [[pytest.approx(SMALLEST), pytest.approx(LARGEST), 0.0, 1.0]]


def test_both_factors_are_masked_before_the_editor(case: Any) -> None:
    network, signals, tokens = case
    network.train().eval()
    seen: dict[str, Any] = {}
    network.editor.register_forward_pre_hook(lambda module, args: seen.update(args[0]))
    network(signals, Condition(tokens, ["zh", "en", "ar"]))
    for number, item in enumerate(network.linears):
        before, after = signals[item.name], seen[item.name]
        row = torch.tensor([0, 2, 1])[before.owner]
        assert torch.allclose(after.x, before.x * network.inner[number](row))
        assert torch.allclose(after.delta, before.delta * network.outer[number](row))


def test_noise_per_token_or_per_edit(case: Any) -> None:
    network, signals, tokens = case
    network.train()
    seen: dict[str, Any] = {}
    network.editor.register_forward_pre_hook(lambda module, args: seen.update(args[0]))
    network(signals, Condition(tokens, ["en"] * 3, torch.Generator().manual_seed(0)))
    name = next(name for name in signals if ".layer.0." in name)
    mine = signals[name].owner == 0
    ratio = seen[name].delta[mine] / signals[name].delta[mine]
    assert torch.allclose(ratio, ratio[:1].expand_as(ratio), atol=1e-3) == (not network.per_token)


def test_languages_go_by_name(case: Any) -> None:
    network, signals, tokens = case
    with torch.no_grad():
        for mask in (*network.inner, *network.outer):
            mask.scale[LANGUAGES.index("ar")] = 0.0
    network.train().eval()
    found = {
        language: network(signals, Condition(tokens, [language] * 3))[network.linears[0].name].dense(0)
        for language in LANGUAGES
    }
    assert not torch.allclose(found["ar"], found["en"], rtol=1e-3, atol=0)
    with pytest.raises(MismatchError, match="no mask for language 'de'.*zh, ar, en"):
        network(signals, Condition(tokens, ["de"] * 3))


def test_learning_rates_by_group(case: Any) -> None:
    network, _, _ = case
    groups = {name: network.group_of(name) for name, _ in network.named_parameters()}
    assert {group for name, group in groups.items() if name.split(".")[0] in ("inner", "outer")} == {"mask"}
    assert groups.get("editor.alpha", "step") == "step"
    assert MEND_PRESETS["paper"].l0_weight == 0.0 and MEND_PRESETS["default"].l0_weight > 0
