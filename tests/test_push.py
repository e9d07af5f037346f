"""Pushes against a stand-in for Kaggle's server: the real client and SDK run, their HTTP calls end here.

A changed signature in the `kaggle` package makes these tests fail, because the client's own code runs.
"""
import contextlib
import io
import json
import shutil
import tempfile
import time
import zipfile
from pathlib import Path
from unittest.mock import create_autospec

import pytest
import requests
from conftest import ROOT
from kaggle.api.kaggle_api_extended import KaggleApi
from kaggle.models.kaggle_models_extended import ResumableUploadResult
from kagglesdk.blobs.types.blob_api_service import ApiStartBlobUploadResponse
from kagglesdk.competitions.types.competition_api_service import ApiCreateCodeSubmissionResponse
from kagglesdk.datasets.types.dataset_api_service import (
    ApiCreateDatasetResponse,
    ApiDataset,
    ApiGetDatasetStatusResponse,
    ApiListDatasetsResponse,
)
from kagglesdk.datasets.types.dataset_enums import DatabundleVersionStatus
from kagglesdk.kaggle_http_client import KaggleHttpClient
from kagglesdk.kernels.types.kernels_api_service import (
    ApiGetKernelResponse,
    ApiGetKernelSessionStatusResponse,
    ApiKernelMetadata,
    ApiListKernelSessionOutputResponse,
    ApiSaveKernelResponse,
)
from kagglesdk.kernels.types.kernels_enums import KernelWorkerStatus

from nbs_lib import hub, kaggle
from nbs_lib.ledger import add_facts, hash_submission, read_ledger
from nbs_lib.settings import load_settings

SETTINGS = load_settings("kaggle", path=ROOT / "settings.ini", overrides=["kaggle.username=ann"])
DATASETS = {folder: dataset.ref(SETTINGS) for folder, dataset in kaggle.KAGGLE_DATASETS.items()}
KERNELS = {name: kernel.ref(SETTINGS) for name, kernel in kaggle.KAGGLE_KERNELS.items()}


def http_error(code: int, words: str = "") -> requests.HTTPError:
    response = requests.Response()
    response.status_code = code
    return requests.HTTPError(words or f"{code} Client Error", response=response)


def make(kind: type, **fields):
    "A response of the SDK; an attribute it does not know is refused by the SDK itself."
    response = kind()
    for name, value in fields.items():
        setattr(response, name, value)
    return response


def accept_dataset(ref: str):
    "Answer as Kaggle does when a dataset or a version of it is accepted."
    url = f"https://www.kaggle.com/datasets/{ref}"
    return make(ApiCreateDatasetResponse, ref=ref, url=url, status="Ok", error="")


