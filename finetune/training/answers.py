"""Metrics of generated answers: prompts of the evaluation data, answered greedily, against their reference answers.

examples (`LmTask.question`) -> prompts in batches -> `generate` -> texts -> `text_metrics`

An optional extra: pip install -e '.[eval]'.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune.data.columns import Store
from finetune.dist import World
from finetune.tasks.base import Task
from finetune.tasks.clm import LmTask

ROUGE = ("rouge1", "rouge2", "rougeL")


@dataclass
class Answers:
    """How evaluations generate answers (the section `eval`)."""

    generate: Callable[[list[list[int]]], list[list[int]]]
    """Prompts -> the ids that follow each."""
    count: int
    """Prompts of each evaluation set."""
    max_tokens: int
    """Longest answer."""
    together: bool
    """Every rank has to generate every answer, since the weights are sharded; otherwise each its share."""

    def evaluate(
        self,
        task: Task,
        store: Store,
        examples: np.ndarray,
        world: World,
        batch: int,
        after_batch: Callable[[], None] = lambda: None,
    ) -> tuple[dict[str, Any], list[dict[str, str]]]:
        """Return the metrics of the answers to some examples, and prompts, answers, references. Collective.

        Which prompts share a batch does not depend on the number of ranks, and so neither do answers.

        Args:
            batch: prompts of a rank that are answered at once.
            after_batch: called equally often by all ranks.
        """
        assert isinstance(task, LmTask)
        chosen = np.linspace(0, len(examples) - 1, min(self.count, len(examples))).astype(int)
        questions = [
            task.question(store, int(example), self.max_tokens) for example in examples[chosen]
        ]
        questions = [(prompt, reference) for prompt, reference in questions if prompt and reference]
        prompts = [prompt for prompt, _ in questions]
        batches = [prompts[i : i + batch] for i in range(0, len(prompts), batch)]
        ranks = 1 if self.together else world.size
        answers: list[list[int]] = []
        for start in range(0, len(batches), ranks):
            share = batches[start : start + ranks]
            if self.together:
                answers += self.generate(share[0])
            else:
                mine = share[world.rank : world.rank + 1]
                done = world.gather([answer for one in mine for answer in self.generate(one)])
                answers += [answer for rank in done for answer in rank]
            after_batch()

        def decoded(ids: list[int]) -> str:
            return task.tokenizer.decode(ids, skip_special_tokens=True)

        rows = [
            {"prompt": decoded(prompt), "text": decoded(answer), "reference": decoded(reference)}
            for (prompt, reference), answer in zip(questions, answers, strict=True)
        ]
        texts, references = ([row[key] for row in rows] for key in ("text", "reference"))
        return world.on_main(lambda: text_metrics(texts, references)), rows


def text_metrics(texts: list[str], references: list[str]) -> dict[str, float | None]:
    """Compare texts with one reference each; None where there are no texts.

    exact_match is a share of the texts, without blanks around them; ROUGE the mean F1 without
    stemming (rouge-score); bleu and chrf those of the whole corpus, 0 to 100 (sacrebleu).
    """
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import corpus_bleu, corpus_chrf

    if not texts:
        return dict.fromkeys(("exact_match", *ROUGE, "bleu", "chrf"))
    pairs = list(zip(texts, references, strict=True))
    scorer = RougeScorer(ROUGE)
    scores = [scorer.score(reference, text) for text, reference in pairs]
    return {
        "exact_match": float(np.mean([a.strip() == b.strip() for a, b in pairs])),
        **{name: float(np.mean([score[name].fmeasure for score in scores])) for name in ROUGE},
        "bleu": corpus_bleu(texts, [references]).score,
        "chrf": corpus_chrf(texts, [references]).score,
    }
