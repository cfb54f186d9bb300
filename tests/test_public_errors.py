"""What a natural mistake in Python gets: what was meant, or one line that says what to do."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny
from flax import nnx

import gemma_jax as gj

CFG = tiny.gemma3(2)
IDS = [[2, 3, 5]]


@pytest.fixture(scope="module")
def model():
    return tiny.model(CFG, "unrolled")


@pytest.fixture(scope="module")
def logits(model):
    return np.asarray(gj.forward(model, np.array(IDS)).logits)


@pytest.mark.parametrize(
    "ids", [IDS, (tuple(IDS[0]),), [np.array(IDS[0])], jax.numpy.array(IDS), np.array(IDS, "u1")]
)
def test_forward_takes_ids_in_every_form(model, logits, ids):
    assert (np.asarray(gj.forward(model, ids).logits) == logits).all()
    assert (np.asarray(gj.forward(model, gj.Batch(ids)).logits) == logits).all()


@pytest.mark.parametrize(
    "ids, words",
    [
        ([2, 3], r"tokens must be \[B, T\].*got shape \[2\].*\[ids\]"),
        (np.array([2, 3]), r"tokens must be \[B, T\]"),
        ("hello", r"got text; encode it first"),
        (["hello"], r"got text; encode it first"),
        ([[2, 3], [4]], "rows of different lengths"),
        ([[2.0, 3.0]], r"must be integers, got float64"),
        ([[2, CFG.vocab_size]], rf"id {CFG.vocab_size} lies outside \[0, {CFG.vocab_size}\)"),
        (np.array([[-1, 2]]), "id -1 lies outside"),
        (None, "expected an array of token ids|must be integers"),
    ],
)
@pytest.mark.parametrize("run", [gj.forward, gj.loss])
def test_what_are_no_ids_of_the_model_is_refused(model, run, ids, words):
    with pytest.raises(ValueError, match=words):
        run(model, ids)


@pytest.mark.parametrize("names", ["layer_outputs", ["layer_outputs"], ("layer_outputs",)])
def test_one_name_is_captured_or_several(model, names):
    captured = gj.forward(model, IDS, logits="none", capture=names).captured
    assert list(captured) == ["layer_outputs"]


def test_an_unknown_name_is_not_captured(model):
    with pytest.raises(ValueError, match=r"cannot capture \['layers'\]; choose from"):
        gj.forward(model, IDS, capture="layers")


def test_a_pass_can_be_lowered_like_any_compiled_function(model, logits):
    program = gj.forward.lower(model, np.array(IDS), logits="all").compile()
    assert program(model, np.array(IDS)).logits.shape == logits.shape


@pytest.mark.parametrize(
    "widths, words",
    [
        ([4, 4, 4], r"shape \[3\] for 2 layers"),
        (np.array([4, 9999]), r"width 9999 of layer 1 must lie in \[1, "),
        ((0, 4), r"width 0 of layer 0 must lie in \[1, "),
        (4, r"shape \[\] for 2 layers"),
    ],
)
def test_widths_that_the_model_lacks_are_refused(model, widths, words):
    with pytest.raises(ValueError, match=words):
        gj.forward(model, gj.Batch(np.array(IDS), ffn_widths_L=widths))


@pytest.mark.parametrize(
    "keyword, hint",
    [
        ("max_tokens", "did you mean max_new_tokens"),
        ("temprature", "did you mean temperature"),
        ("zzz", "it takes model"),
    ],
)
def test_a_wrong_keyword_names_generate_and_the_nearest_right_one(model, keyword, hint):
    with pytest.raises(TypeError, match=f"generate has no argument '{keyword}'; {hint}"):
        gj.generate(model, None, IDS, **{keyword: 5})


@pytest.mark.parametrize("seed", [np.int32(3), np.uint64(3), np.array(3), [np.int64(3)]])
def test_seeds_are_integers_of_any_kind(model, seed):
    options = dict(max_new_tokens=4, temperature=1.0)
    [expected] = gj.generate(model, None, IDS, seed=3, **options)
    [done] = gj.generate(model, None, IDS, seed=seed, **options)
    assert done.token_ids == expected.token_ids


@pytest.mark.parametrize("seed", [jax.random.key(0), [jax.random.key(0)], 1.5, "3", None])
def test_other_seeds_are_refused(model, seed):
    with pytest.raises(ValueError, match="a seed must be an integer, or one integer per prompt"):
        gj.generate(model, None, IDS, seed=seed)


def test_scores_are_those_of_ids(model):
    with pytest.raises(ValueError, match="got text; encode it first"):
        gj.score(model, "Paris")


def test_models_and_tokenizers_say_how_they_are_used(model):
    with pytest.raises(TypeError, match=r"gj.forward\(model, ids\)"):
        model(IDS)
    with pytest.raises(TypeError, match=r"tok.encode\(text"):
        gj.load_tokenizer("checkpoints/digits")("text")


def test_ids_of_one_prompt_need_no_list_around_them(model):
    (several,) = gj.generate(model, None, IDS, max_new_tokens=2)
    for ids in (IDS[0], np.array(IDS[0])):
        assert gj.generate(model, None, ids, max_new_tokens=2) == several


@pytest.mark.parametrize("prompt", [None, b"text", 7, [None]])
def test_what_is_no_prompt_is_refused(model, prompt):
    with pytest.raises(ValueError, match="expected a text, a list of token ids, .* got "):
        gj.generate(model, None, prompt)


def test_a_stride_is_a_whole_number(model):
    with pytest.raises(ValueError, match="stride=2.5 must be an integer"):
        gj.score(model, IDS[0], stride=2.5)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(stop_ids=[9_999_999]), r"stop_ids must be token ids in \[0, 96\), got 9999999"),
        (dict(stop_ids=["a"]), "stop_ids must be token ids .* got 'a'"),
        (dict(max_new_tokens=4.0), "max_new_tokens=4.0 must be an integer"),
    ],
)
def test_impossible_options_are_refused(model, options, words):
    with pytest.raises(ValueError, match=words):
        gj.generate(model, None, IDS, **options)


def test_a_single_stop_needs_no_list(model):
    free = gj.generate(model, None, IDS[0], max_new_tokens=4).token_ids
    one, several = (
        gj.generate(model, None, IDS[0], max_new_tokens=4, stop_ids=stop).token_ids
        for stop in (free[1], [free[1]])
    )
    assert one == several == free[: free.index(free[1]) + 1]


def test_model_and_tokenizer_are_not_swapped(model):
    with pytest.raises(TypeError, match="expected a model and a tokenizer, got int first"):
        gj.generate(7, model, IDS)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: gj.GemmaConfig(vocab=3), "GemmaConfig has no argument 'vocab'; .* vocab_size"),
        (lambda: replace(CFG, actvation="silu"), "GemmaConfig has no .*; did you mean activation"),
        (lambda: gj.LayerSpec(kind="local", windw=3), "LayerSpec has no .*; did you mean window"),
        (lambda: gj.LoadOptions(wights="int8"), "LoadOptions has no .*; did you mean weights"),
        (lambda: gj.Sampling(temprature=1), "Sampling has no .*; did you mean temperature"),
        (lambda: gj.load("checkpoints/digits", "int8"), "options must be LoadOptions, got 'int8'"),
    ],
)
def test_a_wrong_keyword_of_a_config_names_the_nearest_right_one(make, words):
    with pytest.raises(TypeError, match=words):
        make()


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(dtype="int32"), "dtype='int32' must be 'float32', 'bfloat16' or 'float16'"),
        (dict(dtype="float33"), "dtype='float33' must be 'float32'"),
        (dict(cache_dtype="int3"), "cache_dtype='int3' must be 'float32', 'bfloat16' or 'int8'"),
        (dict(attention_impl="flsh"), "attention_impl='flsh' must be 'auto', "),
        (dict(per_layer_table="dsk"), "per_layer_table='dsk' must be 'device', 'host' or 'disk'"),
        (dict(layout="scna"), "layout='scna' must be 'scan' or 'unrolled'"),
    ],
)
def test_an_option_of_loading_that_there_is_not_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        gj.LoadOptions(**changes)


def test_a_source_is_a_name_or_a_path():
    with pytest.raises(ValueError, match="3: expected a name or a path"):
        gj.load(3)


class Deaf(gj.Block):
    def __init__(self, cfg):
        pass


@pytest.mark.parametrize(
    "block, words",
    [
        (3, r"block=<int> must be called as block\(cfg, spec, rngs=rngs\)"),
        (Deaf, "block=Deaf must be called as"),
        (nnx.Linear, "block=Linear makes Linear, which is no layer"),
        (lambda cfg, spec, *, rngs: nnx.Module(), "makes Module, which is no layer"),
        (lambda cfg, spec, *, rngs: None, "makes NoneType, which is no layer"),
    ],
)
def test_a_block_that_makes_no_layers_is_refused(block, words):
    with pytest.raises(TypeError, match=words):
        gj.Gemma(CFG, rngs=nnx.Rngs(0), block=block)


@pytest.mark.parametrize("cfg, rngs", [(CFG, 0), (CFG, jax.random.key(0)), ("tiny-gemma3", 0)])
def test_a_model_is_made_of_a_config_and_rngs(cfg, rngs):
    with pytest.raises(TypeError, match=r"rngs must be nnx.Rngs\(seed\)|cfg must be a GemmaConfig"):
        gj.Gemma(cfg, rngs=rngs)


@pytest.mark.parametrize("run", [gj.forward, gj.loss])
def test_a_text_longer_than_the_context_is_refused(model, run):
    with pytest.raises(ValueError, match="tokens do not fit the model's context of"):
        run(model, np.ones((1, CFG.max_positions + 1), np.int32))


@pytest.mark.parametrize("texts", [["a", "b"], [[2, 3, 5], [2, 3]], IDS * 2, np.array(IDS * 2)])
def test_scores_are_of_one_text(model, texts):
    with pytest.raises(ValueError, match="score takes one text; call it for each"):
        gj.score(model, texts)


def test_an_unknown_role_is_named():
    tok = gj.load_tokenizer("checkpoints/digits")
    with pytest.raises(ValueError, match="expected role 'user' or .* got 'usr'"):
        gj.encode_chat(tok, [{"role": "usr", "content": "x"}])


@pytest.mark.parametrize(
    "text, words", [([2, 3], r"put a single text into a list"), ("hi", "encode")]
)
def test_a_slice_is_searched_on_rows_of_ids(model, text, words):
    with pytest.raises(ValueError, match=words):
        gj.matformer.search(model, text, 1000)
