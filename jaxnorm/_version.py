"""The one source of the version: read by the build (statically) and by ``jaxnorm.__version__``."""

__version__ = "0.1.0"
