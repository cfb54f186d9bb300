"""A kind of input is one `Modality`: another one goes through prompts, prefill and the decoder
without an edit of shared code. The one defined here has sounds, which are causal."""

import ast
from dataclasses import dataclass, fields
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from marks import nightly
from words import Words

import gemma_jax
from gemma_jax import Conversation, Prompt, Sampling, Session, forward, generate, init_cache
from gemma_jax.config import GemmaConfig
from gemma_jax.decoder.batch import Batch
from gemma_jax.encoder_config import VisionConfig
from gemma_jax.inference.prefill import PromptRow, prefill_chunk
from gemma_jax.multimodal.image_prompt import MARKER
from gemma_jax.multimodal.modality import Item, Modality, modalities_of, modality_of
from gemma_jax.multimodal.placeholders import locate, soft_tokens
from gemma_jax.multimodal.prompts import PromptReader, encode_prompt
from gemma_jax.nn.einsum import Einsum
from gemma_jax.nn.encoders import encoder_of
from gemma_jax.vision.encoder import VisionEncoder

ATOL = 2e-5  # as in test_invariance.py
SOUND = "<sound>"
VISION = tiny.vision()
IMAGE_RUN = [VISION.start_token, *[VISION.image_token] * 4, VISION.end_token]
NEWLINES = [4, 4]  # of `Words`


@dataclass(frozen=True)
class SoundConfig:
    """A sound is `[num_tokens, 5]`; with `None`, of any length."""

    num_tokens: int | None = 3
    placeholder: int = 200  # beyond the vocabulary


@dataclass(frozen=True, kw_only=True)
class HearingConfig(GemmaConfig):
    sound: SoundConfig | None = None


class SoundEncoder(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs):
        self.proj = Einsum("ITC,DC->ITD", {"C": 5, "D": width}, rngs=rngs)

    def __call__(self, frames_ITC: jax.Array) -> jax.Array:
        return jnp.tanh(self.proj(frames_ITC))


@encoder_of.register
def sound_encoder(config: SoundConfig, cfg: GemmaConfig, *, rngs: nnx.Rngs, **_: object):
    return SoundEncoder(cfg.d_model, rngs)


@modality_of.register
def sounds(config: SoundConfig, **_: object) -> Modality:
    return Modality(
        name="sound",
        items="sounds",
        marker=SOUND,
        placeholder=config.placeholder,
        begin=85,
        end=86,
        tokens_per_item=config.num_tokens,
        bidirectional=False,
        prepare=lambda frames: Item(SOUND, [len(frames)], [np.asarray(frames, np.float32)]),
        encode=lambda model, frames_ITC: model.sound(frames_ITC),
    )


def run(length: int) -> list[int]:
    return [85, *[200] * length, 86]


def hearing(vision: VisionConfig | None = VISION, **sound):
    cfg = tiny.gemma3(layers=3, window=3, vision=vision)
    old = {field.name: getattr(cfg, field.name) for field in fields(cfg)}
    return tiny.model(HearingConfig(**old, sound=SoundConfig(**sound)))


@pytest.fixture(scope="module")
def model():
    """It sees and hears."""
    return hearing()


@pytest.fixture(scope="module")
def listener():
    """It hears sounds of any length, and sees nothing."""
    return hearing(vision=None, num_tokens=None)


def text(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 80, length).tolist()


def sound(seed: int, length: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((length, 5)).astype(np.float32)


def pixels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (3, 56, 56)).astype(np.float32)


@pytest.fixture(scope="module")
def both() -> Prompt:
    """A sound, an image, and another sound right after it."""
    ids = [*text(5, 0), *run(3), *text(2, 1), *IMAGE_RUN, *run(3), *text(4, 2)]
    return Prompt(ids, media={"sound": [sound(0), sound(1)], "image": [pixels(0)]})


def logits(model, prompt: Prompt) -> np.ndarray:
    """Of the whole prompt in one pass without a cache."""
    ids = np.array([prompt.token_ids], np.int32)
    media = {name: np.stack(inputs) for name, inputs in prompt.media.items()}
    return np.asarray(forward(model, Batch(ids, soft=soft_tokens(model, ids, media))).logits)[0]


