"""What models can do: the pairs and tasks of a run; retrieval and foils of a saved model."""
