"""Names of cue-conflict images, and our own conflicts of CIFAR-10's test images on hand-made ones."""

import pytest
import torch
from PIL import Image

from replknet.data import cifar10_conflict
from replknet.data.cifar10_conflict import PATCH, STRENGTH, cartoons, conflicts, shuffled
from replknet.data.cue_conflict import CueConflicts, cue_conflicts
from replknet.data.images import ImageError

CATEGORIES = ("bear", "cat", "elephant")


def write(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 4), (len(name), 0, 0)).save(folder / name)


def test_names_say_shape_and_texture_in_folders_and_without(tmp_path):
    write(tmp_path, "cat/cat7-elephant1.png", "bear/bear10-cat3.png", "elephant/elephant2-elephant3.png")
    write(tmp_path / "flat", "cat1-bear12.png", "elephant1-cat2.JPEG")
    found = cue_conflicts(tmp_path, CATEGORIES)
    assert {(image.file.stem, image.shape, image.texture) for image in found} == {
        ("cat7-elephant1", 1, 2),
        ("bear10-cat3", 0, 1),
        ("elephant2-elephant3", 2, 2),
        ("cat1-bear12", 1, 0),
        ("elephant1-cat2", 2, 1),
    }
    images = CueConflicts(found, lambda image: (image.mode, image.size))
    assert len(images) == 5
    assert images[0] == ("RGB", (6, 4))


@pytest.mark.parametrize(
    "name", ["cat7.png", "cat-elephant.png", "cat7-elephant1-2.png", "n0001.png", "x_cat1-bear2.png"]
)
def test_another_name_is_told_with_the_form_expected(name, tmp_path):
    write(tmp_path, name)
    with pytest.raises(
        ImageError, match=rf"{name} is not named .* expected SHAPE<n>-TEXTURE<m>, such as bear1-elephant2"
    ):
        cue_conflicts(tmp_path, CATEGORIES)


def test_unknown_categories_and_wrong_folders_are_told(tmp_path):
    write(tmp_path, "a/cat1-lion2.png")
    with pytest.raises(ImageError, match="names 'lion', which is no category; there are bear, cat, eleph"):
        cue_conflicts(tmp_path / "a", CATEGORIES)
    write(tmp_path, "bear/cat1-elephant2.png")
    with pytest.raises(ImageError, match="has the shape 'cat' by its name and 'bear' by its folder"):
        cue_conflicts(tmp_path / "bear", CATEGORIES)
    with pytest.raises(ImageError, match="there is none at"):
        cue_conflicts(tmp_path / "nowhere", CATEGORIES)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageError, match="no images in"):
        cue_conflicts(tmp_path / "empty", CATEGORIES)


