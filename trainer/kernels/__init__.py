"""Kernels and their plain references; the bottom of the house: nothing here imports the rest of the trainer."""
