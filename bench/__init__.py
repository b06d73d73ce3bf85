"""Benchmarks of the model, measured as ratios against a plain-Python yardstick.

`bench.baseline` is the yardstick: one file of ordinary Python that answers the module's memory
leaves with the module's own statuses. It was written before the model and is left alone, so that a
ratio means the same thing from one release to the next.
"""
