"""The method as pure functions and models on arrays: nothing here knows data sets, transformers or a trainer."""
