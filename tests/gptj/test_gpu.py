"""The CUDA path: half precision through the variable-length flash kernel, against Hugging Face's eager GPT-J.

    pytest -m gpu -n 0          on a machine with a GPU; skipped elsewhere

Heads of 256, as GPT-J's own.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from transformers import GPTJConfig, GPTJForCausalLM

from finetune.data.columns import IGNORE
from finetune.gptj.attention import pick_attention
from finetune.gptj.model import CausalLM
from tests.conftest import ROOT

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
LENGTHS = (130, 1, 64, 64, 253)
VOCAB = 500
STEPS = 50


@pytest.fixture
def pair() -> tuple[GPTJForCausalLM, CausalLM]:
    torch.manual_seed(0)
    config = GPTJConfig(
        n_embd=512,
        n_layer=2,
        n_head=2,
        rotary_dim=64,
        vocab_size=VOCAB,
        n_positions=512,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    reference = GPTJForCausalLM(config)
    ours = CausalLM(copy.deepcopy(config))
    ours.load_state_dict(reference.state_dict())
    return reference.to(DEVICE), ours.to(DEVICE)


def batch(seed: int = 1) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, VOCAB, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(seed))
    labels = torch.cat(
        [torch.cat([part[1:], torch.tensor([IGNORE])]) for part in ids[0].split(LENGTHS)]
    )[None]
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    # The boundaries stay on the host, as in training.
    return {
        "input_ids": ids.to(DEVICE),
        "position_ids": positions.to(DEVICE),
        "labels": labels.to(DEVICE),
        "cu_seqlens": torch.tensor([0, *LENGTHS]).cumsum(0).int(),
    }


def loss_of(reference, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """Summed over the documents, each read alone."""
    logits = torch.cat(
        [reference(input_ids=part[None]).logits[0] for part in given["input_ids"][0].split(LENGTHS)]
    )
    return F.cross_entropy(logits.float(), given["labels"][0], ignore_index=IGNORE, reduction="sum")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_and_gradients_are_no_worse_than_eager_half_precision(pair, dtype):
    reference, ours = pair
    given = batch()
    truth = loss_of(reference, given)
    truth.backward()
    wanted = {name: p.grad.clone() for name, p in reference.named_parameters()}
    errors = {}
    for name, model, loss in (
        ("theirs", copy.deepcopy(reference).to(dtype), loss_of),
        ("ours", ours.to(dtype), lambda model, given: model(**given)),
    ):
        model.zero_grad()
        value = loss(model, given)
        (value * 2.0**-8).backward()  # fp16's range
        far = sum(
            float((p.grad.float() * 2.0**8 - wanted[n]).pow(2).sum())
            for n, p in model.named_parameters()
        )
        errors[name] = (abs(float(value - truth)) / float(truth), far**0.5)
    assert (
        errors["ours"][0] <= max(1.2 * errors["theirs"][0], 1e-3)
        and errors["ours"][1] <= 1.2 * errors["theirs"][1]
    ), errors


def test_half_precision_takes_the_variable_length_kernel():
    assert pick_attention("auto", DEVICE, torch.bfloat16) == "cudnn+varlen"


def test_changing_a_document_changes_no_other(pair):
    _, ours = pair
    ours.bfloat16()
    given = batch()
    given.pop("labels")
    with torch.no_grad():
        before = ours(**given)[0].split(LENGTHS)
        start = sum(LENGTHS[:2])
        given["input_ids"][0, start : start + LENGTHS[2]] = (
            given["input_ids"][0, start : start + LENGTHS[2]] + 1
        ) % VOCAB
        after = ours(**given)[0].split(LENGTHS)
    for i, (a, b) in enumerate(zip(before, after, strict=True)):
        assert torch.equal(a, b) == (i != 2)


def test_the_loss_of_fifty_steps_is_that_of_hugging_face(pair):
    """Both in fp32, with torch's own AdamW: kernels differ, the loss does not."""
    reference, ours = pair
    curves = []
    for model, ahead in ((reference, loss_of), (ours, lambda model, given: model(**given))):
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.0)
        losses = []
        for step in range(STEPS):
            given = batch(step % 5)
            count = int((given["labels"] >= 0).sum())
            loss = ahead(model, given) / count
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss))
        curves.append(losses)
    assert curves[0][-1] < 0.9 * curves[0][0]
    assert curves[1] == pytest.approx(curves[0], rel=1e-3)


def test_fp16_trains_with_loss_scaling(tmp_path):
    words = [
        "recipe=quickstart",
        "model.dtype=fp16",
        "train.steps=12",
        f"run_dir={tmp_path}",
        "data.eval=null",
        "train.eval_every=0",
    ]
    done = subprocess.run(
        [sys.executable, "launch/train.py", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert len(losses) == 12 and min(losses[-3:]) < losses[0]
