from __future__ import annotations

import pytest
import torch
from torch import nn

from xpatch.models.surgery import Surgery


def _trace(model: nn.Module) -> dict:
    return {key: (list(value) if key.endswith("hooks") else None) for key, value in vars(model).items()}


def test_everything_is_undone_even_after_an_error():
    model = nn.Linear(2, 2)
    vars(model)["greet"] = "before"
    before = _trace(model)
    with pytest.raises(RuntimeError, match="inside"), Surgery() as surgery:
        surgery.before(model, lambda module, args: (args[0] + 1,))
        surgery.after(model, lambda module, args, output: output * 2, always=False)
        surgery.attribute(model, "greet", "during")
        surgery.attribute(model, "new", 1)
        x = torch.ones(1, 2)
        assert torch.equal(model(x), 2 * nn.functional.linear(x + 1, model.weight, model.bias))
        assert model.greet == "during"
        raise RuntimeError("inside")
    assert _trace(model) == before
    assert model.greet == "before"
    surgery.undo()
