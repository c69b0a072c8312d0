"""The report page: well-formed, self-contained and escaped, for complete, failed, running and empty runs."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from run_folders import CONFIG, eval_record, make_run, result, train_record, write_lines

from finetune.reporting.callbacks import RunInfo
from finetune.reporting.page import build as build_module
from finetune.reporting.page.build import Report, build_report
from finetune.reporting.page.charts import Chart, Series, draw, smooth, thin
from finetune.reporting.page.curves import curves, predicted
from finetune.reporting.page.data import sections
from finetune.reporting.page.files import read_run
from finetune.reporting.page.tables import confusion, memory

VOID = {"meta", "br", "hr", "img", "input", "link", "base", "col", "source"}
PNG = b"\x89PNG\r\n\x1a\n"


def refuse_constant(name: str):
    raise AssertionError(f"{name} is not JSON")


class Page(HTMLParser):
    """Asserts balance while it reads; keeps tags, attributes and text."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.data: list[dict] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if self.open[-1:] == ["script"] and self.tags[-1][1].get("type") == "application/json":
            self.data.append(json.loads(data, parse_constant=refuse_constant))
        elif self.open[-1:] not in (["script"], ["style"]):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def titles(self) -> list[str]:
        return [
            chart["aria-label"].removesuffix(" against step")
            for tag, chart in self.tags
            if tag == "svg"
        ]


def page_of(run_dir: Path) -> Page:
    text = build_report(run_dir, picture=False).read_text(encoding="utf-8")
    page = Page(text)
    for tag, attributes in page.tags:
        assert not {"src", "href", "action", "xlink:href"} & set(attributes), (
            f"{tag} asks for something outside"
        )
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"url\(|@import|https?://|//cdn", text)
    geometry = " ".join(
        attributes.get("d") or attributes.get("style") or "" for _, attributes in page.tags
    )
    assert "nan" not in geometry and "inf" not in geometry
    return page


def test_a_complete_run_has_every_part(tmp_path: Path):
    run_dir = make_run(tmp_path / "20260101-120000")
    page = page_of(run_dir)
    assert page.titles() == [
        "Loss",
        "Perplexity",
        "Learning rate",
        "Gradient norm",
        "Tokens per second",
        "Memory of a rank",
    ]
    for words in (
        "quickstart / 20260101-120000",
        "done",
        "3.67 M",
        "0.06% of 6.05 G",
        "stage2",
        "2 ranks",
        "99.7%",
        "Pile-CC",
        "43.2%",
        "model.dtype",
        "bf16",
        "2.13.0",
        "4.10 GiB",
        "predicted 4.50 GiB",
        "92%",
        "activations 2.10 GiB",
        "loss since first",
        "kind=merged",
    ):
        assert words in page.text, words
    assert ("meta", {"http-equiv": "refresh", "content": "30"}) not in page.tags
    build_report(run_dir)
    assert (run_dir / "curves.png").read_bytes().startswith(PNG)
    assert not list(run_dir.glob(".*.tmp"))


def test_text_of_the_run_is_escaped(tmp_path: Path):
    page = page_of(make_run(tmp_path / "<img src=x>", status="failed"))
    assert (
        "<script>alert(" in page.text
        and "<b>Odd & ends</b>" in page.text
        and "NaN at step 3 <b>" in page.text
    )
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert len([tag for tag, _ in page.tags if tag == "script"]) == len(page.titles()) + 1


def test_commands_can_be_pasted(tmp_path: Path):
    done = page_of(make_run(tmp_path / "a run")).text
    assert f"deepspeed launch/evaluate.py \"run='{tmp_path}/a run'\"" in done
    assert f"python launch/generate.py \"model='{tmp_path}/a run/export'\"" in done
    assert "continue" not in done
    stopped = page_of(make_run(tmp_path / "b", status="preempted")).text
    assert (
        f"deepspeed launch/train.py recipe=quickstart optim.lr=0.005 run_dir={tmp_path}/b"
        in stopped
    )


