"""The programs in bin/ and examples/ do what they say, run from a checkout as a new user would."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from examples import saecost

CHECKOUT = Path(__file__).resolve().parents[2]
QJAM_RUN = "bin/qjam-run"
# What workers import; what a host need not have may be imported by the rest of an example only.
SHIPPED = ["char_count", "multiply_sum", "newton_sqrt", "numpy_inner_prod", "saecost", "sequences"]


def run(*command: str, cwd: Path = CHECKOUT) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-W", "error", *command]
    return subprocess.run(program, cwd=cwd, capture_output=True, text=True, timeout=170, check=False)


def output(*command: str, cwd: Path = CHECKOUT) -> str:
    done = run(*command, cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


def last_line(text: str) -> str:
    return text.splitlines()[-1]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A user's folder with a module of their own, which is not the checkout."""
    (tmp_path / "mine.py").write_text(
        "half = 0.5\n"
        "numbers = [1, 2, 3]\n"
        "def mapfunc(params, part):\n"
        "    if params is None:\n"
        "        return 21\n"
        "    return sum(params / number for number in part)\n"
        "zeros = [0]\n"
        "word = 'word'\n"
    )
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "wordy.py").write_text("raise ValueError('two\\nlines')\n")
    return tmp_path


# sum-matrix-example


@pytest.mark.parametrize("hosts", [[], ["local"], ["local", "local", "local"]])
def test_sum_matrix_example_ends_with_the_sum(hosts):
    assert last_line(output("bin/sum-matrix-example.py", *hosts)) == "Computed element sum of X = 5050"


def test_sum_matrix_example_takes_a_size_and_runs_from_any_folder(tmp_path):
    program = str(CHECKOUT / "bin/sum-matrix-example.py")
    assert last_line(output(program, "--size", "3", "local*2", cwd=tmp_path)) == "Computed element sum of X = 45"


@pytest.mark.parametrize("wrong", [["--size", "0"], ["local*0"]])
def test_sum_matrix_example_says_which_argument_is_wrong(wrong):
    done = run("bin/sum-matrix-example.py", *wrong)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert wrong[-1] in done.stderr


# qjam-run


def test_qjam_run_multiplies_and_sums():
    names = ["examples.multiply_sum", "examples.sequences.onetoten", "examples.sequences.three"]
    assert output(QJAM_RUN, *names) == "165\n"


def test_qjam_run_takes_workers():
    names = ["examples.numpy_inner_prod", "examples.numpy_inner_prod.x", "examples.numpy_inner_prod.theta"]
    assert output(QJAM_RUN, "-w", "local local", *names) == "170\n"


def test_qjam_run_without_a_data_set_runs_once_on_each_worker(project):
    assert output(str(CHECKOUT / QJAM_RUN), "-w", "local*2", "mine", cwd=project) == "42\n"


def test_qjam_run_finds_modules_in_the_current_folder(project):
    result = output(str(CHECKOUT / QJAM_RUN), "-w", "local", "mine", "mine.numbers", "mine.half", cwd=project)
    assert float(result) == pytest.approx(0.5 + 0.25 + 0.5 / 3)


def test_qjam_run_explains_itself():
    text = output(QJAM_RUN, "-h")
    assert text.index("MODULE") < text.index("DATASET") < text.index("PARAMS")
    assert "examples.sequences.three" in text


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["nowhere"], "nowhere"),
        (["mine.nowhere"], "mine.nowhere"),
        (["mine", "mine.nothing"], "mine has no 'nothing'"),
        (["mine", "numbers"], "'numbers' is not a dotted name"),
        (["mine", "nowhere.numbers"], "nowhere"),
        (["mine", "mine.numbers", "mine.nothing"], "mine has no 'nothing'"),
        (["mine", "mine.word"], "mine.word is no data set"),
        (["-w", "local local*auto", "mine"], "auto"),
        (["broken"], "ZeroDivisionError"),
        (["wordy"], "ValueError: two lines"),
        (["math"], "mapfunc"),
        (["-w", "local*0", "mine"], "local*0"),
    ],
)
def test_qjam_run_has_one_clear_line_for_a_wrong_argument(project, names, text):
    done = run(str(CHECKOUT / QJAM_RUN), *names, cwd=project)
    assert done.returncode == 2
    assert not done.stdout
    assert len(done.stderr.splitlines()) == 1
    assert text in done.stderr


