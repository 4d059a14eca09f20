"""Image classification: predictions and scores."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from replknet.data import transforms
from replknet.data.batches import batches
from replknet.tasks.classification import sets
from replknet.tasks.classification.settings import EvaluationSettings, PredictionSettings
from replknet.tasks.task import Comparison, Infer, Network, Prediction, Scored, Shown, random_images


@dataclass(frozen=True)
class Scores:
    """How well a network classifies a data set; shares are from 0 to 1.

    Args:
        images: number of images.
        top1: share of images whose likeliest class is right.
        top5: share of images with the right class among the five likeliest; None for five classes or fewer.
        loss: mean cross entropy, nats.
        per_class: share of right answers in each class.
        confusion: numbers of images; the row is the true class, the column the predicted one.
    """

    images: int
    top1: float
    top5: float | None
    loss: float
    per_class: list[float]
    confusion: list[list[int]]


@torch.inference_mode()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor] | None]) -> Scores:
    """Score a network in eval mode.

    Args:
        model: maps images `[N,3,H,W]` to logits `[N,classes]`.
        batches: images `[N,3,H,W]`, normalised, and labels `[N]`; a batch of None is skipped.

    Returns:
        The scores over all images.

    Raises:
        ValueError: there is no image, or the network has no output for a label.
    """
    model = model.eval()
    logits, labels = [], []
    for x, target in filter(None, batches):
        logits.append(model(x.contiguous(memory_format=torch.channels_last)).float())
        labels.append(target)
    if not logits:
        raise ValueError("no images to evaluate")
    y, t = torch.cat(logits), torch.cat(labels)
    classes = y.shape[1]
    if int(t.max()) >= classes:
        raise ValueError(f"the data set has a class {int(t.max())}, the network has {classes} outputs")
    confusion = torch.bincount(t * classes + y.argmax(1), minlength=classes**2).view(classes, classes)
    top5 = None if classes <= 5 else (y.topk(5).indices == t[:, None]).any(1).double().mean().item()
    return Scores(
        images=len(t),
        top1=(y.argmax(1) == t).double().mean().item(),
        top5=top5,
        loss=nn.functional.cross_entropy(y, t).item(),
        per_class=(confusion.diag() / confusion.sum(1).clamp(min=1)).tolist(),
        confusion=confusion.tolist(),
    )


@dataclass(frozen=True)
class Guess:
    """A class of an image, with its probability.

    Args:
        label: number of the class.
        name: name of the class; its number as a text if the name is unknown.
        probability: probability of the class, from 0 to 1.
    """

    label: int
    name: str
    probability: float


@torch.inference_mode()
def predict(model: nn.Module, x: Tensor, classes: tuple[str, ...] = (), top: int = 5) -> list[list[Guess]]:
    """The likeliest classes of each image of a batch `[N,3,H,W]`, best first.

    Args:
        model: a network, run in eval mode.
        x: normalised images.
        classes: names of the outputs; if empty, the names are the numbers of the outputs.
        top: number of classes to return; all classes if it is larger.

    Returns:
        A list of guesses for each image.

    Raises:
        ValueError: `top` is not positive.
    """
    if top < 1:
        raise ValueError(f"top must be positive, got {top}")
    p = model.eval()(x.contiguous(memory_format=torch.channels_last)).softmax(1)
    found = p.topk(min(top, p.shape[1]))
    return [
        [Guess(label, classes[label] if classes else str(label), q) for label, q in zip(labels, values, strict=True)]
        for labels, values in zip(found.indices.tolist(), found.values.tolist(), strict=True)
    ]


def _predictor(network: Network, settings: PredictionSettings) -> Callable[[Image.Image], Prediction]:
    d = network.description
    transform = transforms.eval_transform(d.image_size, d.mean, d.std, d.crop_pct)

    def found(image: Image.Image) -> Prediction:
        guesses = predict(network.model, transform(image)[None], d.classes, settings.top)[0]
        text = ", ".join(f"{guess.name} {100 * guess.probability:.1f} %" for guess in guesses)
        return Prediction({"top": [asdict(guess) for guess in guesses]}, text)

    return found


def _evaluate(network: Network, data: Path | None, settings: EvaluationSettings, shown: Shown) -> Scored:
    d = network.description
    dataset = sets.evaluation_set(settings.dataset, data, d, settings.unreadable_images)
    found = evaluate(network.model, shown(batches(dataset, settings.batch_size)))
    top5 = "" if found.top5 is None else f"  top-5 {100 * found.top5:.2f} %"
    lines = [f"{found.images} images  top-1 {100 * found.top1:.2f} %{top5}  loss {found.loss:.4f}"]
    lines += [
        f"  {d.classes[label] if d.classes else label:<12} {100 * share:.1f} %"
        for label, share in enumerate(found.per_class)
    ]
    return Scored(asdict(found), tuple(lines))


def _comparison(network: Network) -> Comparison:
    d = network.description
    transform = transforms.eval_transform(d.image_size, d.mean, d.std, d.crop_pct)
    return Comparison(
        random=random_images(d.in_chans, d.image_size),
        image=lambda image: transform(image)[None],
        output=lambda model, x: model(x),
    )


INFER = Infer(_predictor, _evaluate, _comparison)
