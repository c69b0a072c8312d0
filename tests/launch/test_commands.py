"""The commands as users type them, in real processes: launchers, exit codes, files, messages."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import openai
import pytest
import zstandard

from finetune.assets.paths import asset
from finetune.process import free_port
from tests.distributed.ranks import losses
from tests.test_readme import LAUNCHES

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
DEEPSPEED = [str(BIN / "deepspeed")]
QUICK = ["recipe=quickstart", "debug=tiny", "train.threads=1", "train.sample_tokens=8"]
EVALUATED = 6
"""Documents: evaluating all of quickstart's would take longer than all else in these runs."""


def call(
    command: list[str], cwd: Path = ROOT, timeout: int = 280, **more
) -> subprocess.CompletedProcess:
    env = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"} | more.pop("env", {})
    return subprocess.run(
        command,
        cwd=cwd,
        env=env,
        text=True,
        capture_output=True,
        timeout=timeout,
        check=False,
        **more,
    )


def result(run_dir: Path) -> dict:
    return json.loads((run_dir / "result.json").read_text())


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The words of a run of seconds."""
    with zstandard.open(
        asset("data") / "pile_sample/eval.jsonl.zst", "rt", encoding="utf-8"
    ) as lines:
        texts = [json.loads(line) for line in islice(lines, EVALUATED)]
    file = tmp_path_factory.mktemp("quick_eval") / "eval.jsonl"
    file.write_text("".join(json.dumps(row | {"text": row["text"][:2000]}) + "\n" for row in texts))
    return [*QUICK, f"data.eval={file}"]


@pytest.fixture(scope="module")
def quick_run(quick: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short quickstart under `deepspeed` with two ranks, from another directory."""
    folder = tmp_path_factory.mktemp("quick")
    done = call(
        [
            *DEEPSPEED,
            "--num_gpus",
            "2",
            str(ROOT / "launch/train.py"),
            *quick,
            "train.steps=6",
            f"run_dir={folder / 'run'}",
            "checkpoint.every=3",
            "tracker=[tensorboard]",
        ],
        cwd=folder,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "run"


@pytest.mark.slow
def test_run_directory_has_everything(quick_run):
    for name in (
        "config.yaml",
        "plan.json",
        "metrics.jsonl",
        "result.json",
        "report.html",
        "curves.png",
        "export/adapter_model.safetensors",
        "export/adapter_config.json",
        "export/README.md",
        "export/export.json",
    ):
        assert (quick_run / name).stat().st_size > 0, name
    assert any((quick_run / "tensorboard").iterdir())
    found = result(quick_run)
    assert (
        found["status"] == "done"
        and found["step"] == 6
        and found["world_size"] == 2
        and found["export"] == "export"
    )
    assert found["peak_host_bytes"] >= found["start_host_bytes"] > 0 and found["error"] is None
    lines = [json.loads(line) for line in (quick_run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    trained = [line for line in lines if line["kind"] == "train"]
    assert {
        "loss",
        "lr",
        "grad_norm",
        "tokens",
        "tokens_per_second",
        "host_bytes",
        "gpu_bytes",
    } <= trained[0].keys()
    assert all(line["grad_norm"] > 0 for line in trained)
    steps = sorted(p.name for p in (quick_run / "checkpoints").iterdir())
    assert steps == ["step-00000003", "step-00000006"]
    assert json.loads((quick_run / "export/export.json").read_text())["verified"] is True


@pytest.mark.slow
def test_export_opens_in_plain_peft_and_is_equal(quick_run):
    """An independent reopening: our own checkpointed weights through Hugging Face's model and peft only."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = json.loads((quick_run / "export/adapter_config.json").read_text())[
        "base_model_name_or_path"
    ]
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), quick_run / "export"
    )
    assert any(p.abs().max() > 0 for n, p in model.named_parameters() if "lora_B" in n)


@pytest.mark.slow
def test_merged_in_bf16_the_model_chooses_the_same_words(quick_run):
    """On real text: rounding the merged weights changes at most one choice in a thousand; bf16 arithmetic, which also
    the base model's users have, none where the likeliest token leads clearly."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from finetune.data.sources import read
    from finetune.training.mfu import emulates_bf16

    folders = {}
    for dtype in ("fp32", "bf16"):
        folders[dtype] = quick_run / f"merged-{dtype}"
        words = [
            f"run={quick_run}",
            "kind=merged",
            f"dtype={dtype}",
            f"out={folders[dtype]}",
            "verify=none",
        ]
        done = call([sys.executable, "launch/export.py", *words])
        assert done.returncode == 0, done.stderr[-2000:]

    def opened(dtype: str, kind: torch.dtype):
        return AutoModelForCausalLM.from_pretrained(
            folders[dtype], dtype=kind, attn_implementation="eager"
        ).eval()

    exact = opened("fp32", torch.float32)
    half = None if emulates_bf16(torch.device("cpu")) else opened("bf16", torch.bfloat16)
    rounded = opened("bf16", torch.bfloat16).float()
    tokenizer = AutoTokenizer.from_pretrained(folders["fp32"])
    texts = [row["text"] for _, row in read("asset:data/pile_sample/eval.jsonl.zst", "train")][:10]
    same, clear, count = 0, [], 0
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"][:512]])
        with torch.no_grad():
            a, b = (model(input_ids=ids).logits[0] for model in (exact, rounded))
            same += int((a.argmax(-1) == b.argmax(-1)).sum())
            count += len(a)
            if half is not None:
                c, best = half(input_ids=ids).logits[0].float(), a.topk(2, -1).values
                clear.append((a.argmax(-1) == c.argmax(-1))[best[:, 0] - best[:, 1] > 0.2])
    assert count > 3000 and same / count >= 0.998
    if half is not None:
        assert bool(torch.cat(clear).all()) and len(torch.cat(clear)) > count / 2


@pytest.fixture(scope="module")
def readme(
    quick_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, subprocess.CompletedProcess]:
    """Every command of the README that starts a program, run as it stands there, with paths and sizes of this test.

    Left out: the first two, the sweep (below) and the server (below), which does not end.
    """
    folder = tmp_path_factory.mktemp("readme")
    (folder / "pile").mkdir()
    for name in ("train", "val"):
        rows = [
            {"text": f"The {name} {i} of the Congress.", "meta": {"pile_set_name": "A"}}
            for i in range(40)
        ]
        (folder / f"pile/{name}.jsonl.zst").write_bytes(
            zstandard.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
        )
    places = {
        "runs/clm_pile/20260101-120000": quick_run,
        "runs/clm_pile_lora/20260101-120000": quick_run,
        "pile/": f"{folder}/pile/",
        "/models/gpt-j-6b-bf16": folder / "bf16",
        "/models/gpt-j-6b": asset("gptj_tiny"),
        "launch/train.py": f"launch/train.py debug=tiny train.steps=1 train.threads=1 data.max_rows=12 run_dir={folder / 'run'}",
        "launch/report.py": f"launch/report.py out={folder / 'compare.html'}",
    }
    done = {}
    for line in LAUNCHES:
        if " -m " in line or "launch/serve.py" in line:
            continue
        command = line
        for place, here in places.items():
            command = command.replace(place, str(here))
        done[re.search(r"launch/(\w+)", line)[1]] = call(["bash", "-c", command], timeout=200)
    return done | {"folder": folder}


@pytest.mark.slow
@pytest.mark.parametrize(
    "program", ["train", "plan", "evaluate", "export", "generate", "convert", "report", "doctor"]
)
def test_the_readme_s_command_runs(readme, quick_run, program):
    done = readme[program]
    # A doctor may find something here, e.g. little disk; it never fails.
    assert done.returncode in ((0, 1) if program == "doctor" else (0,)), (
        done.stdout[-2000:] + done.stderr[-2000:]
    )
    assert "Traceback" not in done.stderr
    made = {
        "train": "run/result.json",
        "convert": "bf16/model.safetensors",
        "report": "compare.html",
    }
    assert program not in made or (readme["folder"] / made[program]).stat().st_size > 0
    assert program in made or done.stdout.strip()


@pytest.mark.slow
def test_evaluate_export_and_generate(readme, quick_run, tmp_path):
    merged = quick_run / "export-merged"
    from_run = json.loads((quick_run / "eval.json").read_text())
    assert from_run["loss"] == pytest.approx(result(quick_run)["eval"]["loss"], rel=1e-6)
    again = call(
        [
            *DEEPSPEED,
            "launch/evaluate.py",
            f"model={merged}",
            f"data.eval={from_run['data']}",
            f"out={tmp_path}",
        ]
    )
    assert again.returncode == 0, again.stderr[-2000:]
    assert json.loads((tmp_path / "eval.json").read_text())["loss"] == pytest.approx(
        from_run["loss"], rel=1e-5
    )
    texts = [
        call(
            [
                sys.executable,
                "launch/generate.py",
                f"model={folder}",
                "prompt=The patients were",
                "temperature=0",
                "max_new_tokens=12",
            ]
        ).stdout
        for folder in (quick_run / "export", merged)
    ]
    assert texts[0] == texts[1] and len(texts[0]) > 10


@pytest.mark.slow
def test_the_readme_s_server_answers(quick_run):
    line = next(line for line in LAUNCHES if "launch/serve.py" in line)
    words = shlex.split(line.replace("runs/clm_pile_lora/20260101-120000", str(quick_run)))
    process = subprocess.Popen(
        [sys.executable, *words[1:], "port=0"],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    try:
        address = next(
            found[0]
            for text in process.stdout
            if (found := re.findall(r"http://127\.0\.0\.1:\d+", text))
        )
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60)
        (model,) = client.models.list()
        parts = list(
            client.completions.create(
                model=model.id, prompt="The", max_tokens=3, temperature=0, stream=True
            )
        )
        whole = client.completions.create(model=model.id, prompt="The", max_tokens=3, temperature=0)
        assert whole.usage.completion_tokens == 3 and whole.choices[0].text
        assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
    finally:
        process.terminate()  # Ctrl-C does not reach what a script started in the background
        process.communicate(timeout=60)


@pytest.mark.slow
def test_the_lock_of_a_killed_compile_is_explained_and_not_waited_for(tmp_path):
    lock = tmp_path / "extensions/deepspeed_shm_comm/lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (time.time() - 60, time.time() - 60))
    done = call(
        [sys.executable, "launch/train.py", *QUICK, "train.steps=1", f"run_dir={tmp_path / 'run'}"],
        env={"TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")},
    )
    assert (
        done.returncode == 1 and f"rm {lock}" in done.stderr and "Traceback" not in done.stderr
    ), done.stderr[-2000:]
    assert result(tmp_path / "run")["status"] == "failed"


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [[sys.executable], [str(BIN / "torchrun"), "--nproc_per_node", "2"]],
    ids=["python", "torchrun"],
)
def test_other_launchers(quick, launcher, tmp_path):
    done = call(
        [
            *launcher,
            "launch/train.py",
            *quick,
            "train.steps=2",
            f"run_dir={tmp_path}",
            "export.enabled=false",
        ]
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert result(tmp_path)["world_size"] == (2 if "torchrun" in launcher[0] else 1)


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_continues(quick, tmp_path):
    command = [
        sys.executable,
        "launch/train.py",
        *quick,
        "train.steps=400",
        f"run_dir={tmp_path}",
        "export.enabled=false",
    ]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 200
    lines = tmp_path / "metrics.jsonl"
    while not (lines.exists() and '"train"' in lines.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 75, output[-2000:]
    stopped = result(tmp_path)
    assert (stopped["status"], stopped["stopped_by"]) == ("preempted", "SIGTERM") and 0 < stopped[
        "step"
    ] < 400
    assert (
        "preempted (SIGTERM) at step" in output
        and f"run_dir={tmp_path}" in output.strip().splitlines()[-1]
    )
    done = call([*command[:-1], f"train.steps={stopped['step'] + 2}", "export.enabled=false"])
    assert done.returncode == 0, done.stderr[-2000:]
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [r["step"] for r in records if r["kind"] == "train"] == list(
        range(1, stopped["step"] + 3)
    )
    assert result(tmp_path)["step"] == stopped["step"] + 2


@pytest.mark.slow
def test_two_nodes_without_ssh_train_as_one_node_does(quick, quick_run, tmp_path):
    """Two launchers with a working directory each and one rank each, over loopback, against two ranks of one node."""
    hosts = tmp_path / "hostfile"
    hosts.write_text("node-0 slots=1\nnode-1 slots=1\n")
    nodes, port = [], str(free_port())
    for rank in range(2):
        (tmp_path / f"node-{rank}").mkdir()
        command = [
            *DEEPSPEED,
            "--hostfile",
            str(hosts),
            "--no_ssh",
            "--node_rank",
            str(rank),
            "--master_addr",
            "127.0.0.1",
            "--master_port",
            port,
            str(ROOT / "launch/train.py"),
            *quick,
            "train.steps=6",
            f"run_dir={tmp_path / 'run'}",
            "export.enabled=false",
        ]
        nodes.append(
            subprocess.Popen(
                command,
                cwd=tmp_path / f"node-{rank}",
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        )
    outputs = [node.communicate(timeout=280)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(outputs)[-4000:]
    assert result(tmp_path / "run")["world_size"] == 2
    assert losses(tmp_path / "run") == pytest.approx(losses(quick_run), rel=1e-6)
    assert "eval at step" in outputs[0] and "eval at step" not in outputs[1], "only rank 0 speaks"
    assert not list((tmp_path / "node-1").iterdir()), (
        "nothing is left in a node's working directory"
    )


@pytest.mark.slow
def test_sweep_runs_each_job_and_repeats_nothing(quick, tmp_path):
    """Under `deepspeed`, whose number of ranks each job's own process group gets; then once more, by plain python."""
    words = [
        "launch/train.py",
        "-m",
        *quick,
        "train.steps=2",
        "optim.lr=1e-3,5e-3",
        "export.enabled=false",
        f"sweep.dir={tmp_path}",
    ]
    done = call([*DEEPSPEED, "--num_gpus", "2", *words])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    jobs = json.loads((tmp_path / "sweep.json").read_text())["jobs"]
    assert [job["status"] for job in jobs] == ["done", "done"] and jobs[0]["eval"]["loss"] <= jobs[
        1
    ]["eval"]["loss"]
    stamps = [(tmp_path / f"{n}/result.json").stat().st_mtime for n in range(2)]
    assert [result(tmp_path / str(n))["world_size"] for n in range(2)] == [2, 2]
    assert call([sys.executable, *words, "sweep.num_gpus=2"]).returncode == 0
    assert stamps == [(tmp_path / f"{n}/result.json").stat().st_mtime for n in range(2)]


WRONG = {
    "unknown recipe": (["recipe=clm_pille"], "Did you mean recipe=clm_pile?"),
    "unknown key": (["recipe=quickstart", "optim.lrr=1"], "Did you mean optim.lr"),
    "unknown option": (["recipe=quickstart", "zero=stage5"], "stage0, stage1, stage2, stage3"),
    "wrong type": (["recipe=quickstart", "optim.lr=fast"], "optim.lr"),
    "no data": (["recipe=clm_pile"], "deepspeed launch/train.py recipe=quickstart"),
    "neither data nor weights": (
        ["recipe=clm_pile"],
        "the weights of EleutherAI/gpt-j-6b are not on this machine",
    ),
    "no evaluation data": (
        ["recipe=quickstart", "data.eval=nowhere.jsonl"],
        "data.eval = nowhere.jsonl",
    ),
    "two unknown keys": (
        ["recipe=quickstart", "optim.lrr=1", "train.stepz=2"],
        "Did you mean train.steps",
    ),
    "several at once": (
        ["recipe=quickstart", "task.max_length=4096", "train.global_batch=7"],
        "2 problems",
    ),
    "no weights": (
        ["recipe=clm_pile", "data.train=asset:data/pile_sample/train.jsonl.zst", "data.eval=null"],
        "model.path=DIR",
    ),
    "bad resume": (["recipe=quickstart", "resume=/nowhere"], "resume"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG)
def test_wrong_usage_is_exit_code_2_without_traceback(name, tmp_path):
    words, remedy = WRONG[name]
    done = call([sys.executable, "launch/train.py", *words, f"run_dir={tmp_path / 'run'}"])
    assert done.returncode == 2, done.stderr[-2000:]
    assert remedy in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_launcher_returns_our_exit_code_and_message():
    done = call(
        [*DEEPSPEED, "--num_gpus", "2", "launch/train.py", "recipe=quickstart", "optim.lrr=1"]
    )
    assert done.returncode == 2
    assert (done.stdout + done.stderr).count("Did you mean optim.lr") == 1, "two ranks, one message"


def test_plan_prints_one_json_object_without_torch():
    done = call(
        [
            sys.executable,
            "-X",
            "importtime",
            "launch/plan.py",
            "recipe=clm_pile",
            "machine=h100_80",
            "machine.gpus=4",
            "plan.format=json",
        ]
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["fits"] and found["parameters"]["total"] == 6050882784
    assert not re.search(r"\|\s+torch$", done.stderr, re.M)


@pytest.mark.parametrize(
    "name", ["train", "plan", "evaluate", "export", "generate", "serve", "convert"]
)
def test_help_and_cfg(name):
    shown = call([sys.executable, f"launch/{name}.py", "--help"])
    assert shown.returncode == 0 and "Usage:" in shown.stdout and "Examples:" in shown.stdout


def test_cfg_job_prints_the_config():
    shown = call([sys.executable, "launch/train.py", "recipe=quickstart", "--cfg", "job"])
    assert shown.returncode == 0 and "max_length: 256" in shown.stdout
