"""What a person reads who asks for help or mistypes: in this process, without torch."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from finetune.cli import schemas
from finetune.cli.app import compose_config
from finetune.cli.help import GROUPS, TOP, USAGE, field_docs, first_comment, help_text
from finetune.cli.mistakes import HINTS, OTHERS, unknown_option
from finetune.compose import CONF, RECIPES, ROOT
from finetune.config import all_keys
from finetune.errors import UserError

KEYS = set(all_keys(schemas.SCHEMAS["train"]))
LAUNCH = sorted(p.stem for p in (ROOT / "launch").glob("*.py"))


@pytest.mark.parametrize("name", ["train", "plan"])
def test_help_lists_every_recipe_group_and_option(name):
    shown = help_text(name)
    unwrapped = " ".join(shown.split())
    for path in RECIPES.glob("*.yaml"):
        assert f"{path.stem} {first_comment(path)}" in unwrapped
    for folder in (p for p in CONF.iterdir() if p.is_dir()):
        line = re.search(rf"^  {folder.name}=.*(\n {{20,}}.*)*", shown, re.M)
        assert line and folder.name in GROUPS
        assert all(path.stem in line[0] for path in folder.glob("*.yaml"))
    assert (
        all(f"  {key} " in shown for key in TOP)
        and len(re.findall(r"^  (python|deepspeed)", shown, re.M)) == 3
    )
    assert max(map(len, shown.splitlines())) <= 120


@pytest.mark.parametrize("name", sorted(USAGE))
def test_every_key_of_an_example_exists(name):
    for line in USAGE[name].examples:
        words = [word for word in shlex.split(line) if "=" in word]
        assert words or name == "doctor"
        if "-m" not in line:
            compose_config(words, name)


@pytest.mark.parametrize("schema", [*schemas.SCHEMAS.values()])
def test_every_field_has_a_line(schema):
    undocumented = {f.name for f in fields(schema) if "Config" not in str(f.type)} - set(
        field_docs(schema)
    )
    assert not undocumented


@pytest.mark.parametrize(
    "path", sorted(CONF.glob("*/*.yaml")), ids=lambda p: f"{p.parent.name}/{p.stem}"
)
def test_every_option_says_what_it_is(path):
    assert len(first_comment(path)) > 15


@pytest.mark.parametrize("group", sorted(GROUPS))
def test_help_on_a_group(group):
    folder = RECIPES if group == "recipe" else CONF / group
    shown = help_text("train", [group])
    assert all(path.stem in shown for path in folder.glob("*.yaml"))


def test_help_on_keys_and_recipes():
    assert "Peak learning rate. [0.0001]" in help_text("train", ["optim.lr"])
    assert "adapter.virtual_tokens" in help_text("train", ["adapter"])
    assert "tracker.wandb.group" in help_text("train", ["tracker.wandb.group"])
    assert "max_length: 256" in help_text("train", ["quickstart"])
    with pytest.raises(UserError, match="--help optim"):
        help_text("train", ["optimm"])


MISTYPED = {
    "recipe=clm_pille": "Did you mean recipe=clm_pile?",
    "optim.lrr=1": "Did you mean optim.lr?",
    "zero=stage5": "auto, stage0, stage1, stage2, stage3",
    "tracker=[wandbb]": "Did you mean tracker=wandb?",
    "adapter=full adapter.rank=4": "adapter=lora and adapter=dora and adapter=rslora have this key.",
    "task=clm task.stride=4": "task=qa has this key.",
    "recpe=quickstart": "Did you mean recipe?",
    "adaptor=lora": "Did you mean adapter?",
    "lr=1e-4": "Did you mean optim.lr?",
    "train.learning_rate=1e-4": "Did you mean optim.lr?",
    "gradient_accumulation_steps=4": "global_batch = micro_batch x ranks x accumulation",
    "optim.lr=fast": "optim.lr: Peak learning rate.",
    "model.dtype=bf17": "[bf16, fp16, fp32]",
    "optim.lr": "Write optim.lr=VALUE",
    "quickstart": "Write recipe=quickstart.",
    "optim.lr=(1": "\"optim.lr='(1'\"",
    "optim.lr=1e-3,5e-3": "python launch/train.py -m recipe=quickstart optim.lr=1e-3,5e-3",
    "data.validation_split=0.1": "data.eval=0.02",
    "special_tokens=[a]": "the vocabulary stays the checkpoint's",
    "data.streaming=true": "There is nothing to switch on",
    "load_in_4bit=true": "model.quantize=nf4",
    "max_train_samples=10": "data.max_rows=1000",
    "metric_for_best_model=accuracy": "Did you mean train.metric?",
}


@pytest.mark.parametrize("words", MISTYPED)
def test_a_mistake_is_answered_with_what_was_meant(words):
    given = words.split()
    with pytest.raises(UserError) as caught:
        compose_config(
            given
            if any(word.startswith("rec") for word in given)
            else ["recipe=quickstart", *given]
        )
    assert MISTYPED[words] in str(caught.value) and caught.value.exit_code == 2


def test_an_option_of_another_program():
    assert "Did you mean optim.lr=...?" in str(unknown_option("--learning_rate", "train"))
    assert "Did you mean max_new_tokens=...?" in str(
        unknown_option("--max_new_token=3", "generate")
    )


def test_their_names_lead_to_keys_that_exist():
    groups = set(GROUPS)
    assert {key for key in OTHERS.values() if key not in KEYS | groups} == set()
    assert set(HINTS) <= set(OTHERS)


def test_every_script_has_usage():
    assert set(LAUNCH) <= set(USAGE)


@pytest.mark.parametrize(
    "line,expected",
    [
        ("deepspeed --num_gpus 2 launch/train.py recipe=quick", "recipe=quickstart"),
        ("python launch/train.py recipe=quickstart optim.we", "optim.weight_decay="),
        ("python launch/plan.py machine=h2", "machine=h200_141"),
        (
            "python launch/train.py model.dtype=",
            "model.dtype=bf16 model.dtype=fp16 model.dtype=fp32",
        ),
        ("python launch/train.py data.train=pyproj", "data.train=pyproject.toml"),
    ],
)
def test_tab_completion(line, expected):
    script = (
        'source launch/completion.bash; COMP_LINE="$1"; COMP_POINT=${#1}; read -ra COMP_WORDS <<< "$1"; '
        'COMP_CWORD=$((${#COMP_WORDS[@]}-1)); _finetune_complete; echo "${COMPREPLY[*]}"'
    )
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    done = subprocess.run(
        ["bash", "-c", script, "bash", line],
        cwd=ROOT,
        env={"PATH": path},
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.stdout.strip() == expected, done.stderr


@pytest.mark.parametrize("name", sorted(schemas.SCHEMAS))
def test_completion_knows_every_key(name):
    """Read from the schema's source, it must say what the schema says."""
    done = subprocess.run(
        ["bash", "-c", f"source launch/completion.bash; _finetune_words . {name}"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=True,
    )
    shown = {word.split("=")[0] for word in done.stdout.split()}
    groups = set(GROUPS) if name in ("train", "plan") else {"task"} if name == "evaluate" else set()
    keys = {"model" if key == "export_dir" else key for key in all_keys(schemas.SCHEMAS[name])}
    assert shown == keys | groups
