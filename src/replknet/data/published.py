"""Sizes of published data sets, for estimates and tables that need none of their images."""

# images for training; ImageNet-22K is the whole of its 2011 release
IMAGES = {
    "cifar10": 50_000,
    "imagenet1k": 1_281_167,
    "imagenet22k": 14_197_122,
    "ade20k": 20_210,
    "cityscapes": 2_975,
}
# of a classifier
CLASSES = {"cifar10": 10, "imagenet1k": 1000, "imagenet22k": 21_841}
