"""Estimates costs and savings of several ranks from volumes and rates; nothing is measured.

    python scripts/cost_of_ranks.py

Compares the bytes of every collective of one block (`gptq_plugin.distributed`) with the block's compute, as measured on
one H200 (docs/benchmarks/8b-model.md: Llama-3-8B's shapes, 262,144 tokens).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2

STRIP = 1024  # hessian._STRIP on a GPU
LEAST_ROWS, MOST_BLOCKS, MULTIPLE = 4096, 4, 32  # of row_blocks, on a GPU
MEETINGS = 3  # words per group: to choose the next one, before the sum, and before the rows
# Fitted to check-ins of 2 to 16 ranks on one host (docs/benchmarks/ranks.md), and assumed of networks.
STEP = 90e-6  # seconds of a message over TCP
READ = 20e-6  # seconds in which rank 0 reads each of the P - 1 words that come to it
GROUP_SIZE = 128
# Milliseconds that a block of Llama-3-8B took on four H100 beyond all parts here (docs/benchmarks/ranks.md); 6 on two.
# That it does not grow with more ranks is assumed.
UNCOUNTED = 25.0


@dataclass(frozen=True)
class Shape:
    """Shape of a Llama's block: its width, that inside the MLP, and the rows of k and v."""

    name: str
    width: int
    inner: int
    kv: int

    def groups(self) -> list[tuple[int, int]]:
        """(inputs, rows) of the layers that share a Hessian: q k v, o, gate up, down."""
        w, i = self.width, self.inner
        return [(w, w + 2 * self.kv), (w, w), (w, 2 * i), (i, w)]


@dataclass(frozen=True)
class Network:
    """A ring of P ranks, with the rate of its slowest link, in bytes per second and direction."""

    name: str
    ranks: int
    rate: float


# Milliseconds per block of Llama-3-8B on one H200, by how they scale (docs/benchmarks/8b-model.md, default).
FORWARD, HESSIANS, FACTORS, COLUMNS, PACKING = 240.0, 116.0, 29.8, 51.9, 2.2


def hessian_bytes(n: int) -> int:
    """Bytes of the float64 strips on and below the diagonal."""
    return sum(8 * (min(start + STRIP, n) - start) * min(start + STRIP, n) for start in range(0, n, STRIP))


def row_bytes(n: int, group_size: int = GROUP_SIZE) -> int:
    """Bytes of a row's codes (uint8), scales (float16), zeros (uint8) and three sums (float32)."""
    groups = n // group_size
    return n + 2 * groups + groups + 12


def block_rows(rows: int) -> tuple[int, int]:
    """The number of blocks of a layer's rows, and the rows in each."""
    blocks = min(MOST_BLOCKS, max(1, rows // LEAST_ROWS))
    size = rows if blocks == 1 else ceil(rows / blocks / MULTIPLE) * MULTIPLE
    return ceil(rows / size), size


def share(rows: int, ranks: int) -> int:
    """The rows that each rank solves: whole blocks."""
    blocks, size = block_rows(rows)
    return ceil(blocks / ranks) * size


def sharers(rows: int, ranks: int) -> int:
    """How many ranks send their rows."""
    blocks, _ = block_rows(rows)
    return ceil(blocks / ceil(blocks / ranks))


def passed_on(n: int, rows: int, ranks: int) -> int:
    """Bytes of rows that a rank of the ring sends: all but its own, or all where some ranks have none of their own."""
    of = sharers(rows, ranks)
    return (of - (of == ranks)) * share(rows, ranks) * row_bytes(n)


def steps(ranks: int) -> int:
    """Messages behind each other in a word: to rank 0, and back along a tree."""
    return 1 + ceil(log2(ranks))


def exchange(shape: Shape, network: Network) -> tuple[float, float, float]:
    """Milliseconds of a block's sums, rows and words, with ring algorithms at the link's full rate."""
    p = network.ranks
    sums = 2 * (p - 1) / p * sum(hessian_bytes(n) for n, _ in shape.groups()) / network.rate
    rows = sum(passed_on(n, rows, p) for n, rows in shape.groups()) / network.rate
    words = MEETINGS * len(shape.groups()) * (steps(p) * STEP + (p - 1) * READ)
    return 1e3 * sums, 1e3 * rows, 1e3 * words


def compute(shape: Shape, like: Shape, ranks: int) -> tuple[float, float]:
    """Milliseconds of a block on each of the ranks, of what they share and of what each repeats, scaled from `like` by
    operations."""

    def grown(power_of_n: int, power_of_rows: int) -> float:
        of, base = (sum(n**power_of_n * r**power_of_rows for n, r in one.groups()) for one in (shape, like))
        return of / base

    widths, all_rows = zip(*shape.groups(), strict=True)
    shares = [min(rows, share(rows, ranks)) for rows in all_rows]
    tokens = FORWARD * grown(1, 1) + HESSIANS * grown(2, 0)
    own, whole = (sum(n**2 * rows for n, rows in zip(widths, of, strict=True)) for of in (shares, all_rows))
    return tokens / ranks + COLUMNS * grown(2, 1) * own / whole, FACTORS * grown(3, 0) + PACKING * grown(1, 1)


def main() -> None:
    shapes = [Shape("Llama-3-8B", 4096, 14336, 1024), Shape("Llama-3-70B", 8192, 28672, 1024)]
    networks = [
        Network("8 H200, NVLink at 300 GB/s", 8, 300e9),
        Network("16 nodes of 1 H200, 400 Gb/s a node", 16, 50e9),
        Network("16 nodes of 8 H200, 400 Gb/s a node", 128, 50e9),
    ]
    for shape in shapes:
        sums, codes = (
            sum(of) / 1e6
            for of in ([hessian_bytes(n) for n, _ in shape.groups()], [r * row_bytes(n) for n, r in shape.groups()])
        )
        alone = sum(compute(shape, shapes[0], 1))
        print(f"\n{shape.name}, a block: Hessians {sums:.0f} MB, rows {codes:.0f} MB; one H200 {alone:.0f} ms")
        print(f"{'':37}{'shared':>9}{'anew':>7}{'sums':>7}{'rows':>7}{'words':>7}{'rest':>7}{'ms':>8}{'times':>7}")
        for network in networks:
            parts = [*compute(shape, shapes[0], network.ranks), *exchange(shape, network), UNCOUNTED]
            figures = "".join(f"{part:>7.1f}" for part in parts[1:])
            whole = sum(parts)
            print(f"{network.name:37}{parts[0]:>9.1f}{figures}{whole:>8.1f}{alone / whole:>7.1f}")


if __name__ == "__main__":
    main()
