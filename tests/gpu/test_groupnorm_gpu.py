"""groupnorm with real kernels against the oracle, on both kernel backends and in both layouts."""

from __future__ import annotations

from dataclasses import replace

import driver
import jax
import jax.numpy as jnp
import numpy as np
import oracle_groupnorm as oracle
import pytest
import tolerances
from cases_groupnorm import BF16, EVERY_SMALL, F16, F32, LARGE_MEAN, SD_UNET, SD_VAE, VIDEO, Case
from jaxnorm.kernels.configs import groupnorm_hip, groupnorm_triton
from test_groupnorm import both, check

import jaxnorm
from jaxnorm._compile import target

pytestmark = pytest.mark.gpu
backends = pytest.mark.parametrize("backend", ["triton", "hip"])
layouts = pytest.mark.parametrize("last", [True, False], ids=["nhwc", "nchw"])
# groups in parts, of sizes that no tile divides, with every width of a chunk
RAGGED = (
    Case(2, (61, 67), 96, 8, silu=True),
    Case(1, (129, 65), 66, 3, x=F16, weight=F32, bias=F32),
    Case(3, (4099,), 20, 4, x=F32, weight=F32, bias=BF16, silu=True),
    Case(2, (1031,), 45, 5, weight=F32, bias=None),
    Case(1, (40000,), 8, 8, x=F32, weight=None, bias=F32, mean=1e4, std=1.0),
    Case(2, (96, 96), 32, 1, x=F16, out=F32),
    Case(1, (7,), 6400, 2, silu=True),  # many channels, few positions
)


@backends
@pytest.mark.parametrize("case", [*EVERY_SMALL, *LARGE_MEAN, *RAGGED, *(c.first for c in RAGGED)], ids=str)
def test_against_the_oracle(case, backend):
    check(case, backend)


@backends
@layouts
@pytest.mark.parametrize("case", SD_UNET, ids=str)
def test_stable_diffusion(case, last, backend):
    check(replace(case, last=last, silu=case.channels != 640), backend)


@backends
@pytest.mark.parametrize("case", [SD_VAE[1], SD_VAE[2].first, *VIDEO[:2], replace(VIDEO[2], batch=1)], ids=str)
def test_large_images_and_videos(case, backend):
    check(case, backend)


def test_launches():
    """One call, of one kernel where a group fits on chip, of two (Triton: three) where it does not; and a kernel is the default."""
    held = 1 if target.of_device(jax.devices()[0]) == "sm_90" else 2  # by a cluster, by teams
    for case, hip, triton in (
        (SD_UNET[2], 1, 1),
        (SD_UNET[0], held, 3),
        (SD_UNET[0].first, 1, 3),
        (SD_VAE[0], held, 3),
    ):
        args = case.arrays()
        for backend, count in (("hip", hip), ("triton", triton)):
            plan = {"hip": groupnorm_hip, "triton": groupnorm_triton}[backend].plan
            launches = plan(case.problem("groupnorm_fwd", target.of_device(jax.devices()[0]), stats=False))
            assert sum(k.meeting >= 0 for k in launches) == count
            f = jax.jit(lambda *a, b=backend, c=case: jaxnorm.groupnorm(*a, backend=b, **c.options))
            assert f.lower(*args).as_text().count("stablehlo.custom_call @jaxnorm_launch") == 1, (case, backend)
        choices = jaxnorm.explain(lambda *a, c=case: jaxnorm.groupnorm(*a, **c.options), *map(jnp.asarray, args))
        assert choices[0].backend in ("hip", "triton"), choices


@backends
@layouts
@pytest.mark.parametrize("spatial", [(8, 8), (64, 64)])
def test_an_example_in_any_batch(last, spatial, backend):
    """The same bits alone, at any position, beside a NaN; forward and dx."""
    case = Case(33, spatial, 80, 8, silu=True, weight=F32, bias=F32, last=last)
    args, dy = case.arrays(), case.cotangent()
    run = both(case, backend)
    y, (dx, *_) = run(args, dy)
    spoiled = args[0].copy()
    spoiled[7].flat[5], spoiled[8].flat[11] = np.nan, np.inf
    for rows, x in ((slice(0, 1), args[0]), (slice(32, 33), args[0]), (slice(3, 20), args[0]), (slice(0, 33), spoiled)):
        part, (dpart, *_) = run((x[rows], *args[1:]), dy[rows])
        keep = [i for i in range(rows.stop - rows.start) if x is args[0] or i not in (7, 8)]
        tolerances.assert_same_bits(np.asarray(part)[keep], np.asarray(y)[rows][keep], "y")
        tolerances.assert_same_bits(np.asarray(dpart)[keep], np.asarray(dx)[rows][keep], "dx")


@backends
@layouts
def test_two_runs_give_the_same_bits(last, backend):
    """dweight and dbias included; and eager equals jit."""
    case = Case(16, (64, 64), 320, 32, silu=True, last=last)
    args, dy = (tuple(map(jnp.asarray, case.arrays())), jnp.asarray(case.cotangent()))
    run = both(case, backend)
    first = jax.tree.leaves(run(args, dy))
    for other in (*(run(args, dy) for _ in range(5)), run.__wrapped__(args, dy)):
        for a, b in zip(first, jax.tree.leaves(other), strict=True):
            tolerances.assert_same_bits(a, b)


