"""Preference losses against TRL's own, and against the formulas on Hugging Face's eager logits."""

from __future__ import annotations

import contextlib
import threading
from collections import defaultdict
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from task_setup import CPU, EOS, Rank, assert_same_gradients, evaluate_on, models

from finetune.assets.paths import asset
from finetune.compose import compose_train
from finetune.config import Ia3Config, LoraConfig, PreferenceConfig, PrefixConfig, PromptConfig
from finetune.data.columns import IGNORE
from finetune.errors import UserError
from finetune.gptj import adapters
from finetune.planning.choose import build_job
from finetune.planning.machine import Machine
from finetune.planning.shape import ModelShape
from finetune.tasks.base import to_device
from finetune.tasks.preference import pair_losses
from finetune.tasks.preview import preview
from finetune.training import references

LOSSES = ("dpo", "ipo", "kto", "orpo", "simpo")
ADAPTERS = {
    "lora": LoraConfig(rank=4, targets="all-linear"),
    "dora": LoraConfig(rank=4, targets="all-linear", dora=True),
    "ia3": Ia3Config(),
    "prompt": PromptConfig(virtual_tokens=3),
    "prefix": PrefixConfig(virtual_tokens=3),
}
CPU_MACHINE = Machine(0, 1, gpu_bytes=0, host_bytes=2**36, disk_bytes=2**40)
ROWS = [
    {"prompt": "What is 2 + 2?", "chosen": "It is 4.", "rejected": "Five, I think, or more."},
    {"prompt": "Name a colour, please.", "chosen": "Blue is one of them.", "rejected": "No."},
    {"prompt": "Who?", "chosen": "Ada Lovelace", "rejected": "A lace of love"},
    {"prompt": "Say it twice", "chosen": "it it", "rejected": "it and then once more it"},
]


def cfg(**options) -> PreferenceConfig:
    return PreferenceConfig(**{"template": "plain", "max_length": 64, **options})


def documents(made) -> list[dict[str, Any]]:
    """Each pair's prompt and answers as ids."""
    found = []
    for i in range(len(made.store)):
        example = made.example(i)
        ids, prompt, split = example["ids"], example["prompt"], example["split"]
        assert ids[:prompt] == ids[split : split + prompt]
        found.append(
            {
                "prompt_ids": ids[:prompt],
                "chosen_ids": ids[prompt:split],
                "rejected_ids": ids[split + prompt :],
            }
        )
    return found


def with_references(made, seed: int = 0):
    """Draw the reference model's log-probabilities, about as large as those of a model are."""
    width = made.task.reference_width
    generator = np.random.default_rng(seed)
    logps = generator.normal(-60, 2, (len(made.store), width))
    made.task.references[made.store.fingerprint] = logps
    return logps


# -- data


def test_the_documents_of_a_pair(make):
    made = make(cfg(), ROWS[2:3])
    batch = made.batch()
    decode = made.task.tokenizer.decode
    bounds = pairwise(batch["cu_seqlens"].tolist())
    texts = [decode(batch["ids"][a:b].tolist()) for a, b in bounds]
    end = "<|endoftext|>"
    prompt = decode(made.example(0)["ids"][: made.example(0)["prompt"]])
    assert "Who?" in prompt
    assert [text.removeprefix(prompt).strip() for text in texts] == [
        f"Ada Lovelace{end}",
        f"A lace of love{end}",
    ]
    scored = np.flatnonzero(batch["labels"] != IGNORE)
    assert decode(batch["labels"][scored].tolist()).count(end) == 2
    assert batch["lengths"].tolist() == [
        len(made.task.tokenizer(text.removeprefix(prompt))["input_ids"]) for text in texts
    ]
    assert made.task.count(batch) == 1 and batch["examples"].tolist() == [0, 0]