class Server:
    "Datasets and kernels of the user ann. A list of states is used up, one a question; its last one stays."

    def __init__(self):
        self.datasets = {ref: ["READY"] for ref in DATASETS.values()}  # ref → states
        self.versions = {ref: 3 for ref in DATASETS.values()}  # ref → newest version
        self.runs = {
            (KERNELS["train"], 2): ["COMPLETE"],
            (KERNELS["features"], 5): ["COMPLETE"],
        }  # (ref, version) → states
        self.newest = {KERNELS["train"]: 2, KERNELS["features"]: 5}
        self.answers = {}  # request → what save or create answers, or an exception
        self.requests = []  # (name, request)
        self.failed_uploads = 0

    def call(self, client, service_name, request_name, request, response_type):
        self.requests.append((request_name, request))
        answer = self.answers.get(request_name)
        if isinstance(answer, Exception):
            raise answer
        return answer or getattr(self, request_name)(request)

    def names(self) -> list[str]:
        return [name for name, _ in self.requests]

    def last(self, name: str):
        return next(request for n, request in reversed(self.requests) if n == name)

    @staticmethod
    def next_state(states: list[str]) -> str:
        return states.pop(0) if len(states) > 1 else states[0]

    def GetDatasetStatus(self, request):
        ref = f"{request.owner_slug}/{request.dataset_slug}"
        if ref not in self.datasets:
            raise http_error(403, "Permission 'datasets.get' was denied")
        state = self.next_state(self.datasets[ref])
        return make(ApiGetDatasetStatusResponse, status=DatabundleVersionStatus[state])

    def GetDataset(self, request):
        return make(
            ApiDataset, current_version_number=self.versions[f"{request.owner_slug}/{request.dataset_slug}"]
        )

    def ListDatasets(self, request):
        first = (request.page or 1) == 1
        return make(
            ApiListDatasetsResponse,
            datasets=[make(ApiDataset, ref=r) for r in self.datasets] if first else [],
        )

    def StartBlobUpload(self, request):
        return make(ApiStartBlobUploadResponse, token=f"token-{request.name}", create_url="https://upload")

    def CreateDataset(self, request):
        ref = f"{request.owner_slug}/{request.slug}"
        self.datasets[ref], self.versions[ref] = ["BLOBS_RECEIVED", "READY"], 1
        return accept_dataset(ref)

    def CreateDatasetVersion(self, request):
        ref = f"{request.owner_slug}/{request.dataset_slug}"
        return accept_dataset(ref)

    def SaveKernel(self, request):
        self.newest[request.slug] = self.newest.get(request.slug, 0) + 1
        self.runs.setdefault((request.slug, self.newest[request.slug]), ["COMPLETE"])
        return make(
            ApiSaveKernelResponse,
            ref=f"/code/{request.slug}",
            url=f"https://www.kaggle.com/code/{request.slug}",
            version_number=self.newest[request.slug],
            error="",
        )

    def GetKernel(self, request):
        ref = f"{request.user_name}/{request.kernel_slug}"
        if ref not in self.newest:
            raise http_error(403, "Permission 'kernels.get' was denied")
        return make(
            ApiGetKernelResponse, metadata=make(ApiKernelMetadata, current_version_number=self.newest[ref])
        )

    def run_of(self, request) -> tuple[str, int]:
        ref = f"{request.user_name}/{request.kernel_slug}"
        number = int(request.version_label[1:]) if request.version_label else self.newest.get(ref, 0)
        if (ref, number) not in self.runs:
            raise http_error(404, "Not found")
        return ref, number

    def GetKernelSessionStatus(self, request):
        state = self.next_state(self.runs[self.run_of(request)])
        return make(ApiGetKernelSessionStatusResponse, status=KernelWorkerStatus[state],
                    failure_message="it ran out of memory" if state == "ERROR" else None)

    def ListKernelSessionOutput(self, request):
        log = json.dumps(
            [{"stream_name": "stderr", "time": 1.0, "data": f"log of version {self.run_of(request)[1]}\n"}]
        )
        return make(ApiListKernelSessionOutputResponse, log=log)

    def CreateCodeSubmission(self, request):
        return make(ApiCreateCodeSubmissionResponse, message="Successfully submitted", ref=77)

    def upload(self, client, path, url, quiet, resume=False):
        "In place of the upload itself; a dataset that existed is then at its next version."
        if self.failed_uploads:
            self.failed_uploads -= 1
            return ResumableUploadResult.FAILED
        return ResumableUploadResult.COMPLETE


