"""Kernel cases (docs/kernel-case.md): a launch of each code object with inputs and expected outputs, for tools/run_case.py."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .._compile.code_object import CodeObject
from ..errors import value_error
from ..kernels.configs import Launch, Problem
from . import elf, families, families_cache, families_groups, families_heads, families_ranks
from .families import Case, Fill, Kernel, Output, Retry
from .instances import Instance
from .oracle import dtype

FAMILIES = (families, families_heads, families_groups, families_cache, families_ranks)
KERNELS: dict[str, Kernel] = {name: kernel for family in FAMILIES for name, kernel in family.KERNELS.items()}
FORMAT = "kernel-case/1"
FOLDER = "cases"
MOST_ROWS, PROGRAMS = 7, 2
ROLES = (
    "x",
    "residual",
    "weight",
    "bias",
    "x_bias",
    "smooth_scale",
    "y",
    "residual_out",
    "values",
    "scale",
    "mean",
    "rstd",
)
SCALARS = {"i32": "int32", "i64": "int64", "fp32": "float32"}


def write(
    out: Path,
    made: dict[str, tuple[Instance, CodeObject]],
    step: Callable[[int, int], None] = lambda done, total: None,
) -> list[Path]:
    """A case for each code object of :func:`directory.make`, in ``out/cases``; the JSON files. ``step`` gets the progress.

    Raises:
      ValueError: a kernel that ``families`` has no entry for.
    """
    folder = out / FOLDER
    folder.mkdir(exist_ok=True)
    written = []
    for done, (key, (instance, code)) in enumerate(made.items(), 1):
        stem = f"{instance.stage.call.op}_{code.name}_{key[:10]}"
        image = folder / f"{code.name}_{key[:10]}.{code.target}.{'hsaco' if code.is_hip else 'cubin'}"
        image.write_bytes(code.image)
        kernel = _kernel(instance)
        for what, fill in (("", kernel.fill), *((f"_{what}", fill) for what, fill in kernel.more)):
            path = folder / f"{stem}{what}.{code.target}.json"
            written.append(write_case(path, case(instance, fill=fill), code, image.name, instance.stage.backend))
        step(done, len(made))
    return written


def _kernel(instance: Instance) -> Kernel:
    name = instance.launch.kernel
    if name not in KERNELS:
        raise value_error("aot", "--bundle", f"kernel {name}", "one that jaxnorm/_aot/families.py has an entry for")
    return KERNELS[name]


def case(instance: Instance, rows: int = 0, fill: Fill | None = None) -> Case:
    """The data of one launch with few rows: a block's worth and a bit, at most seven. ``fill``: not that of the kernel."""
    kernel = _kernel(instance)
    if kernel.shrink is not None:
        problem, launch = kernel.shrink(instance.problem, instance.launch)
        scalars = {name: value for name, _, value in launch.scalars}
    elif kernel.as_planned:
        problem, launch = instance.problem, instance.launch
        scalars = {name: value for name, _, value in launch.scalars}
    else:
        constants = dict(instance.launch.constants)
        problem = instance.stage.problem(rows or min(MOST_ROWS, max(3, kernel.block_rows(constants) + 1)))
        launch, scalars = resized(instance, kernel, problem)
    launch = replace(launch, meeting=max(launch.meeting, 0))  # alone, what stands in is a launch like any other
    plan = instance.stage.plan(instance.rows)
    scratch = {name: (shape, kind) for step in plan for name, shape, kind in step.temps}
    for seed in range(20):
        made = Case(
            problem, launch, np.random.default_rng([20260, problem.features, seed]), scalars=scalars, scratch=scratch
        )
        try:
            (fill or kernel.fill)(made)
            return made
        except Retry:
            continue
    raise AssertionError(f"{launch.kernel}: no data away from the boundaries of exponents")


