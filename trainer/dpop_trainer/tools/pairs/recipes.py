"""The recipes by name. A new recipe is one file and one line here."""

from collections.abc import Callable

from dpop_trainer.tools.pairs.arc import Arc
from dpop_trainer.tools.pairs.edit import EditRule
from dpop_trainer.tools.pairs.from_samples import FromSamples
from dpop_trainer.tools.pairs.hellaswag import HellaSwag
from dpop_trainer.tools.pairs.metamath import MetaMath
from dpop_trainer.tools.pairs.recipe import Recipe

RECIPES: dict[str, Callable[..., Recipe]] = {
    recipe.name: recipe for recipe in (MetaMath, Arc, HellaSwag, EditRule, FromSamples)
}
