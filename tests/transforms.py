"""Checks of one op under JAX's transformations: ``check(op, backend)``, values and gradients against the oracle.

Run on CPU by test_transforms.py and with real kernels by gpu/test_transforms_gpu.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import tolerances
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from registry import MIXED, Op, device_arrays, with_gradients

FEATURES = 96
Check = Callable[[Op, str | None], None]


def _verify(op: Op, args, cotangents, results, gradients, what: str) -> None:
    op.check(args, results, what)
    op.check_gradients(args, cotangents, gradients, what)


def _rows_axes(op: Op, axis):
    """in_axes that map the arguments with rows and share the vectors."""
    return tuple(axis if rows else None for rows in op.per_row)


def _move(op: Op, arrays, source: int, target: int):
    return tuple(jnp.moveaxis(a, source, target) if rows else a for a, rows in zip(arrays, op.per_row, strict=True))


def data(op: Op, *lead: int, features: int = FEATURES, seed: int = 0, **kw):
    args = op.make(lead, features, seed=seed, **kw)
    return args, op.cotangents(args)


def check_jit(op: Op, backend: str | None) -> None:
    args, cts = data(op, 3, 5)
    _verify(op, args, cts, *jax.jit(with_gradients(op.function(backend)))(args, cts), "jit")


def check_value_and_grad_of_a_loss(op: Op, backend: str | None) -> None:
    """jax.grad, for every argument alone and together."""
    args, cts = data(op, 7)
    f = op.function(backend)

    def loss(*args):
        return sum(jnp.sum(o.astype(jnp.float32) * c.astype(jnp.float32)) for o, c in zip(f(*args), cts, strict=True))

    numbers = tuple(range(len(args)))
    together = jax.jit(jax.grad(loss, numbers))(*args)
    op.check_gradients(args, cts, together, "grad")
    for i in numbers:
        tolerances.assert_same_bits(jax.jit(jax.grad(loss, i))(*args), together[i], f"grad of argument {i} alone")


def check_vmap(op: Op, backend: str | None, axis: int) -> None:
    """The batch is axis 0, the second last or the last of the mapped arrays; one vector of weights for all."""
    args, cts = data(op, 4, 3)
    f = jax.vmap(op.function(backend), _rows_axes(op, axis), axis)

    def moved(args, cts):
        move = functools.partial(jnp.moveaxis, source=0, destination=axis)
        back = functools.partial(jnp.moveaxis, source=axis, destination=0)
        results, gradients = with_gradients(f)(_move(op, args, 0, axis), tuple(map(move, cts)))
        return tuple(map(back, results)), _move(op, gradients, axis, 0)

    _verify(op, args, cts, *jax.jit(moved)(args, cts), f"vmap over axis {axis}")


def check_vmap_of_vmap(op: Op, backend: str | None) -> None:
    """The inner axis is not the first: [a, b, M, N] mapped over b outside, over a inside."""
    args, cts = data(op, 2, 3, 4)
    inner = jax.vmap(op.function(backend), _rows_axes(op, 0))
    f = jax.vmap(inner, _rows_axes(op, 1), 1)
    _verify(op, args, cts, *jax.jit(with_gradients(f))(args, cts), "vmap(vmap)")


def check_vmap_weights_batched(op: Op, backend: str | None) -> None:
    """Each example has its own weight, with rows batched, and with one x for all."""
    sets = [data(op, 5, seed=s) for s in range(3)]
    stacked, stacked_cts = (tuple(map(np.stack, zip(*part, strict=True))) for part in zip(*sets, strict=True))
    results, gradients = jax.jit(with_gradients(jax.vmap(op.function(backend))))(stacked, stacked_cts)
    for i, (args, cts) in enumerate(sets):
        pick = functools.partial(jax.tree.map, lambda a, i=i: a[i])
        _verify(op, args, cts, pick(results), pick(gradients), f"example {i}")
    first = sets[0][0]
    shared = tuple(a if rows else s for a, s, rows in zip(first, stacked, op.per_row, strict=True))
    axes = tuple(None if rows else 0 for rows in op.per_row)
    results = jax.jit(jax.vmap(op.function(backend), axes))(*shared)
    for i in range(3):
        args = tuple(a if rows else a[i] for a, rows in zip(shared, op.per_row, strict=True))
        op.check(args, [r[i] for r in results], f"x shared, weight {i}")


def check_vmap_of_grad(op: Op, backend: str | None) -> None:
    """One gradient of the weight per example."""
    args, cts = data(op, 3, 5)
    f = jax.vmap(with_gradients(op.function(backend)), (_rows_axes(op, 0), 0))
    results, gradients = jax.jit(f)(args, cts)
    for i in range(3):
        mine = tuple(a[i] if rows else a for a, rows in zip(args, op.per_row, strict=True))
        _verify(op, mine, [c[i] for c in cts], [r[i] for r in results], [g[i] for g in gradients], f"example {i}")


def check_grad_of_vmap(op: Op, backend: str | None) -> None:
    args, cts = data(op, 3, 5)
    f = jax.vmap(op.function(backend), _rows_axes(op, 0))
    _verify(op, args, cts, *jax.jit(with_gradients(f))(args, cts), "grad(vmap)")


def check_scan(op: Op, backend: str | None) -> None:
    args, cts = data(op, 4, 3)
    f = op.function(backend)

    def scanned(*args):
        rows = [a for a, r in zip(args, op.per_row, strict=True) if r]

        def body(carry, rows):
            rest = iter(rows)
            return carry + 1, f(*[next(rest) if r else a for a, r in zip(args, op.per_row, strict=True)])

        return jax.lax.scan(body, 0, rows)[1]

    _verify(op, args, cts, *jax.jit(with_gradients(scanned))(args, cts), "scan")


def check_loops(op: Op, backend: str | None) -> None:
    """fori_loop, while_loop and cond give the bits of calls written out."""
    args, _ = data(op, 6)
    f, rows = op.function(backend), sum(op.per_row)

    def step(state):
        new = f(*state, *args[rows:])
        return (*new, *state[len(new) :])

    def fori(*state):
        return jax.lax.fori_loop(0, 3, lambda i, s: jax.lax.cond(i >= 0, step, lambda s: s, s), state)

    def loop(*state):
        return jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, step(s[1])), (0, state))[1]

    want = device_arrays(args[:rows])
    once = jax.jit(lambda *s: step(s))
    for _ in range(3):
        want = once(*want)
    for got in (jax.jit(fori)(*args[:rows]), jax.jit(loop)(*args[:rows])):
        for a, b in zip(got, want, strict=True):
            tolerances.assert_same_bits(a, b, "loop")


def check_checkpoint(op: Op, backend: str | None) -> None:
    args, cts = data(op, 7)
    _verify(op, args, cts, *jax.jit(with_gradients(jax.checkpoint(op.function(backend))))(args, cts), "checkpoint")


def check_pmap(op: Op, backend: str | None) -> None:
    """pmap of the gradient (per device, summed here) and gradient of the pmap."""
    n = len(jax.devices())
    args, cts = data(op, n, 3)
    axes = _rows_axes(op, 0)
    results, gradients = jax.pmap(with_gradients(op.function(backend)), in_axes=(axes, 0))(args, cts)
    for i in range(n):
        mine = tuple(a[i] if rows else a for a, rows in zip(args, op.per_row, strict=True))
        picked = [np.asarray(r)[i] for r in results], [np.asarray(g)[i] for g in gradients]
        _verify(op, mine, [c[i] for c in cts], *picked, f"pmap, device {i}")
    results, gradients = with_gradients(jax.pmap(op.function(backend), in_axes=axes))(
        device_arrays(args), device_arrays(cts)
    )
    _verify(op, args, cts, results, gradients, "grad(pmap)")


def mesh(axis_type: AxisType = AxisType.Auto):
    """("dp", "tp"): 4 x 2 on eight devices, n/2 x 2 or 1 x n on others."""
    n = len(jax.devices())
    shape = (n // 2, 2) if n % 2 == 0 and n > 2 else (n, 1)
    return jax.make_mesh(shape, ("dp", "tp"), axis_types=(axis_type,) * 2)


def _specs(op: Op, spec):
    return tuple(spec if rows else P(None) for rows in op.per_row)


def check_shard_map(op: Op, backend: str | None, check_vma: bool) -> None:
    """Gradient of the shard_map: dweight is the sum over all shards, counted once."""
    args, cts = data(op, 8, 4)
    spec = P("dp", "tp", None)
    f = jax.shard_map(
        op.function(backend), mesh=mesh(), in_specs=_specs(op, spec), out_specs=(spec,) * len(cts), check_vma=check_vma
    )
    _verify(op, args, cts, *jax.jit(with_gradients(f))(args, cts), f"shard_map check_vma={check_vma}")


def check_grad_inside_shard_map(op: Op, backend: str | None) -> None:
    """With check_vma=True a gradient taken inside is summed too; with check_vma=False it is the shard's own."""
    args, cts = data(op, 8, 4)
    m = mesh()
    spec = P("dp", "tp", None)
    rows, outs = _specs(op, spec), (spec,) * len(cts)
    both = with_gradients(op.function(backend))
    f = jax.shard_map(both, mesh=m, in_specs=(rows, outs), out_specs=(outs, rows))
    _verify(op, args, cts, *jax.jit(f)(args, cts), "grad inside shard_map")

    def summed(args, cts):
        results, gradients = both(args, cts)
        return results, tuple(
            g if r else jax.lax.psum(g, ("dp", "tp")) for g, r in zip(gradients, op.per_row, strict=True)
        )

    f = jax.shard_map(summed, mesh=m, in_specs=(rows, outs), out_specs=(outs, rows), check_vma=False)
    _verify(op, args, cts, *jax.jit(f)(args, cts), "grad inside shard_map, check_vma=False, psum by the caller")


