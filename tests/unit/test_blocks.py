import json
import shutil

import numpy as np
import pytest

from fedpipe.data.blocks import BlockReader, Shard, load_prepared
from fedpipe.errors import CorpusError

LENGTH = 8


def make_shard(folder, *, num_blocks: int = 23, client_id: int = 0, dtype: str = "<u2") -> Shard:
    """Blocks whose every token is the block's number."""
    path = folder / f"{client_id}.bin"
    np.repeat(np.arange(num_blocks, dtype=dtype), LENGTH).tofile(path)
    return Shard(
        client_id=client_id, path=str(path), num_blocks=num_blocks, num_left_out=0, num_documents=1,
        num_tokens=num_blocks * (LENGTH - 2), sequence_length=LENGTH, dtype=dtype, values=(),
    )  # fmt: skip


def numbers(batch: np.ndarray) -> list[int]:
    return batch[:, 0].tolist()


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_every_epoch_is_a_permutation_and_no_two_are_alike(tmp_path, dtype):
    reader = BlockReader(make_shard(tmp_path, dtype=dtype), seed=0)
    epochs = [numbers(reader.batch(start, 23)) for start in (0, 23, 46)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_a_reader_can_start_anywhere(tmp_path):
    shard = make_shard(tmp_path)
    whole = BlockReader(shard, seed=1).batch(0, 100)
    assert whole.shape == (100, LENGTH)
    assert whole.dtype == np.int64
    for start, count in ((7, 3), (20, 6), (0, 1), (46, 54), (99, 1), (50, 0)):
        part = BlockReader(shard, seed=1).batch(start, count)
        assert (part == whole[start : start + count]).all()


def test_reading_backwards_gives_the_same_blocks(tmp_path):
    reader = BlockReader(make_shard(tmp_path), seed=1)
    late = reader.batch(60, 5)
    reader.batch(0, 5)
    assert (reader.batch(60, 5) == late).all()


def test_seeds_and_clients_have_orders_of_their_own(tmp_path):
    orders = [
        numbers(BlockReader(make_shard(tmp_path, client_id=client), seed=seed).batch(0, 23))
        for client, seed in ((0, 0), (0, 1), (1, 0), (0, -1))
    ]
    assert len({tuple(order) for order in orders}) == 4


def test_one_block_is_an_endless_stream(tmp_path):
    reader = BlockReader(make_shard(tmp_path, num_blocks=1), seed=0)
    assert numbers(reader.batch(5, 4)) == [0] * 4


def test_the_file_is_opened_at_the_first_read_and_again_after_close(tmp_path):
    shard = make_shard(tmp_path)
    hidden = tmp_path / "hidden"
    shutil.move(shard.path, hidden)
    reader = BlockReader(shard, seed=0)
    shutil.move(hidden, shard.path)
    first = reader.batch(0, 3)
    reader.close()
    assert (reader.batch(0, 3) == first).all()


def test_a_missing_file_is_one_line_with_a_way_out(tmp_path):
    shard = make_shard(tmp_path)
    shutil.move(shard.path, tmp_path / "elsewhere")
    with pytest.raises(CorpusError, match=r"data.cache_dir: expected 23 blocks in .*Delete its"):
        BlockReader(shard, seed=0).batch(0, 1)


@pytest.mark.parametrize("content", [None, "no JSON", "[]", json.dumps({"train": []})])
def test_a_folder_without_a_readable_manifest_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(CorpusError, match=r"data.cache_dir: expected prepared text in .*manifest"):
        load_prepared(str(tmp_path))
