"""The fused distributed call without a GPU: when it is chosen, what is lowered, and the composite beside it."""

from __future__ import annotations

import dataclasses
import functools
import re
import warnings

import hlo
import jax
import jax.numpy as jnp
import needs
import numpy as np
import pytest
import tolerances
from cases_distributed import Call, mesh_of
from jaxnorm.kernels.configs import Launch

import jaxnorm
from jaxnorm import QuantSpec, _native
from jaxnorm.distributed import fused, processes, schedule
from jaxnorm.distributed._config import Config

CONFIG = Config("op", "tp", 2, 64, 8192, "bfloat16", QuantSpec("float8_e4m3fn"), "rmsnorm", 1e-6, 0.0, "output", True, True,
                "exact", 30.0)  # fmt: skip
DTYPES = (("x", "bfloat16"), ("weight", "bfloat16"))
NVIDIA, AMD = {"cuda": "sm_90"}, {"rocm": "gfx942"}


def decide(target, impl="auto", dtypes=DTYPES, **changes):
    with jaxnorm.use_target(target):
        return fused.decide(dataclasses.replace(CONFIG, **changes), dtypes, impl)


@pytest.fixture
def library(monkeypatch):
    """As if the launcher were there."""
    monkeypatch.setattr(_native, "fused_library", lambda: object())
    monkeypatch.setattr(fused.hip, "available", lambda t: (True, "", ""))


def test_when_it_is_chosen(library, monkeypatch):
    assert decide(NVIDIA, rows=4).fused and "one-shot" in decide(NVIDIA, rows=4).reason
    assert "two-shot" in decide(NVIDIA, rows=1024).reason
    residual = (*DTYPES, ("residual", "float32"), ("residual_out", "float32"))
    assert "two-shot" in decide(NVIDIA, dtypes=residual).reason  # the rows' residuals are with their owners
    assert "one-shot" in decide(NVIDIA, rows=4, dtypes=residual, scatter=False).reason
    for changes, why in [
        ({"impl": "composite"}, "impl='composite'"), ({"norm": "layernorm"}, "layernorm"), ({"reduce": "native"}, "native"),
        ({"ranks": 8}, "not measured"), ({"ranks": 3, "impl": "fused"}, "3 ranks"), ({"features": 8200}, "multiple of 16"),
        ({"rows": 1 << 17}, "workspace"), ({"rows": 63, "gather": False}, "do not divide"),
        ({"spec": QuantSpec("int8", group_size=48), "features": 9600}, "power of two"), ({"features": 1 << 17}, "registers"),
    ]:  # fmt: skip
        decision = decide(NVIDIA, **changes)
        assert not decision.fused and why in decision.reason, decision
    assert "never run on AMD" in decide(AMD).reason and "JAXNORM_FUSED_COMM=1" in decide(AMD, impl="fused").reason
    monkeypatch.setenv("JAXNORM_FUSED_COMM", "1")
    assert decide(AMD, ranks=8).fused and decide(NVIDIA, ranks=8).fused
    monkeypatch.setenv("JAXNORM_FUSED_COMM", "0")
    assert "JAXNORM_FUSED_COMM=0" in decide(NVIDIA, impl="fused").reason
    monkeypatch.setenv("JAXNORM_FUSED_COMM", "yes")
    with pytest.raises(ValueError, match=r"JAXNORM_FUSED_COMM: got 'yes', expected 0 or 1"):
        decide(NVIDIA)


def test_fused_on_a_cpu_warns_once_and_is_the_composite(monkeypatch):
    monkeypatch.setattr(fused, "_warned", set())
    call, mesh = Call(4, ranks=2), mesh_of((2,), ("tp",))
    arrays = call.inputs()
    with pytest.warns(RuntimeWarning, match=r"impl='fused' runs as the composite: platform cpu"):
        out = call.sharded(mesh, "tp", impl="fused")(call.place(arrays, mesh, "tp"))
    call.check(arrays, *out)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call.sharded(mesh, "tp", impl="fused")(call.place(arrays, mesh, "tp"))
    monkeypatch.setenv("JAXNORM_REQUIRE", "fused")
    with pytest.raises(jaxnorm.UnsupportedError, match="impl='fused' cannot be served"):
        call.sharded(mesh, "tp", impl="fused")(arrays)


@pytest.fixture
def always(monkeypatch):
    """Every call that the plan serves is decided to be fused, for an H100's target."""
    monkeypatch.setattr(_native, "fused_library", lambda: object())
    monkeypatch.setattr(fused.hip, "available", lambda t: (True, "", ""))
    monkeypatch.setattr(schedule, "platform", lambda: "cuda")
    monkeypatch.setattr(fused.target, "in_force", lambda named: ("sm_90",))
    monkeypatch.setitem(schedule.FUSED_RANKS, "cuda", (2, 4, 8))


@pytest.mark.parametrize("check_vma", [True, False], ids=["vma", "no-vma"])
def test_where_the_devices_cannot_the_composite_is_lowered(always, check_vma):
    """The primitive's types, values, gradient and batching are those of the composite beside it."""
    needs.need_devices(4)
    mesh = mesh_of((4,), ("tp",))
    for call in (
        Call(13, 64, residual="float32", spec=QuantSpec("int8", group_size=32, scale_layout="column")),
        Call(6, 64, residual="bfloat16", kind="allreduce"),
    ):
        arrays = call.inputs()
        f, placed = call.sharded(mesh, "tp", check_vma), call.place(arrays, mesh, "tp")
        assert "jaxnorm_fused" in str(jax.make_jaxpr(f)(placed))
        got, want = f(placed), call.sharded(mesh, "tp", check_vma, impl="composite")(placed)
        call.check(arrays, *got)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            tolerances.assert_same_bits(a, b)
        if call.spec is None:
            loss = lambda impl, a: sum(  # noqa: E731
                o.astype(jnp.float32).sum()
                for o in call.sharded(mesh, "tp", check_vma, impl=impl)(a)  # noqa: B023
            )
            auto, composite = (
                jax.jit(jax.grad(functools.partial(loss, impl)))(placed) for impl in ("auto", "composite")
            )
            for name in arrays:
                tolerances.assert_same_bits(auto[name], composite[name], name)