def in_pieces(model, prompt: Prompt, width: int) -> np.ndarray:
    row = PromptRow.of(prompt.token_ids, 0, encode_prompt(model, prompt), modalities_of(model.cfg))
    cache, parts = init_cache(model.cfg, model.layer_groups, 1, 64, jnp.float32), []
    for piece in row.cuts(width):
        out = forward(model, prefill_chunk([row], [piece]).batch, cache=cache)
        cache = out.cache
        parts.append(np.asarray(out.logits)[0, : piece.stop - piece.start])
    return np.concatenate(parts)


def test_modalities_are_chosen_by_the_types_in_a_config(model, listener):
    assert [m.name for m in modalities_of(model.cfg)] == ["image", "sound"]
    assert [m.name for m in modalities_of(listener.cfg)] == ["sound"]
    assert modalities_of(tiny.gemma3()) == ()


def test_encoders_are_chosen_by_the_types_in_a_config(model, listener):
    assert isinstance(model.sound, SoundEncoder) and isinstance(model.vision, VisionEncoder)
    assert isinstance(listener.sound, SoundEncoder) and listener.vision is None
    assert not hasattr(tiny.model(tiny.gemma3()), "sound")


def test_markers_of_both_in_one_text(model):
    words = Words(96)
    image, clip = np.zeros((56, 56, 3), np.uint8), sound(0)
    marked = f"a {SOUND} b {MARKER} c {SOUND}"
    made = PromptReader(words, modalities_of(model.cfg)).text(
        marked, {"image": [image], "sound": [clip, clip + 1]}
    )
    a, b, c = words.encode("a b c")
    expected = [2, a, *run(3), b, *NEWLINES, *IMAGE_RUN, *NEWLINES, c, *run(3)]
    assert made.token_ids == expected
    assert made.pixels.shape == (1, 3, 56, 56)
    np.testing.assert_array_equal(made.media["sound"], [clip, clip + 1])


def test_without_markers_items_come_first_in_the_order_of_the_config(model):
    words = Words(96)
    image = np.zeros((56, 56, 3), np.uint8)
    made = PromptReader(words, modalities_of(model.cfg)).text(
        "a", {"sound": [sound(0)], "image": [image]}
    )
    view = [*NEWLINES, *IMAGE_RUN, *NEWLINES]
    assert made.token_ids == [2, *view, *run(3), *words.encode("a")]


def test_items_in_messages(model):
    words = Words(96)
    reader = PromptReader(words, modalities_of(model.cfg))
    content = ["a", {"type": "sound", "sound": sound(0)}, "b"]
    (made,) = reader.all([[{"role": "user", "content": content}]])
    a, b = words.encode("a b")
    at = made.token_ids.index(a)
    assert made.token_ids[at : at + 7] == [a, *run(3), b]
    np.testing.assert_array_equal(made.media["sound"], [sound(0)])


def test_lists_of_items_beside_texts(model):
    reader = PromptReader(Words(96), modalities_of(model.cfg))
    one, two = reader.all(["a", f"b{SOUND}"], {"sound": [None, [sound(0)]], "image": None})
    assert 200 not in one.token_ids and two.token_ids.count(200) == 3
    with pytest.raises(ValueError, match="1 lists of sound items for 2 prompts"):
        reader.all(["a", "b"], {"sound": [[sound(0)]]})
    with pytest.raises(ValueError, match="sound items go with a text"):
        reader.all([[3, 4]], {"sound": [[sound(0)]]})


@pytest.mark.parametrize(
    ("marked", "media", "match"),
    [
        (SOUND, {}, "places for sounds in the text .<sound>.: 1, sounds given: 0"),
        ("a", {"smell": [1]}, "reads text and image, sound alone; smell needs one"),
    ],
)
def test_refused(model, marked, media, match):
    with pytest.raises(ValueError, match=match):
        PromptReader(Words(96), modalities_of(model.cfg)).text(marked, media)


