"""Benchmarks: which plugin, on which data, at which budget."""

import argparse

from vqzoo.bench.suite import BudgetConfig, load_suite
from vqzoo.errors import UserError


def bench(options: argparse.Namespace) -> int:
    """Run a suite and return the exit status: 1 if a part of it failed."""
    budget = None if options.steps is options.seconds is None else BudgetConfig(options.steps, options.seconds)
    suite = load_suite(options.suite, options.plugins, options.seeds, options.quick, budget, options.baseline)
    for name in ("seeds", "steps", "seconds", "also", "data", "jobs", "mixed", "json"):
        if getattr(options, name) and suite.config.kind != ("compose" if name == "json" else "train"):
            raise UserError(f"--{name}: of no use to {suite.name}, which is a suite of kind {suite.config.kind!r}")
    if suite.config.kind == "compose":
        from vqzoo.bench.compose import compose as run
    elif suite.config.kind == "speed":
        from vqzoo.bench.speed import speed as run
    else:
        from vqzoo.bench.train import train as run
    return run(suite, options)
