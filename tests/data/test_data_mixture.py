"""Sources of a config, how often an epoch draws each of them, and which rows are held out."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest

from finetune.compose import compose_train
from finetune.config import DataConfig, WeightBy
from finetune.data.batches import Drawn, Order, permutation
from finetune.data.mixture import (
    DataSource,
    draws,
    eval_sources,
    held_out_amount,
    hold_out,
    source_problems,
    train_sources,
)
from finetune.errors import UserError


@pytest.mark.parametrize(
    ("word", "sources"),
    [
        (
            "data.train=[{path: a.jsonl, weight: 2}, {path: b.jsonl.zst, weight: 1}]",
            [
                DataSource("a.jsonl", "a.jsonl", weight=2),
                DataSource("b.jsonl.zst", "b.jsonl.zst", weight=1),
            ],
        ),
        (
            "data.train=[{path:a.jsonl,weight:.5},{path:'x, y/a.jsonl',split:all}]",
            [
                DataSource("a.jsonl", "a.jsonl", weight=0.5),
                DataSource("x, y/a.jsonl", "x, y/a.jsonl", split="all"),
            ],
        ),
        (
            "data.train=[~/a (1)=b.jsonl, /c/d.csv]",
            [DataSource("~/a (1)=b.jsonl", "a (1)=b.jsonl"), DataSource("/c/d.csv", "d.csv")],
        ),
        (
            "data.train={web: a.jsonl, law: {path: b/*.jsonl, epochs: 2, max_rows: 9}}",
            [
                DataSource("a.jsonl", "web"),
                DataSource("b/*.jsonl", "law", epochs=2, max_rows=9),
            ],
        ),
        (
            'data.train=[{"path":"a, b.jsonl","weight":3}]',
            [DataSource("a, b.jsonl", "a, b.jsonl", weight=3)],
        ),
        ("data.train=a.jsonl,b.jsonl", [DataSource("a.jsonl,b.jsonl", "a.jsonl,b.jsonl")]),
        ("data.train=[ab]*.jsonl", [DataSource("[ab]*.jsonl", "[ab]*.jsonl")]),
        (
            "data.train=[{path: a.txt}, {path: a.txt, split: b}]",
            [DataSource("a.txt", "a.txt (1)"), DataSource("a.txt", "a.txt (2)", split="b")],
        ),
    ],
)
def test_sources_are_read_as_they_are_typed(word, sources):
    cfg = compose_train(["recipe=clm_pile_lora", "debug=tiny", word])
    own = [source.__dict__ for source in train_sources(cfg.data)]
    assert own == [source.__dict__ for source in sources]


def test_evaluation_data_are_files_named_sets_or_a_share():
    def data(*words):
        return compose_train(["recipe=clm_pile_lora", "debug=tiny", "data.train=a", *words]).data

    assert held_out_amount(data("data.eval=0.02")) == 0.02
    assert held_out_amount(data("data.eval_rows=500")) == 500
    assert [s.path for s in eval_sources(data("data.eval=b.csv"))] == ["b.csv"]
    named = eval_sources(
        data("data.eval={web: b.csv, law: {path: c, split: s}}", "data.max_rows=7")
    )
    assert [(s.name, s.path, s.split, s.max_rows) for s in named] == [
        ("web", "b.csv", "validation", 7),
        ("law", "c", "s", 7),
    ]


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (dict(train=[{"path": "a", "wieght": 2}]), "a source has no key 'wieght'"),
        (dict(train=[{"weight": 2}]), "names no path"),
        (dict(train=[{"path": "a", "weight": 0}]), "weight = 0 of a is not a positive number"),
        (dict(train=[{"path": "a", "weight": "x"}]), "weight = x of a is not a positive number"),
        (dict(train=[]), "no source is named"),
        (dict(train="a", eval="1.5"), "data.eval = 1.5 is neither a share"),
        (dict(train="a", eval="b", eval_rows=3), "both name evaluation data"),
    ],
)
def test_what_is_no_source_is_told(data, problem):
    assert problem in "\n".join(p.render() for p in source_problems(DataConfig(**data)))


def test_weights_share_out_an_epoch_as_documented():
    def counts(by=WeightBy.rows, sizes=(10, 50), tokens=(100, 500), **second):
        sources = [DataSource("a", weight=2), DataSource("b", **({"weight": 1} | second))]
        return draws(sources, sizes, tokens, sizes, by)

    assert counts() == [40, 20]
    assert counts(by=WeightBy.tokens, tokens=(300, 500)) == [
        round(800 * 2 / 3 / 30),
        round(800 / 3 / 10),
    ]
    assert counts(epochs=1) == [100, 50]  # until b was read once
    assert draws(
        [DataSource("a"), DataSource("b", epochs=2.5)], [3, 4], [9, 9], [3, 4], WeightBy.rows
    ) == [3, 10]
    assert draws([DataSource("a")], [7], [1], [1], WeightBy.tokens) == [7]


def test_an_order_draws_every_sequence_of_a_source_equally_often():
    sizes, counts = [3, 7, 5], [7, 4, 5]
    order = Order(sizes, 11, shuffle=True, counts=counts)
    seen = Counter()
    ends = np.cumsum(sizes)
    for epoch in range(21):
        drawn = [order[epoch * 16 + i] for i in range(16)]
        assert np.bincount(np.searchsorted(ends, drawn, side="right")).tolist() == counts
        seen.update(drawn)
    assert [seen[i] for i in range(15)] == [49] * 3 + [12] * 7 + [21] * 5
    first = [order[i] for i in range(16)]
    assert first != [order[i] for i in range(16, 32)]
    assert first == [Order(sizes, 11, shuffle=True, counts=counts)[i] for i in range(16)]
    # Of two epochs, four and three of seven: no sequence twice before all were drawn once.
    part = [s for s in (order[i] for i in range(28)) if 3 <= s < 10]
    assert len(set(part[:4])) == 4
    # One source is what it was before there were several.
    assert [Order([9], 5, True)[i] for i in range(9)] == permutation(5, 0, 9).tolist()


def test_what_each_source_gave_is_counted_from_any_position():
    order, tokens = Order([3, 4], 2, True, counts=[5, 2]), np.arange(10, 17)
    drawn = Drawn(order, ["a", "b"], tokens)
    for end in (3, 20, 20, 9, 40):
        sequences = [order[i] for i in range(end)]
        assert drawn.until(end) == {
            name: {
                "sequences": sum(s in part for s in sequences),
                "tokens": sum(int(tokens[s]) for s in sequences if s in part),
            }
            for name, part in (("a", range(3)), ("b", range(3, 7)))
        }


def hashes(texts):
    values = [hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts]
    return np.array([int.from_bytes(value, "little") for value in values], np.uint64)


def test_the_rows_of_the_lowest_hashes_are_held_out_of_every_source():
    texts = [f"text {i}" for i in range(300)]
    rows = np.ones(300, bool)
    held = hold_out(hashes(texts), rows, [0, 100, 300], 0.1)
    lowest = [
        set(sorted(range(a, b), key=lambda i: hashes(texts)[i])[: (b - a) // 10])
        for a, b in ((0, 100), (100, 300))
    ]
    assert set(np.flatnonzero(held)) == lowest[0] | lowest[1]
    # The order of the rows and the other sources change nothing.
    again = hold_out(hashes(texts[:100][::-1]), rows[:100], [0, 100], 0.1)
    assert again[::-1].tolist() == held[:100].tolist()
    assert hold_out(hashes(texts), rows, [0, 100, 300], 30).tolist() == held.tolist()


def test_equal_texts_are_on_one_side_and_every_source_has_both():
    texts = hashes(["a", "b", "c", "a", "b", "c", "d", "d", "e", "e", "a"])
    held = hold_out(texts, np.ones(11, bool), [0, 6, 11], 0.01)
    assert not set(texts[held]) & set(texts[~held])
    assert held[:6].any() and not held[:6].all() and held[6:].any() and not held[6:].all()
    for few in (["a"], ["a", "a"]):
        with pytest.raises(UserError, match="leaves nothing to evaluate"):
            hold_out(hashes(few), np.ones(len(few), bool), [0, len(few)], 0.5)
