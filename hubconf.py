"""Entry point for `torch.hub.load(FOLDER, "mmbert", "RUN/model", source="local")`."""

from typing import Any

dependencies = ["torch", "transformers", "timm", "lightning"]


def mmbert(path: str, **options: Any) -> Any:
    """Load a saved model as `mmbert.load` does.

    Args:
        path: Folder of a saved model, RUN/model, or a name on the hub.
        options: Further arguments of `mmbert.load`, such as `device`.
    """
    from mmbert.inference.loaded import load

    return load(path, **options)
