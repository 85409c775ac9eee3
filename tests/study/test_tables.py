"""Rows of the studies as CSV and as text, and where figures put their labels."""

from itertools import pairwise
from pathlib import Path

import pytest

from opd_lightning.figures import spread
from opd_lightning.study.tables import read_csv, table, write_csv

ROWS = [
    {"objective": "ReverseKL", "setting": 'f(x, "y")', "steps": 9, "kl": 0.123456},
    {"objective": "π", "setting": "", "steps": 12345, "kl": 1e-12},
]


def test_what_is_written_reads_back(tmp_path: Path):
    found = read_csv(write_csv(ROWS, tmp_path / "new" / "rows.csv"))
    assert found == ROWS
    assert [type(value) for value in found[0].values()] == [str, str, int, float]


def test_the_table_is_aligned_and_rounded():
    assert table(ROWS, ["objective", "steps", "kl"]).splitlines() == [
        "objective  steps      kl",
        "ReverseKL      9  0.1235",
        "π          12345       0",
    ]


def test_the_table_shows_all_columns_by_default():
    assert table(ROWS).splitlines()[0].split() == list(ROWS[0])


@pytest.mark.parametrize("heights", [[0.5, 0.1, 0.9], [0.8, 0.8, 0.8, 0.1], [0.0, 0.08, 0.11]])
def test_labels_keep_their_order_and_a_gap(heights: list[float]):
    placed = spread(heights, 0.1)
    order = sorted(range(len(heights)), key=lambda i: (heights[i], placed[i]))
    gaps = [placed[b] - placed[a] for a, b in pairwise(order)]
    assert min(gaps) > 0.1 - 1e-12
    assert sum(placed) == pytest.approx(sum(heights))


def test_labels_with_room_stay():
    assert spread([0.5, 0.1, 0.9], 0.1) == pytest.approx([0.5, 0.1, 0.9])
