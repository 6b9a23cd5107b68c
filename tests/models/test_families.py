"""Families whose sites structure alone does not settle."""

from __future__ import annotations

import pytest

from xpatch.models.anatomy import find_ffn_sites
from xpatch.models.families import FAMILIES


def test_albert_says_how_often_its_shared_layers_run(tiny):
    (site,) = find_ffn_sites(tiny("albert", layers=12))
    assert (site.uses, site.family, site.width, site.inner) == (12, "albert", 32, 64)
    groups = find_ffn_sites(tiny("albert", layers=5, num_hidden_groups=2))
    assert [(site.layer, site.uses) for site in groups] == [(0, 3), (1, 2)]
    inner = find_ffn_sites(tiny("albert", layers=4, inner_group_num=2))
    assert [site.uses for site in inner] == [4, 4]


@pytest.mark.parametrize("family", ["xlm", "flaubert"])
def test_xlm_keeps_its_ffns_in_a_list_of_their_own(tiny, family):
    sites = find_ffn_sites(tiny(family, layers=3))
    assert [site.name for site in sites] == [f"transformer.ffns.{layer}" for layer in range(3)]
    assert {(site.up.rpartition(".")[2], site.down.rpartition(".")[2], site.activation) for site in sites} == {
        ("lin1", "lin2", "gelu")
    }
    assert {(site.width, site.inner, site.stack, site.family) for site in sites} == {(32, 128, "encoder", "xlm")}


def test_llama4_is_patched_at_its_shared_expert(tiny):
    site = find_ffn_sites(tiny("llama4"))[-1]
    assert site.name == "model.layers.1.feed_forward" and site.kind == "experts"
    assert site.up == site.down == f"{site.name}.shared_expert"


def test_each_family_is_a_short_file_with_one_rule():
    for family in FAMILIES:
        assert family.MODEL_TYPES and callable(family.sites) and family.__doc__