def test_qjam_run_tells_an_error_of_the_task(project):
    done = run(str(CHECKOUT / QJAM_RUN), "-w", "local", "mine", "mine.zeros", "mine.half", cwd=project)
    assert done.returncode == 1
    assert not done.stdout
    assert "ZeroDivisionError" in done.stderr
    assert "mine.py" in done.stderr
    assert "File" not in done.stderr.split("Traceback in the worker")[0]  # not this side's traceback


def test_programs_run_from_a_checkout_where_qjam_is_not_installed(tmp_path):
    # Folders in PYTHONPATH are not searched for .pth files, so an editable install of qjam is out of sight.
    import zmq

    packages = Path(zmq.__file__).parent.parent
    if (packages / "qjam").exists():
        pytest.skip("qjam is installed as a copy")
    environment = os.environ | {"PYTHONPATH": str(packages)}
    base = Path(sys.base_prefix, "bin", "python3")
    for program in (["bin/sum-matrix-example.py", "local"], ["bin/qjam", "--version"], [QJAM_RUN, "-h"]):
        command = [str(base), str(CHECKOUT / program[0]), *program[1:]]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("program", ["bin/qjam", "bin/qjam-run", "bin/qjam-doctor", "bin/sum-matrix-example.py"])
def test_programs_are_executable(program):
    assert os.access(CHECKOUT / program, os.X_OK)
    assert (CHECKOUT / program).read_text().startswith("#!/usr/bin/env python3\n")


# examples


@pytest.mark.parametrize("name", SHIPPED)
def test_what_workers_import_needs_numpy_at_most(name):
    tree = ast.parse((CHECKOUT / "examples" / f"{name}.py").read_text())
    imported = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    assert imported <= sys.stdlib_module_names | {"numpy"}


def test_newton_sqrt_converges():
    line = last_line(output("-m", "examples.newton_sqrt", "2"))
    assert "1.41421356237" in line


@pytest.mark.parametrize("number", ["0", "-1", "nan", "inf", "two"])
def test_newton_sqrt_wants_a_number_above_zero(number):
    done = run("-m", "examples.newton_sqrt", "--", number)
    assert done.returncode == 2
    assert number in last_line(done.stderr)


def test_char_count_counts_letters_in_either_case(tmp_path):
    text = tmp_path / "text"
    text.write_text("Quick quick\nQUIZ?\n\n" * 50 + "\xe9\n", encoding="utf-8")
    counts = dict(line.split("\t") for line in output("examples/char_count.py", str(text), "local*2").splitlines())
    assert len(counts) == 26
    assert counts["q"] == "150"
    assert counts["k"] == "100"
    assert counts["e"] == "0"


def test_char_count_of_an_empty_file_is_zero(tmp_path):
    (tmp_path / "text").touch()
    lines = output("-m", "examples.char_count", str(tmp_path / "text"), "local").splitlines()
    assert {line.split("\t")[1] for line in lines} == {"0"}


def test_char_count_says_which_file_is_missing(tmp_path):
    done = run("-m", "examples.char_count", str(tmp_path / "none"))
    assert done.returncode == 2
    assert "none: No such file" in last_line(done.stderr)


# sparse autoencoder


@pytest.fixture(scope="module")
def inputs() -> np.ndarray:
    return np.random.default_rng(5).uniform(-0.9, 0.9, (2 * saecost.BLOCK + 7, 12))


@pytest.fixture(scope="module")
def theta() -> np.ndarray:
    # Far from 0 in every part, biases too, so that no term of the gradient can hide.
    return np.random.default_rng(6).normal(scale=0.4, size=len(saecost.initial_theta(12)))


