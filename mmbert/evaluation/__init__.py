"""Evaluation: metrics of a run on pairs and tasks; retrieval and foils with a saved model."""
