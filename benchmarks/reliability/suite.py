"""The promises that `make test` holds in full: which tests they are, and how many cases pass."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from result import Result

ROOT = Path(__file__).resolve().parents[2]
# name -> files of tests/, or tests in them
TESTS = {
    "R3 a failed solve is loud": (
        "test_ode.py::test_blow_up_raises", "test_ode.py::test_values_that_are_not_finite_raise",
        "test_ode.py::test_the_evaluation_limit_raises",
        "sampling/test_adaptive.py::test_a_field_that_is_not_finite_is_an_error",
        "sampling/test_adaptive.py::test_a_limit_on_evaluations_is_an_error",
        "sampling/test_sampler.py::test_a_sample_that_is_not_finite_is_named",
        "likelihood/test_likelihood.py::test_a_failed_solve_returns_no_number",
        "diffusion/test_density.py::test_a_path_that_breaks_names_its_sample",
    ),
    "R4 likelihood against closed forms": (
        "likelihood/test_likelihood.py::test_mixtures_are_measured_to_1e_3_nats_per_dim",
        "likelihood/test_likelihood.py::test_uniform_noise_of_8_bits_is_8_bits_per_dim",
        "likelihood/test_likelihood.py::test_hutchinson_is_within_its_stated_error",
    ),
    "R5, R9 hostile checkpoints, configurations and targets": ("cli/test_security.py",),
    "R10 sample k depends on seed k only": (
        "noise/test_rng.py::test_sample_k_depends_on_seed_k_only",
        "sampling/test_sampler.py::test_a_sample_depends_on_its_own_seed_only",
        "evaluate/test_shards.py::test_any_number_of_ranks_gives_the_same_samples",
    ),
    "R11, R12 orders and costs of solvers": ("sampling/test_step_orders.py",),
    "R13 samplers land on exact moments": ("sampling/test_moments.py",),
    "R18 another number of processes": (
        "train/test_parallel.py::test_one_two_one",
        "train/test_parallel.py::test_a_checkpoint_is_of_no_number_of_processes",
        "train/test_parallel.py::test_two_processes_learn_what_one_learns",
    ),
    "R19 bad data": ("cli/test_bad_data.py", "data/test_data.py"),
    "R20 typos in overrides and files": ("cli/test_typos.py",),
    "R21 averages": ("train/test_ema.py", "runs/test_posthoc.py"),
    "R23 times of another shape or type, grids outside the SDE": (
        "diffusion/test_sde.py::test_times_of_another_shape_are_refused",
        "diffusion/test_sde.py::test_integer_times_are_refused",
        "sampling/test_sampler.py::test_bad_grids_are_refused",
        "sampling/test_sampler.py::test_networks_see_finite_times_inside_the_range",
    ),
    "R24 each row exactly once": (
        "runs/test_logger.py::test_a_crash_at_any_byte_loses_no_row_before_the_checkpoint",
        "runs/test_logger.py::test_three_crashes_after_a_checkpoint_leave_each_step_once",
        "runs/test_logger.py::test_a_crash_while_the_file_is_made_anew_keeps_the_old_one",
        "runs/test_logger.py::test_rows_that_found_no_room_are_written_when_there_is",
    ),
    "R28 secrets": ("runs/test_secrets.py", "runs/test_logger.py::test_no_secret_is_in_the_offline_files"),
    "R29 a likelihood does not depend on its batch": (
        "likelihood/test_likelihood.py::test_a_sample_does_not_depend_on_its_batch_mates",
        "diffusion/test_density.py::test_a_hostile_neighbour_changes_nothing",
    ),
    "R33 permissions": ("runs/test_permissions.py",),
    "R34 import and install": ("test_install.py", "test_architecture.py::test_import_has_no_side_effects"),
}  # fmt: skip


def campaign(full: bool, scratch: Path) -> list[Result]:
    """Runs them and counts; the short form, which is part of them, looks whether they are there."""
    return [(_run if full else _there)(name, wanted, scratch) for name, wanted in TESTS.items()]


def _there(name: str, wanted: tuple[str, ...], scratch: Path) -> Result:
    found = 0
    for test in wanted:
        file, _, function = test.partition("::")
        text = (ROOT / "tests" / file).read_text(encoding="utf-8")
        found += bool(re.search(rf"^def {function}\(" if function else r"^def test_", text, re.MULTILINE))
    return Result(name, len(wanted), found, 0, ", ".join(wanted))


def _run(name: str, wanted: tuple[str, ...], scratch: Path) -> Result:
    report = scratch / "report.xml"
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *(f"tests/{test}" for test in wanted)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    (suite,) = ElementTree.parse(report).getroot().iter("testsuite")
    tried = int(suite.attrib["tests"])
    missed = sum(int(suite.attrib[kind]) for kind in ("failures", "errors", "skipped"))
    return Result(name, tried, tried - missed, 0, ", ".join(dict.fromkeys(t.split("::")[0] for t in wanted)))
