"""An ordinary Accelerate script that knows nothing of gradclip; writes what each process did."""

import argparse
import json
import os
import pickle
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, Dataset


class Numbers(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.full((4,), float(index))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args()
    accelerator = Accelerator()
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    spawn = {"num_workers": options.workers, "multiprocessing_context": "spawn"}
    batches = DataLoader(Numbers(), batch_size=2, **(spawn if options.workers else {}))
    model, optimizer, batches = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=0.1), batches
    )
    norms, seen = [], []
    for batch in batches:
        seen.append(batch[:, 0].tolist())
        accelerator.backward((model(batch) - 9).square().mean())
        accelerator.clip_grad_norm_(model.parameters(), 1e9)
        norms.append(float(nn.utils.get_total_norm([p.grad for p in model.parameters()])))
        optimizer.step()
        optimizer.zero_grad()
    pickle.loads(pickle.dumps(batches.dataset))
    report = {
        "processes": accelerator.num_processes,
        "kind": str(accelerator.distributed_type),
        "norms": norms,
        "seen": seen,
        "weights": model.state_dict()[next(iter(model.state_dict()))].tolist(),
    }
    file = options.folder / f"rank{accelerator.process_index}.json"
    file.write_text(json.dumps(report), encoding="utf-8")
    accelerator.end_training()
    # A gloo thread that lets go of the last backward's context while the interpreter shuts down
    # aborts the process (pytorch#190489), under plain DDP too; an exit without a shutdown can't.
    os._exit(0)
