"""Export a saved model to ONNX files or `torch.export` programs, each checked against the model after writing."""

import importlib
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmbert.errors import DataError, UsageError
from mmbert.evaluation.encoding import pack, unpack
from mmbert.inference.loading import load_folder
from mmbert.model.modeling import MMBertForPreTraining, MMBertForTask, MMBertPreTrainedModel
from mmbert.runtime import allowed_imports

TOLERANCE = 1e-4
"""Largest difference of a written file's outputs from the model's; relative for outputs above 1."""
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
LONGEST_CHECKED = 512
"""Longest text that a written file is compared on, in tokens. ModernBERT-base reads 8,192, at which the attention
weights of 4 texts take 13 GB a layer."""
OPSET = 20


class ExportedFile(NamedTuple):
    """One file of an export."""

    path: Path
    bytes: int
    difference: float  # largest difference of an output from the model's, before quantisation
    int8_difference: float | None  # the same after quantisation; None: not quantised


def export_onnx(
    model: str | Path, out: str | Path, *, int8: bool = False, allow_import: str | Sequence[str] = ()
) -> list[ExportedFile]:
    """Export a saved model to ONNX files, with dynamic batch size and text length.

    A model that was fine-tuned for a task becomes one file, "model". Others become text.onnx and image.onnx, which
    encode, and fusion.onnx with the heads on pairs. The folder also gets config.json and the processor's files.

    Args:
        model: Folder of the model, RUN/model, or its name on the hub.
        out: Folder to write; must not exist, or be empty.
        int8: Quantise the weights of linear layers to int8, for CPUs; activations are quantised when they are computed.
        allow_import: See `mmbert.load`.

    Raises:
        UsageError: A package is missing, no model, or a folder that is not empty.
        DataError: The model is broken, or a written file does not compute its outputs.
    """
    lacking = [name for name in ONNX_PACKAGES if find_spec(name) is None]
    if lacking:
        raise UsageError(f"ONNX export needs {', '.join(lacking)}: pip install 'mmbert[onnx]'.")
    return _export(model, out, "onnx", _write_onnx, _quantize if int8 else None, allow_import)


def export_program(model: str | Path, out: str | Path, *, allow_import: str | Sequence[str] = ()) -> list[ExportedFile]:
    """Export a saved model to programs that `torch.export.load(FILE).module()` runs without mmbert.

    See `export_onnx` for files, arguments and errors; the files end in .pt2.
    """
    return _export(model, out, "pt2", _write_program, None, allow_import)


class _PartModule(nn.Module):
    """Base class of what one file computes, from tensors to named tensors."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        self.core = getattr(model, "mmbert", model)
        self.itc: Any = model.objectives["itc"] if "itc" in getattr(model, "objectives", {}) else None
        self.eval()


class _Task(_PartModule):
    """A fine-tuned model."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> dict[str, Tensor]:
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values)
        return {"logits": output.logits}


class _Text(_PartModule):
    """Text encoder, and the contrastive vectors where the model has the objective itc."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        tokens = self.core.encode_text(input_ids, attention_mask)
        vectors = {} if self.itc is None else {"text_embeds": self.itc.embed_text(tokens)}
        return {"text_hidden_states": pack(tokens), **vectors}


class _Image(_PartModule):
    """Image encoder, and the contrastive vectors where the model has the objective itc."""

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        tokens = self.core.encode_image(pixel_values)
        vectors = {} if self.itc is None else {"image_embeds": self.itc.embed_image(tokens)}
        return {"image_hidden_states": pack(tokens), **vectors}


class _Fusion(_PartModule):
    """Fusion of encoded texts with encoded images, row by row, and the heads on it."""

    def forward(
        self, text_hidden_states: Tensor, attention_mask: Tensor, image_hidden_states: Tensor
    ) -> dict[str, Tensor]:
        core, width = self.core, self.core.config.hidden_size
        text = unpack(text_hidden_states, attention_mask.bool(), width, core.text_encoder.width)
        image_mask = image_hidden_states.new_ones(image_hidden_states.shape[:2], dtype=torch.bool)
        image = unpack(image_hidden_states, image_mask, width, core.image_encoder.width)
        if isinstance(self.model, MMBertForPreTraining):
            logits = self.model.head_logits(text, image)
            return {name: value for name, value in logits.items() if not name.startswith("logits_per_")}
        fused = core.fuse(text, image)
        states = {"last_hidden_state": fused.text, "image_last_hidden_state": fused.image}
        return {**{name: tokens.hidden_states for name, tokens in states.items()}, "pooler_output": fused.pooled}


class Part(NamedTuple):
    """One file to write."""

    module: nn.Module  # in evaluation mode; returns named outputs
    make_inputs: Callable[[int, int], dict[str, Tensor]]  # batch size, text length -> example inputs

    def axes(self) -> dict[str, dict[int, str]]:
        """Name the dynamic axes of the inputs."""
        text = ("input_ids", "attention_mask", "text_hidden_states")
        return {name: {0: "batch", **({1: "length"} if name in text else {})} for name in self.make_inputs(1, 2)}


def model_parts(model: Any) -> dict[str, Part]:
    """List the parts of a model, by the names of their files."""
    config, core = model.config, getattr(model, "mmbert", model)
    images = model.task.num_images if isinstance(model, MMBertForTask) else 1
    generator = torch.Generator().manual_seed(0)

    def text(batch: int, length: int) -> dict[str, Tensor]:
        ids = torch.randint(config.vocab_size, (batch, length), generator=generator)
        lengths = torch.arange(length, length - batch, -1).clamp(min=2)  # row 0 has no padding
        return {"input_ids": ids, "attention_mask": (torch.arange(length) < lengths[:, None]).long()}

    def image(batch: int, length: int) -> dict[str, Tensor]:
        shape = (batch, *([images] if images > 1 else []), 3, config.image_size, config.image_size)
        return {"pixel_values": torch.randn(shape, generator=generator)}

    def encoded(batch: int, length: int) -> dict[str, Tensor]:
        texts = text(batch, length)
        return {
            "text_hidden_states": pack(core.encode_text(**texts)),
            "attention_mask": texts["attention_mask"],
            "image_hidden_states": pack(core.encode_image(**image(batch, length))),
        }

    if isinstance(model, MMBertForTask):
        return {"model": Part(_Task(model), lambda batch, length: text(batch, length) | image(batch, length))}
    parts = {"text": Part(_Text(model), text), "image": Part(_Image(model), image)}
    if isinstance(model, MMBertForPreTraining) and not {"mlm", "itm"} & {*model.objectives}:
        return parts  # no head reads the fusion
    return {**parts, "fusion": Part(_Fusion(model), encoded)}


Runner = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""Computes the outputs of a written file."""


