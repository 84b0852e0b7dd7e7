"""Where a model's files are, and how a classifier is loaded from them."""
