"""What files and settings from elsewhere may not do: run code, leave their directory, leak a secret."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch

from finetune.check import check
from finetune.cli.app import compose_config, report_error
from finetune.compose import compose_train
from finetune.config import plain_config
from finetune.dist import World
from finetune.errors import UserError
from finetune.reporting.redact import secret_problems
from finetune.run import run_in

ROOT = Path(__file__).resolve().parents[2]
SECRET = "hf_" + "a1B2c3D4" * 4
HEX = "0123456789abcdef0123456789abcdef01234567"
SIGNED = "https://example.org/data.jsonl?X-Amz-Signature=hunter2secret"
URL = "https://someone:hunter2secret@example.org/data.jsonl"


class Planted:
    """Unpickled, it makes the file that its bytes name."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return (os.mkdir, (str(self.target),))


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "a-pickle-ran"


def test_the_planted_pickle_works_where_nothing_guards(tmp_path, target):
    """Otherwise the tests below would prove nothing."""
    torch.save({"w": Planted(target)}, tmp_path / "x.bin")
    torch.load(tmp_path / "x.bin", weights_only=False)
    assert target.is_dir()


@pytest.mark.fault(
    happens="a pickle that runs code: as pytorch_model.bin, as a shard of it, as adapter_model.bin",
    then="refused; the code does not run",
)
@pytest.mark.parametrize("sharded", [False, True])
def test_weights_do_not_run(tmp_path, target, small_gptj, sharded):
    from finetune.config import Init, ModelConfig
    from finetune.gptj.load import build_model

    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text((small_gptj / "config.json").read_text())
    torch.save(
        {"transformer.wte.weight": Planted(target)},
        folder / ("part.bin" if sharded else "pytorch_model.bin"),
    )
    if sharded:
        index = {"weight_map": {"transformer.wte.weight": "part.bin"}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="refused"):
        build_model(
            ModelConfig(path=str(folder), init=Init.pretrained),
            "lm",
            device=torch.device("cpu"),
            seed=0,
        )
    assert not target.exists()


@pytest.mark.fault(
    happens="a pickle that runs code: as pytorch_model.bin, as a shard of it, as adapter_model.bin",
    then="refused; the code does not run",
)
def test_adapters_do_not_run(tmp_path, target, small_gptj):
    from finetune.export.reopen import load_export

    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(
        json.dumps(
            {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "base_model_name_or_path": str(small_gptj),
                "r": 4,
                "target_modules": ["q_proj"],
            }
        )
    )
    torch.save({"base_model.model.w": Planted(target)}, folder / "adapter_model.bin")
    with pytest.raises(Exception):  # noqa: B017 - whatever peft or we say, it must not run
        load_export(folder, None, torch.device("cpu"))
    assert not target.exists()


@pytest.mark.fault(
    happens="a tokenizer, config or checkpoint that brings its own code (`auto_map`)",
    then="refused; the code does not run",
)
def test_code_beside_a_tokenizer_does_not_run(tmp_path, target):
    from finetune.data.tokenizer import load_tokenizer

    (tmp_path / "evil.py").write_text(f"import os\nos.mkdir({str(target)!r})\nclass T: pass\n")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}})
    )
    with pytest.raises(UserError):
        load_tokenizer(str(tmp_path))
    assert not target.exists()


def test_remote_code_is_never_trusted():
    files = [
        *ROOT.glob("finetune/**/*.py"),
        *ROOT.glob("launch/*.py"),
        *ROOT.glob("bench/*.py"),
        *ROOT.glob("conf/**/*.yaml"),
    ]
    assert len(files) > 50
    text = {path: path.read_text(encoding="utf-8") for path in files}
    assert not [
        path
        for path, content in text.items()
        if re.search(r"trust_remote_code\s*[=:]\s*(?!False)", content)
    ]
    assert not [
        path
        for path, content in text.items()
        if re.search(r"weights_only\s*=\s*False|allow_pickle\s*=\s*True", content)
    ]
    loads = [path for path, content in text.items() if re.search(r"torch\.load\(", content)]
    assert all("weights_only=True" in text[path] for path in loads)
    assert not [
        path
        for path, content in text.items()
        if re.search(r"^\s*(import|from) (pickle|dill|cloudpickle)\b", content, re.M)
    ]


@pytest.mark.fault(happens="a run's name that is a path", then="refused with exit code 2")
@pytest.mark.parametrize("name", ["../../out", "a/b", "/abs", "..", ".hidden", ""])
def test_a_name_cannot_leave_runs(name):
    cfg = compose_train(["recipe=quickstart", "debug=tiny", f"name='{name}'"])
    with pytest.raises(UserError, match="part of a path"):
        check(cfg, 1, False)


