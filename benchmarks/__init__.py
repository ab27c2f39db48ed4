"""Measurements of jaxnorm against a same-bytes copy, XLA and other libraries; see ``python -m benchmarks.run --help``."""
