"""timm's notation of blocks: read, written, and refused by name."""

import json
from pathlib import Path

import pytest

from gemma_checkpoints.hf.arch_def import blocks_from_timm, blocks_to_timm
from gemma_jax.encoder_config import AttentionBlock, FusedBlock, InvertedBlock

CONFIG = Path(__file__).parents[1] / "parity" / "data" / "g3n_vision" / "config.json"


def test_stored_blocks_are_written_as_they_were_read():
    arch_def = json.loads(CONFIG.read_text())["arch_def"]
    stages = blocks_from_timm(arch_def)
    normal = [[text.replace("_v1", "") for text in stage] for stage in blocks_to_timm(stages)]
    assert normal == arch_def


def test_one_block_of_each_kind():
    found = blocks_from_timm(
        [
            ["er_r1_k3_s2_e4_c128"],
            ["uir_r1_a3_k5_s2_e6_c256", "mqa_r1_k3_h12_v2_s1_d64_c256", "uir_r1_k5_s1_e1.5_c256"],
        ]
    )
    assert found == (
        (FusedBlock(channels=128, kernel=3, stride=2, expansion=4),),
        (
            InvertedBlock(channels=256, start_kernel=3, middle_kernel=5, stride=2, expansion=6),
            AttentionBlock(channels=256, num_heads=12, head_dim=64, kv_stride=2, kv_kernel=3),
            InvertedBlock(channels=256, middle_kernel=5, expansion=1.5),
        ),
    )


def test_only_the_first_of_repeated_blocks_has_the_stride():
    ((first, second, third),) = blocks_from_timm([["er_r3_k3_s2_e4_c64"]])
    assert (first.stride, second.stride, third.stride) == (2, 1, 1) and second == third


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("ir_r1_k3_s2_e4_c64", "unknown block 'ir'; expected er, uir, mqa"),
        ("er_r1_k3_s2_e4_c64_se0.25", "cannot use 'se0.25'; expected er_r#_k#_e#_c#_s#"),
        ("er_r1_k3_s2_e4_c64_noskip", "cannot use 'noskip'"),
        ("er_r1_k3_k5_s2_e4_c64", "cannot use 'k5'"),
        ("er_r1_k3.5_s2_e4_c64", "3.5 must be an integer"),
        ("uir_r1_a3_s2_e4_c64", "k missing"),
        ("er_r1_k3_s2_e4_c60", "c a multiple of 8"),
        ("er_r0_k3_s2_e4_c64", "r must be at least 1"),
        ("er_r1_k3_s1_e4_c64", "s must be 2 in the first block of a stage"),
        ("mqa_r1_k3_h12_v2_s2_d64_c64", "must begin with a stride"),
        ("uir_r1_a0_k0_s2_e4_c64", "stride=2 needs a start_kernel"),
        ("", "unknown block ''"),
    ],
)
def test_what_is_not_known_is_refused(text, error):
    with pytest.raises(ValueError, match=f".*{error}"):
        blocks_from_timm([[text]])


def test_a_later_stride_is_refused():
    with pytest.raises(ValueError, match="s must be 1 after the first of a stage"):
        blocks_from_timm([["er_r1_k3_s2_e4_c64", "er_r1_k3_s2_e4_c64"]])


def test_blocks_that_timm_would_build_otherwise_are_not_written():
    with pytest.raises(ValueError, match="s must be 2 in the first block"):
        blocks_to_timm(((FusedBlock(channels=64),),))