@pytest.mark.fault(
    happens="a setting whose name or value looks like a secret",
    then="refused; the message shows the key but not the value; `***` in messages and trackers",
)
@pytest.mark.parametrize(
    "word",
    [
        "hf_token=hunter2secret",
        "+hf_token=hunter2secret",
        "model.api_key=hunter2secret",
        "++tracker.wandb.password=hunter2secret",
    ],
)
def test_secret_keys_are_refused_without_an_echo(word, capsys):
    with pytest.raises(UserError) as caught:
        compose_config(["recipe=quickstart", word])
    report_error(caught.value)
    assert "hunter2secret" not in capsys.readouterr().err


@pytest.mark.fault(
    happens="a setting whose name or value looks like a secret",
    then="refused; the message shows the key but not the value; `***` in messages and trackers",
)
@pytest.mark.parametrize(
    ("word", "key"),
    [
        (f"data.train='{URL}'", "data.train"),
        (f"data.eval='{SIGNED}'", "data.eval"),
        (f"model.path='{SECRET}'", "model.path"),
        (f"train.sample_prompts=['{SECRET}']", "train.sample_prompts"),
        (f"tracker.wandb.entity={HEX}", "tracker.wandb.entity"),
    ],
)
def test_secret_values_are_refused_before_a_file_is_written(word, key, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["recipe=quickstart", word]
    with pytest.raises(UserError) as caught:
        run_in(World(0, 1, 0, 1, torch.device("cpu")), compose_train(words), words)
    said = str(caught.value)
    assert f"{key}: " in said and "HF_TOKEN" in said
    assert not any(secret in said for secret in ("hunter2secret", SECRET, HEX)) and not list(
        tmp_path.iterdir()
    )


@pytest.mark.fault(
    happens="a setting whose name or value looks like a secret",
    then="refused; the message shows the key but not the value; `***` in messages and trackers",
)
def test_a_sweep_refuses_secrets_in_its_words(tmp_path, monkeypatch, capsys):
    from finetune.cli.train import run_sweep

    monkeypatch.chdir(tmp_path)
    assert (
        run_sweep(["recipe=quickstart", "optim.lr=1e-3,1e-2", f"train.sample_prompts=['{SECRET}']"])
        == 2
    )
    said = capsys.readouterr().err
    assert "train.sample_prompts" in said and SECRET not in said and not list(tmp_path.iterdir())


def test_names_that_look_like_secrets_are_kept_as_they_are(tmp_path):
    """A file named by its hash must be found again from config.yaml: `***` would be a pattern for other files."""
    from finetune.export.reopen import load_config
    from finetune.training.run_dir import save_config

    names = {
        "train": tmp_path / f"train-{HEX}.jsonl",
        "eval": tmp_path / HEX,
        "model": tmp_path / "sk-learn-reviews-2024-05-part-one",
    }
    cfg = compose_train(
        [
            "recipe=classify_lora",
            f"data.train={names['train']}",
            f"data.eval={names['eval']}",
            f"model.path={names['model']}",
            f"task.labels=[{HEX},other]",
            f"model.revision={HEX}",
        ]
    )
    assert not list(secret_problems(plain_config(cfg)))
    save_config(cfg, {"labels": [HEX]}, [], tmp_path)
    again = load_config(tmp_path)
    assert (again.data.train, again.data.eval) == (str(names["train"]), str(names["eval"]))
    assert (again.model.path, again.model.revision, again.task.labels) == (
        str(names["model"]),
        HEX,
        [HEX, "other"],
    )
    assert json.loads((tmp_path / "task.json").read_text()) == {"labels": [HEX]}


@pytest.mark.fault(
    happens="a setting whose name or value looks like a secret",
    then="refused; the message shows the key but not the value; `***` in messages and trackers",
)
def test_messages_are_redacted(capsys):
    report_error(UserError(f"cannot read {URL}", SECRET, f"use {SECRET}"))
    said = capsys.readouterr().err
    assert "hunter2secret" not in said and SECRET not in said and said.count("***") >= 3


def test_a_failure_is_noted_without_secrets(tmp_path):
    from finetune.training.run_dir import failed_result

    error = UserError(f"cannot read {URL} with {SECRET}")
    failed = json.dumps(
        failed_result(tmp_path, error, World(0, 1, 0, 1, torch.device("cpu")), 0, None)
    )
    assert "hunter2secret" not in failed and SECRET not in failed and failed.count("***") == 2
