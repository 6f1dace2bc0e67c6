"""Inference with saved models: loading, matching, answering, embedding, filling masks, predictions for a split."""