CHAT = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada Lovelace"}]
OTHER = [CHAT[0], {"role": "assistant", "content": "A lace of love"}]
FROM = [{"from": "human", "value": "Who?"}]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": OTHER[1:]},
        {"chosen": CHAT, "rejected": OTHER},
        {"prompt": "Who?", "chosen": CHAT, "rejected": OTHER, "messages": CHAT, "score_chosen": 8},
        {
            "chosen": "\n\nHuman: Who?\n\nAssistant: Ada Lovelace",
            "rejected": "\n\nHuman: Who?\n\nAssistant: A lace of love",
        },
        {
            "prompt": "\n\nHuman: Who?\n\nAssistant:",
            "chosen": "Ada Lovelace",
            "rejected": "A lace of love",
        },
        {"system": "", "question": "Who?", "chosen": "Ada Lovelace", "rejected": "A lace of love"},
        {"instruction": "Who?", "chosen_response": "Ada Lovelace", "rejected_response": "A lace of love"},
        {
            "conversations": FROM,
            "chosen": {"from": "gpt", "value": "Ada Lovelace"},
            "rejected": {"from": "gpt", "value": "A lace of love"},
        },
        {"messages": CHAT, "rejected_response": "A lace of love"},
        {
            "input": {"messages": CHAT[:1]},
            "preferred_output": CHAT[1:],
            "non_preferred_output": OTHER[1:],
        },
    ],
    ids=[
        "messages", "conversations", "ultrafeedback", "hh", "full hh", "orca", "argilla",
        "llama-factory", "ms-swift", "openai",
    ],
)  # fmt: skip
def test_layouts_of_public_sets(make, row):
    assert make(cfg(), [row]).example(0) == make(cfg(), ROWS[2:3]).example(0)


def test_turns_that_both_share_are_the_prompt(make):
    shared = [*CHAT, {"role": "user", "content": "And then?"}]
    row = {
        side: [*shared, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")
    }
    made = make(cfg(), [row])
    pair = documents(made)[0]
    prompt = made.task.tokenizer.decode(pair["prompt_ids"])
    assert "Ada Lovelace<|endoftext|>" in prompt and "And then?" in prompt
    assert made.task.tokenizer.decode(pair["chosen_ids"]).strip() == "chosen<|endoftext|>"
    assert not any(made.example(0)["scored"][: len(pair["prompt_ids"])])


def test_a_long_prompt_loses_the_same_tokens_on_both_sides(make):
    row = {"prompt": "one two three four five six seven", "chosen": "a", "rejected": "b c d e"}
    whole, made = documents(make(cfg(), [row]))[0], make(cfg(max_length=10), [row])
    cut = documents(made)[0]
    kept = 10 - len(whole["rejected_ids"])
    assert cut["prompt_ids"] == whole["prompt_ids"][-kept:]
    assert (cut["chosen_ids"], cut["rejected_ids"]) == (whole["chosen_ids"], whole["rejected_ids"])
    assert made.task.notes(made.store)[0].startswith("1 of 1 prompts lost tokens from their left")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "a", "chosen": "b"}, "field 'rejected' is missing"),
        ({"prompt": "a", "completion": "b", "label": True}, "one answer and a label"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same"),
        ({"prompt": "a", "chosen": "b", "rejected": 3}, "field 'rejected' is"),
        ({"prompt": "a", "chosen": " ", "rejected": "b"}, "is empty"),
        ({"chosen": "b", "rejected": "c"}, "field 'prompt' is missing"),
        ({"chosen": CHAT, "rejected": [{"role": "user", "content": "?"}, OTHER[1]]}, "same prompt"),
        ({"prompt": "a", "chosen": "b " * 80, "rejected": "c"}, "an answer has 8. tokens"),
        ({"prompt": "a", "chosen": "b<|endoftext|>", "rejected": "c"}, "which ends turns"),
    ],
)
def test_bad_rows_say_what_is_wrong(make, row, problem):
    with pytest.raises(UserError, match=problem) as error:
        make(cfg(), [row])
    assert error.value.where.endswith("train.jsonl:1") and error.value.remedy


