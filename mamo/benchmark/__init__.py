"""Benchmark: speed and memory on this machine, relative to the machine's own limits."""
