"""A written checkpoint is loaded again and compared with the patched model before it is put in place."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from xpatch.errors import BackendError
from xpatch.exporters.side import side_paths
from xpatch.exporters.trace import evaluating
from xpatch.models.anatomy import ffn_site
from xpatch.models.surgery import Surgery
from xpatch.patches.types import LowRankDelta, Part, PatchNeurons

if TYPE_CHECKING:
    from xpatch.patches.types import PatchSet

#: Largest difference that is let pass, relative to one plus the largest output: what rounding of the weights' dtype makes.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_TOKENS = 16
_UNCOMPARED = "so what was written cannot be compared; nothing was put in place. Pass check=False (--no-check) to write it without"
_AIMED = 64  # rows a part is given to fire on


def check_written(model: Any, patches: PatchSet, folder: Path) -> None:
    """Raise `BackendError` where the checkpoint in `folder` does not compute what `model` with `patches` does.

    It is loaded with the model's own class, on the CPU: for that time there is a second model in memory. Both answer random tokens,
    and again with rows put in at the patched layers on which the neurons fire: trained ones are silent on most texts. The model is
    left as it was.
    """
    model = getattr(model, "_orig_mod", model)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    allowed = TOLERANCE.get(dtype, max(TOLERANCE.values()))
    rounded = replace(patches, parts={name: _rounded(part, dtype) for name, part in patches.parts.items()})
    inputs, aims = _tokens(model), _aims(model, patches)
    written = _loaded(model, folder)
    try:
        calls = 1 + max((-(-len(rows) // _TOKENS) for rows in aims.values()), default=0)
        for call in range(calls):
            rows = {name: found.roll(-_TOKENS * (call - 1), 0) for name, found in aims.items()} if call else {}
            with side_paths(model, rounded):
                expected = _outputs(model, inputs, rows, "the model cannot be called")
            found = _outputs(written, inputs, rows, "the written checkpoint cannot be called")
            _compare(found, expected, allowed, type(model).__name__)
    finally:
        del written
        gc.collect()  # or its files stay open, and Windows does not rename their folder


def _compare(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], allowed: float, model: str
) -> None:
    for name, wanted in expected.items():
        shape = list(found[name].shape) if name in found else "nothing"
        if shape != list(wanted.shape):
            raise BackendError(
                f"the written checkpoint does not compute what the patched {model} does: expected {name} {list(wanted.shape)}, found {shape}; "
                "nothing was put in place. Try another version of transformers, or serve the set with xpatch.apply"
            )
        difference = float((found[name] - wanted).abs().max())
        most = allowed * (1 + float(wanted.abs().max()))
        if not difference <= most:  # nor NaN
            raise BackendError(
                f"the written checkpoint does not compute what the patched {model} does: its {name} differ by {difference:.3g}, expected at "
                f"most {most:.3g}; nothing was put in place. Try another version of transformers, or serve the set with xpatch.apply"
            )


def _loaded(model: Any, folder: Path) -> Any:
    try:
        written = type(model).from_pretrained(folder, local_files_only=True).eval()
    except Exception as error:  # the loaders raise many kinds
        raise BackendError(
            f"the written checkpoint cannot be loaded again by {type(model).__name__}: {_first(error)}; nothing was put in place. Try another "
            "version of transformers, or serve the set with xpatch.apply"
        ) from error
    own = dict(model.named_parameters())
    for name, parameter in written.named_parameters():  # transformers 4 loads fp32 whatever the files hold
        if name in own:
            parameter.data = parameter.data.to(own[name].dtype)
    return written


def _tokens(model: Any) -> dict[str, torch.Tensor]:
    """One text of random tokens; one, for a model without padding takes no batch. A last eos for those that read there."""
    config, name = model.config, getattr(model, "main_input_name", "input_ids")
    if name != "input_ids":
        raise BackendError(f"{type(model).__name__} takes {name}, not input_ids, {_UNCOMPARED}")
    draw = torch.Generator().manual_seed(0)
    words = model.get_input_embeddings().weight
    ids = torch.randint(0, len(words), (1, _TOKENS), generator=draw)
    special = {getattr(config, name, None) for name in ("pad_token_id", "eos_token_id", "bos_token_id")}
    special = {token for token in special if isinstance(token, int)}
    plain = next(token for token in range(len(special) + 1) if token not in special)
    for token in special:
        ids[ids == token] = plain
    last = getattr(config, "eos_token_id", None)
    if isinstance(last, int) and last < len(words):
        ids[:, -1] = last
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids.clone()
    return inputs


def _aims(model: Any, patches: PatchSet) -> dict[str, torch.Tensor]:
    """Module name -> rows `[n, D_in]` on which its neurons fire, or its ranks act. Not below neurons: the width there is another."""
    found: dict[str, list[torch.Tensor]] = {}
    filled = {ffn_site(model, part.site).down for part in patches.parts.values() if isinstance(part, PatchNeurons)}
    for part in patches.parts.values():
        if not part.count:
            continue
        some = torch.linspace(0, part.count - 1, min(part.count, _AIMED)).long()
        if isinstance(part, PatchNeurons):
            keys = part.keys[some].float()
            reach = (1 - part.bias[some].float()) / keys.square().sum(1).clamp_min(1e-6)
            found.setdefault(ffn_site(model, part.site).up, []).append(keys * reach[:, None])
        elif isinstance(part, LowRankDelta) and part.site not in filled:
            down = part.down[some].float()
            rows = down / down.norm(dim=1, keepdim=True).clamp_min(1e-6) * down.shape[1] ** 0.5
            found.setdefault(part.site, []).append(rows)
    return {name: torch.cat(rows) for name, rows in found.items()}


def _outputs(
    model: Any, inputs: Mapping[str, torch.Tensor], rows: Mapping[str, torch.Tensor], otherwise: str
) -> dict[str, torch.Tensor]:
    def put(module: Any, args: Any, own: torch.Tensor) -> Any:
        x = args[0]
        count = x.numel() // x.shape[-1]
        chosen = own.repeat(-(-count // len(own)), 1)[:count]
        return (chosen.to(x).view_as(x), *args[1:])

    with Surgery() as surgery, evaluating(model), torch.no_grad():
        for name, own in rows.items():
            hook = lambda module, args, own=own: put(module, args, own)  # noqa: E731
            surgery.before(model.get_submodule(name), hook, first=True)  # the side path reads these rows too
        try:
            output = model(**{name: value.to(model.device) for name, value in inputs.items()}, return_dict=True)
        except Exception as error:
            raise BackendError(f"{otherwise} on random tokens ({_first(error)}), {_UNCOMPARED}") from error
    return {
        name: value.float().cpu()
        for name, value in output.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    }


def _rounded(part: Part, dtype: torch.dtype) -> Part:
    """Neurons as weights of `dtype` hold them; deltas are added in fp32."""
    if not isinstance(part, PatchNeurons):
        return part
    keys, bias, values = (tensor.to(dtype).float() for tensor in (part.keys, part.bias, part.values))
    return replace(part, keys=keys, bias=bias, values=values)


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
