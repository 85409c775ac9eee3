"""One of two ranks: python two_ranks.py STORE RANK; prints what all ranks should compute."""

import sys

import torch
import torch.distributed as dist

from opd_lightning.metrics import AverageAtK, PassAtK

SCORES = torch.tensor([[1.0, 0, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0.5, 0.9, 1, 0, 0]])
SHARES = [[[2], [3, 1]], [[], [0]]]  # of each rank, in each round

store, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
metrics = [AverageAtK(), PassAtK(2)]
for rows in SHARES[rank]:
    for metric in metrics:
        metric.update(SCORES[rows], torch.tensor(rows, dtype=torch.int64))
print([tuple(metric.compute()) for metric in metrics])
dist.destroy_process_group()
