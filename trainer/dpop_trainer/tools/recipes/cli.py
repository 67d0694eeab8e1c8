"""`dpop recipes`: list the recipes, say where one is, or copy all of them to edit."""

from itertools import groupby

from dpop_trainer.settings.command_parser import CommandParser
from dpop_trainer.settings.errors import doing
from dpop_trainer.settings.recipes import STARTED_BY, copy_recipes, list_recipes, recipe_file
from dpop_trainer.settings.terminal import say


def main(argv: list[str]) -> int:
    parser = CommandParser("dpop recipes", description="The recipes that come with this package.")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--path", metavar="NAME", help="print where the file of this name is")
    what.add_argument("--copy", metavar="DIR", help="copy all of them to this folder, to edit; overwrites nothing")
    options = parser.parse_args(argv)
    if options.path is not None:
        say(recipe_file(options.path))
    elif options.copy is not None:
        with doing(f"copying the recipes to {options.copy}", options.copy):
            count = copy_recipes(options.copy)
        say(f"{count} files in {options.copy}. Edit one, then: dpop train --config {options.copy}/lora.yaml")
    else:
        say(_listing())
    return 0


def _listing() -> str:
    recipes = list_recipes()
    width = max(len(recipe.name) for recipe in recipes)
    blocks = []
    for command, group in groupby(recipes, key=lambda recipe: recipe.command):
        lines = [f"  {recipe.name:{width}}  {recipe.title}" for recipe in group]
        blocks.append("\n".join([STARTED_BY[command], *lines]))
    return "\n\n".join(
        [*blocks, "dpop plan takes a recipe as dpop train does; dpop recipes --copy DIR copies all of them."]
    )
