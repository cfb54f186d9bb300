"""Batches of a run: their order, their shapes, and how a run goes on after it has been stopped."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
import tiny
from examples_on_disk import chat, picture, reader_cfg, seer_cfg, tokenizer, words, write

from gemma_jax import DataSettings, dpo, make_data, next_token
from gemma_jax.multimodal.modality import modalities_of

pytest.importorskip("grain", reason='training data need Grain: pip install "gemma-jax[train]"')


def dataset(folder, count=11, images=True):
    """Rows of different lengths, some with an image or two."""
    rows = []
    for i in range(count):
        items = [words(1 + i % 5, i)]
        for k in range(i % 3 if images else 0):
            name = picture(folder / f"{i}-{k}.png", seed=10 * i + k)
            items.append({"type": "image", "path": name})
        rows.append(chat(items, words(1 + i % 7, i)))
    return write(folder / "rows.jsonl", rows)


def settings(files, **changes):
    fields = dict(files=files, tokens_per_row=96, rows=2, seed=3, epochs=2)
    return DataSettings(**(fields | changes))


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """A set with images, and all batches of two epochs."""
    name = dataset(tmp_path_factory.mktemp("seen"))
    data = make_data(settings(name), tokenizer(), seer_cfg())
    return name, data, list(data)


def assert_same(ours, theirs):
    ours, theirs = jax.tree.leaves(ours), jax.tree.leaves(theirs)
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def lines(ids):
    return [int(place.rpartition(":")[2]) for row in ids for place in row]


def test_batches_have_one_shape(seen):
    _, data, batches = seen
    assert len(batches) == len(data) > 4
    shapes = {tuple(leaf.shape for leaf in jax.tree.leaves(batch)) for batch in batches}
    assert len(shapes) == 1
    batch = batches[0]
    assert batch.batch.tokens_BT.shape == (2, 96)
    assert batch.media.inputs["image"].shape == (2 * data.survey.most["image"], 3, 56, 56)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(batch))


def test_every_epoch_reads_every_row_once(seen):
    _, data, batches = seen
    counts = Counter(lines(row for i in range(len(batches)) for row in data.batch_ids(i)))
    assert counts == {line: 2 for line in range(1, 12)}
    rows = [row for i in range(len(batches)) for row in data.batch_ids(i) if row]
    first, second = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    assert first != second and sorted(first) == sorted(second)


def test_it_goes_on_at_every_position_bit_for_bit(seen):
    """Also with images, and where a row holds several examples."""
    name, data, batches = seen
    assert any(len(row) > 1 for row in data.batch_ids(0))
    for done in range(len(batches) + 1):
        before = iter(make_data(settings(name), tokenizer(), seer_cfg()) if done < 2 else data)
        for _ in range(done):
            next(before)
        state = json.loads(json.dumps(before.get_state()))
        again = iter(data)
        again.set_state(state)
        left = list(again)
        assert len(left) == len(batches) - done
        for ours, theirs in zip(left, batches[done:]):
            assert_same(ours, theirs)
        before.close(), again.close()


def test_rows_are_named(seen):
    name, data, _ = seen
    batches = iter(data)
    with pytest.raises(ValueError, match="no batch has been read"):
        batches.batch_ids()
    next(batches), next(batches)
    assert batches.batch_ids() == data.batch_ids(1)
    assert all(place.startswith(f"{name}:") for row in batches.batch_ids() for place in row)
    batches.close()


@pytest.mark.parametrize("threads", [0, 1, 5])
def test_threads_change_nothing(seen, threads):
    name, _, batches = seen
    data = make_data(settings(name, threads=threads), tokenizer(), seer_cfg())
    for ours, theirs in zip(data, batches, strict=True):
        assert_same(ours, theirs)


def test_processes_share_each_batch(seen):
    """Rows in order make the whole; soft tokens are numbered through all of it."""
    name, _, batches = seen
    parts = [
        make_data(settings(name), tokenizer(), seer_cfg(), process_index=i, process_count=2)
        for i in range(2)
    ]
    for one, two, whole in zip(*parts, batches, strict=True):
        together = jax.tree.map(lambda a, b: np.concatenate([a, b]), one, two)
        assert_same(together, whole)
    assert parts[0].batch_ids(1) == parts[1].batch_ids(1)
    with pytest.raises(ValueError, match="2 rows of a batch for process 0 of 3"):
        make_data(settings(name), tokenizer(), seer_cfg(), process_count=3)


def test_a_run_goes_on_with_other_processes(seen):
    name, data, batches = seen
    half = make_data(settings(name), tokenizer(), seer_cfg(), process_index=1, process_count=2)
    before = iter(half)
    next(before), next(before)
    again = iter(data)
    again.set_state(before.get_state())
    assert_same(next(again), batches[2])
    as_arrays = jax.tree.map(jnp.asarray, before.get_state())  # as in a TrainState
    again.set_state(as_arrays)
    assert_same(next(again), batches[2])
    before.close(), again.close()


def test_states_of_other_data_are_refused(seen, tmp_path):
    name, data, _ = seen
    state = iter(data).get_state()
    others = [
        make_data(settings(name, seed=4), tokenizer(), seer_cfg()),
        make_data(settings(name, rows=3), tokenizer(), seer_cfg()),
        make_data(settings(name, train_on="all"), tokenizer(), seer_cfg()),
        make_data(settings(dataset(tmp_path, 10)), tokenizer(), seer_cfg()),
    ]
    for other in others:
        with pytest.raises(ValueError, match="begun with other data"):
            iter(other).set_state(state)
    with pytest.raises(ValueError, match="batch 99 lies behind the end"):
        iter(data).set_state(state | {"next_batch": 99})
    longer = make_data(settings(name, epochs=5), tokenizer(), seer_cfg())
    iter(longer).set_state(state)  # more epochs of the same are no other data


def test_without_shuffling_rows_come_in_order(tmp_path):
    name = dataset(tmp_path, 7, images=False)
    plain = settings(name, packing="off", shuffle=False, epochs=1)
    data = make_data(plain, tokenizer(), reader_cfg())
    assert [lines(data.batch_ids(i)) for i in range(len(data))] == [[1, 2], [3, 4], [5, 6], [7]]
    *_, last = data
    assert last.batch.documents_BT is None and last.media is None
    assert (last.batch.positions_BT[1] == -1).all() and not last.weights_BT[1].any()
    held_out = make_data(settings(name).held_out(name), tokenizer(), reader_cfg())
    assert sorted(lines(r for i in range(len(held_out)) for r in held_out.batch_ids(i))) == [
        *range(1, 8)
    ]


@pytest.mark.parametrize("rows", [1, 2])
def test_without_end(tmp_path, rows):
    name = dataset(tmp_path, 5, images=False)
    data = make_data(settings(name, epochs=None, rows=rows), tokenizer(), reader_cfg())
    with pytest.raises(ValueError, match="have no length"):
        len(data)
    batches = iter(data)
    for _ in range(int(3 * data.batches_per_epoch) + 1):
        next(batches)
    far = batches.get_state() | {"next_batch": 10**9}
    batches.set_state(far)
    assert next(batches).batch.tokens_BT.shape == (rows, 96)
    batches.close()


def test_seeds_share_no_epoch(tmp_path):
    """Grain's own order of epoch 1 of seed 0 is that of epoch 0 of seed 1."""
    name = dataset(tmp_path, 9, images=False)

    def epochs(seed):
        own = settings(name, seed=seed, epochs=4, rows=9, packing="off")
        data = make_data(own, tokenizer(), reader_cfg())
        return [tuple(lines(data.batch_ids(i))) for i in range(4)]

    orders = [order for seed in range(4) for order in epochs(seed)]
    assert len(set(orders)) == len(orders)


