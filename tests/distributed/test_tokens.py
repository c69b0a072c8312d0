"""Runs with tokens of their own are peft's on Hugging Face's GPT-J, on any ranks and stage, resumed and exported."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoTokenizer, GPTJForCausalLM

from finetune.cli.app import compose_config
from finetune.cli.export import run as export
from finetune.config import ClmConfig, LoraConfig
from finetune.data.tokenizer import load_tokenizer, token_ids
from finetune.errors import UserError
from finetune.files import read_json
from finetune.gptj import adapters
from tests.distributed import reference
from tests.distributed.ranks import losses, metrics, run_cases

TOKENS = ["<a>", "<|b|>"]
TASK = ClmConfig(tokens=TOKENS)
STEPS, CUT, LENGTH, BATCH = 4, 2, 32, 8
COMMON = dict(
    steps=STEPS, global_batch=BATCH, length=LENGTH, lr=5e-3, weight_decay=0.1, clip=1.0, seed=3
)
CASES = {
    "stage0-1": "zero=stage0 train.micro_batch=8",
    "stage2-2": "zero=stage2 train.micro_batch=4 train.activation_checkpointing=true",
    "stage3-2": "zero=stage3 train.micro_batch=2 train.activation_checkpointing=true export.enabled=true",
    "nf4-2": "zero=stage3 train.micro_batch=2 model.quantize=nf4 export.enabled=true",
}
"""Name, which ends with the ranks -> how it runs."""


@pytest.fixture(scope="module")
def data(unequal_documents: Path, tmp_path_factory) -> Path:
    """The documents with own tokens between their words."""
    file = tmp_path_factory.mktemp("own") / "own.jsonl"
    with file.open("w", encoding="utf-8") as f:
        for line in unequal_documents.read_text(encoding="utf-8").splitlines():
            words = json.loads(line)["text"].split(" ")
            text = "".join(w + (TOKENS[i % 2] if i % 3 == 0 else " ") for i, w in enumerate(words))
            f.write(json.dumps({"text": text}) + "\n")
    return file


@pytest.fixture(scope="module")
def runs(pocket_gptj: Path, data: Path, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("tokens")

    def words(name: str, *more: str) -> list[str]:
        return [
            "recipe=clm_pile_lora", f"model.path={pocket_gptj}", "model.dtype=fp32", f"data.train={data}",
            f"run_dir={root / name}", f"task.max_length={LENGTH}", f"task.tokens={json.dumps(TOKENS)}",
            "adapter.rank=4", "adapter.alpha=8", "adapter.targets=all-linear", f"train.steps={STEPS}",
            f"train.global_batch={BATCH}", "seed=3", "optim.lr=5e-3", "optim.weight_decay=0.1",
            "optim.betas=[0.9,0.999]", "optim.warmup=0", "optim.min_lr=0", "train.eval_every=0",
            "train.probe=false", "export.enabled=false", "train.activation_checkpointing=false",
            f"checkpoint.every={CUT}", *more,
        ]  # fmt: skip

    def resumed(name: str) -> str:
        return f"resume={root / name / 'checkpoints' / f'step-{CUT:08d}'}"

    cases = {name: words(name, *how.split()) for name, how in CASES.items()}
    again = words("again", *CASES["stage3-2"].split(), resumed("stage3-2"), "export.enabled=false")
    run_cases(2, [*(case for name, case in cases.items() if name.endswith("2")), again])
    elsewhere = words("elsewhere", *CASES["stage0-1"].split(), resumed("stage3-2"))
    chat = [
        "recipe=instruct_lora", "data=instruct_sample", f"model.path={pocket_gptj}", "model.dtype=fp32",
        "task.template=chatml", "task.max_length=128", "data.on_bad_row=skip", "train.epochs=null",
        "train.steps=2", "train.micro_batch=2", "train.global_batch=4", "train.eval_every=0", "optim.lr=2e-2",
        "checkpoint.every=0", f"run_dir={root / 'chat'}",
    ]  # fmt: skip
    ones = [case for name, case in cases.items() if name.endswith("1")]
    run_cases(1, [*ones, elsewhere, chat])
    return root


@pytest.fixture(scope="module")
def plain(pocket_gptj: Path, data: Path) -> list[float]:
    """Losses of plain peft on Hugging Face's model, from the same start."""
    tokenizer = load_tokenizer(str(pocket_gptj), TASK)
    ids = list(token_ids(tokenizer, TASK).values())
    assert ids == [1000, 1001] and tokenizer.convert_ids_to_tokens(ids) == TOKENS

    def wrap(model):
        torch.manual_seed(COMMON["seed"])
        settings = adapters.peft_config(LoraConfig(rank=4, alpha=8), "lm", tokens=ids)
        model = peft.get_peft_model(model, settings)
        head = model.get_base_model().lm_head
        torch.nn.init.zeros_(head.lora_A["default"].weight)
        picker = head.lora_B["default"].weight.requires_grad_(False)
        picker[ids[0], 0] = picker[ids[1], 1] = 1
        return model

    return reference.train(pocket_gptj, data, tokenizer, packing=True, wrap=wrap, **COMMON)[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("stage")])
