"""A saved model in use: loading, matching, answering, embedding, predictions for a split."""
