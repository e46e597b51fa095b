"""Benchmarks: ratios of things measured in one run. Never part of the tests."""
