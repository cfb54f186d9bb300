"""`gemma-jax info`."""

import json
import socket
from pathlib import Path

import pytest
from marks import nightly

DATA = Path(__file__).parent.parent / "parity" / "data"


def facts(cli, source) -> dict:
    ran = cli("info", source, "--json")
    assert (ran.code, ran.err) == (0, "")
    return json.loads(ran.out)


@pytest.fixture
def no_network(monkeypatch):
    monkeypatch.setattr(socket, "socket", None)


@pytest.mark.parametrize("name", ["gemma3-4b-it", *nightly("gemma3-4b", "gemma3-4b-pt")])
def test_preset(cli, name, no_network):
    told = facts(cli, name)
    parts = ("text_parameters", "vision_tower_parameters", "vision_projector_parameters")
    assert [told[part] for part in parts] == [3_880_263_168, 416_866_032, 2_950_272]
    assert told["parameters"] == sum(told[part] for part in parts)
    assert (told["image_size"], told["soft_tokens_per_image"]) == (896, 256)
    assert (told["local_layers"], told["global_layers"], told["window"]) == (29, 5, 1024)
    assert list(told["cache_bytes_bfloat16"]) == ["1024", "8192", "32768", "131072"]


def test_a_model_without_a_tower_says_nothing_of_images(cli, no_network):
    told = facts(cli, "gemma3-1b")
    assert told["parameters"] == 999_885_952
    assert not any("vision" in name or "image" in name for name in told)


def test_folder(cli, mute):
    told = facts(cli, mute)
    assert told["format"] == "Hugging Face"
    assert told["file_bytes"] == 2 * told["parameters"] == told["file_bytes_by_encoding"]["BF16"]
    assert list(told["cache_bytes_bfloat16"]) == ["512"]  # its context


def test_a_folder_with_a_tower_is_described_by_its_headers(cli, monkeypatch):
    from gemma_checkpoints.safetensors_file import SafetensorsFile

    monkeypatch.setattr(SafetensorsFile, "read", None)
    told = facts(cli, DATA / "g3_mm")
    assert told["file_bytes"] == 2 * told["parameters"]
    assert (told["image_size"], told["soft_tokens_per_image"]) == (56, 4)
    assert (told["image_patches"], told["vision_tower_layers"]) == (16, 3)
    out = cli("info", DATA / "g3_mm").out
    for words in ("vision tower parameters", "soft tokens per image", "image size"):
        assert words in out


def test_table(cli, mute):
    out = cli("info", mute).out
    for words in ("parameters", "local layers", "cache at 512 tokens", "in the file as BF16"):
        assert words in out


def rows(cli, *words) -> dict[str, str]:
    """The lines for people, which fit into 80 columns."""
    lines = cli("info", *words).out.splitlines()
    assert all(len(line) <= 80 for line in lines)
    return {name.strip(): value for name, _, value in (line.partition("  ") for line in lines)}


def test_people_see_round_units(cli, no_network):
    told = {name: value.strip() for name, value in rows(cli, "gemma3-4b").items()}
    assert told["parameters"] == "4.30 B"
    assert told["embedding parameters"] == "671.3 M"
    assert [told[f"weights ({dtype})"] for dtype in ("float32", "bfloat16", "int8")] == [
        "17.20 GB", "8.60 GB", "4.31 GB",
    ]  # fmt: skip
    assert told["cache at 1,024 tokens (bfloat16)"] == "142.6 MB"


def test_a_model_without_local_layers_has_no_window(cli, no_network):
    assert facts(cli, "gemma-2b")["window"] is None
    assert rows(cli, "gemma-2b")["window"].strip() == "none"


def test_int8_bytes_are_those_that_are_planned(cli, no_network):
    from gemma_jax.planning import Work, find_topology, make_plan
    from gemma_jax.presets import preset

    work = Work("decode", 1, 1024, weights="int8")
    cfg = preset("gemma3n-e2b")
    plan = make_plan("", cfg, find_topology("gpu:h100"), work, compiles=False)
    assert facts(cli, "gemma3n-e2b")["weight_bytes"]["int8"] == plan.weights_bytes


def test_every_storage_is_shown_with_its_caches(cli, no_network):
    told = facts(cli, "gemma3-1b")
    sizes = told["weight_bytes"]
    assert list(sizes)[:3] == ["float32", "bfloat16", "int8"] and "stored" not in sizes
    assert sizes["int4"] == sizes["int4:32"] > sizes["int4:64"] > sizes["int4:channel"]
    caches = [told[f"cache_bytes_{dtype}"]["8192"] for dtype in ("float32", "bfloat16", "int8")]
    assert caches[0] == 2 * caches[1] and caches[2] == caches[1] * (256 + 4) // 512
    line = next(one for one in cli("info", "gemma3-1b").out.splitlines() if " int8:64 " in one)
    both = (sizes["int8:64"] + caches[1]) / 1e9
    assert line.split()[:2] == ["int8:64", f"{sizes['int8:64'] / 1e9:.2f}"]
    assert f"{both:.2f}" in line.split()[2:]