def resized(instance: Instance, kernel: Kernel, problem: Problem) -> tuple[Launch, dict[str, int | float]]:
    """The launch of an instance for the rows of ``problem``, and its scalars by name."""
    launch, old = instance.launch, instance.problem
    if kernel.programs is None and not _covers(launch, kernel, old):
        raise AssertionError(
            f"{launch.kernel}: the grid is not that of its rows a block; families.py is wrong about it"
        )
    known = {"rows": problem.rows, "M": problem.rows}
    if problem.has("scale"):
        known |= {"scale_rows": problem.shape("scale")[0], "R": _scale_rows(problem)}
    scalars: dict[str, int | float] = {}
    for name, _, value in launch.scalars:
        count = min(int(value), PROGRAMS) if name in ("programs", "PROGRAMS") else known.get(name, value)
        scalars[name] = 0 if name == "scale_rows" and value == 0 else count
    programs = int(scalars.get("programs", scalars.get("PROGRAMS", 1)))
    grid, temps = list(launch.grid), launch.temps
    if kernel.programs is None:
        covered = int(scalars.get("R", problem.rows) or 0)
        grid = [-(-covered // kernel.block_rows(dict(launch.constants))), 1, 1]
        temps = tuple((n, (problem.rows, *s[1:]) if s[0] == old.rows else s, k) for n, s, k in temps)
    elif kernel.programs >= 0:
        before = grid[kernel.programs]
        grid[kernel.programs] = programs
        temps = tuple((n, (programs, *s[1:]) if s[0] == before else s, k) for n, s, k in temps)
    values = tuple((n, k, scalars[n]) for n, k, _ in launch.scalars)
    return replace(launch, grid=(grid[0], grid[1], grid[2]), temps=temps, scalars=values), scalars


def _covers(launch: Launch, kernel: Kernel, problem: Problem) -> bool:
    covered = int({n: v for n, _, v in launch.scalars}.get("R", problem.rows))
    constants = dict(launch.constants)
    blocks = -(-covered // kernel.block_rows(constants))
    if walking := int(
        constants.get("JN_BLOCKS", 0)
    ):  # so many blocks walk over the rows; fewer do where there are fewer rows
        return launch.grid[:2] == (walking, 1)
    return blocks <= launch.grid[0] * launch.grid[1] < blocks + launch.grid[0] or launch.grid[:2] == (blocks, 1)


def _scale_rows(problem: Problem) -> int:
    shuffled = dict(problem.options)["spec"].scale_layout == "shuffled"
    return problem.shape("scale")[0] if shuffled else problem.rows


def write_case(path: Path, made: Case, code: CodeObject, image: str, source: str) -> Path:
    """The JSON file and the npz file beside it."""
    arrays: dict[str, np.ndarray] = {}
    arguments = [_input(made, name, arrays) for name in made.launch.inputs]
    if not made.tail:
        arguments += [_scalar(name, SCALARS[kind], value) for name, kind, value in made.launch.scalars]
    arguments += [_output(made, name, arrays) for name in made.launch.outputs]
    arguments += [_stored_arrays(argument, "", arrays) for argument in made.tail]
    head: dict[str, Any] = {
        "format": FORMAT,
        "kernel": code.name,
        "code_object": image,
        "target": code.target,
        "source": source,
        "note": f"{made.launch.kernel}, {made.problem.rows} rows of {made.problem.features}, {code.compiler}",
        "grid": list(made.launch.grid),
        "block": [code.threads, 1, 1],
        "shared": code.shared,
    }
    if made.launch.meeting > 0:
        head["together"] = True
    if (op := _checkable(made)) is not None:
        head |= {"op": op, "params": made.params}
    path.write_text(json.dumps(head | {"args": arguments}, indent=1) + "\n")
    np.savez(path.with_suffix(".npz"), **arrays)  # type: ignore[arg-type]
    return path


def _checkable(made: Case) -> str | None:
    """The op whose name and params let others compute the expected values themselves."""
    stage, spec = made.problem.stage, made.option("spec")
    if stage.endswith("_bwd") or not stage.startswith(("rmsnorm", "layernorm")):
        return None
    if spec is not None and (spec.scale_dtype != "float32" or spec.scale_layout != "row" or spec.scale_ub is not None
                             or made.reads("static_scale")):  # fmt: skip
        return None
    return stage.split("_")[0]


def _stored(a: np.ndarray) -> np.ndarray:
    """As the npz holds it: bits for the dtypes that numpy has not."""
    return np.ascontiguousarray(a).view({1: np.uint8, 2: np.uint16}[a.dtype.itemsize]) if a.dtype.kind == "V" or (
        a.dtype.name.startswith(("bfloat", "float8"))
    ) else a  # fmt: skip


def _stored_arrays(argument: dict[str, Any], prefix: str, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """A ready argument with names for its arrays, which go into the npz."""
    name, found = f"{prefix}{argument.get('name', '')}", {}
    for key, value in argument.items():
        if isinstance(value, np.ndarray):
            arrays[f"{name}_{key}"] = _stored(value)
            value = f"{name}_{key}"
        elif key in ("to", "parts"):
            value = [_stored_arrays(v, f"{name}_", arrays) for v in value]
        found[key] = value
    return found


def _buffer(name: str, a: np.ndarray) -> dict[str, Any]:
    role = {"role": name} if name in ROLES else {}
    return {"name": name, **role, "dtype": a.dtype.name, "shape": list(a.shape)}


def _input(made: Case, name: str, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    if name not in made.inputs:
        return {"name": name, "kind": "null"}
    arrays[name] = _stored(made.inputs[name])
    return {**_buffer(name, made.inputs[name]), "kind": "in", "data": name}


def _scalar(name: str, kind: str, value: int | float) -> dict[str, Any]:
    exact = f"0x{np.float32(value).view(np.uint32):08x}" if kind == "float32" else int(value)
    return {"name": name, "kind": "scalar", "dtype": kind, "value": exact}


def _output(made: Case, name: str, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    if not made.writes(name):
        return {"name": name, "kind": "null"}
    if name not in made.outputs and name in made.temps:
        shape, kind = made.temps[name]
        return {"name": name, "kind": "scratch", "dtype": kind, "shape": list(shape)}
    if name not in made.outputs:
        raise AssertionError(f"{made.launch.kernel}: families.py says nothing about the output {name}")
    out: Output = made.outputs[name]
    arrays[f"{name}_expected"] = _stored(out.values)
    entry = {**_buffer(name, out.values), "kind": "out", "expect": f"{name}_expected"}
    if out.before is not None:
        arrays[f"{name}_before"] = _stored(out.before)
        entry |= {"kind": "inout", "data": f"{name}_before"}
    for key in ("ignore", "written"):
        if (mask := getattr(out, key)) is not None:
            arrays[f"{name}_{key}"] = mask
            entry[key] = f"{name}_{key}"
    return entry | ({"compare": out.compare} if out.compare else {})


def check(out: Path) -> list[str]:
    """What is wrong with the kernel cases of a directory: missing files, arrays of another dtype or shape, other targets."""
    wrong = []
    for path in sorted((out / FOLDER).glob("*.json")):
        try:
            _check_case(path)
        except (OSError, ValueError, KeyError) as e:
            wrong.append(f"{path.relative_to(out)}: {e}")
    return wrong


def _described(arguments: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Arguments, the buffers of structs of pointers and the parts of buffers: whatever names arrays."""
    for argument in arguments:
        yield argument
        yield from _described((*argument.get("to", ()), *argument.get("parts", ())))


def _check_case(path: Path) -> None:
    head = json.loads(path.read_text())
    if head["format"] != FORMAT:
        raise ValueError(f"format {head['format']!r}")
    found = elf.target((path.parent / head["code_object"]).read_bytes())
    if found != head["target"]:
        raise ValueError(f"{head['code_object']} is for {found}, not {head['target']}")
    with np.load(path.with_suffix(".npz")) as arrays:
        for argument in _described(head["args"]):
            for key in ("data", "expect", "ignore", "written"):
                if key not in argument:
                    continue
                a, size = (
                    arrays[argument[key]],
                    1 if key in ("ignore", "written") else dtype(argument["dtype"]).itemsize,
                )
                if list(a.shape) != argument["shape"] or a.dtype.itemsize != size:
                    raise ValueError(f"array {argument[key]} is {a.dtype}{a.shape}")
