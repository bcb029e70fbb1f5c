"""llama_dist: multi-node LLaMA pretraining where the layout never changes the mathematics."""

__version__ = "0.1.0"
