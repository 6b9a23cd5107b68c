from __future__ import annotations

import torch
from torch import nn

from xpatch.models.wrappers import plain_name, unwrapped


def test_the_model_behind_its_wrappers():
    model = nn.Sequential(nn.Linear(2, 2))
    assert unwrapped(model) is model
    assert unwrapped(torch.compile(nn.DataParallel(torch.compile(model)))) is model
    assert unwrapped("no model") == "no model"


def test_names_as_they_were_before_a_part_was_compiled():
    assert plain_name("encoder._orig_mod.layer.0._orig_mod.dense") == "encoder.layer.0.dense"
    assert plain_name("encoder.layer.0") == "encoder.layer.0"
