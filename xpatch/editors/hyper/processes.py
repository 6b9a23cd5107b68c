"""Several processes training one editor, through accelerate; one process needs nothing."""

from __future__ import annotations

import os
from typing import Any

import torch

from xpatch.errors import BackendError


class Processes:
    """This process's rank among `count`. Launched by `accelerate launch` or `torchrun`, which set WORLD_SIZE."""

    def __init__(self) -> None:
        self._accelerator: Any = None
        self.rank, self.count = 0, 1
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            try:
                from accelerate import Accelerator
            except ImportError:
                raise BackendError(
                    "training in several processes needs the package accelerate, which is not installed; pip install accelerate"
                ) from None
            self._accelerator = Accelerator()
            self.rank, self.count = self._accelerator.process_index, self._accelerator.num_processes

    @property
    def device(self) -> torch.device | None:
        """The device accelerate gives this process, None without it."""
        return None if self._accelerator is None else self._accelerator.device

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean of `values` over all processes."""
        if self._accelerator is None:
            return values
        device = self._accelerator.device
        return self._accelerator.reduce(values.to(device), reduction="mean").to(values.device)

    def wait(self) -> None:
        """Until every process is here."""
        if self._accelerator is not None:
            self._accelerator.wait_for_everyone()
