"""Every version-dependent JAX name, in one place. Supported: jax 0.10.2 and newer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax import core
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


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
    """The mesh in the type of a value when it has Explicit axes, else None; that of ``jax.set_mesh`` for a value on no mesh."""
    mesh = aval.sharding.mesh
    mesh = context_mesh() if mesh.empty else mesh
    return None if mesh.empty or AxisType.Explicit not in mesh.axis_types else mesh


def context_mesh() -> Any:
    """The abstract mesh of ``jax.set_mesh``, empty outside."""
    return jax.sharding.get_abstract_mesh()


def named_shardings(arguments: Sequence[Any], context: Any) -> list[NamedSharding]:
    """The shardings of the arguments of a custom_partitioning callback, on one mesh.

    jax names them by the mesh of the program's arrays. Under ``jax.set_mesh`` a program may have none: all its arguments are on one
    device, and a sharding constraint is by the mesh of the context. jax then hands over tiles of devices, which are read off here.
    """
    found = [a.sharding for a in arguments]
    if all(isinstance(s, NamedSharding) for s in found):
        return found
    devices = np.array(list(_tiles(found[0], arguments[0].ndim)))
    mesh = Mesh(devices, ("devices",))
    if context.size == devices.size:
        mesh = Mesh(devices.reshape(context.axis_sizes), context.axis_names)
    return [_on_mesh(s, mesh, a.ndim) for s, a in zip(found, arguments, strict=True)]


def _tiles(sharding: Any, ndim: int) -> dict[Any, tuple[slice, ...]]:
    """The devices in their order, each with its part of an array of dims that any tiling divides."""
    return sharding.devices_indices_map((len(sharding.device_set),) * ndim)


def _on_mesh(sharding: Any, mesh: Mesh, ndim: int) -> NamedSharding:
    """The same sharding by axes of the mesh; replicated where the mesh cannot say it."""
    tiles = _tiles(sharding, ndim)
    starts = np.array([[s.start or 0 for s in tiles[d]] for d in mesh.devices.flat]).reshape(*mesh.devices.shape, ndim)
    by_dim: list[list[tuple[int, str]]] = [[] for _ in range(ndim)]
    for i, name in enumerate(mesh.axis_names):
        neighbour = tuple(int(j == i and size > 1) for j, size in enumerate(mesh.devices.shape))
        step = starts[neighbour]  # what one device along this axis alone is ahead by
        for dim in np.flatnonzero(step)[:1]:
            by_dim[dim].append((int(step[dim]), name))
    entries = [tuple(name for _, name in sorted(axes, reverse=True)) or None for axes in by_dim]
    named = NamedSharding(mesh, PartitionSpec(*entries))
    return named if named.is_equivalent_to(sharding, ndim) else NamedSharding(mesh, PartitionSpec())


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
