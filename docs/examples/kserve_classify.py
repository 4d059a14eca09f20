"""Classify an image on a server of the KServe v2 protocol: python kserve_classify.py URL CARD.json IMAGE"""

import json
import sys
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np
from PIL import Image

url, card = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
image, side = Image.open(sys.argv[3]).convert("RGB"), card["image_size"]
short = int(side / card["crop_pct"])
size = (side, side) if card["crop_mode"] == "squash" else tuple(edge * short // min(image.size) for edge in image.size)
left, top = (round((edge - side) / 2) for edge in size)
image = image.resize(size, Image.Resampling[card["interpolation"].upper()]).crop((left, top, left + side, top + side))
x = (np.float32(image) / 255 - np.float32(card["mean"])) / np.float32(card["std"])

values = x.transpose(2, 0, 1).ravel().tolist()
tensor = {"name": "image", "shape": [1, 3, side, side], "datatype": "FP32", "data": values}
body = json.dumps({"inputs": [tensor]}).encode()
with urlopen(Request(url, body, {"Content-Type": "application/json"})) as response:
    (output,) = json.load(response)["outputs"]
logits = np.float32(output["data"])
probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
for i in probabilities.argsort()[::-1][:5]:
    print(f"{probabilities[i]:.6f} {card['classes'][i]}")
