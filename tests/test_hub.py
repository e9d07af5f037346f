"""Downloads of weights from a local server that answers as the Hugging Face hub does."""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT
from huggingface_hub import constants

from nbs_lib import kaggle
from nbs_lib.hub import find_repository, list_profile_weights
from nbs_lib.runtime import InputError
from nbs_lib.settings import load_settings

REPOSITORY = "owner/some-model"
WEIGHTS = bytes(range(256)) * 4096  # 1 MB
BACKBONE = "tf_efficientnet_lite0"
TIMM = f"timm/{BACKBONE}.in1k"


class Hub(ThreadingHTTPServer):
    "Repositories in memory: name → {file: bytes}; large files have a sha256 as LFS files do."

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        small = {"config.json": b"{}", "README.md": b"a model"}
        self.files = {
            REPOSITORY: {"model.safetensors": WEIGHTS, "pytorch_model.bin": b"again", **small},
            TIMM: {"model.safetensors": WEIGHTS, "pytorch_model.bin": b"again", **small},
        }
        self.gated = False
        self.card = {"license": "other", "license_name": "some-licence", "license_link": "https://licence"}
        self.stop_after = None  # bytes of a large file after which the server waits for ever
        self.flipped = False  # send wrong bytes under the right checksum
        self.status = 0  # of every answer
        self.gets = []  # (file, Range)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def refuse(self, code: int, reason: str) -> None:
        self.send_response(code)
        self.send_header("X-Error-Code", reason)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self):
        hub, path = self.server, self.path.split("?")[0]
        if hub.status:
            return self.refuse(hub.status, "Other")
        if found := re.fullmatch(r"/api/models/(.+?)/revision/main", path):
            return self.describe(found[1])
        found = re.fullmatch(r"/(.+?)/resolve/main/(.+)", path)
        if not found or found[2] not in hub.files.get(found[1], {}):
            return self.refuse(404, "RepoNotFound")
        if hub.gated and self.headers.get("Authorization") != "Bearer good":
            return self.refuse(403 if self.headers.get("Authorization") else 401, "GatedRepo")
        self.send_file(found[2], hub.files[found[1]][found[2]])

    do_HEAD = do_GET

    def describe(self, repository: str) -> None:
        hub = self.server
        if repository not in hub.files:
            return self.refuse(404, "RepoNotFound")
        siblings = [{"rfilename": name} for name in hub.files[repository]]
        about = {"id": repository, "sha": "0" * 40, "gated": "auto" if hub.gated else False, "tags": []}
        body = json.dumps(about | {"cardData": hub.card, "siblings": siblings}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def send_file(self, name: str, data: bytes) -> None:
        hub, is_large = self.server, len(data) > 1000
        etag = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        wanted = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted else 0
        self.send_response(206 if wanted else 200)
        self.send_header("ETag", f'"{etag}"')
        if is_large:
            self.send_header("X-Linked-Etag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("X-Linked-Size", str(len(data)))
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(data) - start))
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        hub.gets.append((name, self.headers.get("Range")))
        if is_large and hub.flipped:
            data = bytes(256) + data[256:]
        if is_large and hub.stop_after is not None:
            self.wfile.write(data[start : hub.stop_after])
            self.wfile.flush()
            time.sleep(60)
        self.wfile.write(data[start:])


@pytest.fixture
def hub(monkeypatch):
    "A local server that takes the place of the hub."
    server = Hub()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield server
    server.shutdown()
    server.server_close()


def start(hub: Hub, *words: str, **kwargs) -> subprocess.Popen:
    "Start `python -m nbs_lib.kaggle` with the local server as hub."
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS"))}
    env |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN_PATH": "/nowhere"}
    kwargs = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | kwargs
    command = [sys.executable, "-m", "nbs_lib.kaggle", *words]
    return subprocess.Popen(command, cwd=ROOT, env=env, text=True, **kwargs)


def download(name: str, to: Path) -> tuple[int, str, str]:
    "Return exit code, output and errors of `python -m nbs_lib.kaggle weights NAME`."
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = kaggle.main(["weights", name, "--to", str(to)])
    return code, out.getvalue(), err.getvalue()


def read_error(name: str, to: Path) -> str:
    "Return the one line of a download that ends with exit code 2."
    code, _, err = download(name, to)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in err, err
    return lines[0]


def test_a_repository_becomes_a_folder_and_is_downloaded_once(hub, tmp_path):
    code, out, _ = download(REPOSITORY, tmp_path)
    folder = tmp_path / "some-model"
    assert code == 0
    assert {p.name for p in folder.iterdir()} == {"model.safetensors", "config.json", "README.md"}
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert "licence some-licence https://licence" in out and "checksum verified" in out
    hub.gets.clear()
    code, out, _ = download(REPOSITORY, tmp_path)
    assert code == 0 and out.count("already there") == 3 and not hub.gets


def test_a_terminal_shows_the_progress(hub, tmp_path):
    screen, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = start(hub, "weights", REPOSITORY, "--to", str(tmp_path), stderr=terminal)
    process.communicate(timeout=60)
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while text := os.read(screen, 10_000):
            shown += text
    assert "model.safetensors: 100%" in shown.decode()


def test_a_timm_backbone_becomes_one_file_of_its_name(hub, tmp_path):
    assert download(BACKBONE, tmp_path)[0] == 0
    assert {p.name for p in tmp_path.iterdir()} == {f"{BACKBONE}.safetensors"}
    assert hub.gets == [("model.safetensors", None)]


@pytest.fixture
def folder(tmp_path) -> Path:
    "Where the repository goes."
    folder = tmp_path / "some-model"
    folder.mkdir()
    return folder


