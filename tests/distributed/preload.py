"""Imported once by the server that forks ranks; it starts no thread."""

import matplotlib.pyplot  # noqa: F401
import peft  # noqa: F401
import transformers.models.gptj.modeling_gptj  # noqa: F401

import finetune.run  # noqa: F401