def test_losses_are_those_of_peft(runs, plain, name):
    assert losses(runs / name) == pytest.approx(plain, rel=1e-5)
    assert len(set(plain)) == STEPS


@pytest.mark.slow
def test_a_resumed_run_is_the_same_run(runs):
    whole = losses(runs / "stage3-2")
    assert losses(runs / "again") == whole[CUT:]
    assert losses(runs / "elsewhere") == pytest.approx(whole[CUT:], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stage3-2", "nf4-2"])
def test_the_adapter_and_its_tokens_travel(runs, name):
    folder = runs / name / "export"
    figures, settings = (read_json(folder / f) for f in ("export.json", "adapter_config.json"))
    assert figures["verified"] and figures["relative_difference"] < 1e-5
    assert settings["trainable_token_indices"] == {"wte": [1000, 1001]}
    text = AutoTokenizer.from_pretrained(folder).decode([1000, 1001])
    assert text == "".join(TOKENS)
    plan = read_json(runs / name / "plan.json")["parameters"]
    stored = peft.load_peft_weights(folder, device="cpu")
    picked = stored.pop("base_model.model.lm_head.lora_B.weight")
    assert picked.sum() == 2 and plan["trainable"] == sum(t.numel() for t in stored.values())


@pytest.mark.slow
def test_a_merged_model_has_the_bases_other_rows_bit_for_bit(runs, pocket_gptj, tmp_path):
    out = tmp_path / "merged"
    words = [f"run={runs / 'stage3-2'}", "kind=merged", f"out={out}", "verify=tensors"]
    export(compose_config(words, "export"))
    load = partial(GPTJForCausalLM.from_pretrained, dtype=torch.float32)
    base, merged = load(pocket_gptj), load(out)
    for name in ("transformer.wte.weight", "lm_head.weight"):
        before, after = base.get_parameter(name), merged.get_parameter(name)
        changed = (before.view(torch.int32) != after.view(torch.int32)).any(1).nonzero().flatten()
        assert changed.tolist() == [1000, 1001], name
    assert torch.equal(base.lm_head.bias, merged.lm_head.bias)
    wanted = peft.PeftModel.from_pretrained(base, runs / "stage3-2/export").merge_and_unload()
    for name, parameter in wanted.named_parameters():
        torch.testing.assert_close(merged.get_parameter(name), parameter, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_chatml_ends_turns_by_its_own_token_everywhere(runs, tmp_path):
    """In the adapter's files, in Phi's form and in a GGUF file that llama.cpp has read."""
    messages = [{"role": "user", "content": "2+2?"}]
    for kind, proof in (("phi", "none"), ("gguf", "outputs")):
        words = [
            f"run={runs / 'chat'}",
            f"kind={kind}",
            f"out={tmp_path / kind}",
            f"verify={proof}",
        ]
        export(compose_config(words, "export"))
    assert read_json(tmp_path / "gguf/export.json")["verified"]
    with pytest.raises(UserError, match="lora with trained tokens"):
        export(compose_config([f"run={runs / 'chat'}", "kind=phi_adapter"], "export"))
    for folder in (runs / "chat/export", tmp_path / "phi"):
        assert read_json(folder / "export.json")["chat_template"].startswith("training's ids")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert text == "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
        assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 1001)
        ids = tokenizer(text)["input_ids"]
        assert (ids[0], ids.count(1000), ids.count(1001)) == (1000, 2, 1)
    for name in ("config.json", "generation_config.json"):
        assert read_json(tmp_path / "phi" / name)["eos_token_id"] == 1001
    gguf = pytest.importorskip("gguf")
    fields = gguf.GGUFReader(tmp_path / "gguf/model.gguf").fields
    names, types = (
        fields[f"tokenizer.ggml.{key}"].contents()[1000:1003] for key in ("tokens", "token_type")
    )
    assert names[:2] == ["<|im_start|>", "<|im_end|>"] and types == [3, 3, 3]
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 1001
    assert "stop <|im_end|>" in (tmp_path / "gguf/Modelfile").read_text()


@pytest.mark.slow
def test_run_and_export_evaluate_alike(runs, data, tmp_path):
    from finetune.cli.evaluate import run as evaluate

    found = []
    for what in (f"run={runs / 'stage3-2'}", f"model={runs / 'stage3-2/export'}"):
        out = tmp_path / str(len(found))
        evaluate(compose_config([what, f"data.eval={data}", f"out={out}"], "evaluate"))
        found.append(read_json(out / "eval.json")["loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert found[0] < metrics(runs / "stage3-2")[0]["loss"]
