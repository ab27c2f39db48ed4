"""The command line: what each command prints, its exit codes, and what it says about wrong arguments."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest
from needs import need

from jaxnorm import cli, doctor
from jaxnorm._compile import cache
from jaxnorm._compile.code_object import CodeObject

CODE = CodeObject(b"\x7fELF" + b"machine code" * 40, "rmsnorm_fwd", "sm_90", 128, 0, "", "text")


@pytest.fixture
def rich_and_typer():
    for package in ("typer", "rich"):
        try:
            __import__(package)
        except ImportError as error:
            need("cli", False, str(error))


@pytest.fixture
def call(capsys, rich_and_typer):
    """``call("cache", "show")`` -> (exit code, stdout, stderr)."""

    def run(*argv: object) -> tuple[int, str, str]:
        code = cli.main([str(a) for a in argv])
        return code, *capsys.readouterr()

    return run


# The registry


def test_help_lists_every_command_and_wrong_names_are_named(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in cli.COMMANDS)
    assert max(map(len, out.splitlines())) < 100
    assert cli.main(["bnech"]) == 2
    assert "command: got 'bnech', expected one of doctor," in capsys.readouterr().err
    assert cli.main([]) == 2


@pytest.mark.parametrize("name", [n for n, c in cli.COMMANDS.items() if c.extra])
def test_help_of_a_command(name, call):
    code, out, _ = call(name, "--help")
    assert code == 0
    assert f"Usage: jaxnorm {name}" in out


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_without_its_packages_a_command_says_what_to_install_and_doctor_works(package, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    assert cli.main(["cache", "show"]) == 2
    assert f"needs {package}" in (said := capsys.readouterr().err)
    assert "pip install 'jaxnorm[cli]'" in said
    monkeypatch.setattr(doctor, "main", lambda argv: len(argv))
    assert cli.main(["doctor", "--json"]) == 1


def test_a_wrong_option_is_a_usage_error(call):
    code, _, err = call("cache", "clear", "--oldr-than", "3")
    assert code == 2
    assert "--older-than" in err


# cache


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("JAXNORM_CACHE_DIR", str(tmp_path / "cache"))
    cache.clear_memory()
    for key, target in (("a", "sm_90"), ("b", "sm_90"), ("c", "gfx942")):
        cache.get_or_compile([key], lambda target=target: CodeObject(**{**CODE.__dict__, "target": target}))
    cache.clear_memory()
    return tmp_path / "cache"


def entry_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.code"))


def test_cache_show(call, folder):
    code, out, _ = call("cache", "show")
    assert code == 0
    assert str(folder) in out.replace("\n", "")
    assert [line.split()[:3] for line in out.splitlines() if "rmsnorm_fwd" in line] == [
        ["gfx942", "rmsnorm_fwd", "1"],
        ["sm_90", "rmsnorm_fwd", "2"],
    ]
    seen = json.loads(call("cache", "show", "--json")[1])
    assert [(k["target"], k["files"]) for k in seen["kernels"]] == [("gfx942", 1), ("sm_90", 2)]


def test_cache_of_others_is_shown_with_the_remedy(call, folder):
    folder.chmod(0o777)
    code, out, _ = call("cache", "show")
    assert code == 0
    assert "chmod go-w" in out


def test_cache_clear_takes_what_was_asked_for_and_nothing_else(call, folder):
    (folder / "note.txt").write_text("mine")
    assert call("cache", "clear", "--dry-run")[1].startswith("would delete 3 of 3 files")
    assert len(entry_files(folder)) == 3
    code, _, err = call("cache", "clear", "--target", "sm_9")
    assert (code, len(entry_files(folder))) == (2, 3)
    assert "got 'sm_9', expected one of gfx942, sm_90" in err
    assert call("cache", "clear", "--target", "sm_90")[1].startswith("deleted 2 of 3 files")
    assert len(entry_files(folder)) == 1
    assert call("cache", "clear", "--older-than", "1")[1].startswith("deleted 0 of 1")
    os.utime(entry_files(folder)[0], (0, time.time() - 3 * 86400))
    assert call("cache", "clear", "--older-than", "1")[1].startswith("deleted 1 of 1")
    assert [p.name for p in folder.iterdir()] == ["note.txt"]


def test_cache_clear_of_damaged_entries_only(call, folder):
    first, second, _ = entry_files(folder)
    first.write_bytes(first.read_bytes()[:-5])
    being_written = second.with_name(".new-now")
    being_written.write_bytes(b"half")
    assert "damaged, unfinished" in call("cache", "show")[1]
    assert call("cache", "clear", "--damaged")[1].startswith("deleted 1 of 4")
    assert not first.exists()
    assert being_written.exists()  # perhaps another process is just writing it


def test_cache_clear_says_what_it_could_not_delete(call, folder, monkeypatch):
    monkeypatch.setattr(cache, "remove", lambda chosen: [f"{chosen[0].path}: Permission denied"])
    code, _, err = call("cache", "clear")
    assert code == 1
    assert "1 files could not be deleted" in err
    assert "Permission denied" in err


# explain

MODULE = """
import sys
import jax, jax.numpy as jnp
import jaxnorm as jn

def block(x, r, w):
    y, s = jn.add_rmsnorm(x, r, w)
    return jn.rmsnorm(y, w), s

constant = 3

if __name__ == "__main__":
    x = jnp.ones((4, int(sys.argv[1])))
    print(jax.jit(lambda x: jn.rmsnorm(x, None))(x).shape)
    jax.jit(lambda x: jn.rmsnorm(x, None))(x)
