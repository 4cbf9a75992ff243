# SPDX-License-Identifier: AGPL-3.0-or-later
"""Checks in other environments than that of the test suite: releases of Ultralytics, lowest bounds, integrations."""

from __future__ import annotations

import nox

RELEASES = ("8.3.0", "8.3.100", "8.3.200", "8.4.0", "8.4.60", "8.4.120", "8.4.190")
"""Oldest, some in between, newest; `yolo_prune/env/versions.py` and `pyproject.toml` name the ends."""
MAIN_PATH = ("tests/test_main_path.py", "tests/test_kill.py")
RELEASE_CHECKS = {
    "tests": ("-m", "pytest", "-q", "-m", "long or not long", *MAIN_PATH),
    "architectures": ("benchmarks/releases.py",),
}

nox.options.sessions = ["releases"]
nox.options.reuse_existing_virtualenvs = True


@nox.session
def releases(session: nox.Session) -> None:
    """The main path, the kill tests and all architectures on each release, in one environment."""
    session.install(".", "pytest", "pytest-xdist", "onnx", "onnxruntime", "onnxscript", "onnxslim")
    outcome = {}
    for release in session.posargs or RELEASES:
        session.install(f"ultralytics=={release}")
        failed = [name for name, command in RELEASE_CHECKS.items() if not _passes(session, command)]
        outcome[release] = f"FAILED ({', '.join(failed)})" if failed else "passed"
    session.log("; ".join(f"ultralytics {release} {result}" for release, result in outcome.items()))
    if set(outcome.values()) != {"passed"}:
        session.error("not every release works")


def _passes(session: nox.Session, command: tuple[str, ...]) -> bool:
    try:
        session.run("python", *command)
    except nox.command.CommandFailed:
        return False
    return True


@nox.session
def lowest(session: nox.Session) -> None:
    """The main path, and the documentation, with the lowest versions that `pyproject.toml` allows."""
    session.install(".", "pytest", "pytest-xdist", *LOWEST)
    session.run("python", "-m", "pytest", "-q", MAIN_PATH[0])
    session.install(*LOWEST_DOCS)
    session.run("python", "-m", "pytest", "-q", "tests/test_docs.py", env={"YOLO_PRUNE_TEST_DOCS": "1"})


@nox.session
def integrations(session: nox.Session) -> None:
    """Experiment trackers, quantization-aware training and OpenVINO, none of which is a dependency."""
    session.install(
        ".[test]", "tensorboard", "mlflow", "wandb", "nvidia-modelopt", "huggingface_hub", "openvino", "nncf"
    )
    session.run("python", "-m", "pytest", "-q", "tests/test_further.py", "tests/test_zeros.py")


LOWEST = (
    "jinja2==3.1.0",
    "markupsafe==2.1.2",
    "matplotlib==3.6.*",
    "numpy==1.23.5",
    "pydantic==2.7.0",
    "pyyaml==6.0",
    "torch==2.4.0",
    "torch-pruning==1.6.1",
    "torchvision==0.19.0",
    "ultralytics==8.3.0",
)

LOWEST_DOCS = ("furo==2024.8.6", "myst-parser==4.0.0", "sphinx==8.0.0")
