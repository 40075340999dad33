"""Losses as plain functions: float32, one value a sample (B,), summed over the sample's elements (README.md)."""
