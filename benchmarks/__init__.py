"""Measurements of jaxnorm against a same-bytes copy, XLA and other libraries; see ``python -m benchmarks.run --help``."""

from jaxnorm._bench import store, timing

__all__ = ["store", "timing"]