def check_vma_refuses_wrong_out_specs(op: Op, backend: str | None) -> None:
    """Results and gradients that differ between devices must not pass as replicated."""
    if len(jax.devices()) == 1:
        return
    args, cts = data(op, 8, 4)
    spec, m = P("dp", None, None), mesh()
    rows, outs = _specs(op, spec), (spec,) * len(cts)
    claims = []
    for i in range(len(cts)):
        wrong = tuple(P() if i == j else spec for j in range(len(cts)))
        claims.append((jax.shard_map(op.function(backend), mesh=m, in_specs=rows, out_specs=wrong), args))
    for i in range(sum(op.per_row)):
        wrong = tuple(P() if i == j else s for j, s in enumerate(rows))
        f = jax.shard_map(
            lambda *a: with_gradients(op.function(backend))(a[: len(rows)], a[len(rows) :])[1],
            mesh=m,
            in_specs=(*rows, *outs),
            out_specs=wrong,
        )
        claims.append((f, (*args, *cts)))
    for f, operands in claims:
        try:
            jax.eval_shape(f, *operands)
        except ValueError as e:
            assert "out_specs" in str(e), e
        else:
            raise AssertionError(f"{op.name}: a varying result was accepted as replicated")


def check_donation(op: Op, backend: str | None) -> None:
    """Donated rows become results; what is not donated keeps its value."""
    args, cts = data(op, 64, dtypes=dict(MIXED))
    f = op.function(backend)
    plain, donating = jax.jit(f), jax.jit(f, donate_argnums=tuple(range(len(cts))))
    kept = device_arrays(args)
    want = plain(*kept)
    for before, after in zip(args, kept, strict=True):
        tolerances.assert_same_bits(after, before, "an argument that was not donated")
    compiled = donating.lower(*kept).compile()
    assert hlo.output_aliases(compiled.as_text()) == len(cts), "donated buffers are not reused"
    assert hlo.output_aliases(plain.lower(*kept).compile().as_text()) == 0
    given = tuple(jnp.array(a, copy=True) for a in args)
    for a, b in zip(compiled(*given), want, strict=True):
        tolerances.assert_same_bits(a, b, "donated")
    assert all(a.is_deleted() for a in given[: len(cts)]) and not given[-1].is_deleted()


