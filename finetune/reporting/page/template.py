"""Pages from templates: every text is escaped, style and script are inside, nothing is asked of the network."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from markupsafe import Markup

FOLDER = Path(__file__).parent


def render(
    template: str,
    context: dict[str, Any],
    styles: tuple[str, ...] = (),
    scripts: tuple[str, ...] = (),
    folder: Path = FOLDER,
) -> bytes:
    """The page as UTF-8. page.css and page.js are always in it, `styles` and `scripts` after them.

    Args:
        folder: where the template, its styles and its scripts are; it may build on the templates of this folder.
    """
    style = Markup(
        "\n".join([_text(FOLDER / "page.css"), *(_text(folder / name) for name in styles)])
    )
    script = Markup(
        "\n".join([_text(FOLDER / "page.js"), *(_text(folder / name) for name in scripts)])
    )
    return (
        _environment(folder)
        .get_template(template)
        .render(**context, style=style, script=script)
        .encode("utf-8")
    )


@lru_cache
def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8")


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
    environment.filters["data"] = _script_data
    return environment


def _script_data(value: Any) -> Markup:
    """JSON for a script element, where `</script>` in a name would end it and entities are not decoded."""
    text = json.dumps(value, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
