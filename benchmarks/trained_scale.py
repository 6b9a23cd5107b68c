"""From trained neurons to other cases: more of them, rows with outlier coordinates, and neurons that all fire. All of it declared here.

More neurons are resampled ones with measured noise. The noise is half of what separates sibling edits: a drawn neuron gets `SPREAD`
times the differences of two drawn neurons from their nearest trained neighbours, in keys and values, with normal weights that keep
their covariance. Its key's length and its bias are then set so that its pre-activations keep their mean and their variance over the
memory's rows. (With all of what separates siblings the histogram stays too, but half of the few pairs that fire are lost. Two
trainings of one edit with different seeds lie at a cosine of 0.997 of each other: with that as the noise, a kernel that groups
neurons would be flattered.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

CUTS = {"relu": 0.0, "gelu": -5.543, "gelu_tanh": -5.062}
"""Where an fp32 activation is exactly 0 in PyTorch, everywhere below."""
SPREAD = 0.5
OUTLIERS, SMALLEST, LARGEST, STRESS = 4, 20.0, 60.0, 5.0
BINS = 80
_BLOCK = 65536
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def cut_of(activation: str) -> float:
    """The activation's cut-off; minus infinity where it has none."""
    return CUTS.get(activation, float("-inf"))


def resample(
    trained: Tensors, memory: torch.Tensor, count: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> Tensors:
    """`count` neurons: the trained ones (keys `[N, D]`, bias `[N]`, values `[N, D]`) first, then resampled ones.

    memory `[M, D]`: rows over which mean and variance are kept.
    """
    keys, bias, values = trained
    mean = memory.mean(0)
    spread = torch.linalg.qr((memory - mean) / (len(memory) - 1) ** 0.5, mode="r").R  # variance of x·k is ‖R k‖²
    near = nearest(keys)
    noise_keys, noise_values = keys[near] - keys, values[near] - values
    made = [torch.empty(count, *tensor.shape[1:], dtype=dtype) for tensor in trained]
    for target, tensor in zip(made, trained, strict=True):
        target[: len(tensor)] = tensor[:count]
    for start in range(len(bias), count, _BLOCK):
        size = min(_BLOCK, count - start)
        chosen = torch.randint(len(bias), (size,), generator=generator)
        drawn = torch.randint(len(noise_keys), (2, size), generator=generator)
        weight = torch.randn(2, size, 1, generator=generator) * (SPREAD / 2**0.5)
        old = keys[chosen]
        new = old + (weight * noise_keys[drawn]).sum(0)
        new *= ((old @ spread.T).norm(dim=1) / (new @ spread.T).norm(dim=1)).unsqueeze(1)
        made[0][start : start + size] = new
        made[1][start : start + size] = bias[chosen] + (old - new) @ mean
        made[2][start : start + size] = values[chosen] + (weight * noise_values[drawn]).sum(0)
    return made[0], made[1], made[2]


def nearest(keys: torch.Tensor) -> torch.Tensor:
    """For each key `[N, D]` the number of the key at the smallest angle to it, itself excepted `[N]`."""
    units = torch.nn.functional.normalize(keys, dim=1)
    found = []
    for start in range(0, len(units), 1024):
        cosines = units[start : start + 1024] @ units.T
        cosines[torch.arange(len(cosines)), torch.arange(start, start + len(cosines))] = -2.0
        found.append(cosines.argmax(1))
    return torch.cat(found)


def outliers(
    keys: torch.Tensor, bias: torch.Tensor, x: torch.Tensor, generator: torch.Generator, memory: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """keys, bias, x and memory with outlier coordinates as large language models have them, every score as it was.

    `OUTLIERS` coordinates c of x get a mean of 20 to 60 times the root mean square of x, mostly of one sign, and their own value
    shrunk by `STRESS`; the keys' entries there are `STRESS` times as large, and the bias takes up the mean:
    k_c x_c = (5 k_c)(m_c + x_c / 5) - 5 k_c m_c.
    """
    width = keys.shape[1]
    where = torch.randperm(width, generator=generator)[:OUTLIERS]
    size = x.square().mean().sqrt() * torch.empty(OUTLIERS).uniform_(SMALLEST, LARGEST, generator=generator)
    size[-1] = -size[-1]
    keys, x, memory = keys.clone(), x.clone(), memory.clone()
    keys[:, where] *= STRESS
    for rows in (x, memory):
        rows[:, where] = size + rows[:, where] / STRESS
    return keys, (bias.double() - keys[:, where].double() @ size.double()).float(), x, memory


def adversarial(keys: torch.Tensor, bias: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The bias `[N]` with which every (row, neuron) pair is above zero."""
    lowest = torch.cat([(x @ part.float().T).amin(0) for part in keys.split(_BLOCK)])
    return 0.5 - lowest


def scores(
    keys: torch.Tensor, bias: torch.Tensor, x: torch.Tensor, rows: int = 512, neurons: int = 8192
) -> torch.Tensor:
    """Pre-activations of evenly chosen rows and neurons, `[rows, neurons]` at most."""
    every = max(1, -(-len(x) // rows)), max(1, -(-len(bias) // neurons))
    return torch.addmm(bias[:: every[1]].float(), x[:: every[0]].float(), keys[:: every[1]].float().T)


def histogram(before: torch.Tensor, after: torch.Tensor, activation: str) -> Mapping[str, Any]:
    """Pre-activations of the trained neurons and of a case's, on the same rows: shares per bin, the share above the cut-off, and
    `distance`, half the summed difference of the shares (0: equal, 1: apart).
    """
    cut = cut_of(activation)
    low, high = float(before.min()), float(before.max())
    edges = torch.linspace(low, high, BINS + 1)

    def shares(found: torch.Tensor) -> torch.Tensor:
        index = ((found.flatten() - low) / (high - low) * BINS).long().clamp(
            -1, BINS
        ) + 1  # outermost: outside the trained range
        return torch.bincount(index, minlength=BINS + 2).double() / found.numel()

    old, new = shares(before), shares(after)
    return {
        "edges": [round(value, 3) for value in edges.tolist()],
        "before": old.tolist(),
        "after": new.tolist(),
        "distance": 0.5 * float((old - new).abs().sum()),
        "cut": cut,
        "fires_before": float((before > cut).double().mean()),
        "fires_after": float((after > cut).double().mean()),
    }
