"""What holds for any call of the operator: identity, linearity, shifts and the adjoint, each within rounding."""

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from properties import Sample, samples

# one in each way to compute, which random ones may miss
DOUBLE = Sample((2, 3, 7, 9), (5, 11), torch.float64, torch.contiguous_format, "auto", 0)
TRANSFORMS = Sample((1, 16, 14, 12), (9, 7), torch.float32, torch.channels_last, "fft", 0)

PARTS = st.sampled_from((-2.0, -0.5, 1.0, 3.0))


def within(found, expected, allowed):
    excess = (found.double() - expected.double()).abs() / allowed
    assert not excess.isnan().any()
    assert excess.max() <= 1, f"{excess.max():.2f} times what rounding allows"


@settings(max_examples=60)
@example(DOUBLE)
@example(TRANSFORMS)
@given(samples())
def test_a_kernel_whose_centre_tap_is_one_is_the_identity(sample):
    (x,), (weight,) = sample.images(), sample.weights()
    weight.zero_()[:, :, sample.kernel[0] // 2, sample.kernel[1] // 2] = 1
    y = sample.convolved(x, weight)
    if sample.algorithm == "direct" or sample.dtype == torch.float64:
        assert torch.equal(y, x)
    else:
        within(y, x, sample.rounding(x, weight))


@settings(max_examples=60)
@example(DOUBLE, 2.0, 1.0)
@example(TRANSFORMS, -0.5, 3.0)
@given(samples(), PARTS, PARTS)
def test_it_is_linear_in_the_image(sample, a, b):
    # eighths up to 2, so that the sum is exact in every dtype
    first, second = (x.mul(8).round().div(8).clamp(-2, 2) for x in sample.images(2))
    (weight,) = sample.weights()
    both = a * first + b * second
    separate = a * sample.convolved(first, weight).double() + b * sample.convolved(second, weight).double()
    allowed = sample.rounding(both, weight)
    allowed = allowed + abs(a) * sample.rounding(first, weight) + abs(b) * sample.rounding(second, weight)
    within(sample.convolved(both, weight), separate, allowed)


@settings(max_examples=60)
@example(DOUBLE, 2.0, 1.0)
@example(TRANSFORMS, -0.5, 3.0)
@given(samples(), PARTS, PARTS)
def test_it_is_linear_in_the_kernel(sample, a, b):
    (x,) = sample.images()
    # multiples of 1/64 up to 1/4, so that the sum is exact in every dtype
    first, second = (w.mul(64).round().div(64).clamp(-0.25, 0.25) for w in sample.weights(2))
    both = a * first + b * second
    separate = a * sample.convolved(x, first).double() + b * sample.convolved(x, second).double()
    allowed = sample.rounding(x, both)
    allowed = allowed + abs(a) * sample.rounding(x, first) + abs(b) * sample.rounding(x, second)
    within(sample.convolved(x, both), separate, allowed)


@settings(max_examples=60)
@example(Sample((2, 3, 12, 12), (3, 5), torch.float64, torch.contiguous_format, "auto", 0), 1, 2)
@example(TRANSFORMS, 3, 0)
@given(samples(largest_kernel=9), st.integers(0, 6), st.integers(0, 6))
def test_a_shift_of_the_image_shifts_the_interior(sample, down, right):
    (x,), (weight,) = sample.images(), sample.weights()
    rolled = x.roll((down, right), (2, 3))
    expected = sample.convolved(x, weight).roll((down, right), (2, 3))
    allowed = sample.rounding(x, weight).roll((down, right), (2, 3)) + sample.rounding(rolled, weight)
    # outputs whose windows see neither the border nor what was rolled over it
    rows, columns = (
        slice(shift + side // 2, max(0, size - side // 2))
        for shift, side, size in zip((down, right), sample.kernel, sample.shape[2:], strict=True)
    )
    interior = (..., rows, columns)
    if expected[interior].numel():
        within(sample.convolved(rolled, weight)[interior], expected[interior], allowed[interior])


@settings(max_examples=60)
@example(DOUBLE)
@example(TRANSFORMS)
@given(samples())
def test_the_rotated_kernel_is_the_adjoint_and_the_gradient(sample):
    x, dy = sample.images(2)
    (weight,) = sample.weights()
    rotated = weight.flip(2, 3)
    y, back = sample.convolved(x, weight), sample.convolved(dy, rotated)
    one, other = ((a.double() * b.double()).sum() for a, b in ((y, dy), (x, back)))
    allowed = (sample.rounding(x, weight) * dy.double().abs()).sum()
    allowed = allowed + (sample.rounding(dy, rotated) * x.double().abs()).sum()
    within(one, other, allowed)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(sample.convolved(x, weight), x, dy)
    within(dx, back, 2 * sample.rounding(dy, rotated))
