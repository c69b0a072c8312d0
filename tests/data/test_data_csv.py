"""Comma, semicolon and tab separated files as people have them: stray quotes, padded, unnamed, with Excel's first line."""

from __future__ import annotations

import csv
import io
import random

import pytest

from finetune.data.sources import read
from finetune.data.utf8 import FileOptions
from finetune.errors import UserError

LABELS = ["spam", "ham", "other"]


def rows_of(path, **options) -> tuple[list[list[str]], list[str]]:
    """Cells of the good rows, and the first lines of what is wrong with the bad ones."""
    found = list(read(str(path), "train", options=FileOptions(**options)))
    good = [list(row[1].values()) for row in found if not isinstance(row, UserError)]
    return good, [str(row).split("\n")[0] for row in found if isinstance(row, UserError)]


def table(path, header: list[str], rows: list[list[str]], separator: str, quoted: bool):
    """Write rows as csv's own writer does, or as a program that knows no quotes."""
    text = io.StringIO(newline="")
    if quoted:
        csv.writer(text, delimiter=separator).writerows([header, *rows])
    else:
        text.write("".join(separator.join(row) + "\n" for row in [header, *rows]))
    path.write_text(text.getvalue(), encoding="utf-8", newline="")
    return path


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("header", [["text", "label"], ["label", "text"], ["id", "text", "label"]])
@pytest.mark.parametrize("first", [1, 5, 30])
@pytest.mark.parametrize("rows_between", [0, 1, 6])
def test_stray_quotes_swallow_no_row(tmp_path, separator, header, first, rows_between):
    """Of two stray quotes the line of the first is bad; every other row has its own label."""
    rows = [
        [
            {"id": str(i), "text": f"text number {i}", "label": LABELS[i % 3]}[name]
            for name in header
        ]
        for i in range(40)
    ]
    at, last = header.index("text"), first + 1 + rows_between
    rows[first][at], rows[last][at] = '"' + rows[first][at], rows[last][at] + '"'
    path = table(tmp_path / "a.csv", header, rows, separator, quoted=False)
    good, bad = rows_of(path)
    if separator == "\t":  # tabs do not stand in text, so the quotes do
        assert (good, bad) == (rows, [])
    else:
        assert good == rows[:first] + rows[first + 1 :]
        (fault,) = bad
        assert fault.startswith(f"{path}:{first + 2}: a quote opens here and swallows")
    assert rows_of(path, quotes="text") == (rows, [])
    merged, _ = rows_of(path, quotes="enclose")
    assert len(merged) == 40 - rows_between - 1 and "\n" in merged[first][at]


def test_a_quote_that_is_never_closed_swallows_no_row(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(
        "text,label\n" + "fine,pos\nbad,neg\n" * 5 + '"open,pos\n' + "fine,pos\nbad,neg\n" * 5
    )
    good, bad = rows_of(path)
    assert (
        good == [["fine", "pos"], ["bad", "neg"]] * 10
        and len(bad) == 1
        and f"{path}:12: " in bad[0]
    )


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("header", [["text", "label"], ["label", "text"], ["prompt", "completion"]])
def test_cells_with_line_breaks_are_read_as_csv_writers_write_them(tmp_path, separator, header):
    """Any text of several lines with separators and quotes in it, against Python's own writer."""
    draw = random.Random(0)
    words = [
        "Dear friend,",
        "yes; no",
        "a,b",
        'say "x"',
        "fine",
        "tab\there",
        "end.",
        "1,000",
        "Hello",
    ]

    def cell(name: str) -> str:
        return (
            draw.choice(LABELS)
            if name == "label"
            else "\n".join(
                " ".join(draw.choices(words, k=draw.randint(1, 5)))
                for _ in range(draw.randint(1, 4))
            )
        )

    rows = [[cell(name) for name in header] for _ in range(300)]
    assert rows_of(table(tmp_path / "a.csv", header, rows, separator, quoted=True)) == (rows, [])


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        (
            "Excel's first line",
            'sep=;\r\ntext;label\r\n"a;b";x\r\n',
            [{"text": "a;b", "label": "x"}],
        ),
        (
            "Excel's first line, quoted",
            '"sep=|"\ntext|label\na,b|x\n',
            [{"text": "a,b", "label": "x"}],
        ),
        ("unnamed columns at the end", "v1,v2,,,\nham,hi,,,\n", [{"v1": "ham", "v2": "hi"}]),
        ("a comma more in every row", "text,label\na,x,\n", [{"text": "a", "label": "x"}]),
        ("an unnamed index", ",text\n0,a\n", [{"column1": "0", "text": "a"}]),
        ("blanks around all", "text , label\n a , x \n", [{"text": "a", "label": "x"}]),
        (
            "blanks around quotes",
            'text,label\n"a, b" , x\nc, "d, e"\n',
            [{"text": "a, b", "label": " x"}, {"text": "c", "label": "d, e"}],
        ),
        (
            "a blank that belongs to the text",
            "prompt,completion\nA, B\n",
            [{"prompt": "A", "completion": " B"}],
        ),
        ("blank lines first", "\n\ntext,label\na,x\n", [{"text": "a", "label": "x"}]),
        (
            "a comma in a name",
            "text;label, raw;n\na, b;x;1\nc;y;2\n",
            [
                {"text": "a, b", "label, raw": "x", "n": "1"},
                {"text": "c", "label, raw": "y", "n": "2"},
            ],
        ),
    ],
)
def test_layouts_that_programs_write(tmp_path, name, text, wanted):
    (tmp_path / "a.csv").write_text(text, newline="")
    assert [row[1] for row in read(str(tmp_path / "a.csv"), "train")] == wanted


def test_places_count_excels_first_line(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("sep=;\ntext;label\na;x\nb\n")
    (where, _), fault = read(str(path), "train")
    assert where == f"{path}:3" and fault.where == f"{path}:4"


def test_text_without_a_column_name_is_told(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("v1,v2,,\nham,hi,,\nspam,oh no, not this,\n")
    good, bad = rows_of(path)
    assert good == [["ham", "hi"]] and bad == [
        f"{path}:3: column 3 has no name, and here the text ' not this'"
    ]
    fault = list(read(str(path), "train"))[1]
    assert "the first line may be: v1,v2,column3,column4" in fault.remedy
    path.write_text(path.read_text().replace("v1,v2,,", "v1,v2,column3,column4"))
    assert rows_of(path)[0][1] == ["spam", "oh no", " not this", ""]


def test_quotes_are_text_in_a_tsv_that_has_them_so(tmp_path):
    """Without a rule for quotes, as the format's definition has it; or as csv files quote."""
    path = tmp_path / "a.tsv"
    path.write_text('text\tlabel\n"Great" film\tpos\n"all of it"\tneg\nsay "x"\tpos\n')
    assert rows_of(path) == (
        [['"Great" film', "pos"], ['"all of it"', "neg"], ['say "x"', "pos"]],
        [],
    )
    path.write_text('text\tlabel\n"two\nlines"\tpos\n"say ""x"""\tneg\n')
    assert rows_of(path) == ([["two\nlines", "pos"], ['say "x"', "neg"]], [])
    assert rows_of(path, quotes="text")[0][-1] == ['"say ""x"""', "neg"]
