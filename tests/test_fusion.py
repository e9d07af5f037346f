"""Fusion: scans against oracles, Mamba against mamba_ssm and transformers, contracts of the mixers."""
import contextlib
import copy
import importlib
import re
import sys
import time
import types
import warnings
import weakref
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import fusion as scan_bench
from nbs_lib import fusion
from nbs_lib.biomass_net import ModelConfig, build_model
from nbs_lib.fusion import (
    BLOCK_NUMBERS,
    BiMambaMixer,
    Mamba,
    blocked_scan,
    build_fusion,
    chunked_scan,
    selective_scan,
    sequential_scan,
    to_map,
    to_tokens,
)

NAMES = ("gated_conv", "film", "attention", "mamba", "none")
ALL_EXTRAS = ("D", "z", "delta_bias", "softplus")


def oracle(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    """Compute the recurrence number by number in numpy float64; shares no code with the library."""
    u, delta, A, B, C = (np.asarray(t.detach().double()) for t in (u, delta, A, B, C))
    if delta_bias is not None:
        delta = delta + np.asarray(delta_bias.detach().double())[None, :, None]
    if delta_softplus:
        delta = np.logaddexp(0, delta)
    y = np.zeros(u.shape)
    for b, d in np.ndindex(u.shape[:2]):
        x = np.zeros(A.shape[1])
        for t in range(u.shape[2]):
            x = np.exp(delta[b, d, t] * A[d]) * x + delta[b, d, t] * u[b, d, t] * B[b, :, t]
            y[b, d, t] = (C[b, :, t] * x).sum()
    if D is not None:
        y += np.asarray(D.detach().double())[None, :, None] * u
    if z is not None:
        z = np.asarray(z.detach().double())
        y *= z / (1 + np.exp(-z))
    return torch.from_numpy(y)


def inputs(batch, dim, length, state, extras=(), seed=0, dtype=torch.float32):
    """Arguments of `selective_scan` by name; step sizes are raw with softplus, positive without."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    delta = rand(batch, dim, length)
    args = {"u": rand(batch, dim, length), "delta": delta if "softplus" in extras else F.softplus(delta - 2),
            "A": -rand(dim, state).exp(), "B": rand(batch, state, length), "C": rand(batch, state, length)}
    for name, shape in (("D", (dim,)), ("z", (batch, dim, length)), ("delta_bias", (dim,))):
        if name in extras:
            args[name] = rand(*shape)
    if "delta_bias" in extras and "softplus" not in extras:  # negative steps would make the state grow
        args["delta_bias"] = args["delta_bias"].abs()
    return args


def flags(extras):
    return {"delta_softplus": "softplus" in extras}


def off(got, want):
    """Largest difference relative to the largest wanted value."""
    difference = (got.detach().double() - want.detach().double()).abs().max()
    return float(difference / want.detach().abs().max().clamp(min=1e-12))


def with_grads(run, args, **kw):
    """Return the output, and the gradient of a random projection of it with respect to every argument."""
    args = {k: v.detach().clone().requires_grad_() for k, v in args.items()}
    y = run(**args, **kw)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(y.dtype)
    return {"y": y, **dict(zip(args, torch.autograd.grad(y, list(args.values()), dy)))}


def beyond(got, want, tolerance):
    """Return the entries of `with_grads` that differ by more than `tolerance`."""
    assert got.keys() == want.keys()
    return {k: o for k in want if (o := off(got[k], want[k])) > tolerance}


def double(args):
    return {k: v.double() for k, v in args.items()}


EXTRAS = st.sets(st.sampled_from(ALL_EXTRAS))
SIZES = {"batch": st.integers(1, 3), "dim": st.integers(1, 5), "length": st.integers(1, 40),
         "state": st.integers(1, 5), "extras": EXTRAS, "steps": st.integers(1, 12),
         "numbers": st.integers(1, 900), "seed": st.integers(0, 10**6)}


def fast_scans(steps, numbers):
    return partial(chunked_scan, steps=steps), partial(blocked_scan, steps=steps, numbers=numbers)


@given(**SIZES)
@settings(max_examples=40, deadline=None)
def test_scans_equal_the_recurrence(batch, dim, length, state, extras, steps, numbers, seed):
    args = inputs(batch, dim, length, state, extras, seed)
    want = oracle(**args, **flags(extras))
    for scan in (sequential_scan, *fast_scans(steps, numbers), blocked_scan, None):
        assert off(selective_scan(**args, **flags(extras), scan=scan), want) < 1e-4


@given(**SIZES)
@settings(max_examples=25, deadline=None)
def test_float32_gradients_equal_autograd_in_float64(batch, dim, length, state, extras, steps, numbers, seed):
    args = inputs(batch, dim, length, state, extras, seed)
    want = with_grads(selective_scan, double(args), **flags(extras), scan=sequential_scan)
    for scan in fast_scans(steps, numbers):
        assert beyond(with_grads(selective_scan, args, **flags(extras), scan=scan), want, 1e-4) == {}


@pytest.mark.parametrize("length,steps", [(1, 4), (4, 4), (5, 2), (7, 3)])
@pytest.mark.parametrize("scan", [chunked_scan, blocked_scan, partial(blocked_scan, numbers=40)])
def test_backward_equals_finite_differences(scan, length, steps):
    args = inputs(2, 3, length, 2, dtype=torch.float64)
    first = [t.transpose(1, 2).contiguous().requires_grad_() for t in (args["delta"], args["u"])]
    rest = [args[k].transpose(-1, -2).contiguous().requires_grad_() for k in "ABC"]
    assert torch.autograd.gradcheck(lambda *a: scan(*a, steps=steps), (*first, *rest))


@pytest.mark.parametrize("length,dim,state", [(1, 3, 4), (1023, 64, 16), (4096, 40, 8), (333, 512, 16)])
def test_default_chunk_length(length, dim, state):
    args = inputs(1, dim, length, state, ALL_EXTRAS, seed=length)
    assert length == 1 or fusion.CACHE_NUMBERS < length * dim * state  # several chunks
    want = with_grads(selective_scan, double(args), delta_softplus=True)
    assert beyond(with_grads(selective_scan, args, delta_softplus=True), want, 1e-4) == {}


@pytest.mark.parametrize("batch,dim,length,extras,numbers", [
    (1, 8, 1100, ALL_EXTRAS, BLOCK_NUMBERS), (1, 8, 1100, ("delta_bias",), 250 * 8 * 16),
    (2, 8, 1000, ("z", "softplus"), 1), (3, 5, 2, ("D",), BLOCK_NUMBERS), (1, 6, 1025, (), BLOCK_NUMBERS)])
def test_blocks_equal_the_sequential_scan_to_1e5(batch, dim, length, extras, numbers):
    """Output and all gradients: to rounding in float64, to 1e-5 in float32; in one segment or several."""
    args = inputs(batch, dim, length, 16, extras, seed=length)
    scan = partial(blocked_scan, numbers=numbers)
    want = with_grads(selective_scan, double(args), **flags(extras), scan=sequential_scan)
    assert beyond(with_grads(selective_scan, double(args), **flags(extras), scan=scan), want, 1e-12) == {}
    assert beyond(with_grads(selective_scan, args, **flags(extras), scan=scan), want, 1e-5) == {}


@pytest.mark.parametrize("scan", [chunked_scan, blocked_scan])
def test_long_sequences_neither_overflow_nor_forget(scan):
    """Rates from hardly decaying to gone in one step; with the former an early input lasts to the end."""
    length = 10_000
    args = inputs(1, 3, length, 2, seed=3)
    args["A"] = torch.tensor([[-1e-7, -1e-7], [-1.0, -50.0], [-1e4, -1e3]])
    args["delta"] = args["delta"].clamp(max=3)
    args["u"][:, 0] = 0
    args["u"][:, 0, 5], args["B"][:, :, 5], args["C"][:, :, -1] = 1.0, 1.0, 1.0
    got = with_grads(selective_scan, args, scan=scan)
    assert all(v.isfinite().all() for v in got.values())
    assert float(got["y"].detach()[0, 0, -1]) == pytest.approx(2 * float(args["delta"][0, 0, 5]), rel=1e-2)
    want = with_grads(selective_scan, double(args))
    assert off(got["y"], want["y"]) < 1e-4
    assert beyond(got, want, 1e-3) == {}  # float32 sums of 10,000 terms that cancel


@pytest.mark.parametrize("scan", [chunked_scan, blocked_scan])
def test_growing_states_are_scanned_as_defined(scan):
    args = inputs(1, 2, 60, 2)
    args["A"] = -args["A"] * .05
    assert off(selective_scan(**args, scan=scan), oracle(**args)) < 1e-4


@pytest.mark.parametrize("scan", [chunked_scan, blocked_scan])
def test_scan_is_causal(scan):
    args = inputs(1, 4, 50, 3)
    before = selective_scan(**args, scan=scan)
    for name in ("u", "delta", "B", "C"):
        args[name] = args[name].clone()
        args[name][..., 30:] += 1
    after = selective_scan(**args, scan=scan)
    assert torch.equal(before[..., :30], after[..., :30])
    assert not torch.allclose(before[..., 30:], after[..., 30:])


@pytest.mark.parametrize("name,change", [
    ("delta", lambda t: t[:, :1]), ("A", lambda t: t[:2]), ("B", lambda t: t[..., 1:]),
    ("C", lambda t: t[:, :1]), ("u", lambda t: t[0]), ("A", lambda t: t.to(torch.complex64))])
def test_wrong_shapes_raise_by_name(name, change):
    args = inputs(2, 3, 5, 4)
    args[name] = change(args[name])
    with pytest.raises(ValueError, match="selective_scan") as e:
        selective_scan(**args)
    assert "\n" not in str(e.value) and re.search(rf"\b{name}\b", str(e.value))


def test_no_tokens_raise():
    with pytest.raises(ValueError, match="L = 0"):
        selective_scan(**inputs(1, 3, 0, 4))


@pytest.mark.parametrize("scan", [chunked_scan, blocked_scan])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_state_is_float32_under_autocast(half, scan):
    seen = {}

    def spy(*args):
        seen["dtypes"] = {t.dtype for t in args}
        return scan(*args)

    args = inputs(2, 8, 300, 4)
    with torch.autocast("cpu", dtype=half):
        got = selective_scan(**args, scan=spy)
    assert seen["dtypes"] == {torch.float32} and off(got, oracle(**args)) < 1e-4
    low = {k: v.to(half) for k, v in args.items()}
    out = selective_scan(**low, scan=spy)
    assert seen["dtypes"] == {torch.float32} and out.dtype == half
    assert off(out, oracle(**low)) < 2e-2  # rounded once, at the end


@pytest.mark.parametrize("scan", [chunked_scan, blocked_scan])
def test_backward_is_float32_under_autocast(scan):
    args = inputs(1, 6, 64, 4)
    plain = with_grads(selective_scan, args, scan=scan)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = with_grads(selective_scan, args, scan=scan)
    assert beyond(cast, plain, 1e-5) == {}


# The blocked scan: launches and memory, counted on the CPU.

class Meter(TorchDispatchMode):
    """Count calls that compute (kernel launches on a GPU), all calls, and live bytes at their peak."""

    def __init__(self):
        super().__init__()
        self.launches = self.calls = self.now = self.peak = 0
        self.live = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.namespace == "aten":
            self.calls, self.launches = self.calls + 1, self.launches + (not func.is_view)
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor) and (key := t.untyped_storage()._cdata) not in self.live:
                size = t.untyped_storage().nbytes()
                self.live.add(key)
                weakref.finalize(t.untyped_storage(), self.release, key, size)
                self.now += size
                self.peak = max(self.peak, self.now)
        return out

    def release(self, key, size):
        self.live.discard(key)
        self.now -= size


def test_chunked_scan_runs_in_the_memory_of_a_chunk():
    """Forward and backward keep less alive than one tensor (B, L, N, D), inputs included."""
    args = [t.requires_grad_() for t in inputs(1, 64, 4096, 16).values()]
    with Meter() as meter:
        selective_scan(*args, scan=chunked_scan).sum().backward()
    assert meter.peak < 4 * 64 * 4096 * 16, f"{meter.peak / 1e6:.0f} MB"


PHOTO = (1, 512, 4224, 16)  # B, D, L, N: one photo at 768 pixels through ViT-H+, mixers of 512 channels


def test_a_scan_of_4224_tokens_launches_few_kernels():
    """All dispatched calls, views included, stay below 700 forward and 1,500 forward + backward."""
    with FakeTensorMode():
        args = [t.requires_grad_() for t in inputs(*PHOTO, ALL_EXTRAS).values()]
        with Meter() as meter:
            y = selective_scan(*args, delta_softplus=True, scan=blocked_scan)
            forward, _ = (meter.launches, meter.calls), y.sum().backward()
    print(f"forward {forward[0]} launches, {forward[1]} calls; with backward {meter.launches}, {meter.calls}")
    assert forward[1] <= 700 and meter.calls <= 1500


def test_two_bidirectional_mixers_launch_few_kernels(monkeypatch):
    """Four scans at D = 512: at most 700 launches forward, 1,500 with backward (chunked scan: 59,208)."""
    monkeypatch.setattr(fusion, "chunked_scan", blocked_scan)  # what a CPU runs
    with FakeTensorMode():
        mixer, tokens = build_fusion("mamba", dim=512, depth=2), torch.randn(1, 4224, 512, requires_grad=True)
        with Meter() as meter:
            y = mixer(tokens)
            forward, _ = meter.launches, y.sum().backward()
    print(f"forward {forward} launches, with backward {meter.launches}")
    assert y.shape == (1, 4224, 512) and forward <= 700 and meter.launches <= 1500


@pytest.mark.parametrize("numbers", [BLOCK_NUMBERS, 300 * 16 * 128, 1])
def test_blocked_scan_keeps_to_its_memory_formula(numbers):
    """Live bytes follow the docstring; the meter adds the inputs, two tensors of L·D, three in backward."""
    dim, length, state, steps, padded = 128, 1080, 16, 16, 1088  # T = √L / 2
    segment = min(padded, steps * max(1, numbers // (dim * state * steps)))
    work, tokens = 4 * segment * dim * state, 4 * padded * dim
    args = (t.transpose(-1, -2).contiguous().requires_grad_() for t in inputs(1, dim, length, state).values())
    u, delta, A, B, C = args
    kept = []
    keep = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with keep, Meter() as forward:
        y = blocked_scan(delta, u, A, B, C, numbers=numbers)
    dy = torch.ones_like(y)
    with Meter() as backward:
        y.backward(dy)
    print(f"{segment} steps, bytes: forward {forward.peak:,}, backward {backward.peak:,}, work {work:,}")
    starts = padded // steps * state * dim
    assert 2 * work <= forward.peak <= 2 * work + 4 * starts + (8 + 2) * tokens
    assert 3 * work <= backward.peak <= 3 * work + (12 + 3) * tokens
    assert sum(t.numel() for t in kept) == 2 * length * (dim + state) + state * dim + starts


# Which scan runs where, and the kernel of mamba_ssm.

@contextlib.contextmanager
def fake_gpu(monkeypatch, kernel=None):
    """Tensors are fake and on a GPU; `kernel` is the outcome of the search for that of mamba_ssm."""
    monkeypatch.setattr(fusion, "fused_scan", lambda device: kernel)
    with FakeTensorMode(), torch.device("cuda"):
        yield


@pytest.mark.parametrize("device,dtype,kernel,want", [
    ("cpu", torch.float32, True, "chunked"), ("cuda", torch.float32, False, "blocked"),
    ("cuda", torch.float16, False, "blocked"), ("cuda", torch.float16, True, "fused"),
    ("cuda", torch.float64, True, "blocked")])
def test_device_chooses_the_scan(monkeypatch, device, dtype, kernel, want):
    ran = []
    for name, scan in {"chunked": chunked_scan, "blocked": blocked_scan}.items():
        spy = lambda *a, name=name, scan=scan: ran.append(name) or scan(*a)  # noqa: E731
        monkeypatch.setattr(fusion, f"{name}_scan", spy)
    fused = (lambda u, *rest: ran.append("fused") or u) if kernel else None
    with fake_gpu(monkeypatch, fused):
        args = {k: v.to(device, dtype) for k, v in inputs(1, 3, 9, 4).items()}
        out = selective_scan(**args)
    assert ran == [want] and out.dtype == dtype and out.device.type == device and out.shape == (1, 3, 9)


@pytest.fixture
def mamba_ssm(monkeypatch):
    """Return a function that installs a fake mamba_ssm with the given kernel; caches are cleared."""
    def install(kernel):
        module = types.ModuleType("mamba_ssm.ops.selective_scan_interface")
        module.selective_scan_fn = kernel
        for name in ("mamba_ssm", "mamba_ssm.ops"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        monkeypatch.setitem(sys.modules, module.__name__, module)

    def forget():
        fusion.fused_scan.cache_clear()
        fusion._warn_no_kernel.cache_clear()
    forget()
    yield install
    forget()


def test_a_kernel_that_works_is_tried_once_per_device(mamba_ssm, recwarn):
    tried = []

    def kernel(u, *args):
        tried.append(u.device.type)
        return selective_scan(u, *args, scan=sequential_scan)

    mamba_ssm(kernel)
    for _ in range(3):
        assert fusion.fused_scan(torch.device("cpu")) is kernel
    with FakeTensorMode():  # stands for a second device
        assert fusion.fused_scan(torch.device("cuda", 1)) is kernel
    assert tried == ["cpu", "cuda"] and not [w for w in recwarn if "selective_scan" in str(w.message)]


def raise_runtime_error(*args):
    raise RuntimeError("selective_scan_cuda is not available")


def return_nothing(*args):
    return None


@pytest.mark.parametrize("kernel", [raise_runtime_error, return_nothing])
def test_a_kernel_that_fails_at_its_first_call_is_replaced_with_one_warning(mamba_ssm, kernel):
    """The import of mamba_ssm's development version succeeds without its compiled part."""
    tried = []
    mamba_ssm(lambda *a: tried.append(1) or kernel(*a))
    with pytest.warns(UserWarning, match="fusion.selective_scan: .*blocked scan") as caught:
        for _ in range(3):
            assert fusion.fused_scan(torch.device("cpu")) is None
        with FakeTensorMode():
            assert fusion.fused_scan(torch.device("cuda", 0)) is None
    assert len(caught) == 1 and len(tried) == 2  # one warning, one trial per device


@pytest.mark.parametrize("fault", [ImportError("absent"), OSError("bad symbol"), RuntimeError("no driver")])
def test_a_kernel_that_cannot_be_imported_is_replaced_with_one_warning(mamba_ssm, monkeypatch, fault):
    def broken(name):
        raise fault

    monkeypatch.setattr(fusion.importlib, "import_module", broken)
    with pytest.warns(UserWarning, match="blocked scan") as caught:
        assert [fusion.fused_scan(torch.device(d)) for d in ("cpu", "meta", "cpu")] == [None] * 3
    assert len(caught) == 1 and str(fault) in str(caught[0].message)


def test_a_missing_package_is_replaced_with_one_warning(mamba_ssm, monkeypatch):
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    with pytest.warns(UserWarning, match="ModuleNotFoundError") as caught:
        assert [fusion.fused_scan(torch.device("cpu")) for _ in range(2)] == [None] * 2
    assert len(caught) == 1


def test_fused_kernel_gets_one_dtype_and_float32_parameters():
    def kernel(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
        assert {t.dtype for t in (u, delta, B, C, z)} == {torch.float16}
        assert {t.dtype for t in (A, D, delta_bias)} == {torch.float32}
        assert all(t.is_contiguous() for t in (u, delta, A, B, C, D, z, delta_bias))
        return selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, scan=sequential_scan)

    args = inputs(2, 3, 9, 4, ("D", "z", "delta_bias"))
    mixed = {k: v.half() if k in ("u", "A", "D") else v for k, v in args.items()}
    out = fusion._call_fused(kernel, **mixed, delta_softplus=True)
    assert off(out, oracle(**mixed, delta_softplus=True)) < 2e-2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("scan", [None, blocked_scan])
@pytest.mark.parametrize("length", [1, 37, 2048])
def test_cuda_equals_the_cpu(length, scan):
    args = inputs(2, 32, length, 16, ALL_EXTRAS)
    want = with_grads(selective_scan, double(args), delta_softplus=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # without mamba-ssm None is the blocked scan
        args = {k: v.cuda() for k, v in args.items()}
        got = with_grads(selective_scan, args, delta_softplus=True, scan=scan)
    assert beyond({k: v.cpu() for k, v in got.items()}, want, 1e-4) == {}


# The official reference, and blocks of other libraries.

@pytest.fixture(scope="module")
def official():
    """Return the modules of mamba-ssm, importable without CUDA when its compiled part has a stub."""
    compiled, names = "selective_scan_cuda", ("ops.selective_scan_interface", "modules.mamba_simple")
    stub = compiled not in sys.modules and importlib.util.find_spec(compiled) is None
    if stub:
        sys.modules[compiled] = types.ModuleType(compiled)
    try:
        yield tuple(importlib.import_module(f"mamba_ssm.{name}") for name in names)
    except ImportError as e:
        pytest.skip(f"no official reference ({e}); the numpy oracle and transformers' block are compared")
    finally:
        if stub:
            del sys.modules[compiled]


@pytest.mark.parametrize("seed,batch,dim,length,state,extras", [
    (0, 1, 5, 1, 3, ()), (1, 2, 7, 33, 5, ("D",)), (2, 3, 4, 64, 16, ("z", "softplus")),
    (3, 1, 16, 129, 8, ("delta_bias", "softplus")), (4, 2, 12, 257, 4, ALL_EXTRAS),
    (5, 1, 64, 600, 16, ALL_EXTRAS)])
def test_scan_equals_the_official_one(official, seed, batch, dim, length, state, extras):
    args = inputs(batch, dim, length, state, extras, seed)
    want = with_grads(official[0].selective_scan_ref, args, **flags(extras))
    for scan in (None, lambda *a: chunked_scan(*a, steps=10), blocked_scan):
        assert beyond(with_grads(selective_scan, args, **flags(extras), scan=scan), want, 1e-4) == {}


@pytest.mark.parametrize("dim,kw", [(24, {}), (48, {"d_state": 4, "d_conv": 3, "expand": 1})])
def test_block_equals_the_official_one(official, monkeypatch, dim, kw):
    interface, simple = official
    monkeypatch.setattr(simple, "selective_scan_fn", interface.selective_scan_ref)
    monkeypatch.setattr(simple, "causal_conv1d_fn", None)
    torch.manual_seed(0)
    theirs, ours = simple.Mamba(dim, **kw), Mamba(dim, **kw)
    shapes = [{k: v.shape for k, v in block.state_dict().items()} for block in (theirs, ours)]
    assert shapes[0] == shapes[1]
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 45, dim)
    want, got = theirs(x), ours(x)
    want.square().sum().backward(), got.square().sum().backward()
    assert off(got, want) < 1e-4
    grads = {k: p.grad for k, p in ours.named_parameters()}
    assert {k for k, p in theirs.named_parameters() if off(grads[k], p.grad) > 1e-4} == set()


def test_block_equals_that_of_transformers(monkeypatch):
    """Always run: transformers has a sequential Mamba with the same parameter names."""
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)  # its torch form, not the kernels
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    torch.manual_seed(0)
    config = MambaConfig(hidden_size=24, state_size=8, conv_kernel=4, expand=2, use_bias=False,
                         use_conv_bias=True, time_step_rank=2)
    theirs, ours = MambaMixer(config, layer_idx=0), Mamba(24, d_state=8, d_conv=4, expand=2)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 37, 24)
    want, got = theirs.eval()(x), ours(x)
    want.square().sum().backward(), got.square().sum().backward()
    assert off(got, want) < 1e-4
    grads = dict(theirs.named_parameters())
    assert {k: o for k, p in ours.named_parameters() if (o := off(p.grad, grads[k].grad)) > 1e-4} == {}


