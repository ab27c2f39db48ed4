"""Distributed calls ahead of time: what is compiled for them, and the kernel cases of one rank, run on the CPU by run_case.py."""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import needs
import numpy as np
import pytest
import simt_build
import simt_ranks
from jax.sharding import PartitionSpec as P

import jaxnorm
from jaxnorm import _native, distributed
from jaxnorm._aot import bundle, families_ranks, instances, release, spec
from jaxnorm._aot.instances import Instance
from jaxnorm._compile import cache, hip
from jaxnorm._compile.code_object import CodeObject
from jaxnorm._explain import Choice

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))
import kernel_case
import run_case

SCALARS = ("half_bytes", "patience", "rows", "share", "rank", "signature", "blocks")


class Emulated:
    """A driver for run_case.py whose launches run one rank of the distributed kernels on the CPU."""

    def __init__(self, library: ctypes.CDLL, index: int) -> None:
        self.library, self.index, self.maps = library, index, {}

    def load(self, image: bytes, name: str, shared: int) -> tuple[None, None]:
        return None, None

    def unload(self, module: None) -> None:
        pass

    def allocate(self, size: int) -> int:
        memory = mmap.mmap(-1, size)  # shared: the kernel runs in a child process
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self.maps[address] = memory
        return address

    def free(self, address: int) -> None:
        del self.maps[address]

    def upload(self, address: int, data: np.ndarray) -> None:
        ctypes.memmove(address, data.ctypes.data, data.nbytes)

    def download(self, data: np.ndarray, address: int) -> None:
        ctypes.memmove(data.ctypes.data, address, data.nbytes)

    def launch(self, function: None, grid: list[int], block: list[int], shared: int, values: list) -> None:
        a = simt_ranks.Args(index=self.index, threads=block[0], bytes=shared)
        for i in range(6):
            a.buffer[i] = values[i][0]
        for d in range(8):
            a.peers[d] = values[6][d]
        a.error = values[7][0]
        for name, value in zip(SCALARS, values[8:], strict=False):
            setattr(a, name, int.from_bytes(value.raw, "little"))
        assert a.blocks == grid[0]
        status = self.library.ranks_run(1, 1, ctypes.byref(a), 60)
        assert status == 0, f"it ended with status {status} (-14: it hung)"


def fused(target: str) -> list[Instance]:
    """The fused kernels of a release bundle."""
    found: dict[str, Instance] = {}
    for call in release.calls():
        if call.ranks:
            for stage in instances.stages(call, target, compilers=False):
                found |= instances.instances(stage, call.counts)
    return [i for i in found.values() if i.launch.kernel == families_ranks.KERNEL]


def check(chosen: list[Instance], target: str, folder: Path) -> None:
    needs.need("gxx", not simt_build.missing(), simt_build.missing())
    library = simt_ranks.build(target, [i.launch for i in chosen])
    wrong = []
    for index, instance in enumerate(chosen):
        code = CodeObject(b"\x7fELF", "rank_norm_fwd", target, instance.launch.threads, instance.launch.shared, "")
        (folder / "code").write_bytes(code.image)
        for what, fill in (("all", families_ranks.rank_norm), ("alone", families_ranks.rank_norm_alone)):
            path = folder / f"{index}_{what}.json"
            bundle.write_case(path, bundle.case(instance, fill=fill), code, "code", "hip")
            case, arrays = kernel_case.load(path)
            wrong += [f"{path.stem}: {text}" for text in run_case.run(Emulated(library, index), path, case, arrays)]
    assert wrong == []


def test_one_rank_agrees_with_its_cases(tmp_path: Path) -> None:
    """One shot and two, codes and values, a residual that every rank has, one that is sharded and none; a rank that stays away."""
    kinds = {("one-shot", False, True), ("two-shot", True, True), ("two-shot", False, False)}
    found = {}
    for i in fused("sm_90"):
        p = i.problem
        kind = p.option("schedule"), p.option("replicated"), p.option("spec") is not None
        found.setdefault(kind, i)
    check([found[kind] for kind in sorted(kinds)], "sm_90", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["gfx942", "sm_90"])
def test_all_cases_of_one_rank(target: str, tmp_path: Path) -> None:
    check(fused(target), target, tmp_path)


CALL = {"op": "allreduce_add_rmsnorm", "ranks": 2,
        "args": {"x": "bfloat16[..., 512]", "residual": "bfloat16[..., 512]", "weight": "bfloat16[512]"}}  # fmt: skip


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({k: v for k, v in CALL.items() if k != "ranks"}, ("calls[0].ranks", "got 0", "from 2 up")),
        (CALL | {"ranks": 1}, ("calls[0].ranks", "got 1")),
        (CALL | {"op": "add_rmsnorm"}, ("calls[0].ranks", "add_rmsnorm is no distributed call")),
    ],
)
def test_a_wrong_number_of_ranks_is_explained(entry: dict, words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as raised:
        spec.parse([entry])
    assert all(word in str(raised.value) for word in words), raised.value


def test_a_fused_call_is_served_without_a_compiler(monkeypatch, tmp_path: Path) -> None:
    """From what was shipped for its number of ranks, at every number of rows; with other ranks it is the composite."""
    (call,) = spec.parse([CALL])
    for stage in instances.stages(call, "sm_90", compilers=False):
        for i in instances.instances(stage).values():
            cache.ship(tmp_path, i.parts, CodeObject(b"\x7fELF", "kernel", "sm_90", 128, 0, ""))
    monkeypatch.setenv("JAXNORM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(hip, "available", lambda target: (False, "no compiler.", ""))
    monkeypatch.setattr(_native, "fused_library", lambda: object())
    cache.clear_memory()

    def explained(ranks: int, rows: int) -> Choice:
        mesh = jax.sharding.AbstractMesh((ranks,), ("tp",))
        f = jax.shard_map(lambda x, w: distributed.allreduce_add_rmsnorm(x, x, w, axis_name="tp", impl="fused"), mesh=mesh,
                          in_specs=P(), out_specs=P(), check_vma=False)  # fmt: skip
        with jaxnorm.use_target({"cuda": "sm_90"}):
            return jaxnorm.explain(f, *(jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((rows, 512), (512,))))[0]

    assert {explained(2, rows).backend for rows in (1, 100, 5000, 70000)} == {"fused"}
    with pytest.warns(RuntimeWarning, match="holds precompiled kernels, but not that of this call"):
        assert explained(4, 100).backend == "composite"
