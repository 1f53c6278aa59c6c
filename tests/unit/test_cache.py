import dataclasses
import hashlib
import json
import os
import signal
import time
from pathlib import Path

import pytest

from fedpipe.config.schema import RunConfig
from fedpipe.data import cache, digests
from fedpipe.data.blocks import PreparedData
from fedpipe.data.corpus import prepare, token_counts
from fedpipe.errors import CorpusError
from tests.helpers.corpora import make_wordpiece, rows_of, run_maker, run_python, same_content


@pytest.fixture
def run(tmp_path):
    return run_maker(tmp_path)


def phases_of(config: RunConfig) -> tuple[PreparedData, set[str]]:
    seen: set[str] = set()
    prepared = prepare(config, progress=lambda phase, done, total: seen.add(phase.split()[0]))
    return prepared, seen


def test_a_second_call_only_looks_and_changed_content_is_tokenised_again(run):
    config = run()
    first, phases = phases_of(config)
    assert phases == {"hash", "check", "tokenise"}
    again, phases = phases_of(config)
    assert (again, phases) == (first, {"hash"})
    with open(config.data.train[0], "a") as file:
        file.write(json.dumps({"text": "new words", "ward": "w0"}) + "\n")
    changed, phases = phases_of(config)
    assert "tokenise" in phases
    assert sum(shard.num_documents for shard in changed.train) == 121


def test_a_cache_hit_imports_neither_datasets_nor_tokenizers(run):
    config = run()
    prepare(config)
    code = f"""
        import sys
        from fedpipe.config.schema import DataConfig, FederationConfig, RunConfig
        from fedpipe.data.corpus import prepare
        config = RunConfig(
            data=DataConfig(**{dataclasses.asdict(config.data)!r}),
            federation=FederationConfig(num_clients=3, num_replicas=1, clients_per_round=1),
        )
        seen = set()
        prepare(config, progress=lambda phase, done, total: seen.add(phase))
        print(seen, [m for m in ("datasets", "tokenizers", "transformers", "torch", "pyarrow")
                     if m in sys.modules])
    """
    result = run_python(code)
    assert result.stdout.strip() == "{'hash files, bytes'} []", result.stderr


def test_the_key_follows_content_and_settings_but_not_paths(run, tmp_path):
    base = prepare(run()).directory
    moved = tmp_path / "elsewhere.jsonl"
    moved.write_bytes(Path(run().data.train[0]).read_bytes())
    assert prepare(run(train=(str(moved),))).directory == base
    # Only a partition that draws depends on the seed.
    assert prepare(run(seed=7)).directory == base
    assert prepare(run(num_workers=2)).directory == base
    others = [
        run(sequence_length=16), run(num_clients=2), run(partition="iid"), run(valid=()),
        run(partition="iid", seed=7), run(partition="dirichlet"), run(mask_probability=0.3),
        run(partition="dirichlet", dirichlet_alpha=2.0),
    ]  # fmt: skip
    directories = {prepare(config).directory for config in others}
    assert len(directories) == len(others)
    assert base not in directories


def test_the_tokenizer_is_part_of_the_key(run, tmp_path):
    texts = [row["text"] for row in rows_of(run())]
    one = prepare(run(tokenizer=str(make_wordpiece(tmp_path / "bert", texts)))).directory
    two = prepare(run(tokenizer=str(make_wordpiece(tmp_path / "bert", texts[:3])))).directory
    assert one != two != prepare(run()).directory


def test_a_digest_is_remembered_until_a_file_is_touched_whatever_its_size_and_time(
    tmp_path, monkeypatch
):
    path, root = tmp_path / "a.txt", tmp_path / "cache"

    def digest() -> str:
        return digests.file_digest(path, key="data.train", root=root)

    def write(text: str, *, to: Path) -> None:
        time.sleep(0.02)  # a file system's clock is coarse
        to.write_text(text)
        os.utime(to, ns=(0, 10**18))

    write("one", to=path)
    one = digest()
    # A file of this very moment may change once more under the same time stamp.
    assert not root.exists()
    monkeypatch.setattr(digests, "_SETTLED_S", -1.0)
    assert digest() == one
    (memo,) = (root / "content").iterdir()
    memo.write_text(memo.read_text().replace(one, "remembered"))
    assert digest() == "remembered"
    write("two", to=path)  # in its place
    two = digest()
    write("six", to=tmp_path / "corrected")  # cp -p of a correction
    (tmp_path / "corrected").replace(path)
    six = digest()
    assert [one, two, six] == [hashlib.sha256(t).hexdigest() for t in (b"one", b"two", b"six")]
    path.unlink()
    path.mkdir()
    with pytest.raises(CorpusError, match=r"data.train: expected a readable file, got '.*a.txt'"):
        digest()


@pytest.mark.parametrize(
    "phase", ["tokenise data.train, documents", "tokenise data.valid, documents"]
)
def test_a_killed_preparation_leaves_nothing_that_a_later_one_takes(run, tmp_path, phase):
    config = run()
    code = f"""
        import os, signal
        from fedpipe.config.schema import DataConfig, FederationConfig, RunConfig
        from fedpipe.data import packing
        from fedpipe.data.corpus import prepare
        packing._BATCH_CHARACTERS = 2000
        def kill(phase, done, total):
            if phase == {phase!r} and done > total // 2:
                os.kill(os.getpid(), signal.SIGKILL)
        prepare(RunConfig(
            data=DataConfig(**{dataclasses.asdict(config.data)!r}),
            federation=FederationConfig(num_clients=3, num_replicas=1, clients_per_round=1),
        ), progress=kill)
    """
    result = run_python(code)
    assert result.returncode == -signal.SIGKILL, result.stderr
    (left,) = (tmp_path / "cache" / "prepared").iterdir()
    assert left.name.startswith(".building.")
    assert any(file.stat().st_size for file in left.glob("*.bin"))
    prepared = prepare(config)
    assert not left.exists()
    undisturbed = prepare(run(cache_dir=str(tmp_path / "other")))
    assert same_content(prepared, undisturbed)
    assert (token_counts(prepared) == token_counts(undisturbed)).all()


@pytest.mark.parametrize("damage", ["missing", "short", "manifest"])
def test_damaged_prepared_text_is_made_again(run, damage):
    prepared = prepare(run())
    shard = Path(prepared.train[1].path)
    whole = shard.read_bytes()
    if damage == "missing":
        shard.unlink()
    elif damage == "short":
        shard.write_bytes(whole[:-2])
    else:
        (shard.parent / "manifest.json").unlink()
    assert prepare(run()) == prepared
    assert shard.read_bytes() == whole
    assert [path.name for path in shard.parent.parent.iterdir()] == [shard.parent.name]


def test_of_two_builds_of_one_key_the_first_stays(tmp_path):
    with cache.building(tmp_path, "key") as slow:
        with cache.building(tmp_path, "key") as quick:
            (quick / "manifest.json").write_text("first")
        (slow / "manifest.json").write_text("second")
    assert (tmp_path / "prepared" / "key" / "manifest.json").read_text() == "first"
    assert len(list((tmp_path / "prepared").iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_refused(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CorpusError, match=r"data.cache_dir: expected a writable directory, got"):
        prepare(run(cache_dir=str(tmp_path / "file" / "cache")))


def test_the_cache_is_where_the_desktop_keeps_caches(run, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert prepare(run(cache_dir="")).directory.startswith(str(tmp_path / "xdg" / "fedpipe"))
