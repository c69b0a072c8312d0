"""`launch/generate.py`: run an export, or any GPT-J checkpoint, on prompts.

Language models continue prompts (with `chat=true` inside the template they were trained with),
classification exports label them, question answering exports find the answer in a context. Prompts
come from the argument, a file or standard input. Batches are left-padded and give the same text as
prompts one by one. A single prompt streams to the terminal.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from finetune.cli.schemas import GenerateConfig
from finetune.compose import Composed
from finetune.data.encode_classify import labelled_texts
from finetune.data.encode_instruct import refuse_marks
from finetune.data.fields import full_text
from finetune.data.instruct_rows import question
from finetune.data.qa_rows import Question, questions, without_answers
from finetune.data.sources import MISSING, get_field, read
from finetune.data.utf8 import invalid_utf8, lines
from finetune.errors import EXIT_DONE, UserError
from finetune.files import refuse_pointer
from finetune.inference.answer import answer_questions, classify_text
from finetune.inference.sample import Sampling, Streamer, finished_text
from finetune.inference.speaker import Speaker, load_speaker
from finetune.tasks.reward import RewardTask

Row = dict[str, Any]
TABLES = (".json", ".ndjson", ".csv", ".tsv", ".parquet")
"""Files of rows with named fields; of any other each line is a prompt."""


@dataclass
class Asked:
    """One row of the prompts."""

    where: str
    """Its place, for errors."""
    record: dict[str, Any]
    """Its fields; of a prompt without fields, `prompt` alone."""


def run(composed: Composed) -> int:
    """Answer every prompt."""
    cfg: GenerateConfig = composed.config
    check_settings(cfg)
    asked = list(read_prompts(cfg))
    assert cfg.export_dir
    speaker = load_speaker(
        cfg.export_dir,
        cfg.dtype,
        cfg.engine,
        cfg.base,
        lambda unloaded, head: check_tokens(unloaded, head, asked, cfg),
    )
    check_rows(cfg, speaker, asked)

    # A single prompt streams to the terminal.
    alone = len(asked) == 1 and not cfg.prompts and not cfg.out
    if alone and speaker.trained.head == "lm" and cfg.beams == 1:
        streamer = Streamer(speaker.tokenizer, stops(cfg), partial(print, end="", flush=True))
        speaker.continue_ids([_ids(asked[0], speaker, cfg)], _sampling(cfg), streamer)
        print(flush=True)
        return EXIT_DONE

    out = nullcontext(sys.stdout)
    if cfg.out:
        file = Path(cfg.out).expanduser()
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            out = file.open("w", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"cannot be written: {error.strerror}", cfg.out, "Check out=FILE."
            ) from None
    as_json = partial(json.dumps, ensure_ascii=False)
    with out as target:
        for index, answer in enumerate(answers(cfg, speaker, asked)):
            if cfg.out:
                line = as_json(answer)
            elif cfg.prompts:
                line = as_json({"index": index, **answer})
            elif "text" in answer:
                line = answer["text"]
            else:  # the words that were typed are not repeated
                line = as_json({k: v for k, v in answer.items() if k not in ("prompt", "question")})
            print(line, file=target, flush=True)
    return EXIT_DONE


def check_settings(cfg: GenerateConfig) -> None:
    """Raise UserError for settings that are wrong whatever the model and the prompts are."""
    if not cfg.export_dir:
        raise UserError(
            "no model is given", "model", "Pass model=RUN_DIR/export, or model=asset:gptj_tiny."
        )
    if cfg.max_new_tokens < 1:
        raise UserError(
            f"max_new_tokens = {cfg.max_new_tokens} must be at least 1",
            remedy="Try max_new_tokens=100.",
        )
    if not 0 <= cfg.temperature < math.inf or not 0 < cfg.top_p <= 1 or cfg.top_k < 0:
        raise UserError(
            "temperature and top_k must be at least 0 and top_p in (0, 1]",
            remedy="Try temperature=0.9 top_p=0.95.",
        )
    if cfg.batch < 1 or cfg.beams < 1:
        raise UserError("batch and beams must be at least 1", remedy="Try batch=8 beams=1.")
    if cfg.engine == "compiled" and cfg.beams > 1:
        raise UserError("engine=compiled has no beam search", "engine", "Leave engine out.")
    if (cfg.question is None) != (cfg.context is None):
        raise UserError(
            "question and context go together", remedy="Pass question='...' context='...'."
        )
    for stop in stops(cfg):
        if escape := re.search(r"\\[nt]", stop):
            print(
                f"note: stop = {stop} holds a backslash and the letter {escape[0][1]}, as typed; a "
                "newline is written "
                """stop='["\\n"]'""",
                file=sys.stderr,
            )


def read_prompts(cfg: GenerateConfig) -> Iterator[Asked]:
    """Read prompts from `prompt=`, `question=` and `context=`, the file `prompts=`, or stdin.

    Raises:
        UserError: there is no prompt, or a row cannot be read.
    """
    if cfg.prompt is not None:
        yield Asked("prompt", {"prompt": cfg.prompt})
        return
    if cfg.question is not None:
        yield Asked("question", {"question": cfg.question, "context": cfg.context})
        return
    if cfg.prompts is None:
        text = sys.stdin.read().rstrip("\n")
        if not text:
            raise UserError(
                "there is no prompt",
                "prompt",
                "Pass prompt='...' or prompts=FILE, or pipe text in.",
            )
        yield Asked("standard input", {"prompt": text})
        return

    file = Path(cfg.prompts).expanduser()
    if not file.is_file():
        raise UserError("there is no such file", cfg.prompts, "Check prompts=FILE.")
    if any(ending in file.name for ending in TABLES):
        for row in read(str(file), "train"):
            if isinstance(row, UserError):
                raise row
            yield Asked(*row)
        return
    refuse_pointer(file)
    prompts = [line for line in lines(file) if line.data.strip()]
    if not prompts:
        raise UserError("the file holds no prompt", str(file), "Write a prompt on each line.")
    for line in prompts:
        where = f"{file}:{line.number}"
        try:
            yield Asked(where, {"prompt": line.data.decode("utf-8").rstrip("\r")})
        except UnicodeDecodeError as error:
            raise invalid_utf8(file, where, error) from None


def check_tokens(speaker: Speaker, head: str, asked: list[Asked], cfg: GenerateConfig) -> None:
    """Check that the model has an embedding row for every token; `speaker` need not be loaded.

    Raises:
        UserError: names the first row with a token that it does not have.
    """
    if speaker.limit is None:
        return
    for row in asked:
        if head == "lm":
            try:
                _ids(row, speaker, cfg)
            except UserError as error:
                raise UserError(error.problem, row.where, error.remedy) from None
            continue
        texts = (
            _texts(row, speaker)
            if head == "classify"
            else [text for item in _questions(row) for text in (item.question, item.context)]
        )
        for text in texts:
            speaker.limit.check(
                speaker.tokenizer(text, add_special_tokens=False)["input_ids"], row.where
            )


def check_rows(cfg: GenerateConfig, speaker: Speaker, asked: list[Asked]) -> None:
    """Check that every row has the fields that this head needs, and fits.

    Raises:
        UserError: names the first row that does not.
    """
    head = speaker.trained.head
    if cfg.chat and not speaker.chats:
        raise UserError(
            "this export was not trained on instructions: it has no template",
            "chat",
            "Leave chat out.",
        )
    windows = speaker.task.encoder() if head == "qa" else None
    for row in asked:
        if head == "classify":
            _texts(row, speaker)
        elif windows is not None:
            _questions(row)
            fault = windows.encode([(row.where, without_answers(row.record))])[0]
            if isinstance(fault, UserError):
                raise UserError(fault.problem, fault.where, "Shorten the question.")
        else:
            room = speaker.positions - len(_ids(row, speaker, cfg))
            if room < cfg.max_new_tokens:
                raise UserError(
                    f"the prompt leaves room for {max(0, room)} of max_new_tokens = "
                    f"{cfg.max_new_tokens} (the model has {speaker.positions} positions)",
                    row.where,
                    "Shorten it, or lower max_new_tokens.",
                )


def _texts(row: Asked, speaker: Speaker) -> list[str]:
    """Return the text, or the two texts, to classify, from the fields used in training.

    A single text may also be the row's `prompt` if the row has no such field. For a reward model
    these are the prompts and answers of the row's conversation, in turn.

    Raises:
        UserError: a text is absent, blank, or not a string.
    """
    cfg = speaker.task.cfg
    if isinstance(speaker.task, RewardTask):
        return speaker.task.pieces(row.record, row.where)
    if (
        not cfg.text_pair_field
        and get_field(row.record, cfg.text_field) is MISSING
        and "prompt" in row.record
    ):
        return [full_text(row.record["prompt"], "the prompt", row.where)]
    try:
        return labelled_texts(row.record, cfg, row.where)
    except UserError as error:
        fields = (
            f"fields '{cfg.text_field}' and '{cfg.text_pair_field}'"
            if cfg.text_pair_field
            else f"field '{cfg.text_field}'"
        )
        raise UserError(
            error.problem,
            error.where,
            f"The model was trained on the {fields}: give it a file of rows with text "
            "there, prompts=FILE.jsonl.",
        ) from None


def _questions(row: Asked) -> list[Question]:
    """Return the row's questions, in either layout of training data, with or without answers.

    Raises:
        UserError: question or context is absent, blank, or not a string.
    """
    asked: list[Question] = []
    for item in questions(without_answers(row.record), row.where):
        if isinstance(item, UserError):
            raise UserError(
                f"this export answers questions: {item.problem}",
                item.where,
                "Pass question='...' context='...', or rows with these fields, prompts=FILE.jsonl.",
            )
        asked.append(item)
    return asked


def _ids(row: Asked, speaker: Speaker, cfg: GenerateConfig) -> list[int]:
    """Return the ids of the row's prompt, in the export's template if that was asked for.

    Raises:
        UserError: the row has neither a text nor a conversation.
    """
    prompt = _prompt(row, speaker)
    return speaker.ids(prompt, cfg.chat or isinstance(prompt, list))


def _prompt(row: Asked, speaker: Speaker) -> Any:
    """Return the text or the conversation of a row, as rows were read in training.

    Raises:
        UserError: the row has neither.
    """
    where = row.where
    if speaker.chats:
        try:
            prompt = question(row.record, where, speaker.task.cfg)
            conversation = prompt if isinstance(prompt, list) else []
            refuse_marks(conversation, speaker.task.template, where)
        except UserError as error:
            field = speaker.task.cfg.prompt_field
            raise UserError(
                error.problem,
                where,
                f'Write rows as in training, without the answer: {{"{field}": "..."}} or '
                '{"messages": [{"role": "user", "content": "..."}]}',
            ) from None
        return prompt
    if "messages" in row.record:
        raise UserError(
            "this export was not trained on conversations: it has no template",
            where,
            'Write {"prompt": "..."} instead of messages.',
        )
    for name in ("prompt", getattr(speaker.task.cfg, "text_field", "text"), "text"):
        if isinstance(get_field(row.record, name), str):
            return get_field(row.record, name)
    raise UserError(
        "the row has no text field 'prompt'", where, 'Write {"prompt": "..."} on each line.'
    )


def _sampling(cfg: GenerateConfig) -> Sampling:
    return Sampling(
        cfg.max_new_tokens, cfg.temperature, cfg.top_p, cfg.top_k, cfg.beams, stops(cfg), cfg.seed
    )


def stops(cfg: GenerateConfig) -> list[str]:
    """Return the texts that end a continuation, without empty ones, which would end it at once."""
    return [stop for stop in cfg.stop or [] if stop]


def answers(cfg: GenerateConfig, speaker: Speaker, asked: list[Asked]) -> Iterator[Row]:
    """Yield one answer for each prompt, text or question, with the words that it answers."""
    head, module, device = speaker.trained.head, speaker.trained.module, speaker.device
    if head == "classify":
        for row in asked:
            texts = _texts(row, speaker)
            yield {"prompt": texts[0], **classify_text(module, speaker.task, texts, device)}
    elif head == "qa":
        items = [(row, item) for row in asked for item in _questions(row)]
        spans = answer_questions(module, speaker.task, [item for _, item in items], device)
        for (row, item), span in zip(items, spans, strict=True):
            name = {"id": item.id} if "id" in row.record or "paragraphs" in row.record else {}
            yield {**name, "question": item.question, **span}
    else:
        for start in range(0, len(asked), cfg.batch):
            rows = asked[start : start + cfg.batch]
            prompts = [_ids(row, speaker, cfg) for row in rows]
            for row, ids in zip(rows, speaker.continue_ids(prompts, _sampling(cfg)), strict=True):
                text = finished_text(speaker.tokenizer, ids, stops(cfg))
                yield {"prompt": _prompt(row, speaker), "text": text}