"""


@pytest.fixture
def script(tmp_path) -> Path:
    path = tmp_path / "some_model.py"
    path.write_text(MODULE)
    return path


def test_explain_a_function(call, script):
    types = ("--arg", "bfloat16[8,64]", "--arg", "bfloat16[8,64]", "--arg", "float32[64]")
    code, out, _ = call("explain", f"{script}:block", *types)
    assert code == 0
    assert [line.split()[:3] for line in out.splitlines() if "rows=8 N=64" in line] == [
        ["add_rmsnorm", "xla", "jnp"],
        ["rmsnorm", "xla", "jnp"],
    ]
    assert "not triton: needs a GPU" in out
    seen = json.loads(call("explain", f"{script}:block", *types, "--json")[1])
    assert [c["op"] for c in seen] == ["add_rmsnorm", "rmsnorm"]


def test_explain_a_script_that_runs(call, script):
    code, out, _ = call("explain", script, "--", "32")
    assert code == 0
    assert out.startswith("(4, 32)")
    assert out.count("rows=4 N=32") == 1  # the same choice, made twice


@pytest.mark.parametrize(
    ("source", "options", "said"),
    [
        ("{script}:blok", (), "no function 'blok' in"),
        ("{script}:constant", (), "expected one of block"),
        ("{script}:block", ("--arg", "bfloat16(8,64)"), "got 'bfloat16(8,64)', expected DTYPE[DIM"),
        ("{script}:block", ("--arg", "bf16[8,64]"), "got dtype 'bf16'"),
        ("{script}:block", (), "no arguments (give them with --arg)"),
        ("{script}:block", ("--target", "h100"), "--target: use_target: targets['cuda']: got 'h100'"),
        ("no_such_module:f", (), "No module named 'no_such_module'"),
        ("nowhere.py:f", (), "there is no file nowhere.py"),
        ("nowhere.py", (), "there is no file nowhere.py"),
        ("nowhere.txt", (), "cannot read nowhere.txt: No such file"),
        ("{folder}", (), "expected one file of it"),
        ("{folder}/notes.txt", (), "expected a script *.py"),
    ],
)
def test_explain_says_what_is_wrong(source, options, said, call, script, tmp_path):
    (tmp_path / "notes.txt").write_text("remember the milk")
    code, _, err = call("explain", source.format(script=script, folder=tmp_path), *options)
    assert code == 2
    assert said in err.replace("\n", " ")


LAUNCH = (
    'custom_call_target="jaxnorm_launch", metadata={op_name="jit(f)/transpose(jvp(add_rmsnorm))/ffi_call"}, '
    'backend_config={grid = array<i64: 8, 1, 1>, image = "\\7FELF\\00", name = "rmsnorm_bwd", '
    'target = "gfx942", threads = 256 : i64}'
)
LAUNCH_MEETING = (
    'custom_call_target="jaxnorm_launch", metadata={op_name="jit(f)/groupnorm/ffi_call"}, '
    "backend_config={grid = array<i64: 1, 1, 1, 8, 2, 1, 4, 1, 1, 5, 1, 1>, meeting = array<i64: 0, 16, -16, -16>, "
    'name = "clear held partials apply", target = "sm_90", threads = array<i64: 32, 256, 256, 256>}'
)
HLO = f"""HloModule jit_f
ENTRY main {{
  %c = f32[] custom-call(%a), {LAUNCH}
  %m = f32[4] multiply(%a, %b), metadata={{op_name="jit(f)/layer/rmsnorm/mul"}}
  %n = f32[4] multiply(%a, %b), metadata={{op_name="jit(f)/layer/rmsnorm/rsqrt"}}
  %o = f32[4] multiply(%a, %b), metadata={{op_name="jit(f)/my_rmsnorm_of_old/mul"}}
  %t = f32[] custom-call(%a), {LAUNCH_MEETING}
  %r = f32[4] all-reduce-start(%a), metadata={{op_name="jit(f)/psum"}}
}}
"""


def test_explain_a_dump(call, tmp_path):
    path = tmp_path / "module.after_optimizations.txt"
    path.write_text(HLO)
    code, out, _ = call("explain", path)
    assert code == 0
    assert "collectives in the whole program: 1 all-reduce" in out
    seen = json.loads(call("explain", path, "--json")[1])
    assert [(f["op"], f["kernel"], f["target"], f["config"]) for f in seen["ops"]] == [
        ("add_rmsnorm backward", "rmsnorm_bwd", "gfx942", "grid 8x1x1, 256 threads"),
        ("groupnorm", "clear held", "sm_90", "grid 1x1x1x8x2x1"),
        ("rmsnorm", "", "", ""),
    ]


def test_explain_a_program_of_this_jax(call, tmp_path):
    """StableHLO with names, and the optimised program of a CPU."""
    import jax
    import jax.numpy as jnp

    import jaxnorm as jn

    lowered = jax.jit(lambda x: jn.rmsnorm(x, None)).lower(jnp.ones((4, 32)))
    for name, text in (("s.mlir", lowered.as_text(debug_info=True)), ("c.txt", lowered.compile().as_text())):
        (tmp_path / name).write_text(text)
        (found,) = json.loads(call("explain", tmp_path / name, "--json")[1])["ops"]
        assert (found["op"], found["kernel"]) == ("rmsnorm", "")
