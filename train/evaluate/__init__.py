"""Judges and benchmarks."""
