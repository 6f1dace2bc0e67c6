"""Local page to try models on images: scores, masked words, questions, explanations, search; needs gradio."""

import base64
import importlib
import io
import itertools
import logging
import os
import socket
import tempfile
from collections.abc import Callable, Sequence
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from mmbert.data.examples import read_examples
from mmbert.data.images import MAX_FILE_BYTES, BadImageError
from mmbert.errors import DataError, UsageError, printable
from mmbert.inference.explanation.drawing import draw
from mmbert.inference.index import IMAGE_ENDINGS, ImageIndex, load_index, model_hash, thumbnail_uri
from mmbert.inference.index_files import IndexFacts
from mmbert.inference.loaded import LoadedModel, load
from mmbert.model.modeling import MMBertForPreTraining, MMBertForTask

log = logging.getLogger("mmbert")

LOOPBACK = ("127.0.0.1", "localhost", "::1")
MAX_CHARACTERS, MAX_TEXTS, NUM_EXAMPLES = 2000, 50, 6
"""Length of a text box, texts per image, and images of the model's data that are offered."""
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; frame-ancestors 'none'; "
    "form-action 'self'; base-uri 'self'"
)
"""Content security policy: the page can't load anything from, nor send anything to, another server."""
STYLE = """
.columns { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 240px), 1fr)); }
.columns.small { grid-template-columns: repeat(auto-fill, minmax(110px, 1fr)); }
.columns.small img { width: 100%; aspect-ratio: 1; object-fit: contain; }
.columns h4 { margin: 0 0 6px; overflow-wrap: anywhere; }
.columns table { width: 100%; border-collapse: collapse; }
.columns td { padding: 4px 8px 4px 0 !important; border: 0 !important; overflow-wrap: anywhere; vertical-align: top; }
.columns td:first-child { white-space: nowrap; font-variant-numeric: tabular-nums; width: 5em; }
.columns img { max-width: 100%; border-radius: 6px; }
.columns p { margin: 4px 0; overflow-wrap: anywhere; }
.problem { border-left: 4px solid #c55300; padding-left: 8px; }
"""


def serve_demo(
    models: Sequence[str | Path],
    index: str | Path | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    device: str | None = None,
) -> None:
    """Serve the page until the process is interrupted; it uses no other server.

    Args:
        models: Folders of models, side by side on the page.
        index: An image index to search, with one of the models or its own.
        host: Address to listen at; any other than the default can be reached from other machines.
        port: Port to listen at.
        device: See `mmbert.load`.

    Raises:
        UsageError: gradio is missing, the port is in use, or a folder is no model or index.
        DataError: A model or an index is broken.
    """
    if find_spec("gradio") is None:
        raise UsageError("the demo needs gradio; pip install 'mmbert[demo]'.")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise UsageError(f"--host {host} --port {port}: {error}; give another --port.") from error
    loaded = [load(model, device) for model in models]
    found = None
    if index is not None:
        facts = IndexFacts.read(Path(index))
        own = next((model for model in loaded if model_hash(model) == facts.model_hash), None)
        found = load_index(index, own, device)
    if host not in LOOPBACK:
        log.warning(
            "--host %s: everyone who reaches this machine can use the models%s; there is no password",
            host, " and see the images of the index" if index is not None else "",
        )  # fmt: skip
    import uvicorn  # pyright: ignore[reportMissingImports] - of the extra demo

    with tempfile.TemporaryDirectory(prefix="mmbert-demo-") as uploads:  # removed at the end
        app = build_app(loaded, found, host, uploads)
        log.info("http://%s:%d (Ctrl-C stops)", f"[{host}]" if ":" in host else host, port)
        uvicorn.run(app, host=host, port=port, log_level="warning")


def build_app(models: Sequence[LoadedModel], index: ImageIndex | None, host: str, uploads: str | Path) -> Any:
    """Build the ASGI application: the page, its security policy, and on a loopback address the check of the host.

    Args:
        models: As in `serve_demo`.
        index: As in `serve_demo`.
        host: As in `serve_demo`.
        uploads: Folder for uploaded images.
    """
    # Read while gradio is imported.
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1", GRADIO_TEMP_DIR=str(uploads))
    gradio: Any = importlib.import_module("gradio")
    from fastapi import FastAPI  # pyright: ignore[reportMissingImports] - of the extra demo
    from starlette.middleware.trustedhost import TrustedHostMiddleware  # pyright: ignore[reportMissingImports]

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    if host in LOOPBACK:  # else a page of another site could reach this one by a name that resolves to 127.0.0.1
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]"])

    @app.middleware("http")
    async def add_policy(request: Any, call_next: Any) -> Any:
        response = await call_next(request)
        response.headers["Content-Security-Policy"] = POLICY
        return response

    page = _build_page(gradio, models, index)
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return gradio.mount_gradio_app(
        app, page, path="/", theme=theme, css=STYLE, footer_links=[], run_history=False, max_file_size=MAX_FILE_BYTES,
        enable_monitoring=False, ssr_mode=False, mcp_server=False, pwa=False, show_error=False,
    )  # fmt: skip