def test_initial_step_sizes_fill_their_range():
    dt = F.softplus(Mamba(256, dt_range=(1e-3, 1e-1)).dt_proj.bias)
    assert 9e-4 < dt.min() and dt.max() < .11 and dt.log10().std() > .4


# Orders and mixers.

@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.sampled_from(sorted(fusion.ORDERS)))
@settings(max_examples=30, deadline=None)
def test_to_map_inverts_to_tokens(batch, height, width, order):
    left, right = torch.randn(2, batch, height, width, 3)
    tokens = to_tokens(left, right, order)
    assert tokens.shape == (batch, 2 * height * width, 3)
    assert torch.equal(to_map(tokens, height, order), torch.cat([left, right], dim=2))


def test_unknown_orders_and_wrong_heights_raise():
    with pytest.raises(ValueError, match="fusion.order: .*zigzag"):
        to_tokens(torch.zeros(1, 2, 2, 1), torch.zeros(1, 2, 2, 1), "zigzag")
    for tokens, height in ((13, 2), (8, 0), (6, 2)):
        with pytest.raises(ValueError, match="do not fill"):
            to_map(torch.zeros(1, tokens, 1), height)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch,tokens", [(1, 1), (2, 7), (3, 130)])
def test_mixers_keep_the_shape_and_train_every_parameter(name, batch, tokens):
    torch.manual_seed(0)
    mixer = build_fusion(name, 32, dropout=0.0)
    x = torch.randn(batch, tokens, 32, requires_grad=True)
    out = mixer(x)
    assert out.shape == x.shape
    out.square().sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0
    missing = [k for k, p in mixer.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert missing == []


@pytest.mark.parametrize("name", NAMES[:-1])
def test_mixers_keep_photos_separate(name):
    """No token of one photograph depends on another photograph, in training or not."""
    torch.manual_seed(0)
    mixer, x = build_fusion(name, 16, dropout=0.0), torch.randn(3, 20, 16)
    assert torch.allclose(mixer(x)[1], mixer(x[1:2])[0], atol=1e-6)


@pytest.mark.parametrize("name", ("film", "attention"))
def test_mixers_without_positions_are_equivariant(name):
    torch.manual_seed(0)
    mixer, x, perm = build_fusion(name, 16, dropout=0.0), torch.randn(2, 20, 16), torch.randperm(20)
    torch.nn.init.normal_(next(p for p in reversed(list(mixer.parameters())) if p.dim() == 2), std=.1)
    assert torch.allclose(mixer(x)[:, perm], mixer(x[:, perm]), atol=1e-5)


@pytest.mark.parametrize("name", NAMES[:-1])
def test_mixers_carry_information_between_halves(name):
    """Each mixer fits a target that only the other half contains (FiLM by the mean); the identity cannot."""
    def loss_after(name, steps=60):
        torch.manual_seed(0)
        model = torch.nn.Sequential(build_fusion(name, 16, dropout=0.0), torch.nn.Linear(16, 1))
        left, right = torch.randn(2, 8, 4, 4, 16)
        right = right * .1 + torch.randn(8, 1, 1, 16)
        x, goal = to_tokens(left, right), right[:, :, 0, 0]
        opt = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(steps):
            seam = to_map(model(x), 4)[:, :, 3, 0]  # the left half's last column
            loss = F.mse_loss(seam, goal)
            opt.zero_grad(), loss.backward(), opt.step()
        return loss.item()

    assert loss_after(name) < .5 * loss_after("none")


def test_depth_and_options_reach_the_blocks():
    assert len(build_fusion("gated_conv", 8, depth=3, kernel=7)) == 3
    assert build_fusion("gated_conv", 8, kernel=7)[0].conv.kernel_size == (7,)
    assert build_fusion("mamba", 8, d_state=5)[0].mamba_reverse.A_log.shape == (8, 5)
    with pytest.raises(ValueError, match="fusion: .*local_mamba"):
        build_fusion("local_mamba", 8)
    with pytest.raises(ValueError, match="fusion.gated_conv: .*heads"):
        build_fusion("gated_conv", 8, heads=2)
    with pytest.raises(ValueError, match="divisor"):
        build_fusion("attention", 8, heads=3)


class MeanMixer(torch.nn.Module):
    """A mixer that a user could add: the mean token is added to every token."""

    def __init__(self, dim, dropout=0.1):
        super().__init__()
        self.proj = torch.nn.Linear(dim, dim)

    def forward(self, tokens):
        return tokens + self.proj(tokens.mean(1, keepdim=True))


def test_a_registered_mixer_is_built_by_name(monkeypatch):
    monkeypatch.setitem(fusion.FUSIONS, "mean", MeanMixer)
    assert build_fusion("mean", 16, depth=3, dropout=0.0)(torch.randn(2, 10, 16)).shape == (2, 10, 16)
    net = build_model(ModelConfig("test_convnext", fusion="mean", dim=16, layers=1, probe=False))
    assert isinstance(net.fusion[0], MeanMixer)
    assert net(torch.randn(1, 2, 3, 64, 64)).shape == (1, 3)
    with pytest.raises(ValueError, match="choose one of .*mean, none"):
        build_fusion("median", 16)


def test_mamba_may_be_narrower_than_the_backbone():
    """Two bidirectional mixers of 24 channels behind a backbone of more."""
    torch.manual_seed(0)
    net = build_model(ModelConfig("test_convnext", fusion="mamba", dim=24, layers=2, probe=False), "random")
    width = net.backbone.channels[-1]
    assert width > 24 and [m.mamba.in_proj.in_features for m in net.fusion] == [24, 24]
    parts = net(torch.randn(1, 2, 3, 64, 64), torch.zeros(1, 3))
    parts = parts[0] if isinstance(parts, tuple) else parts
    parts.sum().backward()
    assert net.projection[1].weight.shape == (24, width)
    assert all(p.grad is not None for p in net.fusion.parameters())


def test_checkpointing_changes_nothing():
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    one = BiMambaMixer(12, dropout=0.0)
    two = copy.deepcopy(one)
    x = torch.randn(2, 50, 12)
    a, b = one(x), checkpoint(two, x, use_reentrant=False)
    a.square().sum().backward(), b.square().sum().backward()
    assert torch.equal(a, b)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(one.parameters(), two.parameters()))