@pytest.mark.parametrize(
    ("kind", "exports"),
    [("full", ["full"]), ("lora", ["adapter", "merged"]), ("prompt", ["adapter"])],
)
def test_commands_fit_what_was_trained(tmp_path: Path, kind: str, exports: list[str]):
    run_dir = make_run(tmp_path / "run", steps=2)
    (run_dir / "config.yaml").write_text(f"name: r\nadapter: {{kind: {kind}}}")
    assert re.findall(r"kind=(\w+)", page_of(run_dir).text) == exports


def test_a_run_on_the_cpu_predicts_no_gpu(tmp_path: Path):
    run_dir = make_run(tmp_path / "run", steps=2)
    plan = json.loads((run_dir / "plan.json").read_text())
    (run_dir / "plan.json").write_text(
        json.dumps({**plan, "machine": {**plan["machine"], "gpus": 0}})
    )
    assert set(predicted(read_run(run_dir))) == {"host_bytes"}


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_parts_of_a_prediction_add_up_to_it(tmp_path: Path, ranks: int):
    """On a CPU the tensors are in the process: 650 MiB of process and 250 MiB of tensors on each rank."""
    mib = 2**20
    run_dir = make_run(tmp_path / "run", steps=2)
    plan = json.loads((run_dir / "plan.json").read_text())
    plan["machine"]["gpus"] = 0
    plan["options"][1] |= {
        "host_bytes": ranks * 900 * mib,
        "parts": {"weights": 100 * mib, "logits": 120 * mib, "workspace": 30 * mib},
        "host_parts": {
            "processes": ranks * 650 * mib,
            "weights": 0,
            "tensors": ranks * 250 * mib,
            "checkpoint": 0,
        },
    }
    (run_dir / "plan.json").write_text(json.dumps(plan))
    values = json.loads((run_dir / "result.json").read_text())
    (run_dir / "result.json").write_text(json.dumps(values | {"world_size": ranks}))
    (host,) = memory(read_run(run_dir)).bars
    assert host.name == "host, predicted 900.0 MiB" and sum(
        part.share for part in host.parts
    ) == pytest.approx(1)
    assert [(part.name, part.text) for part in host.parts] == [
        ("process", "650.0 MiB"),
        ("logits", "120.0 MiB"),
        ("weights", "100.0 MiB"),
        ("workspace", "30.0 MiB"),
    ]
    assert "process 650.0 MiB" in page_of(run_dir).text


def test_the_training_loss_is_an_average_and_axes_are_named(tmp_path: Path):
    write_lines(
        tmp_path / "metrics.jsonl",
        [train_record(step, 60) | {"loss": float(step)} for step in range(1, 61)]
        + [eval_record(60)],
    )
    page = page_of(tmp_path)
    assert "training loss 57.500 last 6 steps averaged" in page.text, "55 to 60"
    assert page.text.count(" step ") >= len(page.titles())
    spans = {tuple(chart["x"]) for chart in page.data}
    assert spans == {(1.0, 60.0)}, "a chart with one evaluation has the same axis as the others"


def test_a_stop_by_hand_is_called_so(tmp_path: Path):
    for reason, words in (
        ("SIGINT", "stopped by you (Ctrl-C)"),
        ("file STOP", "stopped by you (file STOP)"),
        ("SIGTERM", "preempted (SIGTERM)"),
        (None, "preempted"),
    ):
        run_dir = make_run(tmp_path / str(reason), steps=3, status="preempted")
        values = json.loads((run_dir / "result.json").read_text())
        (run_dir / "result.json").write_text(json.dumps(values | {"stopped_by": reason}))
        page = page_of(run_dir)
        assert words in page.text and ("p", {"class": "status preempted"}) in page.tags


