"""The fused distributed calls on 2 and 4 GPUs. Each part runs in a process of its own that is killed when its time is up."""

from __future__ import annotations

import distributed_parts
import jax
import needs
import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.multigpu]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("part", distributed_parts.PARTS)
def test_part(part, ranks):
    if part in distributed_parts.FOUR and ranks != 4:
        pytest.skip("needs four ranks")
    needs.need_devices(ranks)
    assert jax.devices()[0].platform == "gpu"
    passed, out, _ = distributed_parts.run_part(part, ranks, distributed_parts.PARTS[part])
    assert passed, out
