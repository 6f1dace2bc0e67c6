"""The module in a saved folder by which transformers finds mmbert's classes where nothing has imported mmbert yet."""

from pathlib import Path

MODULE = "mmbert_auto"
"""Name of the module; transformers runs it only with `trust_remote_code=True`."""
CLASSES = {
    "AutoConfig": "MMBertConfig",
    "AutoModel": "MMBertModel",
    "AutoModelForPreTraining": "MMBertForPreTraining",
    "AutoModelForVisualQuestionAnswering": "MMBertForQuestionAnswering",
    "AutoProcessor": "MMBertProcessor",
}
"""Auto class of transformers -> class of mmbert."""
AUTO_MAP = {auto: f"{MODULE}.{name}" for auto, name in CLASSES.items()}
"""The key `auto_map` of a saved config.json."""

SOURCE = f'''"""Classes of this folder for transformers' Auto classes; the package mmbert has their code."""

import mmbert
from mmbert import {", ".join(sorted(CLASSES.values()))}

mmbert.register()
'''


def write_auto_module(folder: str | Path) -> None:
    """Write the module into a folder, which is created if it is missing."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / f"{MODULE}.py").write_text(SOURCE, encoding="utf-8")
