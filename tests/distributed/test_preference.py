"""Preferences: losses on any ranks, stage and accumulation are plain torch's and peft's; resume; exports."""

from __future__ import annotations

import json
from itertools import combinations, islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from finetune.assets.paths import asset
from tests.distributed import heads_reference
from tests.distributed.ranks import evaluate, losses, metrics, run_cases
from tests.distributed.test_resume import branch
from tests.peft_reference import run_peft

STEPS, BATCH, CUT = 6, 4, 3
LORA = ["adapter=lora", "adapter.targets=all-linear", "adapter.rank=4"]
CASES = {
    "dpo-lora": (LORA, 0, 1),
    "dpo-full": (["adapter=full"], 1, 3),
    "kto-lora": (LORA, 0, 3),
    "kto-full": (["adapter=full"], 0, 2),
    "ipo-ia3": (["adapter=ia3"], 0, 2),
    "dpo-prefix": (["adapter=prefix", "adapter.virtual_tokens=3"], 0, 3),
    "orpo-full": (["adapter=full"], 0, 2),
    "simpo-lora": (LORA, 2, 3),
    "reward-lora": (LORA, 0, 3),
}
"""Loss and adapter -> settings, ZeRO stage on one rank with accumulation 1, and on two with accumulation 2."""
pytestmark = pytest.mark.slow


def overrides(root: Path, small: Path, name: str, ranks: int, *more: str) -> list[str]:
    loss, (adapter, *stages) = name.partition("-")[0], CASES[name]
    task = "reward" if loss == "reward" else "preference"
    return [
        f"recipe={task}_lora",
        f"model.path={small}",
        "model.dtype=fp32",
        *adapter,
        f"zero=stage{stages[ranks - 1]}",
        f"data.train={root}/train.jsonl",
        f"data.eval={root}/eval.jsonl",
        f"run_dir={root}/{name}-{ranks}",
        "task.max_length=96",
        "task.template=chat",
        *([] if loss == "reward" else [f"task.loss={loss}", "task.beta=0.3"]),
        f"train.steps={STEPS}",
        "train.epochs=null",
        f"train.global_batch={BATCH}",
        f"train.micro_batch={BATCH if ranks == 1 else 1}",
        "seed=4",
        "train.eval_batch=2",
        "train.eval_every=0",
        f"checkpoint.every={CUT}",
        "train.activation_checkpointing=false",
        "optim.lr=2e-3",
        "optim.schedule=constant",
        "optim.warmup=0",
        "export.enabled=false",
        *more,
    ]


@pytest.fixture(scope="module")
def root(pocket_gptj: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("preference")
    for name, count in (("train", 18), ("eval", 7)):
        with (asset("data") / "preference" / f"{name}.jsonl").open(encoding="utf-8") as file:
            rows = [json.loads(line) for line in islice(file, count)]
        short = [
            {key: " ".join(value.split()[:12]) for key, value in row.items()} | {"margin": i % 2}
            for i, row in enumerate(rows)
            if row["fault"]
            != "unfinished"  # begins like the chosen answer, and here would be all of it
        ]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in short))
    run_cases(1, [overrides(root, pocket_gptj, name, 1) for name in CASES])
    run_cases(2, [overrides(root, pocket_gptj, name, 2) for name in CASES])
    return root


