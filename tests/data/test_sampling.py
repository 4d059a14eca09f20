"""Randomness by seed, epoch and image: the same whoever asks, and different wherever it should be."""

import random

import numpy as np
import pytest
import torch

from replknet.data.cifar10 import MEAN, STD, Moved
from replknet.data.sampling import Draw, Drawn, EveryOnce, GlobalBatches, collate, order, seed_all, uniforms


def global_steps(processes, accumulate, **options):
    """The images of each step, over all processes and accumulated batches."""
    ranks = [
        list(GlobalBatches(50, 12, 7, rank=r, processes=processes, accumulate=accumulate, **options))
        for r in range(processes)
    ]
    return [
        [draw for part in range(accumulate) for rank in ranks for draw in rank[step * accumulate + part]]
        for step in range(len(ranks[0]) // accumulate)
    ]


def test_a_step_has_the_same_images_on_any_number_of_processes():
    one = global_steps(1, 1)
    assert len(one) == 4
    assert len({draw.image for step in one for draw in step}) == 48
    for processes, accumulate in ((2, 1), (1, 3), (2, 2), (3, 4)):
        assert global_steps(processes, accumulate) == one


def test_it_goes_on_where_it_stopped():
    one = global_steps(1, 1)
    assert global_steps(2, 1, start=3) == one[3:]
    batches = GlobalBatches(50, 12, 7, start=4 * 5 + 1)
    assert len(batches) == 4
    batches.set_epoch(5)
    assert [draw.epoch for step in batches for draw in step] == [5] * 36
    batches.set_epoch(6)
    steps = list(batches)
    assert len(steps) == 4
    assert [draw.image for step in steps for draw in step] == order(7, 6, 50).tolist()[:48]


def test_each_epoch_and_seed_has_its_order():
    orders = [tuple(order(seed, epoch, 20).tolist()) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4
    assert all(sorted(one) == list(range(20)) for one in orders)


def test_a_batch_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="batch_size 12 must be a multiple of 5 processes times 1 accumulated batches"):
        GlobalBatches(50, 12, 0, processes=5)
    with pytest.raises(ValueError, match="batch_size 64 is larger than the training set of 50 images"):
        GlobalBatches(50, 64, 0)


def test_in_evaluation_every_image_is_with_one_process():
    parts = [list(EveryOnce(10, rank, 3)) for rank in range(3)]
    assert sorted(image for part in parts for image in part) == list(range(10))
    assert [len(EveryOnce(10, rank, 3)) for rank in range(3)] == [4, 3, 3]


def test_the_generators_are_put_into_the_state_of_the_numbers():
    def drawn():
        return random.random(), np.random.rand(), torch.rand(()).item()

    seed_all(1, 2, 3)
    first = drawn()
    assert drawn() != first
    seed_all(1, 2, 3)
    assert drawn() == first
    seed_all(1, 3, 2)
    assert not set(drawn()) & set(first)


class Noisy:
    def __len__(self):
        return 9

    def __getitem__(self, index):
        return torch.full((2,), index) + torch.rand(2) + random.random() + np.random.rand(), index


def test_an_image_is_transformed_alike_in_any_batch_and_worker():
    draws = [[Draw(0, 1), Draw(0, 2)], [Draw(0, 3)], [Draw(1, 1)]]
    other = [[Draw(0, 3), Draw(0, 2), Draw(0, 1)], [Draw(1, 1)]]

    def images(batches, workers):
        loader = torch.utils.data.DataLoader(
            Drawn(Noisy(), 5), batch_sampler=batches, collate_fn=collate, num_workers=workers
        )
        return {
            draw: image.tolist()
            for batch, (x, _) in zip(batches, loader, strict=True)
            for draw, image in zip(batch, x, strict=True)
        }

    assert images(draws, 0) == images(other, 2)
    assert len({tuple(v) for v in images(draws, 0).values()}) == 4


def test_uniform_numbers_belong_to_the_draw_and_are_uniform():
    draws = [Draw(epoch, image) for epoch in range(40) for image in range(250)]
    u = uniforms(3, draws, 3)
    assert u.shape == (10000, 3)
    assert np.array_equal(uniforms(3, draws[777:779], 3), u[777:779])
    assert not np.array_equal(uniforms(4, draws[:1], 3), u[:1])
    assert len(np.unique(u)) == u.size
    counts = np.stack([np.histogram(u[:, i], 20, (0, 1))[0] for i in range(3)])
    # 500 expected in each; five standard deviations
    assert np.abs(counts - 500).max() < 110
    # of one draw, and of a draw with the next
    together = np.concatenate([u[1:], u[:-1, :1]], 1)
    assert np.abs(np.corrcoef(together.T) - np.eye(4)).max() < 0.05


def test_moved_images_are_windows_of_mirrored_ones():
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    moved = Moved({"train_images": images, "train_labels": torch.arange(4)}, 32, 4)
    draws = [Draw(epoch, image) for epoch in range(30) for image in range(4)]
    x, labels = moved.draw_batch(0, draws)
    assert labels.tolist() == [draw.image for draw in draws]
    assert x.is_contiguous(memory_format=torch.channels_last)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    pixels = (x * std + mean) * 255
    seen = set()
    for draw, image in zip(draws, pixels, strict=True):
        padded = torch.nn.functional.pad(images[draw.image].float(), [4] * 4, mode="reflect")
        for flip in (False, True):
            for top in range(9):
                for left in range(9):
                    window = padded[:, top : top + 32, left : left + 32]
                    if torch.allclose(window.flip(2) if flip else window, image, atol=1e-3):
                        seen.add((top, left, flip))
    # each image was found, and they were moved in many ways
    assert len(seen) > 60
    assert torch.equal(moved.draw_batch(0, draws[5:6])[0][0], x[5])
    larger = Moved({"train_images": images, "train_labels": torch.arange(4)}, 40, None)
    assert larger.draw_batch(0, draws[:2])[0].shape == (2, 3, 40, 40)


def test_erased_rectangles_have_the_mean_colour_and_the_papers_areas():
    images = torch.full((500, 3, 32, 32), 255, dtype=torch.uint8)
    erased = Moved({"train_images": images, "train_labels": torch.arange(500)}, 32, None, 0.4)
    draws = [Draw(3, image) for image in range(500)]
    holes = (erased.draw_batch(0, draws)[0] == 0).all(1)
    areas = holes.sum((1, 2))
    # binomial: 200 expected, five standard deviations
    assert 145 < int((areas > 0).sum()) < 255
    for hole in holes[areas > 0]:
        rows, columns = hole.any(1), hole.any(0)
        # rows and columns in one piece, and all of their crossings
        assert int(hole.sum()) == int(rows.sum()) * int(columns.sum())
        assert int(rows.int().diff().abs().sum()) <= 2
    # 2 to 33 % of 1024 pixels, sides rounded; a long one is cut at the border
    assert int(areas[areas > 0].min()) >= 12
    assert int(areas.max()) <= 360
    assert float(areas[areas > 0].float().std()) > 50
