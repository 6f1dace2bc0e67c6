"""Untrusted weights never run code: as a checkpoint, a model folder, or a pretrained encoder."""

import json
import multiprocessing
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import tiny_config

from mmbert import MMBertForPreTraining
from mmbert.model.initialization import build_model
from mmbert.model.options import ModelOptions
from mmbert.training.checkpoints import VerifiedCheckpointIO

SENTINEL = Path("executed")
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect")


class Hostile:
    """Unpickled, it runs a command."""

    def __reduce__(self) -> Any:
        return os.system, (f"touch {SENTINEL}",)


def checkpoint(folder: Path, content: Any) -> Path:
    torch.save(content, folder / "step=1.ckpt")
    return folder / "step=1.ckpt"


def with_extra_pickle(folder: Path) -> Path:
    path = checkpoint(folder, {"state_dict": {"w": torch.ones(2)}})
    with zipfile.ZipFile(path, "a") as archive:
        name = archive.namelist()[0].split("/")[0]
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr(f"{name}/data.pkl", pickle.dumps(Hostile()))
    return path


def bare_pickle(folder: Path) -> Path:
    (folder / "step=1.ckpt").write_bytes(pickle.dumps({"state_dict": Hostile()}))
    return folder / "step=1.ckpt"


CHECKPOINTS: dict[str, Callable[[Path], Path]] = {
    "in the weights": lambda folder: checkpoint(folder, {"state_dict": Hostile()}),
    "in the optimizer": lambda folder: checkpoint(folder, {"optimizer_states": [{"state": Hostile()}]}),
    "in a callback": lambda folder: checkpoint(folder, {"callbacks": {"RunCheckpoints": Hostile()}}),
    "in hyper-parameters": lambda folder: checkpoint(folder, {"hyper_parameters": {"_instantiator": Hostile()}}),
    "an array of objects": lambda folder: checkpoint(folder, {"x": np.array([Hostile()], dtype=object)}),
    "a second pickle in the archive": with_extra_pickle,
    "a bare pickle": bare_pickle,
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    MMBertForPreTraining(tiny_config()).save_pretrained(folder)
    return folder


def header(length: int, rest: bytes = b"{}") -> bytes:
    return struct.pack("<Q", length) + rest


def overlapping() -> bytes:
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    text = json.dumps({"a": entry, "b": entry}).encode()
    return header(len(text), text + b"\0" * 4)


FILES: dict[str, bytes] = {
    "a pickle named safetensors": pickle.dumps(Hostile()),
    "a header of 2^63 bytes": header(2**63),
    "a header of 101 MB": header(101 << 20, b" " * 1000),
    "tensors that overlap": overlapping(),
    "nothing": b"",
}


def refused(work: Callable[[], object], folder: Path) -> str:
    """The error of `work`, "" if there is none; it must start nothing, in a process of its own."""
    events = folder / "events.txt"
    receive, send = multiprocessing.Pipe(duplex=False)

    def target() -> None:
        os.chdir(folder)
        log = events.open("w", buffering=1)
        sys.addaudithook(lambda event, _: log.write(event + "\n") and None if event in FORBIDDEN else None)
        try:
            work()
            send.send("")
        except Exception as error:
            send.send(f"{type(error).__name__}: {error}")

    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    process.join(timeout=60)
    assert process.exitcode == 0
    assert events.read_text() == ""
    assert not (folder / SENTINEL).exists()
    return receive.recv()


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_hostile_checkpoint_is_rejected(name: str, tmp_path: Path) -> None:
    path = CHECKPOINTS[name](tmp_path)
    assert refused(lambda: VerifiedCheckpointIO().load_checkpoint(path), tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_hostile_model_folder_is_rejected(name: str, model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((model_folder / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(FILES[name])
    assert refused(lambda: MMBertForPreTraining.from_pretrained(tmp_path), tmp_path)


def test_index_that_points_outside_of_its_folder_is_rejected(model_folder: Path, tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    save_file({"secret": torch.ones(1)}, tmp_path / "secret.safetensors")
    (inner / "config.json").write_bytes((model_folder / "config.json").read_bytes())
    index = {"metadata": {"total_size": 4}, "weight_map": {"mmbert.fusion.absent_text": "../secret.safetensors"}}
    (inner / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "a file in the same folder" in refused(lambda: MMBertForPreTraining.from_pretrained(inner), tmp_path)


def test_model_folder_with_a_pickle_is_rejected(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((model_folder / "config.json").read_bytes())
    torch.save({"mmbert.fusion.absent_text": Hostile()}, tmp_path / "pytorch_model.bin")
    assert refused(lambda: MMBertForPreTraining.from_pretrained(tmp_path), tmp_path)


def test_pretrained_text_encoder_is_read_from_safetensors_only(tmp_path: Path) -> None:
    config = {"model_type": "bert", "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save({"embeddings": Hostile()}, tmp_path / "pytorch_model.bin")
    options = ModelOptions(text_pretrained=str(tmp_path), text_layers=1)
    assert "UsageError" in refused(lambda: build_model(options), tmp_path)


def test_code_in_a_model_folder_is_never_imported(model_folder: Path, tmp_path: Path) -> None:
    config = json.loads((model_folder / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "code.Model", "AutoConfig": "code.Config"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text(f"import os\nos.system('touch {SENTINEL}')\n")
    (tmp_path / "model.safetensors").write_bytes((model_folder / "model.safetensors").read_bytes())
    message = refused(lambda: MMBertForPreTraining.from_pretrained(tmp_path), tmp_path)
    assert message == "" or "UsageError" in message, "loaded without the code, or refused"


def test_every_file_of_a_run_is_tensors_and_text(tmp_path: Path) -> None:
    io, path = VerifiedCheckpointIO(), tmp_path / "step=1.ckpt"
    io.save_checkpoint({"state_dict": {"w": torch.ones(2)}, "loops": {"a": [1, 2.0, "x", None, True]}}, path)
    assert io.load_checkpoint(path)["loops"] == {"a": [1, 2.0, "x", None, True]}
