"""What a file may ask for. Each limit is what the largest of our networks and data sets need, times a margin.

A file of a few bytes can declare a network of a million layers, or an archive member of a gigabyte. These numbers are
checked before anything is allocated. `REPLKNET_LIMITS=4`, or `--limits 4` on the command line, multiplies all of them.
"""

import math
import os

VARIABLE = "REPLKNET_LIMITS"

# blocks of a network, or values in one of its options: RepLKNet-31B has 24
BLOCKS = 200
# channels of a layer: the feed-forward layers of RepLKNet-XL have 8,192
CHANNELS = 65_536
# side of a kernel, pixels: 31
KERNEL = 255
# names of classes: ImageNet-22K has 21,841
CLASSES = 200_000
# letters in such a name: the longest of ImageNet-22K's has 78
NAME = 1_000
# side of a network's input, pixels: Cityscapes is evaluated at 2049x1025
SIDE = 8_192
# pixels of an image, or of a network's input: a camera's photo has 50 million. Decoding a WebP takes 16 bytes a pixel
PIXELS = 8_000 * 8_000
# pixels of all masks of an image: Cascade Mask R-CNN is trained on images of 1333x800 with up to 93 objects
MASK_PIXELS = 512 * 1024 * 1024
# how often the edges of an image's polygons cross a column of pixels: 93 objects as wide as an image of 1333 pixels,
# with 20 edges above each other, do it 2.5 million times
CROSSINGS = 4_000_000
# names in an archive: ImageNet-1K has 1.3 million images
FILES = 4_000_000
# bytes of a header in a tar archive that describes the next file, and records for all files: a path has 4,096 bytes
HEADER = 16_384
RECORDS = 100
# bytes of an image's file: eight a pixel hold 16 bits for each of four channels
IMAGE = 8 * PIXELS
# bytes of a text: the annotations of COCO's train2017 are 448 MB
TEXT = 2 * 1024**3
# bytes of a list of classes, a recipe or a card: ADE20K's classes are 4 KB, a card with ImageNet-22K's names is 400 KB
LIST = 16 * 1024**2
# bytes of an archive's member, for each byte that it takes in the archive: COCO's annotations have 5
INFLATION = 50
# entries of a checkpoint: a training state of RepLKNet-31B has 1,171 tensors and three times as many in its optimiser
ENTRIES = 200_000
# instructions of a pickle: each of those entries takes about 30
INSTRUCTIONS = 2_000_000
# bytes that ONNX Runtime may take for exported files: UperNet over RepLKNet-XL has 1.6 GB of weights and, for an image
# of 2049x1025, maps of 1 GB; three quarters of the machine's memory where that is less
MEMORY = 32 * 1024**3
# seconds that such a file may compute on one batch: a loop in it could run for ever
SECONDS = 600
# bytes of a network's tensors, for each byte of its file: two layers may share their weights
SHARING = 4


class LimitError(ValueError):
    """A file asks for more than it may. The text says what was asked for, what is allowed, and how to allow more."""


def factor() -> float:
    """The number by which all limits are multiplied: 1, or what the user chose.

    Raises:
        ValueError: `REPLKNET_LIMITS` is no positive number.
    """
    text = os.environ.get(VARIABLE, "1")
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise ValueError(f"{VARIABLE} must be a positive number, such as 4, got {text!r}")
    return found


def check(found: float, most: float, what: str) -> None:
    """Refuse a size that a file asks for.

    Args:
        found: the size.
        most: one of the limits above.
        what: what is counted, in the plural, such as "pixels in an image".

    Raises:
        LimitError: it is larger than the limit.
    """
    allowed = most * factor()
    if not found <= allowed:
        enough = math.ceil(found / most) if found < math.inf else None
        way_out = f"; if you trust the file, {VARIABLE}={enough} allows it" if enough is not None else ""
        raise LimitError(f"asks for {found:,.0f} {what}, more than the {allowed:,.0f} allowed{way_out}")
