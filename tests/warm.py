"""Imported once by the servers that fork ranks: what every run would otherwise import, compose and load anew.

No thread is started here: a forked process would not have it.
"""

from functools import cache

import datasets  # noqa: F401
import matplotlib.backends.backend_agg  # noqa: F401
import peft  # noqa: F401
import transformers.models.gptj.modeling_gptj  # noqa: F401
from deepspeed.ops import op_builder  # noqa: F401
from deepspeed.runtime.zero.muon import muon_optimizer  # noqa: F401

import finetune.run
import finetune.training.inputs
from finetune.compose import recipe_config
from finetune.config import own_tokens
from finetune.data.tokenizer import load_tokenizer
from finetune.reporting.page import picture

for recipe in ("clm_pile", "instruct_lora", "classify_lora", "qa_lora", "preference_lora"):
    recipe_config(recipe)

# GPT-J's tokenizer takes a second to load, and curves.png half a second to draw: tests/data and tests/reporting have
# tests of them.
plain = cache(load_tokenizer)
finetune.training.inputs.load_tokenizer = lambda path, task: (
    load_tokenizer(path, task) if own_tokens(task) else plain(path)
)
plain(None)
picture.curves_png = lambda charts, title: b""