def test_batched(always):
    call, mesh = Call(6, 64, 2), mesh_of((2,), ("tp",))
    arrays = call.inputs()
    x = np.stack([arrays["x"], -2 * arrays["x"]])
    f = call.sharded(mesh, "tp")
    y = jax.vmap(lambda x: f({"x": x, "weight": arrays["weight"]})[0])(jnp.asarray(x))
    for i in range(2):
        call.check(arrays | {"x": x[i]}, y[i], None)


def lowered(call, mesh, axis, monkeypatch, **more):
    """StableHLO for CUDA, with the host devices taken for GPUs."""
    original = fused.groups

    class Gpu:
        def __init__(self, device):
            self.platform, self.id, self.process_index, self.local_hardware_id = "gpu", device.id, 0, None

    def groups(mesh, axis):
        if mesh is None:
            return original(mesh, axis)
        gpus = np.vectorize(Gpu, otypes=[object])(mesh.devices)
        return original(type("M", (), {"devices": gpus, "axis_names": mesh.axis_names}), axis)

    monkeypatch.setattr(fused, "groups", groups)
    f = call.sharded(mesh, axis, **more)
    return f.trace(call.place(call.inputs(), mesh, axis)).lower(lowering_platforms=("cuda",)).as_text()


def attribute(text, name):
    return re.search(rf'\b{name} = (?:dense<|array<i64: )?("[^"]*"|\[[^]]*\]|[\w.-]+)', text)[1]


@pytest.mark.compile
def test_one_custom_call_and_nothing_else(always, monkeypatch):
    """No collective is left; the groups are the rows of the mesh along the axis, ranks in their order."""
    needs.need_devices(8)
    needs.need("nvrtc", bool(fused.hip.version("sm_90")), "no NVRTC")
    call = Call(
        8,
        512,
        2,
        spec=QuantSpec("float8_e4m3fn", group_size=128, scale_layout="column"),
        residual="float32",
        weight="bfloat16",
    )
    grid = mesh_of((2, 2), ("tp", "dp"), (3, 1, 0, 2))
    text = lowered(call, grid, "tp", monkeypatch)
    assert hlo.custom_calls(text)["jaxnorm_fused"] == 1
    assert not re.search(r"stablehlo\.(all_to_all|all_gather|all_reduce|reduce_scatter)", text)
    assert attribute(text, "devices") == "[3, 0, 1, 2]"  # groups {3, 0} and {1, 2}
    assert (
        attribute(text, "layout") == '"pppppp"' and attribute(text, "rows") == "8" and attribute(text, "share") == "4"
    )
    ragged = lowered(Call(7, 512, 2, residual="float32", weight="bfloat16"), mesh_of((2,), ("tp",)), "tp", monkeypatch)
    assert (
        hlo.custom_calls(ragged)["jaxnorm_fused"] == 1 and "stablehlo.select" in ragged
    )  # zeros where no rank has a row
    both = mesh_of((2, 2), ("a", "b"), (3, 1, 0, 2))
    text = lowered(Call(8, 512, 4), both, ("a", "b"), monkeypatch)
    assert attribute(text, "devices") == "[3, 1, 0, 2]" and attribute(text, "layout") == '"pnppnn"'
    assert attribute(text, "timeout_ns") == "30000000000"


def test_calls_have_signatures_of_their_own(always, monkeypatch):
    needs.need("nvrtc", bool(fused.hip.version("sm_90")), "no NVRTC")
    mesh = mesh_of((2,), ("tp",))
    seen = {attribute(lowered(Call(8, 512, 2), mesh, "tp", monkeypatch), "signature") for _ in range(2)}
    assert len(seen) == 2


def test_groups_over_processes_need_a_connection(monkeypatch):
    assert processes.unreachable([[0, 1], [2, 3]], 1 << 20) == ""
    across = [[0, processes.PROCESS]]
    assert "not connected" in processes.unreachable(across, 16)
    monkeypatch.setitem(processes._connected, (0, processes.PROCESS), 1024)
    assert processes.unreachable(across, 1024) == "" and "1024" in processes.unreachable(across, 2048)
    with pytest.raises(ValueError, match=r"connect: devices: got devices of processes \[0, 0\]"):
        jaxnorm.distributed.connect(jax.devices()[:2], 1 << 20)


def test_explain():
    call, mesh = Call(8, ranks=2), mesh_of((2,), ("tp",))
    found = jaxnorm.explain(call.sharded(mesh, "tp"), call.inputs())
    assert [(c.op, c.backend) for c in found][:1] == [("reduce_scatter_rmsnorm_quant_all_gather", "composite")]
    assert "needs GPUs" in found[0].reason and found[1].op == "rmsnorm"


def test_explain_a_fused_call(always):
    call, mesh = Call(8, 512, 2), mesh_of((2,), ("tp",))
    (found,) = jaxnorm.explain(call.sharded(mesh, "tp"), call.inputs())
    assert found.backend == "fused" and found.kernel == "distributed.hip:rank_norm_fwd" and "one-shot" in found.reason
    assert isinstance(fused.Decision("op", True, "", Launch("k", (), (), (1, 1, 1))).launch, Launch)


def test_check_and_reset_without_a_gpu():
    jaxnorm.distributed.check()
    jaxnorm.distributed.reset()
