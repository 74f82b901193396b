"""Benchmarks. Each is a module: `python -m benchmarks.train_step --json FILE`."""