def test_a_file_that_changes_under_a_run(tmp_path):
    name = dataset(tmp_path, 5, images=False)
    data = make_data(settings(name, threads=1, rows=1, packing="off"), tokenizer(), reader_cfg())
    with open(name, "a") as file:
        file.write("more\n")  # behind what is read
    batches = iter(data)
    first = next(batches)
    text = open(name).read()
    open(name, "w").write("xx\n" + text)
    state = batches.get_state()
    batches.set_state(state)  # what was read ahead is dropped
    with pytest.raises(ValueError, match=r"rows\.jsonl:\d+ cannot be read any more"):
        next(batches)
    assert batches.get_state() == state
    open(name, "w").write(text.replace("the", "dog"))
    with pytest.raises(ValueError, match="has changed since the run began"):
        next(batches)
    open(name, "w").write(text)
    assert_same(next(batches), data.batch(1))
    assert_same(first, data.batch(0))
    batches.close()


def test_pairs(tmp_path):
    image = picture(tmp_path / "a.png")
    rows = [
        {"messages": chat([words(2, i), {"type": "image", "path": image}])["messages"]}
        | {"chosen": words(3, i), "rejected": words(5, i + 1)}
        for i in range(3)
    ]
    name = write(tmp_path / "pairs.jsonl", rows)
    data = make_data(settings(name, pairs=True, epochs=1, packing="off"), tokenizer(), seer_cfg())
    first, second = (batch.rows for batch in data)
    tokens_BT, weights_BT = first.batch.tokens_BT, first.weights_BT
    assert tokens_BT.shape == (4, 96)
    for i in range(2):
        chosen, rejected = (weights_BT[row] > 0 for row in (i, i + 2))
        prompt = np.flatnonzero(chosen)[0]
        np.testing.assert_array_equal(tokens_BT[i, :prompt], tokens_BT[i + 2, :prompt])
        line = lines([data.batch_ids(0)[i]])[0]
        assert data.batch_ids(0)[i] == data.batch_ids(0)[i + 2]
        said = [
            tokenizer().decode(tokens_BT[r][m].tolist())
            for r, m in ((i, chosen), (i + 2, rejected))
        ]
        expected = [rows[line - 1][key] + "<end_of_turn>\n" for key in ("chosen", "rejected")]
        assert said == expected
    assert not second.weights_BT[[1, 3]].any() and second.weights_BT[[0, 2]].any(axis=1).all()
    (image_index,) = {int(i) for i in first.media.index_BT[3] if i >= 0 and i % 4 == 0}
    assert image_index == 3 * 4


