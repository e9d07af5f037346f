"""Fusion: the scan against oracles of other hands, the block against mamba_ssm's and transformers', the mixers by their promises."""
import copy
import importlib
import subprocess
import sys
import time
import types
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nbs_lib import fusion
from nbs_lib.fusion import BiMambaMixer, Mamba, build_fusion, chunked_scan, selective_scan, sequential_scan, to_map, to_tokens

NAMES = ("gated_conv", "film", "attention", "mamba", "none")


def oracle(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    """The recurrence number by number in numpy float64, sharing no code with the library."""
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
    """Arguments of `selective_scan` by name; raw step sizes where the softplus is asked for, positive ones where it is not."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    delta = rand(batch, dim, length)
    args = {"u": rand(batch, dim, length), "delta": delta if "softplus" in extras else F.softplus(delta - 2),
            "A": -rand(dim, state).exp(), "B": rand(batch, state, length), "C": rand(batch, state, length)}
    for name, shape in (("D", (dim,)), ("z", (batch, dim, length)), ("delta_bias", (dim,))):
        if name in extras:
            args[name] = rand(*shape)
    if "delta_bias" in extras and "softplus" not in extras:                        # a negative step would be a memory that explodes
        args["delta_bias"] = args["delta_bias"].abs()
    return args


def flags(extras):
    return {"delta_softplus": "softplus" in extras}


def off(got, want):
    """Largest difference relative to the largest value wanted."""
    return float((got.detach().double() - want.detach().double()).abs().max() / want.detach().abs().max().clamp(min=1e-12))


def with_grads(run, args, **kw):
    """Output and the gradient of a fixed random projection of it with respect to every argument."""
    args = {k: v.detach().clone().requires_grad_() for k, v in args.items()}
    y = run(**args, **kw)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(y.dtype)
    return {"y": y, **dict(zip(args, torch.autograd.grad(y, list(args.values()), dy)))}


EXTRAS = st.sets(st.sampled_from(("D", "z", "delta_bias", "softplus")))


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 40), st.integers(1, 5), EXTRAS, st.integers(1, 12), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_scan_repeats_the_recurrence(batch, dim, length, state, extras, steps, seed):
    args = inputs(batch, dim, length, state, extras, seed)
    want = oracle(**args, **flags(extras))
    for scan in (sequential_scan, lambda *a: chunked_scan(*a, steps=steps), None):
        assert off(selective_scan(**args, **flags(extras), scan=scan), want) < 1e-4


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 40), st.integers(1, 5), EXTRAS, st.integers(1, 12), st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_gradients_in_float32_follow_autograd_in_float64(batch, dim, length, state, extras, steps, seed):
    args = inputs(batch, dim, length, state, extras, seed)
    want = with_grads(selective_scan, {k: v.double() for k, v in args.items()}, **flags(extras), scan=sequential_scan)
    got = with_grads(selective_scan, args, **flags(extras), scan=lambda *a: chunked_scan(*a, steps=steps))
    assert {k: o for k in want if (o := off(got[k], want[k])) > 1e-4} == {}


@pytest.mark.parametrize("length,steps", [(1, 4), (4, 4), (5, 2), (7, 3)])
def test_hand_written_backward_is_the_derivative(length, steps):
    """Finite differences, so that nothing but the forward pass is trusted."""
    args = inputs(2, 3, length, 2, dtype=torch.float64)
    first = [t.transpose(1, 2).contiguous().requires_grad_() for t in (args["delta"], args["u"])]
    rest = [args["A"].t().contiguous().requires_grad_()] + [args[k].transpose(1, 2).contiguous().requires_grad_() for k in "BC"]
    assert torch.autograd.gradcheck(lambda *a: chunked_scan(*a, steps=steps), (*first, *rest))


@pytest.mark.parametrize("length,dim,state", [(1, 3, 4), (1023, 64, 16), (4096, 40, 8), (333, 512, 16)])
def test_chunks_of_the_size_chosen_by_itself(length, dim, state):
    args = inputs(1, dim, length, state, ("D", "z", "delta_bias", "softplus"), seed=length)
    assert length == 1 or fusion.chunk_length(length, dim * state) < length       # several chunks, else this proves nothing
    want = with_grads(selective_scan, {k: v.double() for k, v in args.items()}, delta_softplus=True)
    got = with_grads(selective_scan, args, delta_softplus=True)
    assert {k: o for k in want if (o := off(got[k], want[k])) > 1e-4} == {}


def test_long_lines_neither_overflow_nor_forget():
    """Rates from hardly fading to gone at once; an early mark on a channel that does not fade is still there at the end."""
    length = 30_000
    args = inputs(1, 3, length, 2, seed=3)
    args["A"] = torch.tensor([[-1e-7, -1e-7], [-1.0, -50.0], [-1e4, -1e3]])
    args["delta"] = args["delta"].clamp(max=3)
    args["u"][:, 0] = 0
    args["u"][:, 0, 5], args["B"][:, :, 5], args["C"][:, :, -1] = 1.0, 1.0, 1.0
    got = with_grads(selective_scan, args)
    assert all(v.isfinite().all() for v in got.values())
    assert float(got["y"].detach()[0, 0, -1]) == pytest.approx(2 * float(args["delta"][0, 0, 5]), rel=1e-2)
    want = with_grads(selective_scan, {k: v.double() for k, v in args.items()})
    assert off(got["y"], want["y"]) < 1e-4
    assert {k: o for k in want if (o := off(got[k], want[k])) > 1e-3} == {}        # sums of 30,000 terms that cancel, in float32


def test_growing_memory_is_scanned_as_defined():
    args = inputs(1, 2, 60, 2)
    args["A"] = -args["A"] * .05
    assert off(selective_scan(**args), oracle(**args)) < 1e-4


def test_only_the_past_is_heard():
    args = inputs(1, 4, 50, 3)
    before = selective_scan(**args)
    for name in ("u", "delta", "B", "C"):
        args[name] = args[name].clone()
        args[name][..., 30:] += 1
    after = selective_scan(**args)
    assert torch.equal(before[..., :30], after[..., :30]) and not torch.allclose(before[..., 30:], after[..., 30:])


@pytest.mark.parametrize("name,change", [
    ("delta", lambda t: t[:, :1]), ("A", lambda t: t[:2]), ("B", lambda t: t[..., 1:]), ("C", lambda t: t[:, :1]), ("u", lambda t: t[0]),
    ("A", lambda t: t.to(torch.complex64))])
def test_wrong_shapes_are_refused_by_name(name, change):
    args = inputs(2, 3, 5, 4)
    args[name] = change(args[name])
    with pytest.raises(ValueError, match="selective_scan") as e:
        selective_scan(**args)
    assert "\n" not in str(e.value)


def test_no_tokens_are_refused():
    with pytest.raises(ValueError, match="L = 0"):
        selective_scan(**inputs(1, 3, 0, 4))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_the_state_is_float32_under_autocast(half):
    seen = {}

    def spy(*args):
        seen["dtypes"] = {t.dtype for t in args}
        return chunked_scan(*args)

    args = inputs(2, 8, 300, 4)
    with torch.autocast("cpu", dtype=half):
        got = selective_scan(**args, scan=spy)
    assert seen["dtypes"] == {torch.float32} and off(got, oracle(**args)) < 1e-4
    low = {k: v.to(half) for k, v in args.items()}
    out = selective_scan(**low)
    assert out.dtype == half and off(out, oracle(**low)) < 2e-2                    # rounded once, at the very end


def test_backward_under_autocast_is_float32_too():
    args = inputs(1, 6, 64, 4)
    plain = with_grads(selective_scan, args)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = with_grads(selective_scan, args)
    assert {k: o for k in plain if (o := off(cast[k], plain[k])) > 1e-5} == {}


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory as Linux reports it")
def test_the_scan_fits_in_the_memory_of_a_chunk():
    """Forward and backward add less to a fresh process than one (B, D, L, N) tensor, of which the plain way keeps several."""
    code = """
import torch
from nbs_lib.core import peak_memory
from nbs_lib.fusion import selective_scan
torch.set_num_threads(1)
def go(length):
    a = [torch.rand(1, 256, length), torch.rand(1, 256, length), -torch.rand(256, 16), torch.rand(1, 16, length), torch.rand(1, 16, length)]
    selective_scan(*(t.requires_grad_() for t in a)).sum().backward()
go(8)
before = peak_memory()
go(8192)
print(peak_memory() - before, 8192 * 256 * 16 * 4)
"""
    used, whole = map(int, subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    assert used < whole, f"{used / 1e6:.0f} MB against {whole / 1e6:.0f} MB"


# The kernel on CUDA: what is handed to it, and what is said when it is missing.

def test_the_fused_kernel_gets_one_dtype_and_float32_parameters(monkeypatch):
    def kernel(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
        assert {t.dtype for t in (u, delta, B, C, z)} == {torch.float16} and {t.dtype for t in (A, D, delta_bias)} == {torch.float32}
        assert all(t.is_contiguous() for t in (u, delta, A, B, C, D, z, delta_bias))
        return selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, scan=sequential_scan)

    monkeypatch.setattr(fusion, "fused_scan", lambda: kernel)
    args = inputs(2, 3, 9, 4, ("D", "z", "delta_bias"))
    mixed = {k: v.half() if k in ("u", "A", "D") else v for k, v in args.items()}
    out = fusion._call_fused(*(mixed[k] for k in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")), True)
    assert off(out, oracle(**mixed, delta_softplus=True)) < 2e-2


@pytest.mark.parametrize("fault", [ImportError("No module named 'mamba_ssm'"), OSError("undefined symbol"), AttributeError("selective_scan_fn")])
def test_a_missing_kernel_is_announced_once(monkeypatch, fault):
    def broken(name):
        raise fault

    fusion.fused_scan.cache_clear()
    monkeypatch.setattr(fusion.importlib, "import_module", broken)
    with pytest.warns(UserWarning, match="chunked scan") as said:
        assert fusion.fused_scan() is None and fusion.fused_scan() is None
    assert len(said) == 1
    fusion.fused_scan.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("length", [1, 37, 2048])
def test_on_cuda_the_answer_is_the_same(length):
    extras = ("D", "z", "delta_bias", "softplus")
    args = inputs(2, 32, length, 16, extras)
    want = with_grads(selective_scan, {k: v.double() for k, v in args.items()}, delta_softplus=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)                               # without mamba-ssm the chunked scan is tried here
        got = with_grads(selective_scan, {k: v.cuda() for k, v in args.items()}, delta_softplus=True)
    assert {k: o for k in want if (o := off(got[k].cpu(), want[k])) > 1e-4} == {}


# The official reference and blocks of other hands.

@pytest.fixture(scope="module")
def official():
    """The modules of mamba-ssm, importable without CUDA once its compiled part has a stand-in."""
    stand_in = "selective_scan_cuda" not in sys.modules and importlib.util.find_spec("selective_scan_cuda") is None
    if stand_in:
        sys.modules["selective_scan_cuda"] = types.ModuleType("selective_scan_cuda")
    try:
        yield tuple(importlib.import_module(f"mamba_ssm.{name}") for name in ("ops.selective_scan_interface", "modules.mamba_simple"))
    except ImportError as e:
        pytest.skip(f"the official reference cannot be imported ({e}); our own oracle and transformers' block are compared all the same")
    finally:
        if stand_in:
            del sys.modules["selective_scan_cuda"]


@pytest.mark.parametrize("seed,batch,dim,length,state,extras", [
    (0, 1, 5, 1, 3, ()), (1, 2, 7, 33, 5, ("D",)), (2, 3, 4, 64, 16, ("z", "softplus")), (3, 1, 16, 129, 8, ("delta_bias", "softplus")),
    (4, 2, 12, 257, 4, ("D", "z", "delta_bias", "softplus")), (5, 1, 64, 600, 16, ("D", "z", "delta_bias", "softplus"))])
def test_scan_is_the_official_one(official, seed, batch, dim, length, state, extras):
    args = inputs(batch, dim, length, state, extras, seed)
    want = with_grads(official[0].selective_scan_ref, args, **flags(extras))
    for scan in (None, lambda *a: chunked_scan(*a, steps=10)):
        got = with_grads(selective_scan, args, **flags(extras), scan=scan)
        assert {k: o for k in want if (o := off(got[k], want[k])) > 1e-4} == {}


@pytest.mark.parametrize("dim,kw", [(24, {}), (48, {"d_state": 4, "d_conv": 3, "expand": 1})])
def test_block_is_the_official_one(official, monkeypatch, dim, kw):
    interface, simple = official
    monkeypatch.setattr(simple, "selective_scan_fn", interface.selective_scan_ref)
    monkeypatch.setattr(simple, "causal_conv1d_fn", None)
    torch.manual_seed(0)
    theirs, ours = simple.Mamba(dim, **kw), Mamba(dim, **kw)
    assert {k: v.shape for k, v in theirs.state_dict().items()} == {k: v.shape for k, v in ours.state_dict().items()}
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 45, dim)
    want, got = theirs(x), ours(x)
    want.square().sum().backward(), got.square().sum().backward()
    assert off(got, want) < 1e-4
    assert {k for (k, p), q in zip(theirs.named_parameters(), ours.parameters()) if off(dict(ours.named_parameters())[k].grad, p.grad) > 1e-4} == set()


def test_block_is_that_of_transformers(monkeypatch):
    """Always run: transformers ships its own sequential Mamba under the same parameter names."""
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)                            # its torch form, not the kernels
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    torch.manual_seed(0)
    config = MambaConfig(hidden_size=24, state_size=8, conv_kernel=4, expand=2, use_bias=False, use_conv_bias=True, time_step_rank=2)
    theirs, ours = MambaMixer(config, layer_idx=0), Mamba(24, d_state=8, d_conv=4, expand=2)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 37, 24)
    want, got = theirs.eval()(x), ours(x)
    want.square().sum().backward(), got.square().sum().backward()
    assert off(got, want) < 1e-4
    grads = dict(theirs.named_parameters())
    assert {k: o for k, p in ours.named_parameters() if (o := off(p.grad, grads[k].grad)) > 1e-4} == {}


def test_fresh_step_sizes_lie_in_their_range():
    dt = F.softplus(Mamba(256, dt_range=(1e-3, 1e-1)).dt_proj.bias)
    assert 9e-4 < dt.min() and dt.max() < .11 and dt.log10().std() > .4            # and fill it


# Orders and mixers.

@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.sampled_from(sorted(fusion.ORDERS)))
@settings(max_examples=30, deadline=None)
def test_maps_come_back(batch, height, width, order):
    left, right = torch.randn(2, batch, height, width, 3)
    tokens = to_tokens(left, right, order)
    assert tokens.shape == (batch, 2 * height * width, 3)
    assert torch.equal(to_map(tokens, height, order), torch.cat([left, right], dim=2))


def test_odd_orders_and_heights_are_refused():
    with pytest.raises(ValueError, match="zigzag"):
        to_tokens(torch.zeros(1, 2, 2, 1), torch.zeros(1, 2, 2, 1), "zigzag")
    with pytest.raises(ValueError, match="zigzag"):
        to_map(torch.zeros(1, 8, 1), 2, "zigzag")
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
def test_mixers_treat_photos_apart(name):
    """No photograph's tokens reach another's, in training or not."""
    torch.manual_seed(0)
    mixer, x = build_fusion(name, 16, dropout=0.0), torch.randn(3, 20, 16)
    assert torch.allclose(mixer(x)[1], mixer(x[1:2])[0], atol=1e-6)


@pytest.mark.parametrize("name", ("film", "attention"))
def test_mixers_without_places_do_not_care_for_order(name):
    torch.manual_seed(0)
    mixer, x, perm = build_fusion(name, 16, dropout=0.0), torch.randn(2, 20, 16), torch.randperm(20)
    torch.nn.init.normal_(next(p for p in reversed(list(mixer.parameters())) if p.dim() == 2), std=.1)
    assert torch.allclose(mixer(x)[:, perm], mixer(x[:, perm]), atol=1e-5)


@pytest.mark.parametrize("name", NAMES[:-1])
def test_mixers_learn_what_lies_with_the_other_half(name):
    """A target only the other half knows: each mixer overfits it, the empty one cannot. (FiLM and attention read it off the mean.)"""
    def loss_after(name, steps=60):
        torch.manual_seed(0)
        model = torch.nn.Sequential(build_fusion(name, 16, dropout=0.0), torch.nn.Linear(16, 1))
        left, right = torch.randn(2, 8, 4, 4, 16)
        right = right * .1 + torch.randn(8, 1, 1, 16)
        x, goal = to_tokens(left, right), right[:, :, 0, 0]
        opt = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(steps):
            seam = to_map(model(x), 4)[:, :, 3, 0]                                  # the left half's last column
            loss = F.mse_loss(seam, goal)
            opt.zero_grad(), loss.backward(), opt.step()
        return loss.item()

    assert loss_after(name) < .5 * loss_after("none")


def test_depth_and_options_reach_the_blocks():
    assert len(build_fusion("gated_conv", 8, depth=3, kernel=7)) == 3
    assert build_fusion("gated_conv", 8, kernel=7)[0].conv.kernel_size == (7,)
    assert build_fusion("mamba", 8, d_state=5)[0].ahead.A_log.shape == (8, 5)
    with pytest.raises(ValueError, match="local_mamba"):
        build_fusion("local_mamba", 8)
    with pytest.raises(ValueError, match="heads"):
        build_fusion("gated_conv", 8, heads=2)
    with pytest.raises(ValueError, match="divisor"):
        build_fusion("attention", 8, heads=3)


def test_checkpointing_changes_nothing():
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    one = BiMambaMixer(12, dropout=0.0)
    two = copy.deepcopy(one)
    x = torch.randn(2, 50, 12)
    a, b = one(x), checkpoint(two, x, use_reentrant=False)
    a.square().sum().backward(), b.square().sum().backward()
    assert torch.equal(a, b) and all(torch.equal(p.grad, q.grad) for p, q in zip(one.parameters(), two.parameters()))


def test_the_mixer_of_both_directions_hears_both_ends():
    x = torch.randn(1, 40, 8, requires_grad=True)
    BiMambaMixer(8, dropout=0.0)(x)[0, 20].sum().backward()
    assert (x.grad[0].abs().sum(-1) > 0).all()


# The bench.

def test_chunks_are_worth_it():
    """Far from the bench's factor, so that a busy machine does not matter; the loop by loop form would fail it."""
    args = inputs(1, 256, 512, 16)
    seconds = {}
    for scan in (sequential_scan, chunked_scan):
        for _ in range(4):
            begin = time.process_time()
            with torch.no_grad():
                selective_scan(**args, scan=scan)
            seconds[scan] = min(seconds.get(scan, 1e9), time.process_time() - begin)
    assert seconds[chunked_scan] * 2 < seconds[sequential_scan]


def test_a_bench_row_says_why_it_is_empty(monkeypatch):
    monkeypatch.setitem(fusion.SCAN_RIVALS, "ghost", ("scan", None))               # the fresh process does not know it
    row = fusion._in_own_process(("ghost", 8, 1, 4, 2, False, 1, 1.0), 300.0)
    assert row["seconds"] is None and "ghost" in row["note"] and "\n" not in row["note"]
    rows = fusion.bench_scan(lengths=(8,), names=("chunked",), inner=4, limit=.01)
    assert [r["direction"] for r in rows] == ["forward", "forward + backward"]
    assert all(r["seconds"] is None and r["note"] == "stopped after 0.01 s" for r in rows)
