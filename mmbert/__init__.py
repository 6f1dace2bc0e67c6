"""mmbert: text-image BERT whose fusion strategy (early, late, hybrid) is one key."""

__version__ = "0.1.0"
