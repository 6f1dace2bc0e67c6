"""Evaluate a saved model on annotation files: one file for each subcommand of `mmbert evaluate`."""