def test_a_run_that_failed_before_it_knew_anything(tmp_path: Path):
    (tmp_path / "result.json").write_text(
        json.dumps(
            {
                "status": "failed",
                "step": 0,
                "loss": None,
                "eval": {},
                "tokens": 0,
                "seconds": 0.0,
                "tokens_per_second": 0.0,
                "peak_host_bytes": 9,
                "start_host_bytes": 0,
                "peak_gpu_bytes": 0,
                "world_size": 0,
                "zero_stage": None,
                "export": None,
                "error": "no training data is given\n  data.train=...",
            }
        )
    )
    text = page_of(tmp_path).text
    assert "no training data is given" in text and "0 ranks" not in text


def test_a_failed_run_says_why_first(tmp_path: Path):
    page = page_of(make_run(tmp_path / "run", steps=3, status="failed"))
    assert page.text.index("The run failed") < page.text.index("training loss")


def test_a_running_run_looks_again(tmp_path: Path):
    page = page_of(make_run(tmp_path / "run", status=None))
    assert ("meta", {"http-equiv": "refresh", "content": "30"}) in page.tags
    assert "running" in page.text and "Loss" in page.titles()


def test_nothing_logged_yet(tmp_path: Path):
    page = page_of(tmp_path)
    assert "No step has been logged yet" in page.text
    assert page.titles() == []
    build_report(tmp_path)
    assert not (tmp_path / "curves.png").exists()


@pytest.mark.parametrize("loss", [2.5, 0.0, float("nan")])
def test_one_line(tmp_path: Path, loss: float):
    write_lines(
        tmp_path / "metrics.jsonl",
        [{**train_record(1, 10), "loss": None if math.isnan(loss) else loss}],
    )
    page = page_of(tmp_path)
    assert ("Loss" in page.titles()) == (not math.isnan(loss))
    assert "Learning rate" in page.titles()


def test_nulls_and_broken_files(tmp_path: Path):
    nothing = dict.fromkeys(train_record(1, 2))
    write_lines(
        tmp_path / "metrics.jsonl",
        [{**nothing, "kind": "train", "step": step} for step in (1, 2, 3)]
        + [
            {"kind": "eval", "step": 3, "loss": None, "subsets": None},
            {"kind": "train"},
            {"step": None},
        ],
    )
    for name in ("config.yaml", "plan.json", "result.json", "data_stats.json", "environment.json"):
        (tmp_path / name).write_text('{"broken": [')
    page = page_of(tmp_path)
    assert page.titles() == []


def test_every_value_null(tmp_path: Path):
    for name, keys in (
        ("result.json", result(1, "done")),
        ("plan.json", {"chosen": 0, "options": 0, "parameters": 0}),
    ):
        (tmp_path / name).write_text(json.dumps(dict.fromkeys(keys)))
    assert page_of(tmp_path).titles() == []


def test_later_evaluations_are_on_the_page(tmp_path: Path):
    (tmp_path / "eval.json").write_text(
        json.dumps(
            {
                "data": "val.jsonl",
                "loss": 2.5,
                "subsets": {"A": {"loss": 1.0}},
                "lm_eval": {"tasks": {"own": {"acc": 0.75, "alias": "own"}}},
            }
        )
    )
    text = build_report(tmp_path, picture=False).read_text()
    assert (
        "Evaluated afterwards" in text
        and "loss 2.5" in text
        and "lm-eval: own" in text
        and "acc 0.75" in text
    )


def test_a_step_that_was_repeated_counts_once(tmp_path: Path):
    write_lines(
        tmp_path / "metrics.jsonl",
        [
            {"kind": "train", "step": s, "loss": v}
            for s, v in ((1, 9.0), (2, 8.0), (3, 7.0), (2, 5.0))
        ],
    )
    assert [(r["step"], r["loss"]) for r in read_run(tmp_path).train] == [
        (1, 9.0),
        (2, 5.0),
        (3, 7.0),
    ]


def test_classification_has_its_own_curve_and_best_row(tmp_path: Path):
    classes = {"sarcastic": {"f1": 0.4, "examples": 12}}
    evals = [
        {
            "kind": "eval",
            "step": step,
            "loss": 1.0,
            "accuracy": accuracy,
            "f1": accuracy / 2,
            "per_class": classes,
        }
        for step, accuracy in ((5, 0.5), (10, 0.9), (15, 0.8))
    ]
    write_lines(tmp_path / "metrics.jsonl", evals)
    page = page_of(tmp_path)
    assert (
        "Evaluation" in page.titles()
        and "best accuracy 0.9000 step 10" in page.text
        and "By class" in page.text
    )