def check_jvp_is_refused(op: Op, backend: str | None) -> None:
    """Forward mode is documented as refused: a TypeError, never a wrong tangent."""
    args, _ = data(op, 3)
    args = device_arrays(args)
    for call in (lambda: jax.jvp(op.function(backend), args, args), lambda: jax.jacfwd(op.function(backend))(*args)):
        try:
            call()
        except TypeError as e:
            assert "custom_vjp" in str(e) or "forward-mode" in str(e), e
        else:
            raise AssertionError("jvp was accepted")


def check_threads(op: Op, backend: str | None) -> None:
    """Several threads trace, compile and run new shapes at once, some of them the same."""
    sets = [data(op, 2 + i % 3, 3, seed=i) for i in range(6)]
    with ThreadPoolExecutor(6) as pool:
        futures = [pool.submit(lambda a, c: jax.jit(with_gradients(op.function(backend)))(a, c), a, c) for a, c in sets]
        for (args, cts), future in zip(sets, futures, strict=True):
            _verify(op, args, cts, *future.result(), "in a thread")


def check_named_scope(op: Op, backend: str | None) -> None:
    args, cts = data(op, 3, 5)
    forward = jax.jit(op.function(backend)).lower(*args).compile().as_text()
    assert op.name in hlo.scopes(forward), hlo.scopes(forward)
    pull = jax.jit(lambda a, c: with_gradients(op.function(backend))(a, c)[1]).lower(args, cts).compile().as_text()
    assert any((op.name in s and "bwd" in s) or s == op.name for s in hlo.scopes(pull)), hlo.scopes(pull)


