"""What a command needs before it can say something, and what it says where that is missing."""

import socket

import pytest
from tests.blocking import BEYOND_THE_CLIENT, cli_without, modules_of, run_without
from tests.factories import make_rollout

import flowroll
from flowroll.checkpoints import shapes_checkpoint
from flowroll.cli.app import COMMANDS
from flowroll.wire.files import save_rollout

# What takes seconds to import.
HEAVY = {"torch", "jaxtyping", "safetensors", *BEYOND_THE_CLIENT}
INSTALL = "must have {}, got none (it is not installed); run: pip install 'flowroll[{}]'."


@pytest.fixture
def file(tmp_path):
    save_rollout(tmp_path / "rollout.safetensors", make_rollout())
    return tmp_path / "rollout.safetensors"


def assert_one_line(done, message):
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr


def test_help_needs_no_torch_and_no_httpx():
    done = cli_without(HEAVY | {"httpx"}, "--help")
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_of_commands_says_what_their_own_help_says(name):
    assert (COMMANDS[name].load(name).help or "").splitlines()[0] == COMMANDS[name].help


@pytest.mark.parametrize("words", [("serve", "--help"), ("serve", "--port", "many"), ("paint",)])
def test_usage_needs_no_torch(words):
    done = cli_without(HEAVY, *words)
    assert done.returncode == (0 if "--help" in words else 2), done.stderr


NO_CHECKPOINT = "must be a diffusers checkpoint folder, got no "


