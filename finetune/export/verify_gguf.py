"""Reopen a GGUF file with llama.cpp, and compare its next tokens with the trained model's.

At some positions of every text llama.cpp continues the text so far by one token: the token and the
log-probabilities of the likeliest ones are compared. llama.cpp comes as the Python package
xllamacpp: pip install -e '.[gguf]'
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

from torch import Tensor

from finetune.export.gguf_file import MODEL_FILE
from finetune.files import read_json

LIMITS = {
    "f32": (1e-3, 1.0),
    "f16": (0.02, 0.98),
    "bf16": (0.1, 0.95),
    "q8_0": (0.25, 0.9),
}
"""dtype -> (mean difference of log-probabilities, least share of equal tokens).

A token is equal if llama.cpp's choice is as likely, within the limit, as the trained model's."""
POSITIONS = 16
"""Compared in each text, evenly spread."""
LIKELIEST = 10
"""Tokens whose log-probabilities are compared at each position."""


def compare(folder: Path, saved: dict[str, Tensor]) -> dict:
    """Return the figures of export.json, and whether they are within `LIMITS`.

    Args:
        saved: ids.N (T,) and outputs.N (T, V) of the trained model, each text alone.
    """
    import xllamacpp

    texts = [saved[f"ids.{i}"] for i in range(sum(name.startswith("ids.") for name in saved))]
    params = xllamacpp.CommonParams()
    params.model.path = str(folder / MODEL_FILE)
    params.n_ctx = 2 * max(map(len, texts))
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.warmup = False
    params.verbosity = 0
    server = xllamacpp.Server(params)

    dtype = read_json(folder / "finetune.json")["dtype"]
    limit, least_equal = LIMITS[dtype]
    differences: list[float] = []
    equal = positions = 0
    for i, ids in enumerate(texts):
        wanted = saved[f"outputs.{i}"].log_softmax(-1)
        for position in sorted({round(x * (len(ids) - 1) / POSITIONS) for x in range(POSITIONS)}):
            request = {
                "prompt": ids[: position + 1].tolist(),
                "max_tokens": 1,
                "temperature": 0,
                "logprobs": LIKELIEST,
                "ignore_eos": True,
            }
            answer = server.handle_completions(request)
            answer = json.loads(answer) if isinstance(answer, (str, bytes)) else answer
            (step,) = answer["choices"][0]["logprobs"]["content"]
            likeliest = {token["id"]: token["logprob"] for token in step["top_logprobs"]}
            here = wanted[position]
            differences += [abs(p - float(here[token])) for token, p in likeliest.items()]
            chosen = max(likeliest, key=likeliest.__getitem__)
            equal += float(here.max() - here[chosen]) <= limit
            positions += 1
    mean = sum(differences) / len(differences)
    return {
        "equal": mean <= limit and equal / positions >= least_equal,
        "mean_logprob_difference": mean,
        "max_logprob_difference": max(differences),
        "token_agreement": equal / positions,
        "positions": positions,
        "dtype": dtype,
        "engine": f"llama.cpp (xllamacpp {version('xllamacpp')})",
    }
