"""Fine-tuning and conversion on several processes agree with one process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.slow


def launch(folder: Path, processes: int) -> list[dict[str, Any]]:
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = []
    for rank in range(processes):
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
            "CUDA_VISIBLE_DEVICES": "",
        }
        if processes > 1:
            environment |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        worker = Path(__file__).with_name("distributed_worker.py")
        running.append(
            subprocess.Popen(
                [sys.executable, str(worker), str(folder)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        logs = [process.communicate(timeout=120)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert all(process.returncode == 0 for process in running), "\n".join(logs)
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(processes)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One process, and two with the same global batch."""
    folder = tmp_path_factory.mktemp("distributed")
    (alone,) = launch(folder / "one", 1)
    return alone, launch(folder / "two", 2)


Runs = tuple[dict[str, Any], list[dict[str, Any]]]


def test_processes_agree(runs: Runs) -> None:
    _, (first, second) = runs
    for part in ("converted", "trained", "norm"):
        for name, value in first[part].items():
            assert torch.equal(value, second[part][name]), (part, name)
    for part in ("history", "errors", "used"):
        assert first[part] == second[part]


def test_processes_learn_the_codebooks_of_one(runs: Runs) -> None:
    alone, (two, _) = runs
    for error, other in zip(alone["errors"], two["errors"], strict=True):
        assert other == pytest.approx(error, rel=0.25)
    counts = [r["converted"]["mixed.cluster_counts"].sum(1) for r in (alone, two)]
    assert torch.equal(*counts)  # each process has half of the rows
    assert alone["converted"]["conv.act_scale"] == pytest.approx(
        float(two["converted"]["conv.act_scale"]), rel=0.3
    )


def test_kmeans_where_one_process_has_too_few_samples(runs: Runs) -> None:
    for result in (runs[0], *runs[1]):
        assert result["line_counts"].sum() == 40
        assert (result["line_counts"] > 0).all()
    assert torch.equal(runs[1][0]["line"], runs[1][1]["line"])


def test_two_processes_train_like_one(runs: Runs) -> None:
    alone, (two, _) = runs
    for name, value in alone["trained"].items():
        torch.testing.assert_close(
            two["trained"][name], value, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
    for got, want in zip(two["history"], alone["history"], strict=True):
        assert got == pytest.approx(want, rel=1e-3)
