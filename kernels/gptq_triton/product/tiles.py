"""Tiles of the result of `many_rows`: which a program has, whole ones or equal parts of all, and how they are stored.

Tested by tests/kernels/test_products.py: by its results.
"""

# mypy: disable-error-code="no-untyped-def, assignment"
# ruff: noqa: RUF005  (Triton has no unpacking)
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

_barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # Triton 3.7 renamed it


@gluon.jit
def place(tile, M, outputs, BN: gl.constexpr, BM: gl.constexpr, WIDTH: gl.constexpr):
    """(n, m) of a tile: columns of tiles in bands of WIDTH, so that programs at work share words and rows of x."""
    down, across = gl.cdiv(M, BM), gl.cdiv(outputs, BN)
    first = tile // (WIDTH * down) * WIDTH
    width = gl.minimum(across - first, WIDTH)
    within = tile % (WIDTH * down)
    return (first + within % width) * BN, within // width * BM


@gluon.jit
def own(tiles, turns, SHARED: gl.constexpr):
    """(first tile, end, distance) of this program's tiles, and (first turn, end) of its turns, counted through all
    tiles: whole tiles in turn, or, if they are SHARED, an equal part of all turns."""
    if SHARED:
        first = gl.program_id(0) * (tiles * turns) // gl.num_programs(0)
        end = (gl.program_id(0) + 1) * (tiles * turns) // gl.num_programs(0)
        return first // turns, gl.cdiv(end, turns), 1, first, end
    else:
        return gl.program_id(0), tiles, gl.num_programs(0), 0, tiles * turns


@gluon.jit
def _store(acc, bias, out, n, m, M, N, HAS_BIAS: gl.constexpr, BN: gl.constexpr, BM: gl.constexpr, L: gl.constexpr):
    if HAS_BIAS:
        columns = n + gl.arange(0, BN, gl.SliceLayout(1, L))
        acc += gl.expand_dims(gl.load(bias + columns, mask=columns < N, other=0).to(gl.float32), 1)
    S: gl.constexpr = gl.BlockedLayout([8, 1], [BN // 8, 256 // BN], [1, 4], [0, 1])
    y = gl.convert_layout(acc.to(out.dtype.element_ty), S)
    row = m + gl.arange(0, BM, gl.SliceLayout(0, S))
    column = n + gl.arange(0, BN, gl.SliceLayout(1, S))
    at = out + row.to(gl.int64)[None, :] * N + column[:, None]
    gl.store(at, y, mask=(row < M)[None, :] & (column < N)[:, None])


@gluon.jit
def store_sum(
    acc, bias, out, parts, counters, tile, tiles, turns, n, m, M, N, INDEX: gl.constexpr,
    GROUPS: gl.constexpr, HAS_BIAS: gl.constexpr, BN: gl.constexpr, BM: gl.constexpr, SHARED: gl.constexpr,
    L: gl.constexpr,
):  # fmt: skip
    """Of programs that share a tile, the last adds all parts, in order."""
    if not SHARED:
        _store(acc, bias, out, n, m, M, N, HAS_BIAS, BN, BM, L)
    else:
        programs = gl.num_programs(0)
        first = ((tile * turns + 1) * programs - 1) // (tiles * turns)
        last = ((tile + 1) * turns * programs - 1) // (tiles * turns)
        if first == last:
            _store(acc, bias, out, n, m, M, N, HAS_BIAS, BN, BM, L)
        else:
            n_within, m_within = gl.arange(0, BN, gl.SliceLayout(1, L)), gl.arange(0, BM, gl.SliceLayout(0, L))
            within = n_within[:, None] + m_within[None, :] * BN
            mine = _part(gl.program_id(0), tile, tiles, turns) * GROUPS + INDEX
            gl.store(parts + mine * (BN * BM) + within, acc)
            _barrier()
            if gl.atomic_add(counters + tile * GROUPS + INDEX, 1, sem="acq_rel") == last - first:
                total = gl.zeros([BN, BM], gl.float32, L)
                AT_ONCE: gl.constexpr = 1 if BM > 64 else 256 // BN  # for the registers
                for these in range(first, last + 1, AT_ONCE):
                    summands = ()
                    for i in gl.static_range(AT_ONCE):  # all on their way before the first is added
                        part = _part(these + i, tile, tiles, turns) * GROUPS + INDEX
                        there = these + i <= last
                        at = parts + part * (BN * BM) + within
                        summands = summands + (gl.load(at, mask=there, other=0, cache_modifier=".cg"),)
                    for i in gl.static_range(AT_ONCE):
                        total += summands[i]
                _store(total, bias, out, n, m, M, N, HAS_BIAS, BN, BM, L)
                gl.store(counters + tile * GROUPS + INDEX, 0)  # ready for the next product


@gluon.jit
def _part(program, tile, tiles, turns):
    """Which part a program's of a tile is: it has two at most, of its first tile and of its last."""
    first = program * (tiles * turns) // gl.num_programs(0) // turns
    return program * 2 + (first != tile).to(gl.int32)