def _build_page(gradio: Any, models: Sequence[LoadedModel], index: ImageIndex | None) -> Any:
    def each(work: Callable[[LoadedModel], str]) -> str:
        return "<div class='columns'>" + "".join(_column(model, work) for model in models) + "</div>"

    def match(image: str | None, texts: str) -> str:
        lines = [line.strip() for line in texts.splitlines() if line.strip()][:MAX_TEXTS]
        return _needs(image, "image") or _needs(lines, "text") or each(lambda model: _match(model, str(image), lines))

    def fill(image: str | None, text: str) -> str:
        return _needs(text.strip(), "text") or each(lambda model: _fill_mask(model, image, text))

    def ask(image: str | None, question: str) -> str:
        return (
            _needs(image, "image")
            or _needs(question.strip(), "question")
            or each(lambda model: _table((a.score, a.answer) for a in model.answer(str(image), question, top_k=5)))
        )

    def explain(image: str | None, text: str, target: str) -> str:
        return (
            _needs(image, "image")
            or _needs(text.strip(), "text")
            or each(lambda model: _explain(model, str(image), text, target.strip() or None))
        )

    def search(image: str | None, text: str, by_image: bool) -> str:
        assert index is not None
        missing = _needs(image, "image") if by_image else _needs(text.strip(), "text")
        known = index
        return missing or _guarded(lambda: _found(known, Path(str(image)) if by_image else text))

    # One call at a time: explanations hook into the modules that all calls share.
    event = {"concurrency_limit": 1, "concurrency_id": "models", "api_visibility": "private"}
    box = {"max_length": MAX_CHARACTERS}
    pretrained = any(isinstance(model.model, MMBertForPreTraining) for model in models)
    names = ", ".join(escape(printable(model.name)) for model in models)
    with gradio.Blocks(title="mmbert", analytics_enabled=False) as page:
        gradio.HTML(f"<h1>mmbert</h1><p>{names}</p>")
        with gradio.Row():
            with gradio.Column(scale=2, min_width=280):
                sources = ["upload", "clipboard"]
                image = _image_class(gradio)(label="Image", sources=sources, buttons=[], height=300, elem_id="image")
            with gradio.Column(scale=3, min_width=280):
                if pretrained:
                    with gradio.Tab("Match"):
                        texts = gradio.Textbox(label="Texts, one on each line", lines=3, elem_id="texts", **box)
                        _button(gradio, "Score", match, [image, texts], event)
                    with gradio.Tab("Masked word"):
                        masked = gradio.Textbox(label="Text with [MASK]", value="a [MASK]", elem_id="masked", **box)
                        _button(gradio, "Predict", fill, [image, masked], event)
                if any(isinstance(model.model, MMBertForTask) for model in models):
                    with gradio.Tab("Question"):
                        question = gradio.Textbox(label="Question or statement", elem_id="question", **box)
                        _button(gradio, "Answer", ask, [image, question], event)
                with gradio.Tab("Explanation"):
                    text = gradio.Textbox(label="Text", elem_id="explained", **box)
                    target = gradio.Textbox(label="Target: itm, itc, a word of the text, or a label; empty: the best",
                                            elem_id="target", **box)  # fmt: skip
                    _button(gradio, "Explain", explain, [image, text, target], event)
                if index is not None:
                    with gradio.Tab("Search"):
                        query = gradio.Textbox(label=f"Text to find in {len(index):,} images", elem_id="query", **box)
                        by_image = gradio.Checkbox(label="Find images similar to the image instead")
                        _button(gradio, "Search", search, [image, query, by_image], event)
        examples = [row for model in models[:1] for row in find_examples(Path(model.name))]
        if examples:
            inputs = [image, texts] if pretrained else [image]  # pyright: ignore[reportPossiblyUnbound]
            gradio.Examples(
                [row[: len(inputs)] for row in examples], inputs, label="From the model's data", visible_columns=[0]
            )
    return page


