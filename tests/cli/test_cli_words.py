"""The words of a command line: texts are used as they are typed, Hydra's own words answered, printed commands pasted."""

from __future__ import annotations

import html
import json
import random
import re
import shlex
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml

from finetune.cli import schemas
from finetune.cli.app import compose_config, main, schema_words
from finetune.cli.mistakes import split_flags, without_hydra
from finetune.cli.train import sweep_words
from finetune.compose import ROOT, compose_train, settle
from finetune.config import plain_config, read_yaml, to_yaml, typed
from finetune.data.files import find_files
from finetune.errors import UserError, command, setting
from finetune.export.reopen import load_config
from finetune.reporting.page.compare import commands as compare_commands
from finetune.reporting.page.files import RunFiles
from finetune.reporting.page.tables import commands as run_commands
from finetune.sweep.page import commands as sweep_commands
from finetune.sweep.show import commands as job_commands
from finetune.sweep.space import grid, read_space, settings_words
from tests.launch.test_commands import BIN, call, quick  # noqa: F401

AWKWARD = [
    "3.10",
    "1_000",
    "true",
    "null",
    '"quoted"',
    "'quoted'",
    " leading",
    "Hello, world",
    "echo ${HOME}",
    "${",
    "???",
    "${prompt}",
    "a=b (c)",
    "[x",
    "ends\\",
    "\\n",
    "",
    "two\nlines",
    "\\'",
    "1e-3",
]
ODD_FOLDERS = [
    "runs/lr=1e-4 (a, b)",
    "it's",
    'say "hi"',
    "a$b`c`",
    "null",
    "3.10",
    "${HOME}",
    "a\\",
    "[1]",
    "é ü",
    "it's $5",
]


