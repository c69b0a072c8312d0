"""The words of a command line: settings as people type them, as Hydra must read them, and as commands to paste.

    prompt=3.10                typed     -> `hydra_words` -> prompt='3.10'        read by Hydra as the text 3.10
    run, "runs/lr=1 (a, b)"    a value   -> `setting`     -> run='runs/lr=1 (a, b)'
    several such words         a command -> `command`     -> quoted for the shell too

Hydra's grammar takes 3.10 for a number, null for nothing and a comma for a sweep. Settings that the schema types as text
are therefore read here, character by character, and handed to Hydra in quotes:

    Text, list[Text]   somebody's words: nothing in them has a meaning, neither quotes nor null nor ${...}
    str, list[str]     names and paths: quotes around the whole value fall away, null unsets an Optional one, and
                       ${key} or ${oc.env:NAME} is replaced as everywhere in Hydra

Everything else (numbers, choices of groups, Any) stays Hydra's. Composes nothing; no torch.
"""

from __future__ import annotations

import glob
import json
import os
import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from finetune.assets_path import resolve
from finetune.errors import UserError
from finetune.plain import Literals, read_yaml
from finetune.programs import SCHEMAS, all_keys, field_classes

TEXT_TYPE = re.compile(r"(Optional\[)?(list\[)?(str|Text)\]*")
SETTING = re.compile(r"(\+{0,2})([A-Za-z_][\w.]*)=(.*)", re.DOTALL)
"""`key=value`, with Hydra's + for keys that are to be added; not `~key`, `group@package=` and flags."""
PLAIN_VALUE = re.compile(r"[A-Za-z0-9_/.:@%+-]+")
"""Values that neither Hydra nor a shell reads as anything else."""
HYDRA_ESCAPE = re.compile(r"\\([\\()\[\]{}:=, \t])")
QUOTED = re.compile(r"\s*(?:'((?:\\.|[^'\\])*)'|\"((?:\\.|[^\"\\])*)\")\s*(?=,|\Z)", re.DOTALL)
"""A quoted item of a list, up to the comma behind it."""
REFERENCE = re.compile(r"\$\{([\w.]+)(:|\})")
HEADS = {"GPTJForSequenceClassification": "classify", "GPTJForQuestionAnswering": "qa"}
ADAPTER_HEADS = {"CAUSAL_LM": "lm", "SEQ_CLS": "classify", "QUESTION_ANS": "qa", None: "lm"}
SAVED_HEADS = {"score": "classify", "qa_outputs": "qa"}


@dataclass(frozen=True)
class Reading:
    """How the text of one setting is read."""

    prose: bool
    """Typed as Text: nothing in it has a meaning."""
    many: bool
    """A list of texts."""
    optional: bool
    """null unsets it."""


@cache
def text_settings(program: str) -> dict[str, Reading]:
    """Dotted key -> reading, of every setting of a program that the schema types as text."""
    return dict(_readings(SCHEMAS[program], ""))


def _readings(node: type, prefix: str) -> Iterator[tuple[str, Reading]]:
    for field in fields(node):
        for kind in field_classes(field.name, field.type):
            yield from _readings(kind, f"{prefix}{field.name}.")
        if found := TEXT_TYPE.fullmatch(str(field.type)):
            yield prefix + field.name, Reading(found[3] == "Text", bool(found[2]), bool(found[1]))


def hydra_words(words: list[str], program: str, literals: Literals) -> list[str]:
    """Words that Hydra reads as exactly the texts that were typed; words of other settings unchanged.

    Args:
        literals: keeps the texts that OmegaConf would change; give it what was composed, to put them back.

    Raises:
        UserError: a list of texts without brackets, or one that cannot be read.
    """
    readings, keys, read = text_settings(program), set(all_keys(SCHEMAS[program])), []
    for word in words:
        setting_ = SETTING.fullmatch(word)
        if setting_ is None or setting_[2] not in readings:
            read.append(word)
            continue
        sign, key, value = setting_.groups()
        text = read_text(key, value, readings[key])
        if text is None:
            shown = "null"
        elif isinstance(text, list):
            shown = f"[{','.join(_for_hydra(item, readings[key], keys, literals) for item in text)}]"
        else:
            shown = _for_hydra(text, readings[key], keys, literals)
        read.append(f"{sign}{key}={shown}")
    return read