@pytest.mark.parametrize(
    ("folder", "fault"), [("nowhere", "such folder; check the path, or use"), (".", "model_index.json; give")]
)
def test_serve_refuses_a_path_that_is_no_checkpoint_before_it_imports_torch(folder, fault, tmp_path):
    assert_one_line(cli_without(HEAVY, "serve", tmp_path / folder), NO_CHECKPOINT + fault)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("generate", "nowhere", "--prompt", "x"), NO_CHECKPOINT + "such folder"),
        pytest.param(
            ("generate", "shapes-z_image", "--prompt", "x", "--seed", "-1"), "seed must be >= 0", marks=pytest.mark.slow
        ),
        (("verify", "--model", "nowhere", "FILE"), NO_CHECKPOINT + "such folder"),
        pytest.param(
            ("verify", "--model", "shapes-z_image", "none.safetensors"),
            "path must be a readable rollout file",
            marks=pytest.mark.slow,
        ),
        pytest.param(("parity", "shapes-z_image", "--size", "x"), "size must be WIDTHxHEIGHT", marks=pytest.mark.slow),
        pytest.param(("make-checkpoint", "sdxl", "out"), "family must be one of", marks=pytest.mark.slow),
        pytest.param(
            ("make-checkpoint", "z_image", "."),
            "directory must be new or empty, got . with files in it",
            marks=pytest.mark.slow,
        ),
        (("bench", "serve", "--prompts", __file__, "--rate", "1", "--json", "none/x.json"), "--json must lie in a folder"),
        pytest.param(
            ("rollout", "--prompts", __file__, "--out", "out", "--noise-level", "99"),
            "noise_level must be 0 or from",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_mistake_is_found_before_the_libraries_are_imported(words, message, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocked = {"diffusers", "transformers", "httpx", "pyarrow"} - ({"pyarrow"} if "verify" in words else set())
    assert_one_line(cli_without(blocked, *(file if word == "FILE" else word for word in words)), message)


def test_the_version_and_short_help_need_no_torch():
    done = cli_without(HEAVY | {"httpx"}, "--version")
    assert (done.returncode, done.stdout) == (0, f"flowroll {flowroll.__version__}\n"), done.stderr
    done = cli_without(HEAVY | {"httpx"}, "-h")
    assert done.returncode == 0 and all(name in done.stdout for name in COMMANDS), done.stderr


def test_serve_refuses_a_port_in_use_before_it_imports_torch():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert_one_line(cli_without(HEAVY, "serve", "--port", port), f"127.0.0.1:{port} must be free to listen on, got ")


def test_serve_refuses_a_host_that_is_not_this_machines_before_it_imports_torch():
    assert_one_line(cli_without(HEAVY, "serve", "--host", "192.0.2.1", "--port", 0), "192.0.2.1:0 must be free to listen on")


def test_the_other_ranks_of_torchrun_do_not_ask_for_the_port_that_rank_0_has(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = cli_without(HEAVY, "serve", "--port", taken.getsockname()[1])
    # It has come to its imports.
    assert "must be free" not in done.stderr and "flowroll[server]" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "blocked", "extra"),
    [
        (("--help",), "typer", "client"),
        (("inspect", "FILE"), "rich", "client"),
        (("serve", "--port", "0"), "fastapi", "server"),
        (("serve", "--port", "0"), "diffusers", "server"),
        (("generate", "shapes-z_image", "--prompt", "x"), "diffusers", "engine"),
        (("make-checkpoint", "z_image", "out"), "diffusers", "engine"),
        (("verify", "--model", shapes_checkpoint("z_image"), "FILE"), "diffusers", "engine"),
        (("rollout", "--url", "http://127.0.0.1:9", "--prompts", __file__, "--out", "out"), "httpx", "client"),
        (("rollout", "--prompts", __file__, "--out", "out"), "pyarrow", "store"),
        (("top",), "httpx", "client"),
        (("bench", "serve", "--url", "http://127.0.0.1:9", "--prompts", __file__, "--rate", "1"), "httpx", "client"),
        (("inspect", "FILE", "--plot", "plot.png"), "matplotlib", "plot"),
    ],
)
def test_a_command_without_its_libraries_says_what_to_install(words, blocked, extra, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert blocked in modules_of(extra)
    done = cli_without({blocked}, *(file if word == "FILE" else word for word in words))
    assert_one_line(done, INSTALL.format(blocked, extra))


def test_the_module_says_what_to_install_as_the_command_does():
    done = run_without({"typer"}, "import runpy; runpy.run_module('flowroll', run_name='__main__')")
    assert_one_line(done, INSTALL.format("typer", "client"))


@pytest.mark.parametrize(
    ("module", "blocked", "extra"),
    [
        ("flowroll.client", "httpx", "client"),
        ("flowroll.store", "pyarrow", "store"),
        ("flowroll.engine", "diffusers", "engine"),
        ("flowroll.engine", "transformers", "engine"),
        ("flowroll.testing", "diffusers", "engine"),
        ("flowroll.serving", "fastapi", "server"),
        ("flowroll.serving", "diffusers", "server"),
        ("flowroll.engine", "PIL", "engine"),
    ],
)
def test_an_import_without_its_libraries_says_what_to_install(module, blocked, extra):
    program = f"""
from flowroll import FlowrollError
try:
    import {module}
except FlowrollError as error:
    assert isinstance(error, ImportError) and error.name == {blocked!r}, error
    print(error)
"""
    done = run_without({blocked}, program)
    assert f"{module} must have {blocked}, got none" in done.stdout, done.stderr
    assert f"pip install 'flowroll[{extra}]'" in done.stdout


def test_a_mistake_of_our_own_is_not_taken_for_a_missing_library():
    program = """
from flowroll.extras import extra_for
for statement in ("import flowroll.nothing", "from flowroll.types import nothing"):
    try:
        with extra_for("x", "client"):
            exec(statement)
    except ImportError as error:
        print(type(error).__name__)
"""
    assert run_without(set(), program).stdout.split() == ["ModuleNotFoundError", "ImportError"]


def test_a_library_that_is_too_old_is_named_with_its_reason():
    program = """
import httpx
del httpx.Client
from flowroll.extras import extra_for
try:
    with extra_for("flowroll.client", "client"):
        from httpx import Client
except ImportError as error:
    print(error)
"""
    shown = run_without(set(), program).stdout
    assert "must have httpx, got none (cannot import name 'Client'" in shown and "pip install 'flowroll[client]'" in shown


def test_inspect_needs_the_client_extra_alone(file):
    done = cli_without(BEYOND_THE_CLIENT, "inspect", file)
    assert done.returncode == 0, done.stderr
    assert "Log-probs" in done.stdout


def test_importing_flowroll_imports_torch_when_a_type_is_used():
    program = """
import sys, flowroll
assert "torch" not in sys.modules and flowroll.__version__
assert {*flowroll.__all__, "Client", "Engine", "save_rollouts"} <= set(dir(flowroll))
from flowroll import *
assert SamplingParams is flowroll.SamplingParams and "torch" in sys.modules
try:
    flowroll.nothing
except AttributeError as error:
    print(error)
"""
    done = run_without(set(), program)
    assert done.stdout.strip() == "module 'flowroll' has no attribute 'nothing'", done.stderr


def test_the_front_door_gives_client_engine_and_store_without_a_warning():
    program = """
import sys, warnings
warnings.simplefilter("error")
from flowroll import Client, Rollout, load_rollouts, save_rollouts
assert not {"diffusers", "transformers"} & set(sys.modules)
import flowroll.client, flowroll.serving, flowroll.store
# Nor does the process that answers HTTP, which has no model.
assert not {"diffusers", "transformers", "sympy", "torch.distributed.tensor"} & set(sys.modules)
assert Client is flowroll.client.Client and load_rollouts is flowroll.store.load_rollouts
"""
    done = run_without(set(), program)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    done = run_without(set(), "from flowroll import Engine\nimport flowroll.engine\nassert Engine is flowroll.engine.Engine")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    # A trainer with torch alone.
    done = run_without(
        {"httpx", "pyarrow", "PIL", "diffusers"}, "from flowroll import *; from flowroll import replay; print(Rollout)"
    )
    assert done.returncode == 0, done.stderr
