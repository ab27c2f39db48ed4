"""Triton kernels and their launch configurations. Installed as ``jaxnorm.kernels``; imports neither jax nor jaxnorm."""

if __name__ != "jaxnorm.kernels":
    raise ImportError("import jaxnorm.kernels, not kernels: the folder is part of the jaxnorm package")
