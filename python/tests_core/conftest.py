"""Tests of the package `veloxquant` (no MLX). test_core.py needs NumPy alone; the others skip without PyTorch."""

import numpy
import pytest


@pytest.fixture
def rng():
    return numpy.random.default_rng(7)
