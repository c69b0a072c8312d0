"""What is uploaded, by a hub that only remembers."""

from __future__ import annotations

import json
from typing import ClassVar

import huggingface_hub
import pytest

from finetune.errors import RunFailed
from finetune.export.hub import push


class Hub:
    """Stands for HfApi: keeps what it is given."""

    made: ClassVar[dict[str, bool]] = {}
    files: ClassVar[dict[str, bytes]] = {}

    def create_repo(self, repo, private, exist_ok):
        Hub.made[repo] = private
        return f"https://hub/{repo}"

    def upload_folder(self, repo_id, folder_path, commit_message, ignore_patterns):
        from pathlib import Path

        Hub.files |= {
            p.name: p.read_bytes()
            for p in Path(folder_path).iterdir()
            if p.name not in ignore_patterns
        }

    def upload_file(self, repo_id, path_in_repo, path_or_fileobj):
        Hub.files[path_in_repo] = path_or_fileobj


@pytest.fixture
def hub(monkeypatch):
    Hub.made, Hub.files = {}, {}
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    return Hub


@pytest.fixture
def adapter(tmp_path):
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "/models/gpt-j-6b", "r": 8})
    )
    (tmp_path / "README.md").write_text("An adapter for `/models/gpt-j-6b`.")
    (tmp_path / "finetune.json").write_text(json.dumps({"head": "lm", "base": "/models/gpt-j-6b"}))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    return tmp_path


def test_an_adapter_goes_up_with_a_base_that_others_find(hub, adapter):
    assert push(
        adapter, "me/mine", True, "EleutherAI/gpt-j-6b"
    ) == "https://hub/me/mine" and hub.made == {"me/mine": True}
    assert json.loads(hub.files["adapter_config.json"]) == {
        "base_model_name_or_path": "EleutherAI/gpt-j-6b",
        "r": 8,
    }
    assert json.loads(hub.files["finetune.json"]) == {"head": "lm", "base": "EleutherAI/gpt-j-6b"}
    assert hub.files["README.md"] == b"An adapter for `EleutherAI/gpt-j-6b`."
    assert hub.files["adapter_model.safetensors"] == b"weights"
    assert "/models/gpt-j-6b" in (adapter / "adapter_config.json").read_text(), (
        "the folder here stays as it is"
    )


def test_an_adapter_of_a_local_folder_is_not_pushed_without_its_name(hub, adapter):
    with pytest.raises(RunFailed, match="hub_base="):
        push(adapter, "me/mine", True)
    assert hub.made == {} and hub.files == {}


def test_a_whole_model_needs_no_base(hub, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    push(tmp_path, "me/mine", False)
    assert hub.made == {"me/mine": False} and hub.files == {"model.safetensors": b"weights"}
