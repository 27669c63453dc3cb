"""Codes as bytes of the tensor cores' product, masked where they lie in words: `PRODUCTS`, `GROUPS`, `ptx`.

A register holds two words, so that one mask leaves four codes in its bytes: of one plane in the words' lower bytes, of
another in the upper ones. A code at bit p of its byte counts 2^p. One at the top is signed, and less its zero if the
highest bit is turned. Of 3 bits a third of the codes lie in two bytes, or in two words, and are put together first.

The planes of both bytes may be of two groups, whose sums are scaled apart: each goes to a column of its own, a slot, in
which the other's bytes of x are zero. Products with the same two groups are summed in one chain.

Tested by tests/kernels/test_by_bytes.py: with the kernel that multiplies them.
"""

from __future__ import annotations

from typing import NamedTuple


class Product(NamedTuple):
    """Which codes of a step a product multiplies.

    Attributes:
        planes: Whose codes are in the lower and in the upper bytes of words.
        places: At which bits of them.
        slots: In which of the two columns they are summed.
        chain: Index into `GROUPS`.
    """

    planes: tuple[int, int]
    places: tuple[int, int]
    slots: tuple[int, int]
    chain: int


PRODUCTS = {
    2: tuple(Product((i, i + 4), (2 * i, 2 * i), (0, 1), i // 2) for i in range(4)),
    3: (
        Product((0, 3), (0, 1), (0, 0), 0), Product((1, 4), (3, 4), (0, 1), 0),
        Product((8, 11), (0, 1), (0, 0), 1), Product((9, 12), (3, 4), (0, 1), 1),
        Product((2, 10), (0, 0), (0, 1), 2), Product((5, 13), (0, 0), (0, 1), 3),
        Product((6, 14), (3, 3), (0, 1), 3), Product((7, 15), (0, 0), (0, 1), 3),
    ),
    4: tuple(Product((i, i + 2), (4 * i, 4 * i), (0, 1), 0) for i in range(2)),
}  # fmt: skip

# Of a step's groups of 128 channels, those of a chain's slots.
GROUPS = {2: ((0, 2), (1, 3)), 3: ((0, 1), (2, 3), (0, 2), (1, 3)), 4: ((0, 1),)}


def signed(bits: int, product: int) -> bool:
    """True if the product's codes are less their zero, 2^(bits - 1)."""
    return PRODUCTS[bits][product].places[0] + bits == 8


def ptx(bits: int, product: int) -> str:
    """PTX of a product's codes $0 in four bytes, of words $1; of 3 bits $1 and $2, the halves' own, and $3."""
    if bits != 3:
        mask = (2**bits - 1) * 0x01010101 << bits * product
        turned = 0x80808080 if bits * (product + 1) == 8 else 0
        return f"lop3.b32 $0, $1, 0x{turned:08x}, 0x{mask:08x}, 0x28;"  # (a ^ b) & c
    if product < 4:
        return f"and.b32 $0, ${1 + product // 2}, {('0x0e070e07', '0x70387038')[product % 2]};"
    if product in (5, 6):
        return f"and.b32 $0, $3, {('0x07070707', '0x38383838')[product - 5]};"
    parts = {
        4: ((1, 6, 0x00070007), (2, -2, 0x07000700)),
        7: ((3, 6, 0x03030303), (1, 13, 0x00040004), (2, 5, 0x04000400)),
    }
    code = "{.reg .b32 t, v; mov.b32 v, 0;"
    for word, distance, mask in parts[product]:
        code += f"shr.u32 t, ${word}, {distance};" if distance > 0 else f"shl.b32 t, ${word}, {-distance};"
        code += f"lop3.b32 v, t, 0x{mask:08x}, v, 0xea;"
    return code + "mov.b32 $0, v;}"
