"""Gemma 3 over several devices: heads and MLP columns sharded, norms on each device's rows of the tokens.

`model` is examples/gemma's model with the collectives of each half block, `sharding` puts its weights on a mesh, `generate` runs it
and `cli` is the command. On a CPU, host devices stand in for GPUs.
"""