@torch.no_grad()
def _export(
    source: str | Path,
    out: str | Path,
    ending: str,
    write: Callable[[Part, Path], Runner],
    quantize: Callable[[Path], Runner] | None,
    allow_import: str | Sequence[str],
) -> list[ExportedFile]:
    """Write and check all parts of a model in a temporary folder beside `out`, then move it there."""
    allowed_imports.allow_import(*[allow_import] if isinstance(allow_import, str) else allow_import)
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"'{out}' exists and is not an empty folder; give a new one.")
    model, processor = load_folder(source)
    if isinstance(model, MMBertForTask) and model.task.num_images == 0:
        raise UsageError(f"'{source}' reads no image (num_images=0); only models of text and image are exported.")
    if "itc" in getattr(model, "objectives", {}):
        model.objectives["itc"].check_one_vector("an export")  # pyright: ignore
    with _new_folder(folder) as partial:
        written = []
        for name, part in model_parts(model).items():
            file = partial / f"{name}.{ending}"
            try:
                run = write(part, file)
            except (RuntimeError, AssertionError, TypeError) as error:
                reason = str(error).strip().splitlines()[0]
                raise UsageError(f"'{source}': the part {name} can't be exported: {reason}") from error
            difference = _largest_difference(part, run, model)
            if difference > TOLERANCE:
                raise DataError(
                    str(folder / file.name), f"outputs that differ from the model's by {difference:.1e}",
                    f"at most {TOLERANCE:.0e}",
                )  # fmt: skip
            int8 = None if quantize is None else _largest_difference(part, quantize(file), model)
            written.append(ExportedFile(folder / file.name, file.stat().st_size, difference, int8))
        processor.save_pretrained(partial)
        model.config.save_pretrained(partial)
    return written


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `folder` at the end; nothing is left after an error."""
    partial = folder.with_name(f".{folder.name}-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        yield partial
        os.replace(partial, folder)
    except OSError as error:
        raise DataError(str(folder), error.strerror or str(error), "a folder that can be written") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _largest_difference(part: Part, run: Runner, model: MMBertPreTrainedModel) -> float:
    """Compare the outputs of a file with the model's, for one short text and for several padded ones."""
    largest = 0.0
    for batch, length in ((1, 3), (4, min(model.config.max_position_embeddings, LONGEST_CHECKED))):
        inputs = part.make_inputs(batch, length)
        found = run(inputs)
        for name, expected in part.module(**inputs).items():
            scale = max(1.0, expected.abs().max().item())
            largest = max(largest, (found[name] - expected).abs().max().item() / scale)
    return largest


def _trace(part: Part) -> torch.export.ExportedProgram:
    """Export a part with `torch.export`; batch size and text length are dynamic, from 1 on."""
    dynamic = {name: dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for name, axes in part.axes().items()}
    options: Any = importlib.import_module("torch.fx.experimental._config")
    with options.patch(backed_size_oblivious=True):  # else it would be specialised to batches of 2 rows or more
        return torch.export.export(part.module, (), part.make_inputs(3, 6), dynamic_shapes=dynamic, strict=False)


def _write_program(part: Part, file: Path) -> Runner:
    """Write a part as a program of `torch.export`."""
    torch.export.save(_trace(part), file)
    program = torch.export.load(file).module()
    return lambda inputs: program(**inputs)


def _write_onnx(part: Part, file: Path) -> Runner:
    """Write a part as an ONNX file."""
    inputs = part.make_inputs(3, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about its own calls
        program: Any = torch.onnx.export(
            _trace(part), kwargs=inputs, dynamo=True, opset_version=OPSET, input_names=[*inputs],
            output_names=[*part.module(**inputs)], dynamic_shapes=part.axes(), verbose=False,
        )  # fmt: skip
    program.save(file)
    return _session(file)


def _session(file: Path) -> Runner:
    """Load an ONNX file for the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        found = session.run(names, {name: value.numpy() for name, value in inputs.items()})
        return {name: torch.from_numpy(value) for name, value in zip(names, found, strict=True)}

    return run


def _quantize(file: Path) -> Runner:
    """Quantise the matrix products with weights in an ONNX file, which it replaces."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.disable(logging.WARNING)  # it asks for an optimization that the exporter has done
    try:
        quantize_dynamic(file, file, ["MatMul", "Gemm"], per_channel=True, weight_type=QuantType.QInt8)
    finally:
        logging.disable(logging.NOTSET)
    return _session(file)
