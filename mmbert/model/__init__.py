"""The model: encoders, fusion strategies, objectives and tasks, and how their weights are loaded."""
