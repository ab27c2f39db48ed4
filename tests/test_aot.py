"""``jaxnorm aot``: which code objects a call needs, the directory that serves them where no compiler is, and its check."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import needs
import pytest
from jaxnorm.kernels.configs import rmsnorm_hip

from jaxnorm import _native, cli
from jaxnorm._aot import directory, elf, instances, models, spec, workers
from jaxnorm._compile import cache, hip
from jaxnorm.errors import CompileError

ROOT = Path(__file__).resolve().parents[1]
NORM = {"op": "rmsnorm", "args": {"x": "bfloat16[..., 1024]", "weight": "bfloat16[1024]"}}
ADDED = {"op": "add_rmsnorm_quant", "args": {"x": "bfloat16[..., 512]", "residual": "bfloat16[..., 512]", "weight": None},
         "options": {"spec": {"dtype": "fp8"}}}  # fmt: skip
TARGETS = ("gfx942", "gfx1100")


def need_clang() -> None:
    needs.need(
        "clang", hip.find("gfx942") is not None, f"set {hip.CLANG_VARIABLE}; python tools/rocm_clang.py DIR makes one"
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A directory for two targets, made by the command line from a TOML file."""
    need_clang()
    pytest.importorskip("typer")
    folder = tmp_path_factory.mktemp("aot")
    text = "".join(f"[[calls]]\nop = {c['op']!r}\nargs = {_toml(c['args'])}\n{_options(c)}\n" for c in (NORM, ADDED))
    (folder / "calls.toml").write_text(text)
    assert cli.main(["aot", *_targets(), "--spec", str(folder / "calls.toml"), "--out", str(folder / "out")]) == 0
    return folder / "out"


def _targets() -> list[str]:
    return [part for t in TARGETS for part in ("--target", t)]


def _toml(values: dict) -> str:
    return "{ " + ", ".join(f"{k} = {v!r}" for k, v in values.items() if v is not None) + " }"


def _options(call: dict) -> str:
    return f"options = {{ spec = {_toml(call['options']['spec'])} }}" if "options" in call else ""


# Instances


@pytest.mark.parametrize("name", ["rmsnorm", "grad"])
def test_every_number_of_rows_is_covered(name: str) -> None:
    """Against planning each number of rows: no code object is missing at any of a thousand."""
    args = {"x": "bfloat16[..., 4096]", "weight": "float32[4096]"}
    (call,) = spec.parse([{"op": "rmsnorm", "args": args, "grad": name == "grad", "backend": "hip"}])
    for stage in instances.stages(call, "gfx942", compilers=False):
        found = instances.instances(stage)
        for rows in (*range(1, 700, 7), *(round(1.13**k) for k in range(40, 130))):
            for launch in rmsnorm_hip.plan(stage.problem(rows)):
                assert instances.Instance(stage, rows, launch).key in found, (rows, launch)


def test_fp8_is_each_targets_own() -> None:
    (call,) = spec.parse([ADDED])
    names = {}
    for target in ("gfx942", "gfx950"):
        (stage,) = instances.stages(call, target, compilers=False)
        names[target] = stage.call.option("spec").dtype
    assert names == {"gfx942": "float8_e4m3fnuz", "gfx950": "float8_e4m3fn"}


def test_positions_of_64_bits_stay_so() -> None:
    args = {"x": ["bfloat16[..., 4, 64]"], "positions": "int64[...]", "cos_sin": "float32[32, 64]"}
    (call,) = spec.parse([{"op": "rope", "args": args, "backend": "hip"}])
    (stage,) = instances.stages(call, "gfx942", compilers=False)
    assert stage.problem(3).dtype("positions") == "int64"


