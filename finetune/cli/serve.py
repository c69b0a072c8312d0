"""`launch/serve.py`: an export behind OpenAI's completions interface, on this machine or, with a token, for others."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from finetune.assets.paths import resolve
from finetune.cli.schemas import ServeConfig
from finetune.compose import Composed
from finetune.errors import EXIT_DONE, UserError
from finetune.inference.serve_api import Limits
from finetune.inference.serve_http import LOOPBACK, Service, build_server
from finetune.inference.speaker import load_speaker

TOKEN_VARIABLE = "SERVE_TOKEN"


def run(composed: Composed) -> int:
    """Serve until interrupted."""
    cfg: ServeConfig = composed.config
    token = os.environ.get(TOKEN_VARIABLE) or None
    check_settings(cfg, token)
    assert cfg.export_dir
    speaker = load_speaker(cfg.export_dir, cfg.dtype, cfg.engine, cfg.base)
    if speaker.trained.head != "lm":
        raise UserError(
            f"this export has the head '{speaker.trained.head}': it writes no text",
            "model",
            "Use launch/generate.py: it answers with labels and spans.",
        )
    folder = Path(resolve(cfg.export_dir)).expanduser().absolute()
    name = cfg.name or (folder.parent.name if folder.name.startswith("export") else folder.name)
    limits = Limits(cfg.max_tokens, cfg.max_texts)
    local = cfg.host in LOOPBACK
    service = Service(speaker, name, token, limits, cfg.max_body_bytes, cfg.concurrency, local)
    try:
        server = build_server(service, cfg.host, cfg.port)
    except OSError as error:
        raise UserError(
            f"cannot listen on {cfg.host} port {cfg.port}: {error.strerror}",
            "port",
            f"Try port={cfg.port + 1}.",
        ) from None
    host = f"[{cfg.host}]" if ":" in cfg.host else cfg.host
    print(
        f"serving {name} at http://{host}:{server.server_address[1]}/ (API under /v1); stop with "
        "Ctrl-C",
        flush=True,
    )
    with server, suppress(KeyboardInterrupt):
        server.serve_forever()
    return EXIT_DONE


def check_settings(cfg: ServeConfig, token: str | None) -> None:
    """Raise UserError for settings that are wrong whatever the model is."""
    if not cfg.export_dir:
        raise UserError(
            "no model is given", "model", "Pass model=RUN_DIR/export, or model=asset:gptj_tiny."
        )
    if cfg.host not in LOOPBACK and not token:
        raise UserError(
            f"host = {cfg.host} lets other machines in, and no token is set",
            "host",
            f"Set one: {TOKEN_VARIABLE}=... python launch/serve.py ..., or leave host out.",
        )
    if token and (len(token) < 16 or not token.isascii()):
        raise UserError(
            "the token is shorter than 16 characters or not ASCII",
            TOKEN_VARIABLE,
            "Make one: python -c 'import secrets; print(secrets.token_urlsafe(24))'",
        )
    for key in ("max_tokens", "max_texts", "max_body_bytes", "concurrency"):
        if getattr(cfg, key) < 1:
            raise UserError(f"{key} = {getattr(cfg, key)} must be at least 1", key)
    if not 0 <= cfg.port < 65536:
        raise UserError(f"port = {cfg.port} does not exist", "port", "Try port=8000.")
