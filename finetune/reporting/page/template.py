"""Pages from templates: every text is escaped, style and script are inside, nothing is asked of the network."""

from __future__ import annotations

import json
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

from markupsafe import Markup

FOLDER = Path(__file__).parent


def render(template: Path, context: dict[str, Any]) -> bytes:
    """Return the page as UTF-8.

    page.css and page.js are always in it, then the template's own where they lie beside it under its
    name. The template may build on those of this folder.
    """
    parts = {}
    for suffix in (".css", ".js"):
        common, own = FOLDER / f"page{suffix}", template.with_suffix(suffix)
        files = [common, own] if own != common and own.exists() else [common]
        parts[suffix] = Markup("\n".join(file.read_text(encoding="utf-8") for file in files))
    page = _environment(template.parent).get_template(template.name)
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    return page.render(**context, updated=now, style=parts[".css"], script=parts[".js"]).encode()


@lru_cache
def _environment(folder: Path) -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader([folder, FOLDER]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data"] = script_data
    return environment


def script_data(value: Any) -> Markup:
    """Render JSON for a script element, where `</script>` would end it and entities are not decoded."""
    text = json.dumps(value, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
