"""A stage is repeated when the behaviour of its code changes, not when comments do."""

import pytest
import tiny

from nbs_lib import stages
from nbs_lib.inpaint import code_key, run_inpaint
from nbs_lib.stages import code_behaviour, hash_code


def edit_source(monkeypatch, module, old, new):
    "Replace `old` by `new` in the source of `module` that freshness is computed from."
    real = stages.module_sources

    def sources(name):
        found = real(name)
        assert module not in found or old in found[module]
        return {n: text.replace(old, new) if n == module else text for n, text in found.items()}

    monkeypatch.setattr(stages, "module_sources", sources)


DOCSTRING = '"Resize (h, w, 3) uint8 to `shape`: 2 x 2 means'


def test_a_stage_is_repeated_for_a_changed_constant_only(tmp_path, monkeypatch, capsys):
    folder = tiny.competition(tmp_path / "in", n_train=6, n_test=1)
    run = tiny.run_on(folder, tmp_path / "out")
    run_inpaint(run)
    capsys.readouterr()
    edit_source(monkeypatch, "images", DOCSTRING, '"Resize a half: (h, w, 3) uint8 → (H, W, 3), halved by')
    run_inpaint(run)
    assert "inpaint: up to date" in capsys.readouterr().out
    monkeypatch.undo()
    edit_source(monkeypatch, "images", ">= 2.5:", ">= 3.5:")
    run_inpaint(run)
    assert "inpaint: up to date" not in capsys.readouterr().out


@pytest.mark.parametrize("module", ["runtime", "store", "train_dinov3", "boosting"])
def test_comments_do_not_change_the_hash(module):
    source = stages.module_sources(module)[module]
    commented = "# a remark\n" + source.replace('"""', '"""In other words. ', 1)
    assert code_behaviour(source) == code_behaviour(commented)
    assert hash_code(module) == hash_code(module)
    assert code_behaviour(source) != code_behaviour(source + "\nLAST = 1\n")


def test_the_key_of_the_store_depends_on_the_behaviour_of_cleaning(monkeypatch):
    before = code_key()
    assert key_after_edit(monkeypatch, DOCSTRING, '"Something else, halved by') == before
    assert key_after_edit(monkeypatch, ">= 2.5:", ">= 3.5:") != before
    code_key.cache_clear()


def key_after_edit(monkeypatch, old: str, new: str) -> str:
    "Return the key of the store if the sources had `new` in place of `old`."

    def behaviour(source):
        return code_behaviour(source.replace(old, new))

    code_key.cache_clear()
    monkeypatch.setattr("nbs_lib.inpaint.code_behaviour", behaviour)
    return code_key()
