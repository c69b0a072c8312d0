"""Training on a quantised base is peft and bitsandbytes on Hugging Face's GPT-J, on any ranks and at any stage."""

from __future__ import annotations

import shutil
from functools import cache, partial
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, BitsAndBytesConfig, GPTJConfig, GPTJForCausalLM

from finetune.data.tokenizer import load_tokenizer
from finetune.planning.shape import LINEARS
from tests.conftest import SMALL
from tests.distributed import reference
from tests.distributed.ranks import losses, run_cases

STEPS, CUT, LENGTH, BATCH = 4, 2, 32, 8
COMMON = dict(
    steps=STEPS, global_batch=BATCH, length=LENGTH, lr=5e-3, weight_decay=0.1, clip=1.0, seed=3
)
INT8 = BitsAndBytesConfig(load_in_8bit=True)
NF4, NF4_DOUBLE = (
    BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )
    for double in (False, True)
)
CASES = {
    "nf4-stage0-1": (NF4_DOUBLE, "lora", "zero=stage0 train.micro_batch=8"),
    "nf4-stage1-2": (NF4_DOUBLE, "lora", "zero=stage1 train.micro_batch=2"),
    "nf4-stage2-2": (
        NF4_DOUBLE,
        "lora",
        "zero=stage2 train.micro_batch=4 train.activation_checkpointing=true",
    ),
    "nf4-stage3-1": (NF4_DOUBLE, "lora", "zero=stage3 train.micro_batch=4"),
    "nf4-stage3-2": (
        NF4_DOUBLE,
        "lora",
        "zero=stage3 train.micro_batch=2 train.activation_checkpointing=true",
    ),
    "single-stage3-2": (NF4, "lora", "zero=stage3 train.micro_batch=4"),
    "bin-stage3-2": (
        NF4_DOUBLE,
        "lora",
        "zero=stage3 zero.offload_optimizer=cpu zero.offload_params=cpu train.micro_batch=4",
    ),
    "int8-stage0-1": (INT8, "lora", "zero=stage0 train.micro_batch=2"),
    "int8-stage3-2": (INT8, "lora", "zero=stage3 train.micro_batch=2"),
    "dora-stage3-2": (NF4_DOUBLE, "dora", "zero=stage3 train.micro_batch=4"),
    "ia3-stage2-2": (INT8, "ia3", "zero=stage2 train.micro_batch=4"),
}
"""Name, which ends with the ranks -> bitsandbytes' settings, adapter, and the rest of the run."""
ADAPTERS = {
    "lora": "adapter=lora adapter.rank=4 adapter.alpha=8 adapter.targets=all-linear",
    "dora": "adapter=dora adapter.rank=4 adapter.alpha=8 adapter.targets=all-linear",
    "ia3": "adapter=ia3",
}
TOLERANCE = 1e-5


def wrap(model, adapter: str):
    torch.manual_seed(COMMON["seed"])
    if adapter == "ia3":
        settings = peft.IA3Config(
            task_type="CAUSAL_LM",
            target_modules=["k_proj", "v_proj", "fc_out"],
            feedforward_modules=["fc_out"],
        )
    else:
        settings = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=4,
            lora_alpha=8,
            target_modules=list(LINEARS),
            use_dora=adapter == "dora",
        )
    return peft.get_peft_model(model, settings)


def overrides(model: Path, data: Path, run_dir: Path, quantize: str, *more: str) -> list[str]:
    return [
        "recipe=clm_pile",
        f"model.path={model}",
        f"model.quantize={quantize}",
        "model.dtype=fp32",
        f"data.train={data}",
        f"run_dir={run_dir}",
        f"task.max_length={LENGTH}",
        f"train.steps={STEPS}",
        f"train.global_batch={BATCH}",
        "seed=3",
        "optim.lr=5e-3",
        "optim.weight_decay=0.1",
        "optim.betas=[0.9,0.999]",
        "optim.warmup=0",
        "optim.min_lr=0",
        "train.eval_every=0",
        "train.probe=false",
        "export.enabled=false",
        "train.activation_checkpointing=false",
        f"checkpoint.every={CUT}",
        *more,
    ]


@pytest.fixture(scope="module")
def model(pocket_gptj: Path, tmp_path_factory) -> Path:
    """`pocket_gptj` 64 wide: with fewer columns, bitsandbytes' CPU kernel mixes up its scales.

    Its folder `bin` holds the same weights as a pytorch_model.bin.
    """
    folder = tmp_path_factory.mktemp("model")
    AutoTokenizer.from_pretrained(pocket_gptj).save_pretrained(folder)
    torch.manual_seed(0)
    GPTJForCausalLM(GPTJConfig(**SMALL | {"vocab_size": 1024, "n_embd": 64})).save_pretrained(
        folder
    )
    shutil.copytree(folder, folder / "bin", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_file(folder / "model.safetensors"), folder / "bin" / "pytorch_model.bin")
    return folder


@pytest.fixture(scope="module")
def trained(model: Path, unequal_documents: Path, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("quantized")
    cases: dict[int, list[list[str]]] = {1: [], 2: []}
    for name, (settings, adapter, words) in CASES.items():
        quantize = "int8" if settings is INT8 else "nf4"
        double = f"model.quantize_double={str(settings is NF4_DOUBLE).lower()}"
        words = [double, *ADAPTERS[adapter].split(), *words.split()]
        weights = model / "bin" if name.startswith("bin") else model
        run = overrides(weights, unequal_documents, root / name, quantize, *words)
        cases[int(name[-1])].append(run)
    resumed = overrides(
        model, unequal_documents, root / "resumed", "nf4", *ADAPTERS["lora"].split(),
        "zero=stage3", "train.micro_batch=2", "train.activation_checkpointing=true",
        f"resume={root / 'nf4-stage3-2' / 'checkpoints' / f'step-{CUT:08d}'}",
    )  # fmt: skip
    elsewhere = [*resumed, f"run_dir={root / 'elsewhere'}", "zero=stage0", "train.micro_batch=4"]
    run_cases(2, [*cases[2], resumed])
    run_cases(1, [*cases[1], elsewhere])
    return root


@pytest.fixture(scope="module")
def plain(model: Path, unequal_documents: Path):
    @cache
    def train(name: str, adapter: str) -> list[float]:
        return reference.train(
            model,
            unequal_documents,
            load_tokenizer(str(model)),
            packing=True,
            wrap=partial(wrap, adapter=adapter),
            quantization=globals()[name],
            **COMMON,
        )[0]

    return train


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_losses_are_those_of_peft_and_bitsandbytes(trained, plain, name):
    settings, adapter, _ = CASES[name]
    constant = next(key for key in ("INT8", "NF4", "NF4_DOUBLE") if globals()[key] is settings)
    wanted = plain(constant, adapter)
    assert losses(trained / name) == pytest.approx(wanted, rel=TOLERANCE)
    assert len(set(wanted)) == STEPS


@pytest.mark.slow
def test_a_resumed_run_is_the_same_run(trained):
    whole = losses(trained / "nf4-stage3-2")
    assert losses(trained / "resumed") == whole[CUT:]
    assert losses(trained / "elsewhere") == pytest.approx(whole[CUT:], rel=TOLERANCE)
