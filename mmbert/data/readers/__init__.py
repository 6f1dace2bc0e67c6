"""Readers of annotation formats. A new format is a file here and a line in `FORMATS`."""

from mmbert.data.readers.coco import read_coco
from mmbert.data.readers.karpathy import read_karpathy
from mmbert.data.readers.table import read_csv, read_jsonl

FORMATS = {"coco": read_coco, "karpathy": read_karpathy, "jsonl": read_jsonl, "csv": read_csv}
"""Name -> reader of captions. A reader takes (path, images, problems, *, split=None, its own keys), adds errors to
`problems` and returns the examples of one file, all splits together."""
