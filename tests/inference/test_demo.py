"""The demo page, used in a browser as a person would: upload, type, click, read; and its errors."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compare.browser import CHROMIUM, Tab, browser
from PIL import Image
from ranking import tiny_model
from tiny import randomize, tiny_config, tiny_examples, tiny_processor

from mmbert.cli.main import main
from mmbert.errors import UsageError
from mmbert.inference import demo
from mmbert.inference.demo import build_app, find_examples, serve_demo
from mmbert.inference.index import load_index
from mmbert.inference.indexing import build_index
from mmbert.inference.loaded import load
from mmbert.model.modeling import MMBertForTask

SECONDS = 200
"""Until something is on the page; the machine may be busy."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its data, a late model, a VQA model, and an index."""
    folder = tmp_path_factory.mktemp("demo")
    images = folder / "images"
    images.mkdir()
    tiny_examples(images, [("x",)] * 8, side=24)
    rows = [{"image": f"{i}.png", "caption": f"a red cat {i}"} for i in range(8)]
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    models = {
        "early": tiny_model("early", objectives={"mlm": 1.0, "itm": 1.0}),
        "late": tiny_model("late", objectives={"mlm": 1.0, "itm": 1.0, "itc": {"embedding_size": 8}}),
        "vqa": MMBertForTask(tiny_config(task="vqa", labels=["red", "blue"], objectives={})),
    }
    for name, model in models.items():
        randomize(model)
        model.save_pretrained(folder / name / "model")
        tiny_processor().save_pretrained(folder / name / "model")
        data = {"format": "jsonl", "annotations": str(folder / "captions.jsonl"), "images": str(images)}
        (folder / name / "config.yaml").write_text(json.dumps({"data": data}))
    build_index(folder / "late/model", images, folder / "index", num_workers=0)
    return folder


@contextmanager
def served(app: Any) -> Iterator[str]:
    """Serve an application on a free port, and yield its address."""
    import uvicorn

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.should_exit = server.force_exit = True
        thread.join(20)


def wait(tab: Tab, expression: str) -> Any:
    """The value of a JavaScript expression as soon as it is true."""
    end = time.monotonic() + SECONDS
    while not (found := tab.evaluate(expression)):
        assert time.monotonic() < end, (expression, tab.evaluate("document.body.innerText"))
        time.sleep(0.1)
    return found


def upload(tab: Tab, file: Path) -> None:
    if tab.evaluate("!!document.querySelector('#image button[aria-label=Clear]')"):
        tab.evaluate("document.querySelector('#image button[aria-label=Clear]').click()")
    wait(tab, "!!document.querySelector('#image input[type=file]')")
    root = tab.call("DOM.getDocument")["root"]["nodeId"]
    node = tab.call("DOM.querySelector", nodeId=root, selector="#image input[type=file]")["nodeId"]
    tab.call("DOM.setFileInputFiles", nodeId=node, files=[str(file)])
    wait(tab, f"(document.querySelector('#image img') || {{src: ''}}).src.endsWith('{file.name}')")
    tab.evaluate("document.querySelector('#out-score').innerHTML")


def use(tab: Tab, name: str, button: str, answer: str, clicks: int = 1, **texts: str) -> str:
    """Open a tab of the page, type, click, and read the answer once it has the given words."""
    find = f"[...document.querySelectorAll('button[role=tab]')].find(b => b.textContent.trim() == '{name}')"
    tab.evaluate(f"{find}.click()")
    for box, text in texts.items():
        field = f"document.querySelector('#{box} textarea, #{box} input')"
        wait(tab, f"!!{field}")
        tab.evaluate(f"{field}.focus(); {field}.select()")
        tab.call("Input.insertText", text=text)
    time.sleep(0.2)  # the page takes over what was typed
    for _ in range(clicks):
        tab.evaluate(f"document.querySelector('#run-{button}').click()")
    output = f"document.querySelector('#out-{button}')"
    return wait(tab, f"{output}.innerText.includes({json.dumps(answer)}) && {output}.innerText")