def slope(function, theta, direction):
    step = 1e-5
    return (function(theta + step * direction)[0] - function(theta - step * direction)[0]) / (2 * step)


@pytest.mark.parametrize("part", range(4), ids=["w1", "w2", "b1", "b2"])
def test_autoencoder_gradient_is_the_slope_of_its_cost(inputs, theta, part):
    direction = np.zeros_like(theta)
    saecost.unpack(direction, 12)[part][...] = 1
    direction *= np.random.default_rng(part).normal(size=len(theta))
    gradient = saecost.mapfunc(theta, inputs)[1]
    assert gradient.shape == theta.shape
    assert gradient @ direction == pytest.approx(
        slope(lambda at: saecost.mapfunc(at, inputs), theta, direction), rel=1e-6
    )


def test_weight_decay_gradient_is_the_slope_and_spares_the_biases(theta):
    direction = np.random.default_rng(7).normal(size=len(theta))
    gradient = saecost.weight_decay(theta, 12)[1]
    assert gradient @ direction == pytest.approx(
        slope(lambda at: saecost.weight_decay(at, 12), theta, direction), rel=1e-6
    )
    weights = saecost.unpack(gradient, 12)
    assert not weights.b1.any()
    assert not weights.b2.any()
    assert weights.w2.any()


@pytest.mark.parametrize("cuts", [[1], [100, 101], [saecost.BLOCK], list(range(50, 400, 50))])
def test_autoencoder_cost_is_the_same_however_the_patches_are_sliced(inputs, theta, cuts):
    cost, gradient = saecost.mapfunc(theta, inputs)
    parts = [saecost.mapfunc(theta, part) for part in np.split(inputs, cuts)]
    assert sum(part[0] for part in parts) == pytest.approx(cost, rel=1e-12)
    np.testing.assert_allclose(sum(part[1] for part in parts), gradient, rtol=1e-9, atol=1e-9)


def test_the_network_is_64_30_64():
    assert len(saecost.initial_theta(64)) == 3934


def test_patches_are_whitened_and_fit_a_tanh():
    pytest.importorskip("sklearn")
    from examples.patches import natural_patches

    patches = natural_patches(5001)
    assert patches.shape == (5001, 64)
    assert patches.dtype == np.float64
    assert patches.flags.c_contiguous
    assert abs(patches).max() <= 0.9
    assert np.array_equal(patches, natural_patches(5001))
    # Neighbours in a photograph correlate with more than 0.9.
    neighbours = np.corrcoef(patches[:, 27], patches[:, 28])[0, 1]
    assert abs(neighbours) < 0.3


@pytest.mark.timeout(180)  # seconds; it takes 10 where nothing else runs
def test_sparse_autoencoder_learns_and_compares_and_draws(tmp_path):
    for needed in ("matplotlib", "scipy", "sklearn"):
        pytest.importorskip(needed)
    picture = tmp_path / "learned.png"
    program = str(CHECKOUT / "examples/sparse_autoencoder.py")
    text = output(program, "local*2", "--patches", "600", "--iterations", "20", "--output", "learned.png", cwd=tmp_path)
    assert picture.read_bytes().startswith(b"\x89PNG")
    costs = [float(line.split("cost")[1].split()[0]) for line in text.splitlines() if "iterations/s" in line]
    assert len(costs) == 4  # iterations 10 and 20, with the workers and without
    assert costs[1] < costs[0]
    assert costs[:2] == pytest.approx(costs[2:], rel=1e-3)
    assert [line.split(":")[0] for line in text.splitlines()[-3:]] == ["serial", "2 workers", "speed-up"]


def test_sparse_autoencoder_refuses_a_folder_that_is_not_there_before_it_learns(tmp_path):
    pytest.importorskip("sklearn")
    done = run("examples/sparse_autoencoder.py", "--output", str(tmp_path / "none" / "filters.png"))
    assert done.returncode == 2
    assert "existing folder" in last_line(done.stderr)
