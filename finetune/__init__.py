"""Fine-tune GPT-J with DeepSpeed: Hydra configs in, proven exports out. Start reading at `finetune/run.py`."""

__version__ = "0.1.0"
