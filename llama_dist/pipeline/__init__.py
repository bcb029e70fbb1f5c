"""Stages, schedules, and the engine that runs them."""

import os

import torch

# DeepSpeed chooses its accelerator while it is imported, and without a GPU warns about it on every rank.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
