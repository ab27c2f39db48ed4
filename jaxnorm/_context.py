"""What ``use_backend``, ``use_target``, ``distributed.schedule.force`` and ``distributed.summed.apart`` set. All are part of the
key of ``jax.jit``'s cache, so they must exist before the first trace: one that comes into being inside it makes JAX trace and
compile that function again at its second call."""

from __future__ import annotations

from . import _compat

backend = _compat.user_context(None)
target = _compat.user_context(())
schedule = _compat.user_context(None)
sum_apart = _compat.user_context(False)
