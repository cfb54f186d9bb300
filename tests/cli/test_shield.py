"""`gemma-jax shield`."""

import json
from dataclasses import asdict

import gemma_jax as gj

TWO = ("--policy", "violence", "--policy", "sexual")


def test_json_as_in_python(cli, seer, picture):
    file = picture("a.png", level=100)
    ran = cli("shield", file, "--model", seer, *TWO, "--dtype", "float32", "--json")
    assert (ran.code, ran.err) == (0, "")
    model, tok = gj.load(seer, dtype="float32")
    verdicts = gj.shield(model, tok, file, ["violence", "sexual"])
    assert json.loads(ran.out) == {name: asdict(verdict) for name, verdict in verdicts.items()}


def test_table(cli, seer, picture):
    ran = cli("shield", picture("a.png"), "--model", seer, *TWO)
    assert (ran.code, ran.err) == (0, "")
    assert "violence" in ran.out and "sexual" in ran.out and "dangerous" not in ran.out


def test_refused(refused, seer, talker, picture, tmp_path):
    file = picture("a.png")
    wrong = refused("shield", file, "--model", seer, "--policy", "hate")
    assert wrong == "unknown policy 'hate'; choose from dangerous, sexual, violence"
    assert "has no vision tower" in refused("shield", file, "--model", talker)
    assert "none.png" in refused("shield", tmp_path / "none.png", "--model", seer)
    assert "--model" in refused("shield", file)


def test_a_model_that_cannot_answer_is_no_shieldgemma(refused, seer, picture, monkeypatch):
    monkeypatch.setattr("gemma_jax.loading.load_model", None)  # known before weights are read

    def no_piece(self, piece):
        raise ValueError(f"the vocabulary has no piece {piece!r}")

    monkeypatch.setattr("gemma_jax.text.Tokenizer.id_of", no_piece)
    error = refused("shield", picture("a.png"), "--model", seer)
    assert error.startswith("this is no ShieldGemma: the vocabulary has no piece 'Yes'; expected")