def run_with(run_dir: Path, labels, counts) -> Path:
    """A complete run whose last evaluation carries a confusion matrix."""
    with (make_run(run_dir, steps=20) / "metrics.jsonl").open("a") as f:
        f.write(json.dumps(eval_record(21) | {"labels": labels, "confusion": counts}) + "\n")
    return run_dir


def test_the_confusion_matrix_is_a_shaded_grid(tmp_path: Path):
    run_dir = run_with(tmp_path / "run", ["no", "<b>yes</b>"], [[3, 1], [0, 0]])
    grid = confusion(read_run(run_dir))
    assert [[(cell.text, cell.share, cell.right) for cell in cells] for _, cells in grid.rows] == [
        [("3", 0.75, True), ("1", 0.25, False)],
        [("0", 0.0, False), ("0", 0.0, True)],
    ]
    page = Page(build_report(run_dir).read_text())
    shades = [
        attributes["style"]
        for _, attributes in page.tags
        if attributes.get("class") in ("right", "wrong")
    ]
    assert shades == ["--share:75.0%", "--share:25.0%", "--share:0.0%", "--share:0.0%"]
    assert "<b>yes</b>" in page.text


@pytest.mark.parametrize(
    ("labels", "counts"),
    [
        (["a"], [[1], [2]]),
        (["a"], None),
        (None, [[1]]),
        (["a"], [["x"]]),
        ([], []),
        ([str(i) for i in range(41)], [[0] * 41] * 41),
    ],
)
def test_what_is_no_matrix_is_left_out(tmp_path: Path, labels, counts):
    run_dir = run_with(tmp_path / "run", labels, counts)
    assert confusion(read_run(run_dir)) is None and build_report(run_dir).is_file()


def test_hover_data_is_what_was_logged(tmp_path: Path):
    page = page_of(make_run(tmp_path / "run", steps=20))
    loss = next(chart for chart in page.data if chart["series"][0]["name"] == "training")
    assert [x for x, _ in loss["series"][0]["points"]] == list(range(1, 21))
    assert loss["series"][0]["points"][4][1] == pytest.approx(train_record(5, 20)["loss"], rel=1e-5)


def test_predicted_memory_is_of_one_rank(tmp_path: Path):
    run = read_run(make_run(tmp_path / "run", steps=5))
    assert predicted(run) == {"host_bytes": 4.5 * 2**30, "gpu_bytes": int(14.6 * 2**30)}
    memory = curves(run)[-1]
    assert [(s.name, s.style) for s in memory.series] == [
        ("host, measured", "line"),
        ("host, predicted", "dashed"),
        ("GPU, measured", "line"),
        ("GPU, predicted", "dashed"),
    ]


def test_geometry_of_a_chart():
    drawing = draw(Chart("t", [Series("s", [(0.0, 0.0), (5.0, 10.0), (10.0, 5.0)])]))
    assert drawing.paths[0]["d"] == "M0.0 400.0L500.0 0.0L1000.0 200.0"
    assert [text for _, text in drawing.y.ticks] == ["0", "5", "10"]
    assert [text for _, text in drawing.x.ticks] == ["0", "5", "10"]


@pytest.mark.parametrize(
    "values", [[1e-300, 2e-300], [0.0, 0.0], [1e12, 1e12 + 1], [-3.0, 3.0], [2.0**50, 1.0]]
)
@pytest.mark.parametrize("unit", ["number", "exp", "bytes", "share"])
def test_any_range_has_an_axis(values, unit):
    drawing = draw(Chart("t", [Series("s", [(float(i), v) for i, v in enumerate(values)])], unit))
    assert 1 <= len(drawing.y.ticks) <= 8
    assert all(-1e-6 <= at <= 100 + 1e-6 for at, _ in drawing.y.ticks)


