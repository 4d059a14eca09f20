"""Classify an image with an exported file, without torch: python onnx_classify.py FILE.onnx IMAGE"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession(sys.argv[1])
card = json.loads(session.get_modelmeta().custom_metadata_map["replknet"])
image, side = Image.open(sys.argv[2]).convert("RGB"), card["image_size"]
short = int(side / card["crop_pct"])
size = (side, side) if card["crop_mode"] == "squash" else tuple(edge * short // min(image.size) for edge in image.size)
left, top = (round((edge - side) / 2) for edge in size)
image = image.resize(size, Image.Resampling[card["interpolation"].upper()]).crop((left, top, left + side, top + side))
x = (np.float32(image) / 255 - np.float32(card["mean"])) / np.float32(card["std"])
logits = session.run(None, {"image": x.transpose(2, 0, 1)[None]})[0][0]
probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
for i in probabilities.argsort()[::-1][:5]:
    print(f"{probabilities[i]:.6f} {card['classes'][i]}")
