"""Measures cases with every contestant: built, checked against the plain form in float32, timed in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from . import programs, store, timing
from .ops import OPS, Case, input_types, inputs

FORMAT = "jaxnorm-bench-run/1"
PLAIN, COPY = "plain", "copy"
TOLERANCE = {"bfloat16": 8e-3, "float16": 2e-3, "float32": 5e-5}
"""Largest relative distance from the plain form in float32: two roundings of the dtype still pass."""
CODES_TOLERANCE = 0.25
"""The same for quantised results, between what the codes stand for and float32: MXFP4 has 1 mantissa bit."""


class DeviceLost(Exception):
    """A contestant left the device unusable for this process; the text says which. Its case holds a note, so that the next run
    does without it."""


def contestants(backends: Sequence[str]) -> list[str]:
    """Names in a record: ours by backend, ``auto`` for no backend named, and the plain form."""
    return [*backends, PLAIN]


def measure(
    case: Case, backends: Sequence[str], timer: timing.Timer, notes: dict[str, dict[str, Any]] | None = None
) -> dict[str, Any]:
    """One case; what fails is recorded beside what worked.

    Args:
      notes: filled with what is known of each contestant, also where this raises; one that is noted already is left out.

    Raises:
      DeviceLost: a contestant took the device down.
    """
    start = time.perf_counter()
    notes = {} if notes is None else notes
    op, spec = OPS[case.op], case.quant_spec()
    nbytes_in = programs.nbytes(input_types(case))
    count, _ = timing.rotation(nbytes_in)
    sets = inputs(case, count)
    usual = op.usual(spec)
    drawn = cotangents(jax.eval_shape(op.ours("xla", spec), *sets[0]), count) if op.gradients else []
    nbytes = traffic(case)
    built: list[timing.Program] = []

    def failed(name: str, error: BaseException) -> None:
        entry = notes.setdefault(name, {})
        entry["error"] = f"{type(error).__name__}: {error}"[:400]
        if timing.is_fatal(error):
            entry["lost_the_device"] = True
            raise DeviceLost(f"{name} in {case.key}: {entry['error']}")

    for index, name in enumerate(n for n in contestants(backends) if n not in notes):
        if name == PLAIN and case.spec and case.quant_spec().scale_dtype != "float32":
            notes[name] = {"skipped": "nobody writes this format in plain jax.numpy"}
            continue
        f = usual if name == PLAIN else op.ours(None if name == "auto" else name, spec)
        try:
            if op.gradients:
                program = programs.backward(name, f, sets, drawn, op.gradients, recompute=name in (PLAIN, "xla"))
            else:
                program = programs.forward(name, f, sets)
            i = index % count  # each on another input set: what an earlier one left in memory is not its answer
            got = jax.block_until_ready(program.calls[i]())
            notes[name] = _verdict(op, case, got, sets[i], drawn[i] if op.gradients else None)
            built.append(program)
        except Exception as error:
            failed(name, error)
    timed = timing.measure(timer, [programs.copy(nbytes, count, COPY), *built], nbytes, nbytes_in, failed)
    copied = timed.pop(COPY, None)
    for name, summary in timed.items():
        notes[name] = {**summary, **notes.get(name, {})}
    return {
        **blank(case, timer), "bytes": nbytes, "copy_us": copied["median_us"] if copied else None, "contestants": notes,
        "clocks": store.clocks(), "seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip


def blank(case: Case, timer: timing.Timer) -> dict[str, Any]:
    """The record of a case of which nothing is known yet."""
    return {
        "op": case.op, "shape": list(case.shape), "dtype": case.dtype, "spec": case.spec, "bytes": traffic(case),
        "copy_us": None, "contestants": {}, "timer": timer.name, "method": timer.method, "clocks": {}, "seconds": 0.0,
    }  # fmt: skip


def cotangents(out: Any, count: int) -> list[Any]:
    key = jax.random.key(1, impl="rbg")
    leaves, tree = jax.tree.flatten(out)
    draw = jax.jit(
        lambda k: [jax.random.normal(jax.random.fold_in(k, i), a.shape, a.dtype) for i, a in enumerate(leaves)]
    )
    return [jax.tree.unflatten(tree, draw(jax.random.fold_in(key, i))) for i in range(count)]


def traffic(case: Case) -> int:
    """Least bytes a call must move: each input read once, each output written once. Backward: what the forward saves, the
    cotangents and the gradients."""
    op = OPS[case.op]
    f, arguments = op.ours("xla", case.quant_spec()), input_types(case)
    out = jax.eval_shape(f, *arguments)
    if not op.gradients:
        return programs.nbytes(arguments) + programs.nbytes(out)
    saved = jax.eval_shape(lambda *a: jax.vjp(f, *a)[1], *arguments)
    return programs.nbytes(saved) + programs.nbytes(out) + sum(programs.nbytes(arguments[i]) for i in op.gradients)


def _verdict(op: Any, case: Case, got: Any, arguments: tuple[Any, ...], cotangent: Any) -> dict[str, Any]:
    wide = jax.tree.map(lambda a: a.astype(jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a, arguments)
    if op.quantises:
        # Quantised: what the codes stand for, against the float32 values that were quantised.
        values = jax.tree.leaves(got, is_leaf=lambda leaf: hasattr(leaf, "dequantize"))[0]
        if not hasattr(values, "dequantize"):  # the plain form: codes, scales
            codes, scale = jax.tree.leaves(got)[:2]
            grouped = codes.astype(jnp.float32).reshape(*scale.shape, -1) * scale[..., None]
            values = grouped.reshape(codes.shape)
        base = OPS[op.name.removesuffix("_quant")].plain(*wide) if op.name != "quantize" else wide[0]
        want, got, bound = jax.tree.leaves(base)[0], values, CODES_TOLERANCE
    elif op.gradients:
        cotangent = jax.tree.map(lambda a: a.astype(jnp.float32), cotangent)
        gradients = jax.vjp(op.plain, *wide)[1](cotangent)
        want, bound = tuple(gradients[i] for i in op.gradients), TOLERANCE[case.dtype]
    else:
        want, bound = op.plain(*wide), TOLERANCE[case.dtype]
    error = programs.distance(got, want)
    return {"distance": float(f"{error:.3g}"), "right": error <= bound}


def run(
    cases: Sequence[Case],
    backends: Sequence[str],
    timer: timing.Timer,
    results: dict[str, Any],
    save: Callable[[dict[str, Any]], None],
    seconds: float,
    step: Callable[[Case | None, dict[str, Any] | None], None],
) -> int:
    """Measures what is not in ``results`` yet and saves after each case; the number of cases left when the time was over.

    Args:
      seconds: no case is begun that would probably end later, after the first.
      step: called with a case before it, and with its record after it.
    """
    started, longest = time.monotonic(), 0.0
    todo = [c for c in cases if not done(results, c, backends)]
    for i, case in enumerate(todo):
        if i and time.monotonic() - started + longest > seconds:
            return len(todo) - i
        begin = time.monotonic()
        step(case, None)
        before = results["cases"].get(case.key, {}).get("contestants", {})
        notes = {n: c for n, c in before.items() if "lost_the_device" in c}
        try:
            record = measure(case, backends, timer, notes)
        except DeviceLost:
            results["cases"][case.key] = {**blank(case, timer), "contestants": {**before, **notes}}
            save(results)
            raise
        except Exception as error:  # the inputs do not fit, for one
            record = {
                **blank(case, timer),
                "contestants": {"case": {"error": f"{type(error).__name__}: {error}"[:400]}},
            }
        record["contestants"] = {
            **{k: v for k, v in before.items() if k not in record["contestants"]},
            **record["contestants"],
        }
        results["cases"][case.key] = record
        save(results)
        step(case, record)
        longest = max(longest, time.monotonic() - begin)
    return 0


def done(results: dict[str, Any], case: Case, backends: Sequence[str]) -> bool:
    """Whether the file has times, or a reason for none, of all that is asked for."""
    record = results["cases"].get(case.key)
    return record is not None and all(
        {"median_us", "skipped", "lost_the_device"} & set(record["contestants"].get(n, {}))
        for n in contestants(backends)
    )
