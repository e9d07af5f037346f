"""What makes a stage stale: what the code does, and never the words beside it."""
import pytest
import tiny

from nbs_lib import stages
from nbs_lib.inpaint import code_key, run_inpaint
from nbs_lib.stages import code_behaviour, hash_code


def edited(monkeypatch, module, old, new):
    "Let the library's source of `module` read as if `old` were `new`."
    real = stages.module_sources

    def sources(name):
        found = real(name)
        assert module not in found or old in found[module]
        return {n: text.replace(old, new) if n == module else text for n, text in found.items()}

    monkeypatch.setattr(stages, "module_sources", sources)


DOCSTRING = '"(h, w, 3) uint8 → (H, W, 3): halved by'


def test_a_changed_docstring_leaves_a_stage_fresh_and_a_changed_constant_does_not(tmp_path, monkeypatch, capsys):
    run = tiny.run_on(tiny.competition(tmp_path / "in", n_train=6, n_test=1), tmp_path / "out")
    run_inpaint(run)
    capsys.readouterr()
    edited(monkeypatch, "images", DOCSTRING, '"Resize a half: (h, w, 3) uint8 → (H, W, 3), halved by')
    run_inpaint(run)
    assert "inpaint: up to date" in capsys.readouterr().out
    monkeypatch.undo()
    edited(monkeypatch, "images", ">= 2.5:", ">= 3.5:")
    run_inpaint(run)
    assert "inpaint: up to date" not in capsys.readouterr().out


@pytest.mark.parametrize("module", ["runtime", "store", "train_dinov3", "boosting"])
def test_words_do_not_count(module):
    source = stages.module_sources(module)[module]
    assert code_behaviour(source) == code_behaviour("# a remark\n" + source.replace('"""', '"""Differently said. ', 1))
    assert hash_code(module) == hash_code(module) and code_behaviour(source) != code_behaviour(source + "\nLAST = 1\n")


def test_the_store_is_keyed_by_what_cleaning_does(monkeypatch):
    before = code_key()
    code_key.cache_clear()
    monkeypatch.setattr("nbs_lib.inpaint.code_behaviour", lambda source: code_behaviour(source.replace(DOCSTRING, '"Something else, halved by')))
    assert code_key() == before
    code_key.cache_clear()
    monkeypatch.setattr("nbs_lib.inpaint.code_behaviour", lambda source: code_behaviour(source.replace(">= 2.5:", ">= 3.5:")))
    assert code_key() != before
    code_key.cache_clear()
