"""Short texts with what text may hold."""

PROSE = [
    "The quick brown fox jumps over the lazy dog. ",
    "Ένα — naïve\ttext,\n\nwith  odd   spaces 🙂.\n",
    "",
    "x",
]