def step_loss(model, task, store, chosen: list[int], base) -> torch.Tensor:
    """The mean loss of a step's pairs from Hugging Face's outputs, one document at a time."""

    def document(model, prompt: int, answer: int, side: int) -> tuple[torch.Tensor, int]:
        """Log-probability (or reward) of one pair's answer behind another's prompt, and its tokens."""
        ids = store.column("ids")
        start, length = int(store.offsets[prompt]), int(store.column("prompt")[prompt])
        own, split = int(store.column("prompt")[answer]), int(store.column("split")[answer])
        first = int(store.offsets[answer]) + (split if side else 0) + own
        end = int(store.offsets[answer + 1]) if side else int(store.offsets[answer]) + split
        kept = min(length, task.cfg.max_length - (end - first))  # of a mismatched prompt
        asked = ids[start + length - kept : start + length]
        text = torch.tensor(np.concatenate([asked, ids[first:end]]).astype("int64"))
        found = []
        layer = [
            module
            for name, module in model.named_modules()
            if name.endswith(("lm_head", "score", "score.modules_to_save.default"))
        ][-1]
        hook = layer.register_forward_hook(lambda module, given, output: found.append(output[0]))
        run_peft(model, text)
        hook.remove()
        out = found[0][-len(text) :]
        if task.head == "classify":
            return out[-1, 0], 1
        logps = out[:-1].log_softmax(-1).gather(1, text[1:, None])[:, 0].double()
        if whole:
            return logps.sum(), len(logps)
        return logps[kept - 1 :].sum(), len(logps) - kept + 1

    whole, cfg = False, task.cfg
    answers = [[document(model, i, i, side) for side in (0, 1)] for i in chosen]
    logps = torch.stack([torch.stack([pair[0][0], pair[1][0]]) for pair in answers])
    counts = torch.tensor([[float(pair[0][1]), pair[1][1]] for pair in answers])
    if task.head == "classify":
        margins = torch.tensor(store.column("margin")[chosen])
        return -F.logsigmoid(logps[:, 0] - logps[:, 1] - margins).mean()
    mean, beta = logps / counts, cfg.beta
    if cfg.loss == "simpo":
        return -F.logsigmoid(beta * (mean[:, 0] - mean[:, 1]) - cfg.gamma).mean()
    if cfg.loss == "orpo":
        odds = mean - torch.log(1 - mean.exp())
        whole = True
        nll = torch.stack([-p / n for p, n in (document(model, i, i, 0) for i in chosen)])
        return (nll - beta * F.logsigmoid(odds[:, 0] - odds[:, 1])).mean()
    with torch.no_grad():
        before = torch.stack(
            [torch.stack([document(base, i, i, side)[0] for side in (0, 1)]) for i in chosen]
        )
        others = [(i, (i + len(store) // 2) % len(store)) for i in chosen]
        drift = [
            document(model, i, j, side)[0] - document(base, i, j, side)[0]
            for i, j in (others if cfg.loss == "kto" else [])
            for side in (0, 1)
        ]
    ratio = logps - before
    if cfg.loss == "dpo":
        return -F.logsigmoid(beta * (ratio[:, 0] - ratio[:, 1])).mean()
    if cfg.loss == "ipo":
        ratio = ratio / counts
        return (ratio[:, 0] - ratio[:, 1] - 1 / (2 * beta)).square().mean()
    z = torch.stack(drift).mean().clamp(min=0)
    return (
        1
        - (torch.sigmoid(beta * (ratio[:, 0] - z)) + torch.sigmoid(beta * (z - ratio[:, 1]))).mean()
        / 2
    )


@pytest.mark.parametrize("name", CASES)
def test_losses_are_plain_torchs_on_any_ranks_stage_and_accumulation(root, pocket_gptj, name):
    wanted, norms = heads_reference.train(overrides(root, pocket_gptj, name, 1), step_loss)
    assert len(set(wanted)) == STEPS
    for ranks in (1, 2):
        run = root / f"{name}-{ranks}"
        assert losses(run) == pytest.approx(wanted, rel=2e-5), ranks
        found = [line["grad_norm"] for line in metrics(run)]
        assert found == pytest.approx(norms, rel=2e-4), ranks


@pytest.mark.parametrize("name", CASES)
def test_figures_of_steps_and_evaluations_are_the_same_on_one_rank_and_two(root, name):
    names = {"accuracy", "margin", "chosen_reward", "rejected_reward"}
    for kind in ("train", "eval"):
        alone, together = (metrics(root / f"{name}-{ranks}", kind) for ranks in (1, 2))
        assert len(alone) == len(together) and names <= alone[-1].keys()
        for one, two in zip(alone, together, strict=True):
            for key in (names | {"loss", "kl"}) & one.keys():
                assert two[key] == pytest.approx(one[key], rel=2e-3, abs=2e-5), key
    reference = name.partition("-")[0] in ("dpo", "ipo", "kto")
    assert ("kl" in metrics(root / f"{name}-1")[0]) == reference
    if reference and name != "dpo-prefix":  # training starts from the very reference
        assert metrics(root / f"{name}-1")[0]["chosen_reward"] == pytest.approx(0, abs=1e-5)


def test_resume_is_bitwise(root, pocket_gptj):
    """Also where the reference's log-probabilities are read back from the cache."""
    names = ("dpo-full", "kto-lora", "reward-lora")
    again = {name: branch(root / f"{name}-2", f"{name}-again") for name in names}
    run_cases(
        2,
        [[*overrides(root, pocket_gptj, name, 2), f"run_dir={run}"] for name, run in again.items()],
    )
    for name, run in again.items():
        assert losses(run) == losses(root / f"{name}-2")
        a, b = tensors(run), tensors(root / f"{name}-2")
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_run_of_two_ranks_goes_on_alone_at_another_stage(root, pocket_gptj):
    names = ("dpo-full", "reward-lora")
    elsewhere = {name: branch(root / f"{name}-2", f"{name}-elsewhere") for name in names}
    run_cases(
        1,
        [
            [*overrides(root, pocket_gptj, name, 1), f"run_dir={run}"]
            for name, run in elsewhere.items()
        ],
    )
    for name, run in elsewhere.items():
        assert losses(run) == pytest.approx(losses(root / f"{name}-2"), rel=2e-5), name


def tensors(run: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in (run / f"checkpoints/step-{STEPS:08d}").glob("optim-*.safetensors"):
        found |= load_file(file)
    return found


def test_where_an_adapter_goes_on_the_reference_is_what_it_was(root, pocket_gptj):
    """Not the base model: before the first step, nothing is likelier than to the reference."""
    from finetune.cli.app import main

    start, run = root / "dpo-lora-adapter", root / "dpo-start"
    assert main("export", [f"run={root}/dpo-lora-1", "kind=adapter", f"out={start}"]) == 0
    words = [f"adapter.start={start}", f"run_dir={run}", "train.steps=2", "checkpoint.every=0"]
    run_cases(1, [[*overrides(root, pocket_gptj, "dpo-lora", 1), *words]])
    first, second = metrics(run)
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert first["margin"] == first["chosen_reward"] == pytest.approx(0, abs=1e-6)
    assert abs(second["chosen_reward"]) > 1e-3


def test_a_run_and_its_exports_evaluate_alike(root, pocket_gptj, forked):
    """Adapters against their base, and whole models against the one that they were tuned from."""
    from finetune.cli.app import main

    exports = {"dpo-lora": ["merged"], "dpo-full": ["full"], "reward-lora": ["merged", "adapter"]}
    wanted = {}
    argvs = []
    for name, kinds in exports.items():
        run = root / f"{name}-1"
        wanted[name] = metrics(run, "eval")[-1]
        argvs.append([f"run={run}", f"out={root}/{name}-run"])
        for kind in kinds:
            out = root / f"{name}-{kind}"
            assert main("export", [f"run={run}", f"kind={kind}", f"out={out}"]) == 0
            argvs.append([f"model={out}", f"data.eval={root}/eval.jsonl", "batch=3"])
    evaluate(1, argvs)
    for folder in root.glob("*/eval.json"):
        found, name = json.loads(folder.read_text()), folder.parent.name.rsplit("-", 1)[0]
        for key in ("loss", "accuracy", "margin", "chosen_reward", "kl"):
            if key in wanted[name]:
                assert found[key] == pytest.approx(wanted[name][key], rel=1e-3, abs=1e-5), folder
    assert len(list(root.glob("*/eval.json"))) == 7


def test_several_answers_are_scored_as_pairs_are(root, pocket_gptj):
    """And the best of n is the mean over all ways to draw n of a prompt's answers."""
    rows = [json.loads(line) for line in (root / "eval.jsonl").read_text().splitlines()]
    for row in rows:  # a pair's prompt is cut for the longer answer
        row["prompt"], row["margin"] = " ".join(row["prompt"].split()[:4]), 0
    answers = [
        {
            "prompt": row["prompt"],
            "responses": [row["chosen"], {"response": row["rejected"]}, "No."],
        }
        for row in rows
    ]
    for name, lines in (("pairs", rows), ("answers", answers)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (root / f"short-{name}.jsonl").write_text(text)
    run = f"run={root}/reward-lora-1"
    words = [run, f"data.eval={root}/short-answers.jsonl", "task.answers_field=responses"]
    asked = [run, f"data.eval={root}/short-pairs.jsonl", f"out={root}/pairs"]
    evaluate(1, [[*words, f"out={root}/answers-1", "batch=3"], asked])
    evaluate(2, [[*words, f"out={root}/answers-2", "batch=2"]])
    lines = (root / "answers-1/predictions.jsonl").read_text().splitlines()
    pairs = [
        json.loads(line) for line in (root / "pairs/predictions.jsonl").read_text().splitlines()
    ]
    found = [json.loads(line) for line in lines]
    for row, pair in zip(found, pairs, strict=True):
        wanted = [pair["chosen_reward"], pair["rejected_reward"]]
        assert row["rewards"][:2] == pytest.approx(wanted, abs=1e-5)
        assert row["rewards"][row["best"]] == max(row["rewards"]) and len(row["rewards"]) == 3
    metrics, again = (json.loads((root / f"answers-{n}/eval.json").read_text()) for n in (1, 2))
    two = [max(pair) for row in found for pair in combinations(row["rewards"], 2)]
    assert metrics["best_of_2"] == pytest.approx(np.mean(two), abs=1e-5)
    assert metrics["best_reward"] == pytest.approx(np.mean([max(r["rewards"]) for r in found]))
    assert (metrics["prompts"], metrics["answers"]) == (len(rows), 3 * len(rows))
    for key in ("reward", "best_of_2", "best_reward"):
        assert again[key] == pytest.approx(metrics[key], abs=1e-5)


def test_a_reward_model_opens_as_a_classifier_of_one_output(root):
    """In plain transformers, with the tokenizer's own eos and padding: the rewards of predictions.jsonl.

    launch/generate.py gives the same for rows with an answer.
    """
    import transformers

    from finetune.cli.app import main

    export = root / "reward-lora-merged"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(export).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(export)
    assert model.config.num_labels == 1
    rows = [json.loads(line) for line in (root / "eval.jsonl").read_text().splitlines()]
    lines = (root / "reward-lora-run/predictions.jsonl").read_text().splitlines()
    texts = {
        side: [
            tokenizer.apply_chat_template(
                [
                    {"role": "user", "content": row["prompt"]},
                    {"role": "assistant", "content": row[side]},
                ],
                tokenize=False,
            ).removesuffix(tokenizer.eos_token)
            for row in rows
        ]
        for side in ("chosen", "rejected")
    }
    # The prompt of a pair that is too long is cut on both sides.
    longest = [
        max(len(tokenizer(text)["input_ids"]) for text in pair)
        for pair in zip(*texts.values(), strict=True)
    ]
    fitting = [i for i, length in enumerate(longest) if length <= tokenizer.model_max_length]
    assert len(fitting) >= 3
    for side, own in texts.items():
        batch = tokenizer([own[i] for i in fitting], padding=True, return_tensors="pt")
        with torch.no_grad():
            found = model(**batch).logits[:, 0].tolist()
        wanted = [json.loads(lines[i])[f"{side}_reward"] for i in fitting]
        assert found == pytest.approx(wanted, abs=1e-4)

    # `wanted` is that of the rejected answers.
    asked, answers = root / "asked.jsonl", root / "answers.jsonl"
    asked.write_text(
        "".join(
            json.dumps({"prompt": rows[i]["prompt"], "completion": rows[i]["rejected"]}) + "\n"
            for i in fitting
        )
    )
    for kind in ("merged", "adapter"):
        words = [f"model={root}/reward-lora-{kind}", f"prompts={asked}", f"out={answers}"]
        assert main("generate", words) == 0
        values = [json.loads(line)["value"] for line in answers.read_text().splitlines()]
        assert values == pytest.approx(wanted, abs=1e-4)

    # The model card's own lines.
    card = (export / "README.md").read_text()
    scope = {"model": model, "tokenizer": tokenizer}
    row = rows[fitting[0]]
    lines = card.split("```python\n")[2].split("```")[0]
    exec(
        lines.replace("'...'", repr(row["prompt"]), 1).replace("'...'", repr(row["rejected"])),
        scope,
    )
    assert float(scope["reward"]) == pytest.approx(wanted[0], abs=1e-4)