def test_a_model_without_the_modality_says_so():
    blind = tiny.model(tiny.gemma3())
    with pytest.raises(ValueError, match="reads text alone; sound needs one"):
        generate(blind, None, Prompt([3], media={"sound": [sound(0)]}), max_new_tokens=1)


@pytest.mark.parametrize("width", [1, 6, 64, *nightly(4)])
def test_pieces_equal_one_pass(model, both, width):
    np.testing.assert_allclose(in_pieces(model, both, width), logits(model, both), atol=ATOL)


def test_cuts_go_through_causal_items_alone(model, both):
    soft = encode_prompt(model, both)
    row = PromptRow.of(both.token_ids, 0, soft, modalities_of(model.cfg))
    assert [len(one) for one in soft] == [3, 4, 3]  # in the order of the text
    ends = {piece.stop for width in range(1, 8) for piece in row.cuts(width)}
    ids = np.array(both.token_ids)
    inside = [i for i in range(1, len(ids)) if ids[i] == ids[i - 1] == 200]
    assert set(inside) <= ends
    whole = [i for i in range(1, len(ids)) if ids[i] == ids[i - 1] == VISION.image_token]
    assert not ends & set(whole)


def test_generation_is_that_of_the_logits(model, both):
    done = generate(model, None, both, max_new_tokens=3, chunk=6)
    ids = [*both.token_ids, *done.token_ids]
    expected = logits(model, Prompt(ids, media=both.media)).argmax(axis=-1)
    assert done.token_ids == expected[-4:-1].tolist()


@pytest.mark.parametrize("chunk", [5, *nightly(1024)])
def test_a_row_does_not_feel_the_items_of_others(model, both, chunk):
    rows = [both, Prompt([*run(3), *text(4, 3)], media={"sound": [sound(5)]}), Prompt(text(9, 4))]
    alone = [generate(model, None, row, max_new_tokens=4).token_ids for row in rows]
    done = generate(model, None, rows, max_new_tokens=4, chunk=chunk)
    assert [one.token_ids for one in done] == alone


def test_sounds_are_causal(model, both):
    """The end of a sound is not seen by its beginning."""
    changed = [sound(0), sound(1).copy()]
    changed[1][2] += 1
    other = Prompt(both.token_ids, media={**both.media, "sound": changed})
    ours, theirs = logits(model, both), logits(model, other)
    last = np.flatnonzero(np.array(both.token_ids) == 200)[-1]
    np.testing.assert_allclose(ours[:last], theirs[:last], atol=ATOL)
    assert np.abs(ours - theirs)[last:].max(axis=-1).min() > 1e-3


def test_sounds_alone_leave_the_mask_causal(listener):
    prompt = Prompt([*run(4), *text(3, 0)], media={"sound": [sound(0, 4)]})
    row = PromptRow.of(
        prompt.token_ids, 0, encode_prompt(listener, prompt), modalities_of(listener.cfg)
    )
    assert prefill_chunk([row], row.cuts(64)).batch.soft.block_BT is None
    assert locate(np.array([prompt.token_ids]), modalities_of(hearing().cfg)[1])[1] is None


@pytest.mark.parametrize("width", [2, 64])
def test_tokens_by_length(listener, width):
    """Items of other lengths, in one prompt and in one chunk."""
    clips = [sound(0, 2), sound(1, 5), sound(2, 3)]
    ids = [id for clip in clips for id in [*run(len(clip)), *text(2, len(clip))]]
    prompt = Prompt(ids, media={"sound": clips})
    tokens = np.array([ids], np.int32)
    padded = np.stack([np.pad(clip, ((0, 5 - len(clip)), (0, 0))) for clip in clips])
    whole = forward(listener, Batch(tokens, soft=soft_tokens(listener, tokens, padded))).logits[0]
    np.testing.assert_allclose(in_pieces(listener, prompt, width), whole, atol=ATOL)


