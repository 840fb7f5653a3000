"""From a recipe's text to a plan that can be printed. Pure, but for `sources`, which opens what is planned."""
