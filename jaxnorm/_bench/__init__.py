"""How jaxnorm is measured: one method for ``jaxnorm bench``, ``jaxnorm tune`` and the scripts in ``benchmarks/``."""