@pytest.fixture
def server(tmp_path, monkeypatch) -> Server:
    "Kaggle's server for the signed-in user ann, in a folder of her own; nothing waits."
    server, sleeps = Server(), iter([True] * 200)
    for name in ("KAGGLE_API_TOKEN", "KAGGLE_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"KAGGLE_USERNAME": "ann", "KAGGLE_KEY": "k", "KAGGLE_CONFIG_DIR": str(tmp_path),
                        "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(
        KaggleHttpClient, "call", create_autospec(KaggleHttpClient.call, side_effect=server.call)
    )
    monkeypatch.setattr(
        KaggleApi, "upload_complete", create_autospec(KaggleApi.upload_complete, side_effect=server.upload)
    )
    monkeypatch.setattr(time, "sleep", lambda seconds: next(sleeps, None) or pytest.fail("waits for ever"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # the client keeps its uploads there
    shutil.copy(ROOT / "settings.ini", tmp_path)
    monkeypatch.chdir(tmp_path)
    return server


def call(*argv: str) -> tuple[int, str, str]:
    "Exit code, output and errors of `python -m nbs_lib.kaggle` for the user ann."
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = kaggle.main(["--set", "kaggle.username=ann", *argv])
    return code, out.getvalue(), err.getvalue()


def read_error(server: Server, *argv: str, sent: bool = False) -> str:
    "Return the one line of a push with exit code 2; `sent`: it may have saved or created something."
    code, _, error = call(*argv)
    line = error.splitlines()[-1]
    assert code == 2 and line.startswith("error: "), error
    assert sent or not {"SaveKernel", "CreateDataset", "CreateDatasetVersion", "CreateCodeSubmission"} & set(
        server.names()
    )
    return line


# Kernels


def test_a_kernel_is_sent_with_the_versions_that_were_found(server):
    code, out, _ = call("push", "features", "--send")
    request = server.last("SaveKernel")
    assert code == 0 and f"version 6: https://www.kaggle.com/code/{KERNELS['features']}" in out
    folders = ("nbs-lib", "wheels", "dinov3-weights", "siglip-weights")
    assert request.dataset_data_sources == [f"{DATASETS[folder]}/3" for folder in folders]
    assert request.kernel_data_sources == [KERNELS["train"]] and f"attached: {KERNELS['train']}/2" in out
    assert (
        request.docker_image == SETTINGS.kaggle.docker_image
        and request.docker_image_pinning_type == "original"
    )


@pytest.mark.parametrize("pins, datasets, kernels", [("none", "", ""), ("all", "/3", "/2")])
def test_what_is_pinned_is_a_setting(pins, datasets, kernels, server):
    assert call("--set", f"kaggle.pin_versions={pins}", "push", "features", "--send")[0] == 0
    request = server.last("SaveKernel")
    assert request.dataset_data_sources[0] == DATASETS["nbs-lib"] + datasets
    assert request.kernel_data_sources == [KERNELS["train"] + kernels]


@pytest.mark.parametrize("override, image, pinning", [
    ("kaggle.docker_image=", "", "original"),
    ("kaggle.docker_image_pinning_type=latest", "gcr.io/", "latest"),
])
def test_the_docker_image_is_a_setting(override, image, pinning, server):
    assert call("--set", override, "push", "eda", "--send")[0] == 0
    request = server.last("SaveKernel")
    assert (request.docker_image or "").startswith(image) and bool(request.docker_image) == bool(image)
    assert request.docker_image_pinning_type == pinning


@pytest.mark.parametrize("override", ["kaggle.pin_versions=some", "kaggle.docker_image_pinning_type=mine"])
def test_a_setting_that_is_unknown_is_refused(override, server):
    assert override.partition(".")[2].partition("=")[0] in read_error(
        server, "--set", override, "push", "eda", "--send")


def answer_of_save(**fields) -> ApiSaveKernelResponse:
    url = f"https://www.kaggle.com/code/{KERNELS['eda']}"
    return make(
        ApiSaveKernelResponse,
        **({"ref": f"/code/{KERNELS['eda']}", "url": url, "version_number": 1} | fields),
    )


@pytest.mark.parametrize("fields, words", [
    ({"error": "Maximum weekly GPU quota reached", "url": "", "ref": ""}, "Maximum weekly GPU quota reached"),
    ({"invalid_dataset_sources": ["ann/gone/3"]},
     "invalid dataset sources: ann/gone/3; correct them, or set kaggle.pin_versions"),
    ({"invalid_kernel_sources": ["ann/train"]}, "invalid kernel sources: ann/train"),
    ({"invalid_tags": ["hay"]}, "invalid tags: hay"),
    ({"url": "https://www.kaggle.com/code/ann/image2biomass-eda-2"}, "ann/image2biomass-eda-2"),
    ({"url": "", "ref": ""}, "saved as nothing"),
])
def test_what_kaggle_refuses_in_a_kernel_is_exit_2_with_its_words(fields, words, server):
    server.answers["SaveKernel"] = answer_of_save(**fields)
    assert words in read_error(server, "push", "eda", "--send", sent=True)


@pytest.mark.parametrize("code", [403, 429, 500])
def test_an_http_error_of_a_push_is_exit_2_with_kaggles_words(code, server):
    server.answers["SaveKernel"] = http_error(code, "Kaggle says no")
    assert "Kaggle says no" in read_error(server, "push", "eda", "--send", sent=True)


def test_without_an_answer_the_network_is_named(server):
    server.answers["SaveKernel"] = requests.ConnectionError("no route")
    assert "no answer from kaggle.com" in read_error(server, "push", "eda", "--send", sent=True)


def test_another_user_sends_nothing(server, monkeypatch):
    monkeypatch.setenv("KAGGLE_USERNAME", "bob")
    line = read_error(server, "push", "eda", "--send")
    assert "ann, but bob is signed in" in line and not server.requests
    assert "bob is signed in" in read_error(server, "submit", "--version", "3", "--send")


@pytest.mark.parametrize("states, words", [
    (None, "missing"), (["FAILED"], "failed"), (["BLOBS_RECEIVED", "DELETED"], "deleted")])
def test_a_kernel_whose_dataset_is_not_ready_is_not_sent(states, words, server):
    server.datasets[DATASETS["wheels"]] = states
    if not states:
        del server.datasets[DATASETS["wheels"]]
    line = read_error(server, "push", "eda", "--send")
    assert f"{DATASETS['wheels']}: {words}" in line and "STAGE=wheels" in line


def test_a_push_waits_for_a_dataset_in_progress(server):
    server.datasets[DATASETS["wheels"]] = ["NOT_YET_PERSISTED", *["BLOBS_DECOMPRESSED"] * 2, "READY"]
    code, out, _ = call("push", "eda", "--send")
    assert code == 0 and server.names()[-1] == "SaveKernel"
    assert out.count(f"{DATASETS['wheels']}: blobs_decompressed after") == 1


def test_waiting_ends(server, monkeypatch):
    clock = iter(range(0, 10**9, 3600))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    server.datasets[DATASETS["wheels"]] = ["BLOBS_RECEIVED"]
    assert "still blobs_received" in read_error(server, "push", "eda", "--send")


@pytest.mark.parametrize("states, words", [
    (["RUNNING", "COMPLETE"], ""), (["ERROR"], "it ran out of memory"), (["NEW_SCRIPT"], "new_script"),
    (None, "missing")])
def test_a_kernel_needs_the_complete_output_of_another(states, words, server):
    server.runs[KERNELS["train"], 2] = states
    server.runs[KERNELS["train"], 1] = ["COMPLETE"]  # an older version does not count
    if not states:
        del server.newest[KERNELS["train"]], server.runs[KERNELS["train"], 2]
    if words:
        line = read_error(server, "push", "features", "--send")
        assert KERNELS["train"] in line and words in line
    else:
        assert call("push", "features", "--send")[0] == 0


@pytest.mark.parametrize("code", [429, 500])
def test_an_http_error_of_a_question_is_no_answer(code, server):
    server.answers["GetDatasetStatus"] = http_error(code, "Kaggle says no")
    assert "Kaggle says no" in read_error(server, "push", "eda", "--send")
    questions = 10 if code == 429 else 1  # the client retries a rate limit
    assert server.names().count("GetDatasetStatus") == questions


def test_a_list_without_an_end_is_read_once(server):
    "The own datasets are asked for page after page until nothing new comes."
    server.answers["GetDatasetStatus"] = http_error(403, "Kaggle says no")
    datasets = [make(ApiDataset, ref=ref) for ref in DATASETS.values()]
    server.ListDatasets = lambda request: make(ApiListDatasetsResponse, datasets=datasets)
    assert "Kaggle says no" in read_error(server, "push", "eda", "--send")
    assert server.names().count("ListDatasets") == 2


# The run of a kernel


def test_watch_follows_the_version_that_was_pushed(server):
    server.newest[KERNELS["eda"]], server.runs[KERNELS["eda"], 1] = 1, ["COMPLETE"]  # of the push before
    server.runs[KERNELS["eda"], 2] = ["QUEUED", "RUNNING", "RUNNING", "COMPLETE"]
    code, out, _ = call("push", "eda", "--send", "--watch")
    labels = [request.version_label for name, request in server.requests if name == "GetKernelSessionStatus"]
    assert code == 0 and labels == ["v2"] * 4
    assert "version 2: queued" in out and "version 2: running" in out and "version 2: complete" in out


@pytest.mark.parametrize("failures, ends", [(20, True), (21, False)])
def test_watch_asks_again_when_kaggle_does_not_answer(failures, ends, server):
    server.runs[KERNELS["eda"], 1] = ["RUNNING", "COMPLETE"]
    asked, real = iter(range(1000)), server.GetKernelSessionStatus

    def answer(request):
        if 0 < next(asked) <= failures:
            raise http_error(502, "Bad gateway")
        return real(request)

    server.GetKernelSessionStatus = answer
    code, out, error = call("push", "eda", "--send", "--watch")
    assert (code, "version 1: complete" in out, "Bad gateway" in error) == (0 if ends else 2, ends, not ends)


@pytest.mark.parametrize("end", ["ERROR", "CANCEL_ACKNOWLEDGED"])
def test_watch_saves_the_log_of_a_failed_run(end, server, tmp_path):
    server.runs[KERNELS["eda"], 1] = ["RUNNING", end]
    code, out, _ = call("push", "eda", "--send", "--watch")
    assert code == 1 and end.lower() in out and "log of version 1" in out
    assert (tmp_path / "build/kaggle/eda-v1.log").read_text() == "log of version 1\n"


def test_without_watch_the_push_ends_with_the_link(server):
    code, out, _ = call("push", "eda", "--send")
    assert code == 0 and server.names()[-1] == "SaveKernel" and out.splitlines()[-1].startswith("kernel ann/")


def test_a_log_that_is_plain_text_is_kept(server, tmp_path):
    server.runs[KERNELS["eda"], 1] = ["ERROR"]
    server.answers["ListKernelSessionOutput"] = make(ApiListKernelSessionOutputResponse, log="plain words")
    assert call("push", "eda", "--send", "--watch")[0] == 1
    assert (tmp_path / "build/kaggle/eda-v1.log").read_text() == "plain words"


# Datasets


@pytest.fixture
def wheels(tmp_path) -> Path:
    "A folder for the dataset wheels, with a folder of its own inside."
    folder = tmp_path / "source"
    (folder / "inner").mkdir(parents=True)
    for name in ("wheelhouse.lock", "a-1-py3-none-any.whl", "inner/more.txt"):
        (folder / name).write_text("words")
    return folder


def test_a_dataset_that_is_not_there_is_created_and_waited_for(server, wheels):
    del server.datasets[DATASETS["wheels"]]
    code, out, _ = call("push", "wheels", "--source", str(wheels), "--send")
    request = server.last("CreateDataset")
    assert code == 0 and "CreateDatasetVersion" not in server.names() and request.is_private
    sent = {f.token.removeprefix("token-") for f in request.files}
    assert sent == {"wheelhouse.lock", "a-1-py3-none-any.whl", "inner.zip"}
    assert "version 1: ready" in out


def new_version(server: Server, ref: str, states: list[str]) -> None:
    "Let the next version of `ref` be processed only after two more questions, as on Kaggle."
    seen = iter([3, 3, 3, 4])
    server.GetDataset = lambda request: make(ApiDataset, current_version_number=next(seen, 4))
    server.datasets[ref] = ["READY", "READY", *states]


def test_a_dataset_that_is_there_gets_a_version_and_is_waited_for(server, wheels):
    new_version(server, DATASETS["wheels"], ["READY", "BLOBS_RECEIVED", "READY"])
    code, out, _ = call("push", "wheels", "--source", str(wheels), "--send")
    assert code == 0 and "CreateDataset" not in server.names()
    assert out.index("processing") < out.index("blobs_received") < out.index("version 4: ready")


def test_a_version_that_kaggle_cannot_process_is_exit_2(server, wheels):
    new_version(server, DATASETS["wheels"], ["READY", "FAILED"])
    assert "version 4: failed" in read_error(
        server, "push", "wheels", "--source", str(wheels), "--send", sent=True
    )


@pytest.mark.parametrize("code", [403, 429, 500])
@pytest.mark.parametrize("where", ["GetDatasetStatus", "CreateDatasetVersion"])
def test_no_http_error_creates_a_new_dataset(code, where, server, wheels):
    server.answers[where] = http_error(code, "Kaggle says no")
    line = read_error(server, "push", "wheels", "--source", str(wheels), "--send", sent=True)
    assert "Kaggle says no" in line and "CreateDataset" not in server.names()
    assert where == "CreateDatasetVersion" or "CreateDatasetVersion" not in server.names()


@pytest.mark.parametrize("fields, words", [
    ({"status": "Error", "error": "The title is in use"}, "The title is in use"),
    ({"status": "Pending"}, "status Pending"),
    ({"url": "https://www.kaggle.com/datasets/ann/other"}, "ann/other"),
])
def test_what_kaggle_refuses_in_a_dataset_is_exit_2_with_its_words(fields, words, server, wheels):
    ref = DATASETS["wheels"]
    known = {"ref": ref, "url": f"https://www.kaggle.com/datasets/{ref}", "status": "Ok"}
    server.answers["CreateDatasetVersion"] = make(ApiCreateDatasetResponse, **(known | fields))
    assert words in read_error(server, "push", "wheels", "--source", str(wheels), "--send", sent=True)


@pytest.mark.parametrize("there", [True, False])
def test_nothing_is_published_when_an_upload_failed(there, server, wheels):
    server.failed_uploads = 1
    if not there:
        del server.datasets[DATASETS["wheels"]]
    assert "1 of 3 uploads failed" in read_error(server, "push", "wheels", "--source", str(wheels), "--send")


# Weights of any name


def files(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"tensors")
    return folder


@pytest.mark.parametrize("names", [
    ["dinov3_vith16plus_pretrain_lvd1689m-7c1da9a5.pth"],
    ["hf/config.json", "hf/model.safetensors", ".cache/huggingface/x.bin"],
    ["model.safetensors.index.json", *(f"model-0000{k}-of-00002.safetensors" for k in (1, 2))],
])
@pytest.mark.parametrize("as_file", [False, True])
def test_weights_of_any_name_are_sent_in_their_folders(names, as_file, server, tmp_path):
    source = files(tmp_path / "mine", *names)
    weights = [n for n in names if n.endswith(hub.WEIGHT_SUFFIXES) and not n.startswith(".")]
    if as_file and len(weights) > 1:
        return
    code, out, _ = call("push", "dinov3-weights", "--source", str(source / weights[0] if as_file else source))
    sent = [Path(weights[0]).name] if as_file else [n for n in names if not n.startswith(".")]
    staged = tmp_path / "build/kaggle/dinov3-weights"
    assert code == 0 and sorted(str(p.relative_to(staged)) for p in hub.list_files(staged)) == sorted(
        [*sent, "dataset-metadata.json"]
    )
    assert f"train_dinov3.weights={Path(weights[0]).name}" in out  # the kernels' settings name another file


def test_weights_with_the_name_in_the_settings_need_no_warning(server, tmp_path):
    source = files(tmp_path / "mine", SETTINGS.train_dinov3.weights)
    assert "warning" not in call("push", "dinov3-weights", "--source", str(source))[1]


@pytest.mark.parametrize("name, file", [
    ("dinov3-weights", SETTINGS.train_dinov3.weights),
    ("siglip-weights", f"{SETTINGS.siglip.weights}/preprocessor_config.json"),
])
def test_downloaded_weights_are_found_where_make_weights_puts_them(name, file, server, tmp_path):
    files(tmp_path / "weights", file)
    code, out, _ = call("push", name)
    assert code == 0 and Path(file).name in out and "warning" not in out


@pytest.mark.parametrize("names, words", [
    (["a.safetensors", "b.pth"], "2 weights files (a.safetensors, b.pth)"), ([], "no .safetensors"),
    (["model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"], "2 of 3 shards"),
])
def test_weights_that_are_not_clear_are_refused(names, words, server, tmp_path):
    assert words in read_error(
        server, "push", "dinov3-weights", "--source", str(files(tmp_path / "mine", *names))
    )


def test_a_folder_behind_a_link_is_zipped_with_its_files(server, tmp_path):
    files(tmp_path / "elsewhere", "model.safetensors", "config.json")
    (tmp_path / "mine/hf").mkdir(parents=True)
    (tmp_path / "mine/hf/deep").symlink_to(tmp_path / "elsewhere")
    sizes = {}
    real = server.upload

    def upload(client, path, url, quiet, resume=False):
        sizes[Path(path).name] = sorted(zipfile.ZipFile(path).namelist())
        return real(client, path, url, quiet, resume)

    KaggleApi.upload_complete.side_effect = upload
    new_version(server, DATASETS["dinov3-weights"], ["READY"])
    assert call("push", "dinov3-weights", "--source", str(tmp_path / "mine"), "--send")[0] == 0
    assert sizes == {"hf.zip": ["deep/config.json", "deep/model.safetensors"]}


# Submissions and data


def test_a_submission_that_was_sent_becomes_an_entry_of_the_ledger(server, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    assert "no ledger.jsonl" in read_error(server, "submit", "--version", "3", "--run", str(run))
    (run / "submission.csv").write_text("sample_id,target\n")
    entry = add_facts(run / "ledger.jsonl", "entry", sha256=hash_submission(run / "submission.csv"))
    server.runs[KERNELS["submit"], 3] = ["COMPLETE"]
    words = ["submit", "--version", "3", "--message", "the first", "--run", str(run)]
    assert call(*words)[0] == 0 and not server.requests and not (tmp_path / "ledger.jsonl").exists()
    code, out, _ = call(*words, "--send")
    line = read_ledger(tmp_path / "ledger.jsonl")[entry]
    assert code == 0 and "Successfully submitted" in out
    assert server.last("CreateCodeSubmission").kernel_version == 3
    assert (line["message"], line["reference"]) == ("the first", "77")
    assert line["kernel"] == f"{KERNELS['submit']}/3"


@pytest.mark.parametrize(
    "states, words", [(["RUNNING"], "running"), (["ERROR"], "it ran out of memory"), (None, "missing")]
)
def test_a_version_that_is_not_complete_is_not_submitted(states, words, server):
    if states:
        server.runs[KERNELS["submit"], 3] = states
    assert words in read_error(server, "submit", "--version", "3", "--send")


def test_a_submission_that_kaggle_refuses_is_exit_2(server):
    server.runs[KERNELS["submit"], 3] = ["COMPLETE"]
    server.answers["CreateCodeSubmission"] = http_error(400, "You have reached the daily limit")
    assert "You have reached the daily limit" in read_error(
        server, "submit", "--version", "3", "--send", sent=True
    )


def download_with(monkeypatch, names: list[str], error: Exception | None = None) -> None:
    "Let the client's download write an archive with `names`, or raise."
    def download(client, competition, path=None, force=False, quiet=True):
        if error:
            raise error
        Path(path).mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(Path(path, f"{competition}.zip"), "w") as archive:
            for name in names:
                archive.writestr(name, "x")

    real = KaggleApi.competition_download_files
    monkeypatch.setattr(KaggleApi, "competition_download_files", create_autospec(real, side_effect=download))


TABLES = ["train.csv", "test.csv", "sample_submission.csv", "train/a.jpg"]


def test_the_data_is_unpacked(server, monkeypatch, tmp_path):
    download_with(monkeypatch, [*TABLES, "test/b.jpg"])
    assert call("data", "--to", "here")[0] == 0
    names = {"sample_submission.csv", "test", "test.csv", "train", "train.csv"}
    assert {p.name for p in (tmp_path / "here").iterdir()} == names


@pytest.mark.parametrize("names, error, words", [
    (TABLES, None, "test is missing"),
    ([], http_error(403, "You must accept this competition's rules"), "accept this competition's rules"),
    ([], requests.ConnectionError("no route"), "no answer from kaggle.com"),
])
def test_data_that_does_not_arrive_is_exit_2(names, error, words, server, monkeypatch):
    download_with(monkeypatch, names, error)
    assert words in read_error(server, "data", "--to", "here")


def test_an_archive_that_is_none_is_exit_2(server, monkeypatch, tmp_path):
    download_with(monkeypatch, TABLES)
    monkeypatch.setattr(
        zipfile, "ZipFile", create_autospec(zipfile.ZipFile, side_effect=zipfile.BadZipFile("half"))
    )
    monkeypatch.setattr(KaggleApi, "competition_download_files", lambda *a, **k: None)
    assert "cannot be unpacked" in read_error(server, "data", "--to", "here")
