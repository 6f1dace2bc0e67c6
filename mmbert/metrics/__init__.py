"""Metrics as pure functions of scores and labels; nothing here knows a model."""
