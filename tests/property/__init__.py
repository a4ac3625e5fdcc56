"""Hypothesis against oracles and fastavro."""
