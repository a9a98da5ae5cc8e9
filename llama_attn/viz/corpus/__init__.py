"""The report of a corpus, as a page and as plain JSON."""
