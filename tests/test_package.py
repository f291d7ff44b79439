"""The package as users get it: the wheel, an editable install and a checkout, each in a process of its own."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import llmc
from llmc.cuda.module import kernels_dir

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ("train", "generate", "data")
SHOW = "import llmc, llmc.cuda.module as m; print(llmc.__file__); print(m.kernels_dir())"
BIN = "Scripts" if os.name == "nt" else "bin"

pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="needs a checkout to build from")


def run(*command, cwd, **env):
    """The finished process; it sees neither the checkout nor the user's caches."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment.update(XDG_CACHE_HOME=str(cwd / "cache"), OPENBLAS_NUM_THREADS="1", **env)
    command = list(map(str, command))
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def new_environment(folder, with_pip):
    """A virtual environment that also finds the packages of the one the tests run in, but not its llmc."""
    try:
        venv.EnvBuilder(with_pip=with_pip, symlinks=os.name != "nt").create(folder)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"cannot make a virtual environment with pip: {error}")
    site = next(folder.glob("[lL]ib/**/site-packages"))
    parents = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site / "parent.pth").write_text("\n".join(parents) + "\n")  # it comes after the environment's own
    return folder / BIN / "python", site


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what the package is built from: building writes nothing into the checkout."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("llmc", "kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """(python, site-packages) of an environment with pip."""
    return new_environment(tmp_path_factory.mktemp("wheel-install") / "venv", with_pip=True)