def every_text(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value, of every field that typing resolves to str, Optional[str] or a list of them."""
    found = {}
    hints = get_type_hints(type(config))
    for field in fields(config):
        value, kind = getattr(config, field.name), hints[field.name]
        leaves = {
            kind,
            *get_args(kind),
            *(leaf for part in get_args(kind) for leaf in get_args(part)),
        }
        if is_dataclass(value):
            found |= every_text(value, f"{prefix}{field.name}.")
        elif str in leaves and int not in leaves and bool not in leaves and "dict" not in str(kind):
            found[prefix + field.name] = value
    return found


@pytest.mark.parametrize("name", sorted(set(schemas.SCHEMAS) - {"doctor", "plan", "report"}))
@pytest.mark.parametrize("text", ["3.10", "1_000", "true (1)"])
def test_every_text_setting_of_every_program_is_used_as_typed(name, text):
    words = ["task=classify"] if name in ("train", "evaluate") else []
    keys = every_text(compose_config(words, name).config)
    assert len(keys) > (35 if name == "train" else 1)
    typed_as = {"export_dir": "model"} if name in ("evaluate", "generate", "serve") else {}
    composed = compose_config(
        [*words, *(f"{typed_as.get(key, key)}={text}" for key in keys)], name
    ).config
    lists = {
        "tasks",
        "eval.lm_eval",
        "resume_changed",
        "task.labels",
        "task.tokens",
        "tracker.wandb.tags",
        "train.sample_prompts",
        "stop",
    }
    assert every_text(composed) == {key: [text] if key in lists else text for key in keys}


@pytest.mark.parametrize("text", AWKWARD)
def test_a_prompt_is_what_was_typed(text):
    config = compose_config(
        [f"prompt={text}", f"question={text}", f"context={text}", f"stop=[{json.dumps(text)}]"],
        "generate",
    ).config
    assert (config.prompt, config.question, config.context, config.stop) == (
        text,
        text,
        text,
        [text],
    )


@pytest.mark.parametrize(
    ("typed_list", "texts"),
    [
        ('["\\n"]', ["\n"]),
        ("END", ["END"]),
        ('["###", END]', ["###", "END"]),
        ("null", None),
        ("[null]", ["null"]),
        ("[1.10,1.20]", ["1.10", "1.20"]),
        ("[C++,C#]", ["C++", "C#"]),
        ("[true, False]", ["true", "False"]),
        ("['a, b',\"c, d\"]", ["a, b", "c, d"]),
        ("['it\\'s','\\n']", ["it's", "\\n"]),
        ("[]", []),
        ("['tis,b]", ["'tis", "b"]),
        ('["a${b","???"]', ["a${b", "???"]),
        ("[ a b ,c]", ["a b", "c"]),
    ],
)
def test_lists_of_texts(typed_list, texts):
    assert compose_config([f"stop={typed_list}"], "generate").config.stop == texts
    if typed_list != "END":
        cfg = compose_train(["task=classify", "model=gptj_tiny", f"task.labels={typed_list}"])
        assert cfg.task.labels == texts  # type: ignore[attr-defined]


def test_names_and_paths_may_be_quoted_unset_and_refer():
    def run_dir(text: str) -> Any:
        return compose_train(["recipe=quickstart", "name=mine", f"run_dir={text}"]).run_dir

    assert run_dir("'runs/a, b'") == run_dir("runs/a, b") == run_dir("runs/a\\, b") == "runs/a, b"
    assert run_dir("null") is None and run_dir("'null'") == "null"
    assert run_dir("runs/${name}") == "runs/mine" and run_dir("runs/${HOME}") == "runs/${HOME}"


def test_several_texts_without_brackets_are_refused_with_both_ways_to_write_them():
    with pytest.raises(UserError) as caught:
        compose_train(["task=classify", "task.labels=yes,no"])
    both = re.findall(r"'(task.labels=[^']*)'", caught.value.remedy)
    assert [compose_train(["task=classify", word]).task.labels for word in both] == [
        ["yes", "no"],
        ["yes,no"],
    ]


def test_texts_survive_the_run_s_config(tmp_path):
    words = [
        "task=classify",
        "model=gptj_tiny",
        f"task.labels={json.dumps(AWKWARD[:-4])}",
        "tracker.wandb.group=${x",
        f"train.sample_prompts={json.dumps(AWKWARD)}",
        "task.text_field=1e-3",
        "data.config=???",
        "optim.lr=1e-5",
    ]
    cfg = compose_train(words)
    (tmp_path / "config.yaml").write_text(to_yaml(plain_config(cfg)), encoding="utf-8")
    assert load_config(tmp_path) == cfg and cfg.train.sample_prompts == AWKWARD
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == plain_config(cfg)
    values = read_yaml(tmp_path / "config.yaml")
    assert typed(type(cfg.train), values["train"]) == cfg.train


def test_any_path_survives_being_written_and_read_as_a_command():
    draw = random.Random(0)
    pieces = [
        "\\",
        "$",
        "{",
        "}",
        "${",
        "'",
        '"',
        "a",
        " ",
        "\n",
        ",",
        "=",
        "[",
        "]",
        "(",
        ")",
        "é",
        "!",
        "?",
        "null",
        "~",
    ]
    paths = [*ODD_FOLDERS, *("".join(draw.choices(pieces, k=draw.randrange(8))) for _ in range(61))]
    keys = ("run", "out", "push_to_hub", "hub_base")
    for some in zip(*[iter(paths)] * len(keys), strict=True):
        words = [setting(key, path) for key, path in zip(keys, some, strict=True)]
        assert shlex.split(command(["x", *words])) == ["x", *words]
        read = compose_config(words, "export").config
        assert tuple(getattr(read, key) for key in keys) == some


def parse(line: str) -> Any:
    """What a printed command means to the program it names."""
    words = shlex.split(line)
    at = next(n for n, word in enumerate(words) if word.startswith("launch/"))
    name, settings = words[at].removeprefix("launch/").removesuffix(".py"), words[at + 1 :]
    if "-m" in settings:
        own, _ = settings_words(sweep_words(settings))
        return compose_config(own).config.sweep
    return compose_config(settings, name).config


@pytest.mark.parametrize("folder", ["runs/lr=1e-4 (a, b)", "it's [1] $5", '${HOME} "null"'])
def test_every_printed_command_means_its_folder(folder, tmp_path):
    place = tmp_path / folder
    run = RunFiles(
        place,
        config={"name": "quickstart", "adapter": {"kind": "lora"}},
        result={"status": "failed"},
    )
    run.env = {
        "overrides": [
            "recipe=quickstart",
            "train.sample_prompts=[\"a, 'b'\"]",
            "optim.lr=1e-3",
            f"run_dir={folder}",
        ]
    }
    lines = dict(run_commands(run))
    again = parse(lines["continue"])
    assert (
        again.run_dir == str(place)
        and again.train.sample_prompts == ["a, 'b'"]
        and again.optim.lr == 1e-3
    )
    assert {parse(lines[name]).run for name in ("evaluate", "export adapter", "export merged")} == {
        str(place)
    }
    assert parse(lines["generate"]).export_dir == str(place / "export")

    summary = {
        "best": 0,
        "launcher": [],
        "jobs": [{"overrides": ["recipe=quickstart"], "run_dir": str(place)}],
    }
    lines = dict(sweep_commands(summary, place)) | dict(job_commands(summary["jobs"][0], summary))
    assert parse(lines["evaluate it"]).run == parse(lines["evaluate"]).run == str(place)
    assert parse(lines["go on with this sweep"]).dir == str(place)
    (place / "0").mkdir(parents=True)
    (place / "0/metrics.jsonl").touch()
    from finetune.cli.report import run_folders

    (pattern,) = parse(lines["compare all jobs"]).runs
    assert run_folders(pattern) == [place / "0"] == run_folders(str(place / "0"))
    assert parse(dict(compare_commands(run))["evaluate the best"]).run == str(place)


@pytest.mark.slow
def test_the_commands_of_a_run_in_an_odd_folder_run(quick, tmp_path):  # noqa: F811
    place = tmp_path / "lr=1e-4 (a, b) it's"
    done = call(
        [
            sys.executable,
            "launch/train.py",
            *quick,
            "train.steps=2",
            "export.verify=false",
            "train.sample_every=1",
            'train.sample_prompts=["echo ${HOME}"]',
            setting("run_dir", place),
        ]
    )
    assert done.returncode == 0, done.stderr[-2000:]
    sample = json.loads((place / "samples.jsonl").read_text().splitlines()[0])
    assert sample["prompt"] == "echo ${HOME}" and load_config(place).train.sample_prompts == [
        "echo ${HOME}"
    ]
    page = html.unescape((place / "report.html").read_text(encoding="utf-8"))
    lines = {
        line.split("/")[1].split(".")[0]: line
        for line in re.findall(r">((?:deepspeed|python) launch/[^<]*)<", page)
    }
    assert set(lines) == {"evaluate", "export", "generate"}
    for name, more in {"evaluate": "", "export": " verify=none"}.items():
        ran = call(["bash", "-c", lines[name].replace("python ", f"{BIN}/python ") + more])
        assert ran.returncode == 0, lines[name] + ran.stderr[-2000:]
    assert (place / "eval.json").is_file() and (place / "export-merged/model.safetensors").is_file()
    assert parse(lines["generate"]).export_dir == str(place / "export")


def test_the_words_of_report():
    assert schema_words(["run=a, b", "run='c'"], "report") == ["runs=['a, b','c']"]
    composed = compose_config(["run=3.10", "run=a, (b)", "out=1_000"], "report").config
    assert (composed.run, composed.runs, composed.out) == (None, ["3.10", "a, (b)"], "1_000")


# ------------------------------------------------------------------ several files, sweeps, Hydra's own words


def test_several_files_stand_with_commas_and_without_brackets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "other b.jsonl"):
        Path(name).write_text('{"text": "x"}\n')

    def read(spec: str) -> list[str]:
        files = find_files(compose_train(["recipe=quickstart", f"data.train={spec}"]).data.train)
        return [path.name for path in files.paths]

    assert read("a.jsonl,other b.jsonl") == ["a.jsonl", "other b.jsonl"]
    mixed = compose_train(["recipe=quickstart", "data.train=[a.jsonl,'other b.jsonl']"])
    assert mixed.data.train == ["a.jsonl", "other b.jsonl"]
    with pytest.raises(UserError, match=r"no such file or directory: c\.jsonl"):
        read("a.jsonl,c.jsonl")
    Path("a,b.jsonl").touch()
    assert read("a,b.jsonl") == ["a,b.jsonl"]


def test_a_sweep_over_texts_keeps_them_as_typed():
    space = read_space(
        [
            "model.revision=1.10,1e5",
            "data.train='a, b.jsonl',c.jsonl",
            "task.labels=[a,b],[b,a]",
            "train.sample_prompts=Hello, world",
            "run_dir=a (b)",
            "optim.schedule=choice(linear,cosine)",
        ],
        {},
    )
    assert space.fixed == ("train.sample_prompts=Hello, world", "run_dir=a (b)")
    assert [parameter.values for parameter in space.parameters] == [  # type: ignore[union-attr]
        ("1.10", "1e5"),
        ("'a, b.jsonl'", "c.jsonl"),
        ("[a,b]", "[b,a]"),
        ("linear", "cosine"),
    ]
    cfg = compose_train(["task=classify", *space.words(grid(space)[0])])
    assert (cfg.model.revision, cfg.data.train, cfg.task.labels) == (
        "1.10",
        "a, b.jsonl",
        ["a", "b"],
    )  # type: ignore


def test_hydra_s_words_do_what_they_do_there():
    assert sweep_words(["-m", "hydra.sweep.dir=a b", "optim.lr=1,2"]) == [
        "sweep.dir=a b",
        "optim.lr=1,2",
    ]
    assert (
        settle(
            compose_config(["recipe=quickstart", "hydra.run.dir=a b", "hydra.verbose=true"])
        ).run_dir
        == "a b"
    )
    assert without_hydra(["hydra.output_subdir=null", "hydra.searchpath=[x]"], "train") == [
        "hydra.searchpath=[x]"
    ]
    assert split_flags(["--run", "--multirun", "a=1", "-c", "job", "--info", "b=2"]) == (
        ["a=1", "b=2"],
        {"--run": "", "--multirun": "", "--cfg": "job", "--info": "all"},
    )


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ("hydra.sweep.dir=d", "run_dir=d"),
        ("hydra/launcher=joblib", "sweep.parallel=K"),
        ("hydra.launcher.n_jobs=2", "sweep.parallel"),
        ("hydra/sweeper=optuna", "sweep=optuna"),
        ("hydra.sweeper.n_trials=3", "sweep.trials"),
        ("hydra.job.name=x", "name=NAME"),
        ("hydra.job.chdir=true", "never changes"),
        ("hydra.mode=MULTIRUN", "-m"),
        ("hydra.foo=1", "--help"),
        ("--config-name=x", "recipe=NAME"),
        ("--config-path=x", "--config-dir"),
        ("--experimental-rerun x", "same command"),
        ("--config-dir nowhere", "no such directory"),
        ("-c", "-c VALUE"),
        ("--multirun --cfg job", "Leave -m out"),
    ],
)
def test_hydra_s_words_that_have_no_effect_are_answered(words, answer, capsys):
    assert main("train", ["recipe=quickstart", *words.split()]) == 2
    assert answer in capsys.readouterr().err


def test_a_folder_of_one_s_own_recipes(tmp_path, capsys):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe/mine.yaml").write_text("# @package _global_\ntask:\n  max_length: 77\n")
    assert (
        main(
            "train",
            ["--config-dir", str(tmp_path), "recipe=mine", "--cfg", "job", "-p", "task"],
        )
        == 0
    )
    assert yaml.safe_load(capsys.readouterr().out)["max_length"] == 77


def test_cfg_job_shows_what_a_run_would_use(capsys):
    words = [
        "recipe=clm_pile",
        "debug=tiny",
        "train.steps=3",
        'train.sample_prompts=["${HOME}"]',
        "--cfg",
        "job",
    ]
    assert main("train", words) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["name"] == "clm_pile" and shown["train"]["sample_prompts"] == ["${HOME}"]
    assert shown["train"]["epochs"] is None and shown["data"]["train"].startswith("asset:")
    assert main("train", ["recipe=quickstart", "optim.lrr=1", "--cfg", "job"]) == 2
    told = capsys.readouterr()
    assert "Did you mean optim.lr?" in told.err and "HYDRA_FULL_ERROR" not in told.err + told.out
    assert (
        settle(compose_config(["recipe=quickstart"])).name == "quickstart"
        and (ROOT / "launch").is_dir()
    )