def test_bidirectional_mixer_reaches_both_ends():
    x = torch.randn(1, 40, 8, requires_grad=True)
    BiMambaMixer(8, dropout=0.0)(x)[0, 20].sum().backward()
    assert (x.grad[0].abs().sum(-1) > 0).all()


# Speed on a CPU, and the benchmark.

def speedup(scan, other, args, enough, rounds=12):
    """Ratio of the best processor times on one thread; a busy machine gets more rounds to reach `enough`."""
    best = {scan: float("inf"), other: float("inf")}
    for _ in range(rounds):
        for run in best:
            begin = time.process_time()
            with torch.no_grad():
                run(**args)
            best[run] = min(best[run], time.process_time() - begin)
        if best[other] > enough * best[scan]:
            break
    print(f"{best[scan]:.4f} s against {best[other]:.4f} s")
    return best[other] / best[scan]


def test_chunks_are_faster_than_single_steps():
    slow = partial(selective_scan, scan=sequential_scan)
    assert speedup(selective_scan, slow, inputs(1, 64, 1024, 16), 2) > 2


def test_cpu_forward_is_many_times_faster_than_the_official_reference(official):
    """13 times on an idle machine, which the benchmark records; 7 leaves room for a busy one."""
    assert speedup(selective_scan, official[0].selective_scan_ref, inputs(1, 512, 2048, 16), 7) > 7


@pytest.mark.slow
def test_a_benchmark_row_of_a_missing_package_has_a_note(monkeypatch):
    monkeypatch.setitem(scan_bench.SCAN_IMPLEMENTATIONS, "absent", ("scan", None))  # in this process only
    row = scan_bench._measure_in_process(("absent", 8, 1, 4, 2, False, 1, 1.0), 300.0)
    assert row["seconds"] is None and "absent" in row["note"] and "\n" not in row["note"]


def test_a_benchmark_row_that_takes_too_long_has_a_note():
    rows = scan_bench.bench_scan(lengths=(8,), names=("chunked",), inner=4, limit=.01)
    assert [r["direction"] for r in rows] == ["forward", "forward + backward"]
    assert all(r["seconds"] is None and r["note"] == "stopped after 0.01 s" for r in rows)
