"""The pictures of docs/, from real runs: report.png, report_phone.png, sweep.png and terminal.png.

    pip install -e '.[docs]'; python docs/screenshots.py [FOLDER]

Trains the quickstart in a terminal of its own (FOLDER/quickstart/run) and sweeps eight short jobs (FOLDER/sweep), about
six minutes on two idle cores; runs that FOLDER already holds are taken as they are. Then photographs their pages with
Chromium, and the terminal as pyte, a terminal emulator, showed it two thirds into the run.
"""

from __future__ import annotations

import html
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pyte
from PIL import Image

from finetune.compose import recipe_config
from finetune.reporting.page.build import build_report
from finetune.sweep.page import build_sweep_page

ROOT = Path(__file__).resolve().parents[1]
COLUMNS, LINES = 118, 32
TRAIN = ["launch/train.py", "recipe=quickstart"]
SWEEP = [
    "launch/train.py",
    "-m",
    "recipe=quickstart",
    "debug=tiny",
    "train.steps=20",
    "train.eval_every=10",
    "sweep=random",
    "sweep.trials=8",
    "sweep.num_gpus=1",
    "optim.lr=tag(log,interval(1e-4,1e-1))",
    "adapter.rank=2,8,32",
    "export.enabled=false",
]
COLORS = {
    "default": "#d8dee6",
    "cyan": "#5bc7d6",
    "green": "#5fd08a",
    "magenta": "#c792ea",
    "red": "#ff7370",
    "brown": "#e0b44a",
    "blue": "#6aa9ff",
    "white": "#ffffff",
    "black": "#5b6675",
}


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    run, sweep, screen = folder / "quickstart" / "run", folder / "sweep", folder / "terminal.html"
    if not (run / "result.json").exists():
        shown = watch([sys.executable, *TRAIN, f"run_dir={run}"], at="80/120")
        screen.write_text(shown, encoding="utf-8")
    if not (sweep / "sweep.json").exists():
        subprocess.run([sys.executable, *SWEEP, f"sweep.dir={sweep}"], cwd=ROOT, check=True)
    build_report(run, picture=False, recipe_of=recipe_config)
    build_sweep_page(sweep)
    docs = ROOT / "docs"
    shoot(run / "report.html", docs / "report.png", 1180, 1500)
    shoot(run / "report.html", docs / "report_phone.png", 500, 1500, dark=True)
    shoot(sweep / "sweep.html", docs / "sweep.png", 1180, 1020)
    if screen.exists():
        shoot(screen, docs / "terminal.png", 1010, 640)


def watch(command: list[str], at: str) -> str:
    """Run `command` in a terminal; its screen as HTML, the first time that the text `at` is on it."""
    screen, kept = pyte.Screen(COLUMNS, LINES), None
    stream = pyte.ByteStream(screen)
    leader, follower = pty.openpty()
    environment = os.environ | {
        "COLUMNS": str(COLUMNS),
        "LINES": str(LINES),
        "TERM": "xterm-256color",
    }
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=follower, stdout=follower, stderr=follower, env=environment
    )
    os.close(follower)
    while data := read(leader):
        stream.feed(data)
        if kept is None and any(at in line for line in screen.display):
            kept = page(screen)
    if process.wait() != 0:
        raise SystemExit("\n".join(screen.display))
    return kept or page(screen)


def read(leader: int) -> bytes:
    try:
        return os.read(leader, 65536)
    except OSError:
        return b""  # the other end is closed


def page(screen: pyte.Screen) -> str:
    """A screen as HTML, each cell in its colour."""
    lines = []
    for row in range(LINES):
        cells = [screen.buffer[row][column] for column in range(COLUMNS)]
        lines.append("".join(cell_html(cell) for cell in cells).rstrip())
    text = "\n".join(lines).rstrip()
    style = (
        "body{margin:0;background:#0f1318;padding:18px}"
        "pre{color:#d8dee6;font:13px/1.38 'DejaVu Sans Mono',monospace}"
    )
    return f"<!doctype html><meta charset=utf-8><style>{style}</style><pre>{text}</pre>"


def cell_html(cell) -> str:
    color = COLORS.get(cell.fg, f"#{cell.fg}" if len(cell.fg) == 6 else COLORS["default"])
    weight = ";font-weight:bold" if cell.bold else ""
    text = html.escape(cell.data)
    return text if cell.data == " " else f'<span style="color:{color}{weight}">{text}</span>'


def shoot(source: Path, target: Path, width: int, height: int, dark: bool = False) -> None:
    """A photograph of a page, in few colours so that it stays small."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome") or "chromium-browser"
    theme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    subprocess.run(
        [
            chromium,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            *theme,
            f"--window-size={width},{height}",
            f"--screenshot={target}",
            source.as_uri(),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=60,
    )
    Image.open(target).convert("RGB").quantize(128).save(target, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "/tmp/finetune-screenshots").absolute())
