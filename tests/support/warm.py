"""Imported once by the process that test ranks are forked from. Starts no thread."""

import contextlib
import gc
import importlib

import torch

torch.set_num_threads(1)
for name in (
    "torch.distributed.tensor",
    "torch.distributed.fsdp",
    "torch._dynamo",
    "lightning.pytorch",
    "accelerate",
    "support.deepspeed_cpu",
    "gradclip",
):
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
gc.freeze()  # what is imported here is no garbage: ranks collect theirs in no time
