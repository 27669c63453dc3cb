"""The subcommands of scripts/bench_ranks.py, a module each."""
