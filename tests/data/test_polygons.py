"""Polygons have the pixels that pycocotools gives them, near and far, in memory that the coordinates do not decide."""

import tracemalloc
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as rle

from replknet.data import polygons


def theirs(corners, height, width):
    with warnings.catch_warnings():
        # its decode uses a feature that NumPy 2 deprecates
        warnings.simplefilter("ignore", DeprecationWarning)
        return rle.decode(rle.merge(rle.frPyObjects(corners, height, width)))


def ours(corners, height, width):
    runs = polygons.runs(polygons.edges(corners), height, width)
    assert runs.min() >= 0
    assert runs.sum() == height * width
    return np.repeat(np.arange(len(runs)) % 2, runs).reshape(width, height).T


def drawn(random, kind, height, width):
    """Corners inside of the image, up to three times as far, on whole pixels, on fifths of a pixel, or a long walk."""
    count, size = random.integers(3, 30), np.array([width, height])
    shapes = {
        "inside": lambda: random.uniform(0, 1, (count, 2)) * size,
        "three times as far": lambda: random.uniform(-3, 3, (count, 2)) * size,
        "far": lambda: random.uniform(-1e4, 1e4, (count, 2)),
        "pixels": lambda: random.integers(-5, max(size) + 5, (count, 2)).astype(float),
        "fifths": lambda: random.integers(-20, 5 * max(size) + 20, (count, 2)) / 5 + random.choice((0, 0.1, -0.1, 0.5)),
        "walk": lambda: random.uniform(-50, 50, (count, 2)).cumsum(0),
    }
    return shapes[kind]().ravel().tolist()


@pytest.mark.parametrize("kind", ["inside", "three times as far", "far", "pixels", "fifths", "walk"])
def test_pixels_are_those_of_pycocotools(kind):
    random = np.random.default_rng(0)
    for _ in range(60):
        height, width = (int(side) for side in random.integers(1, 120, 2))
        corners = [drawn(random, kind, height, width) for _ in range(random.integers(1, 5))]
        assert np.array_equal(ours(corners, height, width), theirs(corners, height, width)), (height, width, corners)


@given(
    st.lists(st.lists(st.floats(-99, 99), min_size=6, max_size=12).filter(lambda one: len(one) % 2 == 0), min_size=1),
    st.integers(1, 40),
    st.integers(1, 40),
)
def test_no_polygon_differs(corners, height, width):
    assert np.array_equal(ours(corners, height, width), theirs(corners, height, width))


def test_a_square_far_larger_than_its_image_fills_it():
    far = 999_999.0
    tracemalloc.start()
    assert ours([[-far, -far, far, -far, far, far, -far, far]], 50, 70).all()
    # pycocotools takes 900 MB for the same square, and ends the process on forty such corners
    assert not ours([[far, -far] * 20], 50, 70).any()
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


def test_a_polygon_drawn_often_stays_itself():
    corners = [[1.0, 1.0, 3.0, 1.0, 3.0, 3.0]] * 20_000
    assert np.array_equal(ours(corners, 50, 70), ours(corners[:1], 50, 70))


def test_crossings_are_counted_before_they_are_made():
    found = polygons.edges([[-1e5, 2, 1e5, 3] * 10])
    assert polygons.crossings(found, 70) == 20 * 70
    assert polygons.crossings(polygons.edges([[0, 0, 0, 5, 0, 9]]), 70) == 0
    assert polygons.crossings(polygons.edges([[1e5, 0, 2e5, 5, 1e5, 9]]), 70) == 0
