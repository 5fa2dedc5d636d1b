"""Recipe: the validated description of one run."""

from deploykit.recipe.load import dump_recipe, load_recipe, parse_recipe
from deploykit.recipe.sections import Recipe

__all__ = ["Recipe", "dump_recipe", "load_recipe", "parse_recipe"]
