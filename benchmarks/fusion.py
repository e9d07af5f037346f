"""Measure our selective scan and Mamba block against other implementations, on the same shapes."""

import importlib
import itertools
import json
import math
import os
import subprocess
import sys
import time
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbs_lib.fusion import Mamba, selective_scan, sequential_scan
from nbs_lib.runtime import peak_memory


def _load_official_scan(inner: int, state: int) -> Callable:
    "Import `mamba_ssm`'s reference; without CUDA a stub replaces its compiled module (use a new process)."
    try:
        return importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_ref
    except ModuleNotFoundError as e:
        if e.name != "selective_scan_cuda":
            raise
        sys.modules["selective_scan_cuda"] = types.ModuleType("selective_scan_cuda")
        return _load_official_scan(inner, state)


def _load_mambapy_scan(inner: int, state: int) -> Callable:
    "Wrap the parallel scan of `mambapy` as its own block calls it."
    pscan = importlib.import_module("mambapy.pscan").pscan

    def scan(u, delta, A, B, C):
        u, delta, B, C = (t.transpose(1, 2) for t in (u, delta, B, C))
        decay = torch.exp(delta[..., None] * A)                                   # (B, L, D, N)
        states = pscan(decay, delta[..., None] * B[:, :, None] * u[..., None])
        return (states @ C[..., None]).squeeze(-1).transpose(1, 2)

    return scan


def _load_transformers_block(inner: int, state: int) -> nn.Module:
    "Build the block of `transformers` in its torch form, with the inner width of ours."
    sys.modules["mamba_ssm"] = None  # else its CUDA kernels are used
    module = importlib.import_module("transformers.models.mamba.modeling_mamba")
    config = module.MambaConfig(hidden_size=inner // 2, state_size=state,
                                time_step_rank=math.ceil(inner / 32), use_bias=False)
    return module.MambaMixer(config, layer_idx=0).eval()


INSTALL_COMMANDS = {  # by module
    "mamba_ssm": "MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE "
                 "pip install --no-build-isolation --no-deps mamba-ssm",
    "einops": "pip install einops",
    "mambapy": "pip install mambapy",
}
SCAN_IMPLEMENTATIONS = {  # name: (kind, function of D and N that prepares the call)
    "chunked": ("scan", lambda inner, state: selective_scan),
    "sequential": ("scan", lambda inner, state: partial(selective_scan, scan=sequential_scan)),
    "mamba_ssm reference": ("scan", _load_official_scan),
    "mambapy pscan": ("scan", _load_mambapy_scan),
    "Mamba": ("block", lambda inner, state: Mamba(inner // 2, d_state=state).eval()),
    "transformers MambaMixer": ("block", _load_transformers_block),
}


def _scan_arguments(kind: str, length: int, batch: int, inner: int, state: int) -> list[Tensor]:
    "Draw random tokens for a block, or u, delta, A, B and C for a scan."
    if kind == "block":
        return [torch.randn(batch, length, inner // 2)]
    u, delta = torch.randn(2, batch, inner, length)
    B, C = torch.randn(2, batch, state, length)
    A = -torch.arange(1.0, state + 1).repeat(inner, 1)
    return [u, F.softplus(delta - 3), A, B, C]


def _time_call(scan: Callable, args: list[Tensor], backward: bool) -> float:
    "Measure the seconds of one call, with or without the backward pass."
    args = [t.requires_grad_(backward) for t in args]
    start = time.perf_counter()
    with torch.set_grad_enabled(backward):
        out = scan(*args)
    if backward:
        out.sum().backward()
    return time.perf_counter() - start


def _measure_scan(name: str, length: int, batch: int, inner: int, state: int,
                  backward: bool, repeats: int, seconds: float) -> dict:
    "Measure the best time of several calls, and by how many MB the first raises this process's peak memory."
    torch.manual_seed(0)
    kind, make = SCAN_IMPLEMENTATIONS[name]
    scan = make(inner, state)
    _time_call(scan, _scan_arguments(kind, 4, batch, inner, state), backward)     # warm-up
    args, before = _scan_arguments(kind, length, batch, inner, state), peak_memory()
    times, raised = [_time_call(scan, args, backward)], round((peak_memory() - before) / 2**20, 1)
    while len(times) < repeats and sum(times) < seconds:
        times.append(_time_call(scan, args, backward))
    return {"threads": torch.get_num_threads(), "seconds": min(times), "peak_mb": raised, "calls": len(times)}


DIRECTIONS = ("forward", "forward + backward")


def bench_scan(
    lengths: tuple[int, ...] = (1024, 4096),
    names: tuple[str, ...] = tuple(SCAN_IMPLEMENTATIONS),
    batch: int = 1,
    inner: int = 512,  # D of the scan; a block has inner / 2 channels
    state: int = 16,  # N
    repeats: int = 7,  # calls, of which the best counts
    seconds: float = 30.0,  # after which no further call starts
    limit: float = 150.0,  # seconds for a row, after which its process is stopped
    directions: tuple[str, ...] = DIRECTIONS,
) -> list[dict]:  # kind, name, length, direction, threads, seconds, peak_mb, note
    "Time each implementation in its own process; without its package a row has None for numbers and a note."
    unknown = [n for n in names if n not in SCAN_IMPLEMENTATIONS]
    if unknown:
        raise ValueError(f"fusion.bench_scan: unknown implementation ({', '.join(unknown)}); "
                         f"choose from {', '.join(SCAN_IMPLEMENTATIONS)}")
    rows = []
    for length, direction, name in itertools.product(lengths, directions, names):
        args = name, length, batch, inner, state, direction == DIRECTIONS[1], repeats, seconds
        row = dict(kind=SCAN_IMPLEMENTATIONS[name][0], name=name, length=length, direction=direction)
        rows.append(row | _measure_in_process(args, limit))
    return rows


def _measure_in_process(args: tuple, limit: float) -> dict:
    "Run `_measure_scan` in a new interpreter, which keeps its peak memory and stubs to itself."
    code = f"import json, benchmarks.fusion as f; print(json.dumps(f._measure_scan(*{args!r})))"
    root = str(Path(__file__).resolve().parent.parent)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    failed = {"threads": None, "seconds": None, "peak_mb": None}
    try:
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True,
                              check=False, timeout=limit, env=env)
    except subprocess.TimeoutExpired:
        return failed | {"note": f"stopped after {limit:g} s"}
    if done.returncode:
        last = (done.stderr.strip() or f"ended with code {done.returncode}").splitlines()[-1]
        missing = (how for module, how in INSTALL_COMMANDS.items() if f"No module named '{module}" in last)
        return failed | {"note": next((f"not installed: {how}" for how in missing), last)}
    row = json.loads(done.stdout.splitlines()[-1])
    return row | {"note": f"best of {row.pop('calls')}"}
