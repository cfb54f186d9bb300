"""Gemma 3n in its smallest size that hears and sees, its vocabulary, and how it is asked."""

from collections.abc import Mapping

from gemma_jax.config import (
    AltUpConfig,
    GemmaConfig,
    LayerSpec,
    ModalityVocabulary,
    PerLayerConfig,
    share_kv,
)
from gemma_jax.encoder_config import (
    AttentionBlock,
    AudioConfig,
    FusedBlock,
    InvertedBlock,
    MobileNetConfig,
    SoundProcessing,
)
from gemma_jax.experiments.digits.scenes import QUESTIONS, SIDE
from gemma_jax.experiments.spoken.clips import RATE, SECONDS
from gemma_jax.multimodal.prompts import Prompt, PromptReader
from gemma_jax.text import Tokenizer
from gemma_jax.text.train_vocabulary import train_vocabulary

LAYERS, NUM_SHARED = 6, 2
IMAGE_IDS = SOUND_IDS = 4  # the end of a run, the placeholder, one that is free, the filling
TRANSCRIBE = (
    "Transcribe the following speech segment in English:",
    "Transcribe the following speech segment:",
)
ASKED: Mapping[str, tuple[str, ...]] = {"audio": TRANSCRIBE, "image": tuple(QUESTIONS)}
FORMS = ("question first", "question last", "raw")
END_OF_TURN = "<end_of_turn>"


def train_tokenizer() -> bytes:
    """The content of a `tokenizer.model`: 256 bytes, the words of the questions, and the digits."""
    lines = [f"{text}\n" for text in (*TRANSCRIBE, *QUESTIONS, "user", "model")] * 30
    marks = ["<start_of_turn>", END_OF_TURN, "<start_of_image>", "<start_of_audio>"]
    symbols = [*marks, "\n", "\n\n", *"0123456789"]
    return train_vocabulary(lines, 380, symbols, hard_vocab_limit=False)


def config(tokenizer: Tokenizer) -> GemmaConfig:
    """Gemma 3n with all that it has, in small; a clip has 32 soft tokens, a picture 4 x 4."""
    text_ids = tokenizer.vocab_size
    sound_ids = text_ids + IMAGE_IDS
    vision, audio = _vision(tokenizer, text_ids), _audio(tokenizer, sound_ids)
    local = LayerSpec(kind="local", window=128, d_ff=192)
    wide = LayerSpec(kind="global", rope_theta=1e6, d_ff=192)
    return GemmaConfig(
        vocab_size=sound_ids + SOUND_IDS,
        d_model=64,
        num_heads=4,
        num_kv_heads=1,
        head_dim=32,
        query_pre_attn_scalar=1,
        layers=share_kv((local, wide) * (LAYERS // 2), NUM_SHARED),
        max_positions=1024,
        qk_norm=True,
        post_norms=True,
        final_soft_cap=30.0,
        optional_final_cap=True,
        scale_plus_one=False,
        v_norm=True,
        altup=AltUpConfig(num_streams=3),
        laurel_rank=8,
        per_layer=PerLayerConfig(width=8, vocab_size=text_ids),
        modality_vocabularies=(
            ModalityVocabulary(first_id=text_ids, vocab_size=IMAGE_IDS, width=vision.d_tower),
            ModalityVocabulary(first_id=sound_ids, vocab_size=SOUND_IDS, width=audio.d_tower),
        ),
        vision=vision,
        audio=audio,
    )


def _vision(tokenizer: Tokenizer, first_id: int) -> MobileNetConfig:
    """Maps of 16 x 16, 8 x 8 and 4 x 4 places; the last two are fused."""
    return MobileNetConfig(
        d_tower=64,
        d_stem=16,
        stages=(
            (
                FusedBlock(channels=24, stride=2),
                InvertedBlock(channels=32, start_kernel=3, middle_kernel=3),
            ),
            (
                InvertedBlock(channels=48, start_kernel=3, middle_kernel=3, stride=2),
                AttentionBlock(channels=48, num_heads=2, head_dim=16),
            ),
        ),
        image_size=SIDE,
        num_soft_tokens=16,
        image_token=first_id + 1,
        start_token=tokenizer.id_of("<start_of_image>"),
        end_token=first_id,
    )


def _audio(tokenizer: Tokenizer, first_id: int) -> AudioConfig:
    """Three layers; a soft token for every 80 milliseconds, as digits are short."""
    return AudioConfig(
        d_tower=64,
        num_layers=3,
        num_heads=4,
        num_mels=40,
        conv_channels=(16, 8),
        reduction=2,
        num_soft_tokens=32,
        audio_token=first_id + 1,
        start_token=tokenizer.id_of("<start_of_audio>"),
        end_token=first_id,
        sounds=SoundProcessing(max_samples=int(SECONDS * RATE)),
    )


def ask(reader: PromptReader, form: str, question: str, name: str, item: object) -> Prompt:
    """The prompt of a question about a picture or a clip, in one of `FORMS`.

    Args:
      form: A message with the question before the item or after it, or both as plain text.
      name: Of the modality.
    """
    if form == "raw":
        return reader.text(question, {name: [item]})
    part = {"type": name, name: item}
    content = [question, part] if form == "question first" else [part, question]
    return reader.chat([{"role": "user", "content": content}])
