"""The paper's tables and figures on the shipped small tasks: `python -m benchmarks.paper --help`."""
