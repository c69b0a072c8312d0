"""Prompt templates, which split a conversation into prompts and the completions to learn.

Flow: name or file -> Template -> pieces(messages): prompt, completion, prompt, completion, ... A
template is a Jinja chat template as in Hugging Face's tokenizers, and runs in a sandbox, because
files may come from anywhere. The assistant's texts are found by rendering the conversation up to
each turn, so that a template needs no marks:

    messages   user "2+2?"            assistant "4"    user "3+3?"         assistant "6"
    rendered   User: 2+2?..Assistant: | 4 |            ..User: 3+3?..Assistant: | 6 |
    pieces     [prompt                , completion     , prompt                 , completion]

Training appends eos to every completion. A template that does not write eos itself is exported
inside another one that does (`Template.chat_template`). Of the tokenizer only the eos is used here;
data formats are handled elsewhere.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from finetune.config import TEMPLATE_TOKENS
from finetune.data.fields import shown
from finetune.data.utf8 import FIX
from finetune.errors import UserError

FOLDER = Path(__file__).parent / "templates"
Message = dict[str, Any]
"""role (system, user or assistant) and content; of Alpaca rows also instruction and input, which content joins."""
_TURNS: list[Message] = [
    {"role": "system", "content": "A system message."},
    {"role": "user", "content": "A question."},
    {"role": "assistant", "content": "An answer."},
    {"role": "user", "content": "Both\n\nof them", "instruction": "Both", "input": "of them"},
    {"role": "assistant", "content": "Another one."},
]
TRIALS = [_TURNS[a:b] for a in (1, 0) for b in (5, 4, 3, 2)]
"""Conversations on which a template is tried out, with and without a system message, ending with either side."""
WITH_EOS = """{%- macro conversation(messages, add_generation_prompt) +%}TEMPLATE{%+ endmacro -%}
{%- set text = namespace(done=0) -%}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{%- set asked = conversation(messages[:loop.index0], true) -%}
{%- set through = conversation(messages[:loop.index], false) -%}
{%- set parts = through[asked|length:].split(eos_token, 1) -%}
{{- asked[text.done:] + parts[0] + eos_token -}}
{%- set text.done = through|length - (parts[1]|length if parts|length > 1 else 0) -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt or messages[-1]['role'] != 'assistant' -%}
{{- conversation(messages, add_generation_prompt)[text.done:] -}}
{%- endif -%}
"""
"""`Template.pieces` as a chat template, for templates that leave eos to the encoder or write more behind the last one."""
RENDER_FAULTS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
)


class Template:
    """A compiled template; it may write eos after the assistant's text or leave it to the encoder.

    Args:
        name: its name in errors and exports.
        eos: text of the token that ends a completion; `pieces` leaves it out.
    """

    def __init__(self, name: str, text: str, eos: str, bos: str = ""):
        self.name, self.text, self.eos, self._bos = name, text, eos, bos
        self.marks = [mark for mark in dict.fromkeys((eos, *TEMPLATE_TOKENS.get(name, ()))) if mark]
        """Tokens that structure conversations, and that no text of theirs may hold."""
        try:
            self._template = _environment().from_string(text)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"template '{name}' is no valid Jinja: {error.message}",
                f"line {error.lineno}",
                "Fix it, or try task.template=alpaca.",
            ) from None
        self.pieces(TRIALS[2], "task.template")
        self.chat_template = self._chat_template()
        """The template of an export: rendered whole, it writes the pieces in turn, with eos behind every completion."""

    def pieces(self, messages: list[Message], where: str) -> list[str]:
        """Return prompt and completion in turn, ending with a prompt if the assistant is next.

        Completions come without eos, even if the template writes one.

        Raises:
            UserError: the template rejects these messages, or rewrites earlier turns when later
                ones follow.
        """
        pieces: list[str] = []
        done = carried = ""
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = self._render(messages[:i], True, where)
                through = self._render(messages[: i + 1], False, where)
                written = self._behind(prompt, through, where)
                completion, _, rest = written.partition(self.eos) if self.eos else (written, "", "")
                if message["content"].strip() not in completion:
                    raise self._fault(
                        f"leaves out the assistant's words {shown(message['content'])}", where
                    )
                pieces += [carried + self._behind(done, prompt, where), completion]
                done, carried = through, rest
        if messages[-1]["role"] != "assistant":
            pieces.append(carried + self._behind(done, self._render(messages, True, where), where))
        return pieces

    def _chat_template(self) -> str:
        """Return the template if it renders what training reads, else the template in `WITH_EOS`.

        Raises:
            UserError: neither of the two does.
        """
        wanted: list[tuple[list[Message], str]] = []
        for messages in TRIALS:
            try:
                pieces = self.pieces(messages, "task.template")
            except UserError:  # no system messages, or one turn only
                continue
            whole = "".join(p + self.eos if n % 2 else p for n, p in enumerate(pieces))
            wanted.append((messages, whole))
        # Jinja drops one newline at the end of a template, but not of a macro.
        for text in (self.text, WITH_EOS.replace("TEMPLATE", self.text.removesuffix("\n"), 1)):
            try:
                template = _environment().from_string(text)
                if all(
                    self._render(
                        messages, messages[-1]["role"] != "assistant", "task.template", template
                    )
                    == whole
                    for messages, whole in wanted
                ):
                    return text
            except (UserError, jinja2.TemplateError):
                continue
        raise self._fault(
            "cannot be exported: nothing that transformers renders from it is what training would "
            "read",
            "task.template",
        )

    def _render(
        self,
        messages: list[Message],
        add_generation_prompt: bool,
        where: str,
        template: jinja2.Template | None = None,
    ) -> str:
        try:
            return (template or self._template).render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                eos_token=self.eos,
                bos_token=self._bos,
                tools=None,
                documents=None,
            )
        except RENDER_FAULTS as error:
            raise self._fault(f"fails: {str(error) or type(error).__name__}", where) from None

    def _behind(self, beginning: str, text: str, where: str) -> str:
        if not text.startswith(beginning):
            raise self._fault("writes earlier turns differently when later ones follow", where)
        return text[len(beginning) :]

    def _fault(self, problem: str, where: str) -> UserError:
        return UserError(
            f"template '{self.name}' {problem}",
            where,
            f"Fix the template, or try task.template=alpaca. {FIX}",
        )


def closed(pieces: list[list[int]], eos: int) -> list[list[int]]:
    """Return the ids of `Template.pieces` with the eos behind each completion, which is every second."""
    return [[*piece, eos] if n % 2 else piece for n, piece in enumerate(pieces)]


def load_template(spec: str, eos: str, bos: str = "") -> Template:
    """Load a shipped template by name, or any file with a Jinja chat template."""
    shipped, path = FOLDER / f"{spec}.jinja", Path(spec).expanduser()
    if spec.isidentifier() and shipped.is_file():
        return Template(spec, shipped.read_text(encoding="utf-8"), eos, bos)
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in FOLDER.glob("*.jinja")))
        raise UserError(
            f"there is no template '{spec}' and no such file",
            "task.template",
            f"Choose from {names}, or give a file with a Jinja chat template.",
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the template cannot be read ({error})", str(path)) from None
    return Template(str(path), text, eos, bos)


def _environment() -> ImmutableSandboxedEnvironment:
    """Create the Jinja environment that transformers uses, so that templates render the same."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )

    def raise_exception(message: str) -> Any:
        raise jinja2.TemplateError(message)

    def strftime_now(pattern: str) -> Any:
        raise jinja2.TemplateError(
            "strftime_now: a model that is trained on today's date learns it"
        )

    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    # Without the HTML escapes of Jinja's own filter.
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    return environment


class _Generation(jinja2.ext.Extension):
    """Extension that accepts and ignores transformers' `{% generation %}...{% endgeneration %}`.

    transformers marks the assistant's text with it.
    """

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)