def check_strict_promotion_and_x64(op: Op, backend: str | None) -> None:
    """Strict dtype promotion and jax_enable_x64 change neither dtypes nor bits."""
    args, cts = data(op, 3, 5)

    def run():
        return jax.tree.leaves(jax.jit(lambda a, c: with_gradients(op.function(backend))(a, c))(args, cts))

    want = run()
    with jax.numpy_dtype_promotion("strict"):
        strict = run()
    with jax.enable_x64(True):
        wide = run()
    for a, b, c in zip(want, strict, wide, strict=True):
        tolerances.assert_same_bits(b, a, "strict promotion")
        tolerances.assert_same_bits(c, a, "jax_enable_x64")


def check_transposed_and_sliced_inputs(op: Op, backend: str | None) -> None:
    """Inputs that are views inside the program give the bits of inputs that are not."""
    args, _ = data(op, 6, 4)
    f = op.function(backend)
    want = jax.jit(f)(*args)
    turned = tuple(
        np.ascontiguousarray(np.swapaxes(a, 0, -1)) if rows else a for a, rows in zip(args, op.per_row, strict=True)
    )
    wider = tuple(np.concatenate([a, a], -1) for a in args)
    turn = jax.jit(lambda *a: f(*(jnp.swapaxes(v, 0, -1) if r else v for v, r in zip(a, op.per_row, strict=True))))
    cut = jax.jit(lambda *a: f(*(v[..., : v.shape[-1] // 2] for v in a)))
    for got in (turn(*turned), cut(*wider)):
        for a, b in zip(got, want, strict=True):
            tolerances.assert_same_bits(a, b)


CHECKS: dict[str, Check] = {
    "jit": check_jit,
    "grad": check_value_and_grad_of_a_loss,
    "vmap0": functools.partial(check_vmap, axis=0),
    "vmap-2": functools.partial(check_vmap, axis=-2),
    "vmap-1": functools.partial(check_vmap, axis=-1),
    "vmap(vmap)": check_vmap_of_vmap,
    "vmap_weights": check_vmap_weights_batched,
    "vmap(grad)": check_vmap_of_grad,
    "grad(vmap)": check_grad_of_vmap,
    "scan": check_scan,
    "loops": check_loops,
    "checkpoint": check_checkpoint,
    "pmap": check_pmap,
    "shard_map_vma": functools.partial(check_shard_map, check_vma=True),
    "shard_map_novma": functools.partial(check_shard_map, check_vma=False),
    "grad_inside_shard_map": check_grad_inside_shard_map,
    "wrong_out_specs": check_vma_refuses_wrong_out_specs,
    "donation": check_donation,
    "jvp": check_jvp_is_refused,
    "threads": check_threads,
    "named_scope": check_named_scope,
    "promotion": check_strict_promotion_and_x64,
    "views": check_transposed_and_sliced_inputs,
}
