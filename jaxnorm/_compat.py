"""Every version-dependent JAX name, in one place. Supported: jax 0.10.2 and newer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax import core
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def user_context(default: Any) -> Any:
    """A context value that is part of the key of ``jax.jit``'s cache: callable as a context manager, read through ``.value``."""
    return jax.make_user_context(default)


def varying(aval: Any) -> frozenset[str]:
    """The manual mesh axes over which a value differs between devices (``check_vma``)."""
    manual = getattr(aval, "manual_axis_type", None)  # jax >= 0.11
    axes = getattr(manual, "varying", None)
    return frozenset(getattr(aval, "vma", ()) if axes is None else axes)


def match_varying(arrays: Sequence[Any]) -> list[Any]:
    """Make all arrays (None stays None) vary over the same manual axes.

    The transpose of the cast is the psum of a replicated weight's gradient.
    """
    axes = frozenset().union(*(varying(jax.typeof(a)) for a in arrays if a is not None))
    return [_vary(a, axes) for a in arrays]


def _vary(a: jax.Array | None, axes: Iterable[str]) -> jax.Array | None:
    if a is None:
        return None
    missing = tuple(sorted(frozenset(axes) - varying(jax.typeof(a))))
    return jax.lax.pcast(a, missing, to="varying") if missing else a


def like(aval: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """An abstract value of another shape and dtype on the mesh of ``aval``, varying over the same manual axes.

    Built by ``update``: a bare ShapedArray would lose the varying axes, and ``shard_map`` would then accept a wrong out_specs.
    """
    replicated = NamedSharding(aval.sharding.mesh, PartitionSpec(*[None] * len(shape)))
    return aval.update(shape=shape, dtype=dtype, weak_type=False, sharding=replicated)


def plain(aval: Any) -> Any:
    """Shape and dtype alone, for tracing what stands behind a lowering rule."""
    return core.ShapedArray(aval.shape, aval.dtype)


def manual_axes() -> frozenset[str]:
    """Mesh axes that are manual here: inside ``shard_map`` or ``pmap``."""
    mesh = jax.sharding.get_abstract_mesh()
    return frozenset() if mesh.empty else frozenset(mesh.manual_axes)


def explicit_mesh(aval: Any) -> Any | None:
    """The mesh in the type of a value when it has Explicit axes, else None."""
    mesh = aval.sharding.mesh
    return None if mesh.empty or AxisType.Explicit not in mesh.axis_types else mesh


def _names(axis: str | tuple[str, ...]) -> tuple[str, ...]:
    return axis if isinstance(axis, tuple) else (axis,)


def tracks_varying(axis: str | tuple[str, ...]) -> bool:
    """Whether types say over which manual axes a value differs (``check_vma``): the index along an axis then does over it."""
    name = _names(axis)[0]
    return name in varying(jax.typeof(jax.lax.axis_index(name)))


def varies_over(a: jax.Array, axis: str | tuple[str, ...]) -> bool:
    """Whether the type of ``a`` says that it differs along ``axis``."""
    return bool(varying(jax.typeof(a)) & set(_names(axis)))


def vary_over(a: jax.Array, axis: str | tuple[str, ...]) -> jax.Array:
    """``a`` typed as different along ``axis``, as collectives want it under ``check_vma``; unchanged without."""
    return _vary(a, _names(axis)) if tracks_varying(axis) else a  # type: ignore[return-value]


def all_gather_equal(a: jax.Array, axis: str | tuple[str, ...], *, tiled: bool) -> jax.Array:
    """``lax.all_gather`` along dim 0 whose result is typed as equal on all ranks, so that ``out_specs=P()`` takes it."""
    if not tracks_varying(axis):
        return jax.lax.all_gather(a, axis, tiled=tiled)
    return jax.lax.all_gather(vary_over(a, axis), axis, tiled=tiled, to="invarying")


def lowered_mesh(context: Any) -> Any | None:
    """The mesh, with its devices, that a lowering rule inside ``shard_map`` or ``pmap`` lowers for; None where it is abstract.

    An exported program must not depend on devices, so there is none either.
    """
    if getattr(context.lowering_parameters, "for_export", False):
        return None
    mesh = getattr(context.axis_context, "mesh", None)
    return mesh if isinstance(mesh, jax.sharding.Mesh) else None
