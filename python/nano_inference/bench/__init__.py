"""Benchmarks: a load generator for OpenAI-compatible servers, and its offline sisters."""
