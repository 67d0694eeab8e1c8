"""Benchmarks before and after training: EleutherAI's harness as a library, held-out pairs, one table."""