def _for_hydra(text: str, reading: Reading, keys: set[str], literals: Literals) -> str:
    """One text in quotes; its `${...}` stays alive where it is a name's or path's and refers to something."""
    refers = not reading.prose and ("\\${" in text or any(
        key in keys if end == "}" else key == "now" or OmegaConf.has_resolver(key) for key, end in REFERENCE.findall(text)))
    return hydra_quoted(text if refers else literals.aside(text))


def typed_text(words: Iterable[str], key: str, program: str) -> str | None:
    """The text that the last word about `key` gives it; None where there is none."""
    values = [found[3] for word in words if (found := SETTING.fullmatch(word)) and found[2] == key]
    text = read_text(key, values[-1], text_settings(program)[key]) if values else None
    return text if isinstance(text, str) else None


def read_text(key: str, value: str, reading: Reading) -> str | list[str] | None:
    """The text, or the list of texts, that is meant by what stands behind `key=`.

    Raises:
        UserError: several texts without brackets, or an item of a list is empty.
    """
    if reading.optional and value.lower() == "null" and (reading.many or not reading.prose):
        return None
    if reading.many:
        return _read_list(key, value, reading)
    if reading.prose:
        return value
    return _unquoted(value)


def _read_list(key: str, value: str, reading: Reading) -> list[str]:
    inner = value.strip()
    if inner.startswith("[") and inner.endswith("]"):
        return list(_items(key, inner[1:-1]))
    if reading.prose:
        return [value] if value else []
    parts = split_values(value)
    if len(parts) > 1:
        both = command([f"{key}=[{value}]"]), command([f"{key}=[{_json_quoted(value)}]"])
        raise UserError("several texts are a list, which is written in brackets", key,
                        f"Write {both[0]}; for one text with a comma in it {both[1]}")
    return [_unquoted(value)] if value else []


def _items(key: str, inner: str) -> Iterator[str]:
    """The items between the brackets of a list. In double quotes they are read as JSON, so that "\\n" is a newline."""
    start = 0
    while inner[start:].strip():
        quoted = QUOTED.match(inner, start)
        if quoted:
            yield _unescaped(quoted[1], "'") if quoted[1] is not None else _json_text(quoted[2])
            end = quoted.end()
        else:
            end = inner.find(",", start) if "," in inner[start:] else len(inner)
            item = inner[start:end].strip()
            if not item:
                raise UserError("an item of the list is empty", key, "Leave it out, or write \"\" for an empty text.")
            yield item
        start = end + 1


def split_values(value: str) -> list[str]:
    """The values of a sweep: what stands between commas that are in neither quotes nor brackets."""
    parts, depth, start, at = list[str](), 0, 0, 0
    while at < len(value):
        quoted = QUOTED.match(value, at) if at == start else None
        if quoted:
            at = quoted.end()
            continue
        if value[at] == "," and depth <= 0:
            parts.append(value[start:at].strip())
            start = at + 1
        depth += (value[at] in "([{") - (value[at] in ")]}")
        at += 1
    return [*parts, value[start:].strip()] if parts else [value]


def refuse_file_list(key: str, value: Any) -> None:
    """Tell how several files are given to a setting that takes one path, pattern or folder.

    Raises:
        UserError: the text is a list of files; no file has that name.
    """
    if not isinstance(value, str) or "," not in value or os.path.exists(os.path.expanduser(value)):
        return
    bare = value.strip()
    files = [_unquoted(part) for part in split_values(bare[1:-1] if bare[:1] + bare[-1:] == "[]" else bare) if part]
    missing = [file for file in files if not os.path.exists(os.path.expanduser(file))]
    if len(missing) == len(files):
        return
    if missing:
        raise UserError(f"these are {len(files)} files, of which {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} "
                        "not there; the setting takes one file, pattern or folder", key, "Check the paths.")
    end = _shared_start([file[::-1] for file in files])[::-1]
    pattern = f"{glob.escape(_shared_start(files))}*{glob.escape(end)}"
    if sorted(glob.glob(pattern)) == sorted(files):
        remedy = f"This pattern matches exactly these files: {command([setting(key, pattern)])}"
    else:
        links = command(["ln", "-s", *(os.path.abspath(os.path.expanduser(file)) for file in files), "together/"])
        remedy = f"Put them into one folder: mkdir together && {links}\n  Then: {key}=together"
    raise UserError(f"these are {len(files)} files; the setting takes one file, pattern or folder", key, remedy)


def _shared_start(texts: list[str]) -> str:
    return "".join(letters[0] for letters in takewhile(lambda letters: len(set(letters)) == 1, zip(*texts, strict=False)))


