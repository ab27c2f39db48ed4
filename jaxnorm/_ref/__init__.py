"""The jnp references: what runs on CPU and under ``backend="xla"``, and what every kernel is compared with. Imports jax only."""