def test_a_download_that_was_killed_goes_on_where_it_was(hub, folder):
    hub.stop_after = len(WEIGHTS) // 2
    process = start(hub, "weights", REPOSITORY, "--to", str(folder.parent))
    end = time.monotonic() + 60
    while sum(p.stat().st_size for p in folder.glob(".*.part")) < hub.stop_after and time.monotonic() < end:
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    assert not (folder / "model.safetensors").exists()
    size = next(folder.glob(".*.part")).stat().st_size
    assert size == hub.stop_after
    hub.stop_after = None
    hub.gets.clear()
    code, _, err = download(REPOSITORY, folder.parent)
    assert code == 0, err
    assert hub.gets[0] == ("model.safetensors", f"bytes={size}-") and len(hub.gets) == 3
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS and not list(folder.glob(".*.part"))


def test_a_complete_partial_file_is_not_downloaded_again(hub, folder):
    (folder / f".model.safetensors.{hashlib.sha256(WEIGHTS).hexdigest()[:16]}.part").write_bytes(WEIGHTS)
    assert download(REPOSITORY, folder.parent)[0] == 0
    assert [name for name, _ in hub.gets] == ["config.json", "README.md"] and not list(folder.glob(".*.part"))


def test_a_file_of_another_version_is_replaced(hub, folder):
    (folder / "model.safetensors").write_bytes(b"older")
    assert download(REPOSITORY, folder.parent)[0] == 0
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS


def test_a_wrong_checksum_is_refused_and_not_kept(hub, folder):
    hub.flipped = True
    assert "wrong checksum" in read_error(REPOSITORY, folder.parent)
    assert not list(folder.iterdir())
    hub.flipped = False
    assert download(REPOSITORY, folder.parent)[0] == 0


@pytest.mark.parametrize("token", ["", "bad"])
def test_a_gated_repository_names_page_and_token(token, hub, tmp_path, monkeypatch):
    hub.gated = True
    monkeypatch.setenv("HF_TOKEN", token)
    line = read_error(REPOSITORY, tmp_path)
    assert f"accept its licence on {hub.url}/{REPOSITORY}" in line and "HF_TOKEN" in line
    assert not list(tmp_path.glob("**/*.safetensors"))


def test_a_gated_repository_opens_with_a_token(hub, tmp_path, monkeypatch):
    hub.gated = True
    monkeypatch.setenv("HF_TOKEN", "good")
    code, out, _ = download(REPOSITORY, tmp_path)
    assert code == 0 and "some-licence https://licence (gated)" in out


def test_a_repository_that_is_not_there_is_one_line(hub, tmp_path):
    line = read_error("owner/nothing", tmp_path)
    assert "no repository owner/nothing" in line and "HF_TOKEN" in line


@pytest.mark.parametrize("status, words", [(401, "HF_TOKEN"), (403, "HF_TOKEN"), (500, "500"), (429, "429")])
def test_what_the_hub_refuses_is_one_line(status, words, hub, tmp_path):
    hub.status = status
    assert words in read_error(REPOSITORY, tmp_path)


def test_a_repository_without_weights_is_refused(hub, tmp_path):
    hub.files[REPOSITORY] = {"README.md": b"words", "onnx/model.onnx": b"x"}
    assert "has no .safetensors" in read_error(REPOSITORY, tmp_path)


def test_a_hub_that_does_not_answer_is_one_line(hub, tmp_path):
    hub.shutdown()
    hub.server_close()
    assert hub.url in read_error(REPOSITORY, tmp_path)


def test_a_folder_that_cannot_be_written_is_one_line(hub, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    line = read_error(REPOSITORY, tmp_path / "file/weights")
    assert str(tmp_path / "file") in line and "--to" in line


def test_a_disk_that_is_full_is_said_before_the_download(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1))
    assert "GB free" in read_error(REPOSITORY, tmp_path)
    assert not hub.gets


@pytest.mark.parametrize(
    "name, found",
    [
        ("dinov3", ("timm/vit_huge_plus_patch16_dinov3.lvd1689m", "", "vit_huge_plus_patch16_dinov3")),
        ("siglip", ("google/siglip-so400m-patch14-384", "", "")),
        (BACKBONE, (TIMM, "", BACKBONE)),
        (
            "vit_small_patch16_dinov3.lvd1689m",
            ("timm/vit_small_patch16_dinov3.lvd1689m", "", "vit_small_patch16_dinov3"),
        ),
        ("facebook/dinov3-vits16", ("facebook/dinov3-vits16", "", "")),
    ],
)
def test_names_lead_to_repositories(name, found):
    assert find_repository(name) == found


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3.hay", "nothing_of_timm"])
def test_a_name_that_timm_does_not_know_is_refused_with_similar_ones(name):
    with pytest.raises(InputError, match=f"no pretrained {name} .similar: .*owner/repository"):
        find_repository(name)


def test_a_profile_names_what_it_needs():
    assert list_profile_weights(load_settings("demo")) == list_profile_weights(load_settings("laptop")) == []
    assert list_profile_weights(load_settings("kaggle")) == ["vit_huge_plus_patch16_dinov3", "siglip"]
    other = load_settings("kaggle", overrides=["frozen.backbone=convnext_tiny", "siglip.weights="])
    assert list_profile_weights(other) == ["vit_huge_plus_patch16_dinov3", "convnext_tiny"]


def test_a_profile_without_weights_downloads_none(capsys):
    assert kaggle.main(["--profile", "demo", "weights"]) == 0
    assert "profile demo needs no weights" in capsys.readouterr().out


def test_the_downloaded_name_is_the_one_in_the_settings():
    settings = load_settings("kaggle")
    assert settings.train_dinov3.weights == f"{find_repository('dinov3')[2]}.safetensors"
    assert settings.siglip.weights == find_repository("siglip")[0].split("/")[1]
