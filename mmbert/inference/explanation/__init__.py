"""Explanations of one score: relevance of tokens and image patches, and the shares of text and image."""