def test_thinning_keeps_spikes_and_ends():
    points = [(float(i), 1.0) for i in range(10_000)]
    points[7777] = (7777.0, 50.0)
    kept = thin(points)
    assert (
        len(kept) < 900 and points[7777] in kept and kept[0] == points[0] and kept[-1] == points[-1]
    )


def test_the_average_neither_lags_nor_leaves_the_data():
    points = [(float(i), 100.0 - i) for i in range(100)]
    assert all(abs(y - (100.0 - x)) <= 1.0 for x, y in smooth(points))
    assert smooth([(0.0, 3.0)]) == [(0.0, 3.0)]


def test_data_statistics():
    statistics = {
        "documents": 3,
        "tokens": 900,
        "lengths": {"64": 2, "256": 1},
        "seconds": 0.123,
        "tokens_by_name": {"subset": {"ArXiv": 600, "Pile-CC": 300}},
        "bad_row_messages": ["a.jsonl:3: bad"],
    }
    mixture = {"sources": {"web": {"tokens_per_epoch": 1}, "law": {"tokens_per_epoch": 3}}}
    part, evaluation = sections({"train": statistics, "eval news": mixture})
    assert [(bar.name, bar.value) for bar in part.lengths] == [
        ("33 to 64", 2),
        ("65 to 128", 0),
        ("129 to 256", 1),
    ]
    assert [(bar.name, round(bar.share, 2)) for bar in part.subsets] == [
        ("ArXiv", 0.67),
        ("Pile-CC", 0.33),
    ]
    assert ("documents", "3") in part.facts and part.complaints == ["a.jsonl:3: bad"]
    assert evaluation.name == "eval news" and evaluation.lengths == []
    assert [(bar.name, bar.share) for bar in evaluation.subsets] == [("law", 0.75), ("web", 0.25)]
    assert sections({}) == []


def test_the_callback_builds_at_evaluations_at_most_every_30_seconds_and_at_the_end(
    tmp_path: Path, monkeypatch
):
    now, built = [100.0], []
    monkeypatch.setattr(build_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(
        build_module,
        "build_report",
        lambda run_dir, picture=True, recipe_of=None: built.append((now[0], picture)),
    )
    report = Report()
    report.start(
        RunInfo(
            tmp_path,
            "r",
            10,
            world_size=2,
            data={"tokens": 5},
            extra={"hub_token": "abc", "overrides": ["recipe=r", f"data.train={'ab' * 20}"]},
        )
    )
    for moment in (100.0, 110.0, 129.0, 131.0, 140.0):
        now[0] = moment
        report.evaluation(eval_record(1))
    report.finish({"status": "done"})
    assert built == [(100.0, False), (131.0, False), (140.0, True)]
    assert json.loads((tmp_path / "environment.json").read_text()) == {
        "world_size": 2,
        "total_steps": 10,
        "hub_token": "***",
        "overrides": ["recipe=r", f"data.train={'ab' * 20}"],
    }
    assert json.loads((tmp_path / "data_stats.json").read_text()) == {"tokens": 5}


def test_the_page_of_a_run_does_not_import_torch_or_matplotlib(tmp_path: Path):
    import subprocess
    import sys

    (tmp_path / "config.yaml").write_text(CONFIG)
    code = (
        "import sys; from finetune.reporting.page.build import build_report; build_report(sys.argv[1], picture=False);"
        "assert not {'torch', 'matplotlib', 'deepspeed'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], cwd=Path(__file__).parents[2], check=False
    )
    assert done.returncode == 0


def test_a_run_that_fails_before_its_first_step_has_a_page(tmp_path: Path):
    (tmp_path / "result.json").write_text(
        json.dumps({"status": "failed", "step": 0, "error": "train.jsonl:3: bad"})
    )
    Report(tmp_path).finish({"status": "failed"})
    page = (tmp_path / "report.html").read_text()
    assert "train.jsonl:3: bad" in page and "No step has been logged yet" in page
