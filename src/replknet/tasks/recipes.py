"""Presets that a person can read: plain functions that return a frozen `Recipe`."""

from collections.abc import Callable

from replknet.tasks.classification import imagenet
from replknet.tasks.classification.recipes import cifar10, cifar10_l, folder
from replknet.tasks.detection import recipes as detection
from replknet.tasks.detection.recipes import DetectionRecipe
from replknet.tasks.segmentation import recipes as segmentation
from replknet.tasks.segmentation.recipes import SegmentationRecipe
from replknet.train.hardware import Hardware
from replknet.train.recipe import Recipe

AnyRecipe = Recipe | SegmentationRecipe | DetectionRecipe

RECIPES: dict[str, Callable[[], AnyRecipe]] = {
    recipe.__name__: recipe
    for recipe in (
        cifar10,
        cifar10_l,
        folder,
        imagenet.imagenet1k_31b_224,
        imagenet.imagenet1k_31b_384,
        imagenet.imagenet22k_31b_224,
        imagenet.imagenet22k_31l_224,
        imagenet.imagenet22k_to_1k_31b_224,
        imagenet.imagenet22k_to_1k_31b_384,
        imagenet.imagenet22k_to_1k_31l_384,
        imagenet.imagenet1k_xl_320,
        imagenet.imagenet1k_b_120,
        imagenet.imagenet1k_mobilenetv2_100,
        segmentation.ade20k_31b_512,
        segmentation.ade20k_31b_640,
        segmentation.ade20k_31l_640,
        segmentation.ade20k_xl_640,
        segmentation.cityscapes_31b_769,
        segmentation.camvid,
        detection.bccd,
        detection.shapes,
        detection.coco_fcos_31b,
        detection.coco_cascade_31b,
        detection.coco_cascade_31b_22k,
        detection.coco_cascade_31l,
        detection.coco_cascade_xl,
    )
}

__all__ = [
    "RECIPES",
    "AnyRecipe",
    "DetectionRecipe",
    "Hardware",
    "Recipe",
    "SegmentationRecipe",
    "cifar10",
    "cifar10_l",
    "folder",
]
