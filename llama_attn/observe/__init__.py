"""How a forward of any transformers model is observed."""
