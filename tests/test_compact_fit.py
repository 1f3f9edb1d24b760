"""The fit of the embedded reward: closed forms against plain numpy, and degraded images."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import eigh

RECIPES = Path(__file__).parents[1] / "examples" / "train_compact"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts import each other by name, as they do when run."""
    for name in ("fit", "features", "fit_guard"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(RECIPES))


def test_ridge_weights_are_those_of_kernel_ridge_regression() -> None:
    from fit import kernel, ridge_weights  # pyright: ignore[reportMissingImports]

    rng = np.random.default_rng(0)
    rows, noise, target = rng.normal(size=(40, 3)), rng.uniform(0.1, 1, 40), rng.normal(size=40)
    likeness = np.exp(-((rows[:, None] - rows[None]) ** 2).sum(axis=2))
    expected = np.linalg.inv(likeness + np.diag(noise)) @ target
    found = kernel(torch.from_numpy(rows), torch.from_numpy(rows))
    np.testing.assert_allclose(found.numpy(), likeness, atol=1e-12)
    weights = ridge_weights(found, torch.from_numpy(noise), torch.from_numpy(target))
    np.testing.assert_allclose(weights.numpy(), expected, atol=1e-9)


def test_two_sided_ridge_is_least_squares_on_both_sides() -> None:
    """Without regularization it recovers the map that made the target."""
    from fit import two_sided  # pyright: ignore[reportMissingImports]

    generator = torch.Generator().manual_seed(0)
    images, texts, truth = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((50, 6), (30, 4), (4, 6))
    )
    found = two_sided(images, texts, images @ truth.T @ texts.T, torch.zeros(6).double(), torch.zeros(4).double())
    torch.testing.assert_close(found, truth)


def test_principal_directions_are_those_of_the_singular_values() -> None:
    from fit import principal  # pyright: ignore[reportMissingImports]

    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 60, generator=generator) * torch.linspace(3, 0.05, 60) ** 2
    found, exact = principal(rows, 5), torch.linalg.svd(rows, full_matrices=False)[2][:5]
    torch.testing.assert_close((found @ exact.T).abs(), torch.eye(5), atol=1e-3, rtol=0)


def test_guarded_directions_are_those_in_which_climbs_move_most_against_the_images() -> None:
    """Against scipy's generalized eigenvectors, with fewer rows than columns and with more."""
    from fit_guard import directions, whitened  # pyright: ignore[reportMissingImports]

    rng = np.random.default_rng(0)
    for rows in (12, 200):
        known, moved = rng.normal(size=(rows, 20)) * np.linspace(3, 0.1, 20), rng.normal(size=(9, 20))
        covariance = known.T @ known / rows + 0.5 * np.square(known).mean() * np.eye(20)
        exact = eigh(moved.T @ moved, covariance)[1][:, -4:]
        found = directions(torch.from_numpy(known).float(), torch.from_numpy(moved).float(), 4, 0.5)
        between = np.linalg.svd(np.linalg.qr(exact)[0].T @ np.linalg.qr(found.numpy().T)[0])[1]
        np.testing.assert_allclose(between, 1, atol=1e-4)  # cosines of the angles between both spaces
        along = torch.from_numpy(known).float() @ whitened(torch.from_numpy(known).float(), found).T
        np.testing.assert_allclose((along.T @ along / rows).numpy(), np.eye(4), atol=0.02)
