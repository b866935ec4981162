"""Benchmarks: one command each, side by side with a peer in the same run."""
