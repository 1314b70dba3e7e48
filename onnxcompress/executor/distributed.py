"""Several processes that train together, as ``torchrun`` starts them: torch's DistributedDataParallel.

Each process sees the whole batch and takes its share, so that two processes compute what one does, but for the order of
additions.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from onnxcompress.data import Batch
from onnxcompress.executor.samples import rows_of

__all__ = ["Processes", "join_processes"]


@dataclass(frozen=True)
class Processes:
    """How many processes there are, and which one this is."""

    rank: int = 0
    size: int = 1
    device: Any = "cpu"

    def share(self, batch: Batch) -> Batch:
        """The samples of ``batch`` that this process computes."""
        if self.size == 1:
            return batch
        each = max(1, batch.samples // self.size)
        rows = np.arange(each) + (self.rank * each) % batch.samples
        return rows_of(batch, rows)

    def wrapped(self, network: Any) -> Any:
        """``network`` with gradients that are averaged over all processes."""
        if self.size == 1:
            return network
        return torch.nn.parallel.DistributedDataParallel(network, find_unused_parameters=True)

    def agreed(self, value: float) -> float:
        """The number of the first process, which all then use."""
        if self.size == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.float64, device=self.device)
        torch.distributed.broadcast(tensor, 0)
        return float(tensor[0])

    def leave(self) -> None:
        """Wait for the others and part from them."""
        if self.size > 1 and torch.distributed.is_initialized():
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()


def join_processes(device: Any) -> Processes:
    """Meet the processes that ``torchrun`` started, once; there is one where it did not."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size < 2 or "MASTER_ADDR" not in os.environ:
        return Processes()
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if torch.device(device).type == "cuda" else "gloo")
    return Processes(torch.distributed.get_rank(), torch.distributed.get_world_size(), device)
