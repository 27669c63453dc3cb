"""Where positions lie among the rows of a tensor."""

from __future__ import annotations

import pytest
import torch

from gptq_plugin.calibration.layouts import BY_SHAPE, LAYOUTS, UNKNOWN, by_sample, fitting, rows_in

KEPT = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]).bool()
ROWS = torch.arange(3)[:, None] * 10 + torch.arange(4)  # 10 x sample + position
WANTED = sorted(ROWS[KEPT].tolist())


@pytest.mark.parametrize(
    ("layout", "rows"),
    [
        ("samples first", ROWS),
        ("samples first", ROWS[..., None].expand(3, 4, 5)),
        ("in windows or flat", ROWS.reshape(3, 2, 2)),
        ("in windows or flat", ROWS.flatten()),
        ("positions first", ROWS.T),
        ("positions first", ROWS.T[..., None].expand(4, 3, 5)),
        ("behind heads", ROWS[:, None].expand(3, 5, 4)),
        ("positions first, flat", ROWS.T.flatten()),
        ("repeated", ROWS.flatten().repeat(3)),
        ("each repeated", ROWS.flatten().repeat_interleave(2)),
    ],
)
def test_the_rows_of_kept_positions_are_found_in_every_layout(layout, rows):
    x = rows[..., None].expand(*rows.shape, 8)
    mask = rows_in(layout, KEPT, x.shape)
    kept = x.reshape(-1, 8)[mask][:, 0].tolist()
    assert sorted(set(kept)) == WANTED and len(kept) == len(WANTED) * rows.numel() // ROWS.numel()
    if layout in BY_SHAPE:
        assert next(fitting(KEPT, x.shape))[0] == layout


def test_a_shortened_row_is_kept_if_it_is_over_a_kept_position():
    assert rows_in("shortened", KEPT, torch.Size((3, 2, 8))).tolist() == [True, True, True, False, True, True]


@pytest.mark.parametrize("sizes", [(3, 5), (7,), (3,), (4, 4), (5, 3, 4)])
def test_other_sizes_fit_no_layout(sizes):
    shape = torch.Size((*sizes, 8))
    assert not list(fitting(KEPT, shape))
    assert all(rows_in(layout, KEPT, shape) is None for layout in (*LAYOUTS, UNKNOWN))


def test_rows_are_grouped_by_sample():
    for rows in (ROWS, ROWS.T):
        assert torch.equal(by_sample(rows.flatten(), torch.Size((*rows.shape, 8)), 3), ROWS)
    assert by_sample(torch.arange(3), torch.Size((3, 8)), 3).tolist() == [[0], [1], [2]]
    assert by_sample(torch.arange(12), torch.Size((12, 8)), 3) is None
