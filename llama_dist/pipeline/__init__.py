"""Stages, schedules, and the engine that runs them."""

import os

from llama_dist.runtime import has_gpu

# DeepSpeed chooses its accelerator while it is imported, and without a GPU warns about it on every rank.
if not has_gpu():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