def test_page_in_a_browser(folder: Path, tmp_path: Path, refused: Any) -> None:
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    if find_spec("gradio") is None:
        pytest.skip("needs gradio (pip install 'mmbert[demo]')")
    models = [load(folder / name / "model", "cpu") for name in ("early", "late", "vqa")]
    index = load_index(folder / "index", models[1])
    broken, big = tmp_path / "broken.png", tmp_path / "big.png"
    broken.write_bytes((folder / "images/0.png").read_bytes()[:300])
    Image.fromarray(np.zeros((8200, 8200), dtype=np.uint8)).save(big)  # 67 million pixels in a small file
    with (
        served(build_app(models, index, "127.0.0.1", tmp_path / "uploads")) as address,
        browser(tmp_path / "profile") as tab,
    ):
        tab.call("Emulation.setDeviceMetricsOverride", width=1200, height=900, deviceScaleFactor=1, mobile=False)
        tab.call("Page.navigate", url=address)
        wait(tab, "document.querySelectorAll('button img').length >= 6")  # the examples come last
        time.sleep(1)
        assert "give an image first" in use(tab, "Match", "score", "give an image", texts="a red cat")
        tab.evaluate("document.querySelector('button img').click()")  # an example: image and caption
        wait(tab, "document.querySelector('#texts textarea').value == 'a red cat 0'")
        found = use(tab, "Match", "score", "a dog", clicks=40, texts="a red cat\n<b>a dog")
        scores = [models[0].match(folder / "images/0.png", text).scores[0] for text in ("a red cat", "<b>a dog")]
        assert all(f"{score:.4f}" in found for score in scores) and "<b>a dog" in found, "escaped, not bold"
        assert found.count("probability") == 2 and "(early)" in found and "(late)" in found
        assert "was fine-tuned with model.task=vqa" in found, "the third model can't match"
        found = use(tab, "Masked word", "predict", "without", masked="a [MASK] cat")
        assert found.count("without an image") == 2 and found.count("with the image") == 2
        assert "has no [MASK]" in use(tab, "Masked word", "predict", "has no", masked="a cat")
        found = use(tab, "Question", "answer", "red", question="a cat")
        assert f"{models[2].answer(folder / 'images/0.png', 'a cat')[0].score:.4f}" in found
        use(tab, "Explanation", "explain", "(late)", explained="a red cat")
        wait(tab, "document.querySelectorAll('#out-explain img').length == 3")
        use(tab, "Search", "search", ".png", query="a red cat")
        assert tab.evaluate("document.querySelectorAll('#out-search img').length") == 8
        for file, sentence in ((broken, "truncated or damaged"), (big, "too large: 8200x8200 pixels")):
            upload(tab, file)
            assert f"the image can't be used: {sentence}" in use(tab, "Match", "score", sentence)
        tab.call("Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=1, mobile=True)
        assert wait(tab, "document.documentElement.scrollWidth") <= 390
        assert all(url.startswith((address, "data:", "blob:")) for url in tab.requests)
    assert not refused(), "gradio asked no other host"


def test_page_is_for_this_machine_only(folder: Path, tmp_path: Path) -> None:
    if find_spec("gradio") is None:
        pytest.skip("needs gradio (pip install 'mmbert[demo]')")
    from starlette.testclient import TestClient

    app = build_app([load(folder / "late/model", "cpu")], None, "127.0.0.1", tmp_path)
    client = TestClient(app, base_url="http://127.0.0.1")
    page = client.get("/")
    assert page.status_code == 200 and page.headers["content-security-policy"].startswith("default-src 'self';")
    assert "fonts.googleapis" not in page.text and "cdn" not in page.text.lower()
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400
    assert client.get("/config").json()["analytics_enabled"] is False


def test_examples_come_from_the_data_of_the_run(folder: Path, tmp_path: Path) -> None:
    found = find_examples(folder / "late/model")
    assert found == [[str((folder / f"images/{i}.png").resolve()), f"a red cat {i}"] for i in range(6)]
    images = {"train": str(folder / "images")}
    (folder / "vqa/config.yaml").write_text(
        json.dumps({"data": {"format": "vqav2", "annotations": "x", "images": images}})
    )
    assert len(find_examples(folder / "vqa/model")) == 6, "images alone"
    assert find_examples(tmp_path) == []


def test_bad_options_are_one_sentence(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(folder / "late/model")
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        main(["demo", model])
    assert stopped.value.code == 2 and "pip install 'mmbert[demo]'" in capsys.readouterr().err
    monkeypatch.setattr(demo, "find_spec", lambda name: True)
    with socket.socket() as used:
        used.bind(("127.0.0.1", 0))
        used.listen()
        port = used.getsockname()[1]
        with pytest.raises(UsageError, match=f"--port {port}: .*give another --port"):
            serve_demo([model], port=port)
    with pytest.raises(UsageError, match="is no index"):
        serve_demo([model], model, port=0)
