"""Network families and their weights. Importing this package registers the networks with timm."""

# as a whole, and first: if another thread is half-way through it, this waits, and an import of a part of it would fail
import timm  # noqa: F401

from replknet.models.checkpoints import CheckpointError, load_checkpoint, read_state_dict
from replknet.models.detection_keys import from_mmdet, to_mmdet
from replknet.models.key_formats import from_mmseg, to_mmseg
from replknet.models.mobilenetv2 import MobileNetV2, MobileNetV2Config
from replknet.models.model_files import NETWORKS, Description, load_model, save_model, shipped
from replknet.models.replknet import CONFIGS, RepLKNet, RepLKNetConfig

__all__ = [
    "CONFIGS",
    "NETWORKS",
    "CheckpointError",
    "Description",
    "MobileNetV2",
    "MobileNetV2Config",
    "RepLKNet",
    "RepLKNetConfig",
    "from_mmdet",
    "from_mmseg",
    "load_checkpoint",
    "load_model",
    "read_state_dict",
    "save_model",
    "shipped",
    "to_mmdet",
    "to_mmseg",
]