@backends
@pytest.mark.parametrize("fill", [0xFF, 0x00])
@pytest.mark.parametrize(
    "case",
    [
        Case(2, (61, 67), 96, 8, silu=True),
        Case(3, (5, 7), 30, 3, x=F16, weight=F32, bias=F32, last=False),
        Case(2, (4099,), 20, 4, x=F32, weight=F32, bias=F32),
        Case(2, (4096,), 24, 4, last=False, silu=True),
        Case(2, (9,), 15, 5, silu=True),
    ],
    ids=str,
)
def test_nothing_outside_of_the_results_is_written(case, fill, backend):
    x, w, b = args = case.arrays()
    want, dy = case.forward(args), case.cotangent()
    gpu = driver.Driver()
    name = target.of_device(jax.devices()[0])
    assert name is not None
    out = driver.run_guarded(gpu, backend, case.problem("groupnorm_fwd", name), {"x": x, "weight": w, "bias": b}, fill)
    oracle.assert_y(out["y"], want, case.out_dtype)
    operands = {"x": x, "dy": dy, "weight": w, "stats": case.stats(want)} | ({"bias": b} if case.silu else {})
    out = driver.run_guarded(gpu, backend, case.problem("groupnorm_bwd", name), operands, fill)
    oracle.assert_gradients((out["dx"], out["dweight"], out["dbias"]), args, oracle.backward(want, dy))


@pytest.mark.slow
@backends
@layouts
def test_more_than_two_to_the_31_elements(last, backend):
    """Each example has the bits that it has in a small batch, also around element 2^31 and 2^32."""
    space, channels = 4096, 64
    batch = (1 << 32) // (space * channels) + 3
    case = Case(batch, (space,), channels, 8, silu=True, last=last)
    few = replace(case, batch=29)
    x, w, b = few.arrays()
    grow = jax.jit(lambda a: a[jnp.arange(batch) % 29] * (1 + (jnp.arange(batch) % 7)).astype(a.dtype)[:, None, None])
    big = grow(jnp.asarray(x))
    f = jax.jit(lambda *a: jaxnorm.groupnorm(*a, backend=backend, **case.options))
    y = f(big, w, b)
    half = (1 << 31) // (space * channels)
    for i in (0, half - 1, half, half + 1, 2 * half - 1, 2 * half, 2 * half + 1, batch - 1):
        one = np.asarray(big[i : i + 1])
        tolerances.assert_same_bits(np.asarray(y[i : i + 1]), f(one, w, b), f"example {i}")
        oracle.assert_y(np.asarray(y[i : i + 1]), replace(case, batch=1).forward((one, w, b)), BF16)


@backends
@layouts
def test_special_groups(last, backend):
    """Zeros, constants, subnormals, an outlier anywhere; a NaN or an infinity stays in its group."""
    case = Case(9, (33,), 24, 4, x=F32, weight=F32, bias=F32, last=last)
    x, w, b = case.arrays()
    x[0], x[1], x[2] = 0.0, 3.25, 1e-40
    x[3].flat[0] = x[4].flat[-1] = 1e4
    x[5].flat[0], x[6].flat[9] = np.nan, np.inf
    y, (dx, *_) = both(case, backend)((x, w, b), case.cotangent())
    want = case.forward((x, w, b))
    good = [0, 1, 2, 3, 4, 7, 8]
    part = lambda f: replace(f, shape=(7, *f.shape[1:]), xh=f.xh[good], mean=f.mean[good], rstd=f.rstd[good])  # noqa: E731
    oracle.assert_y(np.asarray(y)[good], part(want), F32)
    groups = oracle.to_groups(np.asarray(y), 4, -1 if last else 1)
    assert (np.isnan(groups[5]).any((0, 2)).sum(), np.isnan(groups[6]).any((0, 2)).sum()) == (1, 1)
    assert np.isfinite(np.asarray(dx)[good]).all()


def test_vmap_and_scan():
    """One more leading dim is one launch; each example of a scan is right."""
    case = Case(6, (16,), 32, 4, weight=F32, bias=F32, silu=True)
    x, w, b = case.arrays()
    f = lambda a, backend: jaxnorm.groupnorm(a, w, b, backend=backend, **case.options)  # noqa: E731
    split = jnp.asarray(x).reshape(2, 3, 16, 32)
    for backend in ("hip", "triton"):
        whole = f(jnp.asarray(x), backend)
        mapped = jax.jit(jax.vmap(lambda a, n=backend: f(a, n)))
        assert mapped.lower(split).as_text().count("stablehlo.custom_call @jaxnorm_launch") == 1
        _, scanned = jax.lax.scan(lambda c, a, n=backend: (c, f(a, n)), 0, split)
        for got in (mapped(split), scanned):
            tolerances.assert_same_bits(np.asarray(got).reshape(x.shape), whole)


def test_backends_agree():
    for case in (SD_UNET[0], SD_UNET[3].first):
        args = case.arrays(seed=3)
        y = {b: np.asarray(jaxnorm.groupnorm(*args, backend=b, **case.options)) for b in ("xla", "triton", "hip")}
        for backend in ("triton", "hip"):
            assert (tolerances.ulp_distance(y[backend], y["xla"]) > 1).mean() < 1e-3
