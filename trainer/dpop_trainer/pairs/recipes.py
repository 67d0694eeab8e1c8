"""The recipes by name. A new recipe is one file and one line here."""

from collections.abc import Callable

from dpop_trainer.pairs.arc import Arc
from dpop_trainer.pairs.edit import EditRule
from dpop_trainer.pairs.from_samples import FromSamples
from dpop_trainer.pairs.hellaswag import HellaSwag
from dpop_trainer.pairs.metamath import MetaMath
from dpop_trainer.pairs.recipe import Recipe

RECIPES: dict[str, Callable[..., Recipe]] = {
    recipe.name: recipe for recipe in (MetaMath, Arc, HellaSwag, EditRule, FromSamples)
}
