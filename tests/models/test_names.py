from __future__ import annotations

from xpatch.models.names import near, some


def test_short_lists_are_whole_and_long_ones_say_how_much_is_left():
    assert some([]) == "none"
    assert some(["a", "b"]) == near("x", ["a", "b"]) == "a, b"
    assert some(list("abcdefghij"), 3) == "a, b, c, and 7 more"


def test_the_nearest_names_in_their_own_order():
    names = [f"model.layers.{layer}.mlp.{part}" for layer in range(20) for part in ("up_proj", "down_proj")]
    assert near("layers.7.mlp.down_proj", names, 1) == "model.layers.7.mlp.down_proj, and 39 more"
    assert near("model.layers.7.down_proj", names, 2).split(", ")[-1] == "and 38 more"
    assert "up_proj" not in near("model.layers.7.down_proj", names, 20)