def test_a_preview_that_a_person_can_check(make):
    made = make(cfg(template="chat"), ROWS[2:3])
    assert preview(made.task, made.store, made.rows, made.task.tokenizer, 9) == (
        "-- row 0, example 0: 13 tokens, chosen, 5 scored\nUser: Who?\\n\n\\n\nAssistant:\n"
        "⟦ Ada Lovelace<|endoftext|>⟧\n\n"
        "-- row 0, example 0: 13 tokens, rejected, 5 scored\nUser: Who?\\n\n\\n\nAssistant:\n"
        "⟦ A lace of love<|endoftext|>⟧"
    )


# -- losses


def scored_like_trl(model, pairs, whole: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of answers (or of all tokens), and token counts, from Hugging Face's logits: (P, 2)."""
    logps, counts = [], []
    for pair in pairs:
        for side in ("chosen_ids", "rejected_ids"):
            ids = torch.tensor(pair["prompt_ids"] + pair[side])
            token = model(ids[None]).logits[0, :-1].log_softmax(-1)
            token = token.gather(1, ids[1:, None])[:, 0][
                0 if whole else len(pair["prompt_ids"]) - 1 :
            ]
            logps.append(token.double().sum())
            counts.append(float(len(token)))
    return torch.stack(logps).view(-1, 2), torch.tensor(counts).double().view(-1, 2)


def formula(loss: str, model, pairs, reference, beta, smoothing, gamma) -> torch.Tensor:
    """Mean loss over pairs, written down from the papers."""
    logps, counts = scored_like_trl(model, pairs)
    mean = logps / counts
    if loss in ("dpo", "simpo"):
        h = beta * (logps - reference) if loss == "dpo" else beta * mean
        h = h[:, 0] - h[:, 1] - (gamma if loss == "simpo" else 0)
        losses = -(1 - smoothing) * F.logsigmoid(h) - smoothing * F.logsigmoid(-h)
    elif loss == "ipo":
        h = (logps - reference[:, :2]) / counts
        losses = (h[:, 0] - h[:, 1] - 1 / (2 * beta)) ** 2
    elif loss == "orpo":
        whole, tokens = scored_like_trl(model, pairs, whole=True)
        odds = torch.log(mean.exp() / (1 - mean.exp()))
        losses = -(whole / tokens)[:, 0] - beta * F.logsigmoid(odds[:, 0] - odds[:, 1])
    else:
        swapped = [
            pair | {side: pairs[(i + len(pairs) // 2) % len(pairs)][side] for side in SIDES}
            for i, pair in enumerate(pairs)
        ]
        drift = scored_like_trl(model, swapped)[0] - reference[:, 2:]
        z = drift.mean().clamp(min=0).detach()
        h = beta * (logps - reference[:, :2])
        losses = 1 - (torch.sigmoid(h[:, 0] - beta * z) + torch.sigmoid(beta * z - h[:, 1])) / 2
    return losses.mean()


SIDES = ("chosen_ids", "rejected_ids")


def our_loss(made, ours) -> torch.Tensor:
    """The mean loss of all pairs as one step of training computes it."""
    batch = made.batch()
    world = SimpleNamespace(device=CPU, sum=lambda values: values)
    made.task.prepare_step(ours, [batch], world)
    return made.task.loss(ours, to_device(batch, CPU)) / made.task.count(batch)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_and_gradients_are_the_papers(make, loss, smoothing):
    if smoothing and loss not in ("dpo", "simpo"):
        pytest.skip("smoothing is defined for dpo and simpo")
    made = make(cfg(loss=loss, beta=0.3, label_smoothing=smoothing, gamma=0.4), ROWS)
    reference = torch.from_numpy(with_references(made)) if made.task.needs_reference else None
    ours, theirs = models("lm")
    wanted = formula(loss, theirs, documents(made), reference, 0.3, smoothing, 0.4)
    found = our_loss(made, ours)
    torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-5, atol=1e-6)
    found.backward()
    wanted.backward()
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("loss", LOSSES)
def test_micro_batches_and_packing_change_nothing(make, loss, packing):
    """Also an empty micro-batch, as a rank may have one."""
    made = make(cfg(loss=loss), ROWS, packing=packing)
    if made.task.needs_reference:
        with_references(made)
    ours, _ = models("lm")
    whole = our_loss(made, ours)
    batches = [made.batch([i]) for i in range(len(made.rows))] + [made.batch([])]
    assert made.task.count(batches[-1]) == 0
    made.task.prepare_step(ours, batches, SimpleNamespace(device=CPU, sum=lambda values: values))
    parts = [made.task.loss(ours, to_device(batch, CPU)) for batch in batches]
    torch.testing.assert_close(sum(parts) / 4, whole, rtol=1e-5, atol=1e-6)
    parts[-1].backward()
    assert not any(p.grad.any() for p in ours.parameters() if p.grad is not None)


@pytest.mark.parametrize("loss", LOSSES)
def test_evaluation_is_the_same_on_any_number_of_ranks(make, loss):
    made = make(cfg(loss=loss), ROWS)
    if made.task.needs_reference:
        with_references(made)
    ours, _ = models("lm")
    alone, predictions = evaluate_on(1, ours.eval(), made, 1)
    many, also = evaluate_on(3, ours, made, 1)
    assert predictions == also and len(predictions) == 4
    for metrics in many:
        assert metrics == pytest.approx(alone[0], rel=1e-6)
    assert alone[0]["loss"] == pytest.approx(float(our_loss(made, ours)), rel=1e-5)
    margins = [row["chosen_reward"] - row["rejected_reward"] for row in predictions]
    assert alone[0]["accuracy"] == np.mean([margin > 0 for margin in margins])
    assert alone[0]["margin"] == pytest.approx(np.mean(margins), abs=1e-5)


def test_the_best_that_a_loss_can_be(make):
    """Where chosen answers are far likelier than rejected ones, every loss is near its least."""
    scores = {
        "policy": torch.tensor([[-1.0, -400.0]]).double(),
        "reference": torch.tensor([[-100.0, -100.0]]).double(),
        "lengths": torch.tensor([[4.0, 4.0]]).double(),
        "nll": torch.zeros(1).double(),
    }
    for loss, beta in (("dpo", 0.1), ("kto", 0.1), ("orpo", 0.1), ("simpo", 1.0)):
        losses, rewards = pair_losses(cfg(loss=loss, beta=beta), scores, torch.tensor(0.0))
        assert losses.item() < 1e-3 and rewards[0, 0] > rewards[0, 1]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("name", ADAPTERS)
def test_the_reference_is_the_base_model_bit_by_bit(name, dropout):
    """Whatever the adapter has learnt, and although the model is in training mode."""
    ours, _ = models("lm")
    ids = torch.randint(0, 50000, (1, 12))
    labels = ids.roll(-1, 1)
    wanted = ours.eval()(ids, labels=labels, per_token=True).detach()
    ours = adapters.attach(ours, ADAPTERS[name], "lm", "base", seed=0).train()
    trained = [p for p in ours.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data += 0.3 * torch.randn_like(parameter)
    for module in ours.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    assert torch.equal(ours(ids, labels=labels, per_token=True, adapter=False), wanted)
    assert ours.training and all(p.requires_grad for p in trained)
    assert not torch.equal(ours.eval()(ids, labels=labels, per_token=True), wanted)
    with pytest.raises(TypeError):
        ours.get_base_model()(ids, adapter=False)  # without an adapter there is no reference


def test_interrupted_references_go_on_where_they_were(make, monkeypatch):
    made = make(cfg(), ROWS, packing=False)
    ours, _ = models("lm")
    monkeypatch.setattr(references, "ROUND", 1)
    beats: list[int] = []

    def compute(name: str, stop_at: int = 0) -> np.ndarray:
        def beat() -> None:
            beats.append(1)
            if len(beats) == stop_at:
                raise KeyboardInterrupt

        beats.clear()
        world = Rank(0, 1, {}, threading.Barrier(1))
        return references.reference_logps(ours.eval(), made.task, made.store, world, 1, name, beat)

    whole = compute("whole")
    assert len(beats) == len(ROWS) and np.isfinite(whole).all()
    with pytest.raises(KeyboardInterrupt):
        compute("cut", stop_at=3)
    assert np.array_equal(compute("cut"), whole) and len(beats) == 2
    assert np.array_equal(compute("cut"), whole) and not beats


def test_the_planner_counts_both_documents():
    jobs = []
    for recipe in ("preference_lora", "reward_lora", "instruct_lora"):
        composed = compose_train([f"recipe={recipe}", "train.micro_batch=2", "task.max_length=512"])
        jobs.append(build_job(composed, CPU_MACHINE, ModelShape.from_config(asset("gptj_6b")), 1))
    assert [job.tokens for job in jobs] == [2 * 2 * 512, 2 * 2 * 512, 2 * 512]


# -- TRL


def trl(kind: str, model, **settings):
    """A trainer of TRL that has only what its loss reads."""
    pytest.importorskip("trl", "1.16")
    modules = {
        "dpo": ("trl.trainer.dpo_trainer", "DPOTrainer"),
        "kto": ("trl.trainer.kto_trainer", "KTOTrainer"),
        "orpo": ("trl.experimental.orpo.orpo_trainer", "ORPOTrainer"),
        "simpo": ("trl.experimental.cpo.cpo_trainer", "CPOTrainer"),
        "reward": ("trl.trainer.reward_trainer", "RewardTrainer"),
    }
    module, name = modules[kind]
    trainer = object.__new__(getattr(pytest.importorskip(module), name))
    same = SimpleNamespace(device=CPU, gather=lambda x: x, gather_for_metrics=lambda x: x)
    values = {
        "model": model,
        "accelerator": same,
        "aux_loss_enabled": False,
        "precompute_ref_logps": True,
        "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
        "is_encoder_decoder": False,
        "padding_value": 0,
        "pad_token_id": 0,
        "label_smoothing": 0.0,
    }
    for key, value in (values | settings).items():
        with contextlib.suppress(AttributeError):
            setattr(trainer, key, value)
    return trainer


def padded(rows: list[list[int]], fill: int) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])


def dpo_inputs(pairs, reference) -> dict[str, torch.Tensor]:
    rows = [pair["prompt_ids"] + pair[side] for side in SIDES for pair in pairs]
    masks = [
        [0] * len(pair["prompt_ids"]) + [1] * len(pair[side]) for side in SIDES for pair in pairs
    ]
    return {
        "input_ids": padded(rows, EOS),
        "attention_mask": padded([[1] * len(row) for row in rows], 0),
        "completion_mask": padded(masks, 0),
        "ref_chosen_logps": reference[:, 0],
        "ref_rejected_logps": reference[:, 1],
    }


def fused(model):
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    return model


@pytest.mark.parametrize("loss", ["dpo", "ipo"])
def test_trls_dpo_trainer(make, loss):
    pytest.importorskip("trl", "1.16")
    made = make(cfg(loss=loss, beta=0.3), ROWS)
    reference = torch.from_numpy(with_references(made)).float()
    ours, theirs = models("lm")
    trainer = trl(
        "dpo",
        fused(theirs),
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        loss_types=["sigmoid" if loss == "dpo" else loss],
        loss_weights=[1.0],
        beta=0.3,
        use_weighting=False,
    )
    wanted = trainer._compute_loss(theirs, dpo_inputs(documents(made), reference), False)
    compare(made, ours, theirs, wanted)
    metrics = trainer._metrics["eval"]
    alone, _ = evaluate_on(1, ours.eval(), made)
    for mine, name in (
        ("accuracy", "accuracies"),
        ("margin", "margins"),
        ("chosen_reward", "chosen"),
        ("rejected_reward", "rejected"),
    ):
        assert alone[0][mine] == pytest.approx(metrics[f"rewards/{name}"][0], rel=1e-4, abs=1e-4)


def test_trls_kto_trainer(make):
    """The whole of the data is one batch, whose answers TRL shifts by one: with two pairs, the same mismatches."""
    pytest.importorskip("trl", "1.16")
    made = make(cfg(loss="kto", beta=0.3), ROWS[:2])
    reference = torch.from_numpy(with_references(made)).float()
    pairs = documents(made)
    ours, theirs = models("lm")
    inputs = dpo_inputs(pairs, reference)
    # Chosen answers of both, then rejected ones; each prompt with the answer before.
    answers = [pair[side] for side in SIDES for pair in pairs]
    prompts = [pair["prompt_ids"] for _ in SIDES for pair in pairs]
    shifted = [answers[-1], *answers[:-1]]
    rows = [prompt + answer for prompt, answer in zip(prompts, shifted, strict=True)]
    masks = [[0] * len(p) + [1] * len(a) for p, a in zip(prompts, shifted, strict=True)]
    sides = [[answers.index(answer) // 2 for answer in shifted], [0, 1, 0, 1]]
    inputs |= {
        "KL_input_ids": padded(rows, EOS),
        "KL_attention_mask": padded([[1] * len(row) for row in rows], 0),
        "KL_completion_mask": padded(masks, 0),
        "label": torch.tensor([True, True, False, False]),
        "ref_logps": reference[:, :2].T.reshape(-1),
        "ref_KL_logps": torch.stack(
            [reference[prompt, 2 + side] for side, prompt in zip(*sides, strict=True)]
        ),
    }
    del inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
    trainer = trl(
        "kto",
        fused(theirs),
        calculate_KL=True,
        loss_type="kto",
        beta=0.3,
        desirable_weight=1.0,
        undesirable_weight=1.0,
    )
    wanted = trainer._compute_loss(theirs, inputs, False)
    compare(made, ours, theirs, wanted)
    alone, _ = evaluate_on(1, ours.eval(), made)
    assert alone[0]["kl"] == pytest.approx(trainer._metrics["eval"]["kl"][0], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("loss", ["orpo", "simpo"])
def test_trls_orpo_and_cpo_trainers(make, loss):
    """TRL takes the mean of the chosen answer's loss over the tokens of a batch: here one pair is a batch."""
    pytest.importorskip("trl", "1.16")
    made = make(cfg(loss=loss, beta=0.3, gamma=0.4), ROWS)
    ours, theirs = models("lm")
    settings = {"loss_type": "simpo", "simpo_gamma": 0.4, "alpha": 0.0, "cpo_alpha": 0.0}
    trainer = trl(loss, theirs, beta=0.3, **(settings if loss == "simpo" else {}))
    wanted = 0.0
    for pair in documents(made):
        batch = {}
        for side in ("chosen", "rejected"):
            ids = pair["prompt_ids"] + pair[f"{side}_ids"]
            labels = [-100] * len(pair["prompt_ids"]) + pair[f"{side}_ids"]
            batch[f"{side}_input_ids"] = torch.tensor([ids])
            batch[f"{side}_labels"] = torch.tensor([labels])
            batch[f"{side}_attention_mask"] = torch.ones(1, len(ids), dtype=torch.long)
        wanted = wanted + trainer.get_batch_loss_metrics(theirs, batch)[0] / len(ROWS)
    compare(made, ours, theirs, wanted)


def compare(made, ours, theirs, wanted: torch.Tensor) -> None:
    found = our_loss(made, ours)
    torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=1e-5)
    found.backward()
    wanted.backward()
    assert_same_gradients(ours, theirs)