def test_layers_come_before_oddities_and_counts_are_explained(cli, no_network):
    told = rows(cli, "gemma3n-e4b")
    names = list(told)
    assert names.index("layers") < names.index("altup streams")
    assert told["published parameters"].strip() == "7.85 B, unused keys and values counted"


def test_where_an_answer_ends(cli, talker):
    told = facts(cli, talker)
    assert told["stop_ids"] and len(told["stop_pieces"]) == len(told["stop_ids"])
    first, piece = told["stop_ids"][0], told["stop_pieces"][0]
    assert f"{first} {piece}" in rows(cli, talker)["stop ids"]


def test_real_gguf(cli, real_gguf):
    told = facts(cli, real_gguf)
    assert (told["format"], told["parameters"]) == ("GGUF", 268_098_176)
    assert "Q4_K" in told["file_bytes_by_encoding"]


def test_stored_bytes_are_those_of_a_load(cli, real_gguf):
    import jax

    import gemma_jax as gj
    from gemma_jax.weights.protocol import array_bytes

    told = facts(cli, real_gguf)["weight_bytes"]["stored"]
    model = gj.load_model(str(real_gguf), weights="stored", dtype="bfloat16")
    assert told == sum(map(array_bytes, jax.tree.leaves(model)))


def test_gemma_3n(cli, no_network):
    """The published counts, and exact bytes of cache and of every placement."""
    ran = cli("info", "gemma3n-e4b", "--placement", "--json")
    told = json.loads(ran.out)
    assert told["published_parameters"] == 7_849_978_192
    assert told["published_effective_parameters"] == 3_980_491_248
    assert told["cache_bytes_bfloat16"]["32768"] == 285_212_672
    assert told["cache_bytes_if_all_layers_were_global_bfloat16"]["32768"] == 2_348_810_240
    assert (told["layers_with_a_cache"], told["layers_sharing_keys_and_values"]) == (20, 15)
    assert (told["altup_streams"], told["sparse_layers"], told["d_ff"]) == (4, 10, 16_384)
    device, host, disk = (told["placement"][k]["bfloat16"] for k in ("device", "host", "disk"))
    assert device == {"device": told["weight_bytes"]["bfloat16"]}
    assert device["device"] - host["device"] == host["host"] == 4_697_620_480
    assert disk == {"device": host["device"], "disk": host["host"]}
    out = cli("info", "gemma3n-e4b", "--placement").out
    assert "4.70 GB on host" in out
    assert told["placement"]["disk"]["int4"] == {
        "device": told["weight_bytes"]["int4"] - 5 * told["per_layer_table_parameters"] // 8,
        "disk": 4_697_620_480,
    }
    assert "285.2 MB, 12.1%" in out


def test_a_slice(cli, refused, no_network, tmp_path):
    told = json.loads(cli("info", "gemma3n-e4b", "--slice", "e2b", "--json").out)
    small = facts(cli, "gemma3n-e2b")
    assert told == small
    assert small["published_parameters"] == 5_439_438_272
    assert small["published_effective_parameters"] == 1_905_495_648
    file = tmp_path / "slice.json"
    file.write_text(json.dumps({"ffn_widths": [1000] * 34 + [2000]}))
    told = json.loads(cli("info", "gemma3n-e4b", "--slice", file, "--json").out)
    assert told["d_ff"] == [1000] * 34 + [2000]
    assert "choose one of: e4b" in refused("info", "gemma3n-e4b", "--slice", "e1b")
    assert "only Gemma 3n and 4 have" in refused("info", "gemma3-1b", "--placement")


def test_heads_that_differ_by_layer(cli, no_network):
    told = facts(cli, "gemma4-e2b")
    assert told["parameters"] == 4_628_569_344 + 35  # and a scale per layer
    assert told["head_dim"] == [256, 256, 256, 256, 512] * 7 and told["kv_heads"] == 1
    assert told["d_ff"] == [6_144] * 15 + [12_288] * 20
    assert told["per_layer_table_parameters"] == 262_144 * 35 * 256
    assert "published_parameters" not in told  # its files have not been seen
    # 12 rings of 512 slots and 3 global layers, of keys and values in two bytes.
    assert told["cache_bytes_bfloat16"]["8192"] == 4 * (12 * 512 * 256 + 3 * 8_192 * 512)
    whole = told["cache_bytes_if_all_layers_were_global_bfloat16"]["8192"]
    assert whole == 4 * 8_192 * (28 * 256 + 7 * 512)