def pip(environment, *command, cwd):
    """Run pip; the build backend is downloaded, unless it is installed here."""
    build = [] if importlib.util.find_spec("hatchling") is None else ["--no-build-isolation"]
    done = run(environment[0], "-m", "pip", "-q", *command, *build, cwd=cwd)
    if done.returncode and not build and "hatchling" in done.stderr:
        pytest.skip(f"no hatchling, and it cannot be downloaded: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(environment, source):
    pip(environment, "wheel", "--no-deps", "-w", source / "dist", source, cwd=source)
    (path,) = (source / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(environment, wheel):
    """(python, site-packages) with the wheel installed."""
    done = run(environment[0], "-m", "pip", "-q", "install", "--no-deps", "--no-index", wheel, cwd=wheel.parent)
    assert done.returncode == 0, done.stderr
    return environment


def test_no_hint_names_another_project():
    """The package index has a stranger's `llmc`: what we tell users to install has other names, or is the checkout."""
    stranger = re.compile(r"""pip3? install[^\n`]*[ "']llmc(?![\w./-])|llmc\[""")
    assert stranger.search("pip install llmc") and stranger.search('pip install "llmc' + '[cuda13]"')
    assert not stranger.search('pip install -e ".[cuda13]"') and not stranger.search("pip install llm-dot-c")
    texts = [path for name in ("llmc", "kernels", "scripts", "dev", "tests") for path in (ROOT / name).rglob("*")]
    texts = [path for path in texts if path.suffix in (".py", ".sh", ".md", ".cu", ".cuh", ".ipynb", ".toml")]
    for path in (ROOT / "README.md", ROOT / "pyproject.toml", ROOT / ".ci" / "run", *texts):
        if path != Path(__file__).resolve():
            found = stranger.search(path.read_text(encoding="utf-8"))
            assert not found, f"{path}: {found[0]}"


def kernel_files(folder):
    """{path below the folder: bytes} of all kernels, production and ladder."""
    paths = [path for path in Path(folder).rglob("*.cu*") if path.suffix in (".cu", ".cuh")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_checkout():
    assert kernels_dir() == ROOT / "kernels" or Path(llmc.__file__).parent != ROOT / "llmc"
    done = subprocess.run(
        [sys.executable, "-c", SHOW], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.stdout.split() == [str(ROOT / "llmc" / "__init__.py"), str(ROOT / "kernels")], done.stderr


@pytest.mark.slow
def test_contents_of_the_wheel(wheel, source):
    """The package, its kernels, licence, version, extras and the console script; no tests, no caches."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        info = next(name.split("/")[0] for name in names if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
        script = archive.read(f"{info}/entry_points.txt").decode()
        kernels = {name[len("llmc/kernels/") :]: archive.read(name) for name in names if "llmc/kernels/" in name}
    python = {str(path.relative_to(source)) for path in (source / "llmc").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == python
    executor = {str(p.relative_to(source)) for p in (source / "llmc" / "simt").rglob("*") if p.suffix in (".cpp", ".h")}
    assert executor <= set(names) and "llmc/simt/runtime.cpp" in executor and len(executor) >= 10
    assert kernels == kernel_files(source / "kernels") and {"common.cuh", "ladder/gelu_01_naive.cu"} <= set(kernels)
    assert "llmc/py.typed" in names
    assert {name.split("/")[0] for name in names} == {"llmc", info}
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]
    assert any(name.endswith("LICENSE") for name in names)
    assert metadata["Name"] == "llm-dot-c" and metadata["Version"] == llmc.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert {"cuda13", "cuda12", "mpi", "plot", "test"} <= set(metadata.get_all("Provides-Extra"))
    needed = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert any(line.startswith("numpy") for line in needed)
    assert any(line.startswith("safetensors") for line in needed)
    assert not [line for line in needed if line.startswith(("torch", "cupy", "matplotlib", "pytest", "huggingface"))]
    assert "llmc = llmc.__main__:main" in script


@pytest.mark.slow
def test_wheel_trains_from_an_empty_folder(installed, source, tmp_path):
    python, site = installed
    done = run(python, "-c", SHOW, cwd=tmp_path)
    file, kernels = map(Path, done.stdout.split())
    assert file == site / "llmc" / "__init__.py" and kernels == site / "llmc" / "kernels"
    assert kernel_files(kernels) == kernel_files(source / "kernels")
    done = run(python, "-c", "import llmc.cuda.module as m; print(m.INSTALL)", cwd=tmp_path)
    assert 'pip install "cupy-cuda13x[ctk]" ml_dtypes' in done.stdout, done.stderr
    flags = ("--device", "cpu", "-x", 2, "-b", 2, "-t", 32, "-v", 0, "-g", 20, "--threads", 1)
    done = run(python, "-m", "llmc.train", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "step    2/2 | loss" in done.stdout and "generating:" in done.stdout
    assert (tmp_path / "runs" / "shakespeare-001" / "DONE_00000002").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "runs"]
    done = run(python, "-m", "llmc.generate", "runs/shakespeare-001", "-g", 20, "-p", "ROMEO:", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("ROMEO:"), done.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the CPU executor needs g++")
def test_wheel_runs_kernels_without_a_gpu(installed, tmp_path):
    """The executor's own example, and one of the package's kernels under its launcher."""
    program = (
        "import textwrap, numpy as np\n"
        "from llmc import simt\n"
        "try: exec(textwrap.dedent(simt.__doc__.split('\\n\\n')[1]))\n"
        "except simt.KernelFault as fault: print(fault)\n"
        "ops, out = simt.install(), np.zeros((1, 2, 8), np.float32)\n"
        "ops.gelu_forward(out, np.ones((1, 2, 8), np.float32))\n"
        "print(out[0, 0, 0])\n"
    )
    done = run(installed[0], "-c", program, cwd=tmp_path)
    fault, number = done.stdout.splitlines()
    assert fault.startswith("reverse: uninitialised read") and "reverse.cu:5" in fault, done.stderr
    assert abs(float(number) - 0.8412) < 1e-4


@pytest.mark.slow
def test_console_script(installed, tmp_path):
    """llmc COMMAND is python -m llmc.COMMAND: help, exit codes and error lines."""
    script = installed[0].parent / "llmc"
    for argv in ((), ("--help",), ("-h",)):
        done = run(script, *argv, cwd=tmp_path)
        assert done.returncode == 0 and all(f"  {command} " in done.stdout for command in COMMANDS), done.stderr
    assert run(script, "--version", cwd=tmp_path).stdout.split() == ["llmc", llmc.__version__]
    for command in COMMANDS:
        done, module = (
            run(*a, "--help", cwd=tmp_path) for a in ((script, command), (installed[0], "-m", f"llmc.{command}"))
        )
        assert done.returncode == 0 and "usage:" in done.stdout and not done.stderr
        assert done.stdout == module.stdout
    assert "--learning-rate" in run(script, "train", "--help", cwd=tmp_path).stdout
    done = run(script, "train", "-b", "0", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("llmc.train: error: ") and done.stderr.count("\n") == 1
    done = run(script, "train", "-i", "none.bin", "-j", "none.bin", cwd=tmp_path)
    assert done.returncode == 2 and "none.bin" in done.stderr and done.stderr.count("\n") == 1
    done = run(script, "fly", cwd=tmp_path)
    assert done.returncode == 2 and "fly" in done.stderr and "HINT: " in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_editable_install(environment, source, tmp_path):
    """Package and kernels are those of the source folder, as they are edited there."""
    python, site = new_environment(tmp_path / "venv", with_pip=False)
    pip(environment, "--python", python, "install", "--no-deps", "-e", source, cwd=tmp_path)
    done = run(python, "-c", SHOW, cwd=tmp_path)
    assert done.stdout.split() == [str(source / "llmc" / "__init__.py"), str(source / "kernels")], done.stderr
    (source / "kernels" / "new.cuh").write_text("// new\n")
    done = run(python, "-c", "import llmc.cuda.module as m; print(*m.kernels_dir().glob('new.cuh'))", cwd=tmp_path)
    (source / "kernels" / "new.cuh").unlink()
    assert done.stdout.strip() == str(source / "kernels" / "new.cuh")
    assert run(python, "-m", "llmc", "train", "--help", cwd=tmp_path).returncode == 0