def _unquoted(value: str) -> str:
    """A name or path without Hydra's quotes around the whole of it, or without its escapes."""
    quoted = QUOTED.fullmatch(value)
    if quoted and value == value.strip():
        return _unescaped(quoted[1], "'") if quoted[1] is not None else _unescaped(quoted[2], '"')
    return HYDRA_ESCAPE.sub(r"\1", value)


def _unescaped(text: str, quote: str) -> str:
    """What Hydra reads between quotes: a backslash escapes the quote, and a backslash in front of one."""
    return re.sub(rf"(\\+)({quote}|\Z)", lambda found: "\\" * (len(found[1]) // 2) + found[2], text)


def _json_text(text: str) -> str:
    try:
        return json.loads(f'"{text}"', strict=False)
    except ValueError:
        return _unescaped(text, '"')


def _json_quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


# ------------------------------------------------------------------ to paste


def hydra_quoted(text: str) -> str:
    """A text in the quotes that Hydra takes away again."""
    return "'" + re.sub(r"(\\*)('|\Z)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), text) + "'"


def setting(key: str, value: Any) -> str:
    """The word that gives a name or path to `key`, whatever characters it holds: `run='runs/a, b'`."""
    text = re.sub(r"(\\*)\$\{", lambda found: 2 * found[1] + "\\${", str(value))
    plain = PLAIN_VALUE.fullmatch(text) and text.lower() != "null"
    return f"{key}={text if plain else hydra_quoted(text)}"


def command(words: Iterable[Any]) -> str:
    """Words in one line that a shell reads as they are."""
    return " ".join(_shell_quoted(str(word)) for word in words)


def _shell_quoted(word: str) -> str:
    if "'" in word and not re.search(r'["$`\\!]', word):
        return f'"{word}"'
    return shlex.quote(word)


# ------------------------------------------------------------------ what words of some programs mean


def report_words(words: list[str]) -> list[str]:
    """`run=A run=B` and `runs=A*` -> `runs=['A','B']`: Hydra knows each key once, and lists in brackets."""
    single = [_unquoted(word[4:]) for word in words if word.startswith("run=")]
    several = [_unquoted(word[5:]) for word in words if word.startswith("runs=") and not word.startswith("runs=[")]
    if len(single) < 2 and not several:
        return words
    rest = [word for word in words if word.split("=")[0] not in ("run", "runs") or word.startswith("runs=[")]
    return [*rest, f"runs=[{','.join(hydra_quoted(path) for path in [*single, *several])}]"]


def adapter_head(values: dict[str, Any], where: str) -> str:
    """lm, classify or qa: which head of GPT-J an adapter of plain peft was trained with.

    Args:
        values: of its adapter_config.json.

    Raises:
        UserError: a task that GPT-J has no head for.
    """
    for module, head in SAVED_HEADS.items():
        if module in (values.get("modules_to_save") or ()):
            return head
    task = values.get("task_type")
    if task not in ADAPTER_HEADS:
        raise UserError(f"the adapter's task_type is {task}", where,
                        "Adapters of language models (CAUSAL_LM), classifiers (SEQ_CLS) and question answerers "
                        "(QUESTION_ANS) can be used here.")
    return ADAPTER_HEADS[task]


def trained_task(words: list[str]) -> list[str]:
    """`["task=qa"]` for words of evaluate that name a run or an export with that task, and no task; [] otherwise."""
    run, export = (typed_text(words, key, "evaluate") for key in ("run", "export_dir"))
    if any(word.startswith("task=") for word in words):
        return []
    try:
        kind = _task_of_run(Path(resolve(run or "")).expanduser()) if run else _task_of_export(
            Path(resolve(export or "")).expanduser())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration, UserError):
        return []  # nothing there, or not ours: said elsewhere
    return [f"task={kind}"]


def _task_of_run(folder: Path) -> str:
    """Of a run directory, or of one of its checkpoints/step-N."""
    place = next(place for place in (folder, *folder.parents[:2]) if (place / "config.yaml").is_file())
    return str(read_yaml(place / "config.yaml")["task"]["kind"])


def _task_of_export(folder: Path) -> str:
    if (folder / "finetune.json").is_file():
        return json.loads((folder / "finetune.json").read_text(encoding="utf-8"))["settings"]["kind"]
    if (folder / "adapter_config.json").is_file():
        head = adapter_head(json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")), str(folder))
        return "clm" if head == "lm" else head
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return HEADS.get((values.get("architectures") or [""])[0], "clm")