@pytest.fixture(scope="module")
def preferences(tmp_path_factory):
    """Pairs with what a reference says of them."""
    rows = [
        {"prompt": words(2 + i, i), "chosen": words(3, i), "rejected": words(5, i + 1)}
        | {"ref_chosen_logps": -10.0 - i, "ref_rejected_logps": -20.5 - i}
        for i in range(5)
    ]
    return write(tmp_path_factory.mktemp("pairs") / "rows.jsonl", rows)


def test_packed_pairs_stay_pairs(preferences):
    """With the same number in both rows; and their references, by number."""
    data = make_data(settings(preferences, pairs=True, epochs=1), tokenizer(), reader_cfg())
    for number, batch in enumerate(data):
        documents_BT = np.where(batch.rows.weights_BT > 0, batch.rows.batch.documents_BT, 0)
        for i, row in enumerate(data.batch_ids(number)[:2]):
            expected = np.zeros((2, 97), np.float32)
            for n, line in enumerate(lines([row]), 1):
                expected[:, n] = -9.0 - line, -19.5 - line
                for side in (i, i + 2):
                    assert (documents_BT[side] == n).any()
            np.testing.assert_array_equal(batch.reference_logps_B[[i, i + 2]], expected)


def test_loss_of_pairs_does_not_depend_on_packing(preferences):
    model = tiny.model(reader_cfg())
    losses = []
    for packing in ("off", "in_order"):
        own = settings(preferences, pairs=True, epochs=1, rows=5, packing=packing)
        (batch,) = make_data(own, tokenizer(), reader_cfg())
        assert batch.reference_logps_B.shape == ((10,) if packing == "off" else (10, 97))
        loss, said = dpo(model, batch)
        assert said["pairs"] == 5
        losses.append(float(loss))
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_what_towers_read_is_where_its_placeholders_are(seen):
    """The soft token at each place is that of the image at its place in the file."""
    _, data, batches = seen
    model = tiny.model(seer_cfg())
    (modality,) = modalities_of(model.cfg)
    for number, batch in enumerate(batches[:2]):
        media, tokens_BT = batch.media, batch.batch.tokens_BT
        np.testing.assert_array_equal(media.index_BT >= 0, tokens_BT == modality.placeholder)
        np.testing.assert_array_equal(media.block_BT > 0, tokens_BT == modality.placeholder)
        for row_index, row in zip(media.index_BT, data.batch_ids(number)):
            placed = [media.inputs["image"][i // 4] for i in row_index if i >= 0 and i % 4 == 0]
            files = [f"{line - 1}-{k}.png" for line in lines([row]) for k in range((line - 1) % 3)]
            folder = data.survey.entries[0].place.path.parent
            expected = [modality.prepare(folder / name).inputs[0] for name in files]
            np.testing.assert_array_equal(placed, expected)


def test_losses_of_a_set_do_not_depend_on_packing(seen):
    """The mean over all tokens of an epoch, packed and not."""
    name, _, _ = seen
    model = tiny.model(seer_cfg())
    loss = jax.jit(next_token)
    means = []
    for packing in ("off", "best_fit"):
        data = make_data(settings(name, packing=packing, epochs=1), tokenizer(), seer_cfg())
        values = [loss(model, batch) for batch in data]
        tokens = sum(float(said["tokens"]) for _, said in values)
        means.append((tokens, sum(float(v * said["tokens"]) for v, said in values) / tokens))
    assert means[0][0] == means[1][0]
    np.testing.assert_allclose(means[0][1], means[1][1], rtol=1e-6)


def hearer_cfg():
    """A Gemma 3n that sees and hears; the ids of its markers are those of the vocabulary."""
    tok = tokenizer()
    ids = {"start_token": tok.id_of("<start_of_image>"), "end_token": tok.id_of("<end_of_image>")}
    cfg = tiny.seeing_and_hearing(tiny.gemma3n(layers=3, num_shared=0))
    vocabularies = [replace(v, first_id=v.first_id + 440) for v in cfg.modality_vocabularies]
    return replace(
        cfg,
        vocab_size=540,
        vision=replace(cfg.vision, image_token=531, **ids),
        audio=replace(cfg.audio, audio_token=535, start_token=4, end_token=5),
        modality_vocabularies=tuple(vocabularies),
    )


@pytest.fixture
def heard(tmp_path):
    """Two rows with clips of two lengths, one with an image."""
    for seconds in (0.3, 0.5):
        samples = np.random.default_rng(0).standard_normal(int(16000 * seconds)) / 9
        soundfile.write(tmp_path / f"{seconds}.wav", samples, 16000)
    image = {"type": "image", "path": picture(tmp_path / "a.png")}
    short, long = ({"type": "audio", "path": f"{seconds}.wav"} for seconds in (0.3, 0.5))
    rows = [chat(["hear", short, image], "a dog"), chat([long, short], "a fox")]
    name = write(tmp_path / "a.jsonl", rows)
    return settings(name, epochs=1, tokens_per_row=64, shuffle=False, packing="off")


def test_sounds(heard):
    cfg = hearer_cfg()
    (batch,) = make_data(heard, tokenizer(), cfg)
    clips, media = batch.media.inputs["audio"], batch.media
    assert media.block_BT is None and media.inputs["image"].shape[0] == 2
    first, blank, long, short = clips.lengths_I
    assert blank == 1 < first == short < long == clips.mel_ITM.shape[1]
    np.testing.assert_array_equal(clips.mel_ITM[0], clips.mel_ITM[3])
    items = [list(dict.fromkeys(row[row >= 0] // 6)) for row in media.index_BT]
    assert items == [[2, 0], [4, 5]]  # images first: one in each row; then two sounds in each
    np.testing.assert_array_equal(media.index_BT >= 0, batch.batch.tokens_BT >= 531)


@pytest.mark.nightly
def test_sounds_of_other_rows_change_nothing(heard):
    model = tiny.model(hearer_cfg())
    loss = jax.jit(next_token)
    (batch,) = make_data(heard, tokenizer(), model.cfg)
    together, said = loss(model, batch)
    alone = make_data(replace(heard, rows=1), tokenizer(), model.cfg)
    values = [loss(model, one) for one in alone]
    expected = sum(float(v * s["tokens"]) for v, s in values) / float(said["tokens"])
    np.testing.assert_allclose(together, expected, rtol=1e-5)


def test_without_grain():
    code = (
        "import sys; sys.modules['grain'] = None\n"
        "import gemma_jax as gj\n"
        "try: gj.make_data(None, None, None)\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == 'training data need Grain: pip install "gemma-jax[train]"\n'
