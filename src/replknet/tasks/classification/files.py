"""Files of classifiers; `replknet.models.model_files` reads and writes them."""

from replknet.models.model_files import classifier_of, save_model
from replknet.tasks.task import Files

FILES = Files(load=classifier_of, save=save_model)
