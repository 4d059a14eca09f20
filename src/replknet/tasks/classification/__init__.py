"""Image classification."""

from typing import TYPE_CHECKING

from replknet import imports
from replknet.tasks.classification import imagenet, recipes, settings
from replknet.tasks.task import Task

TASK = Task(
    name="classification",
    noun="a classifier",
    field="replknet",
    keys=r"head\.weight",
    prediction=settings.PredictionSettings,
    evaluation=settings.EvaluationSettings,
    int8=settings.Int8Settings,
    options=recipes.ClassificationOptions,
    recipes=(*recipes.RECIPES, *imagenet.RECIPES),
)

# for type checkers and editors; `_HOMES` says the same to Python
if TYPE_CHECKING:
    from replknet.tasks.classification.export import Card as Card
    from replknet.tasks.classification.export import card_of as card_of
    from replknet.tasks.classification.export import export_classifier as export_classifier
    from replknet.tasks.classification.infer import Guess as Guess
    from replknet.tasks.classification.infer import Scores as Scores
    from replknet.tasks.classification.infer import evaluate as evaluate
    from replknet.tasks.classification.infer import predict as predict
    from replknet.tasks.classification.quantize import Layer as Layer
    from replknet.tasks.classification.quantize import Quantized as Quantized
    from replknet.tasks.classification.quantize import Ranges as Ranges
    from replknet.tasks.classification.quantize import quantize_classifier as quantize_classifier
    from replknet.tasks.classification.recipes import ClassificationOptions as ClassificationOptions

_HOMES = {
    "Card": "replknet.tasks.classification.export",
    "ClassificationOptions": "replknet.tasks.classification.recipes",
    "Guess": "replknet.tasks.classification.infer",
    "Layer": "replknet.tasks.classification.quantize",
    "Quantized": "replknet.tasks.classification.quantize",
    "Ranges": "replknet.tasks.classification.quantize",
    "Scores": "replknet.tasks.classification.infer",
    "card_of": "replknet.tasks.classification.export",
    "evaluate": "replknet.tasks.classification.infer",
    "export_classifier": "replknet.tasks.classification.export",
    "predict": "replknet.tasks.classification.infer",
    "quantize_classifier": "replknet.tasks.classification.quantize",
}
__all__ = ["TASK", *sorted(_HOMES)]

if not TYPE_CHECKING:
    __getattr__, __dir__ = imports.lazy_names(__name__, _HOMES)
