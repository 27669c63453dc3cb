"""Times what several ranks do, on the GPUs of one host or on CPUs.

    python scripts/bench_ranks.py turns                                  # two ranks of one thread against one
    python scripts/bench_ranks.py words --ranks 2 4 8 16 32 64           # what the ranks tell each other, over gloo
    python scripts/bench_ranks.py blocks --ranks 1 2 4 8 --more          # Llama-3-8B's shape on 1 to 8 GPUs
    python scripts/bench_ranks.py sharded --ranks 8 --layers 80          # Llama-3-70B's, FSDP2, fit to export
    python scripts/bench_ranks.py sharded --how tp --ranks 8 --layers 80 # the same by tensor parallelism
    python scripts/bench_ranks.py kill --ranks 8                         # a rank is killed; when do the others end?
    python scripts/bench_ranks.py finish --ranks 1 2 4 8                 # steps of a finish
    python scripts/bench_ranks.py trainer --kinds ddp fsdp1 fsdp2 zero3  # transformers' Trainer against one rank

Without a GPU all run on the CPU over gloo, for which the sizes must be small: ``--width 256 --vocab 512 --tokens 64``.
"""

from __future__ import annotations

import argparse

from rank_benches import blocks, finish, kill, sharded, trainer, turns, words

COMMANDS = {
    "turns": turns,
    "words": words,
    "blocks": blocks,
    "sharded": sharded,
    "kill": kill,
    "finish": finish,
    "trainer": trainer,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        assert module.__doc__ is not None
        described = argparse.RawDescriptionHelpFormatter
        module.add_options(commands.add_parser(name, description=module.__doc__, formatter_class=described))
    options = parser.parse_args()
    COMMANDS[options.command].main(options)


if __name__ == "__main__":
    main()
