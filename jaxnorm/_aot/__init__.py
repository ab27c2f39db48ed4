"""Ahead of time: code objects for machines without a compiler, and kernel cases that check them without jax.

``spec`` says which calls, ``instances`` which code objects they need for every number of rows, ``directory`` compiles and verifies
them, ``bundle`` writes a kernel case beside each, ``oracle`` and ``families`` compute what a case expects.
"""