def _image_class(gradio: Any) -> Any:
    """Create an image component whose file is read by `load_image` alone, with its limits."""
    meta: Any = importlib.import_module("gradio.component_meta")
    write_stub = meta.create_or_modify_pyi
    meta.create_or_modify_pyi = lambda *_: None  # gradio would write a stub beside this file
    try:

        class UploadedImage(gradio.Image):
            """Image that gradio does not decode."""

            is_template = True

            def preprocess(self, payload: Any) -> str | None:
                return None if payload is None else payload.path
    finally:
        meta.create_or_modify_pyi = write_stub
    return UploadedImage


def _button(gradio: Any, label: str, run: Callable[..., str], inputs: list[Any], event: dict[str, Any]) -> None:
    button = gradio.Button(label, variant="primary", elem_id=f"run-{label.lower()}")
    output = gradio.HTML(elem_id=f"out-{label.lower()}")
    button.click(run, inputs, output, **event)


def find_examples(model: Path) -> list[list[str]]:
    """Find up to `NUM_EXAMPLES` images with a caption in the data that a model was trained on: its run's config.yaml.

    Returns:
        Image file and caption; no caption for data of a task; nothing where the data is not there.
    """
    try:
        data = yaml.safe_load((model.parent / "config.yaml").read_text(encoding="utf-8"))["data"]
        annotations, images = data["annotations"], data["images"]
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return []
    try:
        if isinstance(annotations, dict):
            split = next(split for split in ("test", "val", *annotations) if split in annotations)
            annotations = {split: annotations[split]}
        splits = read_examples(data["format"], annotations, images)
        found = next(splits[name] for name in ("test", "val", *splits) if name in splits)
        chosen = found[:: max(1, len(found) // NUM_EXAMPLES)][:NUM_EXAMPLES]
        return [[str(example.image), example.captions[0]] for example in chosen]
    except (OSError, DataError, UsageError, TypeError, ValueError):  # data of a task, or with keys of its own
        folders = images.values() if isinstance(images, dict) else [images]
        files = (file for folder in folders for file in Path(str(folder)).rglob("*"))
        readable = (str(file) for file in files if file.suffix.lower() in IMAGE_ENDINGS)
        return [[file, ""] for file in itertools.islice(readable, NUM_EXAMPLES)]


def _column(model: LoadedModel, work: Callable[[LoadedModel], str]) -> str:
    name = escape(printable(f"{model.name} ({model.core.config.fusion})"))
    return f"<section><h4>{name}</h4>{_guarded(lambda: work(model))}</section>"


def _guarded(work: Callable[[], str]) -> str:
    """Return HTML, or the sentence of an error."""
    try:
        return work()
    except BadImageError as error:  # without its temporary path
        return _problem(f"the image can't be used: {error.reason}")
    except (UsageError, DataError) as error:
        return _problem(str(error))


def _problem(sentence: str) -> str:
    return f"<p class='problem' role='alert'>{escape(printable(sentence))}</p>"


def _needs(value: Any, name: str) -> str:
    return "" if value else _problem(f"give {'an' if name == 'image' else 'a'} {name} first.")


def _table(rows: Any) -> str:
    cells = "".join(f"<tr><td>{score:.4f}</td><td>{escape(printable(text))}</td></tr>" for score, text in rows)
    return f"<table>{cells}</table>"


def _match(model: LoadedModel, image: str, texts: list[str]) -> str:
    scores, kind = model.match(image, texts)
    return f"<p>{kind}</p>" + _table(zip(scores, texts, strict=True))


def _fill_mask(model: LoadedModel, image: str | None, text: str) -> str:
    parts = []
    for title, source in (("with the image", image), ("without an image", None)):
        if source is None and title == "with the image":
            parts.append("<p>Give an image to compare with.</p>")
            continue
        for number, words in enumerate(model.fill_mask(source, text), 1):
            parts.append(f"<p>[MASK] {number} {title}</p>" + _table((w.probability, w.token) for w in words))
    return "".join(parts)


def _explain(model: LoadedModel, image: str, text: str, target: str | None) -> str:
    found = model.explain(image, text, target, links=False)
    buffer = io.BytesIO()
    draw([found]).savefig(buffer, format="png", dpi=110)
    uri = base64.b64encode(buffer.getvalue()).decode()
    return f"<img alt='{escape(found.headline)}' src='data:image/png;base64,{uri}'>"


def _found(index: ImageIndex, query: str | Path) -> str:
    figures = []
    for result in index.search(query, k=12):
        uri, name = thumbnail_uri(result.path), os.path.relpath(result.path, index.facts.folder)
        shown = f"<img alt='' src='{uri}'>" if uri else "<p>This file can't be read any more.</p>"
        figures.append(f"<section>{shown}<p>{result.score:.4f} {escape(printable(name))}</p></section>")
    return "<div class='columns small'>" + "".join(figures) + "</div>"
