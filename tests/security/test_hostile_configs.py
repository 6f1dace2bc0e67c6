"""An untrusted configuration never runs code, whatever it names."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mmbert.cli.main import main

ROOT = Path(__file__).parents[2]
FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "subprocess.Popen",
    "socket.connect",
    "shutil.rmtree",
)

POPEN = "{class_path: subprocess.Popen, init_args: {args: [touch, SENTINEL]}}"
CONFIGS = {
    "a process as a callback": f"trainer: {{callbacks: [{POPEN}]}}",
    "a process as a logger": f"trainer: {{logger: {POPEN}}}",
    "a process as a strategy": f"trainer: {{strategy: {POPEN}}}",
    "a process as a plugin": f"trainer: {{plugins: [{POPEN}]}}",
    "a process as an objective": f"model: {{objectives: {{mlm: {POPEN}}}}}",
    "a process where anything goes": f"model: {{objectives: {POPEN}}}",
    "os.system as a function": "trainer: {callbacks: [{class_path: lightning.pytorch.callbacks.LambdaCallback, "
    "init_args: {setup: os.system}}]}",
    "os.system through a module of Lightning": "trainer: {callbacks: [{class_path: "
    "lightning.pytorch.callbacks.model_checkpoint.os.system, init_args: {command: touch SENTINEL}}]}",
    "torch.hub": "trainer: {callbacks: [{class_path: torch.hub.load, init_args: {repo_or_dir: SENTINEL, model: x}}]}",
    "an unsafe loader": "trainer: {callbacks: [{class_path: yaml.unsafe_load, init_args: {stream: x}}]}",
    "a Python tag": "name: !!python/object/apply:os.system ['touch SENTINEL']",
    "a Python tag in a list": "trainer: {callbacks: [!!python/object/new:os.system ['touch SENTINEL']]}",
    "the import option itself": f"allow-import: subprocess\ntrainer: {{callbacks: [{POPEN}]}}",
    "the policy itself": "trainer: {callbacks: [{class_path: jsonargparse.set_parsing_settings}]}",
    "a stranger's module": "trainer: {callbacks: [{class_path: stranger.Callback}]}",
    "an alias bomb": "a: &a [x, x, x, x, x, x, x, x, x]\n"
    + "".join(
        f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True)
    )
    + "trainer: {callbacks: *j}",
}  # fmt: skip


def monitors(arguments: list[str], folder: Path) -> tuple[int, str, list[str]]:
    """Exit code, error stream and forbidden events of `main(arguments)` in a process of its own."""
    events, errors = folder / "events.txt", folder / "stderr.txt"

    def target() -> None:
        os.chdir(folder)
        (folder / "stranger.py").write_text("import os\nos.system('touch SENTINEL')\n")
        sys.stderr = errors.open("w", buffering=1)
        log = events.open("w", buffering=1)

        def hook(event: str, _: Any) -> None:
            if event in FORBIDDEN:
                log.write(event + "\n")

        sys.addaudithook(hook)
        main(arguments)

    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    process.join(timeout=60)
    if process.exitcode is None:
        process.kill()
        pytest.fail("still at it after 60 s")
    return process.exitcode, errors.read_text(), events.read_text().splitlines()


@pytest.mark.parametrize("name", CONFIGS)
def test_hostile_configuration_is_rejected_in_one_sentence(name: str, tmp_path: Path) -> None:
    config = tmp_path / "hostile.yaml"
    config.write_text(CONFIGS[name].replace("SENTINEL", str(tmp_path / "SENTINEL")))
    code, errors, events = monitors(["fit", "--config", str(config)], tmp_path)
    assert events == []
    assert not (tmp_path / "SENTINEL").exists()
    assert code in (1, 2), errors
    assert "Traceback" not in errors
    assert len(errors) < 3000
    assert errors.startswith("mmbert: error: ")


def test_user_allows_a_module_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from lightning import Callback\nprint('imported mine')\n\nclass Mine(Callback):\n    pass\n"
    )
    config = "trainer: {callbacks: [{class_path: mine.Mine}], fast_dev_run: true}"
    (tmp_path / "c.yaml").write_text(config)
    command = [sys.executable, str(ROOT / "train.py"), "fit", "--config", "c.yaml"]
    refused = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "--allow-import mine" in refused.stderr, "the message tells how to allow it"
    allowed = subprocess.run([*command, "--allow-import", "mine"], cwd=tmp_path, capture_output=True, text=True)
    assert "imported mine" in allowed.stdout
    assert "data.tokenizer is missing" in allowed.stderr, "what is wrong next"


@pytest.mark.parametrize("module", ["", "jsonargparse", "a b", "../x"])
def test_allow_import_takes_modules_only(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--allow-import", module])
    assert stopped.value.code == 2
    assert "expected a module" in capsys.readouterr().err
