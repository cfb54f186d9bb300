"""Random damage to headers: an error or a model, never a crash, a hang, or a large allocation."""

import json
import shutil
import time
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_checkpoints import DATA, plain, random_model, tiny, write_gguf

import gemma_checkpoints as gc

LIMIT_BYTES, LIMIT_SECONDS = 32 << 20, 10
FUZZ = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def survives(path) -> None:
    """Opening and matching, which is all that headers decide, stays small and quick."""
    tracemalloc.start()
    start = time.monotonic()
    try:
        gc.describe(path)
    except gc.CheckpointError as error:
        assert str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < LIMIT_BYTES, f"{peak:,} bytes allocated"
    assert time.monotonic() - start < LIMIT_SECONDS


EDITS = st.lists(
    st.tuples(
        st.integers(0, 1 << 30),
        st.one_of(
            st.integers(0, 255).map(lambda n: bytes([n])),
            st.sampled_from([0, 1, 9, 1 << 31, 1 << 32, 1 << 62, (1 << 64) - 1]).map(
                lambda n: n.to_bytes(8, "little")
            ),
        ),
    ),
    min_size=1,
    max_size=4,
)


def damage(data: bytes, edits, end: int) -> bytes:
    out = bytearray(data)
    for position, value in edits:
        position %= end
        out[position : position + len(value)] = value
    return bytes(out[: len(data)])


@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    model = random_model(tiny("gemma3-4b", d_model=64, num_heads=2, num_kv_heads=1, head_dim=32))
    return write_gguf(path, model, "gemma3", plain).read_bytes()


@FUZZ
@given(edits=EDITS, keep=st.floats(0, 1))
def test_gguf(edits, keep, gguf_bytes, tmp_path):
    end = gguf_bytes.index(b"output_norm.weight") + 50
    data = damage(gguf_bytes, edits, end)
    path = tmp_path / "m.gguf"
    path.write_bytes(data if keep > 0.3 else data[: int(keep * 3 * end)])
    survives(path)


SAFE = (DATA / "g3_text" / "model.safetensors").read_bytes()
SAFE_END = 8 + int.from_bytes(SAFE[:8], "little")


def hf_folder_with(tmp_path, config: bytes, weights: bytes):
    folder = tmp_path / "hf"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "config.json").write_bytes(config)
    (folder / "model.safetensors").write_bytes(weights)
    return folder


CONFIG = (DATA / "g3_text" / "config.json").read_bytes()


@FUZZ
@given(edits=EDITS, keep=st.floats(0, 1))
def test_safetensors_bytes(edits, keep, tmp_path):
    data = damage(SAFE, edits, SAFE_END)
    data = data if keep > 0.3 else data[: int(keep * 3 * SAFE_END)]
    survives(hf_folder_with(tmp_path, CONFIG, data))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 70), 1 << 70)
    | st.floats()
    | st.sampled_from(["BF16", "F32", "F64", "I4", "", "full_attention", "linear"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


@FUZZ
@given(
    key=st.sampled_from(["dtype", "shape", "data_offsets"]),
    value=JSON,
    name=st.sampled_from(["model.norm.weight", "model.embed_tokens.weight", "new"]),
)
def test_safetensors_fields(key, value, name, tmp_path):
    header = json.loads(SAFE[8:SAFE_END])
    header[name] = {**header.get(name, {}), key: value}
    text = json.dumps(header).encode()
    data = len(text).to_bytes(8, "little") + text + SAFE[SAFE_END:]
    survives(hf_folder_with(tmp_path, CONFIG, data))


@FUZZ
@given(key=st.sampled_from([*json.loads(CONFIG), "rope_scaling", "text_config"]), value=JSON)
def test_config_fields(key, value, tmp_path):
    config = json.dumps(json.loads(CONFIG) | {key: value}).encode()
    survives(hf_folder_with(tmp_path, config, SAFE))


SEEING = json.loads((DATA / "g3_mm" / "config.json").read_bytes())
SEEING_WEIGHTS = (DATA / "g3_mm" / "model.safetensors").read_bytes()


@FUZZ
@given(
    key=st.sampled_from([*SEEING["vision_config"], "mm_tokens_per_image", "image_token_index"]),
    value=JSON,
)
def test_vision_config_fields(key, value, tmp_path):
    inside = key in SEEING["vision_config"]
    change = {"vision_config": SEEING["vision_config"] | {key: value}} if inside else {key: value}
    config = json.dumps(SEEING | change).encode()
    survives(hf_folder_with(tmp_path, config, SEEING_WEIGHTS))
