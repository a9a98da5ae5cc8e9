"""Pictures in matplotlib, one file per subject."""
