"""What to do, as a value, and by name."""

from .presets import load_recipe as load_recipe
from .presets import recipe_names as recipe_names
from .recipe import Recipe as Recipe