@pytest.mark.parametrize("target", ["gfx803", "gfx9999", "sm_70", "sm_90a", "cpu", ""])
def test_a_target_that_no_kernel_is_for_is_refused(target: str) -> None:
    with pytest.raises(
        ValueError, match=r"aot: --target: got .*expected one of gfx90a, gfx942, gfx950, gfx1100, or sm_80"
    ):
        directory.plan(spec.parse([NORM]), [target])


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"op": "rmsnrom"}, ("calls[0].op", "'rmsnrom'", "rmsnorm")),
        (NORM | {"colour": 1}, ("calls[0]", "colour", "args, options")),
        (NORM | {"args": {"x": "bfloat16(3, 4)"}}, ("rmsnorm.args.x", "bfloat16[..., 4096]")),
        (NORM | {"args": {"x": "bfloat17[3, 4]"}}, ("rmsnorm.args.x", "bfloat17")),
        (NORM | {"backend": "cuda"}, ("calls[0].backend", "'hip' or 'triton'")),
        (NORM | {"rows": [0]}, ("calls[0].rows", "positive")),
        (ADDED | {"options": {"spec": "fp8"}}, ("options.spec", "QuantSpec")),
    ],
)
def test_a_wrong_call_is_explained(entry: dict, words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as raised:
        spec.parse([entry])
    assert all(word in str(raised.value) for word in words), raised.value


@pytest.mark.parametrize("name", models.MODELS)
def test_models_name_calls_that_exist(name: str) -> None:
    calls = models.calls(name, ("int8", "fp4"), grad=True)
    assert {"rmsnorm", "add_rmsnorm", "rmsnorm_quant", "add_rmsnorm_quant"} <= {c.op for c in calls}
    assert calls == spec.parse([c.to_json() for c in calls])


def test_models_are_those_of_the_workloads() -> None:
    import cases

    known = {w.name: w for w in cases.MODELS}
    for name, model in models.MODELS.items():
        work = known[name]
        assert (model.features, model.eps, model.weight_offset, model.cast, model.weight, model.pad_to_multiple) == (
            work.features, work.eps, work.weight_offset, work.cast, work.weight_dtype, work.pad_to_multiple), name  # fmt: skip


# The directory


@pytest.mark.compile
def test_manifest_says_what_is_there(made: Path) -> None:
    manifest = json.loads((made / "manifest.json").read_text())
    assert manifest["targets"] == list(TARGETS)
    assert {s["stage"] for s in manifest["stages"]} == {"rmsnorm_fwd", "rmsnorm_quant_fwd"}
    for entry in manifest["objects"]:
        code = cache.decode((made / entry["file"]).read_bytes(), entry["key"])
        assert elf.target(code.image) == code.target == entry["target"]
        assert entry["backend"] == "hip" and "clang version" in entry["compiler"], "which compiler made it"
        assert "/" not in entry["compiler"], "a path of the machine that compiled"
    assert directory.check(made) == []


WITHOUT_COMPILER = """
import sys
sys.modules["triton"] = None
import jax, jax.numpy as jnp
import jaxnorm
from jaxnorm._compile import hip, rtc, triton
assert hip.find("gfx942") is None and not triton.available()[0], "a compiler is here"
found = []
with jaxnorm.use_target({"rocm": "gfx942"}):
    for rows in (1, 77, 4096, 300000):
        x, w = jax.ShapeDtypeStruct((rows, 1024), jnp.bfloat16), jax.ShapeDtypeStruct((1024,), jnp.bfloat16)
        text = jax.jit(jaxnorm.rmsnorm).trace(x, w).lower(lowering_platforms=("rocm",)).as_text()
        found.append("jaxnorm_launch" in text)
    spec = jaxnorm.QuantSpec("fp8")
    x = jax.ShapeDtypeStruct((2, 9, 512), jnp.bfloat16)
    f = lambda x, r: jaxnorm.add_rmsnorm_quant(x, r, None, spec)
    found.append("jaxnorm_launch" in jax.jit(f).trace(x, x).lower(lowering_platforms=("rocm",)).as_text())
    (other,) = jaxnorm.explain(lambda x, r: jaxnorm.add_rmsnorm(x, r, None), x, x)
    assert other.backend == "xla", other
print(found)
"""


@pytest.mark.compile
def test_a_process_without_a_compiler_is_served(made: Path, tmp_path: Path) -> None:
    """And only from the directory: without it the same process takes xla."""
    needs.need("launcher", _native.status().ok, _native.status().reason)
    shipped = tmp_path / "shipped"
    shutil.copytree(made, shipped)
    for path in sorted(shipped.rglob("*"), reverse=True):
        path.chmod(0o555 if path.is_dir() else 0o444)
    env = {k: v for k, v in os.environ.items() if k not in (hip.CLANG_VARIABLE, "JAXNORM_REQUIRE", "XLA_FLAGS")}
    env |= {"PATH": "/nowhere", "ROCM_PATH": "/nowhere", "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}

    def run(folder: Path) -> str:
        done = subprocess.run([sys.executable, "-c", WITHOUT_COMPILER], env=env | {"JAXNORM_CACHE_DIR": str(folder)},
                              capture_output=True, text=True, timeout=120)  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert run(shipped) == str([True] * 5)
    assert run(tmp_path / "empty") == str([False] * 5)


def test_a_shipped_entry_is_found_without_its_compiler_and_not_with_other_sources(monkeypatch, tmp_path) -> None:
    (call,) = spec.parse([NORM])
    (stage,) = instances.stages(call, "gfx942", "hip", compilers=False)
    instance = next(iter(instances.instances(stage, [8]).values()))
    code = cache.CodeObject(b"\x7fELF image", "rmsnorm_fwd", "gfx942", 128, 0, "", "text", "some compiler 1.0")
    monkeypatch.setenv("JAXNORM_CACHE_DIR", str(tmp_path))
    cache.clear_memory()
    cache.ship(tmp_path, instance.parts, code)
    monkeypatch.setattr(hip, "find", lambda target: None)
    served = hip.compile(instance.launch, instance.problem)
    assert (served.image, served.compiler, served.asm) == (code.image, "some compiler 1.0", "")
    sources = hip._sources("rmsnorm.hip")
    monkeypatch.setattr(hip, "_sources", lambda file: [*sources, "edited"])
    cache.clear_memory()
    with pytest.raises(CompileError, match="neither libhiprtc nor hipcc"):
        hip.compile(instance.launch, instance.problem)


@pytest.mark.compile
@pytest.mark.parametrize("damage", ["bit", "gone", "stranger", "target", "call", "rows", "manifest"])
def test_check_finds(made: Path, tmp_path: Path, damage: str, capsys) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(made, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    first = folder / manifest["objects"][0]["file"]
    if damage == "bit":
        first.write_bytes(first.read_bytes()[:-1] + b"\1")
    elif damage == "gone":
        first.unlink()
    elif damage == "stranger":
        (first.parent / "more.code").write_bytes(b"")
    elif damage == "target":
        manifest["objects"][0]["target"] = "gfx950"
    elif damage == "call":
        manifest["calls"][0]["args"] = {"x": "bfloat16[..., 2048]", "weight": "bfloat16[2048]"}
    elif damage == "rows":
        del manifest["objects"][0]
    else:
        manifest["format"] = "jaxnorm-aot/0"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    code = cli.main(["aot", "--check", str(folder)])
    text = "".join(capsys.readouterr())
    words = {"bit": "SHA-256", "gone": "cannot be read", "stranger": "not in the manifest", "target": "its ELF header says gfx942",
             "call": "rmsnorm lacks", "rows": "lacks 1 of", "manifest": "expected 'jaxnorm-aot/1'"}  # fmt: skip
    assert code == (2 if damage == "manifest" else 1)
    assert words[damage] in text, text


@pytest.mark.compile
def test_check_against_other_calls(made: Path) -> None:
    assert directory.check(made, spec.parse([NORM])) == []
    wrong = directory.check(made, spec.parse([NORM | {"grad": True}]), ["gfx942"])
    assert wrong and all("rmsnorm lacks" in text for text in wrong)


def test_command_line_errors(tmp_path: Path, capsys) -> None:
    pytest.importorskip("typer")
    (tmp_path / "bad.json").write_text("{")
    for arguments, words in (
        (["--target", "gfx942", "--out", str(tmp_path)], "--spec: got nothing"),
        (["--model", "llama3-8b", "--out", str(tmp_path)], "--target: got nothing"),
        (["--model", "llama3-8b", "--target", "gfx942"], "--out: got nothing"),
        (["--model", "llama9", "--target", "gfx942", "--out", str(tmp_path)], "expected one of llama3-8b"),
        (["--model", "llama3-8b", "--target", "gfx803", "--out", str(tmp_path)], "--target: got 'gfx803'"),
        (["--spec", str(tmp_path / "bad.json"), "--target", "gfx942", "--out", str(tmp_path)], "does not parse"),
        (["--check", str(tmp_path)], "a directory that `python -m jaxnorm aot` made"),
    ):
        assert cli.main(["aot", *arguments]) == 2, arguments
        assert words in capsys.readouterr().err, arguments


def test_nothing_to_compile_with_is_an_error(monkeypatch, tmp_path, capsys) -> None:
    pytest.importorskip("typer")
    monkeypatch.setattr(
        "jaxnorm._dispatch.compiler", lambda backend, target: (False, f"no {backend} compiler.", "Get one.")
    )
    assert cli.main(["aot", "--model", "llama3-8b", "--target", "gfx942", "--out", str(tmp_path / "o")]) == 1
    assert "no hip compiler." in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.compile
def test_compilers_that_are_libraries_run_in_several_processes(monkeypatch, tmp_path) -> None:
    """The same code objects in the same order; what a process raises comes back as it is."""
    needs.need("nvrtc", hip.find("sm_90") is not None, "pip install nvidia-cuda-nvrtc")
    monkeypatch.setenv("JAXNORM_CACHE_DIR", str(tmp_path / "alone"))
    cache.clear_memory()
    work = directory.plan(spec.parse([NORM | {"rows": [1, 8192], "grad": True, "backend": "hip"}]), ["sm_90"])
    todo = list(work.instances.values())
    alone = list(workers.compile_all(todo))
    monkeypatch.setenv("JAXNORM_CACHE_DIR", str(tmp_path / "several"))
    monkeypatch.setattr(workers, "FEW", 1)
    monkeypatch.setattr(workers, "cpus", lambda: 2)
    cache.clear_memory()
    assert [(c.name, c.image) for c in workers.compile_all(todo)] == [(c.name, c.image) for c in alone]
    broken = replace(todo[0], launch=replace(todo[0].launch, constants=(("JN_N", "nonsense"),)))
    with pytest.raises(CompileError, match="nonsense"):
        list(workers.compile_all([broken, *todo]))


def test_a_compiler_takes_what_it_made_itself_before_the_shipped_one(monkeypatch, tmp_path) -> None:
    """And the shipped one before it compiles."""
    (call,) = spec.parse([NORM])
    (stage,) = instances.stages(call, "gfx942", "hip", compilers=False)
    instance = next(iter(instances.instances(stage, [8]).values()))
    monkeypatch.setenv("JAXNORM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(hip, "find", lambda target: hip.Compiler("clang", sys.executable))
    built = cache.CodeObject(b"\x7fELF built", "rmsnorm_fwd", "gfx942", 128, 0, "")
    monkeypatch.setattr(hip, "_build", lambda *_: built)
    cache.clear_memory()
    cache.ship(tmp_path, instance.parts, replace(built, image=b"\x7fELF shipped"))
    assert hip.compile(instance.launch, instance.problem).image == b"\x7fELF shipped"
    shutil.rmtree(tmp_path / cache.SHIPPED)
    cache.clear_memory()
    assert hip.compile(instance.launch, instance.problem).image == built.image
    cache.ship(tmp_path, instance.parts, replace(built, image=b"\x7fELF shipped"))
    cache.clear_memory()
    assert hip.compile(instance.launch, instance.problem).image == built.image
