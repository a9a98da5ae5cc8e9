"""The offline page about one run."""