def two_kinds(count=20):
    """Test images of ten classes around mid-grey: a square of the class's own brightness, under fine noise."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(count) % 10
    images = torch.full((count, 3, 32, 32), 100.0)
    images[:, :, 8:24, 8:24] += 6.0 * labels[:, None, None, None]
    images += torch.randint(-12, 13, images.shape, generator=generator)
    return {"test_images": images.to(torch.uint8), "test_labels": labels}


def test_every_pair_of_different_classes_comes_equally_often():
    c = conflicts(two_kinds(), each=3)
    assert c.images.shape == c.shape_cues.shape == c.texture_cues.shape == (270, 3, 32, 32)
    assert c.images.dtype == torch.uint8
    assert (c.shapes * 10 + c.textures).bincount(minlength=100).tolist() == [
        0 if i % 11 == 0 else 3 for i in range(100)
    ]


def test_no_image_is_used_twice_where_there_are_enough(monkeypatch):
    monkeypatch.setattr(cifar10_conflict, "_STEPS", 1)
    arrays = two_kinds(180)
    # the brightest corner tells which image it was
    arrays["test_images"][:] = torch.arange(180, dtype=torch.uint8).view(-1, 1, 1, 1)
    c = conflicts(arrays, each=2)
    assert c.shape_cues[:, 0, 0, 0].unique(return_counts=True)[1].tolist() == [1] * 180
    assert torch.equal(c.shape_cues[:, 0, 0, 0].long() % 10, c.shapes)


def test_conflicts_are_a_function_of_the_seed():
    arrays = two_kinds()
    one, again, other = (conflicts(arrays, 1, seed) for seed in (0, 0, 1))
    assert torch.equal(one.images, again.images)
    assert not torch.equal(one.images, other.images)
    assert torch.equal(one.shapes, other.shapes)


def test_an_image_is_the_sum_of_its_cues():
    c = conflicts(two_kinds(), each=1)
    total = c.shape_cues.int() + c.texture_cues.int() - 128
    assert total.min() > 0
    assert total.max() < 255
    # each cue was rounded by half a level at most
    assert (c.images.int() - total).abs().max() <= 1


def test_the_shape_is_the_squares_of_one_class_and_the_texture_knows_no_square():
    c = conflicts(two_kinds(), each=10)
    centre = c.shape_cues[:, :, 12:20, 12:20].float().mean((1, 2, 3))
    brightness = torch.stack([centre[c.shapes == label].mean() for label in range(10)])
    assert (brightness.diff() > 2).all()
    middle = (c.texture_cues.float() - 128)[:, :, 12:20, 12:20].mean((1, 2, 3))
    for classes in (c.shapes, c.textures):
        assert max(abs(middle[classes == label].mean()) for label in range(10)) < 1.5


def test_sums_are_clamped_to_pixels():
    arrays = two_kinds()
    arrays["test_images"][:] = torch.where(torch.rand(20, 3, 32, 32) < 0.5, 0, 255).to(torch.uint8)
    c = conflicts(arrays, each=1)
    assert (c.images.min(), c.images.max()) == (0, 255)


def test_conflicts_need_images_of_every_class():
    with pytest.raises(ValueError, match="at least one image a pair of classes, got 0"):
        conflicts(two_kinds(), each=0)
    with pytest.raises(ValueError, match="no image of class truck"):
        conflicts({name: array[:9] for name, array in two_kinds().items()})


def test_the_cartoon_of_two_halves_is_known_exactly(monkeypatch):
    monkeypatch.setattr(cifar10_conflict, "_STEPS", 1000)
    x = torch.zeros(1, 1, 32, 32)
    x[..., 16:] = 100.0
    # lowering an edge of 32 pixels by 1 saves 32 and costs the 512 pixels of a half d / strength each
    step = STRENGTH * 32 / 512
    torch.testing.assert_close(cartoons(x), x + torch.where(x == 0, step, -step), atol=0.1, rtol=0)


def test_a_cartoon_keeps_means_and_edges_and_loses_fine_detail():
    flat = torch.full((1, 3, 32, 32), 90.0)
    torch.testing.assert_close(cartoons(flat), flat)
    board = (torch.arange(32)[:, None] + torch.arange(32)) % 2
    drawn = cartoons(flat + 20.0 * board)
    torch.testing.assert_close(drawn, torch.full_like(drawn, 100.0), atol=0.5, rtol=0)
    images = 255 * torch.rand(60, 3, 32, 32)
    # the mean of each channel stays, and images do not depend on those beside them
    torch.testing.assert_close(cartoons(images).mean((2, 3)), images.mean((2, 3)), atol=1e-3, rtol=0)
    torch.testing.assert_close(cartoons(images)[55:56], cartoons(images[55:56]))


def test_the_gradient_and_the_divergence_are_adjoint():
    u = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    p = cifar10_conflict._gradient(torch.randn_like(u))
    torch.testing.assert_close((cifar10_conflict._gradient(u) * p).sum(), -(u * cifar10_conflict._divergence(p)).sum())


def test_patches_change_places_whole():
    x = torch.arange(2 * 3 * 32 * 32).view(2, 3, 32, 32).float()
    same = torch.arange(16).expand(2, 16)
    assert torch.equal(shuffled(x, same), x)
    turned = shuffled(x, torch.stack([same[0], same[0].flip(0)]))
    assert torch.equal(turned[0], x[0])
    assert torch.equal(turned[1, :, :PATCH, :PATCH], x[1, :, -PATCH:, -PATCH:])
    assert torch.equal(turned[1, :, :PATCH, PATCH : 2 * PATCH], x[1, :, -PATCH:, -2 * PATCH : -PATCH])
