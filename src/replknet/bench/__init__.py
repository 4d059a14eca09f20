"""Benchmarks: workloads by name, the harness and its records."""
