"""The commands of docs/chat_example.md, in order, with debug=tiny: from two messy sources to a GGUF file."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.cli.app import main
from tests.distributed.ranks import run_cases

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/chat_example.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line)
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S)
    for line in block.splitlines()
]
FEW = ["train.steps=2", "train.threads=1"]


@pytest.mark.slow
def test_every_command_of_the_page(tmp_path, monkeypatch, capsys):
    pytest.importorskip("xllamacpp")
    monkeypatch.chdir(tmp_path)
    install, make, look, tiny, plan, full, evaluate, generate, export = COMMANDS
    assert install[:2] == ["pip", "install"]
    subprocess.run([sys.executable, str(ROOT / make[1]), *make[2:]], check=True)

    # The launcher's command is the tiny one but for the model and the places.
    own = ("debug=", "data.preview=", "model.path=", "run_dir=")
    assert [w for w in full[2:] if not w.startswith(own)] == [
        w for w in tiny[2:] if not w.startswith(own)
    ]

    def here(words: list[str]) -> list[str]:
        """The ranks of tests work in another directory."""
        names = r"\b(chats\.jsonl|faq\.csv|runs/chat)"
        return [re.sub(names, lambda m: str(tmp_path / m[1]), word) for word in words]

    with pytest.raises(AssertionError, match=r"chats\.jsonl:4: broken JSON"):
        run_cases(1, [here(look[2:])])
    run_cases(1, [here([*tiny[2:], *FEW])])
    run = tmp_path / "runs/chat/tiny"
    result = json.loads((run / "result.json").read_text())
    assert result["status"] == "done" and result["eval"]["loss"] > 0
    stats = json.loads((run / "data_stats.json").read_text())["train"]
    assert stats["bad_rows"] == 3 and set(stats["sources"]) == {"chats.jsonl", "faq.csv"}

    for program, words in (("plan", plan), ("evaluate", evaluate), ("generate", generate)):
        assert main(program, words[2:]) in ((0, 1) if program == "plan" else (0,))
    found = json.loads((run / "eval.json").read_text())
    assert found["loss"] == pytest.approx(result["eval"]["loss"], rel=1e-5)
    assert "<|im_" not in capsys.readouterr().out

    assert main("export", export[2:]) == 0
    assert json.loads((tmp_path / "chat-model/export.json").read_text())["verified"]
    modelfile = (tmp_path / "chat-model/Modelfile").read_text()
    assert f"```\n{modelfile}```" in PAGE
