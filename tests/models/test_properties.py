"""Whatever the network and its form, a file gives back the same bits: weights, configuration and results."""

import tempfile
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from replknet import load_checkpoint, merge
from replknet.models import Description, MobileNetV2Config, RepLKNetConfig, load_model, save_model

KERNELS = st.sampled_from((3, 5, 7, 13))


@st.composite
def configs(draw):
    small = draw(st.sampled_from((None, 3)))
    if draw(st.booleans()):
        return MobileNetV2Config(kernels=(draw(KERNELS),) * 7, small_kernel=small, width=0.25)
    stages = draw(st.integers(1, 4))
    return RepLKNetConfig(
        kernels=tuple(draw(KERNELS) for _ in range(stages)),
        depths=(1,) * stages,
        channels=tuple(draw(st.sampled_from((4, 6, 8))) for _ in range(stages)),
        small_kernel=small,
        dw_ratio=draw(st.sampled_from((1.0, 1.5))),
        stem_stride=draw(st.sampled_from((1, 2, 4))),
    )


FORMS = {
    "training": lambda model: model,
    "merged": lambda model: merge(model, fold_bn=False),
    "folded": merge,
}


def bits(state):
    return {name: (t.dtype, tuple(t.shape), t.numpy().tobytes()) for name, t in state.items()}


@settings(max_examples=12)
@given(
    config=configs(),
    form=st.sampled_from(list(FORMS)),
    num_classes=st.integers(1, 9),
    in_chans=st.sampled_from((1, 3)),
    crop_pct=st.floats(0.1, 1.0),
    seed=st.integers(0, 2**31),
)
def test_a_saved_network_comes_back_bit_for_bit(config, form, num_classes, in_chans, crop_pct, seed):
    torch.manual_seed(seed)
    description = Description(
        config=config,
        in_chans=in_chans,
        classes=tuple(f"class {i}" for i in range(num_classes)),
        num_classes=num_classes,
        image_size=32,
        crop_pct=crop_pct,
    )
    model = FORMS[form](description.build().eval())
    x = torch.randn(2, in_chans, 32, 32)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        file = Path(folder) / "network.safetensors"
        save_model(model, file, description)
        loaded, found = load_model(file)
        assert found == description
        assert bits(loaded.state_dict()) == bits(model.state_dict())
        assert torch.equal(loaded.eval()(x), model(x))
        other = FORMS[form](description.build().eval())
        load_checkpoint(other, file)
        assert bits(other.state_dict()) == bits(model.state_dict())
