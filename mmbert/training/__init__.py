"""A training run: options, LightningModule, trainer, checkpoints, trace, results; `fit.py` puts them together."""
