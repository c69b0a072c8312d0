"""Upload an export to the Hugging Face hub.

Tokens are left to the hub library: they are never read or stored here.
"""

from __future__ import annotations

from pathlib import Path

from finetune.errors import RunFailed, UserError, gib
from finetune.files import dumps, read_json, read_object

LOGIN = "Log in with 'hf auth login', or set HF_TOKEN to a token that may write."


def check_hub(repo: str) -> None:
    """Check the name of a hub repository.

    Raises:
        UserError: not a name like org/name.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
        if repo.count("/") != 1:
            raise HFValidationError("a name has the form ORG/NAME")
    except HFValidationError as error:
        raise UserError(
            f"'{repo}' is no repository name: {str(error).splitlines()[0]}",
            "push_to_hub",
            "Try push_to_hub=your-name/model-name.",
        ) from None


def push(folder: Path, repo: str, private: bool, base: str | None = None) -> str:
    """Upload every file of `folder`, creating the repository if needed, and return its address.

    Args:
        base: hub id under which others find the model that an adapter belongs to, if this machine
            has it in a folder; written into the uploaded files only.

    Raises:
        RunFailed: no token, no network, or refused. The message says what would have been uploaded;
            the export stays as it is.
    """
    from huggingface_hub import HfApi, get_token

    sizes = [file.stat().st_size for file in folder.iterdir() if file.is_file()]
    would = (
        f"It would create {repo} ({'private' if private else 'public'}) where it is missing and "
        f"upload {len(sizes)} files, {gib(sum(sizes))}, from {folder}"
    )
    later = f"Later: hf upload {repo} {folder}"
    if get_token() is None:
        raise RunFailed(f"there is no hub token. {would}", "push_to_hub", f"{LOGIN} {later}")
    changed = with_hub_base(folder, base)
    try:
        api = HfApi()
        url = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo,
            folder_path=str(folder),
            commit_message="Upload from finetune-gptj",
            ignore_patterns=list(changed),
        )
        for name, text in changed.items():
            api.upload_file(repo_id=repo, path_in_repo=name, path_or_fileobj=text.encode())
        return str(url)
    except Exception as error:  # errors of hub, HTTP library and network share no base
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RunFailed(
            f"the hub did not take it: {reason[:200]}. {would}", "push_to_hub", later
        ) from None


def with_hub_base(folder: Path, base: str | None) -> dict[str, str]:
    """Return an adapter's files that name its base by a local folder, name -> text with the hub id.

    Raises:
        RunFailed: there are such files, and `base` is None.
    """
    local = read_object(folder / "adapter_config.json").get("base_model_name_or_path")
    if not local or not Path(local).is_absolute():
        return {}
    if not base:
        raise RunFailed(
            f"the adapter's base is {local}, a folder that nobody else has",
            "push_to_hub",
            "Say what others know it as: hub_base=EleutherAI/gpt-j-6b; or push kind=merged.",
        )
    changed = {}
    for name, key in (
        ("adapter_config.json", "base_model_name_or_path"),
        ("finetune.json", "base"),
    ):
        if (folder / name).is_file():
            changed[name] = dumps(read_json(folder / name) | {key: base}, indent=2) + "\n"
    card = folder / "README.md"
    if card.is_file():
        changed[card.name] = card.read_text(encoding="utf-8").replace(local, base)
    return changed