def test_places_are_counted_for_each_modality(model, both):
    media = {**both.media, "sound": both.media["sound"][:1]}
    with pytest.raises(ValueError, match="6 placeholders .* 3 soft tokens given"):
        generate(model, None, Prompt(both.token_ids, media=media), max_new_tokens=1)


def test_a_session_takes_soft_tokens_in_the_order_of_the_text(model, both):
    session = Session(model, 1, 64)
    session.prefill([both.token_ids], soft=[encode_prompt(model, both)], max_new_tokens=3)
    assert session.decode(3)[0] == generate(model, None, both, max_new_tokens=3).token_ids


def test_a_conversation_hears(model):
    words = Words(96)
    content = [{"type": "sound", "sound": sound(0)}, "a"]
    chat = Conversation(model, words, max_len=128, sampling=Sampling())
    said = chat.say(content, max_new_tokens=4)
    messages = [{"role": "user", "content": content}]
    assert said == generate(model, words, messages, max_new_tokens=4).text


def test_gradients_reach_the_encoder(model, both):
    ids = np.array([both.token_ids], np.int32)
    media = {name: np.stack(inputs) for name, inputs in both.media.items()}

    def loss(model):
        return gemma_jax.loss(model, Batch(ids, soft=soft_tokens(model, ids, media)))

    gradients = jax.grad(loss)(model)
    assert np.abs(gradients.sound.proj.w.get_value()).max() > 1e-4


# The keyword `images=` of `generate` and `pixels` of `Prompt` are for users: what is said of them
# there is all that shared code says of any one modality.
FOR_USERS = {
    "inference/completion.py": {
        '>>> done = gj.generate(model, tok, "Read the digits.", images=[picture])',
    },
    "inference/streaming.py": {
        "images: Sequence | None = None,",
        '>>> text = gj.stream(model, tok, "Read the digits.", images=[three])',
        '>>> for piece in gj.stream(model, tok, "Read the digits.", images=[picture]):',
        'media={"image": [images], "audio": [audio]},',
    },
    "inference/generate.py": {
        "images: Sequence | None = None,",
        "images: Images of one text, or one list of images per text of a batch: files, arrays, or",
        "whatever else `Image` takes. They go where the text says `<start_of_image>` (of Gemma 3n",
        '>>> print(gj.generate(model, tok, "How many digits?", images=[picture]))',
        ">>> [str(done) for done in gj.generate(model, tok, texts, images=2 * [[picture]])]",
        ">>> print(gj.generate(model, tok, texts[0], images=[picture], logits_processors=no_nine))",
        '>>> print(gj.generate(model, tok, "Which digits?", images=[picture], regex="[0-9]{2}"))',
        '"image": [images] if single else images,',
        "`<image_soft_token>`), or come first. Messages hold theirs in their content.",
    },
    "multimodal/prompts.py": {
        'self.media = dict(media) if pixels is None else {**media, "image": pixels}',
        'return np.asarray(self.media.get("image", np.zeros((0, 3, 0, 0), np.float32)))',
    },
}
ROOT = Path(gemma_jax.__file__).parent
SHARED = [
    *(ROOT / "inference").rglob("*.py"),
    *(ROOT / "decoder").rglob("*.py"),
    *(ROOT / "nn").rglob("*.py"),
    *(
        ROOT / "multimodal" / f"{name}.py"
        for name in "modality markers placeholders prompts".split()
    ),
]


@pytest.mark.parametrize("path", SHARED, ids=lambda path: str(path.relative_to(ROOT)))
def test_shared_code_names_no_modality(path):
    """`grep -i image`, and of parts of a config `vision`, in code."""
    source = path.read_text("utf-8")
    lines = {line.strip() for line in source.splitlines() if "image" in line.lower()}
    allowed = FOR_USERS.get(str(path.relative_to(ROOT)), set())
    assert lines == allowed
    if path.parent.name in ("inference", "multimodal"):
        names = {
            node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)
        }
        assert not names & {"vision", "image_token", "num_soft_tokens"}
